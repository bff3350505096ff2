"""Append-only files of JSON lines that survive a kill, a crash and a full disk."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from genas_plugins._messages import one_line
from genas_plugins.files import atomic_path

__all__ = ["HistoryError", "JsonLines"]

Item = TypeVar("Item", bound=Mapping[str, Any])

_logger = logging.getLogger(__name__)

_BLANK = b"\0 \t\r"
_BOM = b"\xef\xbb\xbf"
_ANEW = "remove it and all lines after it, and what they measured is measured anew"


class HistoryError(ValueError):
    """A history file is damaged, or belongs to another search."""


class JsonLines(Generic[Item]):
    """An append-only list of records on disk; a subclass may have them of a type of its own.

    Each record is one line, written and synchronised before the next candidate is measured. What a crash of the machine
    or a full disk may leave is removed when the file is opened again, and one line of the log says so: a last line that
    was cut off, whose candidate is measured anew, empty lines, blocks of NUL bytes, and a line that repeats the one
    before it.

    Args:
        path: The file; its folder must exist. An existing file is read.
        read_only: Keep new records in memory, and leave the file alone: for all but one process of many.

    Raises:
        HistoryError: A line other than the last is not JSON, or a line is not a JSON object.
        OSError: The file cannot be read or not be repaired.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.records: list[Item] = []
        self._lines: list[int] = []
        self._size = 0
        if self.path.exists():
            self._read()

    def append(self, record: Item) -> None:
        """Add a record.

        Raises:
            HistoryError: Another process has written to the file.
            OSError: The disk is full, say. The records before stay readable, and the file ends with them.
            ValueError: The record holds a number that JSON has no word for (NaN or infinity).
        """
        line = (json.dumps(dict(record), allow_nan=False) + "\n").encode()
        if not self.read_only:
            self._write(line)
        self.records.append(copy.copy(record))
        self._lines.append(self._lines[-1] + 1 if self._lines else 1)

    def error(self, number: int, what: str) -> HistoryError:
        """The error of a record that cannot be used.

        Args:
            number: Number of the record, from 0.
            what: What is wrong with it; completes "Line 3 of history.jsonl ...".
        """
        return HistoryError(f"Line {self._lines[number]} of {self.path} {what}: {_ANEW}.")

    def _parsed(self, line: dict[str, Any]) -> Item:
        """The record of a line."""
        return line  # type: ignore[return-value]

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(descriptor).st_size
            if end != self._size:
                raise HistoryError(
                    f"{self.path} has been written to by somebody else ({end} bytes, expected {self._size}): resume "
                    "this search when the other has ended."
                )
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
            self._size = end + len(line)
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        data = self.path.read_bytes()
        *lines, cut = data.split(b"\n")
        last = max((number for number, line in enumerate(lines, 1) if line.strip(_BLANK)), default=0)
        kept: list[bytes] = []
        found = {"empty line": 0, "repeated line": 0, "cut-off last line": int(bool(cut.strip(_BLANK)))}
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(_BOM).strip(_BLANK)
            if not content:
                found["empty line"] += 1
            elif kept and content == kept[-1].removeprefix(_BOM).strip(_BLANK):
                found["repeated line"] += 1
            else:
                try:
                    record = json.loads(content, parse_constant=_no_number)
                # Brackets a thousand deep are no record either.
                except (ValueError, RecursionError) as error:
                    # What was cut off begins as a record does; anything else is not ours to throw away.
                    if number == last and not cut.strip(_BLANK) and content.startswith(b"{"):
                        found["cut-off last line"] += 1
                        continue
                    raise HistoryError(
                        f"Line {number} of {self.path} is not JSON ({one_line(error, 300)}): {_ANEW}."
                    ) from error
                if not isinstance(record, dict):
                    raise HistoryError(f"Line {number} of {self.path} is not a JSON object: {_ANEW}.")
                kept.append(line if b"\0" not in line else content)
                self._lines.append(len(kept) if not self.read_only else number)
                self.records.append(self._parsed(record))
        whole = b"".join(line + b"\n" for line in kept)
        if whole != data and not self.read_only:
            self._repair(data, whole)
            told = [f"{count} {what}{'s' * (count > 1)}" for what, count in found.items() if count] or ["NUL bytes"]
            _logger.warning("%s: removed %s, as a crash may leave.", self.path, " and ".join(told))
        self._size = len(whole)

    def _repair(self, data: bytes, whole: bytes) -> None:
        if data.startswith(whole):
            # Which a full disk has room for.
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
            return
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(whole)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
