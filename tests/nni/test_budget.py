"""Searches within a budget and by several objectives, from the command and inside NNI."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.space import RawFormatModelSpace

from genas_plugins.nasbench201 import EDGES, NasBench201Architecture, nasbench201_costs
from genas_plugins.search import BudgetError
from nni_strategy import GeNAS, NasBench201Space

FRONT = ["search.objectives=[flatness,macs]", "search.population=6", "search.generations=3"]
FRONT += ["search.mutants=3", "search.crossovers=2"]

NAMES = {"conv_1x1": "nor_conv_1x1", "conv_3x3": "nor_conv_3x3", "avg_pool_3x3": "avg_pool_3x3"}


def benchmark_macs(code: str) -> float:
    """As the benchmark counts, at its size, without the classifier's bias."""
    return nasbench201_costs(NasBench201Architecture.from_string(code)).flops - 10


def test_a_front_within_a_budget_is_written_told_and_resumed(genas: Any, tmp_path: Path) -> None:
    changes = [*FRONT, "search.constraints.macs=90M", "search.constraints.params={min: 0.2M}"]
    done = genas.search(tmp_path / "whole", *changes, pictures=True).wait()
    assert done.status == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "whole" / "history.jsonl").read_text().splitlines()]
    assert len(records) == 18
    for record in records:
        assert record["costs"]["macs"] == benchmark_macs(record["candidate"]) <= 90e6
        assert record["costs"]["params"] >= 0.2e6
    rows = list(csv.DictReader((tmp_path / "whole" / "pareto.csv").open()))
    points = [(float(row["flatness"]), float(row["macs"])) for row in rows]
    everyone = [(r["flatness"], r["costs"]["macs"]) for r in records]
    dominated = [p for p in everyone if any(o != p and o[0] >= p[0] and o[1] <= p[1] for o in everyone)]
    assert sorted(points, reverse=True) == points
    assert set(points) == set(everyone) - set(dominated)
    assert [row["architecture"] for row in rows] == [records[int(row["candidate"])]["candidate"] for row in rows]
    winner = json.loads((tmp_path / "whole" / "architecture.json").read_text())
    assert winner["architecture"] == rows[0]["architecture"]
    assert winner["top"][0]["costs"] == {"params": float(rows[0]["params"]), "macs": points[0][1]}
    assert f"{len(rows)} of 18 architectures are on the front" in done.stdout
    assert (tmp_path / "whole" / "pareto.png").stat().st_size > 10_000
    # A run that was cut off goes on with the same candidates.
    cut = tmp_path / "whole"
    history = (cut / "history.jsonl").read_text()
    (cut / "history.jsonl").write_text("".join(history.splitlines(keepends=True)[:9]))
    assert genas.search(cut, resume=True).wait().status == 0
    again = [json.loads(line) for line in (cut / "history.jsonl").read_text().splitlines()]
    assert [r["candidate"] for r in again] == [r["candidate"] for r in records]
    assert list(csv.DictReader((cut / "pareto.csv").open())) == rows


def test_measured_latencies_decide_a_resumed_search_as_they_did(genas: Any, tmp_path: Path) -> None:
    changes = [*FRONT[1:], "search.objectives=[flatness,latency]", "search.counted.init_channels=4"]
    changes += ["search.counted.cells_per_stage=1"]
    assert genas.search(tmp_path, *changes).wait().status == 0
    before = (tmp_path / "history.jsonl").read_text().splitlines()
    ledger = (tmp_path / "costs.jsonl").read_text()
    (tmp_path / "history.jsonl").write_text("\n".join(before[:10]) + "\n")
    done = genas.search(tmp_path, resume=True).wait()
    assert done.status == 0, done.stderr
    after = (tmp_path / "history.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, before), map(json.loads, after), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert (tmp_path / "costs.jsonl").read_text() == ledger and len(ledger.splitlines()) == 18


def test_what_nothing_satisfies_is_refused_before_the_training(genas: Any, tmp_path: Path) -> None:
    done = genas.search(tmp_path / "run", "search.constraints.macs=1M").wait()
    assert done.status == 1
    assert done.stderr.startswith("genas: None of 10,000 architectures that were drawn is within the budget: macs must")
    assert "at most 1M and was 7.78304M to " in done.stderr
    # Another budget takes the same folder.
    assert not (tmp_path / "run" / "config.yaml").exists()


def started(strategy: GeNAS, space: Any, digits_evaluator: Any) -> GeNAS:
    strategy.initialize(RawFormatModelSpace(space, digits_evaluator), SequentialExecutionEngine())
    strategy.run()
    return strategy


SMALL = {"population": 6, "generations": 2, "sigmas": (0.01, 0.02), "recalibration_images": 32, "device": "cpu"}


def test_models_along_the_front_carry_the_supernets_weights(digits_evaluator: Any) -> None:
    torch.manual_seed(0)
    strategy = GeNAS(
        **SMALL,
        objectives=("flatness", "macs", "convolutions"),
        costs={"convolutions": lambda a: sum("conv" in name for name in a.operations)},
        constraints={"convolutions": (1, 4)},
    )
    started(strategy, NasBench201Space(10, 4, 1), digits_evaluator)
    assert all(1 <= record.costs["convolutions"] <= 4 for record in strategy.records)
    front = strategy.evolution.front()
    models = list(strategy.list_models(limit=len(front)))
    assert [model.metric for model in models] == [values[0] for _, values in front]
    images = torch.randn(4, 3, 8, 8)
    for model, (architecture, _) in zip(models, front, strict=True):
        network = model.executable_model().eval()
        with torch.no_grad():
            assert torch.equal(network(images), strategy.supernet.subnet(architecture).eval()(images))
    # A state that was taken remembers what was measured.
    again = GeNAS(**SMALL, objectives=("flatness", "macs"))
    again.initialize(RawFormatModelSpace(NasBench201Space(10, 4, 1), digits_evaluator), SequentialExecutionEngine())
    state = strategy.state_dict()
    assert {name for name, _, _ in state["measured"]} == {"convolutions"}


def test_costs_of_ones_own_read_the_sample_of_a_space_of_nnis(digits_evaluator: Any) -> None:
    strategy = GeNAS(
        **SMALL,
        constraints={"skips": 1, "macs": (1, "1G")},
        costs={"skips": lambda sample: sum(name == "skip_connect" for name in sample.values())},
    )
    started(strategy, NasBench201(4, 1, 10), digits_evaluator)
    for record in strategy.records:
        assert sum(name == "skip_connect" for name in record.candidate.values()) == record.costs["skips"] <= 1
        operations = [record.candidate[f"cell/{start}_{end}"] for start, end in EDGES]
        own = NasBench201Architecture(tuple(NAMES.get(name, name) for name in operations))
        # Of 4 channels, one cell a stage and 8 pixels; NNI's network has the benchmark's layers.
        assert record.costs["macs"] == nasbench201_costs(own, 4, 1, 10, 8).flops - 10


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"constraints": {"mac": 3}}, r"no cost 'mac' to limit \(did you mean macs\?\)"),
        ({"constraints": {"macs": "much"}}, "An amount is a number"),
        ({"objectives": ("flatness", "angle")}, "'angle', which score.metric does not measure"),
        ({"objectives": ("flatness", "macs"), "racing": 0.999}, "leave out racing, or objectives"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GeNAS(**settings)


def test_a_budget_of_a_strategy_is_looked_at_before_its_training(digits_evaluator: Any) -> None:
    strategy = GeNAS(**SMALL, constraints={"params": (None, 100)})
    with pytest.raises(BudgetError, match=r"params must be at most 100 and was"):
        started(strategy, NasBench201Space(10, 4, 1), digits_evaluator)
    assert strategy.records == [] and digits_evaluator.trainer.global_step == 0
