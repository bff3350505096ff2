"""Small networks, images and random weights for the tests of the timm models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_models  # noqa: F401

# Convolutions, poolings and skips of both cells, and half as many tensors as a published network of six cells has.
CODE = (4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0)
SMALL = {"genotype": CODE, "init_channels": 4, "num_cells": 6, "num_classes": 10}


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The command adds a handler for the standard error of its time, which a later test no longer has."""
    loggers = logging.getLogger(), logging.getLogger("timm.utils.checkpoint_saver")
    handlers, levels = list(loggers[0].handlers), [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def small() -> Callable[..., nn.Module]:
    """Builds a network of six cells; other arguments of ``genas_cell`` may be given."""

    def build(**changes: object) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model("genas_cell", **{**SMALL, **changes})

    return build


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Draws images, ``(N, C, H, W)``."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)

    return draw


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """Gives normalisations random statistics and weights, so that no layer is the identity by chance."""

    def change(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.data.uniform_(-0.5, 0.5, generator=generator)
        return model

    return change
