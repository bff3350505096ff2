"""Data sets that come with a library: scikit-learn's digits and torchvision's CIFAR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from genas_plugins._optional import require
from genas_plugins.datasets._folder import looks_like_image_folder
from genas_plugins.datasets._splits import stratified_holdout
from genas_plugins.datasets._tensors import ImageTensors, Triple

__all__ = ["CIFAR_STATISTICS", "load_cifar", "load_digits"]

# The mean and deviation that published CIFAR recipes share, DARTS's and GeNAS's among them.
CIFAR_STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_DIGITS_TEST_FRACTION = 0.2


def load_digits(seed: int) -> tuple[ImageTensors, ImageTensors]:
    """Return scikit-learn's 1,797 handwritten digits, 20 % of every class held out as test images.

    The greys 0..16 of the 8x8 images are scaled to 0..255 and repeated in three channels.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    sklearn = require("sklearn.datasets", extra="nni", purpose="the digits data set")
    bunch = sklearn.load_digits()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    everything = ImageTensors(
        grey[:, None].repeat(1, 3, 1, 1),
        torch.from_numpy(bunch.target.astype(np.int64)),
        tuple(str(name) for name in bunch.target_names),
    )
    rest, holdout = stratified_holdout(bunch.target, _DIGITS_TEST_FRACTION, seed)
    return everything.subset(rest), everything.subset(holdout)


def _cifar_part(dataset: Any) -> ImageTensors:
    images = torch.from_numpy(np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)))
    return ImageTensors(images, torch.tensor(dataset.targets, dtype=torch.int64), tuple(dataset.classes))


def load_cifar(name: str, root: str | Path, download: bool) -> tuple[ImageTensors, ImageTensors]:
    """Return the official training and test images of ``"cifar10"`` or ``"cifar100"``.

    Raises:
        ConnectionError: The download failed.
        FileNotFoundError: The archive is not in ``root`` and ``download`` is False.
        ImportError: torchvision is not installed.
        ValueError: The archive in ``root`` is incomplete or damaged.
    """
    datasets = require("torchvision.datasets", extra="nni", purpose=f"the {name} data set")
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = Path(root)
    folder = root / cls.base_folder
    if not folder.is_dir() and not download:
        advice = "pass download=True (config `data.download: true`) or set data.root to the folder above it"
        if looks_like_image_folder(root):
            advice = f"{root} holds folders of image files, which name='image_folder' reads; or {advice}"
        raise FileNotFoundError(f"{name} was looked for in {folder}, which does not exist: {advice}.")
    try:
        train = cls(root=str(root), train=True, download=download)
        test = cls(root=str(root), train=False, download=download)
    except RuntimeError as error:
        raise ValueError(
            f"The files of {name} in {folder} are incomplete or damaged ({error}): delete that folder and "
            "pass download=True (config `data.download: true`)."
        ) from error
    except OSError as error:
        if not download:
            raise
        raise ConnectionError(
            f"{name} could not be downloaded to {root} ({error}): put the extracted archive at {folder} by "
            "hand, or try again."
        ) from error
    return _cifar_part(train), _cifar_part(test)
