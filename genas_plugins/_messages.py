"""What users hand over, as a part of messages: bounded in length, on one line, with control characters escaped."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["listed", "one_line", "shown"]

_LONGEST_VALUE = 200
_LONGEST_LINE = 2000


class _Bounded(reprlib.Repr):
    """``repr`` that looks at no more than a message can show: lists may hold one another many times over."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 30
        self.maxstring = self.maxother = _LONGEST_VALUE

    def repr1(self, x: Any, level: int) -> str:
        # Classes derived from these would be written out whole.
        for kind, write in ((dict, self.repr_dict), (list, self.repr_list), (tuple, self.repr_tuple)):
            if isinstance(x, kind):
                return write(x, level)
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to write out some thousands of digits.
        return repr(x) if x.bit_length() < 512 else f"an integer of {x.bit_length()} bits"


def shown(value: Any, limit: int = _LONGEST_VALUE) -> str:
    """``repr(value)`` in at most ``limit`` characters, made in bounded time whatever the value holds."""
    return _cut(_Bounded().repr(value), limit)


def one_line(text: object, limit: int = _LONGEST_LINE) -> str:
    """A text, or an error's, as one line of at most ``limit`` characters; what cannot be printed is escaped."""
    return _escaped(" ".join(str(text).split()), limit)


def listed(names: Iterable[object], limit: int = 4) -> str:
    """The first names, separated by commas, each bounded and escaped."""
    names = list(names)
    return ", ".join(_escaped(str(name), _LONGEST_VALUE) for name in names[:limit]) + ", ..." * (len(names) > limit)


def _escaped(text: str, limit: int) -> str:
    # Cut before and after: an escaped character is longer.
    text = _cut(text, limit)
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # What to do about an error stands at its end.
    end = limit // 3
    return f"{text[: limit - end - 5]} ... {text[len(text) - end :]}"
