"""The learning-rate curve of the paper's ImageNet training as a scheduler of timm."""

from __future__ import annotations

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

__all__ = ["LinearTailLRScheduler"]


class LinearTailLRScheduler(Scheduler):
    """Linear decay with a gentler slope over the last epochs, times a linear warm-up; one value per epoch.

    With E epochs, a tail of k and a warm-up of w, epoch t (from 0) has the learning rate ``lr (E - k - t) / (E - k)``
    before the tail and ``lr (E - t) / ((E - k) k)`` in it, and ``(t + 1) / w`` of that in the warm-up (official
    code, ``adjust_lr`` and ``main`` in retrain_architecture/retrain.py).

    Args:
        optimizer: Optimizer whose groups have the peak learning rate.
        epochs: Epochs of the training, E.
        tail: Epochs of the tail, k.
        warmup: Epochs of the warm-up, w; 0: none.

    Raises:
        ValueError: ``tail`` is not from 1 to below ``epochs``, or ``warmup`` is negative.

    Example:
        >>> import torch
        >>> from timm_models.schedule import LinearTailLRScheduler
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> LinearTailLRScheduler(optimizer, epochs=10, tail=2, warmup=0).step(4)
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """

    def __init__(self, optimizer: Optimizer, epochs: int, tail: int = 5, warmup: int = 5) -> None:
        if not 1 <= tail < epochs:
            raise ValueError(f"A tail of {tail} epochs needs a training of more than that, and at least 1: {epochs}.")
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0 epochs, got {warmup}.")
        super().__init__(optimizer, param_group_field="lr")
        self.epochs = epochs
        self.tail = tail
        self.warmup = warmup
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        before = self.epochs - self.tail
        factor = (before - t) / before
        if t >= before:
            factor = max(self.epochs - t, 0) / (before * self.tail)
        if t < self.warmup:
            factor *= (t + 1) / self.warmup
        return [value * factor for value in self.base_values]
