"""Measures the neighbourhoods of candidates, each architecture once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from genas_plugins.neighbourhood import Neighbourhood
from genas_plugins.scoring.accuracy import Accuracy
from genas_plugins.scoring.combined import Measurement
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.flatness import Flatness
from genas_plugins.scoring.neighbourhood import NeighbourhoodScore
from genas_plugins.search.in_flight import InFlight
from genas_plugins.search.lines import JsonLines
from genas_plugins.search.loop import candidate_seed
from genas_plugins.search.racing import Finish
from genas_plugins.search.sharing import SharedSearch

__all__ = ["NEIGHBOURS_FILE", "Neighbours"]

NEIGHBOURS_FILE = "neighbours.jsonl"
"""Beside a history: what was measured on single architectures, the neighbours of candidates and these themselves."""

NO_RACE = (
    "A race compares scores of single architectures, and a neighbourhood's is put together from many: leave out "
    "racing, or the neighbourhood."
)
_KEYS = {"candidate", "seconds"}


class Neighbours:
    """Measures whole generations by the score of a neighbourhood, as a race measures them by one of slices.

    Equal seeds give equal neighbourhoods, and what was measured before is not measured again: within a search, and when
    it is resumed.

    Args:
        space: What is searched.
        score: How a neighbourhood is put together.
        measure: Measures one architecture.
        seed: Seed of the samples of neighbours.
        in_flight: How many architectures are measured at a time.
        lines: Where single measurements are kept; ``None`` keeps them in memory alone.
        memory: What was measured before, by the architecture as JSON; what is measured is added.
        before: Candidates of the search that were measured before: what they needed is not new.

    Raises:
        HistoryError: A line is no measurement.
    """

    keep = 0

    def __init__(
        self,
        space: Any,
        score: NeighbourhoodScore,
        measure: Callable[[Any], Measurement],
        *,
        seed: int = 0,
        in_flight: InFlight | None = None,
        lines: JsonLines[dict[str, Any]] | None = None,
        memory: dict[str, dict[str, Any]] | None = None,
        before: Iterable[Any] = (),
    ) -> None:
        self.score = score
        self._space = space
        self._measure = measure
        self._seed = seed
        self._in_flight = in_flight or InFlight()
        self._lines = lines
        self.known: dict[str, dict[str, Any]] = {} if memory is None else memory
        for number, line in enumerate(lines.records if lines is not None else ()):
            if not line.keys() >= _KEYS or not {"score", "reason"} & line.keys():
                raise lines.error(number, "is not what an architecture was measured to be")
            self.known[json.dumps(line["candidate"])] = line
        # Not what is known: a search that is resumed counts as the first did.
        self._needed = {self._name(one) for candidate in before for one in (candidate, *self.around(candidate))}

    @property
    def cost(self) -> int:
        """Measurements that a candidate takes at most: one each for itself and its neighbours."""
        if self.score.size is not None:
            return 1 + self.score.size
        candidate = self._space.sample(np.random.default_rng(self._seed))
        return 1 + Neighbourhood(self._space, candidate, self.score.distance, inputs=self.score.inputs).size

    def around(self, candidate: Any) -> list[Any]:
        """The neighbours of a candidate that its score asks for: a function of seed and candidate."""
        near = Neighbourhood(self._space, candidate, self.score.distance, inputs=self.score.inputs)
        if self.score.size is None:
            return list(near)
        return near.sample(self.score.size, candidate_seed(self._seed, self._space.to_json(candidate)))

    def run(
        self, candidates: Sequence[Any], best: Sequence[Any] = (), shared: SharedSearch | None = None
    ) -> list[Finish]:
        """Measure one generation; see :meth:`genas_plugins.search.Race.run`."""
        wanted = [[candidate, *self.around(candidate)] for candidate in candidates]
        if shared is not None:
            first = shared.exchange(dict(self.known))[0]
            self.known.clear()
            self.known.update(first)
        missing: dict[str, Any] = {}
        new: list[list[str]] = []
        for architectures in wanted:
            named = {self._name(one): one for one in architectures}
            new.append([name for name in named if name not in self._needed])
            self._needed.update(named)
            missing |= {name: one for name, one in named.items() if name not in self.known}
        for line in self._measured(list(missing.values()), shared):
            self.known[json.dumps(line["candidate"])] = line
            if self._lines is not None:
                self._lines.append(line)
        return [self._finish(*pair) for pair in zip(wanted, new, strict=True)]

    def measure(self, candidate: Any) -> Measurement:
        """Measure one candidate's neighbourhood.

        Raises:
            MeasurementError: The candidate, or all of its neighbourhood, has no finite score.
        """
        (finish,) = self.run([candidate])
        if finish.measurement is None:
            raise MeasurementError(str(finish.reason))
        return finish.measurement

    def scores(self, candidate: Any) -> list[tuple[Any, float | None]]:
        """A candidate that was measured, and its neighbours, with their own scores; ``None`` where one failed."""
        return [(one, self.known[self._name(one)].get("score")) for one in (candidate, *self.around(candidate))]

    def _name(self, candidate: Any) -> str:
        return json.dumps(self._space.to_json(candidate))

    def _measured(self, missing: Sequence[Any], shared: SharedSearch | None) -> Iterable[dict[str, Any]]:
        if shared is None:
            yield from self._in_flight.map(self._line, missing)
            return
        at_a_time = shared.size * min(shared.exchange(self._in_flight.count))
        for start in range(0, len(missing), at_a_time):
            own = list(self._in_flight.map(self._line, missing[start : start + at_a_time][shared.rank :: shared.size]))
            parts = shared.exchange(own)
            # By turns, as they were dealt.
            yield from (part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part))

    def _line(self, candidate: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            found = self._measure(candidate).to_dict()
        except MeasurementError as error:
            found = {"reason": str(error)}
        return {
            "candidate": self._space.to_json(candidate),
            **found,
            "seconds": round(time.perf_counter() - start, 4),
        }

    def _finish(self, architectures: Sequence[Any], new: Sequence[str]) -> Finish:
        own, *others = (self.known[self._name(one)] for one in architectures)
        lines = [own, *others] if self.score.include_self else others
        scores = [line["score"] for line in lines if "score" in line]
        finish = Finish(seconds=sum(self.known[name]["seconds"] for name in new))
        if "score" not in own:
            finish.reason = own["reason"]
        elif not scores:
            finish.reason = f"None of the {len(others)} neighbours has a score; the first: {others[0]['reason']}"
        else:
            told = {"own": own["score"], "scores": len(scores), "failed": len(lines) - len(scores), "new": len(new)}
            finish.measurement = self._put_together(own, scores, told)
        return finish

    def _put_together(self, own: Mapping[str, Any], scores: Sequence[float], told: dict[str, Any]) -> Measurement:
        flat, top = None, None
        if "flatness" in own:
            values = own["flatness"], tuple(own["losses"]), tuple(own["sigmas"]), own["slope"], own["depth"]
            flat = Flatness(*values, self.score.score.alpha)
        if "top1" in own:
            top = Accuracy(own["top1"], own["top5"])
        return Measurement(self.score.of(scores), own["shares"], flat, own.get("angle"), top, told)
