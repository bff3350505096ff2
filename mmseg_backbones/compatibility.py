"""Fills gaps of MMSegmentation 1.2 on current PyTorch and Python.

These are mmcv's compiled operations, loading checkpoints as data, and a function that Python 3.14 has dropped.

No mmcv that MMSegmentation accepts (below 2.2) compiles against current PyTorch. ``mmcv-lite`` has everything but
the compiled operations, and ``mmseg.models`` imports some of these, although DeepLab-v3 and most other segmentors
never call one.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pickle
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from genas_plugins._pickles import numpy_globals
from mmseg_backbones.weights import load_from_local

__all__ = ["allow_checkpoints", "stand_in_for_mmcv_ops", "supply_find_loader"]

_EXTENSION = "mmcv._ext"
# Those of mmengine 0.10 and mmcv 2.1 that call pkgutil.find_loader.
_CALLERS = ("mmengine.utils.dl_utils.misc", "mmcv.utils.ext_loader")


class _StandIn(ModuleType):
    """Stands in for mmcv's compiled operations: any name can be imported, and none can be called."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*arguments: Any, **keywords: Any) -> NoReturn:
            raise RuntimeError(
                f"{name} is one of mmcv's compiled operations, which mmcv-lite does not have: install mmcv >= 2.0 and "
                "< 2.2 with a PyTorch that it compiles against (https://mmcv.readthedocs.io, Installation)."
            )

        return missing


def stand_in_for_mmcv_ops() -> bool:
    """Make ``mmseg.models`` importable with mmcv-lite; returns whether that was needed.

    Where mmcv has its compiled operations, nothing is touched.
    """
    if _EXTENSION in sys.modules or importlib.util.find_spec(_EXTENSION) is not None:
        return False
    module = _StandIn(_EXTENSION)
    # mmcv looks for the module by its specification.
    module.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, None)
    sys.modules[_EXTENSION] = module
    return True


def supply_find_loader() -> None:
    """Let mmengine and mmcv look for compiled operations on Python 3.14, which has no ``pkgutil.find_loader``.

    Only their own modules see the function; ``pkgutil`` stays as it is.
    """
    if hasattr(pkgutil, "find_loader"):
        return
    older = SimpleNamespace(**vars(pkgutil), find_loader=_find_loader)
    for name in _CALLERS:
        importlib.import_module(name).pkgutil = older


def _find_loader(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.loader


def allow_checkpoints() -> None:
    """Let mmengine and ``torch.load`` read mmengine's checkpoints as data.

    They hold the history of logged values as mmengine's ``HistoryBuffer`` of NumPy arrays, classes that PyTorch refuses
    unless they are allowed; these only hold numbers. A ``HistoryBuffer`` refers to its methods by ``getattr``, which is
    replaced by a function that returns these methods and nothing else.
    """
    torch.serialization.add_safe_globals([HistoryBuffer, (_statistic, "builtins.getattr"), *numpy_globals()])
    # mmengine's hook for how local files are read.
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)


def _statistic(owner: Any, name: str) -> Any:
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"A checkpoint refers to {name!r} of {owner!r}, which could execute code.")
    return getattr(HistoryBuffer, name)
