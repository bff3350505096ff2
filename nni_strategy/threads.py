"""PyTorch's threads while a supernet trains on a CPU."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from pytorch_lightning import Callback

from genas_plugins.checks import check_count

__all__ = ["TrainingThreads"]

_logger = logging.getLogger(__name__)

_LEAST_SECONDS, _LEAST_STEPS = 10.0, 10
# A step that computes takes at least as much CPU time as wall-clock time, and with several threads more.
_MUCH = 1.25


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
