"""Several objectives: ranks and distances by brute force, a search that finds a known front, resumes and is drawn."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from genas_plugins.plotting import plot_front
from genas_plugins.scoring import Measurement, MeasurementError
from genas_plugins.search import CostedSpace, Evolution, History, InFlight, ParetoEvolution, run_search
from genas_plugins.search.pareto import check_objectives, crowding_distances, evolution_for, pareto_ranks
from genas_plugins.spaces import NasBench201SearchSpace

SPACE = NasBench201SearchSpace()


def cost(architecture: Any) -> float:
    return float(sum(architecture.operations.count(name) for name in ("nor_conv_1x1", "nor_conv_3x3")))


def measure(architecture: Any) -> Measurement:
    """Most with 3x3 convolutions on the first edges: of each cost there is one best architecture."""
    weights = (13, 11, 7, 5, 3, 2)
    convolutions = [name == "nor_conv_3x3" for name in architecture.operations]
    poolings = [name == "avg_pool_3x3" for name in architecture.operations]
    return Measurement(float(sum(w * (c - 0.5 * p) for w, c, p in zip(weights, convolutions, poolings, strict=True))))


# With one to six convolutions on the edges that count most; with none at most 0.
BEST = [(float(sum((13, 11, 7, 5, 3, 2)[:count])), -float(count)) for count in range(7)]


def pareto(seed: int = 0, **settings: Any) -> ParetoEvolution[Any]:
    space = CostedSpace(SPACE, {"convolutions": cost}, {})
    settings = {"population": 20, "generations": 15, "mutation_probability": 0.2, **settings}
    return ParetoEvolution(space, ("score", "convolutions"), seed=seed, **settings)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_ranks_are_those_of_peeling_by_hand(objectives):
    values = np.random.default_rng(objectives).integers(0, 6, (60, objectives)).astype(float)
    left, expected, rank = set(range(60)), {}, 0
    while left:
        front = {
            i for i in left if not any((values[j] >= values[i]).all() and (values[j] > values[i]).any() for j in left)
        }
        expected |= dict.fromkeys(front, rank)
        left, rank = left - front, rank + 1
    assert pareto_ranks(values).tolist() == [expected[i] for i in range(60)]


def test_distances_are_shares_of_the_range_and_infinite_at_the_ends():
    # Gaps of the neighbours: 6 - 0 of 10 and 10 - 4 of 10; then 10 - 1 of 10 and 4 - 0 of 10.
    assert crowding_distances([(0, 10), (1, 4), (6, 0.5), (10, 0)]).tolist() == pytest.approx(
        [np.inf, 0.6 + 0.95, 0.9 + 0.4, np.inf]
    )
    assert crowding_distances([(1, 1)]).tolist() == [np.inf]
    assert crowding_distances([(2, 1), (2, 0), (2, 0.5), (2, 0)]).tolist() == [np.inf, np.inf, 1.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_found_where_random_search_misses_it(seed):
    found, random = pareto(seed), pareto(seed, mutants=0, crossovers=0)
    for evolution in (found, random):
        assert len(run_search(evolution, measure)) == 300
    values = [value for _, value in found.front()]
    assert len(set(values) & set(BEST)) >= 5
    assert len({value for _, value in random.front()} & set(BEST)) <= 3
    # None of the front dominates another, and none of all dominates one of it.
    assert [measure(architecture).score for architecture, _ in found.front()] == [value[0] for value in values]
    assert pareto_ranks(values).max() == 0
    assert [value[0] for value in values] == sorted((value[0] for value in values), reverse=True)


def test_some_of_the_front_are_its_ends_and_what_is_far_from_others():
    evolution = pareto()
    run_search(evolution, measure)
    front = [architecture for architecture, _ in evolution.front()]
    some = [architecture for architecture, _ in evolution.best(3)]
    assert len(some) == 3 and some == [architecture for architecture in front if architecture in some]
    scores = [measure(architecture).score for architecture in front]
    assert measure(some[0]).score == max(scores) and measure(some[-1]).score == min(scores)
    assert [architecture for architecture, _ in evolution.best()] == front


def test_a_resumed_search_ends_as_an_uninterrupted_one(tmp_path: Path):
    whole = pareto()
    expected = [record.to_dict()["candidate"] for record in run_search(whole, measure)]
    # From the state of the evolution, through JSON as a file has it.
    first = pareto(generations=6)
    begun = run_search(first, measure)
    second = pareto()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = run_search(second, measure)
    assert [record.candidate for record in begun + rest] == expected
    assert second.front() == whole.front()
    # And from the history alone, after a stop amid a generation, with several in flight.
    calls: list[Any] = []

    def stopping(architecture: Any) -> Measurement:
        if len(calls) == 47:
            raise KeyboardInterrupt
        calls.append(architecture)
        return measure(architecture)

    with pytest.raises(KeyboardInterrupt):
        run_search(pareto(), stopping, history=History(tmp_path / "history.jsonl"))
    known = History(tmp_path / "history.jsonl")
    assert len(known.records) == 47 and known.records[3]["costs"].keys() == {"convolutions"}
    third = pareto()
    assert [r.candidate for r in run_search(third, measure, history=known, in_flight=InFlight(3))] == expected
    assert third.front() == whole.front()


def test_failed_candidates_are_neither_parents_nor_on_the_front():
    def failing(architecture: Any) -> Measurement:
        if architecture.operations[0] == "nor_conv_3x3":
            raise MeasurementError("The validation loss is nan.")
        return measure(architecture)

    evolution = pareto(generations=4)
    records = run_search(evolution, failing)
    assert {record.status for record in records} == {"ok", "failed"}
    assert all(architecture.operations[0] != "nor_conv_3x3" for architecture, _ in evolution.front())


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["flatness", "mac"], r"There is no objective 'mac' \(did you mean macs\?\); there are: score, flatness, macs"),
        (["flatness", "accuracy"], "There is no objective 'accuracy', which score.metric does not measure"),
        (["macs"], "A search has two or more objectives, each once, got"),
        (["macs", "macs"], "A search has two or more objectives, each once, got"),
    ],
)
def test_objectives_that_there_are_not_are_refused(names, told):
    with pytest.raises(ValueError, match=told):
        check_objectives(names, {"flatness"}, ("macs",))


def test_several_objectives_do_not_race_and_are_told_as_many_numbers():
    with pytest.raises(ValueError, match="leave out racing, or objectives"):
        evolution_for(("score", "macs"), 0.999)
    assert type(evolution_for(())) is Evolution
    evolution = pareto(population=2)
    evolution.ask()
    with pytest.raises(ValueError, match=r"tell\(\) got \(1\.0,\) for the 2 objectives score, convolutions"):
        evolution.tell([(1.0,), (1.0, 2.0)])
    with pytest.raises(ValueError, match="NaN"):
        evolution.tell([(1.0, float("nan")), None])


def test_the_front_is_drawn(tmp_path: Path):
    evolution = pareto(generations=3)
    records = run_search(evolution, measure)
    by_name = {record.candidate: record for record in records}
    front = [by_name[str(architecture)] for architecture, _ in evolution.front()]
    path = plot_front(records, front, evolution.objectives, tmp_path / "front.png", title="A & B")
    assert imread(path).std() > 0.05
    text = plot_front(records, front, evolution.objectives, tmp_path / "front.svg").read_text(encoding="utf-8")
    assert "convolutions (less is better)" in text and f"front: {len(front)} that none dominates" in text
    with pytest.raises(ValueError, match="There is no front to draw"):
        plot_front(records, [], evolution.objectives, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "pareto.py"
    found = importlib.util.spec_from_file_location("benchmark_pareto", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_benchmarks_hypervolume_is_what_a_grid_counts(benchmark: Any):
    points = [(3.0, 1.0), (5.0, 4.0), (4.0, 2.0), (4.0, 6.0), (1.0, 0.0)]
    cells = itertools.product(np.arange(2.05, 7, 0.1), np.arange(0.05, 5, 0.1))
    dominated = sum(any(a >= x and c <= y for a, c in points) for x, y in cells)
    assert benchmark.hypervolume(points, (2.0, 5.0)) == pytest.approx(dominated * 0.01)
    assert benchmark.front_of(points) == [(1.0, 0.0), (3.0, 1.0), (4.0, 2.0), (5.0, 4.0)]
    assert benchmark.hypervolume([(1.0, 1.0)], (2.0, 5.0)) == 0.0


def test_the_benchmark_compares_with_random_search(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = tmp_path / "truth.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", "cifar10", "cifar100", "imagenet16_120"])
        for architecture in SPACE.architectures():
            writer.writerow([architecture, *3 * [50 + measure(architecture).score]])
    benchmark.main([str(table), "--evaluations", "100", "--seeds", "2", "--output", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    assert len(rows) == 3 * 3 * 2
    means = {
        method: np.mean([float(row["hypervolume"]) for row in rows if row["method"] == method])
        for method in ("random search", "accuracy and macs")
    }
    assert means["random search"] < means["accuracy and macs"] <= 1.0
    assert "true front found" in capsys.readouterr().out
    assert imread(tmp_path / "out" / "pareto_cifar10.png").std() > 0.05
