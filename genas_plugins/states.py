"""Files of tensors by name, read as data: nothing in them is executed, and none takes more memory than it has bytes."""

from __future__ import annotations

import argparse
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
"""Where training programs keep the tensors: averaged ones first, as timm has it."""
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
# What torch.load raises on damaged or foreign files: found by truncating files and by changing their bytes.
_DAMAGE = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, TypeError, LookupError)
_DAMAGE += (ArithmeticError, AssertionError, AttributeError, MemoryError)


class CheckpointError(ValueError):
    """A file that is not a readable checkpoint, or one that does not fit the network it should fill."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint, on the CPU.

    Args:
        path: A ``.safetensors`` file (in any case), or one that ``torch.save`` wrote: tensors by name, or a
            dictionary that holds them as ``"state_dict"`` (the official runs, Lightning, timm), ``"model"`` or
            ``"model_state"`` (Detectron2, many others) or, which then counts, as ``"state_dict_ema"`` or
            ``"model_ema"`` (averaged weights, which timm prefers too). NumPy arrays and numbers become tensors.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, is not a checkpoint, or could execute code when loaded.
    """
    path = existing(path)
    return tensors_of(read_safetensors(path)[0] if is_safetensors(path) else read_torch(path), path)


def tensors_of(content: Any, source: str | Path) -> dict[str, Tensor]:
    """The named tensors among what a file of ``torch.save`` held; see :func:`read_state`.

    Raises:
        CheckpointError: There are none, or not only such.
    """
    state = content
    if isinstance(content, Mapping):
        found = (content[key] for key in _STATES if isinstance(content.get(key), Mapping) and content[key])
        state = next(found, content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{source} holds no tensors by name: save model.state_dict().")
    return dense_tensors(state, source)


def dense_tensors(state: Mapping[Any, Any], source: str | Path) -> dict[str, Tensor]:
    """The tensors by their names; NumPy arrays and numbers become tensors.

    Raises:
        CheckpointError: Something else is among them.
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
    """The tensors by the names that they have without wrappers.

    ``_orig_mod.`` of ``torch.compile`` is dropped wherever it stands, and so is ``module.`` where all names begin with
    it, as ``DistributedDataParallel`` and PyTorch's ``AveragedModel`` have it, with the latter's ``n_averaged``.
    """
    plain = {_COMPILED.sub("", name): value for name, value in state.items()}
    # Two that become one are not the same tensor twice.
    state = plain if len(plain) == len(state) else dict(state)
    while True:
        names = [name for name in state if name != "n_averaged"]
        if not names or not all(name.startswith("module.") for name in names):
            return state
        state = {name.removeprefix("module."): state[name] for name in names}


def existing(path: str | Path) -> Path:
    """The file, with ``~`` as the user's home.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not user_path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    return user_path(path)


def is_safetensors(path: Path) -> bool:
    """Whether the file's name says so."""
    return path.suffix.lower() == ".safetensors"


def damaged(path: Path) -> CheckpointError:
    """What to raise for a file that cannot be read."""
    advice = "copy it again, or pass a file that torch.save or safetensors (suffix .safetensors) wrote"
    return CheckpointError(f"{path} is damaged or is not a checkpoint: {advice}.")


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, if they are asked for, and metadata; the library refuses a header that the file does not bear out.

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
        CheckpointError: It is damaged, could execute code when loaded, or claims more than it has.
    """
    path = user_path(path)
    _check_archive(path)
    content = _load(path)
    _check_claims(content, path)
    return content


def _load(path: Path) -> Any:
    # timm's training script keeps its arguments in a Namespace, which only holds them; others keep an accuracy as
    # NumPy's number. At its end, safe_globals also takes away what was admitted before it.
    admitted = torch.serialization.get_safe_globals()
    allowed = [item for item in (argparse.Namespace, *numpy_globals()) if item not in admitted]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # What a seek beyond the start of a file that was cut off gives.
        if error.errno != errno.EINVAL:
            raise
        raise damaged(path) from error
    except _DAMAGE as error:
        refused = re.search(r"GLOBAL (\w+(?:\.\w+)+)|refers to (.+), which could execute code", str(error)[:2000])
        if refused is None:
            raise damaged(path) from error
        reason = f"it refers to {one_line(refused[1] or refused[2], 200)}, which could execute code"
        # Not chained: torch's message goes on to advise weights_only=False, which would execute the file.
        raise CheckpointError(f"{path} is not loaded because {reason}: save its state_dict alone.") from None


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to much more than it is; ``torch.save`` does not compress."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise damaged(path) from error
    _check_size(claimed, path)


def _check_claims(content: Any, path: Path) -> None:
    """Refuse tensors that are larger than the file can make them, such as one number expanded to gigabytes."""
    claimed, seen, left = 0, set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, Mapping | list | tuple | set | frozenset) and id(value) not in seen:
            # Containers may hold one another many times over; a tensor is copied once for each of its names.
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
    """Whether a tensor has no values in memory of its own."""
    return tensor.is_meta or tensor.layout is not torch.strided
