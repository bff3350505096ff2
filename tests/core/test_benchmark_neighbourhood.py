"""The comparison of searches with and without neighbours, on accuracies that are known in closed form."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from genas_plugins.nasbench201 import NasBench201SearchSpace
from genas_plugins.scoring import Measurement

SPACE = NasBench201SearchSpace()


def accuracy(architecture: Any) -> float:
    """A broad hill of 3x3 convolutions, to 86, and one architecture that stands out at 90."""
    if architecture.operations == 6 * ("avg_pool_3x3",):
        return 90.0
    return 80.0 + architecture.operations.count("nor_conv_3x3")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    path = Path(__file__).parents[2] / "benchmarks" / "neighbourhood.py"
    found = importlib.util.spec_from_file_location("benchmark_neighbourhood", path)
    module = importlib.util.module_from_spec(found)
    # Where the other processes look for its functions.
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


def test_each_search_spends_its_evaluations_and_looks_up_the_truth(benchmark: Any, tmp_path: Path) -> None:
    table = tmp_path / "truth.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", "cifar10", "cifar100", "imagenet16_120"])
        for architecture in SPACE.architectures():
            writer.writerow([architecture, *3 * [accuracy(architecture)]])
    benchmark.main([str(table), "--seeds", "2", "--noises", "0", "--output", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "neighbourhood.csv").open()))
    assert len(rows) == 3 * len(benchmark.searches()) * len(benchmark.BUDGETS)
    for row in rows:
        assert 80 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 90.0 + 1e-6
    found = {(row["search"], int(row["evaluations"])): float(row["accuracy"]) for row in rows}
    # Without noise more evaluations are never worse for what is looked up, and evolution climbs the hill.
    assert found["evolution", 100] <= found["evolution", 1000] and found["evolution", 1000] >= 86
    assert found["regularised evolution", 1000] >= 86
    assert imread(tmp_path / "out" / "neighbourhood.png").std() > 0.05


@pytest.mark.parametrize("budget", [100, 300, 1000])
def test_no_search_measures_more_than_its_budget(benchmark: Any, budget: int) -> None:
    for name, search in benchmark.searches().items():
        asked: list[str] = []

        def measure(architecture: Any, asked: list[str] = asked) -> Measurement:
            asked.append(str(architecture))
            return Measurement(accuracy(architecture))

        progress = list(search(measure, 3))
        assert len(asked) == len(set(asked)) <= max(benchmark.BUDGETS), name
        assert max(spent for spent, _ in progress) == len(asked)
        within = [best for spent, best in progress if spent <= budget]
        # The best of a neighbourhood was measured within the budget as well.
        assert within[-1] in asked[:budget]
