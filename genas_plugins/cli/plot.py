"""Draw the cells or the neighbourhood of a genotype, or the progress and the loss curves of a search."""

from __future__ import annotations

import argparse
from pathlib import Path

from genas_plugins.cli.shared import add_machine
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201.truth import read_truth
from genas_plugins.plotting import (
    LossCurve,
    Neighbour,
    plot_cells,
    plot_loss_curves,
    plot_neighbourhood,
    plot_search,
)
from genas_plugins.scoring import NeighbourhoodScore, mean_loss
from genas_plugins.search import History

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas plot cells genas_flatness_c100 cells.svg"
    parser.add_argument("what", choices=("cells", "search", "losses", "neighbourhood"))
    parser.add_argument("source", help="for cells, neighbourhood: as in genas score; otherwise the folder of a search")
    parser.add_argument("output", help="the picture: .svg, .png or .pdf")
    parser.add_argument("--top", type=int, default=5, help="for losses: how many of the best")
    parser.add_argument("--run", metavar="DIR", help="for neighbourhood: the folder of a search, or its supernet")
    parser.add_argument("--truth", metavar="SOURCE", help="for neighbourhood: true accuracies, as in genas correlate")
    parser.add_argument("--dataset", default="cifar10", help="of the true accuracies; default: %(default)s")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Draw the picture, and print where it is."""
    if options.what == "cells":
        print(plot_cells(find_genotype(options.source), options.output))
        return 0
    if options.what == "neighbourhood":
        print(_neighbourhood(options))
        return 0
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}.")
    path = Path(options.source) / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{options.source} is not the folder of a search: no history.jsonl.")
    history = History(path, read_only=True)
    history.check()
    records = history.records
    if options.what == "search":
        print(plot_search(records, options.output))
        return 0
    scored = sorted((record for record in records if record.losses), key=lambda record: -record.score)[: options.top]
    if not scored:
        raise ValueError(f"{path} has no losses: its search did not measure flatness.")
    curves = [
        LossCurve(f"#{rank}", tuple(record.sigmas), tuple(record.losses), record.score)
        for rank, record in enumerate(scored, 1)
    ]
    print(plot_loss_curves(curves, options.output))
    return 0


def _neighbourhood(options: argparse.Namespace) -> Path:
    if options.run is None:
        raise ValueError("--run is missing: the folder of a search, whose supernet scores the neighbours.")
    truth = {} if options.truth is None else read_truth(options.truth, options.dataset)
    scorer = Scorer.from_run(options.run, device=options.device, data_root=options.data_root)
    space = scorer.paths.search_space
    candidate = space.read(options.source)
    near = scorer.neighbours(NeighbourhoodScore(scorer.score))
    own = near.measure(candidate)
    sample = space.to_sample(candidate)
    neighbours = []
    for other, score in near.scores(candidate)[1:]:
        ((label, choice),) = ((key, value) for key, value in space.to_sample(other).items() if value != sample[key])
        if score is not None:
            edge = label.removeprefix("cell/").replace("/op_", " ")
            neighbours.append(Neighbour(edge, choice, score, truth.get(str(other))))
    curve = None
    if own.flatness is not None:
        with scorer.calibrated(candidate) as model:
            unperturbed = mean_loss(model, scorer.validation)
        curve = LossCurve("", (0.0, *own.flatness.sigmas), (unperturbed, *own.flatness.losses))
    title = f"{options.source}: {scorer.score.metric} of its {len(neighbours)} neighbours"
    middle = own.neighbourhood["own"]
    return plot_neighbourhood(
        middle, neighbours, options.output, curve=curve, truth=truth.get(str(candidate)), title=title
    )
