"""Which architectures are near another one: all within a distance, counted exactly, listed lazily, or a sample.

A space is a product of parts, such as the edges of a cell. Each part of a candidate has a state, and every other state
of that part is at some distance from it; the distance of two candidates is the sum over the parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from genas_plugins.checks import check_count

__all__ = ["Neighbourhood", "Parts", "distance", "parts_of", "values_by_label"]

Candidate = TypeVar("Candidate")
_MOST_DISTANCE = 64


@dataclass(frozen=True)
class Parts(Generic[Candidate]):
    """A candidate seen as parts that can change.

    Attributes:
        states: For each part its states by distance: at 0 its own alone, at 1 those one edit away, and so on.
        combine: The candidate with a state for each part; ``None`` where there is none.
        complete: Whether there is one for every combination.
    """

    states: Sequence[Sequence[Sequence[Any]]]
    combine: Callable[[Sequence[Any]], Candidate | None]
    complete: bool = True


def parts_of(space: Any, candidate: Candidate, inputs: bool = False) -> Parts[Candidate]:
    """The parts of a candidate: as its space says (method ``parts``), or else its choices.

    Args:
        space: The space (:class:`genas_plugins.spaces.Space`).
        candidate: One of it.
        inputs: Whether inputs may be moved as well as operations replaced, where the space tells them apart.
    """
    if hasattr(space, "parts"):
        return space.parts(candidate, inputs)
    sample = space.to_sample(candidate)
    every = values_by_label(space.choices)
    states = [((sample[label],), [v for v in values if v != sample[label]]) for label, values in every.items()]
    return Parts(states, lambda chosen: space.from_sample(dict(zip(every, chosen, strict=True))))


def values_by_label(choices: Mapping[str, tuple[tuple[Any, ...], int]]) -> dict[str, list[Any]]:
    """All that can be chosen by label; where several are chosen, lists of them.

    Args:
        choices: See :class:`genas_plugins.spaces.Space`.
    """
    return {
        label: list(values if count == 1 else map(list, itertools.combinations(values, count)))
        for label, (values, count) in choices.items()
    }


def distance(space: Any, first: Any, second: Any) -> int:
    """How many edits lie between two candidates, operations replaced or inputs moved; a metric.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> space = NasBench201SearchSpace()
    >>> one, other = (space.read(f"|{op}~0|+|none~0|{op}~1|+|none~0|none~1|none~2|") for op in ("none", "nor_conv_3x3"))
    >>> distance(space, one, other)
    2
    """
    if hasattr(space, "distance"):
        return space.distance(first, second)
    one, other = space.to_sample(first), space.to_sample(second)
    return sum(one[label] != other[label] for label in one)


class Neighbourhood(Generic[Candidate]):
    """The candidates within a distance of one, without itself.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> space = NasBench201SearchSpace()
    >>> near = Neighbourhood(space, space.sample(np.random.default_rng(0)), distance=2)
    >>> near.size, len(near.sample(5, seed=0))  # 6 edges with 4 other operations, and pairs of them
    (264, 5)

    Args:
        space: The space.
        candidate: The one in the middle.
        distance: How many edits away its neighbours are at most.
        inputs: Whether moving an input is an edit too, where the space tells inputs and operations apart.

    Raises:
        TypeError: The distance is no whole number.
        ValueError: It is below 1 or above 64.
    """

    def __init__(self, space: Any, candidate: Candidate, distance: int = 1, *, inputs: bool = False) -> None:
        check_count("distance", distance, most=_MOST_DISTANCE)
        self.candidate = candidate
        self._parts = parts_of(space, candidate, inputs)
        # Row i: how many combinations of the parts from i on are at distance 0, 1, ... in total.
        counts = [[1] + [0] * distance]
        for states in reversed(self._parts.states):
            before = counts[-1]
            row = [
                sum(len(found) * before[total - near] for near, found in enumerate(states) if near <= total)
                for total in range(distance + 1)
            ]
            counts.append(row)
        self._counts = counts[::-1]

    @cached_property
    def size(self) -> int:
        """How many there are; they are gone through where not every combination is a candidate."""
        return self._combinations if self._parts.complete else sum(1 for _ in self)

    def __iter__(self) -> Iterator[Candidate]:
        """The nearest first."""
        found = (self._at(index) for index in range(self._combinations))
        return (candidate for candidate in found if candidate is not None)

    def sample(self, count: int, seed: int) -> list[Candidate]:
        """So many different ones, each as likely as any other; all of them where there are no more.

        Raises:
            ValueError: ``count`` is negative.
        """
        check_count("count", count, 0)
        if count >= self._combinations:
            return list(self)
        rng = np.random.default_rng(seed)
        found: dict[int, Candidate | None] = {}
        wanted: list[Candidate] = []
        while len(wanted) < count and len(found) < self._combinations:
            index = _below(self._combinations, rng)
            if index not in found:
                found[index] = self._at(index)
                wanted += [] if found[index] is None else [found[index]]
        return wanted

    @property
    def _combinations(self) -> int:
        return sum(self._counts[0][1:])

    def _at(self, index: int) -> Candidate | None:
        """The combination of a number: by total distance, then part by part."""
        total = 1
        while index >= self._counts[0][total]:
            index -= self._counts[0][total]
            total += 1
        chosen = []
        for part, states in enumerate(self._parts.states):
            rest = self._counts[part + 1]
            for near, found in enumerate(states[: total + 1]):
                ways = len(found) * rest[total - near]
                if index < ways:
                    state, index = divmod(index, rest[total - near])
                    chosen.append(found[state])
                    total -= near
                    break
                index -= ways
        return self._parts.combine(chosen)


def _below(count: int, rng: np.random.Generator) -> int:
    """A number below ``count``, which may be beyond 64 bits."""
    if count < 2**63:
        return int(rng.integers(count))
    while True:
        number = int.from_bytes(rng.bytes((count.bit_length() + 7) // 8), "big") >> (-count.bit_length() % 8)
        if number < count:
            return number
