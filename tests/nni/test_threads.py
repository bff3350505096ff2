"""A machine that others use: who trains and measures on how many threads, and that scores do not depend on it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.space import RawFormatModelSpace

from genas_plugins.correlation.run import choose, measure_all
from genas_plugins.correlation.settings import load_settings
from genas_plugins.darts.genotype import Genotype
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.spaces import NasBench201SearchSpace
from nni_strategy import DartsSpace, GeNAS, config
from nni_strategy.run import run_experiment
from nni_strategy.training import TrainingThreads, supernet_evaluator

ROOT = Path(__file__).parents[2]
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
# On its own cores, and nothing that says how many threads.
ON_CORES = """
import os, sys
os.sched_setaffinity(0, set(map(int, sys.argv[1].split(","))))
import torch
from genas_plugins.cli import main
assert torch.get_num_threads() <= len(os.sched_getaffinity(0))
print("threads", torch.get_num_threads())
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(threads: int | None) -> dict[str, Any]:
    return {
        "space": {"init_channels": 4, "num_cells": 3},
        "data": {"name": "digits", "train_images": 64, "validation_images": 64, "test_images": 32, "flip": False},
        "training": {"epochs": 1, "batch_size": 32, "accelerator": "cpu", "threads": threads},
        "score": {"metric": "angle+flatness", "recalibration_images": 32},
        "search": {"population": 5, "generations": 2, "parents": 2, "mutants": 2, "crossovers": 2},
    }


def timeless(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def on_cores(count: int, folder: Path) -> list[dict[str, Any]]:
    """The history of a search that sees so many cores."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings(1)))
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    chosen = ",".join(map(str, CORES[:count]))
    output = folder / str(count)
    command = ["search", "--config", str(file), "--output", str(output), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", ON_CORES, chosen, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"threads {count}" in done.stdout
    return timeless(output)


@pytest.mark.parametrize("count", [2, 4])
def test_a_search_ends_the_same_on_any_number_of_cores(count: int, tmp_path: Path) -> None:
    if len(CORES) < count:
        pytest.skip(f"This machine gives {len(CORES)} cores, {count} are needed.")
    # To the last bit, with the supernet trained anew.
    assert on_cores(count, tmp_path) == on_cores(1, tmp_path)


def test_scores_of_a_run_are_those_of_its_history_on_other_threads(tmp_path: Path) -> None:
    torch.set_num_threads(3)
    run_experiment(config.parse(settings(1)), tmp_path / "run")
    assert torch.get_num_threads() == 3
    for available in (1, 2):
        torch.set_num_threads(available)
        trained = Scorer.from_run(tmp_path / "run", device="cpu")
        for record in timeless(tmp_path / "run")[:3]:
            assert trained.measure(Genotype.from_code(record["candidate"])).score == record["score"]
        assert torch.get_num_threads() == available
    # Who asks for a number of threads has it.
    assert Scorer.from_run(tmp_path / "run", device="cpu", threads=2).in_flight.threads == 2


def test_correlations_are_the_same_on_any_number_of_threads(tmp_path: Path) -> None:
    experiment = settings(1)
    experiment["space"] = {"name": "nasbench201", "init_channels": 2, "cells_per_stage": 1}
    experiment["score"] = {"metric": "accuracy", "recalibration_images": 64, "recalibration_batch_size": 32}
    run_experiment(config.parse(experiment), tmp_path / "run")
    truth = {str(architecture): 1.0 for architecture in NasBench201SearchSpace().architectures()}
    columns = tmp_path / "columns.yaml"
    columns.write_text("- {name: a, metric: angle+flatness, sigmas: [0.01, 0.05]}\n- {name: b, metric: accuracy}\n")
    found = []
    for available in (1, 2, 3):
        torch.set_num_threads(available)
        trained = Scorer.from_run(tmp_path / "run", device="cpu")
        assert trained.in_flight.count == available
        state = torch.get_rng_state()
        found.append(
            measure_all(
                trained,
                choose(truth, 9, 0),
                load_settings(columns)[0],
                tmp_path / str(available),
                training_free=True,
            )
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] == found[2]


def data() -> SearchData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageTensors(pixels, torch.arange(32) % 10, tuple("0123456789"))
    third = (0.5, 0.5, 0.5)
    return SearchData(images, images, images, None, third, third, 10, "digits", 8)


class Counting(GeNAS):
    """Remembers how its candidates were measured."""

    def _flight(self, device: torch.device, *batches: Any) -> Any:
        self.used = super()._flight(device, *batches)
        return self.used


class Reread:
    """Batches of somebody's own."""

    def __init__(self, batches: Any) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


@pytest.mark.parametrize(
    ("space", "own", "count", "each"),
    [(DartsSpace(10, 4, 2), False, 2, 1), (DartsSpace(10, 4, 2), True, 1, 1), (NasBench201(4, 1, 10), False, 1, None)],
    ids=["networks of their own", "batches of somebody's own", "a path of the supernet"],
)
def test_the_strategy_chooses(space: Any, own: bool, count: int, each: int | None, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    evaluator = supernet_evaluator(
        data(), 1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    batches = {"validation_batches": Reread(evaluator.val_dataloaders)} if own else {}
    small = {"population": 3, "generations": 1, "parents": 1, "mutants": 1, "crossovers": 1}
    strategy = Counting(**small, recalibration_images=16, device="cpu", **batches)
    strategy.initialize(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    strategy.search()
    assert (strategy.used.count, strategy.used.threads) == (count, each)
    assert len(strategy.records) == 3


class Watched(TrainingThreads):
    """Remembers the number of threads at each step, and breaks at the second if it is told."""

    def __init__(self, threads: int | None, breaks: bool) -> None:
        super().__init__(threads)
        self.breaks = breaks
        self.seen: list[int] = []

    def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
        super().on_train_batch_end(*arguments, **named)
        self.seen.append(torch.get_num_threads())
        if self.breaks and len(self.seen) == 2:
            raise RuntimeError("broken")


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(("threads", "during"), [(1, 1), (None, 2)])
def test_a_training_has_its_threads_and_gives_them_back(
    threads: int | None, during: int, breaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    watched = Watched(threads, breaks)
    monkeypatch.setattr("nni_strategy.training.TrainingThreads", lambda *_, **__: watched)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    evaluator = supernet_evaluator(data(), 2, batch_size=16, threads=threads, **options)
    strategy = GeNAS(population=2, generations=1, parents=1, mutants=0, crossovers=0, recalibration_images=16)
    strategy.initialize(RawFormatModelSpace(DartsSpace(10, 4, 2), evaluator), SequentialExecutionEngine())
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            strategy.run()
    else:
        strategy.run()
    assert watched.seen == [during] * (2 if breaks else 4)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("wall", "cpu", "threads", "device", "told"),
    [
        (2.0, 1.0, None, "cpu", 1),
        (1.0, 1.6, None, "cpu", 0),
        (1.0, 0.9, None, "cpu", 0),
        (2.0, 1.0, 2, "cpu", 0),
        (2.0, 1.0, None, "cuda", 0),
    ],
)
def test_one_line_of_advice_where_steps_wait(
    wall: float,
    cpu: float,
    threads: int | None,
    device: str,
    told: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.set_num_threads(2)
    step = 0
    clocks = {"perf_counter": wall, "process_time": cpu}
    for name, seconds in clocks.items():
        monkeypatch.setattr(f"nni_strategy.training.time.{name}", lambda seconds=seconds: step * seconds)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), global_step=0)
    callback = TrainingThreads(threads)
    with caplog.at_level(logging.WARNING, "nni_strategy.training"):
        callback.on_train_start(trainer, None)
        for step in range(1, 100):
            trainer.global_step = step
            callback.on_train_batch_end(trainer, None, None, None, step)
    callback.on_train_end(trainer, None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    if told:
        assert "2.0 times as much wall-clock as CPU time" in lines[0] and "OMP_NUM_THREADS=1" in lines[0]


def test_a_run_remembers_the_threads_of_its_training(tmp_path: Path) -> None:
    experiment = config.parse(settings(1))
    (tmp_path / "config.yaml").write_text(config.dump(experiment))
    assert config.load(tmp_path / "config.yaml").training.threads == 1
    # The quickstart trains on one, other experiments on PyTorch's own number.
    trained_on = {name: config.load(name).training.threads for name in config.config_names()}
    assert {name for name, number in trained_on.items() if number is not None} == {"quickstart_digits"}
    assert trained_on["quickstart_digits"] == 1
