"""Fills gaps of MMSegmentation on current PyTorch and Python.

These are mmcv's compiled operations, checkpoints as data, configurations of the fork, and a function that Python 3.14
has dropped.

``mmcv-lite``, and OneDL's mmcv where it was built without PyTorch, have everything but the compiled operations.
``mmseg.models`` imports some of these, although DeepLab-v3 and most other segmentors never call one; docs/mmseg.md says
which do and how mmcv is compiled.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader, checkpoint

from mmseg_backbones._distributions import DISTRIBUTIONS, OPERATIONS, has_metadata
from mmseg_backbones.weights import admit_history, load_as_data, load_from_local, load_url

__all__ = ["allow_checkpoints", "find_configurations", "stand_in_for_mmcv_ops", "supply_find_loader"]

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
                f"{name} is one of mmcv's compiled operations, which {_mmcv()} does not have. To compile it takes "
                f"minutes and a C++ compiler: {_build_command()}"
            )

        return missing


class _DataTorch(ModuleType):
    """The module ``torch`` whose ``load`` reads data and nothing else, whatever it is asked for."""

    load = staticmethod(load_as_data)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def stand_in_for_mmcv_ops() -> bool:
    """Make ``mmseg.models`` importable with mmcv-lite; returns whether that was needed.

    Where mmcv has its compiled operations, nothing is touched.

    Raises:
        ImportError: It has them, and they cannot be loaded: they were compiled for another PyTorch.
    """
    if _EXTENSION in sys.modules:
        return False
    if importlib.util.find_spec(_EXTENSION) is not None:
        try:
            importlib.import_module(_EXTENSION)
        except ImportError as error:
            raise ImportError(
                f"The compiled operations of {_mmcv()} do not fit PyTorch {torch.__version__} ({error}); compile them "
                f"again: {_build_command()}"
            ) from error
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
    """Let mmengine and ``torch.load`` read mmengine's checkpoints as data, and mmengine nothing else.

    By itself mmengine reads what an address gives as code, and leaves all other files to PyTorch's default, which is
    to read them as code before 2.6 and wherever ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` is set; the fork reads a file that
    is refused as data once more as code. All its loaders therefore get ours.
    """
    admit_history()
    # mmengine's hook for how local files are read.
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    # For the other schemes there is none: these are the functions that their loaders call.
    for name, ours in {"torch": _DataTorch("torch"), "load_url": load_url, "_safe_torch_load": load_as_data}.items():
        # The last is the fork's.
        if hasattr(checkpoint, name):
            setattr(checkpoint, name, ours)


def find_configurations() -> None:
    """Let ``mmseg::`` in a configuration mean the package that is imported, whoever distributes it.

    mmengine looks for a distribution called mmsegmentation. That of the fork has another name, and a folder of source
    on the path has none.
    """
    names = [name for name in DISTRIBUTIONS["mmseg"] if has_metadata(name)]
    if MODULE2PACKAGE.get("mmseg") not in names:
        MODULE2PACKAGE["mmseg"] = names[0] if names else "mmseg"


def _mmcv() -> str:
    names = [name for name in DISTRIBUTIONS["mmcv"] if has_metadata(name)]
    return names[0] if names else "this mmcv"


def _build_command() -> str:
    return OPERATIONS["onedl-mmcv" if has_metadata("onedl-mmcv") else "mmcv"]
