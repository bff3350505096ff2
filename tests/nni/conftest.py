"""The ``genas`` command as real processes, without paying for its imports each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# A process that has imported everything and forks: a child is a process of its own, which can be killed,
# interrupted and limited like any other, but starts in milliseconds.
_SERVER = """
import atexit, gc, json, os, resource, signal, sys, traceback
import genas_plugins.cli, genas_plugins.plotting._style, matplotlib.figure, nni_strategy.run, sklearn.datasets
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
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # A shell that starts tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(request["before"])
    try:
        status = genas_plugins.cli.main(request["arguments"])
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    # What is registered for the exit runs; taking all modules apart takes longer than many a command.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
"""


@dataclass(frozen=True)
class Finished:
    """How a process ended; a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a refused command leaves; everything else about it is checked here."""
        lines = self.stderr.splitlines()
        assert self.status == 1, self
        assert len(lines) == 1 and lines[0].startswith("genas: "), self.stderr
        return lines[0].removeprefix("genas: ")


class Running:
    """One process of the command."""

    def __init__(self, genas: Genas, pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self._genas, self._stdout, self._stderr = genas, stdout, stderr

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self._genas.ask({"poll": self.pid})

    def wait(self, seconds: float = 120.0) -> Finished:
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                pytest.fail(f"The command did not end within {seconds} s.")
            time.sleep(0.01)
        return Finished(status, self._stdout.read_text(), self._stderr.read_text())


class Genas:
    """Starts the command."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "HOME": str(self.home), "MPLCONFIGDIR": str(folder / "matplotlib")}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, *arguments: Any, before: str = "", folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> Running:
        """Start a command; ``before`` is Python code to run first in its process."""
        self._count += 1
        stdout, stderr = (self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr"))
        pid = self.ask(
            {
                "arguments": [str(argument) for argument in arguments],
                "stdout": str(stdout),
                "stderr": str(stderr),
                "before": before,
                "folder": str(folder or self._folder),
                "environment": environment or {},
            }
        )
        return Running(self, pid, stdout, stderr)

    def __call__(self, *arguments: Any, **options: Any) -> Finished:
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)


TINY: dict[str, Any] = {
    "seed": 1,
    "space": {"init_channels": 4, "num_cells": 2},
    "data": {
        "name": "digits",
        "train_images": 64,
        "validation_images": 64,
        "test_images": 32,
        "flip": False,
        "crop_padding": 1,
    },
    "training": {"epochs": 3, "batch_size": 32, "accelerator": "cpu"},
    "score": {"recalibration_images": 32},
    "search": {"population": 5, "generations": 2, "parents": 2, "mutants": 2, "crossovers": 2},
}


@pytest.fixture(scope="session")
def genas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Genas]:
    command = Genas(tmp_path_factory.mktemp("genas"))
    yield command
    command.close()
