"""For all tests: one thread, which on small tensors and busy cores is many times faster than several."""

from __future__ import annotations

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
