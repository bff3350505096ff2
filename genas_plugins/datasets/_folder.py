"""Folders of images: one sub-folder per class, files of any size and of the common formats."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genas_plugins.datasets._images import ImageReader, check_headers
from genas_plugins.datasets._listing import Listing, class_folders, image_files, list_images
from genas_plugins.datasets._splits import stratified_holdout, uniform_labels
from genas_plugins.datasets._tensors import ImageTensors

__all__ = ["DiskImages", "looks_like_image_folder", "open_image_folder"]

_TEST_FRACTION = 0.1


class DiskImages(Dataset[tuple[Tensor, int]]):
    """Images that are decoded on access; picklable, so that data-loader workers can hold it.

    Args:
        samples: (path, label) pairs, at least one.
        class_names: One name per class.
        reader: Decodes and resizes a file.

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


def looks_like_image_folder(root: Path) -> bool:
    """Tell whether ``root`` has the layout that :func:`open_image_folder` reads."""
    base = root / "train" if (root / "train").is_dir() else root
    return base.is_dir() and any(image_files(folder) for folder in class_folders(base).values())


def _scan(folder: Path) -> Listing:
    """List the classes and the (path, label) samples of one folder of class folders, and look at the files."""
    folders = class_folders(folder)
    if not folders:
        raise ValueError(f"{folder} has no class folders: expected {folder}/<class>/<image>, one folder a class.")
    listing = list_images(folder, folders, tuple(folders))
    listing.log()
    check_headers([path for path, _ in listing.samples])
    return listing


def open_image_folder(root: str | Path, image_size: int | None, seed: int) -> tuple[DiskImages, DiskImages | None]:
    """List an image folder without decoding it.

    With ``root/train`` the test images are those of ``root/test``, or else ``root/val``, or else there are
    none; without it 10 % of every class of ``root`` are held out, chosen by ``seed``.

    Returns:
        The images to split for the search, and the test images.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: There are fewer than two class folders, one has no images, files cannot be read, or the test classes
            are not the training classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no image folder at {root}: set data.root to an existing folder.")
    if not (root / "train").is_dir():
        listing = _scan(root)
        classes, samples = listing.class_names, listing.samples
        everything = DiskImages(samples, classes, ImageReader.for_size(image_size, samples[0][0]))
        labels = np.array([label for _, label in samples])
        rest, holdout = stratified_holdout(labels, _TEST_FRACTION, seed)
        return everything.subset(rest), everything.subset(holdout) if len(holdout) else None
    listing = _scan(root / "train")
    classes, samples = listing.class_names, listing.samples
    train = DiskImages(samples, classes, ImageReader.for_size(image_size, samples[0][0]))
    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if folder is None:
        return train, None
    test = _scan(folder)
    if test.class_names != classes:
        only_train = sorted(set(classes) - set(test.class_names))[:5]
        only_test = sorted(set(test.class_names) - set(classes))[:5]
        raise ValueError(
            f"{root / 'train'} and {folder} must have the same class folders, but only the first has "
            f"{only_train} and only the second {only_test} (at most five shown)."
        )
    return train, DiskImages(test.samples, classes, train.reader)
