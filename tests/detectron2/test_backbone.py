"""The backbone: features of the timm model, its parameters, freezing, normalisations, export, and what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from genas_plugins import ZOO
from genas_plugins.counting import count_parameters

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, detector_postprocess
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from detectron2.utils.testing import convert_scripted_instances

from detectron2_backbones import GeNASBackbone, add_genas_config

pytestmark = pytest.mark.detectron2

NAME = "genas_flatness_c100"
FEATURES = ("stem", "res3", "res4", "res5")
# All kinds of operations, and a third of the tensors of a published network.
CODE = (4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0)
# Cells up to each reduction of a network of 14, from the paper's stacking: a third, two thirds, all.
ENDS = (0, 4, 9, 14)
PREFIX = "backbone.bottom_up.network"


def build(**changes: Any) -> GeNASBackbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GeNASBackbone(CODE, **{"init_channels": 2, "out_features": FEATURES, **changes})


def settings(*changes: Any) -> Any:
    cfg = get_cfg()
    add_genas_config(cfg)
    cfg.merge_from_list(["MODEL.GENAS.INIT_CHANNELS", 2, *changes])
    return cfg


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def loss(features: dict[str, Tensor]) -> Tensor:
    return sum((feature.float().square().mean() for feature in features.values()), torch.tensor(0.0))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("size", [(64, 96), (97, 65)])
def test_features_are_those_of_the_timm_model(
    norm: str, size: tuple[int, int], randomize: Callable[..., nn.Module]
) -> None:
    reference = timm.create_model("genas_cell", genotype=CODE, init_channels=2, features_only=True)
    randomize(reference).eval()
    backbone = build(norm=norm).eval()
    backbone.network.load_state_dict(reference.model.state_dict())
    features = backbone(images(2, 3, *size))
    assert tuple(features) == FEATURES
    for ours, theirs in zip(features.values(), reference(images(2, 3, *size)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nodes_of_one_input(randomize: Callable[..., nn.Module]) -> None:
    name = "fairdarts_b_c10"
    backbone = randomize(GeNASBackbone(name, init_channels=2, out_features=FEATURES, freeze_at=2)).eval()
    reference = timm.create_model(name, init_channels=2, features_only=True).eval()
    reference.load_state_dict({f"model.{key}": value for key, value in backbone.network.state_dict().items()})
    x = images(2, 3, 97, 65)
    for found in (backbone(x), torch.jit.script(backbone)(x)):
        for ours, theirs in zip(found.values(), reference(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    loss(backbone.train()(x)).backward()
    trained = {key.split(".")[2] for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    # Frozen are the stem and the first four cells.
    assert trained == {str(cell) for cell in range(4, 14)}


@pytest.mark.parametrize(
    "names", [names for count in range(1, 5) for names in itertools.combinations(FEATURES, count)], ids="-".join
)
def test_the_shapes_that_it_declares_are_those_of_its_features(names: tuple[str, ...]) -> None:
    backbone = build(out_features=names, init_channels=4).eval()
    declared = backbone.output_shape()
    features = backbone(images(1, 3, 97, 65))
    assert tuple(features) == tuple(declared) == names
    factors = {"stem": (1, 4), "res3": (4, 8), "res4": (8, 16), "res5": (16, 32)}
    for name, feature in features.items():
        factor, stride = factors[name]
        assert (declared[name].channels, declared[name].stride) == (4 * factor, stride)
        assert tuple(feature.shape) == (1, 4 * factor, -(-97 // stride), -(-65 // stride))
    # What lies behind the last one is not there.
    assert len(backbone.network.cells) == ENDS[FEATURES.index(names[-1])]
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("name", ZOO)
def test_parameters_are_those_of_the_zoo_without_the_classifier(name: str) -> None:
    entry = ZOO[name]
    with torch.device("meta"):
        backbone = GeNASBackbone(name)
    classifier = 16 * entry.init_channels * 1000 + 1000
    assert count_parameters(backbone) == entry.params - classifier
    channels = [shape.channels for shape in backbone.output_shape().values()]
    assert channels == [entry.init_channels * factor for factor in (4, 8, 16)]


@pytest.mark.parametrize("freeze_at", range(5))
def test_frozen_stages_stay_frozen(freeze_at: int) -> None:
    backbone = build(freeze_at=freeze_at)
    backbone.eval()
    backbone.train()
    frozen = [f"cells.{index}." for index in range(ENDS[max(freeze_at - 1, 0)])]
    frozen += ["stem0.", "stem1."] if freeze_at else []
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    # Detectron2's own optimizer, whose weight decay would move a convolution even without a gradient.
    optimizer = build_optimizer(settings("SOLVER.WEIGHT_DECAY", 0.1), nn.ModuleList([backbone, nn.Linear(1, 1)]))
    loss(backbone(images(2, 3, 64, 64).requires_grad_())).backward()
    optimizer.step()
    after = backbone.network.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith(tuple(frozen))]
    trained = {name for name in after if not name.startswith(tuple(frozen))}
    # Every convolution and every counter behind; a bias or a mean may happen to stay.
    assert moved >= {name for name in trained if after[name].dim() == 4 or name.endswith("num_batches_tracked")}
    assert all(not module.training for module in backbone.network.stem0.modules()) == (freeze_at > 0)


def test_what_is_frozen_is_as_in_evaluation() -> None:
    backbone = build(freeze_at=4, drop_path_rate=0.5)
    for name, feature in backbone.eval()(images(2, 3, 64, 64)).items():
        assert torch.equal(backbone.train()(images(2, 3, 64, 64))[name], feature)


def test_freezing_adds_to_what_is_frozen() -> None:
    backbone = build()
    assert backbone.freeze(2) is backbone
    backbone.freeze(1)
    assert not any(parameter.requires_grad for parameter in backbone.network.cells[:4].parameters())
    assert all(parameter.requires_grad for parameter in backbone.network.cells[4:].parameters())


def test_fresh_frozen_normalisation_is_refused_in_training_alone() -> None:
    backbone = build(norm="FrozenBN")
    layers = sum(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    with pytest.raises(ValueError, match=rf"{layers} of {layers} FrozenBN layers have no weights.*MODEL.WEIGHTS"):
        backbone(images(2, 3, 64, 64))
    backbone.eval()(images(2, 3, 64, 64))


def test_one_frozen_layer_without_weights_is_refused(randomize: Callable[..., nn.Module]) -> None:
    backbone = randomize(build(norm="FrozenBN"))
    fresh = FrozenBatchNorm2d(backbone.network.stem0[1].num_features)
    backbone.network.stem0[1].load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="1 of 75 FrozenBN layers"):
        backbone(images(2, 3, 64, 64))


def test_weights_that_were_never_trained_do_not_pass_for_weights() -> None:
    backbone = build(norm="FrozenBN")
    backbone.network.load_state_dict(build().network.state_dict())
    with pytest.raises(ValueError, match="FrozenBN layers have no weights"):
        backbone(images(2, 3, 64, 64))


def test_frozen_normalisation_does_not_move_in_a_training_step(randomize: Callable[..., nn.Module]) -> None:
    backbone = randomize(build(norm="FrozenBN")).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = build_optimizer(settings("SOLVER.WEIGHT_DECAY", 0.1), nn.ModuleList([backbone]))
    loss(backbone(images(2, 3, 64, 64))).backward()
    optimizer.step()
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    # Convolutions are all that has parameters.
    assert moved == {name for name, _ in backbone.named_parameters()}
    assert len(before) == len(moved) + 4 * 75


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_frozen_normalisation_is_batch_normalisation_in_evaluation(
    freeze_at: int, randomize: Callable[..., nn.Module]
) -> None:
    plain = randomize(build()).eval()
    frozen = build(norm="FrozenBN", freeze_at=freeze_at).train()
    frozen.network.load_state_dict(plain.network.state_dict())
    for name, feature in frozen(images(2, 3, 64, 64)).items():
        torch.testing.assert_close(feature, plain(images(2, 3, 64, 64))[name], rtol=1e-4, atol=1e-5)


# The largest divisor up to 32, by hand: 23 is prime, 46 is 2 x 23, 92 is 4 x 23, 184 is 8 x 23.
@pytest.mark.parametrize(("layer", "channels", "groups"), [("stem0.1", 23, 23), ("stem0.4", 46, 23)])
def test_group_normalisation_takes_the_groups_that_divide_the_channels(layer: str, channels: int, groups: int) -> None:
    backbone = GeNASBackbone(NAME, norm="GN", out_features=("stem",))
    found = backbone.network.get_submodule(layer)
    assert (found.num_channels, found.num_groups) == (channels, groups)


@pytest.mark.parametrize("channels", [2, 48, 64, 184])
def test_group_normalisation_has_at_most_32_groups(channels: int) -> None:
    backbone = GeNASBackbone(NAME, init_channels=channels, norm="GN", out_features=("stem",))
    expected = {2: 2, 48: 24, 64: 32, 184: 23}
    assert backbone.network.stem0[4].num_groups == expected[channels]


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("SyncBN", nn.SyncBatchNorm),
        ("GN", nn.GroupNorm),
        (lambda channels: nn.InstanceNorm2d(channels, affine=True), nn.InstanceNorm2d),
    ],
)
def test_other_normalisations_train_in_one_process(norm: Any, kind: type[nn.Module]) -> None:
    backbone = build(norm=norm).train()
    assert not [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert isinstance(backbone.network.cells[0].preprocess1.op[2], kind)
    loss(backbone(images(2, 3, 128, 128))).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    plain, saving = build(norm="GN").train(), build(norm="GN", checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    kept: list[int] = []
    for backbone in (plain, saving):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            value = loss(backbone(images(2, 3, 64, 64)))
        kept.append(sum(sizes))
        value.backward()
    assert kept[1] < kept[0] / 2
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_drop_path_drops_in_training_alone() -> None:
    backbone = build(drop_path_rate=0.5, norm="GN")
    plain = build(norm="GN").eval()
    plain.load_state_dict(backbone.state_dict())
    expected = plain(images(2, 3, 64, 64))["res5"]
    torch.manual_seed(0)
    assert not torch.equal(backbone.train()(images(2, 3, 64, 64))["res5"], expected)
    assert torch.equal(backbone.eval()(images(2, 3, 64, 64))["res5"], expected)


def test_lazy_lists_and_codes_are_taken() -> None:
    code = list(ZOO[NAME].genotype.code)
    node = LazyCall(GeNASBackbone)(arch=code, init_channels=2, out_features=["res4", "res5"])
    backbone = instantiate(node)
    assert backbone.network.genotype == ZOO[NAME].genotype
    assert list(backbone.output_shape()) == ["res4", "res5"]


def test_a_retinanet_trains_on_images_of_odd_sizes(
    build_detector: Callable[..., nn.Module],
    draw_inputs: Callable[..., list[dict[str, Any]]],
    randomize: Callable[..., nn.Module],
) -> None:
    model = randomize(build_detector()).train()
    with EventStorage():
        losses = model(draw_inputs((97, 65), (61, 130)))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith((f"{PREFIX}.stem", *(f"{PREFIX}.cells.{index}." for index in range(4))))
        assert (parameter.grad is None) == frozen, name


def test_mixed_precision(
    build_detector: Callable[..., nn.Module],
    draw_inputs: Callable[..., list[dict[str, Any]]],
    randomize: Callable[..., nn.Module],
) -> None:
    model = randomize(build_detector()).train()
    with EventStorage():
        single = sum(model(draw_inputs((64, 96))).values())
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.backbone.bottom_up(images(1, 3, 64, 96))
        mixed = sum(model(draw_inputs((64, 96))).values())
    assert {feature.dtype for feature in features.values()} == {torch.bfloat16}
    # 8 bits of precision, through 60 layers.
    torch.testing.assert_close(mixed.float(), single, rtol=0.2, atol=0.0)
    mixed.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_torchscript_keeps_the_features(randomize: Callable[..., nn.Module]) -> None:
    backbone = randomize(build(norm="FrozenBN", freeze_at=2)).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(backbone), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((64, 96), (97, 65)):
        torch.testing.assert_close(loaded(images(2, 3, *size)), backbone(images(2, 3, *size)))


def spread(model: nn.Module) -> nn.Module:
    """Scores and boxes that all differ: a fresh head gives every anchor nearly the same."""
    generator = torch.Generator().manual_seed(3)
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    model.head.bbox_pred.weight.data.mul_(0.1)
    model.test_score_thresh = 0.0
    return model.eval()


def test_a_retinanet_scripts(
    build_detector: Callable[..., nn.Module],
    draw_inputs: Callable[..., list[dict[str, Any]]],
    randomize: Callable[..., nn.Module],
) -> None:
    model = spread(randomize(build_detector()))
    scripted = scripting_with_instances(model, {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor})
    inputs = [{"image": entry["image"].float()} for entry in draw_inputs((97, 65))]
    with torch.no_grad():
        expected = model(inputs)[0]["instances"]
        found = detector_postprocess(convert_scripted_instances(scripted(inputs)[0]), 97, 65)
    assert len(expected.scores.unique()) > 50
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_retinanet_traces_for_other_sizes(
    build_detector: Callable[..., nn.Module],
    draw_inputs: Callable[..., list[dict[str, Any]]],
    randomize: Callable[..., nn.Module],
) -> None:
    model = spread(randomize(build_detector()))
    first, second = (entry["image"].float() for entry in draw_inputs((64, 96), (97, 130)))
    adapter = TracingAdapter(model, first, lambda detector, image: detector([{"image": image}])[0]["instances"])
    with torch.no_grad():
        traced = torch.jit.trace(adapter.eval(), (first,), check_trace=False)
        for image in (first, second):
            found = adapter.outputs_schema(traced(image))
            expected = model([{"image": image}])[0]["instances"]
            assert len(expected.scores.unique()) > 50
            torch.testing.assert_close(found.scores, expected.scores)
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "genas_flatnes_c100"}, "did you mean genas_flatness_c100"),
        ({"out_features": ("res2",)}, r"out_features must be some of stem, res3, res4, res5, got \('res2',\)"),
        ({"out_features": ()}, "out_features must be some of stem"),
        ({"out_features": "res5"}, "out_features must be some of stem"),
        ({"norm": "LN"}, "norm must be one of BN, SyncBN, FrozenBN, GN, or a function of the channels, got 'LN'"),
        ({"norm": ""}, "norm must be one of"),
        ({"norm": None}, "norm must be one of"),
        ({"freeze_at": 5}, r"freeze_at must be from 0 \(nothing\) to 4 \(all\), got 5"),
        ({"freeze_at": -1}, "freeze_at must be from 0"),
        ({"init_channels": 7}, "init_channels must be a positive even number, got 7"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeNASBackbone(**{"arch": NAME, "init_channels": 2, **changes})


@pytest.mark.parametrize(
    ("builder", "features", "channels"),
    [
        ("build_genas_backbone", {"res3": 8, "res4": 16, "res5": 32}, [8, 16, 32]),
        ("build_genas_fpn_backbone", {"p3": 8, "p4": 16, "p5": 32, "p6": 64}, [256] * 4),
        ("build_retinanet_genas_fpn_backbone", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}, [256] * 5),
    ],
)
def test_builders_are_registered_and_read_the_settings(
    builder: str, features: dict[str, int], channels: list[int]
) -> None:
    changes = ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.GENAS.NORM", "GN"]
    cfg = settings(*changes, "MODEL.GENAS.DROP_PATH_RATE", 0.25, "MODEL.GENAS.CHECKPOINTING", True)
    backbone = BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=4))
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == features
    assert [shape.channels for shape in shapes.values()] == channels
    bottom_up = getattr(backbone, "bottom_up", backbone)
    assert bottom_up.network.in_chans == 4
    assert bottom_up.network.drop_path_prob == 0.25
    assert bottom_up.network.grad_checkpointing
    assert isinstance(bottom_up.network.stem0[1], nn.GroupNorm)
    # Detectron2's default: the stem and the first stage.
    assert [any(p.requires_grad for p in cell.parameters()) for cell in bottom_up.network.cells[3:5]] == [False, True]
    real = backbone.eval()(images(1, 4, 128, 128))
    assert {name: tuple(value.shape[1:]) for name, value in real.items()} == {
        name: (count, 128 // stride, 128 // stride)
        for (name, stride), count in zip(features.items(), channels, strict=True)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"GENAS.OUT_FEATURES": ["res3", "res4"]}, "P6 and P7 are made of res5"),
        ({"FPN.IN_FEATURES": ["res2", "res3"]}, r"must be neighbours among.*\(res3, res4, res5\).*got res2, res3"),
        ({"FPN.IN_FEATURES": ["res3", "res5"]}, "must be neighbours"),
        ({"FPN.IN_FEATURES": []}, "must be neighbours.*got none"),
        ({"GENAS.NORM": "batch"}, "norm must be one of BN"),
        ({"BACKBONE.FREEZE_AT": 6}, "freeze_at must be from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    defaults = {"FPN.IN_FEATURES": ["res3", "res4", "res5"], **changes}
    cfg = settings(*(part for name, value in defaults.items() for part in (f"MODEL.{name}", value)))
    with pytest.raises(ValueError, match=message):
        BACKBONE_REGISTRY.get("build_retinanet_genas_fpn_backbone")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_a_backbone_is_pickled_and_copied(norm: str) -> None:
    backbone, x = build(norm=norm).eval(), images(1, 3, 64, 64)
    for again in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert all(torch.equal(again(x)[name], feature) for name, feature in backbone(x).items())
