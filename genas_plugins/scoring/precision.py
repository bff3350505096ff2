"""The precision that scores are measured in.

On NVIDIA GPUs since Ampere, PyTorch lets convolutions of float32 round their inputs to TF32, which has 10 bits of
mantissa: noise of a standard deviation of 1e-5, the first sigma of the paper's search on CIFAR-10, vanishes in the
rounding of the weights that it is added to.

PyTorch 2.9 has a switch for each operation, beside the older ones for a library. Whoever reads an older one is refused
with a RuntimeError where the two disagree, as they would if only the newer ones were turned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeVar

import torch

__all__ = ["exact_float32"]

_OPERATIONS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
_EXACT, _INHERITED = "ieee", "none"
_ALLOWED_BY_DEFAULT = ("cudnn.conv", "cudnn.rnn")

Value = TypeVar("Value")


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


def _operations() -> dict[str, Any]:
    """What has a switch of its own; nothing before PyTorch 2.9."""
    if not hasattr(torch.backends.cudnn, "conv"):
        return {}
    return {name: attrgetter(name)(torch.backends) for name in _OPERATIONS}


def _read(switch: Callable[[], Value]) -> Value | None:
    """An older switch, or ``None`` where the process has turned newer ones that it cannot tell."""
    try:
        return switch()
    except RuntimeError:
        return None


def _matmul_precision() -> str:
    # Reading it is refused where the next line would give an answer that is out of date.
    _ = torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision()


class _Exact:
    """Switches that several threads need at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._operations: dict[str, str] = {}
        self._cudnn: bool | None = None
        self._matmul: str | None = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._operations = {name: owner.fp32_precision for name, owner in _operations().items()}
                self._cudnn = _read(lambda: torch.backends.cudnn.allow_tf32)
                self._matmul = _read(_matmul_precision)
            self._inside += 1
            if self._cudnn:
                torch.backends.cudnn.allow_tf32 = False
            if self._matmul is not None:
                torch.set_float32_matmul_precision("highest")
            for owner in _operations().values():
                if owner.fp32_precision != _EXACT:
                    owner.fp32_precision = _EXACT

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            if self._cudnn:
                torch.backends.cudnn.allow_tf32 = True
            if self._matmul is not None:
                torch.set_float32_matmul_precision(self._matmul)
            for name, owner in _operations().items():
                old = self._operations[name]
                # What was inherited follows again when the process turns what it inherits from.
                if owner.fp32_precision != old and not (name in _ALLOWED_BY_DEFAULT and old == "tf32"):
                    owner.fp32_precision = _INHERITED
                if owner.fp32_precision != old:
                    owner.fp32_precision = old


_exact = _Exact()
