"""What is known of one candidate of a search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from genas_plugins._messages import shown
from genas_plugins.scoring.combined import Measurement

__all__ = ["Record", "Status"]

Status = Literal["ok", "failed", "dropped"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Record(Mapping[str, Any]):
    """One candidate: what it is, how it came about, and what was measured; a line of ``history.jsonl``.

    Read as a mapping it is that line: what does not apply is left out, but for the score.

    >>> record = Record(index=0, generation=0, origin="random", candidate=[1], status="failed", reason="loss is nan")
    >>> record["reason"], "losses" in record
    ('loss is nan', False)

    Attributes:
        index: Number of the candidate, from 0.
        generation: Number of its generation, from 0.
        origin: ``"random"``, ``"mutation"`` or ``"crossover"``.
        candidate: The architecture as plain data.
        status: ``"ok"``, ``"failed"`` or, by a race, ``"dropped"``.
        score: What the search maximises; ``None`` unless ok.
        shares: Fractions of the score by metric, and of Eq. 4 by its slope term.
        flatness: Eq. 4; this and the following where the metric contains them.
        sigmas: Standard deviations of the noise.
        losses: Mean validation loss at each sigma.
        slope: Slope term of Eq. 4.
        depth: Depth term of Eq. 4.
        angle: Fraction of pi.
        top1: Accuracy as a fraction.
        top5: Accuracy as a fraction.
        neighbourhood: Of a neighbourhood's score, see :class:`genas_plugins.scoring.Measurement`.
        reason: Why it failed.
        estimate: Score of a dropped candidate on the images that it has seen.
        standard_error: Standard error of the estimate.
        images: Number of images that a dropped candidate has seen.
        costs: Parameters, multiply-adds and the like by name, where the search has constraints or objectives.
        seconds: Time that measuring it took.
    """

    index: int
    generation: int
    origin: str
    candidate: Any = None
    status: Status
    score: float | None = None
    shares: Mapping[str, float] | None = None
    flatness: float | None = None
    sigmas: list[float] | None = None
    losses: list[float] | None = None
    slope: float | None = None
    depth: float | None = None
    angle: float | None = None
    top1: float | None = None
    top5: float | None = None
    neighbourhood: Mapping[str, Any] | None = None
    reason: str | None = None
    estimate: float | None = None
    standard_error: float | None = None
    images: int | None = None
    costs: Mapping[str, float] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Record:
        """Read a line of the history; keys that no version has written are left out.

        Raises:
            ValueError: A key is missing or its value cannot be; the message completes "Line 3 ...".
        """
        if isinstance(line, Record):
            return line
        status = line.get("status")
        if not isinstance(status, str) or status not in _FORMS:
            raise ValueError(f"has the status {shown(status, 60)}, expected one of {', '.join(_FORMS)}")
        for key, fits in {**_COMMON, **_FORMS[status]}.items():
            if key not in line:
                raise ValueError(f"lacks {key}")
            if not fits(line[key]):
                raise ValueError(f"has {shown(line[key], 60)} as {key}")
        if not _is_shares(costs := line.get("costs", {})):
            raise ValueError(f"has {shown(costs, 60)} as costs")
        if not _is_shares(near := line.get("neighbourhood", {})):
            raise ValueError(f"has {shown(near, 60)} as neighbourhood")
        losses, sigmas = (line.get(key) for key in ("losses", "sigmas"))
        counted = _are_numbers(losses) and _are_numbers(sigmas) and len(losses) == len(sigmas)
        if (losses is not None or sigmas is not None) and not counted:
            raise ValueError("does not have as many losses as sigmas")
        return cls(**{name: line[name] for name in _NAMES if name in line})

    @classmethod
    def unchecked(cls, line: Mapping[str, Any]) -> Record:
        """Read a line that may lack what a record has; that is ``None`` then."""
        needed = dict.fromkeys(("index", "generation", "origin", "status"))
        return cls(**{**needed, **{name: line[name] for name in _NAMES if name in line}})

    @classmethod
    def measured(cls, measurement: Measurement, **named: Any) -> Record:
        """The record of a candidate that was measured on all images."""
        return cls(status="ok", **measurement.to_dict(), **named)

    def to_dict(self) -> dict[str, Any]:
        """The line of the history as plain data."""
        values = ((name, getattr(self, name)) for name in _NAMES)
        return {name: value for name, value in values if value is not None or name == "score"}

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


_NAMES = [item.name for item in dataclasses.fields(Record)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


def _is_shares(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_none(value: Any) -> bool:
    return value is None


_COMMON = {
    "index": _is_number,
    "generation": _is_number,
    "origin": _is_text,
    "candidate": lambda value: value is not None,
    "seconds": _is_number,
}
_FORMS: dict[str, dict[str, Any]] = {
    "ok": {"score": _is_number, "shares": _is_shares},
    "failed": {"score": _is_none, "reason": _is_text},
    "dropped": {"score": _is_none, "estimate": _is_number, "standard_error": _is_number, "images": _is_number},
}
