"""What does racing spare, and does it change what a search finds?

Searches of a trained supernet, the folder of a ``genas search``, with and without racing, one pair a seed: the share of
image evaluations that racing saved, whether the best ones are the same with the same scores, and the time of both. The
last line says whether they are the same for all seeds::

    python benchmarks/racing.py runs/digits --searches 5 --check

A machine that others use as well is too noisy for the clock on the wall: ``--threads 1 --clock cpu`` counts the
work of this process only. The time includes recalibration, which every candidate needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
from scoring import CLOCKS, print_table

from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import METRICS
from genas_plugins.search import Evolution, run_search
from genas_plugins.search.racing import spared_images

__all__ = ["compare", "main"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A search with and without racing.

    Attributes:
        spared: Share of the image evaluations that racing saved.
        dropped: Candidates that were not measured on all images.
        same_best: Both found the same best candidate with the same score.
        same_top: The same best ``parents``, in order, with the same scores.
        seconds: Without and with racing.
    """

    spared: float
    dropped: int
    same_best: bool
    same_top: bool
    seconds: tuple[float, float]


def compare(trained: Scorer, search: argparse.Namespace, seed: int) -> Pair:
    """Search twice from the same seed.

    Args:
        trained: The supernet, its images and the score.
        search: ``population``, ``generations``, ``parents``, ``confidence`` and ``clock``.
        seed: Of evolution and noise.
    """
    images = {"validation": trained.validation, "recalibration": trained.recalibration}
    scorer = Scorer(trained.paths, trained.score, **images, seed=seed)
    tops, seconds, records = [], [], []
    for raced in (False, True):
        evolution = Evolution(
            scorer.paths.search_space,
            population=search.population,
            generations=search.generations,
            parents=search.parents,
            mutants=search.population // 2,
            crossovers=search.population * 3 // 10,
            seed=seed,
        )
        start = search.clock()
        race = scorer.race(search.confidence, search.parents) if raced else None
        records = run_search(evolution, scorer.measure, race=race)
        seconds.append(search.clock() - start)
        tops.append(evolution.best(search.parents))
    dropped = sum(record.status == "dropped" for record in records)
    spared = spared_images(records, len(trained.data.validation))
    return Pair(spared, dropped, tops[0][:1] == tops[1][:1], tops[0] == tops[1], (seconds[0], seconds[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="DIR", help="of genas search, with a trained supernet")
    parser.add_argument("--searches", type=int, default=5, help="seeds (default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.999, help="default: %(default)s")
    parser.add_argument("--population", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--generations", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--parents", type=int, default=10, help="the best that must be the same (default: %(default)s)")
    parser.add_argument("--metric", choices=[m for m in METRICS if m != "angle"], help="default: the run's")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu counts this process's work only")
    parser.add_argument("--check", action="store_true", help="exit 1 when a search finds others")
    args = parser.parse_args(arguments)
    if args.searches < 1:
        parser.error(f"--searches must be at least 1, got {args.searches}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.clock = CLOCKS[args.clock]
    trained = Scorer.from_run(args.run, device=args.device)
    if args.metric:
        trained.score = dataclasses.replace(trained.score, metric=args.metric)
    print(
        f"{args.searches} searches of {args.generations} x {args.population} candidates by {trained.score.metric}, "
        f"{len(trained.data.validation)} validation images, confidence {args.confidence:g}, {trained.device}",
        flush=True,
    )
    started = time.perf_counter()
    pairs = [compare(trained, args, seed) for seed in range(args.searches)]
    print_table(
        (
            "seed",
            "images saved",
            "dropped",
            "same best",
            f"same top {args.parents}",
            "seconds without",
            "with",
            "ratio",
        ),
        [
            (
                *(str(seed), f"{pair.spared:.1%}", str(pair.dropped)),
                *("yes" if same else "NO" for same in (pair.same_best, pair.same_top)),
                *(f"{seconds:.1f}" for seconds in pair.seconds),
                f"{pair.seconds[1] / pair.seconds[0]:.2f}",
            )
            for seed, pair in enumerate(pairs)
        ],
    )
    same = sum(pair.same_top for pair in pairs)
    print(
        f"the same top {args.parents} in {same} of {len(pairs)} searches; {time.perf_counter() - started:.0f} s in all"
    )
    return 1 if args.check and same < len(pairs) else 0


if __name__ == "__main__":
    sys.exit(main())
