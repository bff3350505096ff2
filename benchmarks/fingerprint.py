"""Digests of what the package measures: equal before and after a change that is to change nothing.

Everything runs on one thread of a CPU through commands and functions that users call, so that the same script runs in
two checkouts::

    python benchmarks/fingerprint.py /tmp/before    # in one checkout
    python benchmarks/fingerprint.py /tmp/after     # in the other; then compare the two outputs

One line a workload: a search of the quickstart (``--quick`` takes two epochs and ten candidates of it), ten candidates
of NAS-Bench-201 by angle and flatness, a raced search of them, a supernet training that is killed and resumed, and the
logits of three timm models. A digest is of every number to its last bit, without the times. ``--quick`` took
under two minutes; machines and releases of PyTorch differ in their digests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("genas_flatness_c10", "genas_flatness_c100", "genas_angle_flatness_c100")
QUICK = ("training.epochs=2", "search.population=5", "search.generations=2", "search.parents=2")
QUICK += ("search.mutants=2", "search.crossovers=2")
BENCHMARK = """
seed: 1
space: {name: nasbench201, init_channels: 4, cells_per_stage: 1}
data: {name: digits, flip: false, crop_padding: 1}
training: {epochs: 3, batch_size: 32, learning_rate: 0.05, accelerator: cpu, threads: 1}
score: {metric: angle+flatness, sigmas: [0.005, 0.02, 0.05], recalibration_images: 256, common: true}
search: {population: 5, generations: 2, parents: 2, mutants: 2, crossovers: 2}
"""


def genas(*arguments: object) -> subprocess.Popen[bytes]:
    """Start the command of this checkout."""
    code = "import sys; from genas_plugins.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--quiet"],
        stdout=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    )


def done(process: subprocess.Popen[bytes]) -> None:
    """Wait, and raise if it failed."""
    if process.wait():
        raise RuntimeError(f"{process.args} ended with {process.returncode}.")


def digest(*parts: object) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def records(folder: Path) -> list[dict[str, object]]:
    """The history of a search, without times."""
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder: Path) -> str:
    """A hash of the trained supernet."""
    from genas_plugins.checkpoints import load_supernet

    state = load_supernet(folder / "supernet.ckpt").state_dict()
    return digest({name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()})


def searched(folder: Path, config: str | Path, *settings: str) -> str:
    """Search, and hash the history and the supernet."""
    changes = (part for setting in settings for part in ("--set", setting))
    done(genas("search", "--config", config, "--output", folder, *changes))
    return f"{digest(records(folder))} {weights(folder)}"


def resumed(folder: Path, config: Path) -> str:
    """Train a supernet, end that behind its first checkpoint, go on, and hash the weights."""
    running = genas("search", "--config", config, "--output", folder, "--train-only", "--set", "training.epochs=6")
    while running.poll() is None and not (folder / "supernet.ckpt").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    running.wait()
    done(genas("search", "--output", folder, "--train-only", "--resume"))
    return weights(folder)


def logits() -> str:
    """Hash what three timm models say of two images."""
    import timm
    import torch

    import timm_models  # noqa: F401

    torch.set_num_threads(1)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for name in MODELS:
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(timm.create_model(name).eval()(images).numpy().tobytes())
    return hashlib.sha256(b"".join(found)).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all workloads and print their digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for the runs")
    parser.add_argument("--quick", action="store_true", help="a part of the quickstart only")
    args = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    args.folder.mkdir(parents=True)
    config = args.folder / "benchmark.yaml"
    config.write_text(BENCHMARK)
    workloads: dict[str, Callable[[], str]] = {
        "quickstart": lambda: searched(args.folder / "quickstart", "quickstart_digits", *(QUICK if args.quick else ())),
        "NAS-Bench-201": lambda: searched(args.folder / "nasbench201", config),
        "race": lambda: searched(args.folder / "race", config, "search.racing=0.9", "search.population=8"),
        "resumed training": lambda: resumed(args.folder / "resumed", config),
        "logits": logits,
    }
    for name, workload in workloads.items():
        print(f"{name}: {workload()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
