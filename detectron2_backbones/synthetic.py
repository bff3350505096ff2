"""``python -m detectron2_backbones.synthetic DIR``: a small detection set in COCO's format, to try a training on.

Objects are cut from pictures that come with scikit-image and pasted on others of them. Training and validation share
no pixel of a background and no coin; cup, cat, shuttle and face are one picture each, so validation shows the same ones
in other sizes, mirrored, in another light and elsewhere.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from numpy.typing import NDArray

from genas_plugins._optional import require
from genas_plugins.datasets._scenes import Image, crop, half_of, run_command, scene_rng, texture

__all__ = ["CLASSES", "COLORS", "DATASETS", "draw_scene", "main", "register", "write_dataset"]

CLASSES = ("coin", "cup", "cat", "shuttle", "face")
COLORS = ((255, 220, 0), (0, 220, 255), (255, 0, 220), (255, 140, 0), (255, 255, 255))
"""Red, green and blue in which each class is drawn."""
DATASETS = {"genas_synthetic_train": "train", "genas_synthetic_val": "val"}
"""Registered names, and the folder of each."""

_FOLDER = "genas_synthetic"
_SIZES = (64, 256)
"""Pixels of an image: objects are recognisable, and half a background is large enough."""
_SCALES = (0.3, 0.6)
"""Longer side of an object, as a part of the image's."""
_OBJECTS = 4
_TRIES = 20

_BACKGROUNDS = ("grass", "gravel", "brick", "moon", "hubble_deep_field")
_TINTS = ((0.6, 1.0, 0.4), (0.8, 0.8, 0.8), (1.0, 0.55, 0.4), (0.9, 0.9, 1.0), (1.0, 1.0, 1.0))

# Outlines in the pictures. Ellipses are (top, left, bottom, right), in pixels; polygons are (row, column) corners.
# fmt: off
_COINS = (
    ((34, 23, 74, 66), (39, 81, 74, 120), (28, 131, 74, 179), (30, 192, 73, 240), (34, 255, 72, 297),
     (16, 305, 72, 365)),
    ((104, 25, 146, 67), (107, 84, 145, 122), (110, 134, 145, 174), (105, 185, 144, 227), (96, 245, 144, 296),
     (105, 317, 145, 356)),
    ((178, 25, 217, 63), (175, 80, 217, 124), (179, 135, 217, 174), (170, 189, 216, 237), (172, 251, 216, 297),
     (156, 315, 218, 380)),
    ((233, 18, 288, 75), (245, 92, 287, 136), (236, 144, 288, 201), (241, 220, 288, 269), (240, 276, 288, 326),
     (248, 336, 289, 381)),
)
_SAUCER_AND_RIM = ((67, 77, 385, 480), (16, 172, 209, 411))
_CAT = ((0, 45), (0, 345), (40, 360), (150, 352), (230, 320), (284, 270), (299, 200), (270, 110), (190, 52), (90, 32))
_SHUTTLE = ((0, 400), (0, 432), (40, 441), (55, 453), (180, 458), (235, 462), (240, 452), (278, 440), (278, 396),
            (252, 388), (250, 362), (190, 376), (110, 384), (80, 392))
_FACE = ((14, 153, 192, 303),)
# fmt: on


def _cut(picture: Image, ellipses: Sequence[tuple[int, ...]], polygon: Sequence[tuple[int, int]] = ()) -> Image:
    """The part of a picture within the outlines, as RGBA ``(H, W, 4)``."""
    draw = require("skimage.draw", extra="detectron2", purpose="drawing scenes")
    alpha = np.zeros(picture.shape[:2], dtype=np.uint8)
    for top, left, bottom, right in ellipses:
        center = (top + bottom - 1) / 2, (left + right - 1) / 2
        alpha[draw.ellipse(*center, (bottom - top) / 2, (right - left) / 2, shape=alpha.shape)] = 255
    if polygon:
        alpha[draw.polygon(*zip(*polygon, strict=True), shape=alpha.shape)] = 255
    x, y, wide, high = _box(alpha)
    return np.dstack([picture, alpha])[y : y + high, x : x + wide]


def _box(mask: NDArray[Any]) -> list[int]:
    """COCO's box of what is not zero: left, top, width, height."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


@functools.cache
def _cutouts(held_out: bool) -> tuple[list[Image], ...]:
    """The objects of each class; validation has the last row of coins."""
    coins, astronaut = texture("coins", "detectron2"), texture("astronaut", "detectron2")
    boxes = _COINS[-1] if held_out else sum(_COINS[:-1], ())
    return (
        [_cut(coins, [box]) for box in boxes],
        [_cut(texture("coffee", "detectron2"), _SAUCER_AND_RIM)],
        [_cut(texture("chelsea", "detectron2"), (), _CAT)],
        [_cut(astronaut, (), _SHUTTLE)],
        [_cut(astronaut, _FACE)],
    )


def _lit(rng: np.random.Generator, pixels: Image, tint: Sequence[float] = (1.0, 1.0, 1.0)) -> Image:
    shade = np.array(tint) * rng.uniform(0.6, 1.2) * rng.uniform(0.9, 1.1, 3)
    return (pixels * shade).clip(0, 255).astype(np.uint8)


def draw_scene(rng: np.random.Generator, size: int, held_out: bool) -> tuple[Image, Image, list[int]]:
    """Draw one scene of 1 to 4 objects.

    Objects lie within the image and never cover each other: one that finds no free place in 20 tries is left out.

    Args:
        rng: What is random.
        size: Pixels, square; 64 to 256.
        held_out: Take backgrounds and coins of validation.

    Returns:
        The picture ``(size, size, 3)``; the object to which each pixel belongs, ``(size, size)``, 0 for the
        background; and the index in :data:`CLASSES` of object 1, of object 2, and so on.
    """
    pillow = require("PIL.Image", extra="detectron2", purpose="drawing scenes")
    kind = int(rng.integers(len(_BACKGROUNDS)))
    picture = half_of(texture(_BACKGROUNDS[kind], "detectron2"), held_out)
    image = _lit(rng, crop(rng, picture, size), _TINTS[kind])
    owner = np.zeros((size, size), dtype=np.uint8)
    classes: list[int] = []
    for _ in range(int(rng.integers(1, _OBJECTS + 1))):
        label = int(rng.integers(len(CLASSES)))
        choices = _cutouts(held_out)[label]
        cutout = pillow.fromarray(choices[int(rng.integers(len(choices)))])
        scale = size * np.exp(rng.uniform(*np.log(_SCALES))) / max(cutout.size)
        # In RGBA Pillow weighs colours by alpha, so nothing of the old surroundings bleeds in.
        scaled = np.asarray(cutout.resize([max(1, round(scale * side)) for side in cutout.size]))
        scaled = scaled[:, ::-1] if rng.random() < 0.5 else scaled
        pixels, mask = _lit(rng, scaled[..., :3]), scaled[..., 3] >= 128
        for _ in range(_TRIES):
            top, left = (int(rng.integers(0, size - side + 1)) for side in mask.shape)
            place = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
            if not owner[place][mask].any():
                classes.append(label)
                image[place][mask] = pixels[mask]
                owner[place][mask] = len(classes)
                break
    return image, owner, classes


def _write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    pillow = require("PIL.Image", extra="detectron2", purpose="writing scenes")
    coco = require("pycocotools.mask", extra="detectron2", purpose="writing annotations")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir()
    for number in range(count):
        image, owner, classes = draw_scene(scene_rng(seed, split, number), size, split == "val")
        name = f"{number:04d}.png"
        pillow.fromarray(image).save(folder / split / name)
        images.append({"id": number + 1, "file_name": name, "height": size, "width": size, "license": 1})
        for index, label in enumerate(classes, start=1):
            mask = np.asfortranarray(owner == index, dtype=np.uint8)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number + 1,
                "category_id": label + 1,
                "bbox": _box(mask),
                "area": int(mask.sum()),
                "segmentation": {"size": [size, size], "counts": coco.encode(mask)["counts"].decode("ascii")},
                "iscrowd": 0,
            }
            annotations.append(annotation)
    content = {
        "info": {"description": f"Objects pasted on backgrounds, {split}", "version": "1", "seed": seed},
        "licenses": [{"id": 1, "name": "That of each picture of scikit-image, see skimage/data/README.txt", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "object"} for number, name in enumerate(CLASSES, start=1)
        ],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def write_dataset(
    folder: str | Path, training: int = 400, validation: int = 100, size: int = 128, seed: int = 0
) -> Path:
    """Write ``train/``, ``val/`` and ``annotations/``, whole or not at all.

    Boxes and areas are those of the pasted pixels, counted; masks are run lengths.

    Args:
        folder: Must not exist.
        training: Images.
        validation: Images.
        size: Their height and width in pixels, 64 to 256.
        seed: Seed of all that is random.

    Returns:
        ``folder``.

    Raises:
        ValueError: A number that cannot be.
        FileExistsError: There is such a folder or file.
        OSError: It cannot be written.
    """
    folder = Path(folder)
    if min(training, validation) < 1:
        raise ValueError(f"A set needs at least 1 image for training and for validation, got {training}, {validation}.")
    if not _SIZES[0] <= size <= _SIZES[1]:
        raise ValueError(f"Images may have {_SIZES[0]} to {_SIZES[1]} pixels, got {size}.")
    if seed < 0:
        raise ValueError(f"The seed must be 0 or above, got {seed}.")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        for split, count in (("train", training), ("val", validation)):
            _write_split(unfinished, split, count, size, seed)
        unfinished.rename(folder)
    return folder


def register(root: str | Path = "datasets") -> None:
    """Make ``root/genas_synthetic`` known to Detectron2 as ``genas_synthetic_train`` and ``genas_synthetic_val``.

    Again is fine, and with another ``root`` the names mean the other folder.

    Raises:
        FileNotFoundError: The folder, or a part of it, is missing.
    """
    folder = Path(root) / _FOLDER
    for name, split in DATASETS.items():
        annotations = folder / "annotations" / f"{split}.json"
        if not annotations.is_file():
            raise FileNotFoundError(
                f"There is no {annotations}: make the set with python -m detectron2_backbones.synthetic {folder}"
            )
        if name in DatasetCatalog:
            # Registered names keep their first folder, and Detectron2 refuses to change it.
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        metadata = {"thing_classes": list(CLASSES), "thing_colors": list(COLORS)}
        register_coco_instances(name, metadata, str(annotations), str(folder / split))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, or 1 with one line on standard error."""
    return run_command(
        "detectron2_backbones.synthetic",
        __doc__,
        write_dataset,
        arguments,
        noun="images",
        where="where to write; datasets/genas_synthetic for the quickstart",
        training=400,
        validation=100,
    )


if __name__ == "__main__":
    sys.exit(main())
