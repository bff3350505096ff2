"""The paper's evidence at the paper's size, in minutes: NAS-Bench-201 supernets, several seeds at once.

Three commands, each of which can be repeated to go on after a stop. From a folder with ``cifar10_train.zip`` and
``cifar10_test.zip`` (``<class>/*``) and ``nasbench201_accuracy.csv``::

    python benchmarks/evidence.py train runs/evidence --source DIR --seconds 320
    python benchmarks/evidence.py score runs/evidence --source DIR --seconds 170
    python benchmarks/evidence.py tables runs/evidence --source DIR

* ``train``: a process for each seed, because a training step leaves most of a GPU idle. First each measures its steps
  while the others do, and the number of epochs is chosen so that the slowest ends in time, 250 at most; the cosine
  schedule runs to its end whatever the number. A supernet that is trained is written as ``seed0.safetensors``, which
  ``genas correlate --run`` opens anywhere.
* ``score``: a process for each supernet measures architectures in one random order, the same for all, as many as fit.
* ``tables``: Tables 1, 5, 6 and 7 beside the paper's, as ``tables.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Imports count.
START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
# The checkout need not be installed.
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from nasbench201 import PAPER, unpack  # noqa: E402
from scipy.stats import rankdata  # noqa: E402

from genas_plugins.correlation.statistics import kendall  # noqa: E402
from genas_plugins.files import write_text  # noqa: E402

__all__ = ["PAPER_PAIRS", "TABLES", "choose_epochs", "main", "tables"]

CONFIG = "nasbench201_cifar10_flatness"
SETTINGS = ("paper_tables", "label_free")
EPOCHS = 250
SAFETY = 0.95
IMAGES = 5000
TRUTH_FILE = "nasbench201_accuracy.csv"
# Seconds of a process that train nothing and measure nothing: imports, images, what is written at its end.
AROUND_TRAINING, AROUND_SCORING = 20.0, 30.0

REHEARSAL = (
    *("space.init_channels=4", "space.cells_per_stage=1"),
    *("data.train_images=128", "data.validation_images=64", "data.test_images=16", "data.image_size=16"),
    "score.recalibration_images=128",
)
"""Settings of a run that shows that every step works, and nothing else."""

Scores = Mapping[str, Mapping[str, float]]

PAPER_PAIRS: dict[tuple[str, str], float] = {("angle", "flatness"): 0.4302, ("accuracy", "flatness"): 0.7923}
"""Kendall's tau between metrics on CIFAR-10 over all architectures (GeNAS, IJCAI 2023, Table 1)."""

TABLES: dict[str, tuple[str, ...]] = {
    "Table 5, sigmas": (
        "flatness, sigmas 1e-6 5e-6 1e-5",
        "flatness, sigmas 5e-4 1e-3 2e-3",
        "flatness",
        "flatness, sigmas 2e-3 2e-2 4e-2",
    ),
    "Table 6, alpha": (
        *(f"flatness, alpha {alpha}" for alpha in ("0", "0.1", "0.5")),
        "flatness",
        *(f"flatness, alpha {alpha}" for alpha in ("4", "16")),
    ),
    "Table 7, where the noise goes": ("flatness", "flatness, cells only"),
    "Beside them": (
        *("-loss", "accuracy", "angle", "angle + flatness", "accuracy + flatness", "parameters", "live FLOPs"),
        "2 live FLOPs, -loss, NASWOT, logarithms",
    ),
}
"""Columns of paper_tables and label_free by the paper's table that has them."""


def choose_epochs(seconds_a_step: float, steps: int, seconds: float) -> int:
    """How many epochs fit.

    Args:
        seconds_a_step: Of the slowest process, while all train.
        steps: An epoch.
        seconds: That there are.

    Returns:
        1 to :data:`EPOCHS`; from ten on a multiple of five, so that checkpoints every five epochs end with the last.
    """
    epochs = max(1, min(EPOCHS, int(SAFETY * seconds / (seconds_a_step * steps))))
    return epochs if epochs < 10 else epochs - epochs % 5


class Pace:
    """As a progress display, notes when each step of training ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, name: str, total: int, done: int) -> Pace:
        return self

    def step(self, shown: Mapping[str, Any]) -> None:
        self.ends.append(time.monotonic())

    def close(self) -> None: ...

    @property
    def seconds_a_step(self) -> float:
        """Over the last two thirds, with what happens between epochs: the first steps choose algorithms."""
        ends = self.ends[len(self.ends) // 3 :]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def settings_of(args: argparse.Namespace, *more: str) -> list[str]:
    """The paper's experiment with the images of ``args``, as ``--set`` options."""
    accelerator = "gpu" if args.device.startswith("cuda") else "cpu"
    settings = [
        *("data.name=image_folder", f"data.root={args.output / 'cifar10'}", "data.image_size=32"),
        *(f"data.validation_images={IMAGES}", f"training.accelerator={accelerator}"),
        *(REHEARSAL if args.rehearse else ()),
    ]
    return [part for item in (*settings, *more) for part in ("--set", item)]


def together(commands: Mapping[int, Sequence[str]], folder: Path, name: str) -> None:
    """Run a process for each seed at once; what they print goes to files.

    Raises:
        RuntimeError: One of them failed; the message has the end of what it printed. The others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = {seed: folder / f"{name}{seed}.txt" for seed in commands}
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for seed, command in commands.items():
            with logs[seed].open("ab") as log:
                processes[seed] = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=environment(len(commands)), stdout=log, stderr=log
                )
        while any(process.poll() is None for process in processes.values()):
            failed = [seed for seed, process in processes.items() if process.poll()]
            if failed:
                break
            time.sleep(0.1)
        for seed, process in processes.items():
            if process.poll():
                said = logs[seed].read_text(errors="replace").strip()[-2000:]
                raise RuntimeError(f"{name} of seed {seed} ended with {process.returncode}: {said}")
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def environment(processes: int) -> dict[str, str]:
    """The checkout's packages, and a share of the cores."""
    threads = max(1, min(4, (os.cpu_count() or 1) // processes))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def pace(args: argparse.Namespace) -> None:
    """Print the seconds of a training step: what a process does while the others do the same."""
    from genas_plugins.experiment import config
    from nni_strategy.run import run_experiment

    steps, epochs = (2, 3) if args.rehearse else (100, 10)
    few = (f"data.train_images={64 * steps}", "data.validation_images=64", "data.test_images=16")
    few += ("score.recalibration_images=64", f"training.epochs={epochs}", f"seed={args.seeds[0]}")
    measured = Pace()
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        overrides = settings_of(args, *few)[1::2]
        run_experiment(config.load(CONFIG, overrides), Path(folder) / "run", train_only=True, progress=measured)
    write_text(args.output / f"pace{args.seeds[0]}.json", json.dumps(measured.seconds_a_step))


def train(args: argparse.Namespace) -> None:
    """Train all seeds at once, and write their supernets."""
    from genas_plugins.experiment.run_folder import save_trained

    end = START + args.seconds - AROUND_TRAINING
    unpack(args.source, args.output / "cifar10")
    plan_file = args.output / "epochs.json"
    if not plan_file.exists():
        together({seed: [__file__, *options(args, "pace", seed)] for seed in args.seeds}, args.output, "pace")
        slowest = max(json.loads((args.output / f"pace{seed}.json").read_text()) for seed in args.seeds)
        files = sum(1 for file in (args.output / "cifar10" / "train").rglob("*") if file.is_file())
        steps = -(-(files // 2) // 64)
        epochs = 2 if args.rehearse else choose_epochs(slowest, steps, end - time.monotonic())
        write_text(plan_file, json.dumps({"epochs": epochs, "seconds_a_step": slowest, "steps_an_epoch": steps}))
    plan = json.loads(plan_file.read_text())
    print(f"{plan['epochs']} epochs of {plan['steps_an_epoch']} steps, {1000 * plan['seconds_a_step']:.2f} ms a step")
    started = time.monotonic()
    together({seed: train_command(args, seed, plan["epochs"]) for seed in args.seeds}, args.output, "train")
    card = {**plan, "seeds_at_once": len(args.seeds), "seconds": round(time.monotonic() - started, 1)}
    card |= {"machine": machine(args.device), "date": datetime.date.today().isoformat()}
    for seed in args.seeds:
        path = save_trained(args.output / f"seed{seed}", args.output / f"seed{seed}.safetensors", **card)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    print(f"{len(args.seeds)} supernets of {plan['epochs']} epochs in {card['seconds']} s")


def train_command(args: argparse.Namespace, seed: int, epochs: int) -> list[str]:
    """Train a supernet, or go on with it."""
    folder = args.output / f"seed{seed}"
    command = ["-m", "genas_plugins", "search", "--train-only", "--quiet", "--output", str(folder)]
    if (folder / "config.yaml").exists():
        return [*command, "--resume"]
    every = 5 if epochs >= 10 else 1
    more = (f"training.epochs={epochs}", f"training.checkpoint_every={every}", f"seed={seed}")
    return [*command, "--config", CONFIG, *settings_of(args, *more)]


def score(args: argparse.Namespace) -> None:
    """Measure architectures with all supernets at once, for as long as there is time."""
    minutes = max(0.6, START + args.seconds - AROUND_SCORING - time.monotonic()) / 60
    commands = {}
    for seed in args.seeds:
        folder = args.output / f"correlation{seed}"
        command = ["-m", "genas_plugins", "correlate", "--run", str(args.output / f"seed{seed}.safetensors")]
        command += ["--data-root", str(args.output / "cifar10"), "--truth", str(args.source / TRUTH_FILE)]
        command += ["--settings", *SETTINGS, "--training-free", "--sample", "15625", "--resamples", "100"]
        command += ["--minutes", f"{minutes:.3f}"] if not args.rehearse else []
        command += ["--device", args.device, "--quiet", "--output", str(folder)]
        if args.rehearse:
            command[command.index("--sample") + 1] = "10"
        commands[seed] = [*command, *["--resume"] * (folder / "settings.json").exists()]
    together(commands, args.output, "score")
    counts = [sum(1 for _ in (args.output / f"correlation{seed}" / "measurements.jsonl").open()) for seed in args.seeds]
    print(f"{', '.join(map(str, counts))} architectures measured with seeds {', '.join(map(str, args.seeds))}")


def tables(args: argparse.Namespace) -> None:
    """Put the seeds together, beside the paper's figures.

    Raises:
        ValueError: Fewer than three architectures have a score with every seed.
    """
    from genas_plugins.correlation.report import score_table
    from genas_plugins.correlation.run import MEASUREMENTS_FILE
    from genas_plugins.correlation.settings import load_settings
    from genas_plugins.nasbench201.truth import read_truth
    from genas_plugins.search import JsonLines

    settings, sums = load_settings(*SETTINGS)
    scores = {}
    for seed in args.seeds:
        # What was measured, because a process that was cut off has not come to its tables.
        raws = JsonLines(args.output / f"correlation{seed}" / MEASUREMENTS_FILE, read_only=True).records
        names, columns = score_table(raws, settings, sums) if raws else ([], {})
        scores[seed] = {name: dict(zip(names, column, strict=True)) for name, column in columns.items()}
    plan = json.loads((args.output / "epochs.json").read_text())
    text = table_text(scores, read_truth(args.source / TRUTH_FILE, "cifar10"), plan["epochs"], args.resamples)
    write_text(args.output / "tables.md", text)
    print(text.partition("\n")[0])


def table_text(scores: Mapping[int, Scores], truth: Mapping[str, float], epochs: int, resamples: int) -> str:
    """Tables 1, 5, 6 and 7 as Markdown.

    Args:
        scores: For each seed, by column, the scores by architecture.
        truth: Accuracy by architecture.
        epochs: Of the supernets.
        resamples: Of the bootstrap.

    Raises:
        ValueError: Fewer than three architectures have a score with every seed.
    """
    measured = [set(next(iter(columns.values()), ())) for columns in scores.values()]
    names = sorted(set.intersection(*measured))
    if len(names) < 3:
        raise ValueError(f"{len(names)} architectures have a score with every seed, a correlation takes at least 3.")
    arms = [
        {column: np.array([values[name] for name in names]) for column, values in columns.items()}
        for columns in scores.values()
    ]
    heads = [f"seed {seed}" for seed in scores]
    if len(arms) > 1:
        arms.append(rank_sums(arms))
        heads.append("ranks of all seeds")
    accuracies = np.array([truth[name] for name in names])

    def line(told: str, paper: float | None, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
        cells = [str(kendall(first, second, seed=0, resamples=resamples)) for first, second in pairs]
        return f"| {' | '.join([told, '' if paper is None else f'{paper:.3f}', *cells])} |\n"

    head = f"| | paper | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 2)}\n"
    text = (
        f"Kendall's tau on {len(names)} random architectures of NAS-Bench-201 (95 % interval), supernets of {epochs} "
        "epochs; the paper's: 250 epochs, all 15,625 architectures.\n"
        f"\n**Table 1: with one another**\n\n{head}"
    )
    for (first, second), paper in PAPER_PAIRS.items():
        if all(first in arm and second in arm for arm in arms):
            text += line(f"{first}, {second}", paper, [(arm[first], arm[second]) for arm in arms])
    for title, wanted in TABLES.items():
        text += f"\n**{title}: with the accuracy of trained networks**\n\n{head}"
        for column in wanted:
            if all(column in arm for arm in arms):
                text += line(column, PAPER.get(column), [(arm[column], accuracies) for arm in arms])
    return text


def rank_sums(arms: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Each column's ranks, added over the seeds that all have it."""
    return {name: sum(rankdata(arm[name]) for arm in arms) for name in arms[0] if all(name in arm for arm in arms)}


def options(args: argparse.Namespace, command: str, seed: int) -> list[str]:
    """The same options for a process of one seed."""
    more = ["--rehearse"] * args.rehearse
    return [
        command,
        str(args.output),
        "--source",
        str(args.source),
        "--device",
        args.device,
        "--seeds",
        str(seed),
        *more,
    ]


def machine(device: str) -> str:
    """Hardware and versions, as the report of all steps has them."""
    from gpu import machine

    return machine(device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "pace", "score", "tables"))
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="with the archives and the accuracies"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a supernet each (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=300.0, help="for this command (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="a small network, few images, ten architectures")
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds must differ and not be negative, got {args.seeds}")
    if not args.seconds > 0 or args.resamples < 1:
        parser.error(f"--seconds and --resamples must be above 0, got {args.seconds} and {args.resamples}")
    args.output, args.source = args.output.resolve(), args.source.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    args = parse(arguments)
    try:
        {"train": train, "pace": pace, "score": score, "tables": tables}[args.command](args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
