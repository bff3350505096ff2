"""A device without float64, for machines that have none: what Apple's MPS would refuse is refused on the CPU.

While the trap is set, every tensor counts as one of the device unless it is known to be the CPU's. Of float64 may be
what :mod:`genas_plugins.devices` makes, which on such a device is on the CPU, and what is computed from nothing else;
where it meets a tensor of the device, two devices would meet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from genas_plugins import devices

__all__ = ["without_float64"]

_HELPERS = {function.__code__ for function in (devices.in_float64, devices.full_in_float64, devices.host_float64)}
# Numbers of Python, which PyTorch wraps for its own use.
_WRAPPED = (torch.ops.aten.scalar_tensor.default,)


class _Trap(TorchDispatchMode):
    def __init__(self, but_of: tuple[CodeType, ...]) -> None:
        super().__init__()
        self._but_of = but_of
        self._host = WeakIdKeyDictionary()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        on_host = bool(given) and all(tensor in self._host for tensor in given)
        helped = any(frame.f_code in _HELPERS for frame in _frames(sys._getframe(1)))
        for tensor in made:
            if on_host or func in _WRAPPED or (helped and tensor.dtype == torch.float64):
                self._host[tensor] = True
                self.made += 1
            elif tensor.dtype == torch.float64:
                if any(frame.f_code in self._but_of for frame in _frames(sys._getframe(1))):
                    continue
                raise AssertionError(f"{func} makes a tensor of float64 on a device that has none.")
        return found


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def without_float64(*but_of: CodeType) -> Iterator[Any]:
    """Trap float64 on the device; ``but_of`` are functions of others that do without it where a device has none.

    Yields an object whose ``made`` counts the tensors that were the CPU's.
    """
    trap = _Trap(but_of)
    with pytest.MonkeyPatch.context() as patch, trap:
        patch.setattr(devices, "has_float64", lambda device: False)
        yield trap
