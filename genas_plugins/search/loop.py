"""The search loop: the evolution proposes, a measurement scores, the history remembers."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from genas_plugins.scoring.combined import Measurement
from genas_plugins.scoring.flatness import MeasurementError
from genas_plugins.search.evolution import Candidate, Evolution, Proposal
from genas_plugins.search.history import History, HistoryError

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

    Returns:
        The records, one dictionary per candidate: ``index``, ``generation``, ``origin``, ``candidate``,
        ``status`` (``"ok"`` or ``"failed"``), ``score`` (``None`` if failed), ``seconds``, ``reason`` if
        failed, and what :meth:`Measurement.to_dict` gives.

    Raises:
        HistoryError: The history holds other candidates than this search proposes.
    """
    records: list[dict[str, Any]] = []
    known = [] if history is None else list(history.records)
    index = evolution.scored
    while not evolution.finished:
        scores: list[float | None] = []
        for proposal in evolution.ask():
            candidate = evolution.space.to_json(proposal.candidate)
            if index < len(known):
                record = known[index]
                if (record.get("index"), record.get("candidate")) != (
                    index,
                    candidate,
                ) or "score" not in record:
                    raise HistoryError(
                        f"Record {index} of {history.path if history else 'the history'} is not the candidate that "
                        "this search proposes there: the history belongs to other settings or another seed."
                    )
            else:
                record = _measured(evolution, proposal, candidate, index, measure)
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


def _measured(
    evolution: Evolution[Candidate],
    proposal: Proposal[Candidate],
    candidate: Any,
    index: int,
    measure: Callable[[Candidate], Measurement],
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "generation": evolution.generation,
        "origin": proposal.origin,
        "candidate": candidate,
    }
    start = time.perf_counter()
    try:
        record |= {"status": "ok", **measure(proposal.candidate).to_dict()}
    except MeasurementError as error:
        _logger.warning("Candidate %d failed: %s", index, error)
        record |= {"status": "failed", "score": None, "reason": str(error)}
    record["seconds"] = round(time.perf_counter() - start, 4)
    return record
