"""The candidates of a search for workers elsewhere, who answer late, out of order, twice, or not at all."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from genas_plugins._messages import one_line
from genas_plugins.checks import check_count
from genas_plugins.search.evolution import Candidate, Evolution
from genas_plugins.search.history import History
from genas_plugins.search.lines import JsonLines
from genas_plugins.search.loop import check_known, describe
from genas_plugins.search.record import Record

__all__ = ["ANSWERS_FILE", "Dispatch", "Task"]

_logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"
"""Beside a history: answers that came before those of earlier candidates, until it is their turn."""


@dataclass(frozen=True)
class Task:
    """A candidate for a worker.

    Attributes:
        index: Number of the candidate in the search.
        candidate: The architecture as plain data.
    """

    index: int
    candidate: Any


class Dispatch(Generic[Candidate]):
    """Hands out the candidates of an evolution and writes the history of the search that one process would have run.

    A generation is told when all of its candidates are answered. Until then workers that outnumber what is left of it
    get nothing (:meth:`take`). A candidate whose worker was lost is handed out again; after ``tries`` times it counts
    as failed. An answer is on disk before it counts, so that a killed search measures no answered candidate again.

    Answers are data from elsewhere: what is no record of a measurement is refused, and nothing in it is executed.

    >>> from genas_plugins.spaces import NasBench201SearchSpace
    >>> dispatch = Dispatch(Evolution(NasBench201SearchSpace(), population=2, generations=1))
    >>> first, second = dispatch.take(), dispatch.take()
    >>> dispatch.take() is None, dispatch.answer(second.index, {"status": "ok", "score": 1.0, "shares": {}})
    (True, True)
    >>> dispatch.lost(first.index, "its machine was switched off")
    >>> dispatch.take() == first, dispatch.answer(0, {"status": "failed", "score": None, "reason": "the loss is nan"})
    (True, True)
    >>> dispatch.finished, [record.score for record in dispatch.records]
    (True, [None, 1.0])

    Args:
        evolution: Fresh.
        history: Records so far, to which new ones are appended.
        answers: Where answers wait for their turn.
        tries: How often a candidate is handed out before it has failed.
        on_record: Called with each record, replayed ones included, in the order of the candidates.
        on_generation: Called with the records of each generation, when the evolution was told their scores.

    Raises:
        HistoryError: The history holds other candidates than this search proposes.
        ValueError: ``tries`` is below 1.
    """

    def __init__(
        self,
        evolution: Evolution[Candidate],
        *,
        history: History | None = None,
        answers: JsonLines[Any] | None = None,
        tries: int = 3,
        on_record: Callable[[Record], None] | None = None,
        on_generation: Callable[[list[Record]], None] | None = None,
    ) -> None:
        self.evolution = evolution
        self.tries = check_count("tries", tries)
        self.records: list[Record] = []
        self._history = history
        self._answers_file = answers
        self._on_record = on_record
        self._on_generation = on_generation
        self._lost: Counter[int] = Counter()
        self._named: dict[int, dict[str, Any]] = {}
        self._waiting: deque[int] = deque()
        self._out: set[int] = set()
        self._answers: dict[int, Record] = {}
        if history is not None:
            history.check()
        self._known = [] if history is None else list(history.records)
        self._kept = {} if answers is None else {line.get("index"): line for line in answers.records}
        self._propose()

    @property
    def finished(self) -> bool:
        """All candidates of all generations are answered."""
        return not self._named

    @property
    def out(self) -> frozenset[int]:
        """Numbers of the candidates that are handed out and not answered."""
        return frozenset(self._out)

    def take(self) -> Task | None:
        """A candidate to measure; ``None`` if all that are known are handed out or answered."""
        if not self._waiting:
            return None
        index = self._waiting.popleft()
        self._out.add(index)
        return Task(index, self._named[index]["candidate"])

    def find(self, candidate: Any) -> int | None:
        """Take the candidate that a worker measures already, and give its number; ``None`` if nobody waits for it."""
        found = (index for index in self._waiting if self._named[index]["candidate"] == candidate)
        index = next(found, None)
        if index is not None:
            self._waiting.remove(index)
            self._out.add(index)
        return index

    def answer(self, index: int, line: Mapping[str, Any]) -> bool:
        """Take what was measured of a candidate.

        Args:
            index: Its number.
            line: What a record has beside what is known of the candidate: status, score, losses and so on.

        Returns:
            Whether it was news: a second answer, and one that is no record, change nothing.

        Raises:
            OSError: It cannot be written.
        """
        named = self._named.get(index)
        if named is None or index in self._answers or index < len(self.records):
            return False
        known = {key: value for key, value in named.items() if value is not None}
        try:
            record = Record.of({"seconds": 0.0, **line, **known})
        except ValueError as error:
            self.lost(index, f"the answer {error}")
            return False
        if record.status == "failed":
            _logger.warning("Candidate %d failed: %s", index, record.reason)
        if self._answers_file is not None and index > len(self.records):
            self._answers_file.append(record.to_dict())
        self._out.discard(index)
        if index in self._waiting:
            self._waiting.remove(index)
        self._answers[index] = record
        self._advance()
        return True

    def lost(self, index: int, reason: str) -> None:
        """A worker will not answer: the candidate is handed out again, or has failed.

        Args:
            index: Number of a candidate; nothing is done for one that nobody measures.
            reason: Completes "Candidate 3 was lost 3 times, at last because ...".

        Raises:
            OSError: Its failure cannot be written.
        """
        if index not in self._out:
            return
        self._lost[index] += 1
        told = one_line(reason, 300).rstrip(".")
        if self._lost[index] < self.tries:
            _logger.warning("Candidate %d is measured again: %s.", index, told)
            self._out.discard(index)
            self._waiting.appendleft(index)
            return
        times = f"{self.tries} times, at last because" if self.tries > 1 else "because"
        self.answer(index, {"status": "failed", "score": None, "reason": f"It was lost {times} {told}."})

    def _advance(self) -> None:
        """Append to the history what is next in order, and end generations that are complete."""
        while (record := self._answers.pop(len(self.records), None)) is not None:
            if self._history is not None:
                self._history.append(record)
            self._remember(record)
            if len(self.records) == max(self._named) + 1:
                self._end_generation()
                self._propose()

    def _remember(self, record: Record) -> None:
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    def _end_generation(self) -> None:
        told = self.records[min(self._named) :]
        self.evolution.tell([self.evolution.value_of(record) for record in told])
        if self._on_generation is not None:
            self._on_generation(told)

    def _propose(self) -> None:
        """The next generation of which a candidate is not answered; none at the end of the search."""
        while True:
            first = len(self.records)
            self._named = {item["index"]: item for item, _ in describe(self.evolution, self.evolution.ask(), first)}
            if not self._named:
                return
            for index, named in self._named.items():
                if index < len(self._known):
                    check_known(self._known[index], named["candidate"], self._history)
                    self._remember(self._known[index])
                    continue
                kept = self._kept.pop(index, None)
                # One of another search, or damaged, is measured anew.
                if kept is not None and kept.get("candidate") == named["candidate"]:
                    try:
                        self._answers[index] = Record.of(kept)
                        continue
                    except ValueError:
                        pass
                self._waiting.append(index)
            if len(self.records) == max(self._named) + 1:
                self._end_generation()
                continue
            self._advance()
            return
