"""For all tests: one thread, which on small tensors and busy cores is many times faster than several."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., None]:
    """Runs a script twice at a time, with the folder that it lies in and 0 or 1 as arguments, and waits for both."""

    def run(folder: Path, script: str, **environment: str) -> None:
        path = folder / "process.py"
        path.write_text(script)
        root = str(Path(__file__).parents[1])
        common = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}
        common["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(path), str(folder), rank],
                # With LOCAL_RANK set, Lightning does not start the second process itself.
                env={**common, "LOCAL_RANK": rank},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in "01"
        ]
        try:
            outputs = [process.communicate(timeout=180)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output

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
