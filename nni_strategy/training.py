"""The official supernet recipe as a Lightning module, and a loader that keeps its images on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from genas_plugins.checks import check_count, check_flag, check_real, check_seed
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.precision import in_parameter_type
from genas_plugins.training.path_sgd import PathSGD
from nni_strategy.space import SupernetSpace
from nni_strategy.threads import TrainingThreads

__all__ = ["SupernetModule", "TrainBatches", "supernet_evaluator"]

_COUNTER = "num_batches_tracked"
_AHEAD = 16 * 2**20
_SEEDS = 2**64


class SupernetModule(LightningModule):
    """Classification with the supernet recipe of the official code (clovaai/GeNAS@fd3cba8).

    SGD with momentum 0.9 and a cosine learning rate, one step of the schedule per epoch. On the spaces of this package
    the optimizer is :class:`genas_plugins.training.path_sgd.PathSGD`: weights that the present path does not use may be
    some steps behind until :meth:`on_train_epoch_end`.

    Args:
        epochs: Length of the schedule.
        learning_rate: At the start.
        final_learning_rate: At the end.
        momentum: Of SGD.
        weight_decay: 3e-4 for the DARTS space, 5e-4 for NAS-Bench-201.
        decay_unsampled: Weight decay and momentum also move the paths that were not sampled, as in the
            official run, whose torch wrote zeros into gradients instead of dropping them.

    Raises:
        TypeError: A number is none.
        ValueError: A number is not finite, or no training can use it.
    """

    def __init__(
        self,
        epochs: int,
        *,
        learning_rate: float = 0.025,
        final_learning_rate: float = 0.001,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        decay_unsampled: bool = True,
    ) -> None:
        super().__init__()
        check_count("epochs", epochs)
        check_real("learning_rate", learning_rate, above=0)
        check_real("final_learning_rate", final_learning_rate, least=0)
        check_real("momentum", momentum, least=0, below=1)
        check_real("weight_decay", weight_decay, least=0)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.decay_unsampled = decay_unsampled
        self._path_sgd: PathSGD | None = None
        self._parts_of: dict[nn.Module, tuple[list[nn.Parameter], list[nn.Module]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``, in the type of the parameters."""
        x = in_parameter_type(self.model, x)
        if self._path_sgd is None:
            return self.model(x)
        parameters, norms = self._path()
        self._path_sgd.catch_up(parameters)
        with _counted_together(norms):
            return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        # For a bar of its own Lightning reads the loss at every step, and so waits for the device.
        self.log("train_loss", loss, prog_bar=self.trainer.progress_bar_callback is not None, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of one batch, along whichever path is fixed."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels))
        hits = (logits.argmax(1) == labels).float().mean()
        self.log("val_top1", hits, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD over all parameters of the supernet."""
        own = self.decay_unsampled and isinstance(self.model, SupernetSpace)
        kind = PathSGD if own else SGD
        optimizer = kind(self.parameters(), self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)
        self._path_sgd = optimizer if isinstance(optimizer, PathSGD) else None
        self._parts_of.clear()
        schedule = CosineAnnealingLR(optimizer, self.epochs, self.final_learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Drop the gradients; write zeros where weights decay that were not sampled, and the optimizer needs them."""
        optimizer.zero_grad(set_to_none=not self._writes_zeros)

    def on_train_start(self) -> None:
        """Put the images on the device; give parameters that took part before a resume their zero gradients."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainBatches):
            loader.to(self.trainer.strategy.root_device)
        if not self._writes_zeros:
            return
        for parameter, state in self.trainer.optimizers[0].state.items():
            if state.get("momentum_buffer") is not None and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_train_epoch_end(self) -> None:
        """Bring all weights up to date, for the checkpoint and for whoever reads them after the training."""
        if self._path_sgd is not None:
            self._path_sgd.flush()

    @property
    def _writes_zeros(self) -> bool:
        return self.decay_unsampled and self._path_sgd is None

    def _path(self) -> tuple[list[nn.Parameter], list[nn.Module]]:
        """Parameters of the present path, and its batch normalisation as far as that counts batches."""
        parameters: list[nn.Parameter] = []
        norms: list[nn.Module] = []
        for module in self.model.path_modules():
            if module not in self._parts_of:
                # Collecting them takes a fair part of a GPU's step.
                counting = (part for part in module.modules() if getattr(part, _COUNTER, None) is not None)
                # Without a momentum the count is one of the numbers that a forward pass computes with.
                own = [part for part in counting if part.momentum is not None]
                self._parts_of[module] = list(module.parameters()), own
            for found, more in zip((parameters, norms), self._parts_of[module], strict=True):
                found += more
        return parameters, norms


@contextmanager
def _counted_together(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch normalisation count its batches all at once: one by one that is a tenth of what a GPU's step starts."""
    # In the dictionaries themselves: nn.Module's own way to them takes as long as what is saved.
    all_buffers = [norm._buffers for norm in norms if norm.training]
    counters = [buffers[_COUNTER] for buffers in all_buffers]
    try:
        for buffers in all_buffers:
            buffers[_COUNTER] = None
        yield
    finally:
        for buffers, counter in zip(all_buffers, counters, strict=True):
            buffers[_COUNTER] = counter
    if counters:
        torch._foreach_add_(counters, 1)


class TrainBatches:
    """Shuffled and augmented training batches, cropped, flipped and normalised on the device.

    Order and augmentation are functions of the seed and the epoch alone, so that a resumed run sees what an
    uninterrupted one would have seen. In a distributed run every process takes its share.

    Args:
        data: Images and labels in memory, or a data set of pairs of a uint8 tensor ``(3, H, W)`` and a label.
        batch_size: Images a batch and process; the last batch is smaller. A last batch of one image, of which batch
            normalisation has no statistics where features are of one pixel, joins the batch before it.
        mean: Of each channel, images scaled to [0, 1].
        std: The same.
        flip: Mirror half of the images.
        crop_padding: Pixels of black around the image before a random crop of its size.
        seed: Of order and augmentation.
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


def supernet_evaluator(
    data: SearchData,
    epochs: int,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.025,
    final_learning_rate: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    gradient_clip: float = 5.0,
    decay_unsampled: bool = True,
    flip: bool = True,
    crop_padding: int = 4,
    num_workers: int = 0,
    threads: int | None = None,
    seed: int = 0,
    fit_kwargs: dict[str, Any] | None = None,
    **trainer: Any,
) -> Lightning:
    """The official supernet recipe as an NNI evaluator (see :class:`SupernetModule`, :class:`TrainBatches`).

    Args:
        data: Search data; the validation half is not looked at during training.
        epochs: Training epochs.
        gradient_clip: Largest norm of the gradient; 0 for any.
        threads: PyTorch's threads on a CPU while it trains; ``None`` for PyTorch's own number, and a line of advice
            where that is too many (:class:`nni_strategy.threads.TrainingThreads`).
        fit_kwargs: For ``Trainer.fit``, for instance ``ckpt_path``.
        trainer: Further arguments of Lightning's ``Trainer``: ``accelerator``, ``devices``, ``precision``,
            ``callbacks``, ``logger`` and so on. For several devices, the ``strategy`` is one of the
            ``ddp_find_unused_parameters_true`` family, since a step uses one path only.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: A setting is out of its range.
    """
    check_real("gradient_clip", gradient_clip, least=0)
    module = SupernetModule(
        epochs,
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        decay_unsampled=decay_unsampled,
    )
    train = TrainBatches(
        data.train,
        batch_size,
        data.mean,
        data.std,
        flip=flip,
        crop_padding=crop_padding,
        seed=seed,
        num_workers=num_workers,
    )
    validation = TensorBatches(data.validation, batch_size, data.mean, data.std)
    own = TrainingThreads(threads, advise=isinstance(data.train, ImageTensors))
    given = trainer.get("callbacks") or []
    trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), own]
    arguments = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **trainer}
    return Lightning(
        module,
        Trainer(
            max_epochs=epochs,
            gradient_clip_val=gradient_clip or None,
            use_distributed_sampler=False,
            **arguments,
        ),
        train_dataloaders=train,
        val_dataloaders=validation,
        fit_kwargs=fit_kwargs,
    )
