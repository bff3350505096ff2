"""Features of several strides: sizes and channels, which are taken, pruning, layers for layer-wise rates."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models import group_parameters, model_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from genas_plugins.darts.zoo import ZOO


def hooked(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of the stem and of every cell, by hooks on the whole network."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
        for name, module in (("stem0", model.stem0), *((f"cells.{i}", cell) for i, cell in enumerate(model.cells)))
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


# Six cells: the reductions are cells 2 and 4, so the last cells before them are 1 and 3.
TAPS = ["stem0", "cells.1", "cells.3", "cells.5"]


def expected_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    seen = hooked(model, x)
    return [seen[name] for name in TAPS]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ZOO)
def test_declared_channels_and_strides_are_those_of_the_tensors(images, name):
    model = timm.create_model(name, init_channels=4, features_only=True).eval()
    # The stem has C channels; cells concatenate four nodes, of C, 2 C and 4 C channels.
    assert model.feature_info.channels() == [4, 16, 32, 64]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    # The first of the 14 cells to reduce is number 4, the second number 9.
    assert model.feature_info.module_name() == ["stem0", "cells.3", "cells.8", "cells.13"]
    with torch.no_grad():
        features = model(images(1, 3, 97, 64))
    expected = [(1, 4, 25, 16), (1, 16, 13, 8), (1, 32, 7, 4), (1, 64, 4, 2)]
    assert [tuple(feature.shape) for feature in features] == expected


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (64, 64), (97, 97), (64, 97), (225, 40)])
def test_sizes_are_rounded_up(small, images, size):
    model = small(auxiliary=True).train()
    x = images(2, 3, *size)
    final, features = model.forward_intermediates(x)
    for feature, stride in zip(features, (4, 8, 16, 32), strict=True):
        assert feature.shape[2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert torch.equal(final, features[-1])
    assert all(bool(logits.isfinite().all()) and logits.shape == (2, 10) for logits in model(x))


def test_a_large_odd_image(small, images):
    model = small(init_channels=2, num_cells=3, features_only=True).eval()
    with torch.no_grad():
        sizes = [tuple(feature.shape[2:]) for feature in model(images(1, 3, 769, 769))]
    # Cityscapes crops: 769 = 32 * 24 + 1.
    assert sizes == [(193, 193), (97, 97), (49, 49), (25, 25)]


@pytest.mark.parametrize(
    ("indices", "taken"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ((1, 3), (1, 3)),
        ((-1,), (3,)),
        ((0,), (0,)),
        ((1,), (1,)),
        ((2, 0), (2, 0)),
        ((-2, 1), (2, 1)),
        (2, (2, 3)),
    ],
)
def test_any_features_can_be_taken(small, images, randomize, indices, taken):
    whole = randomize(small()).eval()
    x = images(2, 3, 64, 64)
    expected = [expected_features(whole, x)[index] for index in taken]
    channels, strides = [4, 16, 32, 64], [4, 8, 16, 32]
    model = randomize(small(features_only=True, out_indices=indices)).eval()
    # The same seed gives the same weights; the statistics come from the whole network.
    model.load_state_dict(whole.state_dict())
    with torch.no_grad():
        assert_same(model(x), expected)
        final, features = whole.forward_intermediates(x, indices=indices if isinstance(indices, int) else list(indices))
    assert model.feature_info.channels() == [channels[index] for index in taken]
    assert model.feature_info.reduction() == [strides[index] for index in taken]
    assert_same(features, expected)
    assert torch.equal(final, expected_features(whole, x)[-1])


@pytest.mark.parametrize("kind", ["hook", "fx", "getter"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_timms_feature_classes_agree(small, images, randomize, kind, output_stride):
    arguments = {"features_only": True, "out_indices": (0, 2, 3), "output_stride": output_stride}
    models = [randomize(small(**arguments)), randomize(small(feature_cls=kind, **arguments))]
    x = images(2, 3, 97, 64)
    with torch.no_grad():
        default, other = (model.eval()(x) for model in models)
    assert_same(other, default)
    strides = [min(stride, output_stride) for stride in (4, 16, 32)]
    for model in models:
        assert model.feature_info.reduction() == strides
        assert model.feature_info.channels() == [feature.shape[1] for feature in default] == [4, 32, 64]
    for feature, stride in zip(default, strides, strict=True):
        assert feature.shape[2:] == (math.ceil(97 / stride), 64 // stride)


def test_intermediates_stop_early_and_count_the_cells_they_need(small, images, randomize):
    model = randomize(small(auxiliary=True)).eval()
    x = images(2, 3, 64, 64)
    expected = expected_features(model, x)
    ran = []
    for index, cell in enumerate(model.cells):
        cell.register_forward_hook(lambda module, args, out, index=index: ran.append(index))
    with torch.no_grad():
        for arguments, cells in (
            ({}, 6),
            ({"stop_early": True}, 4),
            ({"intermediates_only": True}, 4),
        ):
            ran.clear()
            out = model.forward_intermediates(x, indices=[0, 2], **arguments)
            assert ran == list(range(cells))
            assert_same(out if "intermediates_only" in arguments else out[1], [expected[0], expected[2]])
            if not arguments:
                assert torch.equal(out[0], model.forward_features(x))
            elif "stop_early" in arguments:
                assert torch.equal(out[0], expected[2])
        assert_same(model.forward_intermediates(x, norm=True, intermediates_only=True), expected)


def test_features_can_be_trained(small, images):
    x = images(2, 3, 64, 64)
    model = small(features_only=True, drop_path_rate=0.2).train()
    model.set_grad_checkpointing()
    sum(feature.square().mean() for feature in model(x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((0, 4), r"Feature index 4 is out of range: .* 4 features \(0 to 3, or -4 to -1\), of strides 4, 8, 16, 32"),
        ((-5,), r"Feature index -5 is out of range: .*0 to 3, or -4 to -1"),
        (5, "last 5 features .* has 1 to 4"),
        (0, "last 0 features .* has 1 to 4"),
        ((), "No feature was asked for"),
    ],
)
def test_features_that_do_not_exist_are_refused(small, images, indices, message):
    with pytest.raises(ValueError, match=message):
        small(features_only=True, out_indices=indices)
    model = small()
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(images(1, 3, 32, 32), indices=indices)
    with pytest.raises(ValueError, match=message):
        model.prune_intermediate_layers(indices)
    assert len(model.cells) == 6 and model.num_classes == 10


def test_another_layout_is_refused(small, images):
    with pytest.raises(ValueError, match="NCHW, got output_fmt='NLC'"):
        small().forward_intermediates(images(1, 3, 32, 32), output_fmt="NLC")


@pytest.mark.parametrize(
    ("indices", "taken", "cells", "channels"),
    [(1, [3], 6, 64), ([0, 1], [0, 1], 2, 16), ([-2, 0], [2, 0], 4, 32), ([0], [0], 0, 4)],
)
def test_pruning_keeps_what_is_needed(small, images, randomize, indices, taken, cells, channels):
    model = randomize(small(auxiliary=True)).eval()
    x = images(2, 3, 64, 64)
    expected = expected_features(model, x)
    assert model.prune_intermediate_layers(indices) == taken
    assert len(model.cells) == cells
    assert model.num_features == channels == expected[max(taken)].shape[1]
    assert model.num_classes == 0 and model.auxiliary_head is None
    assert [info["module"] for info in model.feature_info] == TAPS[: max(taken) + 1]
    needed = {"stem0", *(["stem1"] if cells else []), *(f"cells.{index}" for index in range(cells))}
    parts = [name.split(".") for name in model.state_dict()]
    assert {".".join(part[: 2 if part[0] == "cells" else 1]) for part in parts} == needed
    with torch.no_grad():
        assert_same(model.forward_intermediates(x, taken, intermediates_only=True), [expected[i] for i in taken])
        assert torch.equal(model(x), expected[max(taken)])
        model.reset_classifier(3, "avg")
        pooled = expected[max(taken)].mean((2, 3))
        torch.testing.assert_close(model(x), pooled @ model.classifier.weight.T + model.classifier.bias)


def test_pruning_can_spare_the_head(small, images):
    model = small(auxiliary=True).eval()
    x = images(2, 3, 64, 64)
    logits = model(x)
    assert model.prune_intermediate_layers([1, 3], prune_head=False) == [1, 3]
    assert torch.equal(model(x), logits) and model.auxiliary_head is not None


def layers(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    return group_parameters(model, model.group_matcher(coarse), reverse=True)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_parameters_are_numbered_from_the_input_to_the_head(small, auxiliary):
    model = small(auxiliary=auxiliary)
    fine, coarse = layers(model), layers(model, coarse=True)
    assert fine.keys() == coarse.keys() == dict(model.named_parameters()).keys()
    for name, layer in fine.items():
        part = name.split(".")[0]
        index = int(name.split(".")[1]) if part == "cells" else None
        head = part in ("classifier", "auxiliary_head")
        assert layer == (0 if part.startswith("stem") else 7 if head else index + 1), name
        # Strides 8, 16 and 32 have two cells each, the reductions first in the latter.
        assert coarse[name] == (0 if part.startswith("stem") else 4 if head else index // 2 + 1), name


def test_coarse_layers_of_a_deep_network():
    model = timm.create_model("darts_v2_c10", device="meta")
    stages = {int(name.split(".")[1]): layer for name, layer in layers(model, True).items() if name.startswith("cells")}
    # Ten and more: no number is taken for the first digit of another.
    assert stages == {index: 1 + (index >= 4) + (index >= 9) for index in range(14)}


@pytest.mark.parametrize("auxiliary", [False, True])
def test_layer_wise_rates(small, auxiliary):
    model = small(auxiliary=auxiliary)
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=3e-5, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fine = layers(model)
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            # Layer 7 is the head; each one before it has half the rate.
            assert group["lr_scale"] == pytest.approx(0.5 ** (7 - fine[name])), name
            assert group["weight_decay"] == (3e-5 if parameter.ndim > 1 else 0.0), name
    assert seen == set(names.values())


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_classifier_comes_last(small, auxiliary):
    # timm's gradient clipping leaves out the last two parameters, which it takes for the classifier.
    model = small(auxiliary=auxiliary)
    clipped = {id(parameter) for parameter in model_parameters(model, exclude_head=True)}
    left_out = {name for name, parameter in model.named_parameters() if id(parameter) not in clipped}
    assert left_out == {"classifier.weight", "classifier.bias"}
