"""A setting whose default depends on another follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch.utils.data import TensorDataset

from genas_plugins.experiment.config import parse
from genas_plugins.experiment.resuming import difference
from genas_plugins.experiment.run_folder import load_data
from genas_plugins.scoring import combined
from nni_strategy import GeNAS, NasBench201Space, SupernetModule
from nni_strategy.run import run_experiment


@pytest.mark.parametrize(("population", "each"), [(4, 2), (1, 0), (9, 4), (50, 25), (100, 50)])
def test_a_population_alone_is_enough(population: int, each: int) -> None:
    evolution = GeNAS(population=population).evolution
    assert (evolution.mutants, evolution.crossovers) == (each, each)


@pytest.mark.parametrize(("rate", "final"), [(0.025, 0.001), (2e-4, 2e-4)])
def test_a_learning_rate_does_not_rise(rate: float, final: float) -> None:
    assert SupernetModule(epochs=3, learning_rate=rate).final_learning_rate == final


def loaders(images: int) -> dict[str, DataLoader]:
    data = TensorDataset(torch.rand(images, 3, 8, 8), torch.arange(images) % 4)
    return {f"{name}_dataloaders": DataLoader(data, batch_size=8) for name in ("train", "val")}


def test_a_small_loader_recalibrates_with_all_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    recalibrate = combined.recalibrate_batchnorm

    def noted(model: Any, batches: Any, momentum: Any) -> None:
        seen.append(sum(len(labels) for _, labels in batches))
        recalibrate(model, batches, momentum)

    monkeypatch.setattr(combined, "recalibrate_batchnorm", noted)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet}
    strategy = GeNAS(population=2, generations=1)
    space = NasBench201Space(num_classes=4, init_channels=4, cells_per_stage=1)
    evaluator = Classification(**loaders(24), num_classes=4, **trainer)
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    assert len(strategy.records) == 2
    # Two images were tried before the training.
    assert seen == [2, 24, 24]


def test_an_experiment_on_the_default_data_runs_on_its_defaults(tmp_path: Path) -> None:
    # 719 digits to train on, and 850 for recalibration unless somebody says otherwise.
    small = {"space": {"name": "nasbench201", "init_channels": 4, "cells_per_stage": 1}}
    small |= {"training": {"epochs": 1, "accelerator": "cpu"}, "search": {"population": 2, "generations": 1}}
    experiment = parse(small)
    assert run_experiment(experiment, tmp_path / "run").scored == 2
    assert len(load_data(experiment).recalibration) == 719
    assert experiment.score.recalibration.images == 850
    # What an older version has written means the same, and only that.
    older = {**small, "score": {"recalibration_images": 850}}
    assert difference(parse(older), experiment) is None and difference(experiment, parse(older)) is None
    fewer = {**small, "score": {"recalibration_images": 512}}
    assert difference(parse(fewer), experiment) == "score.recalibration_images is 512, not None"
