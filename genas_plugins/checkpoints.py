"""Checkpoints: the official GeNAS and RLNAS files, those of this project's runs, and our own safetensors.

Loading is strict: each tensor of the file lands in the network, and each of the network comes from the file.
Files are data: nothing in them is executed, whatever they hold. Tensors have the names of the official code
(clovaai/GeNAS@fd3cba8, after RLNAS), which are also those of our modules.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from genas_plugins._messages import listed, shown
from genas_plugins._reading import ReadingError, parse_json, user_path
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO
from genas_plugins.files import atomic_path
from genas_plugins.nasbench201 import NasBench201SuperNet
from genas_plugins.scoring.paths import PREFIX
from genas_plugins.spaces import OWN_SPACES, find_space, registered_spaces
from genas_plugins.states import (
    CheckpointError,
    damaged,
    dense_tensors,
    existing,
    is_hollow,
    is_safetensors,
    read_safetensors,
    read_state,
    read_torch,
    tensors_of,
    unwrapped,
)

__all__ = [
    "CheckpointError",
    "convert_network",
    "dense_tensors",
    "describe_mismatch",
    "load_official_network",
    "load_official_supernet",
    "load_supernet",
    "network_state",
    "read_metadata",
    "read_state",
    "read_torch",
    "save_network",
    "save_supernet",
    "tensors_of",
    "unwrapped",
]

_SUPERNET, _NETWORK = "genas-supernet", "genas-network"
_OWN_KEYS = ("format", "arguments", "genotype")
_BESIDE = ("total_ops", "total_params", "n_averaged")
"""Entries that profilers and averaged models add to a network's own tensors."""
_PREFIX = re.compile(r"(?:.*\.)?(?=cells\.0\.(?:preprocess0|edges)\.)")
_Model = TypeVar("_Model", bound=nn.Module)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that :func:`save_supernet` or :func:`save_network` wrote beside the tensors.

    Returns:
        ``"format"``, ``"arguments"`` and what else was saved; empty for a file that neither of them wrote.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged.
    """
    path = existing(path)
    metadata = read_safetensors(path, tensors=False)[1] if is_safetensors(path) else {}
    if metadata.get("format") not in (_SUPERNET, _NETWORK):
        return {}
    try:
        return {key: value if key == "format" else parse_json(value) for key, value in metadata.items()}
    except ReadingError as error:
        raise damaged(path) from error


def load_official_supernet(path: str | Path) -> SuperNet:
    """Load a supernet of the official GeNAS or RLNAS code, or of a run of this project.

    Classes, channels, cells and stem are read off the shapes. A prefix that all names share (``module.``, or
    that of Lightning and NNI) is dropped, and so are the profiler's ``total_ops`` and ``total_params``.

    Returns:
        A supernet on the CPU in training mode, with the file's values and dtypes.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`read_state`; or it is no supernet, and then the message counts the tensors
            that are missing, left over or of another shape and names the first.
    """
    state = network_state(read_state(path), path)
    return _filled(partial(SuperNet, **_arguments(state, path)), state, path, "a supernet")


def load_official_network(
    path: str | Path, genotype: Genotype | None = None, *, auxiliary: bool = False
) -> CellNetwork:
    """Load a fixed network, for ImageNet or CIFAR, of the official code or of :func:`save_network`.

    Channels, cells, classes and stem are read off the shapes, as in :func:`load_official_supernet`. The tensors do not
    show inputs of operations, poolings and skips: a genotype that is wrong only there is not detected.

    Args:
        path: The checkpoint.
        genotype: Genotype of the network with its pairs in the order of training, which numbers the operations. None:
            the file's own, which only :func:`save_network` writes.
        auxiliary: Load the auxiliary head too; False drops the file's, if it has one.

    Returns:
        A network on the CPU in training mode, with the file's values and dtypes.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``genotype`` is not a Genotype.
        CheckpointError: See :func:`load_official_supernet`; or there is no genotype, the file holds another,
            or ``auxiliary`` asks for a head that the file lacks.
    """
    if genotype is not None and not isinstance(genotype, Genotype):
        raise TypeError(f"Expected a Genotype, got {type(genotype).__name__}; see zoo.find_genotype.")
    state = network_state(read_state(path), path)
    return _network(state, path, _resolved_genotype(path, genotype), auxiliary)


def _network(state: Mapping[str, Tensor], path: str | Path, genotype: Genotype, auxiliary: bool) -> CellNetwork:
    head = {name for name in state if name.startswith("auxiliary_head.")}
    if auxiliary and not head:
        raise CheckpointError(f"{path} holds no auxiliary_head.* tensors: load it with auxiliary=False.")
    if not auxiliary:
        state = {name: value for name, value in state.items() if name not in head}
    arguments = _arguments(state, path)
    description = f"a network of the genotype {genotype}, with its pairs in the order given"
    return _filled(lambda: CellNetwork(genotype, **arguments, auxiliary=auxiliary), state, path, description)


def load_supernet(path: str | Path) -> Any:
    """Load a supernet written by :func:`save_supernet`, or any that :func:`load_official_supernet` reads.

    Supernets of NAS-Bench-201, also those of RLNAS, are recognised by the names of their tensors; those of a registered
    space (:mod:`genas_plugins.spaces`) by its class method ``arguments_of(state)``, which returns the arguments of the
    constructor, or ``None`` for tensors of another space.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`load_official_supernet`; or :func:`save_network` wrote the file.

    Example:
        >>> from genas_plugins import SuperNet
        >>> from genas_plugins.checkpoints import load_supernet, save_supernet
        >>> path = save_supernet(SuperNet(10, init_channels=4, num_cells=3), "supernet.safetensors")
        >>> load_supernet(path).arguments
        {'num_classes': 10, 'init_channels': 4, 'num_cells': 3, 'stem': 'cifar'}
    """
    if read_metadata(path).get("format") == _NETWORK:
        raise CheckpointError(f"{path} holds a fixed network, no supernet: use load_official_network.")
    tensors = read_state(path)
    plain = unwrapped(tensors)
    if not any(map(_PREFIX.match, plain)):
        # None of ours, for which no package of somebody else is imported.
        state = {name.rpartition(PREFIX)[2]: value for name, value in plain.items()}
        for name in registered_spaces().keys() - set(OWN_SPACES):
            kind = find_space(name).supernet_type
            if (found := _supernet_of(kind, state, path, f"a {kind.__name__}")) is not None:
                return found
    state = network_state(tensors, path)
    found = _supernet_of(NasBench201SuperNet, state, path, "a NAS-Bench-201 supernet")
    if found is not None:
        return found
    return _filled(partial(SuperNet, **_arguments(state, path)), state, path, "a supernet")


def save_supernet(supernet: nn.Module, path: str | Path, **metadata: Any) -> Path:
    """Write a supernet's parameters and buffers, whole or not at all.

    Args:
        supernet: A supernet that is not wrapped by ``DistributedDataParallel`` or ``torch.compile``.
        path: File to write; its name must end in ``.safetensors``.
        **metadata: JSON data to keep beside the tensors; :func:`read_metadata` reads it.

    Raises:
        TypeError: ``supernet`` is not a supernet, or ``metadata`` is not JSON data.
        ValueError: ``path`` has another suffix, ``metadata`` uses a name of the format, or the supernet is on
            the meta device and has no values.
        OSError: The file cannot be written; an older one of that name is left as it was.

    Example:
        >>> from genas_plugins import SuperNet
        >>> from genas_plugins.checkpoints import read_metadata, save_supernet
        >>> path = save_supernet(SuperNet(10, init_channels=4, num_cells=3), "supernet.safetensors", epochs=50)
        >>> read_metadata(path)["epochs"]
        50
    """
    if not (hasattr(supernet, "search_space") and hasattr(supernet, "arguments")):
        raise TypeError(f"Expected a supernet, got {type(supernet).__name__}; unwrap it first.")
    return _save(supernet, path, _SUPERNET, metadata)


def save_network(network: CellNetwork, path: str | Path, **metadata: Any) -> Path:
    """Write a fixed network's parameters and buffers, whole or not at all, with its genotype.

    The genotype is stored as pairs, since their order numbers the operations and its code would lose it. Arguments and
    errors are those of :func:`save_supernet`.
    """
    if not isinstance(network, CellNetwork):
        raise TypeError(f"Expected a CellNetwork, got {type(network).__name__}; unwrap it first.")
    return _save(network, path, _NETWORK, metadata)


def convert_network(
    source: str | Path, target: str | Path, genotype: Genotype | None = None, *, auxiliary: bool = True
) -> CellNetwork:
    """Write the fixed network of any checkpoint as a clean file: its tensors by official names, and its genotype.

    Args:
        source: Any checkpoint that :func:`load_official_network` reads.
        target: File to write; its name must end in ``.safetensors``.
        genotype: Genotype of the network. None: the file's own, or else the one published genotype that fits.
        auxiliary: Keep the auxiliary head if there is one.

    Returns:
        The network.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`load_official_network`; or there is no genotype and no published one fits.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    state = network_state(read_state(source), source)
    auxiliary = auxiliary and any(name.startswith("auxiliary_head.") for name in state)
    if genotype is None and read_metadata(source).get("genotype") is None:
        network = _published_network(state, source, auxiliary)
    else:
        network = load_official_network(source, genotype, auxiliary=auxiliary)
    save_network(network, target, source=Path(source).name)
    return network


def _published_network(state: Mapping[str, Tensor], path: str | Path, auxiliary: bool) -> CellNetwork:
    for entry in ZOO.values():
        with contextlib.suppress(CheckpointError):
            return _network(state, path, entry.genotype, auxiliary)
    raise CheckpointError(f"{path} fits none of the published genotypes ({', '.join(ZOO)}): say which it holds.")


def network_state(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Extract the tensors of the one network in ``state``, by their names in the official code.

    A prefix that all names share (``module.``, or that of Lightning and NNI) is dropped, and so are what wrappers
    add (:func:`unwrapped`) and the profiler's ``total_ops`` and ``total_params``.

    Args:
        state: Tensors by name.
        source: Name of their source, for error messages.

    Raises:
        CheckpointError: There is no network of cells, or there are several.
    """
    state = {name: value for name, value in unwrapped(state).items() if name.split(".")[-1] not in _BESIDE}
    prefixes = sorted({found.group() for name in state if (found := _PREFIX.match(name))})
    if len(prefixes) != 1:
        found = f"{len(prefixes)} networks, under {shown(prefixes)}" if prefixes else f"no cells ({listed(state)})"
        raise CheckpointError(f"{source} holds {found}, expected one: save the network's state_dict alone.")
    prefix = prefixes[0]
    # Tensors outside the prefix get names that match nothing: their own may equal names without the prefix.
    return {name.removeprefix(prefix) if name.startswith(prefix) else f"./{name}": state[name] for name in state}


def describe_mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Count the tensors that are missing, left over or of another shape, with the first names; empty: all fit."""
    common = [name for name in expected if name in state]
    problems = {
        "missing": [name for name in expected if name not in state],
        "left over": [name for name in state if name not in expected],
        "different": [
            f"{name} is {_kind(state[name])} instead of {_kind(expected[name])}"
            for name in common
            if _kind(state[name]) != _kind(expected[name])
        ],
    }
    return "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names)


def _arguments(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The constructor's arguments that supernets and fixed networks share, from the shapes."""
    stem, stem_weight, multiplier = "cifar", "stem.0.weight", 3
    if "stem0.3.weight" in state:
        stem, stem_weight, multiplier = "imagenet", "stem0.3.weight", 1
    needed = (stem_weight, "classifier.weight")
    missing = [name for name in needed if name not in state or state[name].dim() == 0]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}, so the size of its network is unknown.")
    # The count rather than the highest index: a foreign cells.999999999.* must not build that many.
    cells = {found[1] for name in state if (found := re.match(r"cells\.(\d+)\.", name))}
    channels, classes = state[stem_weight].shape[0] // multiplier, state["classifier.weight"].shape[0]
    return {"num_classes": classes, "init_channels": channels, "num_cells": len(cells), "stem": stem}


def _resolved_genotype(path: str | Path, genotype: Genotype | None) -> Genotype:
    written = read_metadata(path).get("genotype")
    if written is None and genotype is None:
        raise CheckpointError(f"{path} does not say which genotype it holds: pass genotype=...")
    if written is None:
        return genotype
    try:
        own = Genotype.from_dict(written)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if genotype not in (None, own):
        raise CheckpointError(f"{path} holds the genotype {own}, not {genotype}: leave the argument out.")
    # Equal genotypes may differ in the order of their pairs; the tensors are numbered by the file's.
    return own


def _supernet_of(kind: Any, state: Mapping[str, Tensor], path: str | Path, description: str) -> Any:
    """The supernet of a class that these tensors are; ``None`` if they are another's."""
    try:
        arguments = kind.arguments_of(state)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    return None if arguments is None else _filled(partial(kind, **arguments), state, path, description)


def _filled(build: Callable[[], _Model], state: Mapping[str, Tensor], path: str | Path, description: str) -> _Model:
    try:
        # On the meta device, since fresh weights would cost time and draw from the global generator.
        with torch.device("meta"):
            model = build()
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit {description}: {error}") from error
    expected = model.state_dict()
    if mismatch := describe_mismatch(expected, state):
        raise CheckpointError(f"{path} does not fit {description}; tensors: {mismatch}.")
    model.load_state_dict({name: _plain(state[name]) for name in expected}, assign=True)
    return model


def _save(model: nn.Module, path: str | Path, kind: str, metadata: Mapping[str, Any]) -> Path:
    path = user_path(path)
    if not is_safetensors(path):
        raise ValueError(f"Networks are saved as .safetensors, got the file name {path.name!r}.")
    if taken := [name for name in metadata if name in _OWN_KEYS]:
        raise ValueError(f"The format itself uses the metadata names {', '.join(taken)}; choose others.")
    state = model.state_dict()
    if any(is_hollow(value) for value in state.values()):
        raise ValueError("The network is on the meta device and has no values to save.")
    arguments = _arguments(state, path) if isinstance(model, CellNetwork) else dict(model.arguments)
    entries = {"arguments": arguments, **metadata}
    if isinstance(model, CellNetwork):
        entries["arguments"]["auxiliary"] = model.auxiliary_head is not None
        entries["genotype"] = model.genotype.to_dict()
    header = {"format": kind, **{key: json.dumps(value) for key, value in entries.items()}}
    with atomic_path(path) as temporary:
        # Not save_file, which does not raise OSError on a full disk.
        temporary.write_bytes(save({name: _plain(value) for name, value in state.items()}, header))
    return path


def _kind(tensor: Tensor) -> str:
    # Not the dtype: a checkpoint in half precision fits, an integer weight does not.
    return f"{tuple(tensor.shape)} {'float' if tensor.is_floating_point() else 'integer'}"


def _plain(tensor: Tensor) -> Tensor:
    # A copy with memory of its own: safetensors refuses views and channels-last, training refuses some views.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
