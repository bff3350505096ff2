"""Racing: candidates that cannot reach the best any more are not measured on further images.

All candidates of a generation are measured on a first slice of the validation images, those that are left on the
next, and so on, in the manner of Hoeffding races (Maron and Moore, NIPS 1993) and of F-Race (Birattari et al., GECCO
2002). What counts is the score on all ``N`` images, which the search would have measured. The first ``n`` of them, in
random order, are a sample without replacement, so that the standard error of a mean has the factor ``1 - n / N`` and
is 0 at the end.

**The test.** Candidate ``c`` is worse than ``t`` where the difference of their values on the same ``n`` images exceeds
``q`` standard errors of the paired difference of their influences (:mod:`genas_plugins.scoring.partial`), and what
bends in ``t``'s score can hide. It is dropped when ``k`` candidates are better than it, each by itself: the candidates
of the generation that are left, and the best ``k`` of the generations before.

**What the confidence is worth.** Suppose ``c`` is among the true best ``k``. Then at most ``k - 1`` others are better,
and of the ``m - k`` that are not, some must have won by chance; by Markov's inequality and the union over ``r`` rounds
that happens with a probability of at most ``r (m - k) p`` where each test errs with probability ``p``. So ``q`` is the
quantile of Student's distribution with ``n - 1`` degrees of freedom at ``p = (1 - confidence) / (r (m - k))``, and a
candidate that belongs to the best stays in the race with a probability of at least ``confidence``.

It holds as far as means of ``n`` paired differences are normal, far out in their tails (``q`` is 4 to 5). For losses
with heavy tails they are not quite, in the first slice above all: a rare image on which the *better* candidate fails
badly may not have come up. Slices therefore begin at 100 images. The curvature of the score, ``1 / x``, is neglected
where flatness is combined with another metric; with flatness alone nothing is, as ``1 / F`` is compared. Its kinks,
where a difference of losses changes sign, are accounted for. ``tests/core/test_racing.py`` holds it against
simulations.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from scipy.stats import chi2_contingency, t

from genas_plugins.scoring.combined import Measurement
from genas_plugins.scoring.flatness import MeasurementError
from genas_plugins.scoring.partial import Linearised
from genas_plugins.search.in_flight import InFlight
from genas_plugins.search.record import Record
from genas_plugins.search.sharing import SharedSearch

__all__ = [
    "LEAST_IMAGES",
    "Entrant",
    "Finish",
    "Race",
    "beaten",
    "check_confidence",
    "check_order",
    "round_ends",
    "spared_images",
]

LEAST_IMAGES = 100
"""Images of the first slice, at least: below, a mean of losses is not nearly normal."""

_PARTS = (1 / 8, 1 / 4, 1 / 2)
_LEAST_PVALUE = 1e-9

Candidate = TypeVar("Candidate", bound=Hashable)


class Entrant(Protocol):
    """A candidate in a race, measured on some slices of the images."""

    @property
    def count(self) -> int:
        """Images seen so far."""

    def advance(self) -> None:
        """Measure the next slice; a :class:`MeasurementError` ends the candidate."""

    def linearise(self, count: int) -> Linearised:
        """The score near the means of the first ``count`` images."""

    def measurement(self) -> Measurement:
        """The score on the images seen so far."""

    def standard_error(self, total: int) -> float:
        """Standard error of the score so far as an estimate of that on ``total`` images."""

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far, for another process."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another process is."""


@dataclass
class Finish:
    """How a candidate came out of a race.

    Attributes:
        measurement: On all images; on those it has seen if it was dropped; ``None`` if it failed.
        count: Images seen.
        error: Standard error of the score of a candidate that was dropped; ``None`` for the others.
        reason: Why a candidate failed.
        seconds: Spent on it.
    """

    measurement: Measurement | None = None
    count: int = 0
    error: float | None = None
    reason: str | None = None
    seconds: float = 0.0


def check_confidence(confidence: float) -> float:
    """Return the confidence of a race.

    Raises:
        ValueError: It is not larger than 0.5 and smaller than 1.
    """
    if not 0.5 < confidence < 1.0:
        raise ValueError(
            f"racing must be a confidence larger than 0.5 and smaller than 1, for instance 0.999, or None for no race, "
            f"got {confidence}."
        )
    return confidence


def round_ends(sizes: Sequence[int]) -> list[int]:
    """After how many batches candidates are compared: an eighth, a quarter, half of the images, and all.

    Slices are whole batches, so that sums are added up as without racing. A comparison below :data:`LEAST_IMAGES`
    images is left out.

    Args:
        sizes: Images of each batch.
    """
    seen = list(itertools.accumulate(sizes))
    ends = {next(i for i, count in enumerate(seen, 1) if count >= part * seen[-1]) for part in _PARTS}
    return [*sorted(end for end in ends if end < len(sizes) and seen[end - 1] >= LEAST_IMAGES), len(sizes)]


def check_order(labels: np.ndarray, count: int) -> None:
    """Raise if images are not in random order: their first ``count`` say nothing about the others.

    Args:
        labels: ``(N,)``, of all images in their order.
        count: Number of images in the first slice.

    Raises:
        ValueError: The classes of the first ``count`` are not those of the rest (chi-square test of homogeneity).
    """
    if count >= len(labels):
        return
    number = np.unique(labels, return_inverse=True)[1]
    table = np.stack([np.bincount(part, minlength=number.max() + 1) for part in (number[:count], number[count:])])
    if table.shape[1] > 1 and chi2_contingency(table).pvalue < _LEAST_PVALUE:
        raise ValueError(
            f"Racing needs validation images in random order, but the first {count} of {len(labels)} have other "
            "classes than the rest: shuffle them once, with a fixed seed, or search without racing."
        )


def beaten(entrants: Sequence[Linearised], total: int, *, keep: int, confidence: float, rounds: int = 1) -> list[bool]:
    """Which candidates are not among the best ``keep``; see the module for the test and its confidence.

    Args:
        entrants: Linearised on the same images.
        total: Number of images on which scores are to be compared.
        keep: How many are of interest.
        confidence: With which one of these is not called beaten in all ``rounds`` together.
        rounds: How many such calls there are.
    """
    if len(entrants) <= keep:
        return [False] * len(entrants)
    influence = np.stack([entrant.influence for entrant in entrants])
    count = influence.shape[1]
    quantile = float(t.isf((1.0 - confidence) / (rounds * (len(entrants) - keep)), count - 1))
    products = influence @ influence.T / (count - 1)
    own = products.diagonal()
    # Rounding must not make a difference of equals negative.
    variances = np.maximum(0.0, own[:, None] + own[None, :] - 2.0 * products)
    reach = quantile * math.sqrt((1.0 - count / total) / count)
    values = np.array([entrant.value for entrant in entrants])
    sure = np.array([entrant.value - entrant.overestimate(reach) for entrant in entrants])
    # Row t, column c: t is better than c.
    better = sure[:, None] - values[None, :] > reach * np.sqrt(variances)
    return (better.sum(0) >= keep).tolist()


def spared_images(records: Iterable[Record], total: int) -> float:
    """Fraction of the image evaluations that a race saved, from the records of its search.

    Candidates that failed count as if they had been measured on all images.

    Args:
        records: Records of the history; at least one.
        total: Validation images.
    """
    seen = [total if record.images is None else record.images for record in records]
    return 1.0 - sum(seen) / (total * len(seen))


@dataclass
class Race(Generic[Candidate]):
    """Measures generations of candidates, each on as many images as its place among the best asks for.

    A candidate that ends the race has the score that it has without. Equal seeds give equal races: nothing is
    remembered that cannot be measured anew, which is what a resumed search does.

    Args:
        enter: Makes a candidate's entrant, which has seen nothing yet.
        ends: Images seen after each round, increasing; the last is all.
        confidence: With which a candidate of the best is not dropped, larger than 0.5 and smaller than 1.
        keep: How many of all candidates so far are of interest: the parents of the next generation.
        in_flight: How many candidates are measured at a time.

    Raises:
        ValueError: The confidence is out of its range.
    """

    enter: Callable[[Candidate], Entrant]
    ends: Sequence[int]
    confidence: float
    keep: int
    in_flight: InFlight = field(default_factory=InFlight)
    _best: dict[Candidate, Entrant] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def run(
        self, candidates: Sequence[Candidate], best: Sequence[Candidate], shared: SharedSearch | None = None
    ) -> list[Finish]:
        """Measure one generation.

        Args:
            candidates: To be measured.
            best: The best ``keep`` of earlier generations, as far as there are any. Those that this object has not
                measured itself are measured on all images.
            shared: Processes that all run this race: each measures its part of the candidates on a slice, and what the
                first decides is decided.

        Returns:
            One finish a candidate.

        Raises:
            MeasurementError: One of ``best`` has no finite score.
        """
        leaders = {candidate: self._best.get(candidate) or self.enter(candidate) for candidate in best}
        self._complete(list(leaders.values()), shared)
        entrants = [self.enter(candidate) for candidate in candidates]
        finishes = [Finish() for _ in candidates]
        running = list(range(len(candidates)))
        dropped: list[int] = []
        for number, end in enumerate(self.ends):
            running = self._advance(running, entrants, finishes, end, shared)
            if number == len(self.ends) - 1:
                break
            lost = self._beaten([*leaders.values(), *(entrants[i] for i in running)], end)[len(leaders) :]
            lost = _agreed(lost, shared)
            dropped += [i for i, is_lost in zip(running, lost, strict=True) if is_lost]
            running = [i for i, is_lost in zip(running, lost, strict=True) if not is_lost]
        # A candidate that failed after a comparison may be the one that others were not as good as: these go on.
        if any(finish.reason is not None and finish.count > self.ends[0] for finish in finishes):
            running += self._advance(dropped, entrants, finishes, self.ends[-1], shared)
            dropped = []
        for i in (*running, *dropped):
            finishes[i].measurement = entrants[i].measurement()
            finishes[i].count = entrants[i].count
        for i in dropped:
            finishes[i].error = entrants[i].standard_error(self.ends[-1])
        whole = {**leaders, **{candidates[i]: entrants[i] for i in running}}
        ranked = sorted(whole, key=lambda candidate: -whole[candidate].measurement().score)
        self._best = {candidate: whole[candidate] for candidate in _agreed(ranked[: self.keep], shared)}
        return _agreed(finishes, shared)

    def _beaten(self, entrants: Sequence[Entrant], end: int) -> list[bool]:
        return beaten(
            [entrant.linearise(end) for entrant in entrants],
            self.ends[-1],
            keep=self.keep,
            confidence=self.confidence,
            rounds=len(self.ends) - 1,
        )

    def _advance(
        self,
        running: Sequence[int],
        entrants: Sequence[Entrant],
        finishes: list[Finish],
        end: int,
        shared: SharedSearch | None,
    ) -> list[int]:
        """Bring entrants to ``end`` images, and return those that did not fail."""

        def advance(i: int) -> None:
            start = time.perf_counter()
            try:
                while entrants[i].count < end:
                    entrants[i].advance()
            except MeasurementError as error:
                finishes[i].reason, finishes[i].count = str(error), end
            finishes[i].seconds += time.perf_counter() - start

        own = running if shared is None else running[shared.rank :: shared.size]
        for _ in self.in_flight.map(advance, own):
            pass
        if shared is not None:
            told = shared.exchange([(i, finishes[i], entrants[i].state_dict()) for i in own])
            for rank, others in enumerate(told):
                for i, finish, state in others if rank != shared.rank else ():
                    finishes[i] = finish
                    entrants[i].load_state_dict(state)
        return [i for i in running if finishes[i].reason is None]

    def _complete(self, entrants: Sequence[Entrant], shared: SharedSearch | None) -> None:
        """Bring entrants to the end, as a resumed search must with what it has not measured itself."""
        behind = [i for i, entrant in enumerate(entrants) if entrant.count < self.ends[-1]]
        finishes = [Finish() for _ in entrants]
        self._advance(behind, entrants, finishes, self.ends[-1], shared)
        for finish in finishes:
            if finish.reason is not None:
                raise MeasurementError(finish.reason)


def _agreed(item: Any, shared: SharedSearch | None) -> Any:
    """What the first process says: another's arithmetic may round otherwise."""
    return item if shared is None else shared.exchange(item)[0]
