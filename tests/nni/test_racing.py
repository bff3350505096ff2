"""Raced searches of supernets: the best and their scores are those of a search without racing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.space import RawFormatModelSpace
from torch import Tensor

from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.search import History
from nni_strategy.space import NasBench201Space
from nni_strategy.strategy import GeNAS
from nni_strategy.training import supernet_evaluator

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "population": 10,
    "generations": 2,
    "parents": 2,
    "mutants": 4,
    "crossovers": 4,
    "sigmas": (0.02, 0.05, 0.1),
}


def evaluator() -> Any:
    """One that is never trained."""
    pixels = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    part = ImageTensors(pixels, torch.arange(16) % 10, tuple("0123456789"))
    half = (0.5, 0.5, 0.5)
    data = SearchData(part, part, part, None, half, half, 10, "digits", 8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return supernet_evaluator(data, 1, batch_size=16, accelerator="cpu", enable_model_summary=False, **quiet)


def batches(count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def made(build: Callable[[], ModelSpace], images: int = 416, **changes: Any) -> GeNAS:
    """A strategy around a supernet whose candidates differ much, as those of a trained one do."""
    # Candidates are compared behind the first, the second and the last of four.
    validation = batches(images, 104, 0)
    settings = {**SMALL, "recalibration_batches": batches(32, 16, 1), "validation_batches": validation, **changes}
    strategy = GeNAS(**settings, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        strategy.initialize(RawFormatModelSpace(build(), evaluator()), SequentialExecutionEngine())
    with torch.no_grad():
        for parameter in strategy.supernet.parameters():
            if parameter.dim() == 2 and len(parameter) == 10:
                parameter *= 8.0
    return strategy


SPACES = {"own": lambda: NasBench201Space(10, 4, 1), "hub": lambda: NasBench201(4, 1, 10)}


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@cache
def raced_search(space: str, metric: str, images: int, generations: int) -> tuple[GeNAS, dict[str, Tensor]]:
    """A raced search that is not killed, and the weights before it; for reading only."""
    strategy = made(SPACES[space], images, metric=metric, generations=generations, racing=0.99)
    before = {name: value.clone() for name, value in strategy.supernet.state_dict().items()}
    strategy.search()
    return strategy, before


@pytest.mark.parametrize(
    ("space", "metric", "images"),
    [("own", "flatness", 416), ("own", "accuracy+flatness", 416), ("hub", "flatness", 208)],
)
def test_a_raced_search_finds_the_best_with_their_scores(space: str, metric: str, images: int) -> None:
    generations = 1 if space == "hub" else 2
    whole = made(SPACES[space], images, metric=metric, generations=generations)
    whole.search()
    raced, before = raced_search(space, metric, images, generations)
    assert raced.evolution.best(2) == whole.evolution.best(2)
    statuses = [record["status"] for record in raced.records]
    assert 2 < statuses.count("dropped") <= 10 * generations - 2
    for ours, theirs in zip(timeless(raced.records), timeless(whole.records), strict=True):
        if ours["status"] == "ok":
            # To the last bit.
            assert ours == theirs
        else:
            assert ours["candidate"] == theirs["candidate"]
            assert abs(ours["estimate"] - theirs["score"]) < 6 * ours["standard_error"]
            assert ours["images"] in (104, 208)
    assert all(torch.equal(value, before[name]) for name, value in raced.supernet.state_dict().items())


@pytest.mark.parametrize("killed_at", [3, 9, 13])
def test_a_raced_search_that_is_killed_goes_on(killed_at: int, tmp_path: Path) -> None:
    def kill(record: dict[str, Any]) -> None:
        if record["index"] == killed_at:
            raise KeyboardInterrupt

    path = tmp_path / "history.jsonl"
    with pytest.raises(KeyboardInterrupt):
        made(SPACES["own"], racing=0.99, history=History(path), on_record=kill).search()
    assert len(History(path).records) == killed_at + 1
    resumed = made(SPACES["own"], racing=0.99, history=History(path))
    resumed.search()
    whole, _ = raced_search("own", "flatness", 416, 2)
    assert timeless(resumed.records) == timeless(whole.records) == timeless(History(path).records)


def test_wrong_races_are_refused() -> None:
    with pytest.raises(ValueError, match=r"larger than 0.5 and smaller than 1, .* got 1.5"):
        GeNAS(racing=1.5)
    with pytest.raises(ValueError, match="'angle' reads no images"):
        GeNAS(metric="angle", racing=0.99)
    by_class = sorted(batches(416, 1, 0), key=lambda pair: int(pair[1]))
    with pytest.raises(ValueError, match="random order"):
        made(SPACES["own"], racing=0.99, validation_batches=by_class).search()


def test_without_racing_a_candidate_is_measured_as_before() -> None:
    """Nothing of a record is new, and the scores are those of one measurement each."""
    strategy = made(SPACES["own"], images=96, generations=1)
    strategy.search()
    for record in strategy.records:
        candidate = strategy.paths.search_space.from_json(record["candidate"])
        measured = strategy.scorer.measure(candidate).to_dict()
        assert {key: record[key] for key in measured} == measured
        named = {"index", "generation", "origin", "candidate", "status", "seconds"}
        assert record.keys() == measured.keys() | named


@pytest.fixture(scope="module")
def raced(genas: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The tiny search with racing, on images enough for rounds."""
    folder = tmp_path_factory.mktemp("raced") / "run"
    changes = ("search.racing=0.9", "data.validation_images=224", "score.batch_size=32", "score.metric=accuracy")
    return genas.search(folder, *changes, "training.epochs=1", "search.population=8").wait(), folder


def test_the_command_tells_what_racing_saved(raced: tuple[Any, Path], genas: Any, tmp_path: Path) -> None:
    done, folder = raced
    assert (done.status, done.stderr) == (0, "")
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    dropped = [record for record in records if record["status"] == "dropped"]
    assert dropped
    assert f"of {len(records)} architectures, {len(dropped)} dropped:" in done.stdout
    saved = sum(224 - record["images"] for record in dropped) / (224 * len(records))
    assert f"Racing saved {saved:.1%} of the image evaluations." in done.stdout
    # Of the best, no more are named than racing leaves certain.
    data = json.loads((folder / "architecture.json").read_text())
    assert len(data["top"]) == 2
    assert (data["provenance"]["dropped"], data["provenance"]["spared"]) == (len(dropped), round(saved, 4))
    assert genas("plot", "search", folder, tmp_path / "search.svg").status == 0
    assert "dropped" in (tmp_path / "search.svg").read_text()
    again = genas.search(folder, resume=True).wait()
    assert (again.status, again.stdout) == (0, done.stdout)


@pytest.mark.parametrize("setting", ["search.racing=0.9", "search.in_flight=2", "score.neighbourhood={}"])
def test_a_profile_is_of_candidates_one_by_one(setting: str, genas: Any, tmp_path: Path) -> None:
    done = genas("search", "--config", genas.config, "--set", setting, "--profile", "--output", tmp_path / "run")
    assert "leave out --profile, or set search.racing and score.neighbourhood to null and" in done.error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("racing")
    for name in ("racing", "scoring"):
        sys.modules.pop(name, None)


def test_the_benchmark_compares_searches(
    benchmark: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--searches", "1", "--population", "4", "--generations", "1", "--parents", "2"]
    arguments = [str(finished.path), *small, "--device", "cpu", "--check"]
    assert benchmark.main(arguments) == 0
    assert "the same top 2 in 1 of 1 searches" in capsys.readouterr().out
    # A search that finds others is told and fails the check.
    true = Scorer.measure

    def other(*parts: Any) -> Any:
        return dataclasses.replace(true(*parts), score=1.0)

    monkeypatch.setattr(Scorer, "measure", other)
    assert benchmark.main(arguments) == 1
    assert "the same top 2 in 0 of 1 searches" in capsys.readouterr().out
