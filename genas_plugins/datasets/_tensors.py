"""The containers of image data, and statistics and resizing of their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from genas_plugins.datasets._splits import uniform_labels
from genas_plugins.devices import host_float64, in_float64

__all__ = ["ImageTensors", "SearchData", "Triple", "channel_statistics", "resized"]

Triple = tuple[float, float, float]

# Bounds the float copies made on the way: 1,024 images of 224x224 are 617 MB in float32.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class ImageTensors:
    """Labelled images held in memory, on any device.

    Args:
        images: ``uint8`` RGB of shape (N, 3, H, W), N at least 1.
        labels: ``int64`` of shape (N,), each an index into ``class_names``; on the device of ``images``.
        class_names: One name per class.

    Raises:
        TypeError: ``images`` or ``labels`` is not a tensor of the stated dtype.
        ValueError: A shape, a device or a label does not fit.

    Example:
        >>> import torch
        >>> from genas_plugins.datasets import ImageTensors
        >>> images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> data = ImageTensors(images, labels, class_names=("cat", "dog"))
        >>> data.subset([1, 2]).labels
        tensor([1, 0])
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, value, dtype in (
            ("images", self.images, torch.uint8),
            ("labels", self.labels, torch.int64),
        ):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a {dtype} tensor, but got {type(value).__name__}.")
            if value.dtype != dtype:
                raise TypeError(f"{name} must have dtype {dtype}, but got {value.dtype}.")
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"images must have shape (N, 3, H, W) with N, H, W at least 1, but got {shape}.")
        if tuple(self.labels.shape) != shape[:1]:
            raise ValueError(f"labels must have shape {shape[:1]}, but got {tuple(self.labels.shape)}.")
        if self.labels.device != self.images.device:
            raise ValueError(
                f"images and labels must be on one device, but got {self.images.device} and {self.labels.device}."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise ValueError(
                f"labels must lie in 0..{len(self.class_names) - 1} for {len(self.class_names)} class names, "
                f"but got {low}..{high}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> ImageTensors:
        """Copy the images at ``indices``, in that order.

        Raises:
            IndexError: An index does not exist.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def random_labels(self, seed: int) -> ImageTensors:
        """These images with labels drawn uniformly from the classes, as RLNAS trains its supernet.

        Raises:
            TypeError: ``seed`` is not an integer.
            ValueError: ``seed`` is negative.
        """
        labels = torch.from_numpy(uniform_labels(len(self), len(self.class_names), seed))
        return replace(self, labels=labels.to(self.labels.device))


@dataclass(frozen=True, eq=False)
class SearchData:
    """The data of a search, split by purpose.

    Args:
        train: The half that trains the supernet; with ``storage="disk"`` a
            :class:`~genas_plugins.datasets.DiskImages` of (``uint8`` image (3, H, W), label) pairs.
        recalibration: Images of the train half, with their true labels, for batch-norm statistics.
        validation: The other half, on which candidates are scored.
        test: Images that the search never sees, or None if the source has none.
        mean: Mean per channel of the images scaled to [0, 1].
        std: Standard deviation per channel of the images scaled to [0, 1].
        num_classes: Number of classes.
        name: Name of the data set, one of ``DATASETS``.
        image_size: Height and width of every image, in pixels.
        identity: :func:`~genas_plugins.datasets.data_identity` of the images before the split and of the test images,
            or None.
    """

    train: ImageTensors | Dataset[tuple[Tensor, int]]
    recalibration: ImageTensors
    validation: ImageTensors
    test: ImageTensors | None
    mean: Triple
    std: Triple
    num_classes: int
    name: str
    image_size: int
    identity: Mapping[str, Any] | None = None


def channel_statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Return mean and population standard deviation per channel of ``uint8`` images (N, 3, H, W) / 255.

    A constant channel gets a deviation of 1, so that normalising leaves it at zero instead of dividing by it.
    """
    values = host_float64(range(256))
    mean, std = [], []
    for channel in range(3):
        # A histogram of the 256 values keeps the sums exact and needs no float copy of the images.
        counts = torch.zeros(256, dtype=torch.int64, device="cpu")
        for chunk in images[:, channel].split(_CHUNK):
            counts += torch.bincount(chunk.flatten(), minlength=256).cpu()
        share = in_float64(counts)
        # Whole numbers, whose sum is exact.
        share /= share.sum()
        centre = float((share * values).sum())
        spread = float((share * (values - centre) ** 2).sum()) ** 0.5
        mean.append(centre / 255)
        std.append(spread / 255 if spread else 1.0)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def resized(data: ImageTensors, size: int | None) -> ImageTensors:
    """Resize square images to ``size`` pixels (bilinear, antialiased), or return ``data`` if they fit."""
    if size is None or tuple(data.images.shape[2:]) == (size, size):
        return data
    parts = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for chunk in data.images.split(_CHUNK)
    ]
    return replace(data, images=torch.cat(parts))
