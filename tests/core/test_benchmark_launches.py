"""The benchmark that counts operators: against counts by hand, and its table."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins.nasbench201 import NasBench201SearchSpace, NasBench201SuperNet

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--init-channels", "4", "--num-cells", "3", "--cells-per-stage", "1"]
TINY += ["--image-size", "8", "--batch-size", "2", "--paths", "2", "--epoch-batches", "8"]

ROWS = [
    *("zeroing", "forward", "backward", "clipping and optimizer", "a training step"),
    *("a batch of recalibration", "a batch of validation", "loading and augmenting"),
]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nni", "pytorch_lightning")),
    reason="NNI and Lightning are not installed",
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("launches")
    for name in ("launches", "scoring", "training"):
        sys.modules.pop(name, None)


def tables(printed: str) -> list[dict[str, tuple[float, float]]]:
    """Both means of each row, by table."""
    found: list[dict[str, tuple[float, float]]] = []
    for line in printed.splitlines():
        if line.startswith("operators"):
            found.append({})
        if row := re.match(r"([a-z][a-z ]+?)  +(\d+) \(\d+ - \d+\) +(\d+) \(\d+ - \d+\)", line):
            found[-1][row[1]] = float(row[2]), float(row[3])
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_computes_counts_and_what_does_not_does_not(launches: Any, device: str) -> None:
    x = torch.ones(2, 4, 6, 6, device=device)
    assert launches.count(lambda: x.view(-1).detach()[3:].t()) == 0
    assert launches.count(lambda: torch.empty_like(x)) == 0
    assert launches.count(lambda: x + 1) == 1
    layers = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    # The batch normalisation counts its batches.
    assert launches.count(lambda: layers(x)) == 4
    assert launches.count(lambda: layers.eval()(x)) == 3
    out = layers(x).sum()
    # The gradients of: sum (a view), ReLU, normalisation, convolution; and the 1 that they begin with.
    assert launches.count(out.backward) == 4


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (64, 1), (65, 2), (130, 3)])
def test_a_list_counts_once_for_every_64(launches: Any, number: int, expected: int) -> None:
    tensors = [torch.ones(2) for _ in range(number)]
    assert launches.count(lambda: torch._foreach_add_(tensors, 1.0)) == expected


def test_a_table_of_each_space_in_which_zeros_are_the_plain_loops_alone_and_parts_sum_to_the_step(
    launches: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launches.main([*TINY, "--space", "nasbench201"])
    (alone,) = tables(capsys.readouterr().out)
    assert launches.main([*TINY, "--space", "both"]) == 0
    darts, other = tables(capsys.readouterr().out)
    assert darts["forward"] != other["forward"]
    assert other == alone
    for rows in (darts, other):
        assert list(rows) == ROWS
        assert rows["zeroing"][0] == 0 < rows["zeroing"][1]
        parts = list(rows.values())[:4]
        for arm in range(2):
            assert rows["a training step"][arm] == pytest.approx(sum(part[arm] for part in parts), abs=2)
        assert rows["clipping and optimizer"][0] < rows["clipping and optimizer"][1]
        assert all(ours < plain for ours, plain in list(rows.values())[-3:])


def test_the_official_pass_of_nasbench201_gives_the_same_logits(launches: Any) -> None:
    torch.manual_seed(0)
    supernet = NasBench201SuperNet(4, 1, 10).double().train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for seed in range(8):
        architecture = NasBench201SearchSpace().sample(np.random.default_rng(seed))
        torch.testing.assert_close(launches.plain_forward_201(supernet, x, architecture), supernet(x, architecture))


def test_what_is_elsewhere_does_not_count_and_a_copy_does(launches: Any) -> None:
    x = torch.ones(3)
    assert launches.count(lambda: (x + 1).to("meta") * 2, "meta") == 2


def test_no_path_is_refused(launches: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launches.main(["--paths", "0"])
    assert "--paths must be at least 1, got 0" in capsys.readouterr().err
