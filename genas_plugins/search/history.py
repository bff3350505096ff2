"""The history of a search: one JSON line per candidate, appended, from which a killed search continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genas_plugins._messages import one_line

__all__ = ["History", "HistoryError"]


class HistoryError(ValueError):
    """A history file is damaged, or belongs to another search."""


class History:
    """An append-only list of records on disk.

    Each record is one line, written and synchronised before the next candidate is measured. A line that a
    crash or a full disk cut off is removed when the file is opened again: that candidate is measured anew.

    Args:
        path: The file; its folder must exist. An existing file is read.
        read_only: Keep new records in memory, and leave the file alone: for all but one process of many.

    Raises:
        HistoryError: A line other than the last is not a JSON object.
        OSError: The file cannot be read or its cut-off line not be removed.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.records: list[dict[str, Any]] = []
        if self.path.exists():
            self._read()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: The disk is full, say. The records before stay readable, and the file ends with them.
            ValueError: The record holds a number that JSON has no word for (NaN or infinity).
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if not self.read_only:
            self._write(line)
        self.records.append(dict(record))

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(descriptor).st_size
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and not self.read_only:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HistoryError(f"Line {number} of {self.path} is not JSON: {one_line(error, 300)}.") from error
            if not isinstance(record, dict):
                raise HistoryError(f"Line {number} of {self.path} is not a JSON object.")
            self.records.append(record)
