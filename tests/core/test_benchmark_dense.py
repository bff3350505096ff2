"""The benchmark of dense prediction: what it times is training and inference of the right networks."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins import ZOO

ROOT = Path(__file__).resolve().parents[2]
OURS = ZOO["genas_flatness_c100"]
# Without the classifier.
BACKBONE = OURS.params - (16 * OURS.init_channels * 1000 + 1000)
TINY = ["--device", "cpu", "--crop", "64", "96", "--warmup", "1", "--rounds", "1"]
INSTALLED = {host: importlib.util.find_spec(host) is not None for host in ("mmseg", "detectron2")}
HOSTS = [
    pytest.param("mmseg", marks=pytest.mark.skipif(not INSTALLED["mmseg"], reason="MMSegmentation is not installed")),
    pytest.param(
        "detectron2",
        marks=[
            pytest.mark.detectron2,
            pytest.mark.skipif(
                not INSTALLED["detectron2"], reason="Detectron2 is not installed: docs/detectron2.md says how"
            ),
        ],
    ),
]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, imported as Python does when it runs it: from a path that holds its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield importlib.import_module("dense")
    for name in ("dense", "networks", "scoring"):
        sys.modules.pop(name, None)


def deeplab_heads(channels: int) -> int:
    """Parameters of DeepLab-v3's head of 512 channels on 19 classes, and of the auxiliary head on half the channels."""
    pyramid = channels * 512 * (1 + 1 + 3 * 9) + 5 * 2 * 512
    bottleneck = 5 * 512 * 512 * 9 + 2 * 512 + 512 * 19 + 19
    return pyramid + bottleneck + channels // 2 * 256 * 9 + 2 * 256 + 256 * 19 + 19


def retinanet_heads(channels: int) -> int:
    """Parameters of the pyramid of 256 channels on features of ``channels``, a half and a quarter, and of the heads."""
    layer = 256 * 256 * 9 + 256
    laterals = (channels + channels // 2 + channels // 4) * 256 + 3 * 256
    pyramid = laterals + 3 * layer + channels * 256 * 9 + 256 + layer
    return pyramid + 8 * layer + (256 * 9 + 1) * 9 * 80 + (256 * 9 + 1) * 9 * 4


def frozen_parameters() -> int:
    """Weights and biases of batch normalisation, which Detectron2's frozen layers keep as buffers."""
    timm = importlib.import_module("timm")
    with torch.device("meta"):
        model = timm.create_model("genas_flatness_c100", num_classes=0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return sum(2 * module.num_features for module in norms)


def sizes(host: str) -> list[int]:
    """Parameters of ours and of ResNet-50's."""
    if host == "mmseg":
        # 25.557 M of ResNet-50 without its classifier; a stem of three convolutions for one of 7x7 (He et al. 2019).
        stem = 27 * 32 + 9 * 32 * 32 + 9 * 32 * 64 + 2 * (32 + 32) - 7 * 7 * 3 * 64
        resnet = 25_557_032 - 2_049_000 + stem + deeplab_heads(2048)
        return [BACKBONE + deeplab_heads(16 * OURS.init_channels), resnet]
    # Of ResNet-50's 25.557 M, 53,120 are of batch normalisation.
    resnet = 25_557_032 - 2_049_000 - 53_120 + retinanet_heads(2048)
    return [BACKBONE - frozen_parameters() + retinanet_heads(16 * OURS.init_channels), resnet]


@pytest.mark.parametrize("host", HOSTS)
def test_networks_of_the_right_sizes_of_which_a_step_moves_ours_and_inference_nothing(dense: Any, host: str) -> None:
    args = dense.parse([host, *TINY])
    arm, other = (dense.make_arm(name, args) for name in ("genas_flatness_c100", "resnet50"))
    assert [sum(p.numel() for p in each.model.parameters()) for each in (arm, other)] == sizes(host)
    before = copy.deepcopy(arm.model.state_dict())
    assert arm.seconds("inference", 1) > 0
    assert all(torch.equal(before[name], value) for name, value in arm.model.state_dict().items())
    assert arm.seconds("training", 1) > 0
    for part in {"mmseg": ("backbone", "decode_head", "auxiliary_head"), "detectron2": ("backbone", "head")}[host]:
        moved = [not torch.equal(before[n], p) for n, p in arm.model.named_parameters() if n.startswith(part)]
        assert any(moved)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_the_whole_benchmark(dense: Any, host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert dense.main([host, *TINY, "--output", str(tmp_path / "figures.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "figures.json").read_text())
    models = figures["models"]
    assert list(models) == ["genas_flatness_c100", "resnet50"]
    assert [model["parameters"] for model in models.values()] == sizes(host)
    assert figures["settings"]["crop"] == [64, 96]
    for model in models.values():
        assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in model["images_per_second"].values())
    assert "ours / resnet50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mmseg", *TINY, "--crop", "32", "64"], "--crop must be at least 64 by 64, got 32 by 64"),
        (["mmseg", *TINY, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
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
