"""ImageNet and its shifted test sets: which folder is which class, and what is measured.

Folders are read strictly, because a class that gets another's number looks like a bad network. The class lists are
timm's; the definitions for ImageNet-A, -R and -O are those of hendrycks/natural-adv-examples@0777070
(``eval_many_models.py``), for ImageNet-C those of hendrycks/robustness@8190fe3 (``ImageNet-C/test.py``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.task import ClassificationEvaluator
from timm.utils import natural_key
from torch import Tensor, nn
from torch.utils.data import Dataset

from genas_plugins._optional import require
from genas_plugins.datasets._folder import IMAGE_EXTENSIONS
from genas_plugins.scoring.accuracy import Accuracy
from genas_plugins.scoring.batchnorm import evaluation_mode

__all__ = [
    "CORRUPTIONS",
    "HELD_OUT_CORRUPTIONS",
    "KINDS",
    "SEVERITIES",
    "CountedAccuracy",
    "ImageFiles",
    "ImageSet",
    "anomaly_aupr",
    "class_indices",
    "confidences",
    "evaluate",
    "find_corruptions",
    "open_imagenet",
    "open_imagenet_o",
    "open_restricted",
    "open_v2",
]

KINDS = {
    "imagenet": "ImageNet, or any other set with one folder a class",
    "v2": "ImageNet-V2",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "o": "ImageNet-O",
    "c": "ImageNet-C",
}
SEVERITIES = ("1", "2", "3", "4", "5")
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
HELD_OUT_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four of ImageNet-C on which a method may be tuned, and which therefore no mean counts."""

_NUMBERS = tuple(str(number) for number in range(1000))


@dataclass(frozen=True)
class CountedAccuracy(Accuracy):
    """Fractions of images, from 0 to 1, and how many images there were.

    Attributes:
        images: Number of images.
    """

    images: int


@dataclass(frozen=True)
class ImageSet:
    """A checked folder.

    Attributes:
        samples: Path and target of each image, class by class.
        num_classes: How many outputs the network must have.
        indices: The outputs that compete, of which a target gives the position; None: all of them.
    """

    samples: tuple[tuple[str, int], ...]
    num_classes: int
    indices: tuple[int, ...] | None = None


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images that are decoded when asked for.

    timm's own dataset puts the next image in the place of one that it cannot read; this one refuses it.

    Args:
        samples: Path and target of each.
        mode: Pillow's ``"RGB"`` or ``"L"``.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], mode: str = "RGB") -> None:
        self.samples = samples
        self.mode = mode
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image and its target.

        Raises:
            ValueError: The file cannot be read, or has more than 8 bits a channel.
        """
        path, target = self.samples[index]
        try:
            with Image.open(path) as file:
                deep = file.mode.startswith(("I", "F"))
                image = file.convert(self.mode)
        # Pillow reports broken PNG chunks as SyntaxError and some broken headers as ValueError.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Cannot read the image {path} ({error}): copy it again or remove it.") from error
        if deep:
            raise ValueError(f"The image {path} has more than 8 bits a channel: convert it to 8 bits.")
        return (image if self.transform is None else self.transform(image)), target


@cache
def _synsets(name: str = "") -> tuple[str, ...]:
    return _listed(f"{name}_synsets") if name else tuple(ImageNetInfo().label_names())


def _listed(name: str) -> tuple[str, ...]:
    return tuple((files("timm.data") / "_info" / f"imagenet_{name}.txt").read_text(encoding="utf-8").split())


def class_indices(kind: str) -> tuple[int, ...]:
    """ImageNet's numbers of the 200 classes of ImageNet-A (``"a"``) or -R (``"r"``), ascending."""
    return tuple(int(index) for index in _listed(f"{kind}_indices"))


def open_imagenet(root: str | Path, class_names: Sequence[str] | None = None) -> ImageSet:
    """A folder with one folder a class: ImageNet's validation images by synset, or another dataset.

    Args:
        root: The folder.
        class_names: The folders in the order of the network's outputs. None: for ImageNet's synsets ImageNet's
            order, otherwise that of timm's own training script, where ``class2`` comes before ``class10``.

    Raises:
        ValueError: The layout is another, or the order of the classes is unknown; the message tells which it is.
    """
    folders = _subfolders(Path(root))
    if class_names is not None:
        _check_names(root, folders, class_names, "the dataset of this class map")
    elif set(folders) == set(_synsets()):
        class_names = _synsets()
    elif len(folders) == len(_synsets()) or _recognize(folders) in ("v2", "c"):
        _check_names(root, folders, _synsets(), "ImageNet", "Or, for a dataset of 1000 other classes, give a class map.")
    else:
        class_names = sorted(folders, key=natural_key)
    return ImageSet(_samples(folders, class_names), len(class_names))


def open_v2(root: str | Path) -> ImageSet:
    """ImageNet-V2: folders ``0`` to ``999``, which are ImageNet's class numbers whatever order they sort in.

    Raises:
        ValueError: The layout is another.
    """
    folders = _subfolders(Path(root))
    _check_names(root, folders, _NUMBERS, "ImageNet-V2, with folders 0 to 999")
    return ImageSet(_samples(folders, _NUMBERS), len(_NUMBERS))


def open_restricted(root: str | Path, kind: str) -> ImageSet:
    """ImageNet-A (``"a"``) or -R (``"r"``): 200 synsets, and only their logits compete.

    Raises:
        ValueError: The layout is another.
    """
    folders = _subfolders(Path(root))
    _check_names(root, folders, _synsets(kind), f"{KINDS[kind]}, with 200 synsets")
    return ImageSet(_samples(folders, _synsets(kind)), len(_synsets()), class_indices(kind))


def open_imagenet_o(root: str | Path, in_distribution: str | Path) -> tuple[ImageSet, ImageSet]:
    """ImageNet-O, and the images of ImageNet's validation set that belong to its 200 classes.

    ImageNet-O has a folder for each of 200 synsets, with images that belong to no class of ImageNet and are
    taken for that synset.

    Args:
        root: ImageNet-O.
        in_distribution: ImageNet's validation images by synset: all of them, or those of the 200.

    Returns:
        ImageNet-O and the images in distribution, both with the 200 outputs.

    Raises:
        ValueError: A layout is another.
    """
    folders = _subfolders(Path(root))
    kind = _recognize(folders)
    if kind != "o":
        unknown = [name for name in folders if name not in _synsets()]
        names = f", {len(unknown)} of them not ImageNet's ({_some(unknown)})" if unknown else ""
        raise ValueError(
            f"{root} is not ImageNet-O: expected 200 folders with names of ImageNet's synsets, found {len(folders)}"
            f"{names}.{_advice(Path(root), folders)}"
        )
    names = [name for name in _synsets() if name in folders]
    inside = _subfolders(Path(in_distribution))
    if set(inside) != set(names):
        _check_names(in_distribution, inside, _synsets(), "ImageNet's validation set")
    if os.path.samefile(root, in_distribution):
        raise ValueError(f"{root} is given both as ImageNet-O and as the images in distribution.")
    indices = tuple(_synsets().index(name) for name in names)
    out, known = (ImageSet(_samples(each, names), len(_synsets()), indices) for each in (folders, inside))
    return out, known


def find_corruptions(root: str | Path) -> dict[str, tuple[Path, ...]]:
    """The folders of ImageNet-C, ``root/<corruption>/<severity>``, five for each corruption that is there.

    They are checked here, all of them, and read with :func:`open_imagenet` one at a time: together they have
    millions of files.

    Raises:
        ValueError: A folder is no corruption, a severity is missing or unknown, or has not ImageNet's classes.
    """
    root = Path(root)
    folders = _subfolders(root)
    known = [name for name in (*CORRUPTIONS, *HELD_OUT_CORRUPTIONS) if name in folders]
    if unknown := [name for name in folders if name not in known]:
        raise ValueError(
            f"{root} is not ImageNet-C: expected folders named by its corruptions ({_some(CORRUPTIONS)}), found "
            f"{_some(unknown)}.{_advice(root, folders)}"
        )
    wrong = []
    found = {name: _subfolders(folders[name]) for name in known}
    for name, severities in found.items():
        if set(severities) != set(SEVERITIES):
            wrong.append(f"{name} has {_some(sorted(severities))}")
    if wrong:
        raise ValueError(f"{root}: each corruption needs the severities 1 to 5, but {'; '.join(wrong)}.")
    for severities in found.values():
        for folder in severities.values():
            classes = _subfolders(folder)
            _check_names(folder, classes, _synsets(), "a severity of ImageNet-C, with 1000 synsets")
            for each in classes.values():
                _images(each)
    return {name: tuple(severities[number] for number in SEVERITIES) for name, severities in found.items()}


def _subfolders(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise ValueError(f"{root} is a file, expected a folder." if root.exists() else f"There is no folder {root}.")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    if not folders:
        found = f"{len(entries)} files ({_some([entry.name for entry in entries])})" if entries else "nothing"
        raise ValueError(f"{root} holds {found}, expected folders: sort the images into one folder a class.")
    return folders


def _images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        # Names with a leading dot are leftovers such as the "._" files of macOS archives.
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    images = sorted(name for name in names if name.lower().endswith(IMAGE_EXTENSIONS))
    if not images:
        advice = _advice(folder.parent, {folder.name: folder})
        found = f"{_some(sorted(names))}" if names else "nothing"
        raise ValueError(
            f"The class folder {folder} holds {found}, expected images ({', '.join(IMAGE_EXTENSIONS)}).{advice}"
        )
    return [os.path.join(folder, name) for name in images]


def _samples(folders: Mapping[str, Path], names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple((path, target) for target, name in enumerate(names) for path in _images(folders[name]))
