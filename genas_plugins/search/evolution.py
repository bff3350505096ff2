"""The evolutionary search of SPOS (Guo et al., ECCV 2020), as RLNAS and GeNAS run it, as a resumable object.

The object proposes a generation (:meth:`Evolution.ask`) and takes its scores (:meth:`Evolution.tell`); it never
calls the measurement itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from genas_plugins.checks import check_count, check_real, check_seed
from genas_plugins.search.record import Record

__all__ = ["Evolution", "NoCandidateError", "Origin", "Proposal", "SearchSpace", "mixture"]

Candidate = TypeVar("Candidate", bound=Hashable)
Origin = Literal["random", "mutation", "crossover"]


class NoCandidateError(ValueError):
    """A space found no candidate that it may give."""


class SearchSpace(Protocol[Candidate]):
    """What the evolution needs of a space. Candidates are hashable; all randomness comes from ``rng``.

    A :class:`NoCandidateError` ends a way to new candidates, or the search if it comes before the first.
    """

    def sample(self, rng: np.random.Generator) -> Candidate: ...

    def mutate(self, candidate: Candidate, probability: float, rng: np.random.Generator) -> Candidate: ...

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate: ...

    def to_json(self, candidate: Candidate) -> Any: ...

    def from_json(self, data: Any) -> Candidate: ...


@dataclass(frozen=True)
class Proposal(Generic[Candidate]):
    """A candidate and how it came about."""

    candidate: Candidate
    origin: Origin


def mixture(population: int, mutants: int | None = None, crossovers: int | None = None) -> tuple[int, int]:
    """Mutants and crossovers of a generation: the paper's halves of the population where they are not given.

    >>> mixture(50), mixture(5), mixture(4, mutants=3), mixture(4, crossovers=0)
    ((25, 25), (2, 2), (3, 1), (2, 0))

    Args:
        population: Candidates a generation, at least 1.
        mutants: ``None`` for half of the population, or what the crossovers leave of it if that is less.
        crossovers: The same.

    Raises:
        TypeError: One is no whole number.
        ValueError: One is negative, or they exceed the population together.
    """
    for name, count in (("mutants", mutants), ("crossovers", crossovers)):
        if count is not None:
            check_count(name, count, 0)
    half = population // 2
    if mutants is None:
        mutants = max(0, min(half, population - (crossovers or 0)))
    if crossovers is None:
        crossovers = max(0, min(half, population - mutants))
    if mutants + crossovers > population:
        raise ValueError(
            f"mutants and crossovers must not exceed the population of {population} together, got {mutants} and "
            f"{crossovers}."
        )
    return mutants, crossovers


class Evolution(Generic[Candidate]):
    """Generations of mutants, crossovers and random candidates around the best so far.

    No candidate is ever proposed twice. A space that runs out of new candidates gives smaller generations and
    ends the search early; nothing is retried without limit.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> evolution = Evolution(NasBench201SearchSpace(), population=4, generations=2, parents=2, mutants=2, crossovers=1)
    >>> while not evolution.finished:
    ...     candidates = [proposal.candidate for proposal in evolution.ask()]
    ...     evolution.tell([float(candidate.operations.count("nor_conv_3x3")) for candidate in candidates])
    >>> evolution.scored
    8

    Args:
        space: What is searched.
        population: Candidates a generation.
        generations: Number of generations, the random first one included.
        parents: The best so far that mutate and cross; ``None`` is the paper's 10.
        mutants: Mutants a generation; ``None`` is half of the population, the paper's 25 of 50, or what the crossovers
            leave of it if that is less.
        crossovers: Crossovers a generation; ``None`` is half of the population, or what the mutants leave of it if that
            is less. The rest of the population is random.
        mutation_probability: Passed to the space, which says what it applies to (DARTS: an edge).
        evaluations: Instead of ``generations``: how many measurements the search may cost, which it does not exceed. A
            candidate costs :attr:`cost` of them, at most.
        max_tries: Draws for one new candidate before the search takes a way to be exhausted.
        seed: Seed of the evolution's random state.

    Raises:
        TypeError: A setting is no number of its kind.
        ValueError: A count is not positive or beyond any search, mutants and crossovers exceed the population, the
            probability is not in (0, 1], or the seed is out of its range.
    """

    def __init__(
        self,
        space: SearchSpace[Candidate],
        *,
        population: int = 50,
        generations: int = 20,
        parents: int | None = None,
        mutants: int | None = None,
        crossovers: int | None = None,
        mutation_probability: float = 0.1,
        evaluations: int | None = None,
        max_tries: int = 200,
        seed: int = 0,
    ) -> None:
        parents = 10 if parents is None else parents
        counts = {
            "population": population,
            "generations": generations,
            "parents": parents,
            "max_tries": max_tries,
        }
        for name, count in counts.items():
            check_count(name, count)
        if evaluations is not None:
            check_count("evaluations", evaluations)
        mutants, crossovers = mixture(population, mutants, crossovers)
        check_real("mutation_probability", mutation_probability, above=0, most=1)
        self.space = space
        self.population = population
        self.generations = generations
        self.parents = parents
        self.mutants = mutants
        self.crossovers = crossovers
        self.mutation_probability = mutation_probability
        self.max_tries = max_tries
        self.evaluations = evaluations
        self.cost = 1
        """Measurements that a candidate takes, at most: more than 1 where its neighbours are measured too."""
        self.spent = 0
        self.generation = 0
        self._rng = np.random.default_rng(check_seed(seed))
        self._scored: list[tuple[Candidate, float | None]] = []
        self._seen: set[Candidate] = set()
        self._pending: list[Proposal[Candidate]] | None = None
        self._exhausted = False

    @property
    def finished(self) -> bool:
        """All generations are told, the evaluations are spent, or the space has no new candidate left."""
        return self._affordable() == 0 or self._exhausted

    @property
    def scored(self) -> int:
        """Number of candidates that were told, failed ones included."""
        return len(self._scored)

    def ask(self) -> list[Proposal[Candidate]]:
        """Propose the next generation; the same one until it is told.

        Returns:
            At most ``population`` proposals; empty when the search is finished.
        """
        if self._pending is None:
            self._pending = [] if self.finished else self._propose()
            self._exhausted = self._exhausted or not self._pending
        return list(self._pending)

    def tell(self, scores: Sequence[float | None], evaluations: int | None = None) -> None:
        """Take the scores of the generation that :meth:`ask` proposed, in its order.

        Args:
            scores: Higher is better; ``None`` for a candidate that failed, which is never a parent nor the best.
            evaluations: Measurements that they took; ``None`` for one each.

        Raises:
            ValueError: Nothing was asked, another number of scores, or NaN.
        """
        if self._pending is None or len(scores) != len(self._pending):
            expected = "but no generation was asked for" if self._pending is None else f"expected {len(self._pending)}"
            raise ValueError(f"tell() got {len(scores)} scores, {expected}.")
        if any(score is not None and bool(np.isnan(score).any()) for score in scores):
            raise ValueError("tell() got NaN; pass None for a candidate that failed.")
        self._scored += [(proposal.candidate, score) for proposal, score in zip(self._pending, scores, strict=True)]
        self._pending = None
        self.generation += bool(scores)
        self.spent += len(scores) if evaluations is None else evaluations

    def value_of(self, record: Record) -> Any:
        """What :meth:`tell` takes of a candidate: its score, ``None`` if it failed or was dropped."""
        return record.score

    def best(self, count: int | None = None) -> list[tuple[Candidate, float]]:
        """The best candidates so far with their scores, best first; of equals, the earlier first."""
        scored = [(candidate, score) for candidate, score in self._scored if score is not None]
        return sorted(scored, key=lambda pair: -pair[1])[:count]

    def state_dict(self) -> dict[str, Any]:
        """Population, random state and pending proposals as plain JSON data."""
        encode = self.space.to_json
        return {
            "generation": self.generation,
            "spent": self.spent,
            "exhausted": self._exhausted,
            "rng": self._rng.bit_generator.state,
            "scored": [[encode(candidate), score] for candidate, score in self._scored],
            "pending": None
            if self._pending is None
            else [[encode(proposal.candidate), proposal.origin] for proposal in self._pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        Raises:
            KeyError: The state lacks an entry.
            ValueError: A candidate is not one of this space.
        """
        decode = self.space.from_json
        scored = [(decode(candidate), score) for candidate, score in state["scored"]]
        pending = state["pending"]
        if pending is not None:
            pending = [Proposal(decode(candidate), origin) for candidate, origin in pending]
        self._rng.bit_generator.state = state["rng"]
        self.generation = state["generation"]
        self.spent = state.get("spent", len(scored))
        self._exhausted = state["exhausted"]
        self._scored, self._pending = scored, pending
        self._seen = {candidate for candidate, _ in scored} | {p.candidate for p in pending or ()}

    def _propose(self) -> list[Proposal[Candidate]]:
        parents, most = self._parents(), self._affordable()
        proposals: list[Proposal[Candidate]] = []
        if parents:
            proposals += self._new(min(most, self.mutants), "mutation", lambda: self._mutant(parents))
            left = most - len(proposals)
            proposals += self._new(min(left, self.crossovers), "crossover", lambda: self._crossover(parents))
        proposals += self._new(most - len(proposals), "random", lambda: self.space.sample(self._rng))
        return proposals

    def _affordable(self) -> int:
        """Candidates of the next generation."""
        if self.evaluations is not None:
            return max(0, min(self.population, (self.evaluations - self.spent) // self.cost))
        return self.population if self.generation < self.generations else 0

    def _new(self, count: int, origin: Origin, draw: Callable[[], Candidate]) -> list[Proposal[Candidate]]:
        found: list[Proposal[Candidate]] = []
        while len(found) < count:
            try:
                drawn = (draw() for _ in range(self.max_tries))
                candidate = next(candidate for candidate in drawn if candidate not in self._seen)
            except StopIteration:
                break
            except NoCandidateError:
                if not self._seen:
                    raise
                break
            self._seen.add(candidate)
            found.append(Proposal(candidate, origin))
        return found

    def _parents(self) -> list[Candidate]:
        """Who mutates and crosses, best first."""
        return [candidate for candidate, _ in self.best(self.parents)]

    def _pick(self, parents: Sequence[Candidate]) -> Candidate:
        return parents[self._rng.integers(len(parents))]

    def _mutant(self, parents: Sequence[Candidate]) -> Candidate:
        return self.space.mutate(self._pick(parents), self.mutation_probability, self._rng)

    def _crossover(self, parents: Sequence[Candidate]) -> Candidate:
        first, second = self._pick(parents), self._pick(parents)
        return self.space.crossover(first, second, self._rng)
