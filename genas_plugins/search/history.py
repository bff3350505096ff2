"""The history of a search: one line a candidate, appended, from which a killed search continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genas_plugins._messages import shown
from genas_plugins.search.lines import HistoryError, JsonLines
from genas_plugins.search.record import Record

__all__ = ["History", "HistoryError", "check_records"]


class History(JsonLines[Record]):
    """The records of a search on disk, in the order of their candidates.

    Args:
        path: The file; its folder must exist. An existing file is read, and what a crash may leave is removed
            (:class:`genas_plugins.search.lines.JsonLines`).
        read_only: Keep new records in memory, and leave the file alone: for all but one process of many.

    Raises:
        HistoryError: A line is no JSON object; the message has the line and what to do.
        OSError: The file cannot be read or not be repaired.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self._read_lines: list[dict[str, Any]] = []
        super().__init__(path, read_only=read_only)

    def check(self) -> None:
        """Check that each line that was read is the record of the candidate that comes there.

        Raises:
            HistoryError: One is not; the message has the line, what is wrong and what to do.
        """
        for number, line in enumerate(self._read_lines):
            if line.get("index") != number:
                raise self.error(number, f"has the index {shown(line.get('index'), 60)} where {number} belongs")
            try:
                Record.of(line)
            except ValueError as error:
                raise self.error(number, str(error)) from error

    def beside(self, name: str) -> JsonLines[dict[str, Any]]:
        """Lines of another kind in the same folder, written by whoever writes the history."""
        return JsonLines(self.path.with_name(name), read_only=self.read_only)

    def _parsed(self, line: dict[str, Any]) -> Record:
        self._read_lines.append(line)
        return Record.unchecked(line)


def check_records(history: History) -> None:
    """See :meth:`History.check`."""
    history.check()
