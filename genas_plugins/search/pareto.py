"""Several objectives at once: NSGA-II (Deb et al., IEEE Transactions on Evolutionary Computation, 2002).

It is written here, because the libraries that have it keep their state as pickles, and a search is resumed from its
history, which is data.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from genas_plugins._messages import listed, shown, suggestion
from genas_plugins.search.evolution import Candidate, Evolution, SearchSpace
from genas_plugins.search.record import Record
from genas_plugins.spaces import DartsSearchSpace

__all__ = [
    "OBJECTIVES",
    "ParetoEvolution",
    "check_objectives",
    "crowding_distances",
    "evolution_for",
    "objective",
    "pareto_ranks",
]

OBJECTIVES = {"score": "score", "flatness": "flatness", "angle": "angle", "accuracy": "top1"}
"""What is measured and may be an objective, with its name in a record; higher is better. Costs are the other ones."""


def check_objectives(names: Sequence[str], metrics: Collection[str], costs: Collection[str]) -> tuple[str, ...]:
    """Return the objectives of a search.

    Args:
        names: Objectives.
        metrics: What the search's score measures.
        costs: What is known of a candidate besides; less is better.

    Raises:
        ValueError: There are fewer than two, one comes twice, or one is neither measured nor a cost.
    """
    known = ["score", *sorted(metrics), *costs]
    for name in names:
        if name not in known:
            told = ", which score.metric does not measure" if name in OBJECTIVES else suggestion(name, known)
            raise ValueError(f"There is no objective {shown(name)}{told}; there are: {listed(known, 20)}.")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"A search has two or more objectives, each once, got {shown(list(names))}.")
    return tuple(names)


def objective(record: Record, name: str) -> float:
    """An objective of a candidate that was measured."""
    return getattr(record, OBJECTIVES[name]) if name in OBJECTIVES else (record.costs or {})[name]


def pareto_ranks(values: Any) -> np.ndarray:
    """The front of each candidate: 0 for those that no other dominates, 1 for those that only these do, and so on.

    A candidate dominates another if it is as good in all objectives and better in one.

    >>> pareto_ranks([(3, 1), (1, 3), (1, 1), (0, 0)]).tolist()
    [0, 0, 1, 2]

    Args:
        values: ``(candidates, objectives)``, higher is better.
    """
    values = np.asarray(values, dtype=float)
    ranks = np.full(len(values), -1)
    # Row i, column j: i dominates j.
    dominates = np.ones((len(values),) * 2, dtype=bool)
    better = np.zeros_like(dominates)
    for column in values.T:
        dominates &= column[:, None] >= column
        better |= column[:, None] > column
    dominates &= better
    rank = 0
    while (ranks < 0).any():
        left = ranks < 0
        ranks[left & ~dominates[left].any(0)] = rank
        rank += 1
    return ranks


def crowding_distances(values: Any) -> np.ndarray:
    """How far the neighbours of each candidate of a front are from one another, summed over the objectives.

    Each objective counts as a share of its range; the ends of the front are infinitely far. Of candidates that are
    equal in all objectives the first has the distance, and the others 0.

    >>> crowding_distances([(0, 4), (1, 2), (4, 0), (1, 2)]).tolist()
    [inf, 2.0, inf, 0.0]

    Args:
        values: ``(candidates, objectives)`` of one front.
    """
    different, first = np.unique(np.asarray(values, dtype=float), axis=0, return_index=True)
    distances = np.zeros(len(different))
    for column in different.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        if (span := ordered[-1] - ordered[0]) > 0 or len(different) == 1:
            distances[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
            distances[order[[0, -1]]] = np.inf
    every = np.zeros(len(values))
    every[first] = distances
    return every


class ParetoEvolution(Evolution[Candidate]):
    """NSGA-II in generations, with random candidates beside mutants and crossovers as :class:`Evolution` has them.

    Parents are the best so far by the front that they are on, and on one front by their crowding distance. They are
    drawn by a tournament of two. A candidate's value is a tuple, a number for each objective, higher is better.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> count = lambda candidate, name: float(candidate.operations.count(name))
    >>> evolution = ParetoEvolution(NasBench201SearchSpace(), ("score", "macs"), population=10, generations=5)
    >>> while not evolution.finished:
    ...     candidates = [proposal.candidate for proposal in evolution.ask()]
    ...     evolution.tell([(count(c, "nor_conv_1x1"), -count(c, "nor_conv_3x3")) for c in candidates])
    >>> max(value for _, value in evolution.front()) == evolution.front()[0][1]
    True

    Args:
        space: What is searched.
        objectives: Their names, of :data:`OBJECTIVES` or of the costs in a record.
        population: Candidates a generation.
        parents: ``None`` for as many as the population, as NSGA-II has them.
        **settings: See :class:`Evolution`.
    """

    def __init__(
        self,
        space: SearchSpace[Candidate],
        objectives: Sequence[str],
        *,
        population: int = 50,
        parents: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(space, population=population, parents=population if parents is None else parents, **settings)
        self.objectives = tuple(objectives)

    def tell(self, scores: Sequence[Any], evaluations: int | None = None) -> None:
        """Take the values of the generation; see :meth:`Evolution.tell`.

        Raises:
            ValueError: As there, or a value has another number of objectives.
        """
        count = len(self.objectives)
        if wrong := [score for score in scores if score is not None and len(score) != count]:
            raise ValueError(f"tell() got {shown(wrong[0])} for the {count} objectives {listed(self.objectives, 9)}.")
        super().tell([None if score is None else tuple(score) for score in scores], evaluations)

    def value_of(self, record: Record) -> tuple[float, ...] | None:
        """The objectives of a record; costs count as less the better. ``None`` if the candidate failed."""
        if record.score is None:
            return None
        signs = (1 if name in OBJECTIVES else -1 for name in self.objectives)
        return tuple(sign * objective(record, name) for sign, name in zip(signs, self.objectives, strict=True))

    def front(self) -> list[tuple[Candidate, tuple[float, ...]]]:
        """What no other candidate dominates, with its values, the best in the first objective first."""
        return [(candidate, value) for candidate, value, rank, _ in self._ranked() if rank == 0]

    def best(self, count: int | None = None) -> list[tuple[Candidate, Any]]:
        """The front with the first objective, best first; with ``count`` that many of it, far from one another."""
        front = [pair for pair in self._ranked() if pair[2] == 0]
        kept = sorted(front, key=lambda item: -item[3])[:count]
        chosen = [item for item in front if any(item is other for other in kept)]
        return [(candidate, value[0]) for candidate, value, _, _ in chosen]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Evolution.load_state_dict`."""
        super().load_state_dict(state)
        self._scored = [(candidate, None if value is None else tuple(value)) for candidate, value in self._scored]

    def _ranked(self) -> list[tuple[Candidate, tuple[float, ...], int, float]]:
        """All that were scored with value, front and crowding distance, by front, the best in the first first."""
        scored: list[tuple[Candidate, Any]] = [(c, value) for c, value in self._scored if value is not None]
        if not scored:
            return []
        values = np.array([value for _, value in scored])
        ranks = pareto_ranks(values)
        distances = np.empty(len(scored))
        for rank in range(ranks.max() + 1):
            distances[ranks == rank] = crowding_distances(values[ranks == rank])
        order = sorted(range(len(scored)), key=lambda i: (ranks[i], *(-value for value in values[i])))
        return [(*scored[i], int(ranks[i]), float(distances[i])) for i in order]

    def _parents(self) -> list[Candidate]:
        ranked = sorted(self._ranked(), key=lambda item: (item[2], -item[3]))
        return [candidate for candidate, *_ in ranked[: self.parents]]

    def _pick(self, parents: Sequence[Candidate]) -> Candidate:
        # They come best first.
        return parents[self._rng.integers(len(parents), size=2).min()]


def evolution_for(objectives: Sequence[str], racing: float | None = None, **settings: Any) -> Evolution[Any]:
    """The evolution of a search, with a space that takes its place later.

    Args:
        objectives: None for the score alone.
        racing: The search's confidence, if candidates race.
        **settings: See :class:`Evolution`.

    Raises:
        ValueError: Candidates of several objectives cannot race; or see :class:`Evolution`.
    """
    if not objectives:
        return Evolution(DartsSearchSpace(), **settings)
    if racing is not None:
        raise ValueError("A race compares candidates by one score: leave out racing, or objectives.")
    return ParetoEvolution(DartsSearchSpace(), objectives, **settings)
