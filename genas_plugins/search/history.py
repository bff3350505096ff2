"""The history of a search: one line a candidate, appended, from which a killed search continues."""

from __future__ import annotations

from typing import Any

from genas_plugins._messages import shown
from genas_plugins.search.lines import HistoryError, JsonLines
from genas_plugins.search.record import Record

__all__ = ["History", "HistoryError"]


class History(JsonLines[Record]):
    """The records of a search on disk, in the order of their candidates.

    Args:
        path: The file; its folder must exist. An existing file is read, and what a crash may leave is removed
            (:class:`genas_plugins.search.lines.JsonLines`).
        read_only: Keep new records in memory, and leave the file alone: for all but one process of many.

    Raises:
        HistoryError: A line is not such a record, or not that of the candidate that comes there; the message has the
            line and what to do.
        OSError: The file cannot be read or not be repaired.
    """

    def _parsed(self, number: int, line: dict[str, Any]) -> Record:
        if line.get("index") != number:
            raise ValueError(f"has the index {shown(line.get('index'), 60)} where {number} belongs")
        return Record.of(line)
