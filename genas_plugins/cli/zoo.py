"""List the published genotypes."""

from __future__ import annotations

import argparse

import torch

from genas_plugins.cli.shared import table
from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.zoo import ZOO

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas zoo"
    parser.add_argument(
        "--measure", action="store_true", help="build the networks and count, instead of the stored counts"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    rows = [("name", "searched on", "metric", "C", "params (M)", "paper", "MACs (M)", "paper", "top-1", "top-5")]
    for entry in ZOO.values():
        parameters, macs, paper = entry.params, entry.macs_million, entry.paper
        if options.measure:
            with torch.device("meta"):
                network = entry.network()
            parameters, macs = count_parameters(network), count_macs(network) / 1e6
        row = (entry.name, entry.search_dataset, entry.metric, f"{entry.init_channels}", f"{parameters / 1e6:.3f}")
        row += (f"{paper['params_million']:.1f}" if "params_million" in paper else "-", f"{macs:.1f}")
        row += (f"{1000 * paper['macs_giga']:.0f}" if "macs_giga" in paper else "-",)
        rows.append(row + tuple(f"{paper[key]:.2f}" if key in paper else "-" for key in ("top1", "top5")))
    print("\n".join(table(rows)))
    print("\nImageNet networks of 14 cells at 224 pixels, without the auxiliary head; accuracies are the paper's.")
    return 0
