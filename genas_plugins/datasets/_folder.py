"""Folders of images: one sub-folder per class, files of any size and of the common formats."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genas_plugins._optional import require
from genas_plugins.datasets._splits import stratified_holdout, uniform_labels
from genas_plugins.datasets._tensors import ImageTensors

__all__ = ["IMAGE_EXTENSIONS", "DiskImages", "ImageReader", "looks_like_image_folder", "open_image_folder"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_TEST_FRACTION = 0.1


def _pillow() -> Any:
    return require("PIL.Image", extra="nni", purpose="reading image files")


def open_image(path: str) -> Any:
    """Decode one file to an RGB Pillow image."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    # Pillow reports broken PNG chunks as SyntaxError and some broken headers as ValueError.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {path} ({error}): repair it or remove it from the folder.") from error
    # Pillow would clip these to 255, which turns most 16-bit images white without a word.
    if mode.startswith(("I", "F")):
        raise ValueError(
            f"The image {path} has Pillow mode {mode!r} (more than 8 bits a channel): convert it to 8 bits."
        )
    return rgb


@dataclass(frozen=True)
class ImageReader:
    """Reads a file as a square image of one size.

    Args:
        size: Height and width of the result, in pixels.
        resize: Bring other sizes to ``size`` (shorter side, then centre crop); otherwise they are refused.
    """

    size: int
    resize: bool

    @classmethod
    def for_size(cls, image_size: int | None, path: str) -> ImageReader:
        """Read everything at ``image_size``, or at the size of the file ``path`` when that is None.

        Raises:
            ValueError: The file cannot be read, or sets the size and is not square.
        """
        if image_size is not None:
            return cls(image_size, resize=True)
        width, height = open_image(path).size
        if width != height:
            raise ValueError(f"{path} is {width}x{height} pixels, not square: set data.image_size to resize and crop.")
        return cls(width, resize=False)

    def read(self, path: str) -> np.ndarray:
        """Return the file as ``uint8`` RGB of shape (3, size, size).

        Raises:
            ValueError: The file cannot be read, or has another size and ``resize`` is False.
        """
        image = open_image(path)
        width, height = image.size
        if (width, height) != (self.size, self.size):
            if not self.resize:
                raise ValueError(
                    f"{path} is {width}x{height} pixels, but the images before it are "
                    f"{self.size}x{self.size}: set data.image_size to resize all of them to one size."
                )
            short = min(width, height)
            width, height = self.size * width // short, self.size * height // short
            # Pillow's bilinear filter widens with the reduction, which is the antialiasing.
            image = image.resize((width, height), _pillow().Resampling.BILINEAR)
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).transpose(2, 0, 1)


class DiskImages(Dataset[tuple[Tensor, int]]):
    """Images that are decoded when they are asked for; picklable, so data-loader workers can hold it.

    Args:
        samples: (path, label) pairs, at least one.
        class_names: One name per class.
        reader: How a file becomes an image.

    Raises:
        ValueError: There is no sample.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], class_names: tuple[str, ...], reader: ImageReader) -> None:
        if not samples:
            raise ValueError("DiskImages needs at least one (path, label) sample, but got none.")
        self.samples = tuple(samples)
        self.class_names = class_names
        self.reader = reader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image at ``index`` as ``uint8`` (3, H, W), and its label.

        Raises:
            IndexError: There is no such sample.
            ValueError: The file cannot be read or has an unexpected size.
        """
        path, label = self.samples[index]
        return torch.from_numpy(self.reader.read(path).copy()), label

    def subset(self, indices: Sequence[int] | np.ndarray) -> DiskImages:
        """Return the samples at ``indices``, in that order, still on disk.

        Raises:
            IndexError: An index does not exist.
            ValueError: ``indices`` is empty.
        """
        return DiskImages([self.samples[int(i)] for i in indices], self.class_names, self.reader)

    def random_labels(self, seed: int) -> DiskImages:
        """Return the same files with labels drawn uniformly among the classes.

        Raises:
            TypeError: ``seed`` is not an integer.
            ValueError: ``seed`` is negative.
        """
        labels = uniform_labels(len(self), len(self.class_names), seed).tolist()
        samples = [(path, label) for (path, _), label in zip(self.samples, labels, strict=True)]
        return DiskImages(samples, self.class_names, self.reader)

    def load(self) -> ImageTensors:
        """Decode everything into memory: 3 * H * W bytes an image.

        Raises:
            ValueError: A file cannot be read or has an unexpected size; the first in order is named.
        """
        size = self.reader.size
        images = np.empty((len(self), 3, size, size), dtype=np.uint8)

        def decode(index: int) -> None:
            images[index] = self.reader.read(self.samples[index][0])

        # Threads suffice: Pillow releases the interpreter lock while it decodes and resizes.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            deque(pool.map(decode, range(len(self))), maxlen=0)
        labels = torch.tensor([label for _, label in self.samples], dtype=torch.int64)
        return ImageTensors(torch.from_numpy(images), labels, self.class_names)


def image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.path
            for entry in entries
            # Names with a leading dot are leftovers such as the "._" files of macOS archives.
            if not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file()
        )


def _class_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def looks_like_image_folder(root: Path) -> bool:
    """Tell whether ``root`` has the layout that :func:`open_image_folder` reads."""
    base = root / "train" if (root / "train").is_dir() else root
    return base.is_dir() and any(image_files(folder) for folder in _class_folders(base))


def _scan(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List the classes and the (path, label) samples of one folder of class folders."""
    classes = _class_folders(folder)
    if not classes:
        raise ValueError(f"{folder} has no class folders: expected {folder}/<class>/<image>, one folder a class.")
    samples = []
    for label, entry in enumerate(classes):
        files = image_files(entry)
        if not files:
            raise ValueError(
                f"The class folder {entry} has no images ({', '.join(IMAGE_EXTENSIONS)}): add some or remove "
                "the folder."
            )
        samples.extend((path, label) for path in files)
    return tuple(entry.name for entry in classes), samples


def open_image_folder(root: str | Path, image_size: int | None, seed: int) -> tuple[DiskImages, DiskImages | None]:
    """List an image folder without decoding it.

    With ``root/train`` the test images are those of ``root/test``, or else ``root/val``, or else there are
    none; without it 10 % of every class of ``root`` are held out, chosen by ``seed``.

    Returns:
        The images to split for the search, and the test images.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: A class folder is missing or empty, or the test classes are not the training classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no image folder at {root}: set data.root to an existing folder.")
    if not (root / "train").is_dir():
        classes, samples = _scan(root)
        everything = DiskImages(samples, classes, ImageReader.for_size(image_size, samples[0][0]))
        labels = np.array([label for _, label in samples])
        rest, holdout = stratified_holdout(labels, _TEST_FRACTION, seed)
        return everything.subset(rest), everything.subset(holdout) if len(holdout) else None
    classes, samples = _scan(root / "train")
    train = DiskImages(samples, classes, ImageReader.for_size(image_size, samples[0][0]))
    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if folder is None:
        return train, None
    test_classes, test_samples = _scan(folder)
    if test_classes != classes:
        only_train = sorted(set(classes) - set(test_classes))[:5]
        only_test = sorted(set(test_classes) - set(classes))[:5]
        raise ValueError(
            f"{root / 'train'} and {folder} must have the same class folders, but only the first has "
            f"{only_train} and only the second {only_test} (at most five shown)."
        )
    return train, DiskImages(test_samples, classes, train.reader)
