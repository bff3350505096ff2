"""What a run was given to read, in a form that is stored with it and compared when it is resumed.

The identity of ImageNet's 1.3 million files has the name and the size of each, and a few KiB of some of each class: it
tells other files, another order, other labels and other classes, and reads a thousandth of the bytes. It has nothing of
where the files lie, so that they may move.
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

from genas_plugins.datasets._tensors import ImageTensors
from genas_plugins.files import write_text

__all__ = ["DATA_FILE", "DataChangedError", "check_identity", "data_identity", "describe_change", "write_identity"]

DATA_FILE = "data.json"
"""In the folder of a run: the identity of its data."""

_SAMPLED_FILES = 1024
_SAMPLED_BYTES = 4096
_SAMPLED_PIXELS = 64
_THREADS = 16
_SHOWN = 5


class DataChangedError(ValueError):
    """A run is to be resumed on other data than it began with."""


class FileSamples(Protocol):
    """Images in files, such as :class:`~genas_plugins.datasets.DiskImages`: (path, label) pairs and class names."""

    samples: Sequence[tuple[str, int]]
    class_names: Sequence[str]


def data_identity(parts: Mapping[str, ImageTensors | FileSamples]) -> dict[str, Any]:
    """What tells these images from others, as JSON data.

    Of each part: the classes, the labels in order, and of each class how many images it has and digests. Of files these
    are of their names (with the folder that holds them), of their sizes, and of the first and the last 4 KiB of up to
    1,024 files; of tensors, of 64 values of each image.

    Args:
        parts: The images by what they are for, such as ``{"train": ..., "validation": ...}``. A part is
            :class:`~genas_plugins.datasets.ImageTensors`, or has ``samples``, (path, label) pairs in the order in which
            they are read, and ``class_names``.

    Raises:
        OSError: A file cannot be read.
    """
    return {
        name: _of_tensors(part) if isinstance(part, ImageTensors) else _of_files(part) for name, part in parts.items()
    }


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words what two identities differ in, the first few differences by name; empty: in nothing.

    Args:
        before: An identity.
        now: Another, by the same rules.
    """
    found = []
    for name in (*before, *(name for name in now if name not in before)):
        if name not in before or name not in now:
            found.append(f"the part {name!r} is {'new' if name in now else 'gone'}")
        elif before[name] != now[name]:
            found.append(f"{name}: {_describe_part(before[name], now[name])}")
    return "; ".join(found)


def write_identity(folder: str | Path, identity: Mapping[str, Any]) -> Path:
    """Store an identity in the folder of a run.

    Raises:
        OSError: The file cannot be written.
    """
    return write_text(Path(folder) / DATA_FILE, json.dumps(identity) + "\n")


def check_identity(folder: str | Path, identity: Mapping[str, Any], parts: Collection[str] | None = None) -> bool:
    """Compare data with what a run began with; False where the run, of an earlier version, has not stored it.

    Args:
        folder: Of the run.
        identity: Of the data now.
        parts: Compare only these; ``None`` for all.

    Raises:
        DataChangedError: It is other data; the message says what differs.
        ValueError: What is stored is damaged.
    """
    path = Path(folder) / DATA_FILE
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(before, dict) or not before:
            raise TypeError("no parts")
        now = json.loads(json.dumps(identity))
        chosen = parts or {*before, *now}
        change = describe_change(
            *({name: each[name] for name in each if name in chosen} for each in (before, now)),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, so that it is not known what data this run began with: restore the file, or remove it "
            "if you are sure that the data is the same."
        ) from error
    if change:
        raise DataChangedError(
            f"The data is not what the run in {folder} began with ({change}): restore it, or start another run."
        )
    return True


def _digest(chunks: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        # With its length, so that two chunks are not one.
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
    # Sorted, for each index once; spread over the channels, rows and columns.
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
        # The paths' last two parts: as a rule its class, and its name.
        names = ("/".join(Path(path).parts[-2:]).encode(errors="surrogateescape") for path in paths)
        contents = (_ends(paths[index]) for index in np.unique(chosen))
        return len(paths), _digest(names), _digest([sizes.tobytes()]), _digest(contents)

    # Where the files lie on another machine, one waits for each of them.
    with ThreadPoolExecutor(_THREADS) as pool:
        described = list(pool.map(describe, members))
    return _part(part.class_names, np.array([label for _, label in part.samples]), described)


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
        changes = [f"{len(names)} {what} ({_some(names)})" for what, names in (("new", added), ("gone", gone)) if names]
        return f"{len(new)} classes instead of {len(old)}, {' and '.join(changes) or 'in another order'}"
    found = []
    for name, first, second in zip(old, before["images"], now["images"], strict=True):
        if first == second:
            continue
        if first[0] != second[0]:
            found.append(f"{name!r} has {second[0]} images instead of {first[0]}")
            continue
        aspects = ("names", "sizes", "contents") if len(second) == 4 else ("size", "contents")
        differing = [what for what, a, b in zip(aspects, first[1:], second[1:], strict=False) if a != b]
        found.append(f"the images of {name!r} differ in their {' and '.join(differing) or 'kind'}")
    if not found:
        return "the images are in another order"
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} classes more" if len(found) > _SHOWN else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
