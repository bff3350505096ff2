"""Small detectors, checkpoints and images for the tests of the Detectron2 backbones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import timm_models  # noqa: F401
from genas_plugins import Genotype

NAME = "genas_flatness_c100"
# All kinds of operations, and a third of the tensors of a published network.
CODE = (4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Detectron2's loggers keep the standard output of the test that first used them."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "detectron2_backbones")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def genotype() -> Genotype:
    """Of the small networks. Their 75 normalisations: three of the stem, two at the entry of each of 14 cells, three in
    each of 12 normal cells, and four in each of two reductions.
    """
    return Genotype.from_code(CODE)


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """Gives normalisations random statistics and weights, frozen ones too, so that no layer is the identity."""

    def change(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "running_var"):
                for tensor in (module.weight, module.running_var):
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.data.uniform_(-0.5, 0.5, generator=generator)
        return model

    return change


@pytest.fixture(scope="session")
def write_official(randomize: Callable[..., nn.Module]) -> Callable[..., dict[str, Tensor]]:
    """Writes a checkpoint in the official format; returns its tensors by their names without prefix."""

    def write(path: Path, genotype: Any = CODE, channels: int = 2) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = timm.create_model("genas_cell", genotype=genotype, init_channels=channels, auxiliary=True)
        state = randomize(model).state_dict()
        state = {name: torch.tensor(7) if value.dim() == 0 else value for name, value in state.items()}
        prefixed = {f"module.{name}": value for name, value in state.items()}
        prefixed["module.cells.0.total_ops"] = torch.zeros(1)
        torch.save({"epoch": 249, "state_dict": prefixed, "best_acc_top1": 76.0, "optimizer": {}}, path)
        return state

    return write


@pytest.fixture(scope="session")
def build_detector() -> Callable[..., nn.Module]:
    """Builds the detector of one of the package's yacs configurations, small, with other settings in turn."""
    from detectron2.modeling import build_model

    from detectron2_backbones.train_net import read_config
    from genas_plugins.files import packaged_configs

    def build(*overrides: Any, config: str = f"retinanet_{NAME}_FPN_1x") -> nn.Module:
        small = ["MODEL.GENAS.INIT_CHANNELS", "2", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.DEVICE", "cpu"]
        small += ["MODEL.GENAS.ARCH", " ".join(map(str, CODE))]
        path = packaged_configs("detectron2", ".yaml")[config]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_model(read_config(path, [*small, *map(str, overrides)]))

    return build


@pytest.fixture(scope="session")
def draw_inputs() -> Callable[..., list[dict[str, Any]]]:
    """Draws what Detectron2's data loaders give: images of these heights and widths, each with one box."""
    from detectron2.structures import Boxes, Instances

    def draw(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(2)
        inputs = []
        for height, width in sizes:
            boxes = Boxes(torch.tensor([[4.0, 6.0, width / 2, height / 2]]))
            image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
            found = Instances((height, width), gt_boxes=boxes, gt_classes=torch.tensor([3]))
            inputs.append({"image": image, "instances": found, "height": height, "width": width})
        return inputs

    return draw


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``DETECTRON2_DATASETS`` with four images of 64 pixels for COCO's training, four for validation."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    root = tmp_path_factory.mktemp("datasets")
    folder = root / "coco"
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": entry["id"], "name": entry["name"]} for entry in COCO_CATEGORIES if entry["isthing"]]
    rng = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(4):
            picture = rng.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            picture[10:40, 10 + number : 40 + number] = 255
            Image.fromarray(picture).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
            box = {"bbox": [10 + number, 10, 30, 30], "area": 900, "iscrowd": 0}
            annotations.append({"id": number + 1, "image_id": number, "category_id": 1, **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
