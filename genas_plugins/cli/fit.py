"""Find the widest ImageNet network of a genotype within a budget."""

from __future__ import annotations

import argparse
import contextlib

import torch

from genas_plugins.cli.shared import table
from genas_plugins.counting import count_macs, count_parameters, fit_channels
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.zoo import IMAGENET_CELLS, find_genotype
from genas_plugins.search.budget import amount

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas fit runs/cifar10/genotype.json --macs 600M"
    parser.add_argument("genotype", help="a name of the zoo, a JSON file, or 28 integers in quotes")
    parser.add_argument(
        "--macs", type=_amount, default=600e6, metavar="N", help="multiply-adds, default 600M; also 0.6G"
    )
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="default 224")


def run(options: argparse.Namespace) -> int:
    """Print the network's width and size."""
    if options.image_size < 32:
        raise ValueError(f"--image-size must be at least 32, got {options.image_size}.")
    genotype = find_genotype(options.genotype)
    channels = fit_channels(genotype, options.macs, options.image_size)
    with torch.device("meta"):
        network = CellNetwork(genotype, channels, IMAGENET_CELLS, 1000)
    parameters, macs = count_parameters(network), count_macs(network, options.image_size)
    rows = [
        ("init_channels", f"{channels}"),
        ("params (M)", f"{parameters / 1e6:.3f}"),
        ("MACs (M)", f"{macs / 1e6:.1f}"),
    ]
    print("\n".join(table(rows)))
    print(f"\n{IMAGENET_CELLS} cells, 1000 classes, {options.image_size} pixels, without the auxiliary head.")
    return 0


def _amount(text: str) -> float:
    """``600M``, ``0.6G`` or ``6e8``."""
    with contextlib.suppress(ValueError):
        if (found := amount(text)) > 0:
            return found
    raise argparse.ArgumentTypeError(f"expected a number such as 600M, 0.6G or 6e8, got {text!r}")
