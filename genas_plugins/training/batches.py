"""Training batches of a supernet: images that stay on the device, in an order that can be repeated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from genas_plugins.checks import check_count, check_flag, check_real, check_seed
from genas_plugins.datasets import ImageTensors

__all__ = ["TrainBatches", "smallest_batch"]

_AHEAD = 16 * 2**20
_SEEDS = 2**64


class TrainBatches:
    """Shuffled and augmented training batches, cropped, flipped and normalised on the device.

    Order and augmentation are functions of the seed and the epoch alone, so that a resumed run sees what an
    uninterrupted one would have seen. In a distributed run every process takes its share.

    Args:
        data: Images and labels in memory, or a data set of pairs of a uint8 tensor ``(3, H, W)`` and a label.
        batch_size: Images a batch and process; the last batch is smaller. A last batch of one image, of which batch
            normalisation has no statistics where features are of one pixel, joins the batch before it.
        mean: Mean of each channel, images scaled to [0, 1].
        std: Standard deviation of each channel, on that scale.
        flip: Mirror half of the images.
        crop_padding: Pixels of black around the image before a random crop of its size.
        seed: Seed of the order and the augmentation.
        num_workers: Processes that decode images, where they are not in memory.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        data: ImageTensors | Dataset,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        flip: bool = True,
        crop_padding: int = 4,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_count("batch_size", batch_size)
        check_flag("flip", flip)
        check_count("crop_padding", crop_padding, 0)
        check_count("num_workers", num_workers, 0)
        check_seed(seed)
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must be three numbers each, one a channel, got {mean} and {std}.")
        for m, s in zip(mean, std, strict=True):
            check_real("mean", m)
            check_real("std", s, above=0)
        self.data = data
        self.batch_size = batch_size
        self.flip = flip
        self.crop_padding = crop_padding
        self.seed = seed
        self.num_workers = num_workers
        self.epoch = 0
        self._shared = True
        scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        self._scale, self._shift = (torch.tensor(row, dtype=torch.float32).view(1, 3, 1, 1) for row in (scale, shift))

    @property
    def sampler(self) -> TrainBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration."""
        self.epoch = epoch

    def to(self, device: torch.device) -> TrainBatches:
        """Put the images on a device, where they are in memory."""
        if isinstance(self.data, ImageTensors):
            self.data = copy.copy(self.data)
            for name in ("images", "labels"):
                object.__setattr__(self.data, name, getattr(self.data, name).to(device))
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def whole(self) -> TrainBatches:
        """The batches of the first epoch, all of them in every process: for measurements that must agree."""
        view = copy.copy(self)
        view.epoch = 0
        view._shared = False
        return view

    @property
    def sizes(self) -> list[int]:
        """Images of each batch."""
        _, world = self._rank_and_world()
        return self._sizes(len(self.data) // world)

    def __len__(self) -> int:
        return len(self.sizes)

    def _sizes(self, images: int) -> list[int]:
        sizes = [min(self.batch_size, images - first) for first in range(0, images, self.batch_size)]
        if len(sizes) > 1 and sizes[-1] == 1 < sizes[-2]:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % _SEEDS)
        rank, world = self._rank_and_world()
        order = torch.randperm(len(self.data), generator=generator)
        share = order[rank : len(order) - len(order) % world : world]
        # Every process draws its own augmentation.
        generator.manual_seed(((self.seed * 1_000_003 + self.epoch) * 1_009 + rank + 1) % _SEEDS)
        drawn = self._draw(len(share), generator)
        first = 0
        for images, labels, sizes in self._raw(share):
            corners, mirrored = (None if row is None else row[..., first : first + len(labels)] for row in drawn)
            first += len(labels)
            augmented = self._augment(images, corners, mirrored)
            yield from zip(augmented.split(sizes), labels.split(sizes), strict=True)

    def _rank_and_world(self) -> tuple[int, int]:
        distributed = torch.distributed
        if self._shared and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def _raw(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Images as they are, and labels; of several batches, of these sizes, where they are small and in memory."""
        if isinstance(self.data, ImageTensors):
            device = self.data.labels.device
            sizes = self._sizes(len(order))
            several = _batches_at_once(device, 4 * self.data.images[0].numel() * self.batch_size)
            groups = [sizes[first : first + several] for first in range(0, len(sizes), several)]
            for chosen, group in zip(order.to(device).split(list(map(sum, groups))), groups, strict=True):
                yield self.data.images[chosen], self.data.labels[chosen], group
            return
        loader = DataLoader(
            self.data,
            batch_sampler=[chosen.tolist() for chosen in order.split(self._sizes(len(order)))],
            num_workers=self.num_workers,
            pin_memory=self._scale.is_cuda,
            # Without one, the loader seeds its workers from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for images, labels in loader:
            images, labels = (part.to(self._scale.device, non_blocking=True) for part in (images, labels))
            yield images, labels, [len(labels)]

    def _draw(self, images: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """The corners ``(2, N)`` and the mirrored ones ``(N)`` of an epoch, drawn batch by batch, moved all at once.

        A copy to a GPU makes the host wait until the GPU has done all it was given.
        """
        sizes = self._sizes(images)
        corners, mirrored = [], []
        for size in sizes:
            if self.crop_padding:
                corners.append(torch.randint(2 * self.crop_padding + 1, (2, size), generator=generator))
            if self.flip:
                mirrored.append(torch.rand(size, generator=generator) < 0.5)

        return tuple(torch.cat(drawn, -1).to(self._scale.device) if drawn else None for drawn in (corners, mirrored))

    def _augment(self, images: Tensor, corners: Tensor | None, mirrored: Tensor | None) -> Tensor:
        count, _, height, width = images.shape
        device = images.device
        if corners is not None:
            padded = F.pad(images, (self.crop_padding,) * 4)
            rows = corners[0][:, None] + torch.arange(height, device=device)
            columns = corners[1][:, None] + torch.arange(width, device=device)
            picture = torch.arange(count, device=device)[:, None, None]
            images = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if mirrored is not None:
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        images = images.float().mul_(self._scale).add_(self._shift)
        return images.contiguous(memory_format=torch.channels_last)


def _batches_at_once(device: torch.device, size: int) -> int:
    """How many batches of ``size`` bytes to augment together.

    For each by itself the operators are a few hundredths of what a GPU's step starts. On a CPU they are work in its
    caches, which several batches leave.
    """
    return 1 if device.type == "cpu" else max(1, _AHEAD // size)


def smallest_batch(loaders: Any) -> int | None:
    """Images of the smallest batch of a pass over a training loader, where that is known."""
    if isinstance(loaders, TrainBatches):
        return min(loaders.sizes)
    if not isinstance(loaders, DataLoader) or type(loaders.batch_sampler) is not BatchSampler:
        return None
    try:
        count = len(loaders.sampler)
    except TypeError:
        return None
    size = loaders.batch_sampler.batch_size
    return size if loaders.batch_sampler.drop_last or count % size == 0 else count % size
