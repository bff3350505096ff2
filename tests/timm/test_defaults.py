"""A setting whose default depends on another follows it."""

from __future__ import annotations

import pytest
import torch

from timm_models.schedule import LinearTailLRScheduler
from timm_models.settings import Settings, write_config


@pytest.mark.parametrize(("epochs", "tail"), [(250, 5), (6, 5), (5, 4), (3, 2), (2, 1)])
def test_a_short_training_has_a_shorter_tail(epochs: int, tail: int) -> None:
    settings = Settings(epochs=epochs)
    assert settings.tail_epochs == tail and f"tail_epochs: {tail}\n" in write_config(settings)
    # What the trainer does with it is refused where the tail is as long as the training.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    LinearTailLRScheduler(optimizer, epochs, settings.tail_epochs, settings.warmup_epochs)


def test_a_tail_that_is_given_is_kept() -> None:
    assert Settings(epochs=3, tail_epochs=5).tail_epochs == 5
