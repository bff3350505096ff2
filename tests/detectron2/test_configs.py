"""Every configuration in configs/detectron2 does what its file's name says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from genas_plugins import ZOO
from genas_plugins.files import packaged_configs

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from detectron2_backbones import add_genas_config, lazy_train_net, train_net

pytestmark = pytest.mark.detectron2

YACS, LAZY = packaged_configs("detectron2", ".yaml"), packaged_configs("detectron2", ".py")
SCHEDULES = {"1x": ((60000, 80000), 90000), "3x": ((210000, 250000), 270000)}
NAME = re.compile(r"(?P<method>retinanet|faster_rcnn)_(?P<arch>[a-z0-9_]+)_FPN_(?P<schedule>\d)x", re.IGNORECASE)
# Another test has it: it is for a small set of its own.
COCO = [name for name in YACS if "quickstart" not in name and not name.startswith("Base")]


def facts(name: str) -> dict[str, Any]:
    found = NAME.fullmatch(name)
    assert found is not None, name
    return {**found.groupdict(), "schedule": f"{found['schedule']}x"}


def test_there_is_one_for_each_network_with_a_figure_in_the_paper() -> None:
    archs = {facts(name)["arch"] for name in COCO if facts(name)["method"] == "retinanet"}
    # Table 4 of the paper has COCO figures of these; the four of GeNAS are all there.
    assert archs >= {"genas_flatness_c100", "genas_angle_flatness_c100", "genas_angle_c100", "pcdarts_c100"}
    assert archs >= {name for name in ZOO if "flatness_c" in name}
    assert {facts(name)["schedule"] for name in COCO} == set(SCHEDULES)


def test_configurations_are_found_by_folder() -> None:
    folder = Path(next(iter(YACS.values()))).parent
    assert {path.stem for path in folder.glob("*.yaml")} == set(YACS)
    assert {path.stem for path in folder.glob("*.py")} == set(LAZY) == {"retinanet_genas_flatness_c100_fpn_1x"}


@pytest.mark.parametrize("name", YACS)
def test_it_is_plain_yaml_and_has_only_keys_that_exist(name: str) -> None:
    assert yaml.safe_load(YACS[name].read_text())
    # An unknown key is a KeyError of yacs.
    train_net.read_config(YACS[name])


@pytest.mark.parametrize("name", COCO)
def test_it_does_what_its_name_says(name: str) -> None:
    cfg, said = train_net.read_config(YACS[name]), facts(name)
    arch, genas = ZOO[said["arch"]], cfg.MODEL.GENAS
    assert SCHEDULES[said["schedule"]] == (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))
    # RGB from 0 to 1, as the official networks were trained.
    assert cfg.INPUT.FORMAT == "RGB"
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([0.0] * 3, [255.0] * 3)
    assert (genas.NORM, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.WEIGHTS) == ("FrozenBN", 2, "")

    model = build_model(cfg)
    network = model.backbone.bottom_up.network
    assert network.genotype == arch.genotype
    assert network.feature_info[0]["num_chs"] == arch.init_channels
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in network.modules()) > 100
    trained = [any(parameter.requires_grad for parameter in cell.parameters()) for cell in network.cells]
    assert trained == [False] * 4 + [True] * 10
    shapes = model.backbone.output_shape()
    first, last = (3, 7) if said["method"] == "retinanet" else (2, 6)
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        f"p{level}": (256, 2**level) for level in range(first, last + 1)
    }
    with torch.no_grad():
        assert len(model.eval()([{"image": torch.zeros(3, 65, 97)}])) == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("retinanet_genas_flatness_c100_FPN_1x", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("retinanet_genas_flatness_c100_FPN_3x", "COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
        ("faster_rcnn_genas_flatness_c100_FPN_1x", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    ],
)
def test_only_the_backbone_and_its_pixels_differ_from_detectron2s_own(ours: str, theirs: str) -> None:
    reference = get_cfg()
    add_genas_config(reference)
    reference.merge_from_file(model_zoo.get_config_file(theirs))
    reference.MODEL.DEVICE = "cpu"
    expected = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.WEIGHTS"}
    expected |= {"MODEL.BACKBONE.NAME", "MODEL.GENAS.NORM"}
    if "faster" in ours:
        expected |= {"MODEL.FPN.IN_FEATURES", "MODEL.GENAS.OUT_FEATURES"}
    found = differences(train_net.read_config(YACS[ours]), reference)
    # What our models do not have.
    unused = ("MODEL.RESNETS.", "MODEL.ROI_MASK_HEAD.")
    assert {name for name in found if not name.startswith(unused)} == expected


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in ours.items():
        if isinstance(value, dict):
            found += differences(value, theirs[key], f"{prefix}{key}.")
        elif value != theirs[key] and not (key == "SIZES" and value == [pytest.approx(row) for row in theirs[key]]):
            found.append(prefix + key)
    return found


def test_the_lazy_configuration_is_the_yacs_one() -> None:
    yacs = build_model(train_net.read_config(YACS["retinanet_genas_flatness_c100_FPN_1x"]))
    cfg = lazy_train_net.read_config(str(LAZY["retinanet_genas_flatness_c100_fpn_1x"]))
    lazy = instantiate(cfg.model)
    assert {name: value.shape for name, value in lazy.state_dict().items()} == {
        name: value.shape for name, value in yacs.state_dict().items()
    }
    assert [name for name, value in lazy.named_parameters() if value.requires_grad] == [
        name for name, value in yacs.named_parameters() if value.requires_grad
    ]
    lazy.load_state_dict(yacs.state_dict())
    image = torch.randint(0, 256, (3, 65, 97), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        ours, theirs = (model.eval()([{"image": image}])[0]["instances"] for model in (lazy, yacs))
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert (cfg.optimizer.lr, cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (0.01, 90000, 16)
    assert cfg.lr_multiplier.scheduler.milestones == [60000, 80000, 90000]
    assert (lazy.input_format, lazy.pixel_mean.flatten().tolist()) == ("RGB", [0.0] * 3)
    assert lazy.pixel_std.flatten().tolist() == [255.0] * 3
    for part in (cfg.dataloader.train, cfg.dataloader.test):
        mapper = instantiate(part.mapper)
        assert isinstance(mapper, DatasetMapper) and mapper.image_format == "RGB" and not mapper.use_instance_mask


def test_the_base_trains_at_full_size(draw_inputs: Callable[..., Any], randomize: Callable[..., nn.Module]) -> None:
    model = build_model(train_net.read_config(YACS["Base-RetinaNet-GeNAS-FPN"]))
    randomize(model).train()
    with EventStorage():
        losses = model(draw_inputs((64, 96)))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


def test_the_pictures_reach_the_network_as_rgb_from_0_to_1(build_detector: Callable[..., nn.Module]) -> None:
    image = torch.tensor([255.0, 51.0, 0.0]).reshape(3, 1, 1).expand(3, 64, 64)
    pixels = build_detector().preprocess_image([{"image": image}]).tensor
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, 0.2, 0.0]))
