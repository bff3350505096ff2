"""ImageNet and its shifted test sets: the mapping of folders to classes, and the metric of ImageNet-O.

Folders are read strictly, because classes in another order look like a bad network. The class lists are timm's.
ImageNet-A and -R: Hendrycks et al., arXiv:1907.07174 and arXiv:2006.16241. ImageNet-O: the former, with
``eval_many_models.py`` and ``calibration_tools.py`` of hendrycks/natural-adv-examples@0777070. ImageNet-C: Hendrycks
and Dietterich, arXiv:1903.12261, with ``ImageNet-C/test.py`` of hendrycks/robustness@8190fe3. ImageNet-V2: Recht et
al., arXiv:1902.10811.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from genas_plugins._messages import listed
from genas_plugins._optional import require
from genas_plugins.datasets._images import bounded_aspect, open_image
from genas_plugins.datasets._listing import Listing, list_images

__all__ = [
    "CORRUPTIONS",
    "HELD_OUT_CORRUPTIONS",
    "KINDS",
    "ImageFiles",
    "ImageSet",
    "anomaly_aupr",
    "find_corruptions",
    "open_imagenet",
    "open_imagenet_o",
    "open_images",
    "open_shifted",
]

KINDS = {"imagenet": "ImageNet", "v2": "ImageNet-V2"} | {letter: f"ImageNet-{letter.upper()}" for letter in "aroc"}
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
HELD_OUT_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four of ImageNet-C on which a method may be tuned; the paper's mean leaves them out."""
_ALL_CORRUPTIONS = (*CORRUPTIONS, *HELD_OUT_CORRUPTIONS)
_SEVERITIES = ("1", "2", "3", "4", "5")
_SPLITS = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class ImageSet:
    """A checked folder.

    Attributes:
        samples: Path and target of each image, class by class.
        num_classes: Outputs that the network must have.
        indices: The network's outputs to compare; targets are positions in this list. None: all.
        report: Summary of the files found, used and left out.
    """

    samples: tuple[tuple[str, int], ...]
    num_classes: int
    indices: tuple[int, ...] | None = None
    report: str = ""


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images that are decoded on access; an unreadable one is an error, where timm's dataset takes the next one.

    Args:
        samples: Path and target of each image.
        class_names: Names of the targets.
        class_to_idx: Targets by name of folder; several folders may be one class.

    Attributes:
        mode: Pillow's, of the images: ``"RGB"``, or ``"L"`` for a network of one channel.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        class_names: Sequence[str] = (),
        class_to_idx: Mapping[str, int] | None = None,
    ) -> None:
        self.samples = samples
        self.class_names = tuple(class_names)
        self.class_to_idx = class_to_idx
        self.mode = "RGB"
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, transformed, and its target; ValueError where the file cannot be read."""
        path, target = self.samples[index]
        # Cropped first, because resizing a thin one to the network's size may take gigabytes.
        image = bounded_aspect(open_image(path, self.mode))
        return (image if self.transform is None else self.transform(image)), target


@cache
def _class_names(kind: str) -> tuple[str, ...]:
    if kind == "v2":
        return tuple(str(number) for number in range(1000))
    return tuple(ImageNetInfo().label_names()) if kind == "imagenet" else _listed(f"imagenet_{kind}_synsets.txt")


def _listed(name: str) -> tuple[str, ...]:
    return tuple((files("timm.data") / "_info" / name).read_text(encoding="utf-8").split())


def open_images(
    kind: str, root: str | Path, in_distribution: str | Path | None = None, num_classes: int | None = None
) -> tuple[ImageSet, ...] | dict[str, tuple[Path, ...]]:
    """Open and check the folder of a kind: one set, two for ImageNet-O, or the folders of ImageNet-C.

    Raises:
        ImportError: scikit-learn is missing, and needed for this kind.
        ValueError: An argument does not go with the kind, or the layout is another one, which the message names.
    """
    if (kind == "o") != (in_distribution is not None):
        raise ValueError("--in-distribution DIR, ImageNet's validation images, goes with --kind o, which needs it.")
    if kind == "imagenet":
        return (open_imagenet(root, num_classes),)
    if num_classes not in (None, 1000):
        raise ValueError(f"{KINDS[kind]} needs a model of 1000 classes, got {num_classes}.")
    if kind == "c":
        return find_corruptions(root)
    return (open_shifted(root, kind),) if in_distribution is None else open_imagenet_o(root, in_distribution)


def open_imagenet(root: str | Path, num_classes: int | None = None) -> ImageSet:
    """Open a folder with one folder a class: ImageNet's validation images by synset, or another dataset.

    The classes of another dataset are numbered as in timm's training script, which has ``class2`` before ``class10``.

    Args:
        root: The folder.
        num_classes: How many classes there are. None: as many as folders, but 1000 folders, or any that is named by a
            synset of ImageNet, must then be all of ImageNet's.
    """
    folders = _subfolders(root)
    names: Sequence[str] = _class_names("imagenet")
    if num_classes is None and (len(folders) == len(names) or not folders.keys().isdisjoint(names)):
        advice = f" Or, if it is another dataset, give --num-classes {len(folders)}."
        _check_names(root, folders, names, KINDS["imagenet"], advice)
    elif num_classes not in (None, len(folders)):
        raise ValueError(f"{root}: expected {num_classes} class folders, found {len(folders)}.{_advice(folders)}")
    elif folders.keys() != set(names):
        names = sorted(folders, key=natural_key)
    return _image_set(root, folders, names)


def open_shifted(root: str | Path, kind: str) -> ImageSet:
    """ImageNet-V2 (``"v2"``), -A (``"a"``) or -R (``"r"``).

    V2's folders ``0`` to ``999`` are ImageNet's class numbers, in whatever order they sort. A and R have 200 synsets,
    and only their logits compete.
    """
    folders, names = _subfolders(root), _class_names(kind)
    _check_names(root, folders, names, KINDS[kind])
    indices = None if kind == "v2" else tuple(map(int, _listed(f"imagenet_{kind}_indices.txt")))
    return _image_set(root, folders, names, indices)


def open_imagenet_o(root: str | Path, in_distribution: str | Path) -> tuple[ImageSet, ImageSet]:
    """ImageNet-O, and the images of ImageNet's validation set that belong to its 200 classes.

    ImageNet-O has images of no class of ImageNet, in 200 folders named by the synsets that they are mistaken for.

    Args:
        root: ImageNet-O.
        in_distribution: ImageNet's validation images by synset: all of them, or those of the 200.

    Returns:
        ImageNet-O and the images in distribution; in both only the logits of the 200 compete.
    """
    require("sklearn.metrics", extra="timm", purpose="the AUPR of ImageNet-O")
    folders, known = _subfolders(root), _subfolders(in_distribution)
    synsets = _class_names("imagenet")
    if _kind(folders) != "o":
        unknown = [name for name in folders if name not in synsets]
        raise ValueError(
            f"{root} is not ImageNet-O: expected 200 folders named by synsets of ImageNet, found {len(folders)}, of "
            f"which {len(unknown)} have other names{f' ({listed(unknown)})' if unknown else ''}.{_advice(folders)}"
        )
    names = [name for name in synsets if name in folders]
    if set(known) != set(names):
        _check_names(in_distribution, known, synsets, "ImageNet's validation set")
    if os.path.samefile(root, in_distribution):
        raise ValueError(f"{root} is given both as ImageNet-O and as the images in distribution.")
    indices = tuple(synsets.index(name) for name in names)
    return _image_set(root, folders, names, indices), _image_set(in_distribution, known, names, indices)


def find_corruptions(root: str | Path) -> dict[str, tuple[Path, ...]]:
    """The folders ``root/<corruption>/<1 to 5>`` of ImageNet-C, for the corruptions that are there.

    All are checked here and none is kept, since they may hold millions of images; :func:`open_imagenet` opens one.
    """
    folders = _subfolders(root)
    if unknown := [name for name in folders if name not in _ALL_CORRUPTIONS]:
        raise ValueError(
            f"{root} is not ImageNet-C: expected folders named by its corruptions ({listed(CORRUPTIONS)}), found "
            f"{len(unknown)} others ({listed(unknown)}).{_advice(folders)}"
        )
    found = {name: _subfolders(folders[name]) for name in _ALL_CORRUPTIONS if name in folders}
    if wrong := [f"{name} has {listed(each, 9)}" for name, each in found.items() if set(each) != set(_SEVERITIES)]:
        raise ValueError(f"{root}: each corruption needs the severities, folders 1 to 5, but {'; '.join(wrong)}.")
    for folder in (folder for severities in found.values() for folder in severities.values()):
        classes = _subfolders(folder)
        _check_names(folder, classes, _class_names("imagenet"), "a severity of ImageNet-C")
        _listed_images(folder, classes, _class_names("imagenet"))
    return {name: tuple(severities[number] for number in _SEVERITIES) for name, severities in found.items()}


def _subfolders(root: str | Path) -> dict[str, Path]:
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is a file, expected a folder." if root.exists() else f"There is no folder {root}.")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    if not folders:
        found = f"{len(entries)} files ({listed(entry.name for entry in entries)})" if entries else "nothing"
        raise ValueError(f"{root} holds {found}, expected folders, one a class: sort the images into them.")
    return folders


def _listed_images(root: str | Path, folders: Mapping[str, Path], names: Sequence[str]) -> Listing:
    advice = _advice(folders) if _kind(folders) == "c" else _inner_advice(folders)
    return list_images(root, folders, names, advice=advice)


def _image_set(
    root: str | Path, folders: Mapping[str, Path], names: Sequence[str], indices: tuple[int, ...] | None = None
) -> ImageSet:
    listing = _listed_images(root, folders, names)
    return ImageSet(listing.samples, len(names) if indices is None else 1000, indices, listing.describe())


def _check_names(
    root: str | Path, folders: Mapping[str, Path], expected: Sequence[str], what: str, advice: str = ""
) -> None:
    differences = {
        "missing": [name for name in expected if name not in folders],
        "unknown": sorted(set(folders) - set(expected)),
        "files": [name for name in expected if name not in folders and Path(root, name).exists()],
    }
    if problems := [f"{len(names)} {problem} ({listed(names)})" for problem, names in differences.items() if names]:
        raise ValueError(
            f"{root} is not {what}: expected {len(expected)} class folders ({listed(expected)}), found {len(folders)}; "
            f"{', '.join(problems)}.{_advice(folders)}{advice}"
        )


def _kind(names: Iterable[str]) -> str | None:
    """The key of ``KINDS`` that these names of folders fit."""
    names = set(names)
    for kind in ("imagenet", "v2", "a", "r"):
        if names == set(_class_names(kind)):
            return kind
    if len(names) == 200 and names <= set(_class_names("imagenet")):
        return "o"
    return "c" if names and names <= set(_ALL_CORRUPTIONS) else None


def _advice(folders: Mapping[str, Path]) -> str:
    kind = _kind(folders)
    return f" It looks like {KINDS[kind]}: use --kind {kind}." if kind else _inner_advice(folders)


def _inner_advice(folders: Mapping[str, Path]) -> str:
    """Suggest which of the folders was probably meant instead of the one that holds them."""
    for name in sorted(folders, key=lambda name: name not in _SPLITS)[:20]:
        inside = [entry.name for entry in folders[name].iterdir() if entry.is_dir()]
        if _kind(inside) or (inside and name in _SPLITS):
            return f" Did you mean {folders[name]}?"
    return ""


def anomaly_aupr(anomalous: Tensor, known: Tensor) -> float:
    """Area under the precision-recall curve of detecting anomalous images, as average precision from 0 to 1.

    The anomaly score of an image is minus its confidence, the highest softmax probability among the logits of the 200
    classes, and the anomalous images are the positive class.

    Args:
        anomalous: Confidences on ImageNet-O, ``(N,)``.
        known: Confidences on the images in distribution, ``(M,)``.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: One of the sets is empty.
    """
    metrics = require("sklearn.metrics", extra="timm", purpose="the AUPR of ImageNet-O")
    if not len(anomalous) or not len(known):
        raise ValueError(f"AUPR needs images of both kinds, got {len(anomalous)} anomalous and {len(known)} others.")
    labels = [1] * len(anomalous) + [0] * len(known)
    return float(metrics.average_precision_score(labels, [-value for value in (*anomalous.tolist(), *known.tolist())]))
