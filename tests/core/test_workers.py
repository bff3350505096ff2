"""Workers of loaders, where Python starts them by a fork server, as it does from 3.14 on."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("this system has no fork server", allow_module_level=True)

# exec, because a worker cannot import what stands in this text.
WORKERS = """
import multiprocessing, sys
from genas_plugins.training.workers import preload
context = multiprocessing.get_context("forkserver")
preload(*sys.argv[1:])
names = ["mailbox", "wave"]
report = "import sys; answers.put([name for name in %r if name in sys.modules])" % names
answers = context.SimpleQueue()
for _ in range(2):
    worker = context.Process(target=exec, args=(report, {"answers": answers}))
    worker.start()
    print(answers.get())
    worker.join()
"""


@pytest.mark.parametrize("modules", [(), ("mailbox",), ("no_such_module", "mailbox", "wave")])
def test_every_worker_starts_with_what_is_preloaded(
    modules: tuple[str, ...], warm: Callable[..., Any], tmp_path: Path
) -> None:
    done = warm("torch")(WORKERS, *modules, folder=tmp_path)
    assert (done.status, done.stderr) == (0, "")
    expected = [name for name in modules if name != "no_such_module"]
    assert done.stdout == f"{expected}\n" * 2


@pytest.mark.parametrize(
    ("host", "command", "arguments"),
    [
        ("timm", "timm_models.train", ["--data-dir", "nowhere"]),
        ("timm", "timm_models.validate", ["nowhere", "--model", "genas_flatness_c10"]),
        ("nni_strategy", "genas_plugins.cli", ["search", "--config", "quickstart_digits", "--output", "file"]),
    ],
)
def test_the_commands_preload_what_their_workers_import(
    host: str, command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(host, exc_type=ImportError)
    asked: list[str] = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", asked.extend)
    # They end after it: the folder of images is missing, and that of the run is a file.
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert importlib.import_module(command).main(arguments) == 1
    # The server is silent about what it cannot import.
    assert asked and all(map(importlib.import_module, asked))
