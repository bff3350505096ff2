"""Write the network of an official, timm or own checkpoint as clean safetensors."""

from __future__ import annotations

import argparse

from genas_plugins.checkpoints import convert_network
from genas_plugins.counting import count_parameters
from genas_plugins.darts.zoo import find_genotype

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas convert model_best.pth.tar flatness_c100.safetensors --genotype genas_flatness_c100"
    parser.add_argument("checkpoint", help="a file of torch.save or safetensors; nothing in it is executed")
    parser.add_argument("output", help="the file to write: .safetensors")
    parser.add_argument("--genotype", help="as in genas score; default: the file's own, or the published one that fits")
    parser.add_argument("--drop-auxiliary", action="store_true", help="leave the auxiliary head out")


def run(options: argparse.Namespace) -> int:
    """Write the file, and print what is in it."""
    genotype = None if options.genotype is None else find_genotype(options.genotype)
    network = convert_network(options.checkpoint, options.output, genotype, auxiliary=not options.drop_auxiliary)
    head = "with" if network.auxiliary_head is not None else "without"
    print(
        f"{options.output}: genotype {network.genotype}, {len(network.shapes)} cells, {network.num_classes} classes, "
        f"{count_parameters(network) / 1e6:.3f} M parameters, {head} the auxiliary head."
    )
    return 0
