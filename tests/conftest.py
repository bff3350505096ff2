"""For all tests: one thread, which on small tensors and busy cores is many times faster than several; and processes."""

from __future__ import annotations

import doctest
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Collect garbage seldom, and never among what the tests have imported: networks are built of very many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


_SERVER = """
import atexit, contextlib, gc, importlib, json, os, signal, sys, traceback
for name in sys.argv[1:]:
    # What is not installed is missed, and told, where it is needed.
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()
gc.set_threshold(200_000, 20, 50)
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
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    # A shell that starts tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        exec(request["code"], {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # What is registered for the exit runs; taking all modules apart would take longer than many a command.
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
        """The sentence with which ``genas`` refuses: status 1 and nothing else on standard error."""
        lines = self.stderr.splitlines()
        assert (self.status, len(lines)) == (1, 1), self.stderr
        assert lines[0].startswith("genas: ")
        return lines[0].removeprefix("genas: ")


class Running:
    """A process."""

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
                pytest.fail(f"The process took more than {seconds} s.")
            time.sleep(0.002)
        assert self._status is not None
        return Finished(self._status, self._stdout.read_text(), self._stderr.read_text())


class Warm:
    """A process that has imported modules and forks.

    A child can be killed, interrupted and limited like any other process, but starts in milliseconds.
    """

    def __init__(self, *modules: str, **environment: str) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        self._outputs = tempfile.TemporaryDirectory()
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            text=True,
        )
        assert self._server.stdout is not None
        while (line := self._server.stdout.readline()) != "ready\n":
            assert line, f"{', '.join(modules)} cannot be imported"

    def start(self, code: str, *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None) -> Running:
        """Start a process that runs code, with arguments as those of a command, in a folder."""
        self._count += 1
        stdout, stderr = (Path(self._outputs.name) / f"{self._count}.{name}" for name in ("stdout", "stderr"))
        request = {
            "code": code,
            "arguments": ["-c", *map(str, arguments)],
            "folder": str(folder),
            "environment": {**(environment or {})},
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        return Running(self._ask, self._ask(request), stdout, stderr)

    def __call__(
        self, code: str, *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
    ) -> Finished:
        """Run code to its end."""
        finished = self.start(code, *arguments, folder=folder, environment=environment).wait()
        assert finished is not None
        return finished

    def python(self, *command: Any, folder: Path, before: str = "", **given: Any) -> Running:
        """Start what ``python`` with these arguments would, ``-m MODULE ...`` or ``FILE ...``.

        ``before`` is code that it runs first.
        """
        first, *rest = map(str, command)
        if first == "-m":
            name, *rest = rest
            code = f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
        else:
            code = f"sys.path.insert(0, {str(Path(first).parent)!r})\nrunpy.run_path({first!r}, run_name='__main__')"
        return self.start(f"{before}\nimport runpy, sys\n{code}", *rest, folder=folder, **given)

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
        self._outputs.cleanup()


@pytest.fixture(scope="session")
def start_warm() -> type[Warm]:
    """A process of one's own that forks, to be closed."""
    return Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[..., Warm]]:
    """A process that has imported these modules and forks; one at a time, as each takes hundreds of megabytes."""
    kept: dict[tuple[str, ...], Warm] = {}

    def get(*modules: str) -> Warm:
        if modules not in kept:
            while kept:
                kept.popitem()[1].close()
            kept[modules] = Warm(*modules)
        return kept[modules]

    yield get
    for server in kept.values():
        server.close()


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., None]:
    """Has a server run a script twice at a time, with a folder and 0 or 1 as arguments, and waits for both."""

    def run(server: Warm, folder: Path, script: str, **environment: str) -> None:
        common = {"GLOO_SOCKET_IFNAME": "lo", **environment}
        processes = [
            # With LOCAL_RANK set, Lightning does not start the second process itself.
            server.start(script, folder, rank, folder=folder, environment={**common, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        for process in processes:
            done = process.wait()
            assert done is not None and done.status == 0, done

    return run


@pytest.fixture
def run_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the examples in the docstrings of a package, in a temporary folder; doctest prints what goes wrong."""

    def run(package: str, root: Path = Path(__file__).parents[1]) -> None:
        monkeypatch.chdir(tmp_path)
        outcomes = {}
        for path in sorted((root / package).rglob("*.py")):
            if written := path.read_text(encoding="utf-8").count(">>> "):
                name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                with torch.random.fork_rng(devices=[]):
                    outcomes[name] = written, *doctest.testmod(importlib.import_module(name))
        assert outcomes
        # All that are written are tried: doctest does not see those behind a constant.
        assert {name: counts for name, counts in outcomes.items() if counts != (counts[0], 0, counts[0])} == {}

    return run


@pytest.fixture(scope="session")
def without_float64() -> Callable[..., Any]:
    """A context in which the CPU is a device without float64, see float64_trap.py."""
    spec = importlib.util.spec_from_file_location("float64_trap", Path(__file__).with_name("float64_trap.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.without_float64
