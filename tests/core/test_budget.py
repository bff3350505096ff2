"""Budgets: what a search proposes is within them, and uniform in what they allow; costs are those of built networks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from genas_plugins import ZOO, CellNetwork, SuperNet
from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.costs import DartsCosts
from genas_plugins.experiment import config
from genas_plugins.experiment.costs import Budget, Costs, Counted
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SuperNet
from genas_plugins.scoring import Measurement
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.search import (
    BudgetError,
    CostedSpace,
    Evolution,
    History,
    HistoryError,
    JsonLines,
    Limits,
    run_search,
)
from genas_plugins.search.budget import amount
from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace

IMAGE = (3, 32, 32)


class Widths:
    """Whole numbers from 0 to 15: how wide a hidden layer is, less one."""

    def sample(self, rng: np.random.Generator) -> int:
        return int(rng.integers(16))

    def mutate(self, width: int, probability: float, rng: np.random.Generator) -> int:
        return (width + int(rng.integers(1, 4))) % 16

    def crossover(self, first: int, second: int, rng: np.random.Generator) -> int:
        return (first + second) // 2

    def to_json(self, width: int) -> int:
        return width

    def network(self, width: int, arguments: dict[str, Any]) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, width + 1), nn.Linear(width + 1, arguments["num_classes"]))


class WidthsSuperNet(nn.Module):
    arguments = MappingProxyType({"num_classes": 10})
    search_space = Widths()


def costed(space: Any, low: float | None, high: float | None, **sizes: Any) -> CostedSpace[Any]:
    supernet = SuperNet(10, 4, 2) if isinstance(space, DartsSearchSpace) else NasBench201SuperNet(4, 1, 10)
    return Costs(SubnetPaths(supernet), IMAGE, counted=Counted(**sizes)).space((), {"macs": Limits(low, high)})


@pytest.mark.parametrize(
    ("space", "low", "high"), [(DartsSearchSpace(), 430e6, 480e6), (NasBench201SearchSpace(), 40e6, 60e6)]
)
def test_ten_thousand_proposals_of_each_kind_are_within_the_budget(space, low, high):
    budgeted = costed(space, low, high)
    rng = np.random.default_rng(0)
    parents = [budgeted.sample(rng) for _ in range(20)]
    count = 10_000 if isinstance(space, NasBench201SearchSpace) else 3_400
    drawn = [budgeted.sample(rng) for _ in range(count)]
    drawn += [budgeted.mutate(parents[n % 20], 0.3, rng) for n in range(count)]
    drawn += [budgeted.crossover(parents[n % 20], parents[n % 19], rng) for n in range(count)]
    # Counted on built networks, each once.
    known: dict[Any, int] = {}
    for candidate in set(drawn) if isinstance(space, NasBench201SearchSpace) else drawn[::1000]:
        with torch.device("meta"):
            arguments = {"num_classes": 1000, "init_channels": 48, "num_cells": 14, "stem": "imagenet"}
            if isinstance(space, NasBench201SearchSpace):
                kinds = Counter(candidate.operations)
                # The benchmark's table: what the network without operations has, and each convolution's share.
                known[candidate] = 7_783_040 + 3_932_160 * kinds["nor_conv_1x1"] + 35_389_440 * kinds["nor_conv_3x3"]
            else:
                known[candidate] = count_macs(space.network(candidate, arguments), 224)
    assert all(low <= macs <= high for macs in known.values())
    assert all(low <= budgeted.costs(candidate)["macs"] <= high for candidate in drawn)


def test_sampling_is_uniform_over_what_the_budget_allows():
    space = costed(NasBench201SearchSpace(), None, 16e6)
    allowed = [a for a in NasBench201SearchSpace().architectures() if space.costs(a)["macs"] <= 16e6]
    # No 3x3 convolution and two 1x1 at most: 729 + 6 * 243 + 15 * 81 of the 15,625.
    assert len(allowed) == 3402
    rng = np.random.default_rng(3)
    seen = Counter(space.sample(rng) for _ in range(20_000))
    assert set(seen) <= set(allowed)
    assert chisquare([seen[a] for a in allowed]).pvalue > 0.001


def test_a_budget_that_nothing_satisfies_says_what_was_seen():
    space = costed(NasBench201SearchSpace(), None, 1e6)
    told = r"None of 10,000 .* macs must be at most 1M and was 7\.78304M to [0-9.]+M; widen search\.constraints\."
    with pytest.raises(BudgetError, match=told):
        space.sample(np.random.default_rng(0))
    with pytest.raises(BudgetError, match="macs must be at least"):
        Evolution(costed(NasBench201SearchSpace(), 1e9, None)).ask()


def test_a_search_ends_when_the_budget_has_no_more_architectures():
    # Without any convolution: 3 operations on 6 edges.
    space = costed(NasBench201SearchSpace(), None, 7.8e6)
    evolution = Evolution(space, population=200, generations=10, parents=5)
    records = run_search(evolution, lambda architecture: Measurement(1.0))
    assert len(records) == 3**6 and evolution.finished
    assert {record.costs["macs"] for record in records} == {7_783_040}


@pytest.mark.parametrize(
    ("channels", "cells", "stem", "size"),
    [(4, 2, "cifar", (9, 13)), (6, 3, "imagenet", 33), (4, 5, "imagenet", (64, 47)), (4, 8, "cifar", 32)],
)
def test_the_table_of_the_darts_space_is_what_built_networks_have(channels, cells, stem, size):
    costs, rng = DartsCosts(channels, cells, 10, stem, size), np.random.default_rng(0)
    for genotype in [*(DartsSearchSpace().sample(rng) for _ in range(3)), ZOO["fairdarts_b_c10"].genotype]:
        with torch.device("meta"):
            network = CellNetwork(genotype, channels, cells, 10, stem)
        assert costs(genotype) == (count_parameters(network), count_macs(network, size))


def test_the_zoo_costs_what_the_paper_counts():
    for entry in ZOO.values():
        parameters, macs = DartsCosts(entry.init_channels, 14, 1000)(entry.genotype)
        assert (parameters, round(macs / 1e6, 3)) == (entry.params, entry.macs_million)


def test_nasbench201_costs_what_its_network_has_also_on_oblong_images():
    space = NasBench201SearchSpace()
    arguments = {"num_classes": 7, "init_channels": 4, "cells_per_stage": 2}
    for architecture in list(space.architectures())[::4000]:
        with torch.device("meta"):
            network = space.network(architecture, arguments)
        counts = count_parameters(network), count_macs(network, (18, 30))
        assert space.costs(architecture, arguments, (18, 30)) == counts


def test_the_network_that_is_meant_can_be_chosen():
    paths, genotype = SubnetPaths(SuperNet(10, 4, 2)), ZOO["genas_flatness_c100"].genotype

    def counts(**sizes: Any) -> tuple[float, float]:
        return tuple(
            Costs(paths, IMAGE, counted=Counted(**sizes)).space(("params", "macs"), {}).costs(genotype).values()
        )

    assert counts(init_channels=46) == (5_195_205, 579_473_040)
    assert counts(network="searched") == DartsCosts(4, 2, 10, "cifar", 32)(genotype)
    assert counts(network="searched", image_size=16) == DartsCosts(4, 2, 10, "cifar", 16)(genotype)
    with pytest.raises(
        ValueError, match=r"cells_per_stage is no size of DartsSearchSpace's networks; there are: image"
    ):
        counts(cells_per_stage=3)
    with pytest.raises(config.ConfigError, match="cells_per_stage is no size of DartsSearchSpace"):
        config.parse({"search": {"counted": {"cells_per_stage": 3}}})


def test_a_space_that_cannot_count_has_its_networks_built():
    paths = SubnetPaths(WidthsSuperNet())
    space = Costs(paths, (3, 8, 8)).space(("params", "macs"), {})
    # 192 numbers to 4, to 10.
    assert space.costs(3) == {"params": 192 * 4 + 4 + 4 * 10 + 10, "macs": 192 * 4 + 4 * 10}


def test_own_costs_and_limits_are_found_by_name():
    budget = Budget(
        {"convolutions": (1, 2)}, (), {"convolutions": lambda a: a.operations.count("nor_conv_3x3")}, None, ()
    )
    space = budget.space(SubnetPaths(NasBench201SuperNet(4, 1, 10)), IMAGE)
    rng = np.random.default_rng(0)
    assert {space.sample(rng).operations.count("nor_conv_3x3") for _ in range(50)} == {1, 2}
    with pytest.raises(ValueError, match=r"no cost 'mac' to limit \(did you mean macs\?\)"):
        Budget({"mac": 3}, (), None, None, ())
    with pytest.raises(ValueError, match="cannot be called latency"):
        Budget(None, (), {"latency": len}, None, ())
    broken = Budget({"size": 3}, (), {"size": lambda width: float("nan")}, None, ())
    with pytest.raises(ValueError, match=r"The cost size of .* must be a finite number, got nan"):
        broken.space(SubnetPaths(WidthsSuperNet()), IMAGE).sample(rng)


def test_what_was_measured_is_not_measured_again_when_a_search_is_resumed(tmp_path: Path):
    calls: list[int] = []

    def watts(candidate: int) -> float:
        calls.append(candidate)
        # As a measurement is: never twice the same.
        return 100.0 * (candidate % 3) + len(calls)

    def search(file: Path, generations: int) -> list[Any]:
        paths = SubnetPaths(WidthsSuperNet())
        budget = Budget({"watts": 150}, (), {"watts": watts}, None, ())
        space = budget.space(paths, (3, 8, 8), lines=JsonLines(file.with_name("costs.jsonl")))
        evolution = Evolution(space, population=3, generations=generations, parents=2, seed=1)
        return run_search(evolution, lambda number: Measurement(float(number)), history=History(file))

    whole = search(tmp_path / "history.jsonl", 3)
    measured = len(calls)
    assert search(tmp_path / "history.jsonl", 3)[-1].to_dict() == whole[-1].to_dict()
    assert len(calls) == measured == len(set(calls))
    ledger = tmp_path / "costs.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["candidate"] for line in lines] == calls
    ledger.write_text('{"cost": "watts"}\n' + ledger.read_text())
    with pytest.raises(HistoryError, match=r"Line 1 of .*costs\.jsonl is not what a candidate was measured to cost"):
        search(tmp_path / "history.jsonl", 3)


def test_processes_that_share_a_search_take_the_first_ones_measurements():
    class First:
        """Two processes; the other one, the first, has measured 7 of whatever this one measured."""

        def exchange(self, item: Any) -> list[Any]:
            return [{("watts", "3"): 7.0} if isinstance(item, dict) else 7.0, item]

    measured: list[int] = []
    budget = Budget({}, (), {"watts": lambda width: measured.append(width) or 9.0}, None, ())
    memory = {("watts", "5"): 1.0}
    space = budget.space(SubnetPaths(WidthsSuperNet()), (3, 8, 8), shared=First(), memory=memory)
    assert [space.costs(width)["watts"] for width in (3, 5, 5)] == [7.0, 7.0, 7.0]
    # What the first knew is not measured, and what it did not know is measured by all at the same time.
    assert measured == [5]


def test_latency_grows_with_the_network_and_leaves_the_generator_alone():
    paths = SubnetPaths(NasBench201SuperNet(4, 1, 10))
    costs = Costs(paths, IMAGE, counted=Counted(init_channels=64, cells_per_stage=2, latency_batch=4))
    before = torch.get_rng_state()
    empty, full = (NasBench201Architecture(6 * (name,)) for name in ("none", "nor_conv_3x3"))
    space = costs.space(("latency",), {})
    assert 0 < 1.5 * space.costs(empty)["latency"] < space.costs(full)["latency"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("600M", (None, 6e8)),
        (5, (None, 5.0)),
        ((1, None), (1.0, None)),
        (["1K", "2 k"], (1e3, 2e3)),
        ({"min": "0.5G"}, (5e8, None)),
    ],
)
def test_limits_are_read_in_each_form(given, read):
    limits = Limits.of(given)
    assert (limits.min, limits.max) == read


@pytest.mark.parametrize("value", ["600 MB", "-1", -1, True, None, float("inf"), float("nan"), "1e", [1], "1_000"])
def test_what_is_no_amount_is_refused(value):
    with pytest.raises(ValueError, match="An amount is a number that is not negative"):
        amount(value)


@pytest.mark.parametrize("value", [(1, 2, 3), {"most": 3}, (2, 1), "many"])
def test_what_is_no_limit_is_refused(value):
    with pytest.raises(ValueError, match=r"A limit is|min must be at most max|An amount is"):
        Limits.of(value)


def test_a_file_of_settings_says_budgets_in_words_of_its_own():
    told = {"constraints": {"macs": "600M", "params": {"min": "4M"}}, "objectives": ["flatness", "macs"]}
    search = config.parse({"search": told}).search
    assert (search.constraints.macs.max, search.constraints.params.min, search.parents) == (6e8, 4e6, 50)
    assert config.parse(config.plain(config.parse({"search": told}))).search == search
    for wrong, message in {
        "macs: fast": "search.constraints.macs: An amount is",
        "macs: {most: 3}": "unknown key search.constraints.macs.most; valid keys",
        "macs: {min: 3, max: 2}": "search.constraints.macs: min must be at most max",
        "watts: 3": "unknown key search.constraints.watts; valid keys of search.constraints: params, macs, latency",
    }.items():
        key, _, value = wrong.partition(": ")
        with pytest.raises(config.ConfigError, match=message):
            config.load("quickstart_digits", [f"search.constraints.{key}={value}"])
