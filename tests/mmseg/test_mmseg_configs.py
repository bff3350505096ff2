"""Every configuration in configs/mmseg does what its file's name says."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from genas_plugins import ZOO
from genas_plugins.files import packaged_configs
from mmseg_backbones._tools import check_classes

register_all_modules()
CONFIGS = packaged_configs("mmseg", ".py")
CLASSES = {"cityscapes": 19, "ade20k": 150, "synthetic": 5}
NAME = re.compile(
    r"(?P<method>deeplabv3(?:plus)?)_(?P<arch>[a-z0-9-]+)-d(?P<stride>\d+)_(?P<gpus>\d)xb(?P<batch>\d)-"
    r"(?P<iterations>\d+k?)_(?:quickstart_)?(?P<dataset>[a-z0-9]+)(?:-(?P<height>\d+)x(?P<width>\d+))?"
)


@functools.cache
def read(name: str) -> Config:
    """A configuration, for reading only."""
    return Config.fromfile(CONFIGS[name])


def facts(name: str) -> dict[str, Any]:
    found = NAME.fullmatch(name)
    assert found is not None, name
    return found.groupdict()


def test_there_is_one_for_each_network_with_a_figure_in_the_paper() -> None:
    archs = {facts(name)["arch"].replace("-", "_") for name in CONFIGS}
    # Table 4 of the paper has Cityscapes figures of these; the four of GeNAS are all there.
    assert archs >= {"genas_flatness_c100", "genas_angle_flatness_c100", "genas_angle_c100", "pcdarts_c100"}
    assert archs >= {name for name in ZOO if "flatness_c" in name}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_does_what_its_name_says(name: str) -> None:
    config, said = read(name), facts(name)
    arch = said["arch"].replace("-", "_")
    iterations = int(said["iterations"].replace("k", "000"))
    assert config.train_cfg.max_iters == iterations == config.param_scheduler[-1].end
    assert config.train_dataloader.batch_size == int(said["batch"])
    heads = (config.model.decode_head, config.model.auxiliary_head)
    assert {head.num_classes for head in heads} == {CLASSES[said["dataset"]]}
    assert config.model.decode_head.type == (
        "ASPPHead" if said["method"] == "deeplabv3" else "DepthwiseSeparableASPPHead"
    )
    (crop,) = (step for step in config.train_pipeline if step["type"] == "RandomCrop")
    size = (int(said["height"]), int(said["width"])) if said["height"] else (128, 128)
    assert tuple(crop["crop_size"]) == tuple(config.model.data_preprocessor.size) == size
    # Odd crops align corners, as mmseg's own configurations for them do.
    assert {head.align_corners for head in heads} == {size == (769, 769)}
    # RGB from 0 to 1, as the official networks were trained.
    assert config.model.data_preprocessor.bgr_to_rgb
    assert set(config.model.data_preprocessor.mean) == {0.0} and set(config.model.data_preprocessor.std) == {255.0}

    # Its weights do not matter, and drawing them takes longer than an image.
    with torch.device("meta"):
        model = MODELS.build(config.model)
    model.to_empty(device="cpu").load_state_dict({key: torch.zeros(x.shape) for key, x in model.state_dict().items()})
    backbone = model.backbone
    assert backbone.network.genotype == ZOO[arch].genotype
    if said["dataset"] != "synthetic":
        assert backbone.out_channels[0] == ZOO[arch].init_channels
    assert backbone.out_strides[-1] == int(said["stride"])
    for head, settings in zip((model.decode_head, model.auxiliary_head), heads, strict=True):
        assert head.in_channels == backbone.out_channels[settings.in_index]
    if said["method"] == "deeplabv3plus":
        assert config.model.decode_head.c1_in_channels == backbone.out_channels[0]
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, 3, 65, 97))
    assert logits.shape[1] == CLASSES[said["dataset"]]


def test_configurations_are_found_by_folder() -> None:
    folder = Path(next(iter(CONFIGS.values()))).parent
    assert {path.stem for path in folder.glob("*.py")} == set(CONFIGS)
    assert len(CONFIGS) >= 10


def changed(**changes: Any) -> Config:
    name = next(name for name in CONFIGS if name.startswith("deeplabv3_") and "cityscapes" in name)
    config = copy.deepcopy(read(name))
    config.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", CONFIGS)
def test_heads_and_images_have_the_same_classes(name: str, part: str, caplog: pytest.LogCaptureFixture) -> None:
    check_classes(read(name), part)
    assert not caplog.records


def test_a_head_of_fewer_classes_than_the_images_is_refused() -> None:
    for part in ("train", "test"):
        with pytest.raises(ValueError, match=r"num_classes=5, and CityscapesDataset of \w+ has 19: make them equal"):
            check_classes(changed(model__decode_head__num_classes=5), part)
    repeated = changed(model__decode_head__num_classes=5)
    repeated.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": repeated.train_dataloader.dataset,
    }
    with pytest.raises(ValueError, match="CityscapesDataset of train_dataloader has 19"):
        check_classes(repeated, "train")


def test_a_head_of_more_classes_may_be_trained_and_not_tested(caplog: pytest.LogCaptureFixture) -> None:
    config = changed(model__decode_head__num_classes=150)
    check_classes(config, "train")
    assert "num_classes=150, and CityscapesDataset of train_dataloader has 19" in caplog.text
    with pytest.raises(ValueError, match="num_classes=150"):
        check_classes(config, "test")


def test_classes_of_the_configuration_are_those_of_the_images() -> None:
    own = {"classes": ("road", "sky"), "palette": [[0, 0, 0], [1, 1, 1]]}
    config = changed(model__decode_head__num_classes=2, test_dataloader__dataset__metainfo=own)
    check_classes(config, "test")
