"""Score one genotype with the supernet of a run."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from genas_plugins.cli.shared import add_machine, table
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import CombinedScore, NeighbourhoodScore
from genas_plugins.scoring.neighbourhood import AGGREGATES

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas score genas_flatness_c10 --run runs/cifar10 --metric accuracy"
    parser.add_argument(
        "genotype",
        help="a name of the zoo, a JSON file, 28 integers, or a string of NAS-Bench-201, in quotes",
    )
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="the folder of a search, or the file of its supernet"
    )
    parser.add_argument("--metric", help="another metric than the run's")
    parser.add_argument("--sigmas", nargs="+", type=float, metavar="SIGMA", help="other sigmas than the run's")
    parser.add_argument(
        "--neighbours",
        nargs="?",
        const=0,
        type=int,
        metavar="N",
        help="also the scores of its neighbours, or of a sample of N of them",
    )
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Print the score and what it is made of."""
    scorer = Scorer.from_run(options.run, device=options.device, data_root=options.data_root)
    candidate = scorer.paths.search_space.read(options.genotype)
    changes = {name: getattr(options, name) for name in ("metric", "sigmas") if getattr(options, name) is not None}
    score = dataclasses.replace(scorer.score, **changes)
    measured = scorer.measure(candidate, score)
    accuracy = scorer.test_accuracy(candidate)
    rows = [("metric", score.metric), ("score", f"{measured.score:.6g}")]
    rows += [(f"share of {name}", f"{share:.1%}") for name, share in measured.shares.items()]
    if measured.flatness is not None:
        pairs = zip(measured.flatness.sigmas, measured.flatness.losses, strict=True)
        rows += [(f"loss at sigma {sigma:g}", f"{loss:.6f}") for sigma, loss in pairs]
    if measured.angle is not None:
        rows.append(("angle / pi", f"{measured.angle:.6f}"))
    if measured.accuracy is not None:
        rows.append(("validation top-1", f"{measured.accuracy.top1:.2%}"))
    if accuracy is not None:
        rows.append(("test top-1", f"{accuracy.top1:.2%}"))
    print("\n".join(table(rows)))
    if options.neighbours is not None:
        print("\n".join(_neighbours(scorer, candidate, score, options.neighbours)))
    return 0


def _neighbours(scorer: Scorer, candidate: Any, score: CombinedScore, size: int) -> Iterator[str]:
    """The scores of the neighbourhood, put together in each way and one by one."""
    if size < 0:
        raise ValueError(f"--neighbours must not be negative, got {size}.")
    near = scorer.neighbours(NeighbourhoodScore(score, size=size or None))
    near.measure(candidate)
    (_, own), *others = near.scores(candidate)
    finite = [own, *(value for _, value in others if value is not None)]
    better = sum(value > own for value in finite)
    yield f"\n{len(others)} neighbours, {len(others) + 1 - len(finite)} without a score, {better} better:\n"
    rows = [(f"{name} with its own", f"{NeighbourhoodScore(score, name).of(finite):.6g}") for name in AGGREGATES]
    yield from table(rows)
    yield ""
    others.sort(key=lambda pair: -math.inf if pair[1] is None else pair[1], reverse=True)
    yield from table([("-" if value is None else f"{value:.6g}", str(other)) for other, value in others])
