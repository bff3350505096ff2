"""What candidates cost, and the part of a space that a budget allows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from genas_plugins._messages import listed, shown
from genas_plugins.search.evolution import NoCandidateError, SearchSpace

__all__ = ["BudgetError", "CostedSpace", "Limits", "amount", "in_units"]

Candidate = TypeVar("Candidate", bound=Hashable)
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_AMOUNT = re.compile(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)\s*([KMG]?)\s*", re.IGNORECASE | re.ASCII)


class BudgetError(NoCandidateError):
    """No architecture within the budget was found."""


def amount(value: Any) -> float:
    """A number, or text with a K, M or G behind it for thousands, millions and thousands of millions.

    >>> amount("600M"), amount("5.3 M"), amount(12)
    (600000000.0, 5300000.0, 12.0)

    Raises:
        ValueError: It is neither, negative, or not finite.
    """
    number = math.nan
    if isinstance(value, str) and (found := _AMOUNT.fullmatch(value)):
        number = float(found[1]) * _UNITS[found[2].upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"An amount is a number that is not negative, such as 4.5e6 or 600M, got {shown(value)}.")
    return number


def in_units(value: float) -> str:
    """A cost in six digits, with the unit that :func:`amount` reads.

    >>> in_units(573956576), in_units(12.5)
    ('573.957M', '12.5')
    """
    unit, size = next(((unit, size) for unit, size in reversed(_UNITS.items()) if abs(value) >= size), ("", 1.0))
    return f"{value / size:.6g}{unit}"


@dataclass(frozen=True)
class Limits:
    """From where to where a cost may be.

    >>> Limits.of("600M"), Limits.of((3e8, None)), Limits.of({"min": "300M", "max": "600M"})
    (Limits(min=None, max=600000000.0), Limits(min=300000000.0, max=None), Limits(min=300000000.0, max=600000000.0))

    Attributes:
        min: The least that is allowed; ``None`` for any.
        max: The most that is allowed; ``None`` for any.

    Raises:
        ValueError: ``min`` is above ``max``.
    """

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must be at most max, got {self.min:g} and {self.max:g}.")

    @classmethod
    def of(cls, value: Any) -> Limits:
        """Read a limit: an amount, which is the most; a pair of least and most; or a mapping of ``min`` and ``max``.

        Raises:
            ValueError: It is none of these.
        """
        if isinstance(value, Limits):
            return value
        if isinstance(value, tuple | list) and len(value) == 2:
            value = dict(zip(("min", "max"), value, strict=True))
        if isinstance(value, Mapping) and set(value) <= {"min", "max"}:
            return cls(**{end: None if given is None else amount(given) for end, given in value.items()})
        if isinstance(value, Mapping | tuple | list):
            raise ValueError(f"A limit is an amount, a pair of least and most, or min and max, got {shown(value)}.")
        return cls(max=amount(value))

    @property
    def free(self) -> bool:
        """Whether it allows everything."""
        return self.min is None and self.max is None

    def allow(self, value: float) -> bool:
        """Whether a cost is within."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        ends = ("at least", self.min), ("at most", self.max)
        return " and ".join(f"{word} {in_units(end)}" for word, end in ends if end is not None)


class CostedSpace(Generic[Candidate]):
    """A space whose candidates have costs, drawn again and again until these are within their limits.

    So what is uniform in the space, :meth:`sample`, is uniform in the part that the budget allows.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> convolutions = lambda candidate: float(candidate.operations.count("nor_conv_3x3"))
    >>> space = CostedSpace(NasBench201SearchSpace(), {"convolutions": convolutions}, {"convolutions": Limits(max=1)})
    >>> space.costs(space.sample(np.random.default_rng(0)))
    {'convolutions': 1.0}

    Args:
        space: What is searched.
        functions: What a candidate costs, by name; called where the value is needed, in their order.
        limits: From where to where costs may be, by name.
        tries: Draws for one candidate, above 0.
    """

    def __init__(
        self,
        space: SearchSpace[Candidate],
        functions: Mapping[str, Callable[[Candidate], float]],
        limits: Mapping[str, Limits],
        tries: int = 10_000,
    ) -> None:
        self.space = space
        self.functions = dict(functions)
        self.limits = {name: limits[name] for name in functions if not limits.get(name, Limits()).free}
        self.tries = tries

    def costs(self, candidate: Candidate) -> dict[str, float]:
        """All costs of a candidate by name."""
        return {name: function(candidate) for name, function in self.functions.items()}

    def sample(self, rng: np.random.Generator) -> Candidate:
        """Draw as the space does, within the budget.

        Raises:
            BudgetError: No draw was; the message has the smallest and the largest costs that were seen.
        """
        return self._within(lambda: self.space.sample(rng))

    def mutate(self, candidate: Candidate, probability: float, rng: np.random.Generator) -> Candidate:
        """Mutate as the space does, within the budget; see :meth:`sample` for the error."""
        return self._within(lambda: self.space.mutate(candidate, probability, rng))

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """Cross as the space does, within the budget; see :meth:`sample` for the error."""
        return self._within(lambda: self.space.crossover(first, second, rng))

    def to_json(self, candidate: Candidate) -> Any:
        """As the space does."""
        return self.space.to_json(candidate)

    def from_json(self, data: Any) -> Candidate:
        """As the space does."""
        return self.space.from_json(data)

    def _within(self, draw: Callable[[], Candidate]) -> Candidate:
        seen: dict[str, list[float]] = {}
        for _ in range(self.tries):
            candidate = draw()
            for name, limits in self.limits.items():
                value = self.functions[name](candidate)
                low, high = seen.setdefault(name, [value, value])
                seen[name] = [min(low, value), max(high, value)]
                if not limits.allow(value):
                    break
            else:
                return candidate
        told = [
            f"{name} must be {self.limits[name]} and was {in_units(low)} to {in_units(high)}"
            for name, (low, high) in seen.items()
        ]
        raise BudgetError(
            f"None of {self.tries:,} architectures that were drawn is within the budget: {listed(told, 9)}; widen "
            "search.constraints."
        )
