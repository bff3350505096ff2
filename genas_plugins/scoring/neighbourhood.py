"""Flat in architecture: the score of an architecture and of its neighbours, put together.

After Wang et al., "Neighborhood-Aware Neural Architecture Search" (BMVC 2021, arXiv 2105.06369).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genas_plugins._messages import shown
from genas_plugins.checks import check_count
from genas_plugins.scoring.combined import CombinedScore

__all__ = ["AGGREGATES", "NeighbourhoodScore"]

AGGREGATES: tuple[str, ...] = ("mean", "median", "min", "mean-std")
_MOST = 10**6


@dataclass(frozen=True)
class NeighbourhoodScore:
    """A score of neighbourhoods over one of single architectures.

    >>> NeighbourhoodScore(CombinedScore(metric="accuracy"), "min").of([0.7, 0.6, 0.8])
    0.6

    Args:
        score: What is measured on an architecture and on each of its neighbours.
        aggregate: What is made of these scores: their ``"mean"``, ``"median"``, ``"min"``, or ``"mean-std"``, the mean
            less the standard deviation (of the scores themselves, not of an estimate).
        distance: Edits away that a neighbour is at most (:class:`genas_plugins.neighbourhood.Neighbourhood`).
        size: A seeded sample of so many neighbours; ``None`` for all, and 0 for none, which is the score itself.
        include_self: Whether the architecture counts as one of its neighbourhood. It is measured in any case.
        inputs: Whether neighbours may have inputs moved too, where a space tells inputs and operations apart.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: The aggregate is unknown, a number is out of its range, or the neighbourhood is empty.
    """

    score: CombinedScore
    aggregate: str = "mean"
    distance: int = 1
    size: int | None = None
    include_self: bool = True
    inputs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.score, CombinedScore):
            raise TypeError(f"A neighbourhood's score is put together from a CombinedScore, got {shown(self.score)}.")
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"Unknown aggregate {shown(self.aggregate)}; valid aggregates: {', '.join(AGGREGATES)}.")
        check_count("distance", self.distance, most=64)
        if self.size is not None:
            check_count("size", self.size, 0, _MOST)
        if self.size == 0 and not self.include_self:
            raise ValueError("A neighbourhood of size 0 without the architecture itself has nothing to measure.")

    def of(self, scores: Sequence[float]) -> float:
        """The aggregate of scores, of which there is at least one."""
        if self.aggregate == "mean-std":
            return float(np.mean(scores) - np.std(scores))
        functions: dict[str, Any] = {"mean": np.mean, "median": np.median, "min": np.min}
        return float(functions[self.aggregate](scores))
