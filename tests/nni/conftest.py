"""The ``genas`` command as real processes, without paying for its imports each time; and two finished runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# Before the tests import anything of NNI: on Python 3.14 it cannot be imported first. One that is not installed is
# missed, and told, where it is needed.
with contextlib.suppress(ImportError):
    import nni_strategy  # noqa: F401

# What the command imports in the course of a search.
_MODULES = ("genas_plugins.cli.correlate", "genas_plugins.cli.score", "nni_strategy.command", "sklearn.datasets")
_MODULES += ("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "sklearn.datasets.data", "omegaconf")

# Its supernet has a tenth of the modules of one of DARTS, which a process takes seconds to build, save and read.
TINY: dict[str, Any] = {
    "seed": 1,
    "space": {"name": "nasbench201", "init_channels": 4, "cells_per_stage": 1, "affine": False},
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
# Drawing takes a third of the tiny search, and none of what goes on or compares numbers looks at pictures.
_NO_PICTURES = """
import genas_plugins.correlation.report, genas_plugins.experiment.outcome
for name in ("plot_search", "plot_loss_curves", "plot_cells", "plot_front"):
    setattr(genas_plugins.experiment.outcome, name, lambda *arguments, **named: None)
genas_plugins.correlation.report.plot_scatter = lambda *arguments, **named: None
"""
# Three cells: one normal, two reductions.
DARTS = {**TINY, "space": {"name": "darts", "init_channels": 4, "num_cells": 3}}


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
    def winner(self) -> dict[str, Any]:
        """What the search ended with."""
        names = ("genotype.json", "architecture.json")
        (path,) = (self.path / name for name in names if (self.path / name).exists())
        return json.loads(path.read_text())

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
        ours, theirs = self.winner, other.winner
        for data in (ours, theirs):
            del data["record"]["seconds"], data["provenance"]["seconds"]
        assert ours == theirs


class Genas:
    """Starts the command."""

    def __init__(self, folder: Path, start_warm: Callable[..., Any]) -> None:
        self.config, self.darts = folder / "tiny.yaml", folder / "darts.yaml"
        self.config.write_text(yaml.safe_dump(TINY))
        self.darts.write_text(yaml.safe_dump(DARTS))
        for name in ("home", "work", "temporary"):
            (folder / name).mkdir()
        self.strangers = [folder / "home", folder / "work", folder / "temporary"]
        environment = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
        self.server = start_warm(*_MODULES, MPLCONFIGDIR=str(folder / "matplotlib"), **environment)
        self.environment = self.server.environment
        self.close = self.server.close

    def __call__(self, *arguments: Any, before: str = "", pictures: bool = True) -> Any:
        """Run a command to its end."""
        return self.start(*arguments, before=before, pictures=pictures).wait()

    def start(self, *arguments: Any, before: str = "", pictures: bool = True) -> Any:
        """Start a command; ``before`` is Python code that its process runs first."""
        return self.python("-m", "genas_plugins", *arguments, before=before, pictures=pictures)

    def python(self, *command: Any, before: str = "", pictures: bool = True) -> Any:
        """Start what ``python`` with these arguments would."""
        before = before if pictures else _NO_PICTURES + before
        return self.server.python(*command, folder=self.strangers[1], before=before)

    def search(
        self,
        folder: Path,
        *changes: str,
        config: Path | None = None,
        resume: bool = False,
        before: str = "",
        pictures: bool = False,
    ) -> Any:
        """Start the tiny search, or continue one; it draws its pictures only if they are looked at."""
        settings = [part for change in changes for part in ("--set", change)]
        source = ["--resume"] if resume else ["--config", config or self.config]
        command = ("search", *source, *settings, "--quiet", "--output", folder)
        return self.start(*command, before=before, pictures=pictures)

    def process(self, *arguments: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in a process that starts from nothing."""
        return subprocess.run(
            [sys.executable, "-m", "genas_plugins", *map(str, arguments)],
            env=self.environment,
            cwd=self.strangers[1],
            capture_output=True,
            text=True,
            check=False,
        )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second


@pytest.fixture
def nothing_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI lists every experiment there, wherever the experiment itself is told to live."""
    from nni.nas.experiment import experiment

    monkeypatch.setattr(experiment, "Experiments", partial(experiment.Experiments, str(tmp_path)))


@pytest.fixture(scope="session")
def genas(start_warm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Genas]:
    command = Genas(tmp_path_factory.mktemp("genas"), start_warm)
    yield command
    command.close()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """The experiment of the tiny search; with another space, or other settings in its sections."""

    def settings(space: dict[str, Any] | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
        changed = {name: {**TINY[name], **values} for name, values in sections.items()}
        return {**TINY, **changed, **({} if space is None else {"space": space})}

    return settings


@pytest.fixture(scope="session")
def first_search(genas: Genas, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Folder]:
    """The tiny search in a process that starts from nothing, and what it wrote."""
    folder = tmp_path_factory.mktemp("run") / "first"
    return genas.process("search", "--config", genas.config, "--output", folder, "--quiet"), Folder(folder)


@pytest.fixture(scope="session")
def finished(genas: Genas, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of the tiny search, for reading only."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    done = genas.search(folder, pictures=True).wait()
    assert done.status == 0, done.stderr
    return Folder(folder)


@pytest.fixture
def trained(finished: Folder, tmp_path: Path) -> Path:
    """The tiny run, of which nothing was searched yet."""
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    (folder / "history.jsonl").write_text("")
    for name in ("architecture.json", "search.png", "loss_curves.png"):
        (folder / name).unlink()
    stored = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"experiment": stored["experiment"]}))
    return folder


@pytest.fixture
def digits_evaluator(tmp_path: Path) -> Any:
    """Trains a supernet on a few digits for one epoch."""
    from genas_plugins.datasets import load_search_data
    from nni_strategy import supernet_evaluator

    images = {"train_images": 64, "validation_images": 32, "test_images": 32, "recalibration_images": 32}
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return supernet_evaluator(load_search_data("digits", **images, seed=0), 1, batch_size=32, **options)


@pytest.fixture(scope="session")
def darts(genas: Genas, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a search of DARTS, for reading only."""
    folder = tmp_path_factory.mktemp("run") / "darts"
    done = genas.search(folder, config=genas.darts, pictures=True).wait()
    assert done.status == 0, done.stderr
    return Folder(folder)


@pytest.fixture(scope="session")
def folder_at() -> type[Folder]:
    return Folder
