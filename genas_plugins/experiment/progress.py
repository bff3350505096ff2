"""What a run shows of its progress, and the bars for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from genas_plugins._optional import require
from genas_plugins.experiment.profiling import SearchProfile
from genas_plugins.interrupts import raise_pending
from genas_plugins.search import Record

__all__ = ["Bar", "SearchProgress", "listener"]


class Bar:
    """A bar with what is known so far and the time left.

    Args:
        name: What progresses.
        total: Steps in all.
        done: Steps that were done before.

    Raises:
        MissingPackageError: tqdm is not installed.
    """

    def __init__(self, name: str, total: int, done: int) -> None:
        tqdm = require("tqdm", extra="nni", purpose="progress bars").tqdm
        self._bar = tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, mininterval=0.5)

    def step(self, shown: Mapping[str, Any]) -> None:
        """One step further; ``shown`` replaces the figures at the end unless it is empty."""
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class SearchProgress:
    """Shows candidates, the best score so far and the time left."""

    def __init__(self, progress: Callable[[str, int, int], Any], total: int) -> None:
        self._progress = progress
        self._total = total
        self._display: Any = None
        self._best: float | None = None

    def __call__(self, record: Record) -> None:
        if self._display is None:
            self._display = self._progress("search", self._total, 0)
        score = record.score
        if score is not None and (self._best is None or score > self._best):
            self._best = score
        shown = {"generation": record.generation + 1}
        if self._best is not None:
            shown["best"] = f"{self._best:.6g}"
        self._display.step(shown)
        if record.index + 1 == self._total:
            self._display.close()


def listener(
    progress: Callable[[str, int, int], Any] | None, total: int, profiler: SearchProfile | None, known: int
) -> Callable[[Record], None]:
    """What hears of each record of a search: the display, the profile, and a signal that is to end it.

    Args:
        progress: Makes the display; ``None`` for none.
        total: Number of candidates.
        profiler: Traces the candidates; ``None`` for none.
        known: Number of records that the history had.
    """
    display = None if progress is None else SearchProgress(progress, total)

    def listen(record: Record) -> None:
        raise_pending()
        # What the history knew is not scored again.
        if profiler is not None and record.index >= known:
            profiler.candidate()
        if display is not None:
            display(record)

    return listen
