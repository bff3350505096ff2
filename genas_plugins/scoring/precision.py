"""The precision that scores are measured in.

On NVIDIA GPUs since Ampere, PyTorch lets convolutions of float32 round their inputs to TF32, which has 10 bits of
mantissa: noise of a standard deviation of 1e-5, the first sigma of the paper's search on CIFAR-10, vanishes in the
rounding of the weights that it is added to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch

__all__ = ["exact_float32"]

_OPERATIONS = ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products of matrices in float32 are computed in float32, whatever the process has allowed.

    Also a decorator. The settings are those of the process: threads that compute at the same time see them. When the
    last that asked for this has left, they are what they were before the first.
    """
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()


def _switches() -> tuple[str, object, list[object]]:
    """Name of the attribute that allows less, its value for no less, and what has it."""
    if hasattr(torch.backends.cudnn, "conv"):
        return "fp32_precision", "ieee", [attrgetter(operation)(torch.backends) for operation in _OPERATIONS]
    # PyTorch before 2.9.
    return "allow_tf32", False, [torch.backends.cudnn, torch.backends.cuda.matmul]


class _Exact:
    """Switches that several threads need at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[object] = []

    def enter(self) -> None:
        name, value, owners = _switches()
        with self._lock:
            if not self._inside:
                self._before = [getattr(owner, name) for owner in owners]
            self._inside += 1
            for owner in owners:
                setattr(owner, name, value)

    def leave(self) -> None:
        name, _, owners = _switches()
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for owner, old in zip(owners, self._before, strict=True):
                    setattr(owner, name, old)


_exact = _Exact()
