"""Identity (a fingerprint) of a run's data, stored with the run and compared when it is resumed.

The identity of ImageNet's 1.3 million files covers the name and the size of each, and a few KiB of some files of each
class: it detects other files, order, labels and classes, and reads a thousandth of the bytes. It does not depend on
where the files are, so that they may be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from genas_plugins._messages import listed, shown
from genas_plugins._reading import ReadingError, read_json
from genas_plugins.datasets._tensors import ImageTensors
from genas_plugins.files import write_text

__all__ = [
    "DATA_FILE",
    "DataChangedError",
    "check_identity",
    "data_identity",
    "describe_change",
    "files_identity",
    "read_identity",
    "refuse_change",
    "write_identity",
]

DATA_FILE = "data.json"
"""Name of the file, in the folder of a run, that holds the identity of its data."""

_SAMPLED_FILES = 1024
_SAMPLED_BYTES = 4096
_SAMPLED_PIXELS = 64
_SAMPLED_ITEMS = 256
_THREADS = 16
_SHOWN = 5
_ADVICE = (
    ", so that it is not known what data this run began with: restore the file, or remove it if you are sure that the "
    "data is the same."
)
_LONGEST = 2**28
"""Most bytes of a stored identity, enough for some millions of classes."""


class DataChangedError(ValueError):
    """A run would be resumed on other data than it began with."""


class FileSamples(Protocol):
    """Images in files, such as :class:`~genas_plugins.datasets.DiskImages`: (path, label) pairs and class names."""

    samples: Sequence[tuple[str, int]]
    class_names: Sequence[str]


class Items(Protocol):
    """Any other data set: (image, label) pairs by index, whose images NumPy can convert, and class names."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


def data_identity(parts: Mapping[str, ImageTensors | FileSamples | Items]) -> dict[str, Any]:
    """Compute the identity of images, as JSON data.

    It has, for each part, the classes, the labels in order, and for each class its number of images and digests. For
    files the digests are of the names (with the folder that holds them), the sizes, and the first and the last 4 KiB of
    up to 1,024 files; for tensors, of 64 values of each image. For other data sets it has the length, and up to 256
    images with their labels.

    Args:
        parts: The images by what they are for, such as ``{"train": ..., "validation": ...}``. A part is
            :class:`~genas_plugins.datasets.ImageTensors`, or has ``class_names`` and ``samples``, (path, label)
            pairs in the order in which they are read, or gives (image, label) pairs by number.

    Raises:
        OSError: A file cannot be read.
    """
    found = {}
    for name, part in parts.items():
        describe = _of_files if hasattr(part, "samples") else _of_items
        found[name] = _of_tensors(part) if isinstance(part, ImageTensors) else describe(part)
    return found


def files_identity(
    groups: Mapping[str, Sequence[str]], class_names: Sequence[str] = (), annotations: Iterable[bytes] = ()
) -> dict[str, Any]:
    """Compute one part of an identity, of files none of which belongs to one class, such as images and masks.

    It has the classes, and for each group its number of files, the names of all below the folder that they share, and
    the sizes and the first and the last 4 KiB of up to 1,024: no more of 100,000 files are opened, nor asked for their
    sizes. A file that cannot be opened, as one on a server, is known by its name.

    Args:
        groups: Files in order, by what they are, in the plural: ``{"images": [...], "masks": [...]}``.
        class_names: Names of the classes.
        annotations: What else is known of the images, in order.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        described = [_of_group([str(path) for path in paths], pool) for paths in groups.values()]
    part = _part(class_names, np.array([]), described)
    return {**part, "groups": list(groups), "annotations": _digest(annotations)}


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe in what two identities differ, naming the first few differences; empty if they are equal.

    Args:
        before: The stored identity.
        now: Identity of the present data, by the same rules.

    Example:
        >>> import torch
        >>> from genas_plugins.datasets import ImageTensors, data_identity, describe_change
        >>> data = ImageTensors(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]), ("cat", "dog"))
        >>> describe_change(data_identity({"train": data}), data_identity({"train": data.subset([0, 1])}))
        "train: 'dog' has 1 images instead of 2"
    """
    found = []
    for name in (*before, *(name for name in now if name not in before)):
        if name not in before or name not in now:
            found.append(f"the part {shown(name)} is {'new' if name in now else 'gone'}")
        elif before[name] != now[name]:
            found.append(f"{name}: {_describe_part(before[name], now[name])}")
    return "; ".join(found)


def write_identity(folder: str | Path, identity: Mapping[str, Any]) -> Path:
    """Store an identity in the folder of a run.

    Raises:
        OSError: The file cannot be written.
    """
    return write_text(Path(folder) / DATA_FILE, json.dumps(identity) + "\n")


def read_identity(folder: str | Path) -> dict[str, Any] | None:
    """Read the identity of the data that a run began with; None if the run, of an earlier version, has none.

    Raises:
        ValueError: What is stored is damaged.
    """
    path = Path(folder) / DATA_FILE
    if not path.is_file():
        return None
    try:
        stored = read_json(path, limit=_LONGEST)
    except ReadingError as error:
        raise ValueError(f"{path} is damaged ({error}){_ADVICE}") from error
    if not isinstance(stored, dict) or not stored:
        raise ValueError(f"{path} is damaged{_ADVICE}")
    return stored


def check_identity(folder: str | Path, identity: Mapping[str, Any], parts: Collection[str] | None = None) -> bool:
    """Compare data with that of a run's start; False if the run, of an earlier version, has no identity.

    Args:
        folder: Folder of the run.
        identity: Identity of the present data.
        parts: Compare only these; ``None`` for all.

    Raises:
        DataChangedError: It is other data; the message says what differs.
        ValueError: What is stored is damaged.
    """
    before = read_identity(folder)
    if before is not None:
        refuse_change(before, identity, f"what the run in {folder} began with", Path(folder) / DATA_FILE, parts)
    return before is not None


def refuse_change(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    source: str | Path,
    parts: Collection[str] | None = None,
) -> None:
    """Raise if two identities differ.

    Args:
        before: The identity that was stored.
        now: Identity of the present data.
        what: Name of the former data in messages.
        source: The file that ``before`` was stored in.
        parts: Compare only these; ``None`` for all.

    Raises:
        DataChangedError: It is other data; the message says what differs.
        ValueError: What was stored is damaged.
    """
    chosen = parts or {*before, *now}
    try:
        change = describe_change(
            {name: before[name] for name in before if name in chosen},
            {name: part for name, part in json.loads(json.dumps(now)).items() if name in chosen},
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{source} is damaged{_ADVICE}") from error
    if change:
        raise DataChangedError(f"The data is not {what} ({change}): restore it, or start another run.")


def _digest(chunks: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        # With its length, so that two chunks do not equal their concatenation.
        state.update(len(chunk).to_bytes(8, "little"))
        state.update(chunk)
    return state.hexdigest()


def _part(class_names: Sequence[str], labels: np.ndarray, described: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {
        "classes": [str(name) for name in class_names],
        "labels": _digest([labels.astype("<i8").tobytes()]),
        "images": [list(each) for each in described],
    }


def _of_tensors(part: ImageTensors) -> dict[str, Any]:
    flat = part.images.flatten(1)
    # Distinct indices, spread over channels, rows and columns.
    columns = torch.linspace(0, flat.shape[1] - 1, _SAMPLED_PIXELS, device=flat.device).long().unique()
    values, labels = flat[:, columns].cpu().numpy(), part.labels.cpu().numpy()
    size = "x".join(str(length) for length in part.images.shape[1:])
    members = (values[labels == label] for label in range(len(part.class_names)))
    return _part(part.class_names, labels, [(len(each), size, _digest([each.tobytes()])) for each in members])


def _of_files(part: FileSamples) -> dict[str, Any]:
    members: list[list[str]] = [[] for _ in part.class_names]
    for path, label in part.samples:
        members[label].append(str(path))
    share = max(1, _SAMPLED_FILES // len(members))

    def describe(paths: list[str]) -> tuple[int, str, str, str]:
        sizes = np.array([os.path.getsize(path) for path in paths], "<i8")
        chosen = np.linspace(0, len(paths) - 1, share).astype(int) if paths else []
        # The last two parts of a path: as a rule the class and the file name.
        names = ("/".join(Path(path).parts[-2:]).encode(errors="surrogateescape") for path in paths)
        contents = (_ends(paths[index]) for index in np.unique(chosen))
        return len(paths), _digest(names), _digest([sizes.tobytes()]), _digest(contents)

    # Threads hide the latency of network file systems.
    with ThreadPoolExecutor(_THREADS) as pool:
        described = list(pool.map(describe, members))
    return _part(part.class_names, np.array([label for _, label in part.samples]), described)


def _of_group(paths: list[str], pool: ThreadPoolExecutor) -> tuple[int, str, str, str]:
    # Cut at a separator below, and an order of magnitude faster than commonpath.
    shared = os.path.commonprefix(paths)  # noqa: RUF071
    start = max(shared.rfind("/"), shared.rfind(os.sep)) + 1
    chosen = np.unique(np.linspace(0, len(paths) - 1, _SAMPLED_FILES).astype(int)).tolist() if paths else []
    looks = list(pool.map(_look, (paths[index] for index in chosen)))
    # No name holds a zero.
    names = "\0".join([path[start:] for path in paths]).encode(errors="surrogateescape")
    sizes = np.array([size for size, _ in looks], "<i8").tobytes()
    return len(paths), _digest([names]), _digest([sizes]), _digest(ends for _, ends in looks)


def _look(path: str) -> tuple[int, bytes]:
    """Size and ends of a file; -1 and nothing if it cannot be opened."""
    try:
        return os.path.getsize(path), _ends(path)
    except OSError:
        return -1, b""


def _of_items(part: Items) -> dict[str, Any]:
    chosen = np.unique(np.linspace(0, len(part) - 1, _SAMPLED_ITEMS).astype(int)).tolist() if len(part) else []
    items = [part[index] for index in chosen]
    contents = (f"{np.shape(image)} {label} ".encode() + np.asarray(image).tobytes() for image, label in items)
    return {
        "classes": [str(name) for name in part.class_names],
        "labels": _digest([np.array([int(label) for _, label in items], "<i8").tobytes()]),
        "length": len(part),
        "contents": _digest(contents),
    }


def _ends(path: str) -> bytes:
    """The first and the last bytes of a file."""
    with open(path, "rb") as file:
        first = file.read(_SAMPLED_BYTES)
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - _SAMPLED_BYTES, len(first)))
        return first + file.read(_SAMPLED_BYTES)


def _describe_part(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = list(before["classes"]), list(now["classes"])
    if old != new:
        gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
        changes = [
            f"{len(names)} {what} ({listed(names, _SHOWN)})"
            for what, names in (("new", added), ("gone", gone))
            if names
        ]
        return f"{len(new)} classes instead of {len(old)}, {' and '.join(changes) or 'in another order'}"
    if before.get("length") != now.get("length"):
        return f"{now.get('length')} images instead of {before.get('length')}"
    found = []
    if before.get("contents") != now.get("contents"):
        found.append("the contents of images differ")
    groups = now.get("groups")
    for name, first, second in zip(groups or old, before.get("images", ()), now.get("images", ()), strict=False):
        if first == second:
            continue
        if first[0] != second[0]:
            has = f"{second[0]} {name}" if groups else f"{shown(name)} has {second[0]} images"
            found.append(f"{has} instead of {first[0]}")
            continue
        aspects = ("names", "sizes", "contents") if len(second) == 4 else ("size", "contents")
        differing = [what for what, a, b in zip(aspects, first[1:], second[1:], strict=False) if a != b]
        what = name if groups else f"images of {shown(name)}"
        found.append(f"the {what} differ in their {' and '.join(differing) or 'kind'}")
    if not found and before.get("annotations") != now.get("annotations"):
        return "the annotations differ"
    if not found:
        return "the images are in another order"
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} classes more" if len(found) > _SHOWN else "")
