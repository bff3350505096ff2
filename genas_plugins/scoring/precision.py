"""The precision that scores are measured in.

On NVIDIA GPUs since Ampere, PyTorch lets convolutions of float32 round their inputs to TF32, which has 10 bits of
mantissa: noise of a standard deviation of 1e-5, the first sigma of the paper's search on CIFAR-10, vanishes in the
rounding of the weights that it is added to. Autocast rounds further, to 8 bits, and images of another type than the
weights would decide what is computed: a score is measured in the type of the parameters, whatever is set around it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

__all__ = ["exact_float32", "in_parameter_type", "parameter_type", "parameter_types_alone"]

_OPERATIONS = ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
# Those that PyTorch has autocast for; which of them a build knows is found out by asking.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu")


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


@contextmanager
def parameter_types_alone() -> Iterator[None]:
    """What is computed in here has the types of the parameters: :func:`exact_float32`, and autocast off on any device.

    Also a decorator. Autocast belongs to the thread, so that no other one notices.
    """
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _autocast_devices() -> list[str]:
    """Types of device for which autocast is on in this thread."""
    found = []
    for device in (*_AUTOCAST_DEVICES, torch._C._get_privateuse1_backend_name()):
        try:
            if torch.is_autocast_enabled(device):
                found.append(device)
        except RuntimeError:
            # This build has no autocast for such a device, so that it cannot be on.
            continue
    return found


def parameter_type(model: nn.Module) -> torch.dtype | None:
    """Type of the first parameter that holds floating-point numbers, which reads the images; ``None`` without any."""
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), None)


def in_parameter_type(model: nn.Module, images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` as ``model`` reads them: in the type of its parameters.

    Images of integers stay as they are; a network that reads them knows how.
    """
    dtype = parameter_type(model)
    return images.to(dtype) if dtype is not None and images.is_floating_point() else images
