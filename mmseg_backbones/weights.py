"""Loads the weights that configurations of MMSegmentation name, as data and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import is_main_process
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

from genas_plugins._messages import listed, shown
from genas_plugins.checkpoints import CheckpointError, read_state, read_torch, unwrapped
from genas_plugins.states import existing, is_safetensors

__all__ = ["is_pretrained", "load_from_local", "read_pretrained"]

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


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint of any model for mmengine: as data, and without the prefixes of ``torch.compile``.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, could execute code when loaded, or claims more memory than its size.
    """
    path = existing(filename)
    content = read_state(path) if is_safetensors(path) else read_torch(path)
    if not isinstance(content, dict):
        return content
    if isinstance(content.get("state_dict"), dict):
        return {**content, "state_dict": _renamed(content["state_dict"])}
    return _renamed(content)


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    # A state without such names is returned unchanged, with the metadata that mmengine attaches to it.
    return unwrapped(state) if any("_orig_mod." in str(name) for name in state) else state


def _fetched(checkpoint: str) -> str | Path:
    """A local file; one with an address is downloaded once, to PyTorch's folder of checkpoints."""
    if not str(checkpoint).startswith(("http://", "https://")):
        return checkpoint
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / Path(urlparse(checkpoint).path).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(checkpoint, str(target), progress=is_main_process())
    return target
