"""``genas search --profile``: traces of both stages, which change nothing of the search."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins.experiment.profiling import SearchProfile, StageProfile
from genas_plugins.interrupts import exit_status, interruptible

TRACES = ["profile/scoring.json.gz", "profile/training.json.gz"]
# Time to hit a process in.
SLOW_CANDIDATES = """
import time
from genas_plugins.experiment.scorer import Scorer
def slow(*arguments, measure=Scorer.measure):
    time.sleep(0.15)
    return measure(*arguments)
Scorer.measure = slow
"""


def search(genas: Any, folder: Path, *options: Any, before: str = "", pictures: bool = False) -> Any:
    source = [] if "--resume" in options else ["--config", genas.config]
    command = ("search", *source, "--quiet", "--output", folder, *options)
    return genas.start(*command, before=before, pictures=pictures)


def written(folder: Path) -> list[str]:
    """Everything that a profile left, temporary files included."""
    inside = folder / "profile"
    names = [f"profile/{path.name}" for path in inside.iterdir()] if inside.exists() else []
    return sorted([*names, *(path.name for path in folder.glob("*profile*") if path.is_file())])


def trace(folder: Path, stage: str) -> dict[str, Any]:
    with gzip.open(folder / "profile" / f"{stage}.json.gz", "rt") as file:
        return json.load(file)


def steps(content: dict[str, Any]) -> int:
    return len({event["name"] for event in content["traceEvents"] if event["name"].startswith("ProfilerStep#")})


def test_a_gpu_that_the_stage_does_not_use_does_not_decide_the_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = StageProfile("scoring", tmp_path / "trace.json.gz", 20)
    matrix = torch.rand(400, 400, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        matrix[:2].relu()
        torch.mm(matrix, matrix)
        profile.step()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = [line.split()[0] for line in profile.end().splitlines() if line.lstrip().startswith("aten::")]
    assert rows[0] == "aten::mm" and "aten::relu" in rows


@pytest.fixture(scope="module")
def profiled(genas: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The tiny search with a profile of three steps and three candidates."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    return search(genas, folder, "--profile", "3", pictures=True).wait(), folder


def test_a_profile_changes_nothing_of_the_search(
    profiled: tuple[Any, Path], finished: Any, folder_at: Callable[[Path], Any]
) -> None:
    done, folder = profiled
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.endswith(f"Where the time goes is in {folder / 'profile.txt'}.\n")
    folder_at(folder).assert_same(finished)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in finished.path.iterdir()} | {"profile", "profile.txt"}


def test_traces_hold_so_many_steps_of_their_stage(profiled: tuple[Any, Path]) -> None:
    _, folder = profiled
    assert written(folder) == ["profile.txt", *TRACES]
    training, scoring = trace(folder, "training"), trace(folder, "scoring")
    assert (training["stage"], scoring["stage"]) == ("training", "scoring")
    assert (steps(training), steps(scoring)) == (3, 3)
    operators = [{event["name"] for event in content["traceEvents"]} for content in (training, scoring)]
    assert [{"aten::convolution", "aten::convolution_backward"} <= found for found in operators] == [True, False]
    assert "aten::convolution" in operators[1]


def test_the_table_names_the_operators_by_their_own_time(profiled: tuple[Any, Path]) -> None:
    training, scoring = (profiled[1] / "profile.txt").read_text().split("\n\n\n")
    assert training.startswith("training: 3 steps after a warm-up of 2, profile/training.json.gz\n")
    assert scoring.startswith("scoring: 3 steps after a warm-up of 2, profile/scoring.json.gz\n")
    for table in (training, scoring):
        rows = re.findall(r"^ *(\S.*?)  +([\d.]+)%", table, re.MULTILINE)
        shares = [float(share) for _, share in rows]
        assert len(rows) == 20
        assert shares == sorted(shares, reverse=True)
        assert any(name.startswith("aten::") for name, _ in rows)


def test_an_interrupted_stage_leaves_no_trace_and_is_profiled_when_it_goes_on(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    running = search(genas, folder.path, "--profile", "9", before=SLOW_CANDIDATES)
    assert running.wait(until=lambda: len(folder.records) >= 5) is None
    running.signal(signal.SIGINT)
    assert running.wait().status == 130
    # Eight training steps are over; of ten candidates, nine after the warm-up are too many.
    assert written(folder.path) == ["profile/training.json.gz"]
    # What comes after the last step, such as the checkpoint, is in one more.
    assert steps(trace(folder.path, "training")) == 8 - 2 + 1
    known = len(folder.records)
    assert 5 <= known < 8
    done = search(genas, folder.path, "--resume", "--profile", "9").wait()
    assert (done.status, done.stderr) == (0, "")
    assert steps(trace(folder.path, "scoring")) == 10 - known - 2 + 1
    text = (folder.path / "profile.txt").read_text()
    recorded = f"scoring: {10 - known - 2} steps after a warm-up of 2, profile/scoring.json.gz\n"
    assert text.startswith(f"training: not profiled, because this run had nothing left to do.\n\n{recorded}")
    folder.assert_same(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_a_step_of_the_profiler_is_an_interruption(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = torch.profiler.record_function.__enter__

    def signalled(region: Any) -> Any:
        if region.name == "ProfilerStep#2":
            os.kill(os.getpid(), number)
        return enter(region)

    monkeypatch.setattr(torch.profiler.record_function, "__enter__", signalled)
    told = []
    # In the background a shell lets its jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruptible(), pytest.raises(KeyboardInterrupt), SearchProfile(tmp_path, 9) as profile:
            for step in range(9):
                told.append(step)
                profile.candidate()
    finally:
        signal.signal(signal.SIGINT, before)
    # Three that begin the profiler and its first two steps.
    assert told == [0, 1, 2] and exit_status() == 128 + number
    assert written(tmp_path) == []


def test_a_finished_run_and_too_few_steps_say_that_there_is_nothing_to_profile(
    genas: Any, finished: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    few = ["--set", "training.epochs=1", "--set", "search.population=2", "--set", "search.generations=1"]
    few += ["--set", "search.mutants=1", "--set", "search.crossovers=1", "--profile"]
    assert search(genas, folder, *few).wait().status == 0
    reason = "not profiled, because this run had no more than the 2 steps of the warm-up left to do."
    assert (folder / "profile.txt").read_text() == f"training: {reason}\n\nscoring: {reason}\n"
    assert search(genas, folder, "--resume", "--profile").wait().status == 0
    reason = "not profiled, because this run had nothing left to do."
    assert (folder / "profile.txt").read_text() == f"training: {reason}\n\nscoring: {reason}\n"
    assert written(folder) == ["profile.txt"]


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_a_profile_of_nothing_is_refused_before_anything_is_written(genas: Any, tmp_path: Path, steps: str) -> None:
    done = search(genas, tmp_path / "run", "--profile", steps).wait()
    assert done.error == f"A profile needs at least 1 step, got {steps}."
    assert not (tmp_path / "run").exists()
