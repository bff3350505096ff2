"""The precision that scores are measured in.

On NVIDIA GPUs since Ampere, PyTorch lets convolutions of float32 round their inputs to TF32, which has 10 bits of
mantissa: noise of a standard deviation of 1e-5, the first sigma of the paper's search on CIFAR-10, vanishes in the
rounding of the weights that it is added to. Autocast rounds further, to 8 bits, and images of another type than the
weights would decide what is computed: a score is measured in the type of the parameters, whatever is set around it.

PyTorch 2.9 has a switch for each operation and each library, beside the older ones for a library. Whoever reads an
older one is refused with a RuntimeError where the two disagree, as they would if only the newer ones were turned; and
``torch.backends.cudnn.flags`` reads and writes both. So all of them say the same while something is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["exact_float32", "in_parameter_type", "parameter_type", "parameter_types_alone"]

# Those that others inherit from come first.
_ABOVE = ("", "cudnn", "mkldnn")
_OPERATIONS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
_EXACT, _INHERITED = "ieee", "none"
_ALLOWED_BY_DEFAULT = ("cudnn.conv", "cudnn.rnn")
# Those that PyTorch has autocast for; which of them a build knows is found out by asking.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu")

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
    """What has a newer switch, nothing before PyTorch 2.9; what others inherit from comes before these."""
    if not hasattr(torch.backends.cudnn, "conv"):
        return {}
    owners = {name: attrgetter(name)(torch.backends) for name in (*_ABOVE, *_OPERATIONS) if name}
    return {"": torch.backends, **owners}


def _read(switch: Callable[[], Value]) -> Value | None:
    """An older switch, or ``None`` where newer ones disagree with it."""
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
        self._precisions: dict[str, str] = {}
        self._cudnn = False
        self._matmul = "highest"

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._precisions = {name: owner.fp32_precision for name, owner in _operations().items()}
                self._cudnn, self._matmul = self._older()
            self._inside += 1
            # The older ones too, whether or not they agreed with the newer: a network may well read them, as
            # torch.backends.cudnn.flags does.
            if self._cudnn:
                torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            _set_all(_EXACT)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            owners = _operations()
            self._restore({name: owners.pop(name) for name in _ABOVE if name in owners})
            if self._cudnn:
                torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision(self._matmul)
            self._restore(owners)

    def _restore(self, owners: dict[str, Any]) -> None:
        for name, owner in owners.items():
            old = self._precisions[name]
            # What was inherited follows again when the process turns what it inherits from.
            if owner.fp32_precision != old and not (name in _ALLOWED_BY_DEFAULT and old == "tf32"):
                owner.fp32_precision = _INHERITED
            if owner.fp32_precision != old:
                owner.fp32_precision = old

    def _older(self) -> tuple[bool, str]:
        """The older switches. Where they cannot be read, they are what the newer have to be for them to be read."""
        cudnn, matmul = _read(lambda: torch.backends.cudnn.allow_tf32), _read(_matmul_precision)
        if cudnn is None or matmul is None:
            _set_all(_EXACT)
            if cudnn is None:
                cudnn = _read(lambda: torch.backends.cudnn.allow_tf32) is None
            if matmul is None:
                matmul = _read(_matmul_precision)
            if matmul is None:
                # All but "medium" are told by a GPU and a CPU that take the same type.
                _set_all("tf32")
                matmul = _read(_matmul_precision) or "medium"
        return cudnn, matmul


def _set_all(precision: str) -> None:
    for owner in _operations().values():
        if owner.fp32_precision != precision:
            owner.fp32_precision = precision


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
