"""Every configuration trains, is resumed and is tested by its host's scripts, on a handful of small images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genas_plugins.files import packaged_configs
from mmseg_backbones.synthetic import write_scenes

CONFIGS = packaged_configs("mmseg", ".py")
# Where each data set keeps images and masks of a part, and how their names end.
CITYSCAPES = ("leftImg8bit/{0}/town", "gtFine/{0}/town", "_leftImg8bit.png", "_gtFine_labelTrainIds.png")
ADE20K = ("images/{0}", "annotations/{0}", ".jpg", ".png")
LAYOUTS = {
    "cityscapes": ("cityscapes", *CITYSCAPES, {"train": 4, "val": 2}),
    "ade20k": ("ade/ADEChallengeData2016", *ADE20K, {"training": 4, "validation": 2}),
}
MODULES = ("mmseg_backbones", "mmseg.apis", "mmseg.models", "mmseg.datasets", "mmseg.engine", "mmengine.runner")
SMALL = [
    *("train_dataloader.batch_size=2", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
    *("val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"),
    *("test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False"),
    *("train_cfg.val_interval=2", "default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1"),
    *("default_hooks.visualization.draw=False", "model.backbone.init_channels=2", "model.decode_head.channels=8"),
    *("model.decode_head.in_channels=32", "model.auxiliary_head.in_channels=16", "model.auxiliary_head.channels=8"),
]


def write_images(root: Path, dataset: str) -> None:
    """Images of 80 x 96 pixels, in which class and brightness go together."""
    folder, images, masks, ending, mask_ending, parts = LAYOUTS[dataset]
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        image_folder, mask_folder = (root / "data" / folder / kind.format(part) for kind in (images, masks))
        image_folder.mkdir(parents=True)
        mask_folder.mkdir(parents=True)
        for number in range(count):
            mask = generator.integers(1, 19, (5, 6), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(np.stack([mask * 13] * 3, 2)).save(image_folder / f"{number}{ending}")
            Image.fromarray(mask).save(mask_folder / f"{number}{mask_ending}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_is_resumed_and_is_tested(name: str, warm: Callable[..., Any], tmp_path: Path) -> None:
    """Slow: three runs of MMSegmentation's scripts for each of ten configurations, at the crops of the files."""
    dataset = next((known for known in LAYOUTS if known in name), None)
    if dataset is None:
        write_scenes(tmp_path / "data" / "synthetic", training=4, validation=2, size=64)
    else:
        write_images(tmp_path, dataset)
    changes = list(SMALL)
    if "deeplabv3plus" in name:
        changes += ["model.decode_head.c1_in_channels=2", "model.decode_head.c1_channels=4"]
    if dataset is not None:
        # Otherwise they are enlarged to the size of a Cityscapes picture.
        changes += [
            "val_dataloader.dataset.pipeline.1.scale=(96,80)",
            "test_dataloader.dataset.pipeline.1.scale=(96,80)",
        ]

    def run(tool: str, *arguments: str, iterations: int) -> str:
        options = ["--work-dir", "work", "--cfg-options", *changes, f"train_cfg.max_iters={iterations}"]
        command = ("-m", f"mmseg_backbones.{tool}", CONFIGS[name], *arguments, *options)
        done = warm(*MODULES).python(*command, folder=tmp_path).wait()
        assert done.status == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    assert "Iter(train) [2/2]" in run("train", iterations=2)
    said = run("train", "--resume", iterations=4)
    assert "Iter(train) [1/4]" not in said and "Iter(train) [4/4]" in said
    assert "mIoU" in run("test", "work/iter_4.pth", iterations=4)
