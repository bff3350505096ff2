"""Training and evaluation on a device without float64, such as Apple's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.task import ClassificationEvaluator
from torch import nn

from timm_models.settings import Settings
from timm_models.training import train
from timm_models.validate import evaluate

# What adds up timm's own loss, in float32 where the device is Apple's: see the last test.
TIMM = [value.__code__ for value in vars(ClassificationEvaluator).values() if isinstance(value, FunctionType)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dark", 60), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(level - 50, level + 50, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return Settings(
        data_dir=str(folder),
        model="genas_cell",
        model_kwargs={"genotype": "genas_flatness_c100", "init_channels": 4, "num_cells": 3},
        img_size=32,
        device="cpu",
        workers=0,
        tensorboard=False,
        batch_size=4,
        epochs=2,
        model_ema=True,
        lr=0.05,
    )


def test_a_training(settings: Settings, without_float64: Callable[..., Any], tmp_path: Path) -> None:
    expected = train(replace(settings, output=str(tmp_path), experiment="with"))
    with without_float64(*TIMM) as trap:
        found = train(replace(settings, output=str(tmp_path), experiment="without"))
    assert trap.made
    states = [torch.load(folder / "last.pth.tar", weights_only=True)["state_dict"] for folder in (found, expected)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_evaluation(small: Callable[..., nn.Module], without_float64: Callable[..., Any]) -> None:
    model = small().eval()
    torch.manual_seed(0)
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
    expected = evaluate(model, batches)
    with without_float64(*TIMM):
        found = evaluate(model, batches)
    assert (found.top1, found.top5, found.images) == (expected.top1, expected.top5, 8)
    assert torch.equal(found.confidences, expected.confidences)


def test_timm_itself_adds_up_in_float32_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    zeros = torch.zeros

    def noted(*size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append((device.type, dtype))
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", noted)
    ClassificationEvaluator("mps")
    assert made == [("mps", torch.float32), ("mps", torch.int64)]
