"""Does the score rank architectures? The paper's Tables 1, 5, 6 and 7 with several supernets, beside its figures.

For each seed a supernet is trained, searched and held against the accuracies of a sample of NAS-Bench-201; then the
seeds are put together: tau of each score for each seed and for the sum of their ranks, and which scores are better
than the paper's setting, and than live FLOPs, on one half of the architectures and again on the other, with every seed
and by the sum of ranks. From a folder with ``cifar10_train.zip`` and ``cifar10_test.zip`` (``<class>/*``) and
``nasbench201_accuracy.csv``::

    python benchmarks/nasbench201.py DIR --output runs/nasbench201 --jobs 2

The same command goes on after a stop, at the architecture that comes next. At the paper's size, on a GPU, with a CSV of
the accuracies and images that torchvision fetches::

    python benchmarks/nasbench201.py DIR --output runs/full --config nasbench201_cifar10_flatness --sample 15625 \\
        --set data.download=true --set training.accelerator=gpu

It writes ``report.md`` and ``halves.csv``, and a folder per seed as ``genas correlate`` does.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from genas_plugins.correlation.statistics import Estimate, compare, rank_correlation
from genas_plugins.files import atomic_path, write_text
from genas_plugins.locking import lock_folder

__all__ = ["PAPER", "Scores", "main", "read_scores", "report"]

PAPER: dict[str, float] = {
    "flatness": 0.6047,
    "flatness, sigmas 1e-6 5e-6 1e-5": 0.5756,
    "flatness, sigmas 5e-4 1e-3 2e-3": 0.5770,
    "flatness, sigmas 2e-3 2e-2 4e-2": 0.5416,
    "flatness, alpha 0": 0.1777,
    "flatness, alpha 0.1": 0.4026,
    "flatness, alpha 0.5": 0.5890,
    "flatness, alpha 4": 0.5898,
    "flatness, alpha 16": 0.5820,
    "flatness, cells only": 0.5612,
    "flatness, Hessian direction": 0.5908,
}
"""Kendall's tau on CIFAR-10 over all architectures (GeNAS, IJCAI 2023, Tables 5, 6 and 7), by names of paper_tables."""

BASELINES = ("flatness", "live FLOPs")
SPLITS = ("train", "test")

Scores = Mapping[str, Sequence[float]]


def unpack(source: Path, folder: Path) -> None:
    """Extract both archives, each whole or not at all.

    Raises:
        ValueError: An archive is missing or is none.
    """
    for split in SPLITS:
        # Of a process that was killed meanwhile.
        for leftover in folder.glob(f".{split}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if (folder / split).is_dir():
            continue
        archive = source / f"cifar10_{split}.zip"
        if not zipfile.is_zipfile(archive):
            raise ValueError(f"{archive} is no ZIP archive; it should have images as <class>/*.")
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
        try:
            with zipfile.ZipFile(archive) as images:
                images.extractall(partial)
            partial.rename(folder / split)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def commands(args: argparse.Namespace) -> Iterator[list[str]]:
    """What to run for each seed."""
    overrides = list(args.overrides)
    if not any(item.startswith(("data.root=", "data.download=", "data.name=")) for item in overrides):
        unpack(args.source, args.output / "cifar10")
        overrides.append(f"data.root={args.output / 'cifar10'}")
    for seed in args.seeds:
        folder = args.output / f"seed{seed}"
        command = [sys.executable, "-m", "genas_plugins", "correlate", "--config", args.config, "--quiet"]
        for item in (*overrides, f"seed={seed}"):
            command += ["--set", item]
        command += ["--truth", str(args.source / "nasbench201_accuracy.csv"), "--settings", *args.settings]
        command += ["--sample", str(args.sample), "--resamples", str(args.resamples), "--output", str(folder)]
        command += ["--images", str(args.images)] if args.images else []
        command += ["--training-free"] * args.training_free
        command += ["--resume"] * folder.exists()
        yield command


def run(args: argparse.Namespace) -> None:
    """Train and measure for all seeds.

    Raises:
        subprocess.CalledProcessError: One of them failed; it has said why.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}

    def start(command: list[str]) -> None:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, commands(args)))


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """``scores.csv`` of ``genas correlate``: by architecture, ``truth`` and each score."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row.pop("architecture"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
        }


def report(folders: Mapping[int, Path], output: Path, *, resamples: int = 1000) -> str:
    """Put seeds together; write ``report.md`` and ``halves.csv``.

    Args:
        folders: Of ``genas correlate``, by seed.
        output: Where to.
        resamples: Of the bootstrap.

    Returns:
        The text of ``report.md``.

    Raises:
        ValueError: Fewer than six architectures have a score with every seed.
    """
    tables = {seed: read_scores(folder / "scores.csv") for seed, folder in folders.items()}
    first = next(iter(tables.values()))
    names = [name for name in first if all(name in table for table in tables.values())]
    if len(names) < 6:
        raise ValueError(f"{len(names)} architectures have a score with every seed, at least 6 are needed.")
    truth = np.array([first[name]["truth"] for name in names])
    columns = {
        seed: {column: np.array([table[name][column] for name in names]) for column in table[names[0]]}
        for seed, table in tables.items()
    }
    scores = [column for column in columns[next(iter(tables))] if column != "truth"]
    together = {
        score: sum(rankdata(table[score]) for table in columns.values())
        for score in scores
        if all(score in table for table in columns.values())
    }
    lines = [["score", "paper", *(f"seed {seed}" for seed in tables), "ranks of all seeds"]]
    for score in scores:
        having = [table[score] for table in columns.values() if score in table]
        cells = [f"{PAPER[score]:.3f}" if score in PAPER else ""]
        for table in columns.values():
            cells.append(_tau(table[score], truth, resamples) if score in table else "")
        same = all(np.array_equal(having[0], column) for column in having[1:])
        cells.append("" if same or score not in together else _tau(together[score], truth, resamples))
        lines.append([score, *cells])
    text = f"Kendall's tau with the accuracy on {len(names)} architectures (95 % interval)\n\n{_markdown(lines)}"
    found = list(_halves([*columns.values(), together], scores, truth, resamples))
    for baseline, (whose, part) in itertools.product(BASELINES, _WHOSE.items()):
        text += f"\nBetter than {baseline} by more than the interval, {whose} and on both halves:\n\n"
        kept = [row for row in found if row[1] == baseline and _better(row[2][part]) == "both"]
        text += "".join(f"- {score}: {', '.join(_told(pairs[part]))}\n" for score, _, pairs in kept) or "- none\n"
    write_text(output / "report.md", text)
    tables_of = [*(f"seed {seed}" for seed in columns), "ranks of all seeds"]
    differences = [f"{table}, half {half}" for table, half in itertools.product(tables_of, "12")]
    with atomic_path(output / "halves.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["score", "baseline", *differences, *(f"better {whose} on" for whose in _WHOSE)])
        for score, baseline, pairs in found:
            writer.writerow([score, baseline, *_told(pairs), *(_better(pairs[part]) for part in _WHOSE.values())])
    return text


Pairs = list[tuple[Estimate, Estimate] | None]

# Which of the tables' differences: one for each seed, then that of the ranks.
_WHOSE = {"with every seed": slice(None, -1), "by the ranks of all seeds": slice(-1, None)}


def _halves(
    tables: Sequence[Scores], scores: Sequence[str], truth: np.ndarray, resamples: int
) -> Iterator[tuple[str, str, Pairs]]:
    """Score, baseline, and for each table the differences of their taus on both halves, ``None`` where one lacks them.

    What is chosen on the first half is to hold on the second.
    """
    order = np.random.default_rng(0).permutation(len(truth))
    parts = np.array_split(order, 2)
    for baseline, score in itertools.product(BASELINES, scores):
        if score == baseline or not all(baseline in table for table in tables):
            continue
        pairs: Pairs = []
        for table in tables:
            if score not in table:
                pairs.append(None)
                continue
            first, second = (
                compare(table[score][part], table[baseline][part], truth[part], seed=0, resamples=resamples)
                for part in parts
            )
            pairs.append((first, second))
        yield score, baseline, pairs


def _better(pairs: Pairs) -> str:
    """On which halves the score is better by more than the interval, in all of the tables that have it."""
    having = [pair for pair in pairs if pair is not None]
    halves = [f"half {half + 1}" for half in range(2) if having and all(pair[half].low > 0 for pair in having)]
    return "both" if len(halves) == 2 else "".join(halves)


def _told(pairs: Pairs) -> list[str]:
    return [str(each) for pair in pairs for each in pair or ("", "")]


def _tau(scores: Sequence[float], truth: np.ndarray, resamples: int) -> str:
    tau: Estimate = rank_correlation(scores, truth, seed=0, resamples=resamples).tau
    return str(tau)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="DIR", help="with the two archives and the accuracies")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--config", default="nasbench201_cifar10_reduced", help="of the supernet (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="on top of it"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        help="of genas correlate (default: paper_tables and hessian, and estimators with the training-free scores)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="a supernet each (default: 0 1)")
    parser.add_argument("--sample", type=int, default=500, help="architectures (default: %(default)s)")
    parser.add_argument("--images", type=int, help="to score on (default: those of the configuration)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: %(default)s)")
    parser.add_argument(
        "--no-training-free", action="store_false", dest="training_free", help="no NASWOT, SynFlow, ZiCo"
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--jobs must be at least 1 and the seeds must differ, got {args.jobs} and {args.seeds}")
    args.settings = args.settings or ["paper_tables", "hessian", *["estimators"] * args.training_free]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment and return the exit code."""
    args = parse(arguments)
    try:
        with lock_folder(args.output):
            run(args)
            folders = {seed: args.output / f"seed{seed}" for seed in args.seeds}
            print(report(folders, args.output, resamples=args.resamples))
    except (ValueError, OSError) as error:
        print(f"nasbench201: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
