"""The images of a training, as its folder knows them: stored when it begins, compared when it is resumed."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from genas_plugins._messages import one_line
from genas_plugins.datasets import DATA_FILE, files_identity, read_identity, refuse_change, write_identity

__all__ = ["known_images"]

_logger = logging.getLogger(__name__)

_SAMPLED_RECORDS = 1024
_UNREAD = "The data set %s cannot be read now, so a resume will not compare its images: %s"

Records = list[dict[str, Any]]


@contextmanager
def known_images(folder: str, names: Iterable[str], options: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Compare the images of a training that is resumed with those that it began with.

    They are read once: in the block, the first to ask Detectron2 for them gets what was read here. Data sets that are
    no lists of records, and runs that have stored nothing, are taken as they are.

    Args:
        folder: Folder of the training.
        names: Registered names of its data sets.
        options: Those of the launcher.

    Yields:
        A function that stores what the training begins with; to be called when nothing more can be refused.

    Raises:
        DataChangedError: On entering; the run began with other images, and the message says what differs.
        ValueError: On entering; what is stored is damaged.
    """
    # Detectron2 also writes to remote addresses.
    if options.eval_only or not comm.is_main_process() or "://" in folder:
        yield lambda: None
        return
    sets = {name: _read(name) for name in names}
    found = {name: _identity(name, records) for name, records in sets.items() if records is not None}
    resumes = options.resume and (Path(folder) / "last_checkpoint").is_file()
    before = read_identity(folder) if resumes else None
    if before is not None:
        known = {name: part for name, part in before.items() if sets.get(name, ()) is not None}
        refuse_change(known, found, f"what the run in {folder} began with", Path(folder) / DATA_FILE)

    def begin() -> None:
        if before is None and found:
            write_identity(folder, found)
        elif not resumes:
            # That of an earlier training in this folder.
            (Path(folder) / DATA_FILE).unlink(missing_ok=True)

    loaders = {name: DatasetCatalog[name] for name in found}
    try:
        for name, load in loaders.items():
            _register(name, _handing_over(name, load, sets.pop(name)))
        yield begin
    finally:
        for name, load in loaders.items():
            _register(name, load)


def _read(name: str) -> Records | None:
    """The records of a data set; None if it is another kind, or cannot be read."""
    _logger.info("Reading %s.", name)
    try:
        records = DatasetCatalog.get(name)
    # Of users' functions, too. Detectron2 asks again, and says it in its own way.
    except Exception as error:
        _logger.warning(_UNREAD, name, one_line(error, 300) or type(error).__name__)
        return None
    if not isinstance(records, list):
        return None
    whole = all(isinstance(record, dict) and isinstance(record.get("file_name"), str) for record in records)
    return records if whole else None


def _handing_over(name: str, load: Callable[[], Any], records: Any) -> Callable[[], Any]:
    """A function that returns the records when it is called first, and then what ``load`` does."""

    def once() -> Any:
        _register(name, load)
        return records

    return once


def _register(name: str, load: Callable[[], Any]) -> None:
    DatasetCatalog.pop(name, None)
    DatasetCatalog.register(name, load)


def _identity(name: str, records: Records) -> dict[str, Any]:
    # In any order: Detectron2 draws other images after a resume anyway.
    records = sorted(records, key=lambda record: record["file_name"])
    metadata = MetadataCatalog.get(name)
    groups = {
        "images": [record["file_name"] for record in records],
        "masks": [record["sem_seg_file_name"] for record in records if "sem_seg_file_name" in record],
        "annotation files": [
            file for key in ("json_file", "panoptic_json") if isinstance(file := getattr(metadata, key, None), str)
        ],
    }
    classes = [*getattr(metadata, "thing_classes", ()), *getattr(metadata, "stuff_classes", ())]
    return files_identity(groups, classes, _annotations(records))


def _annotations(records: Records) -> Iterator[bytes]:
    """Sizes, and classes of the objects, of all images, and all that is known of the objects of some."""
    for record in records:
        labels = [each.get("category_id") for each in _objects(record)]
        yield f"{record.get('height')} {record.get('width')} {labels}".encode()
    for index in np.unique(np.linspace(0, len(records) - 1, _SAMPLED_RECORDS).astype(int)) if records else ():
        yield json.dumps(_objects(records[index]), default=_plain).encode()


def _objects(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return record.get("annotations") or ()


def _plain(value: Any) -> Any:
    """What JSON does not know, such as run lengths in bytes; of unknown objects only their kind."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else type(value).__name__
