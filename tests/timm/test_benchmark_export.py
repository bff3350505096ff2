"""The benchmark of exported networks: what it counts, what it times, and, slowly, all of it."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, imported as Python does when it runs it: from a path that holds its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("export")
    for name in ("export", "networks", "scoring"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Grey images, darker and lighter ones, the first of each class alike."""
    for split in ("train", "test"):
        for name, levels in (("dark", (10, 20, 200)), ("light", (250, 220))):
            (tmp_path / split / name).mkdir(parents=True)
            for number, level in enumerate(levels):
                pixels = np.full((32, 32, 3), level, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def test_accuracies_are_those_of_a_count_by_hand(benchmark: Any, data: Path) -> None:
    def bright(x: Tensor) -> Tensor:
        level = x.mean((1, 2, 3))
        return torch.stack([0.5 - level, level - 0.5], 1)

    def prepare(path: str) -> Tensor:
        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255

    run = {"right": bright, "wrong": lambda x: -bright(x)}
    # One of the dark images is light.
    assert benchmark.accuracies(run, data / "test", prepare) == ({"right": 4 / 5, "wrong": 1 / 5}, 5)


def test_the_arms_take_turns_in_the_opposite_order_every_second_round(benchmark: Any) -> None:
    order: list[str] = []
    arms = {(name, "ONNX"): (lambda x, name=name: order.append(name), torch.zeros(1)) for name in "ab"}
    taken = benchmark.latencies(arms, Namespace(clock="wall", rounds=2, steps=2))
    assert "".join(order) == "ab" + "aabb" + "bbaa"
    assert {arm: len(times) for arm, times in taken.items()} == {("a", "ONNX"): 2, ("b", "ONNX"): 2}


def test_the_three_forms_of_a_network_compute_the_same(benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    images = torch.rand(8, 3, 16, 16)
    found = benchmark.forms(model, 16, [images], tmp_path, "small")
    with torch.no_grad():
        expected = model(images)
    for form, distance in (("PyTorch", 0.0), ("ONNX", 1e-5), ("int8", 0.05)):
        assert float((found["run"][form](images) - expected).norm() / expected.norm()) <= distance
    assert found["megabytes"]["PyTorch"] == pytest.approx(4e-6 * (27 * 8 + 8 + 8 * 5 + 5))
    assert found["megabytes"]["int8"] == (tmp_path / "small-int8.onnx").stat().st_size / 1e6


def test_numbers_that_cannot_be_are_refused(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["DIR", "--epochs", "1"])
    assert "--epochs must be at least 2, got 1" in capsys.readouterr().err


@pytest.mark.slow  # It exports four networks, two of them for 224 pixels.
def test_all_of_it(benchmark: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (data / "train").iterdir():
        for number in range(3, 67):
            (folder / f"{number}.png").write_bytes((folder / "0.png").read_bytes())
    sizes = ["--init-channels", "4", "--num-cells", "3", "--image-size", "32", "--rounds", "1", "--steps", "1"]
    assert benchmark.main([str(data), *sizes, "--threads", "1", "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["test_images"] == 5 and found["top1"]["PyTorch"] == found["top1"]["ONNX"]
    assert [sorted(each["milliseconds"]) for each in found["networks"].values()] == 4 * [["ONNX", "PyTorch", "int8"]]
    assert "latency [ms]" in capsys.readouterr().out
