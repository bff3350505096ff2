"""The folder of a training has one writer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genas_plugins.locking import lock_folder
from timm_models.train import main


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / "images" / split / name / f"{number}.png")
    line = [
        "--data-dir",
        str(tmp_path / "images"),
        "--model",
        "genas_cell",
        "--epochs",
        "1",
        "--sched",
        "cosine",
        "--batch-size",
        "4",
    ]
    line += [
        "--model-kwargs",
        "init_channels=4",
        "num_cells=3",
        "genotype=genas_flatness_c10",
        "--img-size",
        "32",
        "--workers",
        "0",
    ]
    return [
        *line,
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
    ]


def test_a_second_training_in_the_folder_is_refused(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with lock_folder(run):
        # The thread that holds a lock may ask again, another process may not.
        assert in_another_process(command) == 1 and "is in use by process " in capfd.readouterr().err
        assert not (run / "args.yaml").exists()
    assert main(command) == 0, capfd.readouterr().err
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with lock_folder(run):
        for named in (run, run / "last.pth.tar"):
            assert in_another_process(["--resume", str(named)]) == 1
            assert f"{run} is in use by process {os.getpid()}" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert main(["--resume", str(run)]) == 0


def in_another_process(arguments: list[str]) -> int:
    child = os.fork()
    if not child:
        try:
            os._exit(main(arguments))
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
