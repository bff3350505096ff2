"""Do fast scores rank as exact ones? The library's flatness against a brute force in float64.

Random candidates of a trained supernet, the folder of a ``genas search``, are scored with the library and as the
definition says: the network as it is, in float64, statistics of batch normalisation and losses anew, with the same
noise. The last line says whether all losses are within 1e-5 of the exact ones and Kendall's tau is at least 0.99::

    python benchmarks/agreement.py runs/digits --candidates 200 --check
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import nn

from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import Flatness, flatness, flatness_from_losses, recalibrate_batchnorm
from genas_plugins.scoring.data import Batches
from genas_plugins.scoring.noise import perturbations
from genas_plugins.scoring.perturbation import Perturbation

__all__ = ["exact", "main"]

SIGMAS = ((1e-5, 5e-5, 1e-4), (1e-3, 3e-3, 6e-3), (2e-3, 1e-2, 2e-2))
"""Of the paper's searches on CIFAR-10 and CIFAR-100, and of NAS-Bench-201."""

LEAST_TAU = 0.99
LARGEST_ERROR = 1e-5


@torch.no_grad()
def exact(model: nn.Module, recalibration: Batches, batches: Batches, sigmas: Sequence[float], seed: int) -> Flatness:
    """Eq. 4 of a network in float64, layer by layer as it stands, with the noise that the library draws."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    noises = list(
        perturbations(model, [name for name, _ in model.named_parameters()], Perturbation(sigmas=sigmas), generator)
    )
    network = copy.deepcopy(model).double().eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images, _ in recalibration:
        network(images.double())
    network.eval()
    losses = []
    for noise in noises:
        network.load_state_dict(noise, strict=False)
        total, count = 0.0, 0
        for images, labels in batches:
            total += F.cross_entropy(network(images.double()), labels, reduction="sum").item()
            count += len(labels)
        losses.append(total / count)
    return flatness_from_losses(losses, sigmas)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="DIR", help="of genas search, with a trained supernet")
    parser.add_argument("--candidates", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--images", type=int, help="validation images (default: all)")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", action="append", help="repeatable; default: the paper's three"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the candidates and the noise")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args(arguments)
    trained = Scorer.from_run(args.run, device=args.device)
    validation = trained.validation.limit(args.images) if args.images else trained.validation
    rng = np.random.default_rng(args.seed)
    candidates = [trained.paths.search_space.sample(rng) for _ in range(args.candidates)]
    example, _ = next(iter(validation))
    passed = True
    images = args.images or len(trained.data.validation)
    print(f"{args.candidates} candidates, {images} validation images, {trained.device}")
    for sigmas in args.sigmas or SIGMAS:
        pairs = []
        for number, candidate in enumerate(candidates):
            with trained.paths.open(candidate, example) as (model, _):
                reference = exact(model, trained.recalibration, validation, sigmas, number)
                recalibrate_batchnorm(model, trained.recalibration)
                generator = torch.Generator(trained.device).manual_seed(number)
                pairs.append((flatness(model, validation, sigmas, generator=generator), reference))
        errors = [
            abs(a / b - 1) for ours, reference in pairs for a, b in zip(ours.losses, reference.losses, strict=True)
        ]
        tau = kendalltau(*zip(*((ours.score, reference.score) for ours, reference in pairs), strict=True)).statistic
        slopes = kendalltau(*zip(*((ours.slope, reference.slope) for ours, reference in pairs), strict=True)).statistic
        passed &= bool(tau >= LEAST_TAU and max(errors) <= LARGEST_ERROR)
        print(
            f"sigmas {' '.join(f'{sigma:g}' for sigma in sigmas)}: tau of the scores {tau:.4f}, of the slope term "
            f"{slopes:.4f}; largest relative error of a loss {max(errors):.1e}, median {np.median(errors):.1e}",
            flush=True,
        )
    print(f"tau >= {LEAST_TAU} and error <= {LARGEST_ERROR:g}: {'yes' if passed else 'no'}")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
