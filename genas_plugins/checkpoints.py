"""Checkpoints: the official GeNAS and RLNAS files, those of this project's runs, and our own safetensors.

Every loader is strict: each tensor of the file lands in the network and each tensor of the network comes from
the file. Files are data: nothing in them is executed, whatever they hold. Tensor names are those of the
official code (clovaai/GeNAS@fd3cba8, after RLNAS), which our modules share.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genas_plugins.files import atomic_path
from genas_plugins.genotype import Genotype
from genas_plugins.network import CellNetwork
from genas_plugins.supernet import SuperNet

__all__ = [
    "CheckpointError",
    "load_official_network",
    "load_official_supernet",
    "load_supernet",
    "read_metadata",
    "read_state",
    "save_network",
    "save_supernet",
]

_SUPERNET = "genas-supernet"
_NETWORK = "genas-network"
_AUXILIARY = "auxiliary_head."
_PROFILER_BUFFERS = ("total_ops", "total_params")
_PREFIX = re.compile(r"(?:.*\.)?(?=cells\.0\.preprocess0\.)")
# What torch.load and its unpickler raise on files that are truncated or something else altogether.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
_Model = TypeVar("_Model", SuperNet, CellNetwork)


class CheckpointError(ValueError):
    """A file that is not a readable checkpoint, or one that does not fit the network it should fill."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint, on the CPU.

    Args:
        path: A ``.safetensors`` file, or whatever ``torch.save`` wrote: a dictionary of tensors, or one that
            holds such a dictionary as ``"state_dict"`` (the official runs, Lightning).

    Returns:
        Tensors by their names in the file.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, is not a checkpoint, or could execute code when loaded.
    """
    path = _existing(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = f"a dictionary of {_some(list(state))}" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"{path} holds {kind}, expected tensors by name or a dictionary with them as 'state_dict': save "
            "model.state_dict()."
        )
    bad = [str(name) for name, value in state.items() if value.is_meta or value.layout is not torch.strided]
    if bad:
        raise CheckpointError(f"{path} holds tensors that are sparse or have no values ({_some(bad)}): save it again.")
    return {str(name): value for name, value in state.items()}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_supernet` or :func:`save_network` wrote beside the tensors.

    Returns:
        ``"format"``, ``"arguments"`` and what else was saved; empty for a file that neither of them wrote.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") not in (_SUPERNET, _NETWORK):
            return {}
        return {key: value if key == "format" else json.loads(value) for key, value in metadata.items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error


def load_official_supernet(path: str | Path) -> SuperNet:
    """Load a supernet of the official GeNAS or RLNAS code, or of a run of this project.

    Classes, channels, cells and stem are read off the shapes. A prefix that all names share (``module.``, those
    of Lightning and NNI) is dropped, and so are the profiler's ``total_ops`` and ``total_params``.

    Returns:
        A supernet on the CPU in training mode, with the file's values and dtypes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`read_state`; or names or shapes are not those of a supernet, in which case
            the message names the first tensors that are missing, left over or of another shape.
    """
    state = _network_state(path)
    arguments = _arguments(state, path)
    return _filled(lambda: SuperNet(**arguments), state, path, "a supernet")


def load_official_network(
    path: str | Path, genotype: Genotype | None = None, *, auxiliary: bool = False
) -> CellNetwork:
    """Load a fixed network, for ImageNet or CIFAR, of the official code or of :func:`save_network`.

    Channels, cells, classes and stem are read off the shapes. Weights show neither the inputs of an operation
    nor which pooling or skip connection it is: a wrong genotype that differs only there is not noticed.

    Args:
        path: The checkpoint; prefixes and profiler buffers as in :func:`load_official_supernet`.
        genotype: The network's genotype, its pairs in the order in which it was trained, because the order
            numbers the operations. None: the file's own, which only :func:`save_network` writes.
        auxiliary: Load the auxiliary head too; False drops the file's, if it has one.

    Returns:
        A network on the CPU in training mode, with the file's values and dtypes.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``genotype`` is something else.
        CheckpointError: See :func:`load_official_supernet`; or there is no genotype, the file says another one,
            or ``auxiliary`` asks for a head that the file lacks.
    """
    if genotype is not None and not isinstance(genotype, Genotype):
        raise TypeError(
            f"genotype must be a Genotype, got {type(genotype).__name__}; genas_plugins.zoo.find_genotype finds "
            "one by its name, file or code."
        )
    state = _network_state(path)
    genotype = _resolved_genotype(path, genotype)
    head = {name for name in state if name.startswith(_AUXILIARY)}
    if auxiliary and not head:
        raise CheckpointError(f"{path} holds no auxiliary head (no {_AUXILIARY}* tensor): load it with auxiliary=False.")
    if not auxiliary:
        state = {name: value for name, value in state.items() if name not in head}
    arguments = _arguments(state, path)
    description = f"a network of the genotype {genotype}, with its pairs in that order"
    return _filled(lambda: CellNetwork(genotype, **arguments, auxiliary=auxiliary), state, path, description)


def load_supernet(path: str | Path) -> SuperNet:
    """Load a supernet that :func:`save_supernet` wrote, or else any that :func:`load_official_supernet` reads.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`load_official_supernet`; or the file says that it holds something else.
    """
    metadata = read_metadata(path)
    if metadata.get("format") == _NETWORK:
        raise CheckpointError(f"{path} holds a fixed network, not a supernet: load it with load_official_network.")
    supernet = load_official_supernet(path)
    if metadata and metadata.get("arguments") != dict(supernet.arguments):
        raise CheckpointError(
            f"{path} says that it holds a supernet with {metadata.get('arguments')}, but its tensors are those of "
            f"{dict(supernet.arguments)}: save it again with save_supernet."
        )
    return supernet


def save_supernet(supernet: SuperNet, path: str | Path, **metadata: Any) -> Path:
    """Write a supernet's parameters and buffers, whole or not at all.

    Args:
        supernet: Wrapped neither by ``DistributedDataParallel`` nor by ``torch.compile``.
        path: Ends in ``.safetensors``.
        **metadata: JSON data to keep beside the tensors; :func:`read_metadata` reads it.

    Raises:
        TypeError: ``supernet`` is something else, or ``metadata`` is not JSON data.
        ValueError: ``path`` has another suffix, the supernet is on the meta device, or ``metadata`` uses a name
            that the format needs.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    if not isinstance(supernet, SuperNet):
        raise TypeError(f"Expected a SuperNet, got {type(supernet).__name__}; unwrap it first.")
    return _save(supernet, path, _SUPERNET, {"arguments": dict(supernet.arguments)}, metadata)


def save_network(network: CellNetwork, path: str | Path, **metadata: Any) -> Path:
    """Write a fixed network's parameters and buffers, whole or not at all, with its genotype.

    The genotype is stored as its cells and not as its code alone: the order of the pairs numbers the operations.
    Arguments, errors and :func:`read_metadata` as for :func:`save_supernet`.
    """
    if not isinstance(network, CellNetwork):
        raise TypeError(f"Expected a CellNetwork, got {type(network).__name__}; unwrap it first.")
    arguments = _arguments(network.state_dict(), path) | {"auxiliary": network.auxiliary_head is not None}
    described = {"arguments": arguments, "genotype": network.genotype.to_dict()}
    return _save(network, path, _NETWORK, described, metadata)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder, expected a checkpoint file in it.")
    return path


def _damaged(path: Path, error: Exception) -> CheckpointError:
    lines = str(error).splitlines() or [type(error).__name__]
    return CheckpointError(
        f"{path} is damaged or is not a checkpoint ({lines[0].strip().rstrip('.:')}): copy it again, or pass a file "
        "that torch.save or safetensors wrote."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise _damaged(path, error) from error
        # Not chained: torch's message goes on to advise weights_only=False, which would execute the file.
        raise CheckpointError(
            f"{path} is not loaded because it refers to {refused[1]}, which could execute code: where it comes from "
            "a source you trust, save its state_dict alone and pass that."
        ) from None


def _network_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one network in a checkpoint, by their names in the official code."""
    state = {
        name: value for name, value in read_state(path).items() if name.rpartition(".")[2] not in _PROFILER_BUFFERS
    }
    prefixes = sorted({found.group() for name in state if (found := _PREFIX.match(name))})
    if not prefixes:
        raise CheckpointError(
            f"{path} holds no network of cells: none of its tensors ({_some(list(state))}) is called "
            "cells.0.preprocess0.*."
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds {len(prefixes)} networks, under the prefixes {prefixes}: save the state_dict of one alone."
        )
    outside = [name for name in state if not name.startswith(prefixes[0])]
    if outside:
        raise CheckpointError(
            f"{path} holds a network under the prefix {prefixes[0]!r} and {len(outside)} tensors outside of it "
            f"({_some(outside)}): save the network's state_dict alone."
        )
    return {name.removeprefix(prefixes[0]): value for name, value in state.items()}


def _arguments(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Constructor arguments that both kinds of networks share, from the shapes."""
    imagenet = "stem0.3.weight" in state
    stem_weight = "stem0.3.weight" if imagenet else "stem.0.weight"
    sizes = {}
    for name in (stem_weight, "classifier.weight"):
        if name not in state or state[name].dim() == 0:
            raise CheckpointError(f"{path} holds cells but no weight {name}, which tells the size of the network.")
        sizes[name] = state[name].shape[0]
    # Counted, not the highest number: a foreign cells.999999999.* must not build that many.
    cells = {found[1] for name in state if (found := re.match(r"cells\.(\d+)\.", name))}
    return {
        "num_classes": sizes["classifier.weight"],
        "init_channels": sizes[stem_weight] // (1 if imagenet else 3),
        "num_cells": len(cells),
        "stem": "imagenet" if imagenet else "cifar",
    }


def _resolved_genotype(path: str | Path, genotype: Genotype | None) -> Genotype:
    written = read_metadata(path).get("genotype")
    if written is None:
        if genotype is None:
            raise CheckpointError(f"{path} does not say which genotype it holds: pass genotype=...")
        return genotype
    try:
        own = Genotype.from_dict(written)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if genotype is not None and genotype != own:
        raise CheckpointError(f"{path} holds the genotype {own}, not {genotype}: leave the genotype out or pass that.")
    # Equal genotypes may differ in the order of their pairs; the file's is the one its tensors are numbered by.
    return own


def _filled(build: Callable[[], _Model], state: Mapping[str, Tensor], path: str | Path, description: str) -> _Model:
    try:
        # On the meta device, since fresh weights would cost time and draw from the global generator.
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit {description}: {error}") from error
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    left_over = [name for name in state if name not in expected]
    different = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    different += [
        f"{name} {state[name].dtype} instead of {value.dtype}"
        for name, value in expected.items()
        if name in state and state[name].is_floating_point() != value.is_floating_point()
    ]
    problems = [
        f"{len(names)} tensors {what} ({_some(names)})"
        for what, names in (("missing", missing), ("left over", left_over), ("different", different))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit {description}: {'; '.join(problems)}.")
    model.load_state_dict({name: _plain(state[name]) for name in expected}, assign=True)
    return model


def _save(
    model: nn.Module, path: str | Path, kind: str, described: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Networks are saved as .safetensors, got the file name {path.name!r}.")
    taken = [name for name in metadata if name in ("format", "arguments", "genotype")]
    if taken:
        raise ValueError(f"The metadata names {', '.join(taken)} are those of the format; choose others.")
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise ValueError("The network is on the meta device and has no values to save.")
    entries = {key: json.dumps(value) for key, value in {**described, **metadata}.items()}
    with atomic_path(path) as temporary:
        save_file({name: _plain(value) for name, value in state.items()}, temporary, {"format": kind, **entries})
    return path


def _plain(tensor: Tensor) -> Tensor:
    # A copy, contiguous and with memory of its own: views and channels-last neither fit safetensors nor train.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _some(names: Sequence[Any], limit: int = 4) -> str:
    listed = ", ".join(str(name) for name in names[:limit])
    return f"{listed}, ..." if len(names) > limit else listed or "nothing"
