"""Loads a data set by name and splits it for a search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from genas_plugins._reading import user_path
from genas_plugins.datasets._builtin import CIFAR_STATISTICS, load_cifar, load_digits
from genas_plugins.datasets._folder import DiskImages, open_image_folder
from genas_plugins.datasets._identity import data_identity
from genas_plugins.datasets._imagenet16 import load_imagenet16
from genas_plugins.datasets._splits import check_count, halves, pick_test_images
from genas_plugins.datasets._tensors import ImageTensors, SearchData, Triple, channel_statistics, resized

__all__ = ["DATASETS", "RECALIBRATION_IMAGES", "load_search_data"]

DATASETS = ("digits", "cifar10", "cifar100", "imagenet16-120", "image_folder")
RECALIBRATION_IMAGES = 850

_Images = ImageTensors | DiskImages


def _check_options(name: str, root: str | Path | None, download: bool, image_size: int | None, storage: str) -> None:
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(DATASETS)}.")
    if storage not in ("memory", "disk"):
        raise ValueError(f"storage must be 'memory' or 'disk', but got {storage!r}.")
    if storage == "disk" and name != "image_folder":
        raise ValueError(f"storage='disk' works for name='image_folder' only, but name is {name!r}: use 'memory'.")
    if root is None and name != "digits":
        raise ValueError(f"{name} needs root, the folder with its files (config `data.root`), but got None.")
    if download and name in ("imagenet16-120", "image_folder"):
        raise ValueError(f"{name} cannot be downloaded: put the files in root and pass download=False.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, but got {image_size}.")


def _open(
    name: str, root: str | Path | None, download: bool, image_size: int | None, seed: int
) -> tuple[_Images, _Images | None]:
    """Return what is to be split for the search, and the test images, both before any resizing."""
    openers: dict[str, Callable[[], tuple[_Images, _Images | None]]] = {
        "digits": partial(load_digits, seed),
        "cifar10": partial(load_cifar, name, root, download),
        "cifar100": partial(load_cifar, name, root, download),
        "imagenet16-120": partial(load_imagenet16, root),
        "image_folder": partial(open_image_folder, root, image_size, seed),
    }
    return openers[name]()


def _in_memory(images: _Images, image_size: int | None) -> ImageTensors:
    return images.load() if isinstance(images, DiskImages) else resized(images, image_size)


def _part(images: _Images, indices: np.ndarray, option: str, wanted: int | None, part: str) -> _Images:
    if wanted is not None:
        check_count(option, wanted, len(indices), part)
    return images.subset(indices[:wanted])


def _train_and_validation(
    pool: _Images, fraction: float, train_images: int | None, validation_images: int | None, seed: int
) -> tuple[_Images, _Images]:
    first, second = halves(len(pool), fraction, seed)
    # Images are chosen before any is decoded: a cap on an image folder saves the reading too.
    return (
        _part(pool, first, "train_images", train_images, "the train half"),
        _part(pool, second, "validation_images", validation_images, "the validation half"),
    )


def _test_part(test: _Images | None, wanted: int | None, seed: int) -> _Images | None:
    if wanted is None:
        return test
    if test is None:
        raise ValueError(f"test_images={wanted} was asked for, but the data set has 0 test images.")
    order = pick_test_images(len(test), seed)
    return _part(test, order, "test_images", wanted, "the test set")


def _recalibration_count(wanted: int | None, available: int) -> int:
    """Return how many images to take from the front of the train half, which is permuted already."""
    if wanted is None:
        return min(RECALIBRATION_IMAGES, available)
    check_count("recalibration_images", wanted, available, "the train half")
    return wanted


def _statistics(name: str, train: _Images, recalibration: ImageTensors) -> tuple[Triple, Triple]:
    # A half that stays on disk is too large to decode for six numbers; its random sample will do.
    measured = train if isinstance(train, ImageTensors) else recalibration
    return CIFAR_STATISTICS.get(name) or channel_statistics(measured.images)


def load_search_data(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    storage: str = "memory",
    train_fraction: float = 0.5,
    train_images: int | None = None,
    validation_images: int | None = None,
    recalibration_images: int | None = None,
    test_images: int | None = None,
    random_labels: bool = False,
    seed: int = 0,
) -> SearchData:
    """Load a data set and split its training images into the two halves of a search.

    Args:
        name: One of ``DATASETS``.
        root: Folder of the files; ``digits`` needs none.
        download: Fetch CIFAR if ``root`` lacks it.
        image_size: Height and width in pixels; None keeps the native size, which an image folder must share.
        storage: ``"disk"`` leaves the train half of an image folder on disk; all else is held in memory.
        train_fraction: Share of the training images that trains the supernet.
        train_images: Number of images to keep of the train half; None: all.
        validation_images: Number of images to keep of the validation half; None: all.
        recalibration_images: Images of the train half for batch-norm statistics; None takes 850, the number
            of the official search, or the whole half if it is smaller.
        test_images: Number of test images to keep, chosen at random; None: all.
        random_labels: Train on labels drawn uniformly, as RLNAS does; all other labels stay true.
        seed: Decides the split, the chosen images and the random labels.

    Raises:
        ConnectionError: A download failed.
        FileNotFoundError: ``root`` or a file in it is missing.
        ImportError: The library that reads this data set is not installed.
        TypeError: ``seed`` is not an integer.
        ValueError: An option is out of range, asks for more images than there are, or does not go with
            ``name``; or the files are not what the data set should be.

    Example:
        >>> from genas_plugins.datasets import load_search_data
        >>> data = load_search_data("digits")
        >>> len(data.train), len(data.validation), len(data.test)
        (719, 719, 359)
        >>> data.train.images.shape
        torch.Size([719, 3, 8, 8])
    """
    root = None if root is None else user_path(root)
    _check_options(name, root, download, image_size, storage)
    pool, test = _open(name, root, download, image_size, seed)
    # Of the files, because decoded pixels may depend on the version of the decoder.
    identity = data_identity({"images": pool} if test is None else {"images": pool, "test": test})
    train, validation = _train_and_validation(pool, train_fraction, train_images, validation_images, seed)
    test = _test_part(test, test_images, seed)
    count = _recalibration_count(recalibration_images, len(train))
    train = _in_memory(train, image_size) if storage == "memory" else train
    recalibration = _in_memory(train.subset(range(count)), image_size)
    mean, std = _statistics(name, train, recalibration)
    return SearchData(
        train=train.random_labels(seed) if random_labels else train,
        recalibration=recalibration,
        validation=_in_memory(validation, image_size),
        test=None if test is None else _in_memory(test, image_size),
        mean=mean,
        std=std,
        num_classes=len(pool.class_names),
        name=name,
        image_size=recalibration.images.shape[-1],
        identity=identity,
    )
