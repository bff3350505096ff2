"""The search loop: the evolution proposes, a measurement scores, the history remembers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Sequence
from operator import itemgetter
from typing import Any

from genas_plugins.scoring.combined import Measurement
from genas_plugins.scoring.flatness import MeasurementError
from genas_plugins.search.evolution import Candidate, Evolution, Proposal
from genas_plugins.search.history import History, HistoryError, check_records
from genas_plugins.search.in_flight import InFlight
from genas_plugins.search.racing import Finish, Race
from genas_plugins.search.sharing import SharedSearch

__all__ = ["candidate_seed", "run_search"]

_logger = logging.getLogger(__name__)


def candidate_seed(seed: int, candidate: Any) -> int:
    """Seed of one candidate's noise: a function of the search's seed and the candidate alone.

    So a candidate has the same score whenever it is measured: after a resume, on another process, by itself.

    Args:
        seed: Of the search.
        candidate: Its plain JSON form.
    """
    text = json.dumps([seed, candidate], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def run_search(
    evolution: Evolution[Candidate],
    measure: Callable[[Candidate], Measurement],
    *,
    history: History | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    race: Race[Candidate] | None = None,
    shared: SharedSearch | None = None,
    in_flight: InFlight | None = None,
) -> list[dict[str, Any]]:
    """Run ``evolution`` to its end.

    Candidates that ``history`` already holds are not measured again, which is how a killed search goes on: the
    evolution is deterministic, so it proposes them in the same order.

    Args:
        evolution: Fresh, or restored by ``load_state_dict``.
        measure: Scores one candidate. A :class:`MeasurementError` marks the candidate as failed, with its
            reason; every other exception ends the search.
        history: Records so far, to which new ones are appended.
        on_record: Called with each record, replayed ones included, for a progress bar.
        race: Measures whole generations in place of ``measure`` and drops what cannot be among the best. Records
            are then written when the generation has ended; one that was cut off is measured anew, with the same end.
        shared: Processes that all call this function with equal arguments: of as many candidates as they have in flight
            each measures its part, in a race on every slice, and all return the same records, those of a search in one
            process. Where their histories differ, that of the first counts. An exception in one ends all.
        in_flight: How many candidates ``measure`` is called for at a time, one after another by default. The records
            come in the same order; their ``seconds`` are those in which others were measured as well. A race has its
            own.

    Returns:
        The records, one dictionary per candidate: ``index``, ``generation``, ``origin``, ``candidate``,
        ``status`` (``"ok"``, ``"failed"`` or, in a race, ``"dropped"``), ``score`` (``None`` unless ok), ``seconds``,
        ``reason`` if failed, and what :meth:`Measurement.to_dict` gives. If dropped: ``images`` seen, the score on
        these as ``estimate``, and its ``standard_error`` as an estimate of the score on all.

    Raises:
        HistoryError: The history holds other candidates than this search proposes.
        SharedSearchError: Another process failed.
    """
    in_flight = in_flight or InFlight()
    if shared is None:
        return _run(evolution, measure, history, on_record, race, None, in_flight)
    try:
        records = _run(evolution, measure, history, on_record, race, shared, in_flight)
    except BaseException as error:
        shared.tell(error)
        raise
    # Who has failed after the last candidate finds somebody to tell.
    shared.exchange(None)
    return records


def _run(
    evolution: Evolution[Candidate],
    measure: Callable[[Candidate], Measurement],
    history: History | None,
    on_record: Callable[[dict[str, Any]], None] | None,
    race: Race[Candidate] | None,
    shared: SharedSearch | None,
    in_flight: InFlight,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    known = []
    if history is not None:
        check_records(history)
        known = list(history.records)
    at_a_time = in_flight.count
    if shared is not None:
        told = shared.exchange((known, in_flight.count))
        known = told[0][0]
        # Machines may have different numbers of cores; all must take the same candidates at the same time.
        at_a_time = shared.size * min(count for _, count in told)
    index = evolution.scored
    while not evolution.finished:
        scores: list[float | None] = []
        proposals = evolution.ask()
        new = _new_records(evolution, proposals, index, len(known) - index, measure, race, shared, in_flight, at_a_time)
        # Closed at once when something fails: what is in flight is waited for, and no more is begun.
        with contextlib.closing(new):
            for proposal in proposals:
                candidate = evolution.space.to_json(proposal.candidate)
                if index < len(known):
                    record = known[index]
                    if (record.get("index"), record.get("candidate")) != (
                        index,
                        candidate,
                    ) or "score" not in record:
                        where = f"{history.path} (line {index + 1})" if history else "the history"
                        raise HistoryError(
                            f"Record {index} of {where} is not the candidate that this search proposes there: the "
                            "history belongs to other settings or another seed, or was changed. Go on with its own "
                            "settings, or remove this line and all after it, and what they measured is measured anew."
                        )
                else:
                    record = next(new)
                    if history is not None:
                        history.append(record)
                records.append(record)
                scores.append(record["score"])
                if on_record is not None:
                    on_record(record)
                index += 1
        if scores:
            evolution.tell(scores)
    return records


def _new_records(
    evolution: Evolution[Candidate],
    proposals: Sequence[Proposal[Candidate]],
    index: int,
    known: int,
    measure: Callable[[Candidate], Measurement],
    race: Race[Candidate] | None,
    shared: SharedSearch | None,
    in_flight: InFlight,
    at_a_time: int,
) -> Generator[dict[str, Any], None, None]:
    """Records of a generation's candidates behind the ``known`` first, each measured when it is asked for."""
    numbered = list(enumerate(proposals, index))[max(0, known) :]
    if race is not None:
        best = [candidate for candidate, _ in evolution.best(race.keep)]
        finishes = race.run([proposal.candidate for proposal in proposals], best, shared)
        for (number, proposal), finish in zip(numbered, finishes[max(0, known) :], strict=True):
            yield _named(evolution, proposal, number) | _finished(finish, number)
        return

    def measured(item: tuple[int, Proposal[Candidate]]) -> dict[str, Any]:
        return _measured(evolution, item[1], item[0], measure)

    if shared is None:
        yield from in_flight.map(measured, numbered)
        return
    for start in range(0, len(numbered), at_a_time):
        own = list(in_flight.map(measured, numbered[start : start + at_a_time][shared.rank :: shared.size]))
        told = (record for records in shared.exchange(own) for record in records)
        yield from sorted(told, key=itemgetter("index"))


def _named(evolution: Evolution[Candidate], proposal: Proposal[Candidate], index: int) -> dict[str, Any]:
    return {
        "index": index,
        "generation": evolution.generation,
        "origin": proposal.origin,
        "candidate": evolution.space.to_json(proposal.candidate),
    }


def _measured(
    evolution: Evolution[Candidate],
    proposal: Proposal[Candidate],
    index: int,
    measure: Callable[[Candidate], Measurement],
) -> dict[str, Any]:
    record = _named(evolution, proposal, index)
    start = time.perf_counter()
    try:
        record |= {"status": "ok", **measure(proposal.candidate).to_dict()}
    except MeasurementError as error:
        record |= _failed(str(error), index)
    record["seconds"] = round(time.perf_counter() - start, 4)
    return record


def _finished(finish: Finish, index: int) -> dict[str, Any]:
    seconds = round(finish.seconds, 4)
    if finish.measurement is None:
        return {**_failed(str(finish.reason), index), "seconds": seconds}
    if finish.error is None:
        return {"status": "ok", **finish.measurement.to_dict(), "seconds": seconds}
    seen = {"estimate": finish.measurement.score, "standard_error": finish.error, "images": finish.count}
    return {"status": "dropped", "score": None, **seen, "seconds": seconds}


def _failed(reason: str, index: int) -> dict[str, Any]:
    _logger.warning("Candidate %d failed: %s", index, reason)
    return {"status": "failed", "score": None, "reason": reason}
