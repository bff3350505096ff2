"""How much of the true front does a search by two objectives find, and random search with as many evaluations?

NAS-Bench-201 with the benchmark's own accuracy after 200 epochs as the score, from a CSV as
:func:`genas_plugins.nasbench201.truth.read_truth` reads it, and multiply-adds as the cost::

    python benchmarks/pareto.py nasbench201_accuracy.csv --evaluations 500 --seeds 20 --output runs/pareto

Compared is the hypervolume: the area of accuracy and multiply-adds that a front dominates, as a share of that of the
true front. It is measured from the largest number of multiply-adds and the median accuracy, below which no front
matters. It writes ``pareto.csv``, a line a search, and the first seed's fronts as pictures, and prints means with 95 %
intervals (bootstrap over the seeds).
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from genas_plugins.cli.shared import table
from genas_plugins.files import write_text
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SearchSpace
from genas_plugins.nasbench201.truth import DATASETS, read_truth
from genas_plugins.plotting._style import FAINT, GREY, INK, PALETTE, figure_file
from genas_plugins.scoring import Measurement
from genas_plugins.search import CostedSpace, Evolution, ParetoEvolution, Record, run_search
from genas_plugins.search.budget import in_units

__all__ = ["front_of", "hypervolume", "main", "search"]

_SIZES = {"init_channels": 16, "cells_per_stage": 5, "num_classes": 10}
_POPULATION = 20

Point = tuple[float, float]


def macs(architecture: NasBench201Architecture) -> float:
    """Multiply-adds of the benchmark's network."""
    return NasBench201SearchSpace().costs(architecture, _SIZES, 32)[1]


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points of accuracy and multiply-adds that no other dominates, each once, by accuracy."""
    front: list[Point] = []
    for accuracy, cost in sorted(set(points), key=lambda point: (point[1], -point[0])):
        if not front or accuracy > front[-1][0]:
            front.append((accuracy, cost))
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between points of accuracy and multiply-adds and a reference that is worse in both.

    >>> hypervolume([(2.0, 1.0), (3.0, 2.0)], (0.0, 4.0))
    8.0
    """
    area, lowest = 0.0, reference[0]
    # By accuracy each point adds a strip above those before it, as wide as its cost is below the reference.
    for accuracy, cost in front_of(points):
        if accuracy > lowest and cost < reference[1]:
            area += (accuracy - lowest) * (reference[1] - cost)
            lowest = accuracy
    return area


def search(truth: Mapping[str, float], evolution: Evolution[NasBench201Architecture]) -> list[Record]:
    """Run an evolution with the true accuracy as the score."""
    return run_search(evolution, lambda architecture: Measurement(truth[str(architecture)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", help="CSV with the columns arch and the data sets")
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    costs = {str(architecture): macs(architecture) for architecture in NasBench201SearchSpace().architectures()}
    rows = []
    for dataset in DATASETS:
        truth = read_truth(options.truth, dataset)
        for seed in range(options.seeds):
            rows += _compared(dataset, truth, costs, options, seed)
    names = ["dataset", "method", "seed", "hypervolume", "front found"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(options.output / "pareto.csv", text.getvalue())
    print("\n".join(table(_summary(rows))))


def _compared(
    dataset: str, truth: Mapping[str, float], costs: Mapping[str, float], options: argparse.Namespace, seed: int
) -> list[tuple[str, str, int, float, float]]:
    every = [(truth[name], costs[name]) for name in truth]
    best = front_of(every)
    reference = float(np.median(list(truth.values()))), max(costs.values())
    whole = hypervolume(best, reference)
    settings = {"population": _POPULATION, "generations": options.evaluations // _POPULATION, "seed": seed}
    space = CostedSpace(NasBench201SearchSpace(), {"macs": lambda architecture: costs[str(architecture)]}, {})
    methods: dict[str, Callable[[], Evolution[NasBench201Architecture]]] = {
        "random search": lambda: Evolution(space, **settings, mutants=0, crossovers=0),
        "evolution by accuracy alone": lambda: Evolution(space, **settings),
        "accuracy and macs": lambda: ParetoEvolution(space, ("score", "macs"), **settings),
    }
    rows, fronts = [], {}
    for method, make in methods.items():
        evolution = make()
        records = search(truth, evolution)
        found = [(record.score, record.costs["macs"]) for record in records]
        share = len(set(best) & set(found)) / len(best)
        rows.append((dataset, method, seed, hypervolume(found, reference) / whole, share))
        fronts[method] = front_of(found)
    if seed == 0:
        _draw(every, best, fronts, options.output / f"pareto_{dataset}.png", f"{dataset}, {len(records)} evaluations")
    return rows


def _draw(
    every: Sequence[Point], best: Sequence[Point], found: Mapping[str, Sequence[Point]], path: Path, title: str
) -> None:
    with figure_file(path, 7.2, 4.6) as figure:
        axes = figure.add_subplot()
        styles = {"s": 2, "color": FAINT, "linewidths": 0, "label": f"all {len(every):,}", "rasterized": True}
        axes.scatter([cost for _, cost in every], [accuracy for accuracy, _ in every], **styles)
        axes.step([cost for _, cost in best], [a for a, _ in best], where="post", color=INK, label="true front")
        for (method, front), colour in zip(found.items(), (GREY, PALETTE[1], PALETTE[0]), strict=True):
            points = [cost for _, cost in front], [accuracy for accuracy, _ in front]
            axes.scatter(*points, s=24, color=colour, edgecolors="white", linewidths=0.5, label=method, zorder=3)
        axes.set_ylim(float(np.median([accuracy for accuracy, _ in every])), best[-1][0] + 0.5)
        axes.xaxis.set_major_formatter(lambda value, position: in_units(value))
        axes.set_xlabel("multiply-adds")
        axes.set_ylabel("test accuracy after 200 epochs, %")
        axes.legend(loc="lower right", fontsize=8, markerscale=1.2)
        axes.set_title(f"NAS-Bench-201, {title}", loc="left", fontsize=10, fontweight="bold")
        figure.tight_layout()


def _summary(rows: Sequence[tuple[str, str, int, float, float]]) -> list[tuple[str, ...]]:
    lines = [("data set", "method", "hypervolume, share of the true front's", "true front found")]
    for dataset, method in dict.fromkeys((row[0], row[1]) for row in rows):
        chosen = np.array([row[3:] for row in rows if row[:2] == (dataset, method)])
        cells = []
        for values in chosen.T:
            spread = bootstrap(
                (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
            ).confidence_interval
            cells.append(f"{values.mean():.4f} [{spread.low:.4f}, {spread.high:.4f}]")
        lines.append((dataset, method, *cells))
    return lines


if __name__ == "__main__":
    main()
