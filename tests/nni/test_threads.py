"""A machine that others use: who trains and measures on how many threads, and that scores do not depend on it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning import Callback

from genas_plugins.correlation.run import choose, measure_all
from genas_plugins.correlation.settings import load_settings
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment import config
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.spaces import NasBench201Architecture, NasBench201SearchSpace
from nni_strategy import DartsSpace, GeNAS, NasBench201Space
from nni_strategy.run import run_experiment
from nni_strategy.training import TrainingThreads, supernet_evaluator

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
# On so many cores, with as many threads as PyTorch takes there by itself.
ON_CORES = """
import os, torch
os.sched_setaffinity(0, {cores})
torch.set_num_threads({count})
"""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def timeless(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("count", [2, 4])
def test_a_search_ends_the_same_on_any_number_of_cores(count: int, genas: Any, tmp_path: Path) -> None:
    if len(CORES) < count:
        pytest.skip(f"This machine gives {len(CORES)} cores, {count} are needed.")
    for cores in (1, count):
        before = ON_CORES.format(cores=set(CORES[:cores]), count=cores)
        done = genas.search(tmp_path / str(cores), "training.epochs=1", "training.threads=1", before=before).wait()
        assert done.status == 0, done.stderr
    # To the last bit, with the supernet trained anew.
    assert timeless(tmp_path / str(count)) == timeless(tmp_path / "1")


@pytest.fixture(scope="module")
def run(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search with three candidates at a time, trained on one thread."""
    score = {"recalibration_images": 64, "recalibration_batch_size": 32}
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("threads") / "run"
    torch.set_num_threads(3)
    run_experiment(config.parse(tiny(training={"epochs": 1, "threads": 1}, score=score)), folder)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    return folder


def test_scores_of_a_run_are_those_of_its_history_on_other_threads(run: Path) -> None:
    for available in (1, 2):
        torch.set_num_threads(available)
        trained = Scorer.from_run(run, device="cpu")
        for record in timeless(run)[:3]:
            architecture = NasBench201Architecture.from_string(record["candidate"])
            assert trained.measure(architecture).score == record["score"]
        assert torch.get_num_threads() == available
    # Who asks for a number of threads has it.
    assert Scorer.from_run(run, device="cpu", threads=2).in_flight.threads == 2


def test_correlations_are_the_same_on_any_number_of_threads(run: Path, tmp_path: Path) -> None:
    truth = {str(architecture): 1.0 for architecture in NasBench201SearchSpace().architectures()}
    columns = tmp_path / "columns.yaml"
    columns.write_text("- {name: a, metric: angle+flatness, sigmas: [0.01, 0.05]}\n- {name: b, metric: accuracy}\n")
    found = []
    for available in (1, 3):
        torch.set_num_threads(available)
        trained = Scorer.from_run(run, device="cpu")
        assert trained.in_flight.count == available
        state = torch.get_rng_state()
        settings = load_settings(columns)[0]
        sample = choose(truth, 4, 0)
        found.append(measure_all(trained, sample, settings, tmp_path / str(available), training_free=True))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def data() -> SearchData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageTensors(pixels, torch.arange(32) % 10, tuple("0123456789"))
    third = (0.5, 0.5, 0.5)
    return SearchData(images, images, images, None, third, third, 10, "digits", 8)


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
    small = {"population": 2, "generations": 1, "parents": 1, "mutants": 1, "crossovers": 0, "sigmas": (0.01, 0.02)}
    strategy = GeNAS(**small, recalibration_images=16, device="cpu", **batches)
    strategy.initialize(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    strategy.search()
    assert (strategy.scorer.in_flight.count, strategy.scorer.in_flight.threads) == (count, each)
    assert len(strategy.records) == 2


class Witness(Callback):
    """Remembers the number of threads at each step, and breaks at the second if it is told."""

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks
        self.seen: list[int] = []

    def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
        self.seen.append(torch.get_num_threads())
        if self.breaks and len(self.seen) == 2:
            raise RuntimeError("broken")


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(("threads", "during"), [(1, 1), (None, 2)])
def test_a_training_has_its_threads_and_gives_them_back(
    threads: int | None, during: int, breaks: bool, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    witness = Witness(breaks)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    evaluator = supernet_evaluator(data(), 1, batch_size=11, threads=threads, callbacks=[witness], **options)
    strategy = GeNAS(population=1, generations=1, parents=1, mutants=0, crossovers=0, recalibration_images=16)
    strategy.initialize(RawFormatModelSpace(NasBench201Space(10, 4, 1), evaluator), SequentialExecutionEngine())
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            strategy.run()
    else:
        strategy.run()
    assert witness.seen == [during] * (2 if breaks else 3)
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
    for name, seconds in (("perf_counter", wall), ("process_time", cpu)):
        monkeypatch.setattr(time, name, lambda seconds=seconds: step * seconds)
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


def test_a_run_remembers_the_threads_of_its_training(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    experiment = config.parse(tiny(training={"threads": 1}))
    (tmp_path / "config.yaml").write_text(config.dump(experiment))
    assert config.load(tmp_path / "config.yaml").training.threads == 1
    # The quickstart trains on one, other experiments on PyTorch's own number.
    trained_on = {name: config.load(name).training.threads for name in config.config_names()}
    assert {name for name, number in trained_on.items() if number is not None} == {"quickstart_digits"}
    assert trained_on["quickstart_digits"] == 1
