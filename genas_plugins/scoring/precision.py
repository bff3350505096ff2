"""The precision that scores are measured in.

On NVIDIA GPUs since Ampere, PyTorch lets convolutions of float32 round their inputs to TF32, which has 10 bits of
mantissa: noise of a standard deviation of 1e-5, the first sigma of the paper's search on CIFAR-10, vanishes in the
rounding of the weights that it is added to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch

__all__ = ["exact_float32"]

_OPERATIONS = ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products of matrices in float32 are computed in float32, whatever the process has allowed.

    Also a decorator. Afterwards all settings are what they were before. They are those of the process: threads that
    compute at the same time see them.
    """
    with _switched(*_switches()):
        yield


def _switches() -> tuple[str, object, list[object]]:
    """Name of the attribute that allows less, its value for no less, and what has it."""
    if hasattr(torch.backends.cudnn, "conv"):
        return "fp32_precision", "ieee", [attrgetter(operation)(torch.backends) for operation in _OPERATIONS]
    # PyTorch before 2.9.
    return "allow_tf32", False, [torch.backends.cudnn, torch.backends.cuda.matmul]


@contextmanager
def _switched(name: str, value: object, owners: list[object]) -> Iterator[None]:
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)
