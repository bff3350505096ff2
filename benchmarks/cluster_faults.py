"""Kill workers, driver and web server of searches on NNI's local service, and compare with an undisturbed search.

python benchmarks/cluster_faults.py --rounds 20 --output faults

Each round kills, with SIGKILL at a random moment: a worker, both, the driver, or NNI's manager with its web server, in
turn. A search that ended by it is resumed. Its history must be that of the search in one process: the same candidates
and scores, none twice and none lost.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

# A few tenths of a second a candidate on one core, so that a kill meets every stage.
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "space": {"name": "nasbench201", "init_channels": 8, "cells_per_stage": 2, "affine": False},
    "data": {"name": "digits", "train_images": 256, "validation_images": 512, "flip": False, "crop_padding": 1},
    "training": {"epochs": 2, "batch_size": 32, "accelerator": "cpu", "threads": 1},
    "score": {"sigmas": [0.005, 0.02, 0.05], "recalibration_images": 128},
    "search": {"population": 8, "generations": 3, "parents": 3, "mutants": 3, "crossovers": 3},
}
VICTIMS = ("worker", "both workers", "driver", "web server")
_GENAS = (sys.executable, "-m", "genas_plugins")


def main() -> int:
    """Run the rounds; the exit status is the number of those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is made")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    config = options.output / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    trained, undisturbed = options.output / "trained", options.output / "undisturbed"
    command = (*_GENAS, "search", "--config", config, "--quiet", "--output")
    subprocess.run((*command, trained, "--train-only"), check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(trained, undisturbed)
    subprocess.run((*_GENAS, "search", "--resume", "--quiet", "--output", undisturbed), check=True)
    rng = random.Random(options.seed)
    differing = 0
    for number in range(options.rounds):
        victim, after = VICTIMS[number % len(VICTIMS)], rng.uniform(1, 13)
        folder = options.output / f"round{number}"
        shutil.copytree(trained, folder)
        told = disturbed(folder, victim, after)
        same = history(folder) == history(undisturbed)
        differing += not same
        print(
            f"round {number}: {victim} after {after:.1f} s: {told}; {'the same' if same else 'DIFFERENT'}", flush=True
        )
    # Those that were told to end may still be at it.
    time.sleep(5)
    left = [process.pid for process in _processes(options.output)]
    print(f"{options.rounds - differing} of {options.rounds} rounds the same; processes left: {left}")
    return differing + bool(left)


def disturbed(folder: Path, victim: str, after: float) -> str:
    """Search, kill, and resume until the search has ended; returns what happened."""
    command = (*_GENAS, "search", "--resume", "--quiet", "--output", folder)
    command += ("--set", "search.service=local", "--set", "search.workers=2")
    # Without the option it keeps to what it began with.
    with (folder / "log.txt").open("ab") as log:
        driver = subprocess.Popen((*command, "--config", folder / "config.yaml"), stdout=log, stderr=log)
        time.sleep(after)
        killed = _kill(folder, driver, victim)
        statuses = [driver.wait(300)]
        while statuses[-1] != 0 and len(statuses) < 4:
            resumed = subprocess.run(
                (*command, "--config", folder / "config.yaml"), stdout=log, stderr=log, timeout=300
            )
            statuses.append(resumed.returncode)
    return f"killed {killed}, exit statuses {statuses}"


def history(folder: Path) -> list[dict[str, Any]]:
    """The records without the seconds, which no two searches share."""
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _kill(folder: Path, driver: subprocess.Popen[Any], victim: str) -> int:
    if victim == "driver":
        driver.kill()
        return 1
    name = "genas_plugins.cluster.worker" if "worker" in victim else "nni_node"
    # It may not have begun.
    while not (found := _processes(folder, name)) and driver.poll() is None:
        time.sleep(0.1)
    found = found[:1] if victim == "worker" else found
    for process in found:
        process.kill()
    return len(found)


def _processes(folder: Path, name: str = "") -> list[psutil.Process]:
    own = {psutil.Process().pid, *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"{folder}/" in f"{line}/".replace(" ", "/") and name in line and process.pid not in own:
            found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
