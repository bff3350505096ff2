"""Neighbourhoods: counts by combinatorics, distances by brute force, and scores put together from neighbours."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from math import comb
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import chisquare

from genas_plugins import ZOO
from genas_plugins.correlation import Setting, columns, with_neighbours
from genas_plugins.experiment import config
from genas_plugins.experiment.neighbours import Neighbours
from genas_plugins.nasbench201 import NasBench201Architecture
from genas_plugins.neighbourhood import Neighbourhood, distance
from genas_plugins.plotting import LossCurve, Neighbour, plot_neighbourhood
from genas_plugins.scoring import CombinedScore, Measurement, MeasurementError, NeighbourhoodScore
from genas_plugins.scoring.neighbourhood import AGGREGATES
from genas_plugins.search import Evolution, History, HistoryError, InFlight, JsonLines, run_search
from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace

SCORE = CombinedScore(metric="accuracy")


class Board:
    """Squares of a board of 16 by 16; it says its choices and nothing else."""

    choices = MappingProxyType({"x": (tuple(range(16)), 1), "y": (tuple(range(16)), 1)})

    def sample(self, rng):
        return tuple(int(place) for place in rng.integers(16, size=2))

    def mutate(self, square, probability, rng):
        return tuple(int(rng.integers(16)) if rng.random() < probability else place for place in square)

    def crossover(self, first, second, rng):
        return first[0], second[1]

    def to_json(self, square):
        return list(square)

    def from_json(self, data):
        return tuple(data)

    def to_sample(self, square):
        return dict(zip("xy", square, strict=True))

    def from_sample(self, sample):
        return sample["x"], sample["y"]


def landscape(square: tuple[int, int]) -> Measurement:
    """A sharp optimum at (3, 3), and a broad one at (10, 10), whose row and column are nearly as good."""
    if square == (3, 3):
        return Measurement(2.0)
    return Measurement(1.0 if square == (10, 10) else 0.9 if 10 in square else 0.1)


def genotype(seed: int):
    return DartsSearchSpace().sample(np.random.default_rng(seed))


def architecture(seed: int):
    return NasBench201SearchSpace().sample(np.random.default_rng(seed))


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_there_are_as_many_neighbours_as_combinatorics_counts(edits):
    within = range(1, edits + 1)
    bench, darts = NasBench201SearchSpace(), DartsSearchSpace()
    assert Neighbourhood(bench, architecture(0), edits).size == sum(comb(6, k) * 4**k for k in within)
    assert Neighbourhood(darts, genotype(0), edits).size == sum(comb(16, k) * 6**k for k in within)
    assert Neighbourhood(Board(), (1, 2), edits).size == sum(comb(2, k) * 15**k for k in within if k <= 2)
    # A node of one input has an edge less.
    assert Neighbourhood(darts, ZOO["fairdarts_b_c10"].genotype, 1).size == 14 * 6


def test_moved_inputs_are_counted_too():
    darts = DartsSearchSpace()
    # Nodes 2 to 5 have 0 to 3 inputs free, to which either edge can move, in both cells.
    assert Neighbourhood(darts, genotype(1), 1, inputs=True).size == 16 * 6 + 2 * 2 * (0 + 1 + 2 + 3)
    # As far as any: all genotypes but one, and all operations on these inputs.
    assert Neighbourhood(darts, genotype(1), 32, inputs=True).size == darts.size - 1
    assert Neighbourhood(darts, genotype(1), 16).size == 7**16 - 1


@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_two_edits_away_is_a_neighbours_neighbour(inputs):
    darts, middle = DartsSearchSpace(), genotype(2)
    near = list(Neighbourhood(darts, middle, 1, inputs=inputs))
    if inputs:
        # All of a second edit would be fifteen thousand.
        near = near[::12]
    twice = {other for one in near for other in Neighbourhood(darts, one, 1, inputs=inputs)}
    found = list(Neighbourhood(darts, middle, 2, inputs=inputs))
    assert len(found) == len(set(found)) and middle not in found
    assert twice - {middle} <= set(found)
    if not inputs:
        assert twice | set(near) == {*found, middle}
    # The nearest come first.
    assert [distance(darts, middle, one) for one in found] == sorted(distance(darts, middle, one) for one in found)


@pytest.mark.parametrize(
    "space", [DartsSearchSpace(), NasBench201SearchSpace(), Board()], ids=["darts", "201", "board"]
)
def test_distance_is_a_metric(space):
    rng = np.random.default_rng(0)
    for _ in range(200):
        a = space.sample(rng)
        b, c = space.mutate(a, 0.2, rng), space.sample(rng)
        ab, bc, ac = distance(space, a, b), distance(space, b, c), distance(space, a, c)
        assert (ab == 0) == (a == b) and ab == distance(space, b, a)
        assert ac <= ab + bc and ab <= ac + bc and bc <= ab + ac


def test_distance_of_genotypes_is_the_shortest_way_of_edits():
    darts = DartsSearchSpace()
    one = genotype(3)
    rng = np.random.default_rng(1)
    other, steps = one, 0
    for steps in range(1, 4):
        choices = list(Neighbourhood(darts, other, 1, inputs=True))
        other = choices[int(rng.integers(len(choices)))]
        assert distance(darts, one, other) <= steps
    # One edge more swapped for another: both operations change places, which is two edits, not four.
    code = list(one.code)
    first, second = (edge for edge in range(2) if code[edge])
    code[first], code[second] = code[second], code[first]
    swapped = type(one).from_code(code)
    assert distance(darts, one, swapped) == (2 if code[0] != code[1] else 0)


def test_samples_are_different_uniform_and_seeded():
    near = Neighbourhood(NasBench201SearchSpace(), architecture(4), 2)
    assert near.sample(7, seed=1) == near.sample(7, seed=1) != near.sample(7, seed=2)
    counts: Counter[NasBench201Architecture] = Counter()
    for seed in range(2000):
        drawn = near.sample(6, seed)
        assert len(set(drawn)) == 6
        counts.update(drawn)
    assert set(counts) == set(near)
    assert chisquare([counts[one] for one in near]).pvalue > 0.001
    assert set(near.sample(10_000, seed=0)) == set(near)
    # Beyond 64 bits.
    assert len(set(Neighbourhood(DartsSearchSpace(), genotype(0), 32, inputs=True).sample(5, seed=0))) == 5


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_every_aggregate_prefers_the_broad_optimum_and_single_scores_the_sharp_one(aggregate):
    evolution = {"population": 256, "generations": 1, "parents": 1, "mutants": 0, "crossovers": 0}

    def best(**settings: Any) -> Any:
        search = Evolution(Board(), **evolution)
        together = Neighbours(Board(), NeighbourhoodScore(SCORE, aggregate, **settings), landscape)
        assert len(run_search(search, landscape, race=together)) > 200
        return search.best(1)[0]

    assert best(size=0) == ((3, 3), 2.0)
    for square in (best()[0], best(include_self=False)[0]):
        # The median of its row and column is as good as its own: half of their neighbours are there as well.
        assert square == (10, 10) or (aggregate == "median" and 10 in square)
    values = np.array([1.0, *30 * [0.9]])
    expected = {"mean": values.mean(), "median": 0.9, "min": 0.9, "mean-std": values.mean() - values.std()}
    assert best()[1] == pytest.approx(expected[aggregate])


def test_each_architecture_is_measured_once_and_the_budget_kept():
    calls: list[Any] = []

    def counted(one: NasBench201Architecture) -> Measurement:
        calls.append(one)
        return Measurement(float(one.operations.count("nor_conv_3x3")))

    space = NasBench201SearchSpace()
    evolution = Evolution(space, population=8, parents=4, evaluations=300, mutation_probability=0.3)
    together = Neighbours(space, NeighbourhoodScore(SCORE), counted, in_flight=InFlight(3))
    evolution.cost = together.cost
    assert together.cost == 25
    records = run_search(evolution, counted, race=together)
    assert len(calls) == len(set(calls)) == sum(record.neighbourhood["new"] for record in records) == evolution.spent
    # Not exceeded, and no further candidate would have fitted for certain.
    assert 300 - 25 < len(calls) <= 300
    # By hand, for one.
    last = NasBench201Architecture.from_string(records[-1].candidate)
    scores = [one.operations.count("nor_conv_3x3") for one in (last, *space.neighbours(last))]
    assert records[-1].score == pytest.approx(np.mean(scores))
    assert records[-1].neighbourhood["own"] == scores[0] and records[-1].neighbourhood["scores"] == 25
    assert any(record.neighbourhood["new"] < 25 for record in records)


def test_a_search_that_was_stopped_measures_nothing_twice_and_ends_the_same(tmp_path: Path):
    def search(folder: Path, most: int | None) -> tuple[list[Any], int]:
        calls = 0

        def measure(square: tuple[int, int]) -> Measurement:
            nonlocal calls
            if calls == most:
                raise KeyboardInterrupt
            calls += 1
            return landscape(square)

        folder.mkdir(exist_ok=True)
        history = History(folder / "history.jsonl")
        before = [Board().from_json(record.candidate) for record in history.records]
        near = NeighbourhoodScore(SCORE, size=4)
        together = Neighbours(Board(), near, measure, lines=history.beside("near.jsonl"), before=before)
        evolution = Evolution(Board(), population=6, generations=4, parents=2, seed=3)
        try:
            records = run_search(evolution, measure, history=history, race=together)
        except KeyboardInterrupt:
            return [], calls
        return [{**record.to_dict(), "seconds": 0} for record in records], calls

    whole, all_calls = search(tmp_path / "whole", None)
    _, first = search(tmp_path / "cut", 40)
    resumed, rest = search(tmp_path / "cut", None)
    assert first == 40 and first + rest == all_calls
    assert resumed == whole
    lines = (tmp_path / "cut" / "near.jsonl").read_text()
    assert len(lines.splitlines()) == all_calls
    (tmp_path / "cut" / "near.jsonl").write_text('{"candidate": [1, 1], "seconds": 0.1}\n' + lines)
    with pytest.raises(HistoryError, match=r"Line 1 of .*near\.jsonl is not what an architecture was measured to be"):
        search(tmp_path / "cut", None)


def test_neighbours_that_fail_are_left_out_and_a_candidate_that_fails_fails():
    def failing(square: tuple[int, int]) -> Measurement:
        if square[0] == 5 and square[1] != 2:
            raise MeasurementError("The validation loss is nan.")
        return Measurement(1.0)

    together = Neighbours(Board(), NeighbourhoodScore(SCORE, "mean"), failing)
    # Of (5, 2)'s neighbours the 15 of its own x fail.
    assert together.measure((5, 2)).neighbourhood == {"own": 1.0, "scores": 16, "failed": 15, "new": 31}
    with pytest.raises(MeasurementError, match=r"The validation loss is nan\."):
        together.measure((5, 3))
    alone = Neighbours(Board(), NeighbourhoodScore(SCORE, size=3, include_self=False), failing)
    alone.around = lambda square: [(5, 7), (5, 8)]
    with pytest.raises(MeasurementError, match="None of the 2 neighbours has a score; the first: The validation loss"):
        alone.measure((5, 2))


class Threads:
    """Two processes of a shared search as threads."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, desk: list[Any]) -> None:
        self.rank, self.barrier, self.desk = rank, barrier, desk

    def exchange(self, item: Any) -> list[Any]:
        self.desk[self.rank] = item
        self.barrier.wait(20)
        told = list(self.desk)
        self.barrier.wait(20)
        return told


def test_processes_share_the_neighbours_of_a_generation():
    squares, calls = [(1, 1), (1, 2), (10, 4)], [[], []]
    expected = Neighbours(Board(), NeighbourhoodScore(SCORE, size=5), landscape).run(squares)
    barrier, desk, found = threading.Barrier(2), [None, None], [None, None]

    def work(rank: int) -> None:
        def measure(square: tuple[int, int]) -> Measurement:
            calls[rank].append(square)
            return landscape(square)

        together = Neighbours(Board(), NeighbourhoodScore(SCORE, size=5), measure)
        found[rank] = together.run(squares, shared=Threads(rank, barrier, desk))

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [finish.measurement for finish in found[0]] == [finish.measurement for finish in expected]
    assert [finish.measurement for finish in found[1]] == [finish.measurement for finish in expected]
    assert not set(calls[0]) & set(calls[1])
    assert abs(len(calls[0]) - len(calls[1])) <= 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"aggregate": "max"}, "Unknown aggregate 'max'; valid aggregates: mean, median, min, mean-std"),
        ({"distance": 0}, "distance must be at least 1"),
        ({"size": -1}, "size must not be negative"),
        ({"size": 0, "include_self": False}, "has nothing to measure"),
    ],
)
def test_neighbourhoods_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        NeighbourhoodScore(SCORE, **settings)
    with pytest.raises(config.ConfigError, match=r"score\.neighbourhood"):
        config.parse({"score": {"neighbourhood": settings}})


def test_a_race_and_a_neighbourhood_are_refused_together():
    with pytest.raises(config.ConfigError, match="leave out racing, or the neighbourhood"):
        config.parse({"score": {"neighbourhood": {}}, "search": {"racing": 0.999}})


def test_columns_of_neighbourhoods_are_put_together_from_what_was_measured():
    setting = Setting(
        name="near", score=SCORE, neighbourhood=NeighbourhoodScore(SCORE, "min", size=3, include_self=False)
    )
    alone = Setting(name="alone", score=SCORE)
    rows = [architecture(seed) for seed in range(4)]
    measured = with_neighbours(rows, [setting, alone], seed=7)
    assert measured[0] == rows[0] and len(measured) == len(set(measured)) <= 16 and set(rows) <= set(measured)
    value = {one: 0.01 * number for number, one in enumerate(measured)}
    raws = [
        {
            "architecture": str(one),
            "seed": 7,
            "statistics": {"cumulative": {"loss": 1.0, "top1": value[one], "top5": 1.0, "losses": {}}},
        }
        for one in measured
    ]
    table = columns([setting, alone], raws)
    assert table["alone"] == [value[one] for one in measured]
    found = dict(zip(measured, table["near"], strict=True))
    for one in rows:
        # Each row's own three are those that were put behind it, or were there before.
        mine = with_neighbours([one], [setting], seed=7)[1:]
        assert len(mine) == 3 and found[one] == min(value[other] for other in mine)
    # An architecture whose neighbours were not measured has none.
    assert math.isnan(found[next(one for one in measured if one not in rows)])


def test_the_neighbourhood_is_drawn(tmp_path: Path):
    edges = [f"0_{edge}" for edge in range(1, 4)]
    near = [
        Neighbour(edge, choice, 0.1 * n, 90.0 + n) for n, (edge, choice) in enumerate(itertools.product(edges, "ab"))
    ]
    curve = LossCurve("", (0.0, 0.01, 0.02), (1.0, 1.1, 1.9))
    small = plot_neighbourhood(0.3, near, tmp_path / "small.png")
    large = plot_neighbourhood(0.3, near, tmp_path / "large.png", curve=curve, truth=93.0, title="A & B")
    # A second row for the true accuracies.
    assert imread(large).shape[0] > 1.5 * imread(small).shape[0]
    text = plot_neighbourhood(0.3, near, tmp_path / "near.svg").read_text(encoding="utf-8")
    assert "flatness under noise" in text and "edge that was changed" in text
    with pytest.raises(ValueError, match="There is no neighbour to draw"):
        plot_neighbourhood(0.3, [], tmp_path / "none.png")


def test_lines_beside_a_history_are_its_writers(tmp_path: Path):
    history = History(tmp_path / "history.jsonl", read_only=True)
    lines = history.beside("near.jsonl")
    assert isinstance(lines, JsonLines) and lines.read_only
    lines.append({"candidate": 1})
    assert not (tmp_path / "near.jsonl").exists()
