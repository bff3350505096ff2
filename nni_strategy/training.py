"""The official supernet recipe as a Lightning module, and a loader that keeps its images on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from genas_plugins.checks import check_count, check_real
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.precision import in_parameter_type
from genas_plugins.training.batches import TrainBatches
from genas_plugins.training.path_sgd import PathSGD
from genas_plugins.training.rates import final_rate
from nni_strategy.space import SupernetSpace

__all__ = ["SupernetModule", "TrainBatches", "TrainingProgress", "TrainingThreads", "supernet_evaluator"]

_COUNTER = "num_batches_tracked"
_logger = logging.getLogger(__name__)

_LEAST_SECONDS, _LEAST_STEPS = 10.0, 10
# A step that computes takes at least as much CPU time as wall-clock time, and with several threads more.
_MUCH = 1.25


class SupernetModule(LightningModule):
    """Classification with the supernet recipe of the official code (clovaai/GeNAS@fd3cba8).

    SGD with momentum 0.9 and a cosine learning rate, one step of the schedule per epoch. On the spaces of this package
    the optimizer is :class:`genas_plugins.training.path_sgd.PathSGD`: weights that the present path does not use may be
    some steps behind until :meth:`on_train_epoch_end`.

    Args:
        epochs: Length of the schedule.
        learning_rate: At the start.
        final_learning_rate: At the end; ``None`` is the official 0.001, or ``learning_rate`` if that is less.
        momentum: Momentum of SGD.
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
        final_learning_rate: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        decay_unsampled: bool = True,
    ) -> None:
        super().__init__()
        check_count("epochs", epochs)
        check_real("learning_rate", learning_rate, above=0)
        if final_learning_rate is None:
            final_learning_rate = final_rate(learning_rate)
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


class TrainingThreads(Callback):
    """Trains with so many threads on a CPU, and gives them back; or says when several of them wait for one another.

    A small network keeps its threads waiting at the end of every operation. Where other work wants the cores as well,
    each waits for the slower one, and a step takes many times as long as on one thread.

    Args:
        threads: ``None`` for PyTorch's own number. Then a line of advice is logged, once, if steps take much more
            wall-clock than CPU time.
        advise: Whether to look at the clocks at all: where images come from a disk, they say nothing about threads.

    Raises:
        TypeError: ``threads`` is no whole number.
        ValueError: ``threads`` is below 1.
    """

    def __init__(self, threads: int | None = None, *, advise: bool = True) -> None:
        self.threads = None if threads is None else check_count("threads", threads, most=1_024)
        self._advise = advise
        self._before: int | None = None
        self._since: tuple[float, float, int] | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Set the number of threads, where the training is on a CPU."""
        if trainer.strategy.root_device.type != "cpu":
            return
        if self.threads is not None:
            self._before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
        elif self._advise and torch.get_num_threads() > 1:
            self._since = self._now(0)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the clocks now and then."""
        if self._since is None:
            return
        wall, cpu, steps = (now - then for now, then in zip(self._now(trainer.global_step), self._since, strict=True))
        if wall < _LEAST_SECONDS or steps < _LEAST_STEPS:
            return
        if wall < _MUCH * cpu:
            self._since = self._now(trainer.global_step)
            return
        # Once is enough.
        self._since = None
        _logger.warning(
            "Training steps take %.1f times as much wall-clock as CPU time: other work keeps the cores busy, and %d "
            "threads wait for each other. One is faster then: go on with OMP_NUM_THREADS=1 and --resume, or set "
            "training.threads to 1.",
            wall / cpu,
            torch.get_num_threads(),
        )

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Give the threads back to what comes after."""
        self._restore()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Give them back also after an error or an interrupt."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None

    @staticmethod
    def _now(step: int) -> tuple[float, float, int]:
        return time.perf_counter(), time.process_time(), step


class TrainingProgress(Callback):
    """Shows epochs, the last loss and the time left."""

    def __init__(self, progress: Callable[[str, int, int], Any], epochs: int) -> None:
        self._progress = progress
        self._epochs = epochs
        self._display: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.num_training_batches)
        self._display = self._progress("training", self._epochs * steps, trainer.current_epoch * steps)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        shown = {}
        # Reading a loss waits for the device; once in a while is enough for the eye.
        if trainer.global_step % 10 == 0 and "train_loss" in (metrics := trainer.callback_metrics):
            shown = {"loss": f"{float(metrics['train_loss']):.3f}", "epoch": trainer.current_epoch + 1}
        self._display.step(shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()


def supernet_evaluator(
    data: SearchData,
    epochs: int,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.025,
    final_learning_rate: float | None = None,
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
            where that is too many (:class:`TrainingThreads`).
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
