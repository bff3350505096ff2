"""The backbone: features of the timm model, its parameters, freezing, weights, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import nn

from genas_plugins import ZOO, Genotype
from genas_plugins.checkpoints import convert_network
from genas_plugins.counting import count_parameters

register_all_modules()
NAME = "genas_flatness_c100"
# All kinds of operations, and a third of the tensors of a published network.
CODE = [4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0]


def build(**changes: Any) -> Any:
    return MODELS.build({"type": "GeNASBackbone", "arch": CODE, "init_channels": 4, **changes})


def write_official(path: Path, genotype: Any = CODE, channels: int = 4) -> dict[str, torch.Tensor]:
    """A checkpoint in the official format; returns its tensors by their names without prefix."""
    generator = torch.Generator().manual_seed(1)
    model = timm.create_model("genas_cell", genotype=genotype, init_channels=channels, auxiliary=True)
    state = {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(7)
        for name, value in model.state_dict().items()
    }
    prefixed = {f"module.{name}": value for name, value in state.items()}
    prefixed["module.cells.0.total_ops"] = torch.zeros(1)
    torch.save({"epoch": 249, "state_dict": prefixed, "best_acc_top1": 76.0, "optimizer": {}}, path)
    return state


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (97, 65)])
def test_features_are_those_of_the_timm_model(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    backbone = build(output_stride=stride).eval()
    reference = timm.create_model(
        "genas_cell", genotype=CODE, init_channels=4, features_only=True, output_stride=stride
    ).eval()
    reference.load_state_dict({f"model.{name}": value for name, value in backbone.network.state_dict().items()})
    images = torch.randn(2, 3, *size)
    features = backbone(images)
    for ours, theirs, channels, reduction in zip(
        features, reference(images), backbone.out_channels, backbone.out_strides, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert tuple(ours.shape) == (2, channels, *(-(-length // reduction) for length in size))


@pytest.mark.parametrize("stride", [8, 32])
def test_nodes_of_one_input(stride: int) -> None:
    torch.manual_seed(0)
    name = "fairdarts_b_c10"
    backbone = build(arch=name, output_stride=stride).eval()
    reference = timm.create_model(name, init_channels=4, features_only=True, output_stride=stride).eval()
    reference.load_state_dict({f"model.{key}": value for key, value in backbone.network.state_dict().items()})
    images = torch.randn(2, 3, 97, 65)
    for ours, theirs in zip(backbone(images), reference(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(feature.square().mean() for feature in backbone.train()(images)).backward()
    assert all(parameter.grad is not None for parameter in backbone.network.cells.parameters())


def test_strides_agree_before_the_first_reduction_that_changes() -> None:
    torch.manual_seed(0)
    strided = build(output_stride=32).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = strided(images)
    for stride, equal in ((16, 3), (8, 2)):
        backbone = build(output_stride=stride).eval()
        backbone.load_state_dict(strided.state_dict())
        features = backbone(images)
        for ours, theirs in zip(features[:equal], expected[:equal], strict=True):
            assert torch.equal(ours, theirs)
        # And behind it, every second output.
        step = 32 // stride
        torch.testing.assert_close(features[3][:, :, ::step, ::step], expected[3])


@pytest.mark.parametrize("name", ZOO)
def test_parameters_are_those_of_the_zoo_without_the_classifier(name: str) -> None:
    entry = ZOO[name]
    with torch.device("meta"):
        backbone = build(arch=name, init_channels=None)
    classifier = 16 * entry.init_channels * 1000 + 1000
    assert count_parameters(backbone) == entry.params - classifier
    assert backbone.out_channels == [entry.init_channels * factor for factor in (1, 4, 8, 16)]


def test_a_genotype_of_28_integers_is_fitted_to_600_million() -> None:
    with torch.device("meta"):
        backbone = build(arch=list(ZOO[NAME].genotype.code), init_channels=None)
    # The zoo's 46 channels are the most that fit, as the paper chose them.
    assert backbone.out_channels == [46, 184, 368, 736]


@pytest.mark.parametrize(("frozen", "cells"), [(-1, 0), (0, 0), (1, 4), (2, 9), (3, 14)])
def test_frozen_stages_stay_frozen(frozen: int, cells: int) -> None:
    backbone = build(frozen_stages=frozen)
    backbone.eval()
    backbone.train()
    assert backbone.network.stem0[1].training == (frozen < 0)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    sum(feature.square().mean() for feature in backbone(images)).backward()
    for index, cell in enumerate(backbone.network.cells):
        frozen_cell = index < cells
        assert all((parameter.grad is None) == frozen_cell for parameter in cell.parameters())
        norms = [module for module in cell.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and all(module.training != frozen_cell for module in norms)
    for name, value in backbone.named_buffers():
        if name.startswith("network.cells.") and int(name.split(".")[2]) < cells:
            assert torch.equal(value, before[name])


def test_norm_eval_keeps_statistics_and_trains_weights() -> None:
    backbone = build(norm_eval=True).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    sum(feature.square().mean() for feature in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("norm_cfg", "kind"),
    [({"type": "SyncBN"}, nn.SyncBatchNorm), ({"type": "GN", "num_groups": 2}, nn.GroupNorm)],
)
def test_other_normalisations_train_in_one_process(norm_cfg: dict[str, Any], kind: type[nn.Module]) -> None:
    backbone = build(norm_cfg=norm_cfg).train()
    assert isinstance(backbone.network.cells[0].preprocess1.op[2], kind)
    sum(feature.mean() for feature in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    plain, saving = build(norm_eval=True).train(), build(norm_eval=True, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for backbone in (plain, saving):
        backbone(images)[-1].square().mean().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["official", "converted"])
def test_pretrained_weights_land_by_their_names(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "official.pth.tar"
    state = write_official(path)
    if kind == "converted":
        path = tmp_path / "clean.safetensors"
        convert_network(tmp_path / "official.pth.tar", path, Genotype.from_code(CODE))
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    backbone.init_weights()
    loaded = backbone.network.state_dict()
    assert len(loaded) == sum(not name.startswith(("classifier", "auxiliary_head")) for name in state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_weights_of_another_genotype_are_refused_by_name(tmp_path: Path) -> None:
    write_official(tmp_path / "other.pth.tar", genotype="pdarts_c10")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "other.pth.tar")})
    with pytest.raises(RuntimeError, match=r"missing \(cells\..*left over \(cells\."):
        backbone.init_weights()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "nowhere.pth")})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        backbone.init_weights()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "genas_flatnes_c100"}, "did you mean genas_flatness_c100"),
        ({"output_stride": 4}, "output_stride must be one of 8, 16, 32, got 4"),
        ({"out_indices": (0, 4)}, "Feature index 4 is out of range"),
        ({"frozen_stages": 4}, r"frozen_stages must be from -1 \(none\) to 3 \(all\), got 4"),
        ({"init_channels": 7}, "init_channels must be a positive even number, got 7"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_crop_smaller_than_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 32 pixels on each side, got \(16, 64\)"):
        build()(torch.randn(2, 3, 16, 64))


def test_a_backbone_is_pickled_and_copied() -> None:
    backbone = build().eval()
    images = torch.rand(1, 3, 64, 64)
    for again in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert all(torch.equal(a, b) for a, b in zip(again(images), backbone(images), strict=True))
