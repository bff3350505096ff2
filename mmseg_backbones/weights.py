"""Loads the weights that configurations of MMSegmentation name, as data and checked."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

from genas_plugins._messages import listed, shown
from genas_plugins._pickles import numpy_globals
from genas_plugins.checkpoints import CheckpointError, read_state, read_torch, unwrapped
from genas_plugins.states import existing, is_safetensors

__all__ = ["admit_history", "is_pretrained", "load_as_data", "load_from_local", "load_url", "read_pretrained"]

_KEYS = ("type", "checkpoint", "prefix", "map_location")


def is_pretrained(config: Mapping[str, Any]) -> bool:
    """Whether an ``init_cfg`` is of type ``Pretrained``, given by name, with a scope or not, or as a class."""
    kind = config.get("type")
    if isinstance(kind, str):
        kind = WEIGHT_INITIALIZERS.get(kind)
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)


def read_pretrained(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of an ``init_cfg`` of type ``Pretrained``.

    Args:
        config: The ``init_cfg``: ``checkpoint`` is a file or the address of one, ``prefix`` selects the tensors whose
            names begin with it, as they are or without what wrappers add.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read or has nothing under ``prefix``, or ``config`` has unknown keys.
    """
    if unknown := [key for key in config if key not in _KEYS]:
        raise ValueError(f"init_cfg of type Pretrained has {', '.join(_KEYS[1:])}, got {listed(unknown)}.")
    if not config.get("checkpoint"):
        raise ValueError("init_cfg of type Pretrained needs checkpoint=FILE.")
    checkpoint, prefix = config["checkpoint"], config.get("prefix")
    state = read_state(_fetched(checkpoint))
    if prefix is None:
        return state
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    for named in (state, unwrapped(state)):
        if found := {name.removeprefix(prefix): named[name] for name in named if name.startswith(prefix)}:
            return found
    raise CheckpointError(f"{checkpoint} has nothing under the prefix {shown(prefix)}; it has: {listed(state)}.")


def admit_history() -> None:
    """Let ``torch.load`` read as data what mmengine's checkpoints hold beside tensors.

    That is the history of logged values: mmengine's ``HistoryBuffer`` of NumPy arrays, classes that PyTorch refuses
    unless they are allowed; these only hold numbers. A ``HistoryBuffer`` refers to its methods by ``getattr``, which is
    replaced by a function that returns these methods and nothing else.
    """
    # Again before each file: a context manager of PyTorch, which hosts use, removes on its exit what it was given,
    # also where that had been there before.
    torch.serialization.add_safe_globals([HistoryBuffer, (_statistic, "builtins.getattr"), *numpy_globals()])


def load_as_data(file: Any, map_location: Any = None, **ignored: Any) -> Any:
    """Do for mmengine what ``torch.load`` does, as data and on the CPU.

    Args:
        file: A path, or an open binary file.
        map_location: Ignored, as by :func:`load_from_local`.
        **ignored: What else is said to ``torch.load``, ``weights_only=False`` among it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`load_from_local`.
    """
    if isinstance(file, str | os.PathLike):
        return load_from_local(os.fspath(file))
    with tempfile.NamedTemporaryFile(prefix="checkpoint-", suffix=".pth") as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        return load_from_local(copy.name)


def load_url(url: str, model_dir: str | None = None, map_location: Any = None, progress: bool = True) -> Any:
    """Do for mmengine what ``torch.hub.load_state_dict_from_url`` does, as data and on the CPU.

    PyTorch's own reads as code whatever the address gives, unless it is told not to.

    Args:
        url: Address of a checkpoint, which is downloaded once.
        model_dir: Folder to keep it in; ``None``: PyTorch's for checkpoints.
        map_location: Ignored, as by :func:`load_from_local`.
        progress: Show the download's progress.

    Raises:
        URLError: The address gives nothing.
        CheckpointError: See :func:`load_from_local`.
    """
    return load_from_local(str(_fetched(url, model_dir, progress=progress)))


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint of any model for mmengine: as data, and without the prefixes of ``torch.compile``.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, could execute code when loaded, or claims more memory than its size.
    """
    path = existing(filename)
    admit_history()
    content = read_state(path) if is_safetensors(path) else read_torch(path)
    if not isinstance(content, dict):
        return content
    if isinstance(content.get("state_dict"), dict):
        return {**content, "state_dict": _renamed(content["state_dict"])}
    return _renamed(content)


def _statistic(owner: Any, name: str) -> Any:
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"A checkpoint refers to {name!r} of {owner!r}, which could execute code.")
    return getattr(HistoryBuffer, name)


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    # A state without such names is returned unchanged, with the metadata that mmengine attaches to it.
    return unwrapped(state) if any("_orig_mod." in str(name) for name in state) else state


def _fetched(checkpoint: str, folder: str | Path | None = None, *, progress: bool | None = None) -> str | Path:
    """A local file; one with an address is downloaded once, to ``folder`` or else PyTorch's folder of checkpoints."""
    if not str(checkpoint).startswith(("http://", "https://")):
        return checkpoint
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    target = folder / Path(urlparse(checkpoint).path).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        progress = is_main_process() if progress is None else progress
        torch.hub.download_url_to_file(checkpoint, str(target), progress=progress)
    return target
