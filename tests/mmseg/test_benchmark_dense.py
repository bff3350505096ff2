"""The benchmark of dense prediction: what it times is training and inference of the right networks."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins import ZOO

ROOT = Path(__file__).resolve().parents[2]
TINY = ["mmseg", "--device", "cpu", "--crop", "64", "96", "--warmup", "1", "--rounds", "1"]


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, imported as Python does when it runs it: from a path that holds its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield importlib.import_module("dense")
    for name in ("dense", "networks", "scoring"):
        sys.modules.pop(name, None)


def heads(channels: int) -> int:
    """Parameters of DeepLab-v3's head of 512 channels on 19 classes, and of the auxiliary head on half the channels."""
    pyramid = channels * 512 * (1 + 1 + 3 * 9) + 5 * 2 * 512
    bottleneck = 5 * 512 * 512 * 9 + 2 * 512 + 512 * 19 + 19
    return pyramid + bottleneck + channels // 2 * 256 * 9 + 2 * 256 + 256 * 19 + 19


def test_the_networks_have_the_sizes_of_the_hosts_own_tables(
    dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        assert dense.main([*TINY, "--output", str(tmp_path / "figures.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "figures.json").read_text())
    models = figures["models"]
    assert list(models) == ["genas_flatness_c100", "resnet50"]
    ours = ZOO["genas_flatness_c100"]
    backbone = ours.params - (16 * ours.init_channels * 1000 + 1000)
    assert models["genas_flatness_c100"]["parameters"] == backbone + heads(16 * ours.init_channels)
    # 25.557 M of ResNet-50 without its classifier; a stem of three convolutions for one of 7x7 (He et al. 2019).
    stem = 27 * 32 + 9 * 32 * 32 + 9 * 32 * 64 + 2 * (32 + 32) - 7 * 7 * 3 * 64
    assert models["resnet50"]["parameters"] == 25_557_032 - 2_049_000 + stem + heads(2048)
    assert figures["settings"]["crop"] == [64, 96]
    for model in models.values():
        assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in model["images_per_second"].values())
    text = capsys.readouterr().out
    assert "ours / resnet50" in text


def test_a_training_step_moves_both_heads_and_inference_nothing(dense: Any) -> None:
    arm = dense.make_arm("genas_flatness_c100", dense.parse(TINY))
    before = copy.deepcopy(arm.model.state_dict())
    assert arm.seconds("inference", 1) > 0
    assert all(torch.equal(before[name], value) for name, value in arm.model.state_dict().items())
    assert arm.seconds("training", 1) > 0
    for part in ("backbone", "decode_head", "auxiliary_head"):
        moved = [not torch.equal(before[n], p) for n, p in arm.model.named_parameters() if n.startswith(part)]
        assert any(moved)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*TINY, "--crop", "32", "64"], "--crop must be at least 64 by 64, got 32 by 64"),
        ([*TINY, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["mmdet"], "invalid choice: 'mmdet'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    dense: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dense.main(arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err
