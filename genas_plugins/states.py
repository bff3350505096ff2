"""Reads files of named tensors as data: nothing in them is executed, and the file size bounds the memory."""

from __future__ import annotations

import argparse
import builtins
import errno
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from genas_plugins._messages import listed, one_line
from genas_plugins._pickles import claims_too_much, numpy_globals
from genas_plugins._reading import user_path

__all__ = [
    "CheckpointError",
    "damaged",
    "dense_tensors",
    "existing",
    "is_hollow",
    "is_safetensors",
    "read_safetensors",
    "read_state",
    "read_torch",
    "tensors_of",
    "unwrapped",
]

_STATES = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state")
"""Keys under which training programs store the tensors; averaged weights first, as in timm."""
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
# Errors of torch.load on damaged or foreign files, found by truncating files and changing their bytes.
_DAMAGE = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, TypeError, LookupError)
_DAMAGE += (ArithmeticError, AssertionError, AttributeError, MemoryError)


class CheckpointError(ValueError):
    """A file that is not a readable checkpoint, or one that does not fit the network it should fill."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint, on the CPU.

    Args:
        path: A ``.safetensors`` file (suffix in any case) or a file of ``torch.save``: tensors by name, or a dictionary
            that holds them as ``"state_dict"`` (official runs, Lightning, timm), ``"model"`` or ``"model_state"``
            (Detectron2 and others). Averaged weights (``"state_dict_ema"``, ``"model_ema"``) take precedence, as in
            timm. NumPy arrays and numbers become tensors.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, is not a checkpoint, or could execute code when loaded.

    Example:
        >>> import torch
        >>> from genas_plugins.checkpoints import read_state, unwrapped
        >>> torch.save({"epoch": 3, "state_dict": {"module.weight": torch.ones(2)}}, "run.pt")
        >>> unwrapped(read_state("run.pt"))
        {'weight': tensor([1., 1.])}
    """
    path = existing(path)
    return tensors_of(read_safetensors(path)[0] if is_safetensors(path) else read_torch(path), path)


def tensors_of(content: Any, source: str | Path) -> dict[str, Tensor]:
    """Find the named tensors in the content of a ``torch.save`` file; see :func:`read_state`.

    Raises:
        CheckpointError: There are none, or other objects are among them.
    """
    state = content
    if isinstance(content, Mapping):
        found = (content[key] for key in _STATES if isinstance(content.get(key), Mapping) and content[key])
        state = next(found, content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{source} holds no tensors by name: save model.state_dict().")
    return dense_tensors(state, source)


def dense_tensors(state: Mapping[Any, Any], source: str | Path) -> dict[str, Tensor]:
    """Check that all values are dense tensors; NumPy arrays and numbers are converted.

    Raises:
        CheckpointError: A value is none of these.
    """
    tensors, bad = {}, []
    for name, value in state.items():
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor) and not is_hollow(value):
            tensors[str(name)] = value
        else:
            bad.append(name)
    if bad:
        raise CheckpointError(f"{source} holds more than dense tensors ({listed(bad)}): save model.state_dict().")
    return tensors


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers add to the names of tensors.

    That is ``_orig_mod.`` of ``torch.compile`` anywhere, and ``module.`` of ``DistributedDataParallel`` and
    ``AveragedModel`` if all names begin with it, with the latter's ``n_averaged``.
    """
    plain = {_COMPILED.sub("", name): value for name, value in state.items()}
    # If names would collide they are kept: the tensors differ.
    state = plain if len(plain) == len(state) else dict(state)
    while True:
        names = [name for name in state if name != "n_averaged"]
        if not names or not all(name.startswith("module.") for name in names):
            return state
        state = {name.removeprefix("module."): state[name] for name in names}


def existing(path: str | Path) -> Path:
    """The path of a file that must exist, with ``~`` expanded.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not user_path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    return user_path(path)


def is_safetensors(path: Path) -> bool:
    """Whether the file has the suffix ``.safetensors``, in any case."""
    return path.suffix.lower() == ".safetensors"


def damaged(path: Path) -> CheckpointError:
    """The error to raise for a file that cannot be read."""
    advice = "copy it again, or pass a file that torch.save or safetensors (suffix .safetensors) wrote"
    return CheckpointError(f"{path} is damaged or is not a checkpoint: {advice}.")


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors (if ``tensors``) and the metadata; safetensors itself refuses headers that do not fit the file.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path, device="cpu") if tensors else {}, metadata
    except SafetensorError as error:
        raise damaged(path) from error


def read_torch(path: Path) -> Any:
    """Read a file of ``torch.save`` as data.

    Raises:
        CheckpointError: The file is damaged, could execute code when loaded, or claims more memory than its size.
    """
    path = user_path(path)
    _check_archive(path)
    content = _load(path)
    _check_claims(content, path)
    return content


def _load(path: Path) -> Any:
    # timm's training script stores its arguments as a Namespace, others an accuracy as a NumPy number. Only what is not
    # admitted yet is passed, because on exit safe_globals removes all that it was given.
    admitted = torch.serialization.get_safe_globals()
    allowed = [item for item in (argparse.Namespace, *numpy_globals()) if item not in admitted]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # In a truncated file, torch.load seeks to before its start.
        if error.errno != errno.EINVAL:
            raise
        raise damaged(path) from error
    except _DAMAGE as error:
        refused = re.search(r"GLOBAL (\w+(?:\.\w+)*)|refers to (.+), which could execute code", str(error)[:2000])
        # PyTorch names Python's own functions alone, as it does words of a file that is text.
        if refused is None or (refused[1] and "." not in refused[1] and not hasattr(builtins, refused[1])):
            raise damaged(path) from error
        reason = f"it refers to {one_line(refused[1] or refused[2], 200)}, which could execute code"
        # Not chained: torch's message goes on to advise weights_only=False, which would execute the file.
        raise CheckpointError(f"{path} is not loaded because {reason}: save its state_dict alone.") from None


def _check_archive(path: Path) -> None:
    """Raise if an archive unpacks to far more than its size; ``torch.save`` does not compress."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise damaged(path) from error
    _check_size(claimed, path)


def _check_claims(content: Any, path: Path) -> None:
    """Raise if tensors are far larger than the file, such as one number expanded to gigabytes."""
    claimed, seen, left = 0, set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, Mapping | list | tuple | set | frozenset) and id(value) not in seen:
            # Containers may be nested many times over, so each counts once; a tensor is copied once per name.
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, Mapping) else value)
        elif isinstance(value, Tensor) and not is_hollow(value):
            claimed += value.numel() * value.element_size()
        elif isinstance(value, np.ndarray):
            claimed += value.nbytes
    _check_size(claimed, path)


def _check_size(claimed: int, path: Path) -> None:
    size = path.stat().st_size
    if claims_too_much(claimed, size):
        raise CheckpointError(
            f"{path} holds no dense tensors: they claim {claimed:,} bytes in a file of {size:,}; save "
            "model.state_dict() of a network whose tensors are not expanded."
        )


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has no dense storage: it is sparse, or on the meta device."""
    return tensor.is_meta or tensor.layout is not torch.strided
