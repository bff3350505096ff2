"""Formats user input for messages: bounded in length, on one line, with control characters escaped."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["escaped", "listed", "message_of", "one_line", "shown", "suggestion"]

_LONGEST_VALUE = 200
_LONGEST_LINE = 2000
_OF_ANOTHER_PROCESS = re.compile(r"Caught \w+ in DataLoader worker process |-- Process \d+ terminated")


class _Bounded(reprlib.Repr):
    """``repr`` in bounded time, also for deeply nested values and containers that contain each other."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 30
        self.maxstring = self.maxother = _LONGEST_VALUE

    def repr1(self, x: Any, level: int) -> str:
        # The base class dispatches on the type's name and would write subclasses out in full.
        for kind, write in ((dict, self.repr_dict), (list, self.repr_list), (tuple, self.repr_tuple)):
            if isinstance(x, kind):
                return write(x, level)
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4,300 digits.
        return repr(x) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


def shown(value: Any, limit: int = _LONGEST_VALUE) -> str:
    """``repr(value)`` in at most ``limit`` characters, made in bounded time whatever the value holds."""
    return _cut(_Bounded().repr(value), limit)


def one_line(text: object, limit: int = _LONGEST_LINE) -> str:
    """A text or an error's message on one line of at most ``limit`` characters; the unprintable is escaped."""
    return escaped(" ".join(str(text).split()), limit)


def message_of(error: BaseException) -> str:
    """An error on one line; of an error relayed from another process with its traceback, only the original one."""
    text = str(error).strip()
    if _OF_ANOTHER_PROCESS.match(text):
        lines = text.splitlines()
        # The error is the first line without indentation after the traceback.
        last = max((number for number, line in enumerate(lines) if line.startswith("  File ")), default=0)
        start = next((number for number in range(last + 1, len(lines)) if lines[number][:1].strip()), len(lines) - 1)
        name, _, text = "\n".join(lines[start:]).partition(": ")
        text = text or name
        # The traceback keeps a data loader alive, whose workers would only end after a timeout.
        error.__traceback__ = None
    return one_line(text) or type(error).__name__


def listed(names: Iterable[object], limit: int = 4) -> str:
    """The first names, separated by commas, each bounded and escaped."""
    names = list(names)
    return ", ".join(escaped(name) for name in names[:limit]) + ", ..." * (len(names) > limit)


def escaped(name: object, limit: int = _LONGEST_VALUE) -> str:
    """A name or path in at most ``limit`` characters, with unprintable characters escaped."""
    # Cut before and after: an escaped character is longer.
    text = _cut(str(name), limit)
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # Messages end with what to do, so the end is kept too.
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[len(text) - end :]}"


def suggestion(name: object, known: Iterable[str]) -> str:
    """The known name that is most like another, as a question in brackets; empty if none is."""
    close = difflib.get_close_matches(str(name)[:100], list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
