"""The progress of a training, and the check that its loss is finite."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from timm_models.training import Trainer

__all__ = ["Progress", "checked_mean"]

_logger = logging.getLogger(__name__)


class Progress:
    """Logs the progress of one epoch.

    Args:
        trainer: The trainer of the run.
        epoch: Number of the epoch, from 0.
    """

    def __init__(self, trainer: Trainer, epoch: int) -> None:
        self._trainer, self._epoch = trainer, epoch
        self._start = time.monotonic()

    def rate(self, seen: int) -> float:
        """Images per second over all processes."""
        return seen * self._trainer.here.count / max(time.monotonic() - self._start, 1e-9)

    def tell(self, update: int, loss: float, seen: int) -> None:
        """Log a line, in the first process.

        Args:
            update: Number of the step in the epoch, from 0.
            loss: Mean training loss of the epoch so far.
            seen: Images that this process has seen in the epoch.
        """
        trainer = self._trainer
        if not trainer.here.primary:
            return
        updates = trainer.updates_per_epoch
        elapsed = time.monotonic() - self._start
        left = updates * (trainer.epochs - self._epoch) - (update + 1)
        # Without the time of validation.
        eta = timedelta(seconds=round(elapsed / (update + 1) * left))
        memory = ""
        if trainer.here.device.type == "cuda":
            memory = f"  memory {torch.cuda.max_memory_allocated(trainer.here.device) / 2**30:.1f} GiB"
        _logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f  lr %.4g  %.1f images/s%s  ETA %s",
            self._epoch + 1,
            trainer.epochs,
            update + 1,
            updates,
            loss,
            trainer.optimizer.param_groups[0]["lr"],
            self.rate(seen),
            memory,
            eta,
        )


def checked_mean(total: Tensor, seen: int, epoch: int, update: int) -> float:
    """The mean loss over the images seen.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    mean = total.item() / seen
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"The training loss is {mean} by step {update + 1} of epoch {epoch + 1}: lower the learning rate, or use "
            "amp_dtype bfloat16 if it was mixed precision. The last checkpoint is untouched."
        )
    return mean
