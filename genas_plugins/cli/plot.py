"""Draw the cells of a genotype, or the progress and the loss curves of a search."""

from __future__ import annotations

import argparse
from pathlib import Path

from genas_plugins.darts.zoo import find_genotype
from genas_plugins.plotting import LossCurve, plot_cells, plot_loss_curves, plot_search
from genas_plugins.search import History

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas plot cells genas_flatness_c100 cells.svg"
    parser.add_argument("what", choices=("cells", "search", "losses"))
    parser.add_argument("source", help="for cells: as in genas score; otherwise the folder of a search")
    parser.add_argument("output", help="the picture: .svg, .png or .pdf")
    parser.add_argument("--top", type=int, default=5, help="for losses: how many of the best")


def run(options: argparse.Namespace) -> int:
    """Draw the picture, and print where it is."""
    if options.what == "cells":
        print(plot_cells(find_genotype(options.source), options.output))
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
