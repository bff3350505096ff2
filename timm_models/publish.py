"""Write a trained network as a folder for the Hugging Face hub, with weights, configuration and card."""

from __future__ import annotations

import argparse
from pathlib import Path

from genas_plugins._optional import require
from genas_plugins._reading import user_path
from genas_plugins.counting import count_parameters
from genas_plugins.files import check_new_folder
from timm_models.publishing import check_repository, publish, push
from timm_models.searches import open_search
from timm_models.trained import open_trained

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas publish output/train/my-run published/my-network --search runs/cifar10"
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a training's folder (its best weights), or a file")
    parser.add_argument("folder", metavar="DIR", help="a new folder, or an empty one")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then push it to the hub; creates the repository")
    parser.add_argument("--search", metavar="DIR", help="the search that found it, for the card; default: as trained")
    parser.add_argument("--genotype", help="for a file that does not say it; as in genas score")
    parser.add_argument("--license", metavar="NAME", help="the licence of the weights, as the hub names it")


def run(options: argparse.Namespace) -> int:
    """Write the folder, push it if asked to, and print how it is opened."""
    require("matplotlib", extra="plots", purpose="the picture of the cells")
    folder = user_path(options.folder)
    check_new_folder(folder)
    repository = None if options.push is None else check_repository(options.push)
    search = None if options.search is None else open_search(options.search)
    network = open_trained(options.source, options.genotype)
    search = publish(network, folder, search=search, repository=repository, license=options.license)
    top1 = network.figures.get("top1")
    measured = "unknown" if top1 is None else f"{top1:.2f} %"
    print(f"{folder}: {count_parameters(network.model) / 1e6:.3f} M parameters, top-1 {measured}.")
    print(f'Open it with: import timm, timm_models; timm.create_model("local-dir:{Path(folder)}", pretrained=True)')
    if repository is not None:
        print(f"It is at {push(network, folder, repository, search=search, license=options.license)}")
    return 0
