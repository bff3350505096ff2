"""Do neighbours help a search? Random search, NA-RS and evolution with equal numbers of evaluations on NAS-Bench-201.

The validation accuracy of one training is simulated: the benchmark's accuracy after 200 epochs and Gaussian noise of a
stated size, drawn once for each architecture and seed. What a search calls best is looked up without noise. From a CSV
as :func:`genas_plugins.nasbench201.truth.read_truth` reads it::

    python benchmarks/neighbourhood.py nasbench201_accuracy.csv --seeds 500 --output runs/neighbourhood --jobs 2

It writes ``neighbourhood.csv`` (mean true accuracy with 95 % intervals of the mean, by data set, noise, search and
number of evaluations) and ``neighbourhood.png``, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genas_plugins.cli.shared import table
from genas_plugins.experiment.neighbours import Neighbours
from genas_plugins.files import write_text
from genas_plugins.nasbench201 import EDGES, OPERATIONS, NasBench201Architecture, NasBench201SearchSpace
from genas_plugins.nasbench201.truth import DATASETS, read_truth
from genas_plugins.plotting._style import FAINT, GREY, PALETTE, figure_file
from genas_plugins.scoring import CombinedScore, Measurement, NeighbourhoodScore
from genas_plugins.scoring.neighbourhood import AGGREGATES
from genas_plugins.search import Evolution, run_search

__all__ = ["BUDGETS", "NOISES", "main", "regularised_evolution", "searches"]

BUDGETS = (100, 300, 1000)
NOISES = (0.0, 0.5, 1.0, 2.0)
"""Standard deviations in percent."""

SPACE = NasBench201SearchSpace()
_SCORE = CombinedScore(metric="accuracy")
_EVOLUTION = {"population": 20, "parents": 10, "evaluations": max(BUDGETS)}
_RANDOM = {**_EVOLUTION, "mutants": 0, "crossovers": 0}

# What a search found best after so many evaluations.
Progress = Iterator[tuple[int, str]]
Measure = Callable[[NasBench201Architecture], Measurement]


def searches() -> dict[str, Callable[[Measure, int], Progress]]:
    """The searches by name: functions of a measurement and a seed."""
    near = {f"NA-RS, {name}": partial(_neighbours, aggregate=name, **_RANDOM) for name in AGGREGATES}
    return {
        "random search": partial(_alone, **_RANDOM),
        **near,
        "regularised evolution": regularised_evolution,
        "evolution": partial(_alone, **_EVOLUTION),
        "evolution, neighbours' mean": partial(_neighbours, aggregate="mean", **_EVOLUTION),
    }


def _alone(measure: Measure, seed: int, **settings: Any) -> Progress:
    records = run_search(Evolution(SPACE, seed=seed, **settings), measure)
    return _best_so_far((1, record.score, record.candidate) for record in records)


def _neighbours(measure: Measure, seed: int, aggregate: str, **settings: Any) -> Progress:
    evolution = Evolution(SPACE, seed=seed, **settings)
    together = Neighbours(SPACE, NeighbourhoodScore(_SCORE, aggregate), measure, seed=seed)
    evolution.cost = together.cost
    records = run_search(evolution, measure, race=together)
    return _best_so_far((record.neighbourhood["new"], record.score, record.candidate) for record in records)


def regularised_evolution(measure: Measure, seed: int, population: int = 10, tournament: int = 3) -> Progress:
    """Aging evolution (Real et al., AAAI 2019) with the sizes that NATS-Bench uses in this space.

    Args:
        measure: Measures an architecture.
        seed: Of all that is drawn.
        population: Architectures that live at a time; the oldest dies.
        tournament: Of how many that are drawn the best mutates, in the operation of one edge.
    """
    rng = np.random.default_rng(seed)
    known: dict[str, float] = {}
    alive: deque[tuple[float, NasBench201Architecture]] = deque(maxlen=population)
    found: list[tuple[int, float, str]] = []
    while len(known) < max(BUDGETS) and len(found) < 10 * max(BUDGETS):
        if len(alive) < population:
            child = SPACE.sample(rng)
        else:
            drawn = [alive[place] for place in rng.choice(population, tournament, replace=False)]
            parent = max(drawn, key=lambda pair: pair[0])[1]
            edge = int(rng.integers(len(EDGES)))
            other = [operation for operation in OPERATIONS if operation != parent.operations[edge]]
            operations = list(parent.operations)
            operations[edge] = other[int(rng.integers(len(other)))]
            child = NasBench201Architecture(tuple(operations))
        name = str(child)
        new = name not in known
        if new:
            known[name] = measure(child).score
        alive.append((known[name], child))
        found.append((int(new), known[name], name))
    return _best_so_far(found)


def _best_so_far(found: Any) -> Progress:
    spent, best = 0, (-np.inf, "")
    for new, score, candidate in found:
        spent += new
        best = max(best, (score, candidate), key=lambda pair: pair[0])
        yield spent, best[1]


def run_seed(path: str, dataset: str, noise: float, seed: int) -> dict[tuple[str, int], float]:
    """True accuracy of what each search calls best, by search and budget.

    Args:
        path: The CSV.
        dataset: Of :data:`DATASETS`.
        noise: Standard deviation in percent.
        seed: Of noise and searches.
    """
    truth = _truth(path, dataset)
    drawn = np.random.default_rng((seed, round(1000 * noise))).normal(0.0, noise, len(truth))
    seen = dict(zip(truth, np.fromiter(truth.values(), float) + drawn, strict=True))
    found = {}
    for name, search in searches().items():
        progress = list(search(lambda architecture: Measurement(float(seen[str(architecture)])), seed))
        for budget in BUDGETS:
            within = [best for spent, best in progress if spent <= budget]
            found[name, budget] = truth[within[-1]]
    return found


_TRUTHS: dict[tuple[str, str], Mapping[str, float]] = {}


def _truth(path: str, dataset: str) -> Mapping[str, float]:
    if (path, dataset) not in _TRUTHS:
        _TRUTHS[path, dataset] = read_truth(path, dataset)
    return _TRUTHS[path, dataset]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", help="CSV with the columns arch and the data sets")
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--noises", nargs="+", type=float, default=NOISES, help="standard deviations in percent")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    lines: list[tuple[Any, ...]] = []
    best = {dataset: max(read_truth(options.truth, dataset).values()) for dataset in DATASETS}
    with ProcessPoolExecutor(options.jobs) as pool:
        for dataset in DATASETS:
            for noise in options.noises:
                seeds = range(options.seeds)
                found = list(pool.map(partial(run_seed, options.truth, dataset, noise), seeds, chunksize=8))
                for name, budget in found[0]:
                    values = np.array([one[name, budget] for one in found])
                    error = 1.96 * values.std(ddof=1) / len(values) ** 0.5
                    mean = values.mean()
                    lines.append((dataset, noise, name, budget, mean, mean - error, mean + error))
    text = io.StringIO()
    names = ["dataset", "noise", "search", "evaluations", "accuracy", "low", "high"]
    csv.writer(text, lineterminator="\n").writerows([names, *lines])
    write_text(options.output / "neighbourhood.csv", text.getvalue())
    _draw(lines, best, options.output / "neighbourhood.png")
    print("\n".join(table(list(_table(lines)))))


def _table(lines: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, ...]]:
    yield ("data set", "noise", "search", *(f"{budget} evaluations" for budget in BUDGETS))
    for dataset, noise, name in dict.fromkeys(line[:3] for line in lines):
        cells = [line for line in lines if line[:3] == (dataset, noise, name)]
        yield (dataset, f"{noise:g}", name, *(f"{mean:.3f} ± {high - mean:.3f}" for *_, mean, _, high in cells))


def _draw(lines: Sequence[tuple[Any, ...]], best: Mapping[str, float], path: Path) -> None:
    noises = list(dict.fromkeys(line[1] for line in lines))
    names = list(dict.fromkeys(line[2] for line in lines))
    colours = dict(zip(names, (GREY, *PALETTE), strict=False))
    with figure_file(path, 3.3 * len(noises) + 0.6, 8.6) as figure:
        panels = figure.subplots(len(best), len(noises), sharex=True, sharey="row", squeeze=False)
        for row, dataset in zip(panels, best, strict=True):
            for axes, noise in zip(row, noises, strict=True):
                for name in names:
                    chosen = [line for line in lines if line[:3] == (dataset, noise, name)]
                    means = [line[4] for line in chosen]
                    errors = [line[6] - line[4] for line in chosen]
                    dashes = "--" if name.startswith("NA-RS") else "-"
                    style = {"color": colours[name], "linestyle": dashes, "linewidth": 1.3, "markersize": 3.5}
                    axes.errorbar([line[3] for line in chosen], means, errors, marker="o", label=name, **style)
                axes.axhline(best[dataset], color=FAINT, linewidth=1, zorder=0)
                axes.set_xscale("log")
                axes.set_xticks(BUDGETS, [f"{budget:,}" for budget in BUDGETS])
                axes.minorticks_off()
                axes.grid(axis="y")
                if dataset == next(iter(best)):
                    axes.set_title(f"noise of {noise:g} %", fontsize=9)
            row[0].set_ylabel(f"{dataset}:\naccuracy, % (line: the best there is)", fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("evaluations")
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.02, 0.995), ncols=4, fontsize=8)


if __name__ == "__main__":
    main()
