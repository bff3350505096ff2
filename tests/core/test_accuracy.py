"""Accuracy against NumPy, and no traces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins.scoring import Accuracy, accuracy


class Lookup(nn.Module):
    """Logits from a table, dropped out in training mode."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.norm = nn.BatchNorm1d(logits.shape[1], affine=False, dtype=logits.dtype)
        self.drop = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.table[x]))


@pytest.mark.parametrize("classes", [3, 5, 20])
def test_top1_and_top5_by_sorting(classes):
    rng = np.random.default_rng(classes)
    logits, labels = rng.normal(size=(50, classes)), rng.integers(classes, size=50)
    ranks = (logits > logits[np.arange(50), labels][:, None]).sum(1)
    # Unequal batches: every image counts the same.
    parts = np.split(np.arange(50), [32, 49])
    result = accuracy(Lookup(torch.tensor(logits)), [(torch.tensor(p), torch.tensor(labels[p])) for p in parts])
    assert result == Accuracy((ranks < 1).mean(), (ranks < 5).mean())


@pytest.mark.parametrize("fails", [False, True])
def test_no_traces(fails):
    model = Lookup(torch.eye(6))
    model.drop.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()

    def loader():
        yield torch.arange(4), torch.arange(4)
        if fails:
            raise OSError("unreadable")

    if fails:
        with pytest.raises(OSError, match="unreadable"):
            accuracy(model, loader())
    else:
        assert accuracy(model, loader()) == Accuracy(1.0, 1.0)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.table.grad is None


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        accuracy(Lookup(torch.eye(3)), [])
