"""Where the time of a search goes: a trace of the first steps of training and of the first candidates."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from genas_plugins.files import atomic_path, write_text
from genas_plugins.interrupts import held

__all__ = ["WARM_UP", "SearchProfile", "StageProfile"]

WARM_UP = 2
_FOLDER = "profile"
_TABLE_FILE = "profile.txt"
_OPERATORS = 20


class StageProfile:
    """A trace of some steps of one stage, after a warm-up of :data:`WARM_UP` steps.

    Recording changes no number: it only watches. Nothing is written before it has ended.

    Args:
        name: Name of the stage; the trace has it under ``"stage"``.
        path: The trace to write, for ``chrome://tracing`` or Perfetto: ``.json.gz``.
        steps: How many to record.

    Raises:
        ValueError: ``steps`` is below 1.
    """

    def __init__(self, name: str, path: Path, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"A profile needs at least 1 step, got {steps}.")
        self.name = name
        self.path = path
        self.steps = steps
        self._done = 0
        self._report: str | None = None
        self._profiler: profile | None = None

    def step(self) -> None:
        """Tell that a step has ended."""
        if self._report is not None:
            return
        self._done += 1
        # Between its steps torch's profiler cannot be stopped: it raises, in place of the interruption.
        with held():
            if self._profiler is None:
                self._start()
                return
            self._profiler.step()
        if self._done == WARM_UP + self.steps:
            self.end()

    def end(self) -> str:
        """Tell that the stage has ended, and write what was recorded of it.

        Returns:
            The operators that took most time, or why there are none.

        Raises:
            OSError: The trace cannot be written; an older one is left as it was.
        """
        if self._report is None:
            self._report = self._written(self._stop(), self._done - WARM_UP)
        return self._report

    def abandon(self) -> None:
        """Stop without writing anything."""
        self._stop()

    def _written(self, profiler: profile | None, recorded: int) -> str:
        if profiler is None or recorded < 1:
            left = f"no more than the {WARM_UP} steps of the warm-up" if self._done else "nothing"
            return f"{self.name}: not profiled, because this run had {left} left to do."
        self.path.parent.mkdir(exist_ok=True)
        with atomic_path(self.path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        events = profiler.key_averages()
        # Not whether there is a GPU: a search that runs on the CPU beside it takes no time there.
        on_device = any(event.self_device_time_total > 0 for event in events)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = events.table(sort_by=order, row_limit=_OPERATORS)
        place = f"{self.path.parent.name}/{self.path.name}"
        return f"{self.name}: {recorded} steps after a warm-up of {WARM_UP}, {place}\n{table}"

    def _start(self) -> None:
        # Kineto, torch's profiler, tells on standard error what is of no use to who runs a search.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # One step of the warm-up is over; the profiler itself wants one more.
        plan = schedule(wait=0, warmup=WARM_UP - 1, active=self.steps, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan)
        self._profiler.start()
        self._profiler.add_metadata("stage", self.name)

    def _stop(self) -> profile | None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler


class SearchProfile:
    """The profiles of both stages of a search; a context within which they are recorded.

    Leaving it writes what was recorded of the candidates; leaving it by an exception drops what is not written yet.
    ``profile/training.json.gz`` and ``profile/scoring.json.gz`` are the traces, ``profile.txt`` has the operators that
    took most time by themselves. A stage of which nothing is left keeps the trace of an earlier run.

    Args:
        folder: Run folder; must exist when the first stage ends.
        steps: Training steps and candidates to record.

    Raises:
        ValueError: ``steps`` is below 1.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._training, self._scoring = (
            StageProfile(name, folder / _FOLDER / f"{name}.json.gz", steps) for name in ("training", "scoring")
        )

    def training_step(self) -> None:
        """Tell that a training step has ended."""
        self._training.step()

    def training_end(self) -> None:
        """Tell that the training has ended."""
        self._training.end()

    def candidate(self) -> None:
        """Tell that a candidate has been scored."""
        self._scoring.step()

    def __enter__(self) -> SearchProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._training.abandon()
            self._scoring.abandon()
            return
        reports = [self._training.end(), self._scoring.end()]
        write_text(self._folder / _TABLE_FILE, "\n\n".join(reports) + "\n")
