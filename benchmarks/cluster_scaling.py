"""How a search on NNI's engine grows with its workers: measured on this machine, and by a model beyond it.

``python benchmarks/cluster_scaling.py measure RUN --workers 1 2 --output scaling`` searches copies of a trained run
(the folder of ``genas search --train-only``) in one process and on the local service, and prints the seconds a
candidate and their ratios. Nothing else should run on the machine.

``python benchmarks/cluster_scaling.py model --seconds 5 --population 1000`` prints candidates a minute by the model

    population / (ceil(population / workers) * seconds + barrier + max(last * message, slowest))

where ``barrier`` is what passes between the last answer of a generation and the first work on the next, ``message``
what the driver needs for a candidate, ``last`` the number of answers that come together, those of as many workers as
have work, and ``slowest`` how much longer than a candidate the slowest of these takes. Beside it stands what a
simulated service gives: the driver is the real one, the workers' clock is simulated, and ``message`` is measured.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from genas_plugins.search import Dispatch, Evolution, History, JsonLines
from genas_plugins.spaces import NasBench201SearchSpace

_GENAS = (sys.executable, "-m", "genas_plugins")
# NNI's manager looks twice a second who has ended and what is to be started; a trial starts in 0.1 s.
BARRIER = 1.0


def main() -> int:
    """Measure, or compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("run", type=Path)
    measuring.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    measuring.add_argument("--output", type=Path, required=True)
    measuring.set_defaults(command=measure)
    modelled = commands.add_parser("model")
    modelled.add_argument("--seconds", type=float, default=5.0, help="a candidate")
    modelled.add_argument("--population", type=int, default=1000)
    modelled.add_argument("--generations", type=int, default=4)
    modelled.add_argument("--spread", type=float, default=0.1, help="standard deviation of the seconds, as a fraction")
    modelled.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    modelled.set_defaults(command=model)
    options = parser.parse_args()
    options.command(options)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Search on this machine; seconds are from the first to the last line of the history."""
    options.output.mkdir(parents=True)
    first = None
    for workers in (0, *options.workers):
        folder = options.output / f"workers{workers}"
        shutil.copytree(options.run, folder)
        command = [*_GENAS, "search", "--resume", "--quiet", "--output", str(folder), "--config"]
        command += [str(folder / "config.yaml"), "--set", "search.in_flight=1"]
        if workers:
            command += ["--set", "search.service=local", "--set", f"search.workers={workers}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seconds, count = _watched(folder / "history.jsonl", process)
        a_candidate = seconds / (count - 1)
        first = first or a_candidate
        name = f"{workers} workers" if workers else "in process"
        print(f"{name}: {a_candidate:.2f} s a candidate, {a_candidate / first:.3f} of one process", flush=True)


def _watched(path: Path, process: subprocess.Popen[Any]) -> tuple[float, int]:
    times: list[float] = []
    while process.poll() is None:
        count = path.read_bytes().count(b"\n")
        times += [time.perf_counter()] * (count - len(times))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the search in {path.parent} ended with status {process.returncode}")
    return times[-1] - times[0], len(times)


def model(options: argparse.Namespace) -> None:
    """Print the model beside the simulation."""
    print("workers  model  simulated  (candidates a minute)")
    for workers in options.workers:
        simulated, message = simulate(workers, options.population, options.generations, options.seconds, options.spread)
        predicted = predict(workers, options.population, options.seconds, options.spread, message)
        print(
            f"{workers:7d}  {60 * predicted:.1f}  {60 * simulated:.1f}   a message: {1000 * message:.2f} ms", flush=True
        )


def predict(
    workers: int, population: int, seconds: float, spread: float, message: float, barrier: float = BARRIER
) -> float:
    """Candidates a second by the model."""
    last = min(workers, population)
    # What the largest of so many normal numbers exceeds their mean by, asymptotically.
    slowest = spread * seconds * math.sqrt(2 * math.log(last))
    return population / (math.ceil(population / workers) * seconds + barrier + max(last * message, slowest))


def simulate(
    workers: int, population: int, generations: int, seconds: float, spread: float, *, on_disk: bool = True
) -> tuple[float, float]:
    """Candidates a second, and the driver's seconds for each, of a search with workers on a simulated clock.

    The driver's work is done, history on disk included, and its time is added to the clock; workers wait for it.
    """
    rng = np.random.default_rng(0)
    settings = {"population": population, "generations": generations, "mutants": population // 4}
    evolution = Evolution(NasBench201SearchSpace(), crossovers=population // 4, parents=10, **settings)
    with tempfile.TemporaryDirectory() as folder:
        history, answers = (Path(folder, name) for name in ("history.jsonl", "answers.jsonl"))
        kept = {"history": History(history), "answers": JsonLines(answers)} if on_disk else {}
        dispatch: Dispatch[Any] = Dispatch(evolution, **kept)
        events: list[tuple[float, int, Any]] = []
        serial, idle, clock, busy, start = itertools.count(), workers, 0.0, 0.0, 0.0
        while not dispatch.finished:
            while idle and (task := dispatch.take()) is not None:
                idle -= 1
                length = max(0.0, rng.normal(seconds, spread * seconds))
                heapq.heappush(events, (max(clock, start) + length, next(serial), task))
            at, _, task = heapq.heappop(events)
            idle += 1
            began, generation = time.perf_counter(), evolution.generation
            dispatch.answer(task.index, {"status": "ok", "score": float(rng.random()), "shares": {}})
            took = time.perf_counter() - began
            busy += took
            clock = max(at, clock) + took
            if evolution.generation != generation:
                start = clock + BARRIER
        return len(dispatch.records) / (clock + BARRIER), busy / len(dispatch.records)


if __name__ == "__main__":
    sys.exit(main())
