"""The folder of a segmentor's training has one writer."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from genas_plugins.locking import lock_folder
from mmseg_backbones._tools import run_tool, work_folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "small.py"
    path.write_text("model = dict()\n")
    return path


def test_the_folder_is_the_one_that_the_script_writes_to(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the comments in the script: command line, then the file, then the file's name.
    assert work_folder(["small.py"]) == Path("work_dirs/small")
    assert work_folder(["small.py", "--amp", "--work-dir", "here", "--resume"]) == Path("here")
    assert work_folder(["small.py", "--cfg-options", "a.b=3", "work_dir=there"]) == Path("there")
    config.write_text("work_dir = 'file'\n")
    assert work_folder(["small.py", "--launcher", "pytorch"]) == Path("file")
    assert work_folder([]) is work_folder(["missing.py"]) is work_folder(["small.py", "--help"]) is None
    monkeypatch.setenv("RANK", "1")
    assert work_folder(["small.py"]) is None


def test_a_second_training_in_the_folder_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "small.py", "--work-dir", str(tmp_path / "run")])
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(tmp_path / "run"):
            locked.set()
            release.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    locked.wait(60)
    try:
        with pytest.raises(SystemExit) as refused:
            run_tool("train.py", trains=True)
    finally:
        release.set()
        other.join()
    assert str(refused.value.code).startswith(f"train.py: {tmp_path / 'run'} is in use by process ")
