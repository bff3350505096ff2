"""Batches that already are on the device: what a search reads a thousand times is moved there once.

Batches that nothing but the device's memory limits may start too large: a pass that does not fit is repeated in
smaller ones.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from genas_plugins.datasets import ImageTensors
from genas_plugins.devices import host_float64
from genas_plugins.scoring.precision import parameter_types_alone

__all__ = [
    "SMALLEST_BATCH",
    "Batches",
    "TensorBatches",
    "first_images",
    "over_batches",
    "sum_over_batches",
    "without_single_images",
]

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of images ``(N, 3, H, W)`` and labels ``(N,)``."""
"""Images ``(N, C, H, W)`` and their labels, batch by batch, as often as they are asked for."""

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)

SMALLEST_BATCH = 16
"""Images; where a batch of so many does not fit, the device has no room for the network either."""

# What needs memory beside PyTorch's own: kernels that are loaded when they first run, handles, and workspaces. cuDNN
# tries its ways one after another, and has none left.
_FULL = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
_halving = threading.Lock()


def _channel_row(name: str, values: Sequence[float]) -> Tensor:
    row = host_float64(values)
    if row.shape != (3,) or not bool(row.isfinite().all()):
        raise ValueError(f"{name} must be three finite numbers, one a channel, but got {values!r}.")
    return row


class TensorBatches:
    """Re-iterable batches of normalised images, in the order of the data, every image once.

    The ``uint8`` images are moved to the device once; each iteration normalises them there to
    ``(x / 255 - mean) / std`` and yields images of shape (n, 3, H, W) with ``int64`` labels of shape (n,).
    The last batch may be smaller.

    Args:
        data: The images.
        batch_size: Images per batch.
        mean: Mean per channel of images scaled to [0, 1].
        std: Standard deviation per channel of images scaled to [0, 1].
        device: Where the images live and the batches appear.
        dtype: Floating dtype of the batches. Below float32 the result is rounded, not the arithmetic.
        channels_last: Memory format of the batches.

    Raises:
        TypeError: ``data`` is not an :class:`~genas_plugins.datasets.ImageTensors`.
        ValueError: ``batch_size``, ``mean``, ``std`` or ``dtype`` cannot be used.
    """

    def __init__(
        self,
        data: ImageTensors,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        if not isinstance(data, ImageTensors):
            raise TypeError(
                f"data must be ImageTensors, but got {type(data).__name__}: a data set left on disk is "
                "loaded with its load() first."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}.")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype such as torch.float32, but got {dtype}.")
        centre, spread = _channel_row("mean", mean), _channel_row("std", std)
        if not bool((spread > 0).all()):
            raise ValueError(f"std must be larger than 0 in every channel, but got {std!r}.")

        # In a list because batches that share these images fit, or do not fit, the same memory.
        self._batch_size = [batch_size]
        self.dtype = dtype
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._images = data.images.to(device).contiguous(memory_format=layout)
        self._labels = data.labels.to(device)
        # Known here, so that no measurement has to read it from the device.
        self.num_classes = len(data.class_names)
        self.top_label = int(data.labels.max())
        # Half precision cannot hold 256 levels times a scale, so the arithmetic stays in float32 for it.
        self._compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift = 1 / (255 * spread), -centre / spread
        self._scale = scale.to(self._compute).view(1, 3, 1, 1).to(device)
        self._shift = shift.to(self._compute).view(1, 3, 1, 1).to(device)

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self._batch_size[0]

    @property
    def num_images(self) -> int:
        """Number of images of one iteration."""
        return len(self._images)

    @property
    def labels_of_batches(self) -> list[Tensor]:
        """Labels of each batch, without its images."""
        return list(self._labels.split(self.batch_size))

    def __len__(self) -> int:
        """Number of batches of one iteration."""
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Read once: another thread may halve the batches.
        size = self.batch_size
        pairs = zip(self._images.split(size), self._labels.split(size), strict=True)
        for raw, labels in pairs:
            # In place and after the cast: on a CPU, addcmul on uint8 is five times slower than the two steps.
            images = raw.to(self._compute)
            torch.addcmul(self._shift, images, self._scale, out=images)
            yield images.to(self.dtype), labels

    def section(self, start: int, stop: int) -> TensorBatches:
        """Return the batches ``start`` to ``stop`` (exclusive), which share this object's memory.

        Raises:
            ValueError: Not ``0 <= start < stop <= len(self)``.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"section takes 0 <= start < stop <= {len(self)} batches, but got {start} and {stop}.")
        view = copy.copy(self)
        view._images = self._images[start * self.batch_size : stop * self.batch_size]
        view._labels = self._labels[start * self.batch_size : stop * self.batch_size]
        return view

    def halve(self, tried: int | None = None) -> bool:
        """From now on, give batches of half the size, here and wherever these images are shared.

        Args:
            tried: The size that did not fit; where another thread has halved it meanwhile, that is enough. ``None`` for
                the present one.

        Returns:
            Whether batches are smaller now: none of fewer than :data:`SMALLEST_BATCH` images are made.
        """
        with _halving:
            before = min(self.batch_size, self.num_images)
            if tried is not None and before < min(tried, self.num_images):
                return True
            if before // 2 < SMALLEST_BATCH:
                return False
            self._batch_size[0] = before // 2
        _logger.warning("A batch of %d images does not fit the memory; from now on it is %d.", before, before // 2)
        return True

    def limit(self, num_images: int) -> TensorBatches:
        """Return batches of the first ``num_images`` images, which share this object's memory.

        Raises:
            ValueError: ``num_images`` is not between 1 and the number of images.
        """
        if not 1 <= num_images <= self.num_images:
            raise ValueError(
                f"limit takes 1 to {self.num_images} images, the number that there is, but got {num_images}."
            )
        view = copy.copy(self)
        view._images = self._images[:num_images]
        view._labels = self._labels[:num_images]
        return view


def first_images(batches: Batches, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the first ``count`` images and their labels, or of all if there are fewer."""
    found: list[tuple[Tensor, Tensor]] = []
    for images, labels in batches:
        found.append((images[:count], labels[:count]))
        count -= len(labels)
        if count <= 0:
            break
    return found


def without_single_images(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, where one of a single image joins the batch before it, if that has several.

    Batch normalisation has no variance of one value a channel, which an image is whose features are of one pixel; and
    where batches are averaged, a single image would count as much as all the others of a batch.
    """
    held: tuple[Tensor, Tensor] | None = None
    for images, labels in batches:
        if held is not None and len(images) == 1 < len(held[0]):
            # Who recalibrates needs no labels.
            held = (torch.cat([held[0], images]), None if labels is None else torch.cat([held[1], labels]))
            continue
        if held is not None:
            yield held
        held = images, labels
    if held is not None:
        yield held


@parameter_types_alone()
def over_batches(batches: Batches, measure: Callable[[Tensor, Tensor], Result]) -> list[Result]:
    """``measure(images, labels)`` of all batches, in their order.

    It is computed in the types of the parameters (:func:`genas_plugins.scoring.precision.parameter_types_alone`), and
    nothing is read from the device. When its memory does not suffice and the batches are :class:`TensorBatches`, they
    are halved for good, and the pass is begun anew.

    Args:
        batches: Images and labels.
        measure: What to do with a batch.

    Raises:
        ValueError: There are no batches.
        torch.OutOfMemoryError: The batches cannot be made smaller; a library's own words for it are a RuntimeError.
    """
    while True:
        tried = batches.batch_size if isinstance(batches, TensorBatches) else None
        try:
            results = [measure(images, labels) for images, labels in batches]
            break
        except RuntimeError as error:
            if not (isinstance(batches, TensorBatches) and _out_of_memory(error) and batches.halve(tried)):
                raise
        # Not within the except clause, where the error holds the tensors of the pass that failed.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    if not results:
        raise ValueError("Networks are measured on at least one batch of images, got none.")
    return results


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is full: PyTorch's own, or what it passes on from a library."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL)


def sum_over_batches(batches: Batches, measure: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, int]:
    """Sum of ``measure(images, labels)`` over all batches, on their device, and the number of images.

    Arguments and errors are those of :func:`over_batches`.
    """
    parts, counts = zip(*over_batches(batches, lambda x, y: (measure(x, y), len(y))), strict=True)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total, sum(counts)
