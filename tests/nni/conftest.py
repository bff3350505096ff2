"""The ``genas`` command as real processes, without paying for its imports each time; and one finished run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# A process that has imported everything and forks: a child can be killed, interrupted and limited like any
# other process, but starts in milliseconds.
_SERVER = """
import atexit, gc, json, os, signal, sys, traceback
import genas_plugins.cli.correlate, genas_plugins.cli.score, nni_strategy.command
import matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, sklearn.datasets
gc.collect()
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["folder"])
    # A shell that starts tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        exec(request["before"])
        status = genas_plugins.cli.main(request["arguments"])
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    # What is registered for the exit runs; taking all modules apart would take longer than many a command.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
"""

# Three cells: one normal, two reductions.
TINY: dict[str, Any] = {
    "seed": 1,
    "space": {"init_channels": 4, "num_cells": 3},
    "data": {
        "name": "digits",
        "train_images": 64,
        "validation_images": 64,
        "test_images": 32,
        "flip": False,
        "crop_padding": 1,
    },
    "training": {"epochs": 4, "batch_size": 32, "accelerator": "cpu"},
    "score": {"metric": "angle+flatness", "recalibration_images": 32},
    "search": {"population": 5, "generations": 2, "parents": 2, "mutants": 2, "crossovers": 2},
}


@dataclass(frozen=True)
class Finished:
    """How a process ended; a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The sentence with which a command refuses: status 1 and nothing else on standard error."""
        lines = self.stderr.splitlines()
        assert (self.status, len(lines)) == (1, 1), self.stderr
        assert lines[0].startswith("genas: ")
        return lines[0].removeprefix("genas: ")


class Running:
    """A process of the command."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], pid: int, stdout: Path, stderr: Path) -> None:
        self._ask, self._pid, self._stdout, self._stderr = ask, pid, stdout, stderr
        self._status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        assert self.alive, self._stderr.read_text()
        os.kill(self._pid, number)

    @property
    def alive(self) -> bool:
        if self._status is None:
            self._status = self._ask({"poll": self._pid})
        return self._status is None

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = 200.0) -> Finished | None:
        """Wait for the end, or for a condition before it; ``None`` if the process lives on."""
        deadline = time.monotonic() + seconds
        while self.alive:
            if until():
                return None
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                pytest.fail(f"The command took more than {seconds} s.")
            time.sleep(0.002)
        assert self._status is not None
        return Finished(self._status, self._stdout.read_text(), self._stderr.read_text())


class Folder:
    """A run folder, to be compared with others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def records(self) -> list[dict[str, Any]]:
        """The history without the seconds, which no two runs share."""
        path = self.path / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    @property
    def genotype(self) -> dict[str, Any]:
        return json.loads((self.path / "genotype.json").read_text())

    @property
    def training(self) -> dict[str, Any]:
        """Weights, statistics, optimizer and schedule."""
        checkpoint = torch.load(self.path / "supernet.ckpt", weights_only=True)
        names = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
        return {name: checkpoint[name] for name in names}

    def assert_same(self, other: Folder) -> None:
        """The same weights to the last bit, the same history and the same winner."""
        assert _same(self.training, other.training)
        assert self.records == other.records
        ours, theirs = self.genotype, other.genotype
        for data in (ours, theirs):
            del data["record"]["seconds"], data["provenance"]["seconds"]
        assert ours == theirs


class Genas:
    """Starts the command."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(TINY))
        self.environment = {**os.environ, "MPLCONFIGDIR": str(folder / "matplotlib"), "OMP_NUM_THREADS": "1"}
        for name in ("home", "work", "temporary"):
            (folder / name).mkdir()
        self.environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.strangers = [folder / "home", folder / "work", folder / "temporary"]
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def __call__(self, *arguments: Any, before: str = "") -> Finished:
        """Run a command to its end."""
        finished = self.start(*arguments, before=before).wait()
        assert finished is not None
        return finished

    def start(self, *arguments: Any, before: str = "") -> Running:
        """Start a command; ``before`` is Python code that its process runs first."""
        self._count += 1
        stdout, stderr = (self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr"))
        request = {
            "arguments": [str(argument) for argument in arguments],
            "stdout": str(stdout),
            "stderr": str(stderr),
            "before": before,
            "folder": str(self._folder / "work"),
        }
        return Running(self._ask, self._ask(request), stdout, stderr)

    def search(self, folder: Path, *changes: str, resume: bool = False, before: str = "") -> Running:
        """Start the tiny search, or continue one."""
        settings = [part for change in changes for part in ("--set", change)]
        source = ["--resume"] if resume else ["--config", self.config]
        return self.start("search", *source, *settings, "--quiet", "--output", folder, before=before)

    def process(self, *arguments: Any) -> Finished:
        """Run a command in a process that starts from nothing."""
        done = subprocess.run(
            [sys.executable, "-m", "genas_plugins", *map(str, arguments)],
            env=self.environment,
            cwd=self._folder / "work",
            capture_output=True,
            text=True,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        # A loader's worker of another test may hold the other end of the pipe, so that it is not at its end.
        self._server.terminate()
        self._server.wait(20)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second


@pytest.fixture(scope="session")
def genas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Genas]:
    command = Genas(tmp_path_factory.mktemp("genas"))
    yield command
    command.close()


@pytest.fixture(scope="session")
def first_search(genas: Genas, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Folder]:
    """The tiny search in a process of its own, and what it wrote."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    return genas.process("search", "--config", genas.config, "--output", folder, "--quiet"), Folder(folder)


@pytest.fixture(scope="session")
def finished(first_search: tuple[Finished, Folder]) -> Folder:
    """The folder of the tiny search, for reading only."""
    assert first_search[0].status == 0, first_search[0].stderr
    return first_search[1]


@pytest.fixture(scope="session")
def folder_at() -> type[Folder]:
    return Folder
