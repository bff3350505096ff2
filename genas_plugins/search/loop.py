"""The search loop: the evolution proposes, a measurement scores, the history remembers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Sequence
from operator import attrgetter
from typing import Any, Protocol

from genas_plugins.scoring.combined import Measurement
from genas_plugins.scoring.flatness import MeasurementError
from genas_plugins.search.budget import CostedSpace
from genas_plugins.search.evolution import Candidate, Evolution, Proposal
from genas_plugins.search.history import History, HistoryError
from genas_plugins.search.in_flight import InFlight
from genas_plugins.search.racing import Finish
from genas_plugins.search.record import Record
from genas_plugins.search.sharing import SharedSearch

__all__ = ["candidate_seed", "check_known", "describe", "run_search"]

_logger = logging.getLogger(__name__)


class Together(Protocol[Candidate]):
    """Measures the candidates of a generation together.

    Attributes:
        keep: How many of the best of earlier generations it wants to know.
    """

    keep: int

    def run(
        self, candidates: Sequence[Candidate], best: Sequence[Candidate] = (), shared: SharedSearch | None = None
    ) -> list[Finish]: ...


def candidate_seed(seed: int, candidate: Any) -> int:
    """Seed of one candidate's noise: a function of the search's seed and the candidate alone.

    So a candidate has the same score whenever it is measured: after a resume, on another process, by itself.

    Args:
        seed: Seed of the search.
        candidate: Its plain JSON form.
    """
    text = json.dumps([seed, candidate], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def run_search(
    evolution: Evolution[Candidate],
    measure: Callable[[Candidate], Measurement],
    *,
    history: History | None = None,
    on_record: Callable[[Record], None] | None = None,
    race: Together[Candidate] | None = None,
    shared: SharedSearch | None = None,
    in_flight: InFlight | None = None,
    on_generation: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """Run ``evolution`` to its end.

    Candidates that ``history`` already holds are not measured again, which is how a killed search goes on: the
    evolution is deterministic, so it proposes them in the same order.

    Args:
        evolution: Fresh, or restored by ``load_state_dict``.
        measure: Scores one candidate. A :class:`MeasurementError` marks the candidate as failed, with its
            reason; every other exception ends the search.
        history: Records so far, to which new ones are appended.
        on_record: Called with each record, replayed ones included, for a progress bar.
        race: Measures whole generations in place of ``measure``: a :class:`~genas_plugins.search.Race`, which drops
            what cannot be among the best, or :class:`~genas_plugins.experiment.neighbours.Neighbours`. Records are
            then written when the generation has ended; one that was cut off is measured anew, with the same end.
        shared: Processes that all call this function with equal arguments: of as many candidates as they have in flight
            each measures its part, in a race on every slice, and all return the same records, those of a search in one
            process. Where their histories differ, that of the first counts. An exception in one ends all.
        in_flight: How many candidates ``measure`` is called for at a time, one after another by default. The records
            come in the same order; their ``seconds`` are those in which others were measured as well. A race has its
            own.
        on_generation: Called with the records of each generation, replayed ones included, when the evolution was told
            their scores.

    Returns:
        One record a candidate.

    Raises:
        HistoryError: The history holds other candidates than this search proposes.
        SharedSearchError: Another process failed.
    """
    in_flight = in_flight or InFlight()
    if shared is None:
        return _run(evolution, measure, history, on_record, on_generation, race, None, in_flight)
    try:
        records = _run(evolution, measure, history, on_record, on_generation, race, shared, in_flight)
    except BaseException as error:
        shared.tell(error)
        raise
    # A failure after the last candidate is still reported.
    shared.exchange(None)
    return records


def _run(
    evolution: Evolution[Candidate],
    measure: Callable[[Candidate], Measurement],
    history: History | None,
    on_record: Callable[[Record], None] | None,
    on_generation: Callable[[list[Record]], None] | None,
    race: Together[Candidate] | None,
    shared: SharedSearch | None,
    in_flight: InFlight,
) -> list[Record]:
    records: list[Record] = []
    known = []
    if history is not None:
        history.check()
        known = list(history.records)
    at_a_time = in_flight.count
    if shared is not None:
        told = shared.exchange((known, in_flight.count))
        known = told[0][0]
        # Machines may have different numbers of cores; all must take the same candidates at the same time.
        at_a_time = shared.size * min(count for _, count in told)
    index = evolution.scored
    while not evolution.finished:
        scores: list[Any] = []
        proposals = evolution.ask()
        named = describe(evolution, proposals, index)
        new = _new_records(evolution, named, len(known) - index, measure, race, shared, in_flight, at_a_time)
        # Closed at once when something fails: what is in flight is waited for, and no more is begun.
        with contextlib.closing(new):
            for name, _ in named:
                candidate = name["candidate"]
                if index < len(known):
                    record = known[index]
                    check_known(record, candidate, history)
                else:
                    record = next(new)
                    if history is not None:
                        history.append(record)
                records.append(record)
                scores.append(evolution.value_of(record))
                if on_record is not None:
                    on_record(record)
                index += 1
        if scores:
            told = records[-len(scores) :]
            evolution.tell(scores, sum((record.neighbourhood or {"new": 1}).get("new", 1) for record in told))
            if on_generation is not None:
                on_generation(told)
    return records


def _new_records(
    evolution: Evolution[Candidate],
    named: Sequence[tuple[dict[str, Any], Candidate]],
    known: int,
    measure: Callable[[Candidate], Measurement],
    race: Together[Candidate] | None,
    shared: SharedSearch | None,
    in_flight: InFlight,
    at_a_time: int,
) -> Generator[Record, None, None]:
    """Records of a generation's candidates behind the ``known`` first, each measured when it is asked for."""
    left = named[max(0, known) :]
    if race is not None:
        best = [candidate for candidate, _ in evolution.best(race.keep)]
        finishes = race.run([candidate for _, candidate in named], best, shared)
        for (name, _), finish in zip(left, finishes[max(0, known) :], strict=True):
            yield _finished(name, finish)
        return

    def measured(item: tuple[dict[str, Any], Candidate]) -> Record:
        return _measured(*item, measure)

    if shared is None:
        yield from in_flight.map(measured, left)
        return
    for start in range(0, len(left), at_a_time):
        own = list(in_flight.map(measured, left[start : start + at_a_time][shared.rank :: shared.size]))
        told = (record for records in shared.exchange(own) for record in records)
        yield from sorted(told, key=attrgetter("index"))


def check_known(record: Record, candidate: Any, history: History | None) -> None:
    """Raise if a record of the history is not that of the candidate that a search proposes there.

    Args:
        record: What the history has.
        candidate: The proposal as plain data.
        history: For the message.

    Raises:
        HistoryError: It is another one.
    """
    if record.candidate == candidate:
        return
    where = f"{history.path} (line {record.index + 1})" if history else "the history"
    raise HistoryError(
        f"Record {record.index} of {where} is not the candidate that this search proposes there: the history belongs "
        "to other settings or another seed, or was changed. Go on with its own settings, or remove this line and all "
        "after it, and what they measured is measured anew."
    )


def describe(
    evolution: Evolution[Candidate], proposals: Sequence[Proposal[Candidate]], first: int
) -> list[tuple[dict[str, Any], Candidate]]:
    """What is known of proposals before they are measured, and the proposals."""
    # Now, not when each is measured: latency is taken alone, and of all processes by the first.
    costed = isinstance(evolution.space, CostedSpace)
    return [
        (
            {
                "index": index,
                "generation": evolution.generation,
                "origin": proposal.origin,
                "candidate": evolution.space.to_json(proposal.candidate),
                "costs": evolution.space.costs(proposal.candidate) if costed else None,
            },
            proposal.candidate,
        )
        for index, proposal in enumerate(proposals, first)
    ]


def _measured(named: dict[str, Any], candidate: Candidate, measure: Callable[[Candidate], Measurement]) -> Record:
    start = time.perf_counter()

    def seconds() -> float:
        return round(time.perf_counter() - start, 4)

    try:
        measurement = measure(candidate)
    except MeasurementError as error:
        return _failed(named, str(error), seconds())
    return Record.measured(measurement, **named, seconds=seconds())


def _finished(named: dict[str, Any], finish: Finish) -> Record:
    seconds = round(finish.seconds, 4)
    if finish.measurement is None:
        return _failed(named, str(finish.reason), seconds)
    if finish.error is None:
        return Record.measured(finish.measurement, **named, seconds=seconds)
    seen = {"estimate": finish.measurement.score, "standard_error": finish.error, "images": finish.count}
    return Record(status="dropped", **named, **seen, seconds=seconds)


def _failed(named: dict[str, Any], reason: str, seconds: float) -> Record:
    _logger.warning("Candidate %d failed: %s", named["index"], reason)
    return Record(status="failed", **named, reason=reason, seconds=seconds)
