"""What a run shows of its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from genas_plugins.search import Record

__all__ = ["SearchProgress", "TrainingProgress"]


class TrainingProgress(Callback):
    """Shows epochs, the last loss and the time left."""

    def __init__(self, progress: Callable[[str, int, int], Any], epochs: int) -> None:
        self._progress = progress
        self._epochs = epochs
        self._display: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = int(trainer.num_training_batches)
        self._display = self._progress("training", self._epochs * steps, trainer.current_epoch * steps)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        shown = {}
        # Reading a loss waits for the device; once in a while is enough for the eye.
        if trainer.global_step % 10 == 0 and "train_loss" in (metrics := trainer.callback_metrics):
            shown = {"loss": f"{float(metrics['train_loss']):.3f}", "epoch": trainer.current_epoch + 1}
        self._display.step(shown)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._display.close()


class SearchProgress:
    """Shows candidates, the best score so far and the time left."""

    def __init__(self, progress: Callable[[str, int, int], Any], total: int) -> None:
        self._progress = progress
        self._total = total
        self._display: Any = None
        self._best: float | None = None

    def __call__(self, record: Record) -> None:
        if self._display is None:
            self._display = self._progress("search", self._total, 0)
        score = record.score
        if score is not None and (self._best is None or score > self._best):
            self._best = score
        shown = {"generation": record.generation + 1}
        if self._best is not None:
            shown["best"] = f"{self._best:.6g}"
        self._display.step(shown)
        if record.index + 1 == self._total:
            self._display.close()
