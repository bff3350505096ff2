"""The roofline benchmark: operations against torch's counter, bytes against a count by hand, its tables."""

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
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genas_plugins import SuperNet
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.spaces import DartsSearchSpace

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--init-channels", "4", "--num-cells", "3", "--image-size", "8", "--device", "cpu", "--rounds", "1"]
TINY += ["--recalibration-images", "10", "--images", "6", "--batch-size", "4", "--train-batch-size", "2"]
TINY += ["--steps", "3"]
NEEDS_NNI = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nni", "pytorch_lightning")),
    reason="NNI and Lightning are not installed",
)
NUMBER = r" +(-?[\d.]+)"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, imported as Python does when it runs it, with rates that take no time to measure."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("roofline")
    monkeypatch.setattr(module, "MATRIX_SIZE", {"cpu": 128})
    monkeypatch.setattr(module, "COPIED_BYTES", {"cpu": 2**20})
    yield module
    for name in ("roofline", "scoring", "training"):
        sys.modules.pop(name, None)


def meta_supernet() -> SuperNet:
    with torch.device("meta"):
        return SuperNet(10, 4, 3)


@pytest.mark.parametrize("name", ["genas_flatness_c100", "darts_v2_c10"])
def test_operations_of_a_candidate_are_those_of_torchs_counter(roofline: Any, name: str) -> None:
    genotype = find_genotype(name)
    args = roofline.parse(TINY)
    layers = roofline.count_scoring(meta_supernet(), genotype, args)
    # The counter sees real tensors, an image at a time.
    network = SuperNet(10, 4, 3).subnet(genotype).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, 8, 8))
    # 10 images to recalibrate, 6 at each of three sigmas.
    assert sum(layer.flops for layer in layers) == counter.get_total_flops() * (10 + 3 * 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_operations_of_a_step_are_those_of_torchs_counter(roofline: Any, seed: int) -> None:
    path = DartsSearchSpace().sample(np.random.default_rng(seed))
    layers = roofline.count_step(meta_supernet(), path, 2, 8)
    # In evaluation mode the layers are those of the definition, not those that are fast to train on a CPU.
    supernet = SuperNet(10, 4, 3).eval()
    images = torch.rand(2, 3, 8, 8)
    forward, stem = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        loss = F.cross_entropy(supernet(images, path), torch.tensor([0, 1]))
    with stem:
        supernet.stem(images)
    loss.backward()
    # The gradients of input and weights take a forward pass each, and the images have none. Not counted by the counter,
    # which takes the kernels' gradient of a grouped convolution for that of an ordinary one.
    assert sum(layer.flops for layer in layers) == 3 * forward.get_total_flops() - stem.get_total_flops()
    weights = [parameter for parameter in supernet.parameters() if parameter.grad is not None]
    # Weight, gradient and momentum are read, weight and momentum written.
    assert layers[-1].bytes == 5 * 4 * sum(weight.numel() for weight in weights)


class Stack(nn.Module):
    """3x3 convolution, a sum with itself pooled, dilated depthwise and strided pointwise convolution, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=4, bias=False)
        self.pointwise = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + F.max_pool2d(x, 3, 1, 1)
        return self.classifier(self.pointwise(self.depthwise(x)).mean((2, 3)))


# Numbers of four bytes for two images of 8x8. The dilated kernel of stride 2 uses the pixels at even coordinates, which
# are 4x4 of 8x8; the pointwise one of stride 2 uses 2x2 of 4x4.
FORWARD = [
    ("convolution", 2 * 3 * 64 + 4 * 3 * 9 + 2 * 4 * 64),
    ("pooling", 2 * 4 * 64 + 2 * 4 * 64),
    ("addition", 2 * 4 * 64),
    ("depthwise", 2 * 4 * 16 + 4 * 9 + 2 * 4 * 16),
    ("pointwise", 2 * 4 * 4 + 6 * 4 + 2 * 6 * 4),
    ("linear", 2 * 6 + 6 * 5 + 2 * 5),
]
BACKWARD = [
    # Of the input and of the weights, each from the gradient and the other one.
    ("linear", 2 * 5 + 6 * 5 + 2 * 6),
    ("linear", 2 * 5 + 2 * 6 + 6 * 5),
    ("pointwise", 2 * 6 * 4 + 2 * (2 * 4 * 4 + 6 * 4)),
    ("depthwise", 2 * 4 * 16 + 2 * (2 * 4 * 16 + 4 * 9)),
    ("pooling", 2 * 4 * 64 + 2 * 4 * 64),
    # Two layers read what the first convolution gives.
    ("addition", 2 * 4 * 64),
    # The images have no gradient: they are read for that of the weights.
    ("convolution", 2 * 4 * 64 + 2 * 3 * 64 + 4 * 3 * 9),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_are_those_counted_by_hand(roofline: Any, device: str) -> None:
    with torch.device(device):
        stack, images = Stack(), torch.zeros(2, 3, 8, 8)
    with roofline.Costs() as costs:
        logits = stack(images)
    assert [(cost.kind, cost.bytes) for cost in costs.layers] == [(kind, 4 * count) for kind, count in FORWARD]
    with roofline.Costs() as costs:
        logits.sum().backward()
    found = sorted((cost.kind, cost.bytes) for cost in costs.layers)
    assert found == sorted((kind, 4 * count) for kind, count in BACKWARD)


def test_operations_of_a_backward_pass_are_those_of_torchs_counter(roofline: Any) -> None:
    stack = Stack()
    # Torch's counter takes the kernels' gradient of a grouped convolution for that of an ordinary one.
    stack.depthwise.weight.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, roofline.Costs() as costs:
        stack(torch.zeros(2, 3, 8, 8)).sum().backward()
    assert sum(cost.flops for cost in costs.layers) == counter.get_total_flops()


def test_images_of_a_candidate_count_once_a_sigma_and_its_weights_once_a_batch(roofline: Any) -> None:
    genotype = find_genotype("genas_flatness_c100")

    def moved(*changes: str) -> int:
        layers = roofline.count_scoring(meta_supernet(), genotype, roofline.parse([*TINY, *changes]))
        return sum(layer.bytes for layer in layers)

    # Batches of 4 and 2, then of 4, 4 and 2 images: a batch of 4 more at three sigmas; in one batch of 10, two reads
    # of all weights less at each.
    more = moved("--images", "10") - moved("--images", "6")
    again = moved("--images", "14") - moved("--images", "10")
    assert more == again > 0
    network = SuperNet(10, 4, 3).subnet(genotype)
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    assert moved("--images", "10") - moved("--images", "10", "--batch-size", "10") == 4 * weights * 2 * 3


def test_the_floor_takes_the_slower_of_both_in_each_layer(roofline: Any) -> None:
    layers = [roofline.Cost("convolution", 300, 10), roofline.Cost("pooling", 0, 60), roofline.Cost("linear", 100, 20)]
    # 3 s of arithmetic, 3 s of moving, 1 s of each.
    assert roofline.floor(layers, roofline.Rates(100.0, 20.0)) == pytest.approx(3 + 3 + 1)


def test_the_line_is_the_least_squares_one(roofline: Any) -> None:
    assert roofline.fit_line([1, 2, 4], [5.0, 7.0, 11.0])[2] == pytest.approx([0, 0, 0], abs=1e-12)
    slope, start, residuals = roofline.fit_line([0, 1, 2], [1.0, 1.0, 4.0])
    # By the normal equations: 0.5 + 1.5 x.
    assert (slope, start) == pytest.approx((1.5, 0.5))
    assert residuals == pytest.approx([1 - 0.5, 1 - 2.0, 1 - 3.5 / 4])


@NEEDS_NNI
def test_both_stages_are_told_beside_their_floors(roofline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(TINY) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^scoring: matrix rate [\d.]+ GFLOP/s .* copy rate [\d.]+ GB/s", printed, re.MULTILINE)
    for name in ("one candidate", "one training step"):
        row = re.search(rf"^{name}{NUMBER * 6} +[\d.]+ - [\d.]+{NUMBER}$", printed, re.MULTILINE)
        assert row is not None, printed
        _, _, arithmetic, moving, least, ours, ratio = map(float, row.groups())
        assert max(arithmetic, moving) - 0.001 <= least <= arithmetic + moving + 0.001
        assert least <= ours
        assert ratio > 1
        shares = re.findall(rf"^{name}, \w+ .* ([\d.]+)%$", printed, re.MULTILINE)
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)
    times = [
        float(re.search(rf"^{name}{NUMBER * 6}", printed, re.MULTILINE)[6]) for name in ("one candidate", "one t.*p")
    ]
    # 250 epochs of 25,000 images at a batch of 2.
    whole = re.search(
        r"^1,000 such candidates and 3,125,000 such steps .*: ([\d.]+) min, extrapolated$", printed, re.MULTILINE
    )
    expected = (1000 * times[0] + 3_125_000 * times[1]) / 60
    assert float(whole[1]) == pytest.approx(expected, abs=0.06 + 0.0006 * 3_126_000 / 60)


@NEEDS_NNI
def test_cost_against_size_has_a_row_per_size(
    roofline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sizes in (("IMAGE_COUNTS", (4000, 8000)), ("CHANNELS", (4, 8)), ("BATCH_SIZES", (2, 4))):
        monkeypatch.setattr(roofline, name, sizes)
    assert roofline.main([*TINY, "--num-cells", "2", "--sizes", "--scale", "0.001"]) == 0
    printed = capsys.readouterr().out
    tables = re.split(r"^(images|init_channels|batch_size) +ours.*\n", printed, flags=re.MULTILINE)
    names, bodies = tables[1::2], tables[2::2]
    assert names == ["images", "init_channels", "batch_size"]
    sizes = [[int(row) for row in re.findall(r"^(\d+) ", body, re.MULTILINE)] for body in bodies]
    assert sizes == [[4, 8], [4, 8], [2, 4]]
    assert [re.search(r"at most ([\d.]+)% from that line", body) is not None for body in bodies] == [True] * 3


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--images", "0", "--images must be at least 1, got 0"),
        ("--rounds", "0", "--rounds must be at least 1, got 0"),
        ("--train-batch-size", "-1", "--train-batch-size must be at least 1, got -1"),
        ("--steps", "1", "--steps must be at least 2, because the first is not timed; got 1"),
        ("--scale", "-1", "--scale must be above 0, got -1.0"),
    ],
)
def test_a_run_of_nothing_is_refused(
    roofline: Any, capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        roofline.main([option, value])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err
