"""``genas export``: trained networks, features and int8 out of a training's folder, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import timm_models  # noqa: F401
from genas_plugins import CellNetwork, SuperNet
from genas_plugins.checkpoints import save_network, save_supernet
from genas_plugins.cli import main
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.experiment import config
from timm_models.export import Features, run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Few convolutions, each of which the exporter takes its time for.
GENOTYPE = "4 3 1 0 3 3 2 0 0 3 0 6 0 0 1 3 4 0 3 2 0 3 0 0 7 0 3 0"
SIZES = {"init_channels": 4, "num_cells": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training, with random weights."""
    folder = tmp_path_factory.mktemp("training")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("genas_cell", genotype=GENOTYPE, **SIZES)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    settings = {"model": "genas_cell", "model_kwargs": {"genotype": GENOTYPE, **SIZES}, "img_size": 64}
    settings |= {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.8, "interpolation": "bicubic"}
    (folder / "args.yaml").write_text(json.dumps(settings))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "last.pth.tar")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of other sizes than the network's, in folders of classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, shape in (("a/0.png", (80, 90)), ("a/1.png", (70, 64)), ("b/0.png", (200, 100))):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / name)
    return folder


def network(training: Path) -> torch.nn.Module:
    model = timm.create_model("genas_cell", genotype=GENOTYPE, **SIZES)
    model.load_state_dict(torch.load(training / "last.pth.tar", weights_only=True)["state_dict"])
    return model.eval()


def computed(path: Path, images: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *(str(argument) for argument in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_logits_in_any_batch_with_what_a_user_must_know_beside_them(
    training: Path, tmp_path: Path, images: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "n.onnx"
    assert main(["export", str(training), str(target), "--dynamic-batch"]) == 0
    told = capsys.readouterr().out
    assert f"{target}: float32" in told and "images (N, 3, 64, 64) to logits" in told and "allowed: 0.001" in told
    for count in (1, 5):
        x = images(count, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(computed(target, x)["logits"], network(training)(x), rtol=1e-4, atol=1e-5)
    stored = {each.key: each.value for each in onnx.load(target).metadata_props}
    assert stored["genotype"] == str(find_genotype(GENOTYPE))
    assert (json.loads(stored["mean"]), json.loads(stored["crop_pct"])) == ([0.5] * 3, 0.8)
    assert json.loads(stored["input_size"]) == [3, 64, 64]


def test_features_of_any_size(training: Path, tmp_path: Path, images: Callable[..., Tensor]) -> None:
    target = tmp_path / "n.onnx"
    assert main(["export", str(training), str(target), "--features", "--dynamic-size"]) == 0
    for shape in ((1, 3, 64, 96), (1, 3, 75, 101)):
        x = images(*shape)
        found = computed(target, x)
        assert list(found) == ["features_4", "features_8", "features_16", "features_32"]
        with torch.no_grad():
            expected = network(training).forward_intermediates(x, intermediates_only=True)
        for ours, theirs in zip(expected, found.values(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def by_hand(path: Path) -> Tensor:
    """A picture as the training validates: 64 / 0.8 pixels at the shorter side, the centre, then normalised."""
    image = Image.open(path)
    short = min(image.size)
    width, height = (int(80 * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    pixels = np.asarray(image.crop((left, top, left + 64, top + 64)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - 0.5) / 0.25).permute(2, 0, 1)


def test_int8_is_calibrated_on_images_as_the_training_prepares_them(
    training: Path, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm_models.export as command

    seen: list[Tensor] = []
    kept = command.export_onnx

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.extend(batches := list(named["calibration"]))
        return kept(*arguments, **{**named, "calibration": batches})

    monkeypatch.setattr(command, "export_onnx", spy)
    target = tmp_path / "n.onnx"
    assert main(["export", str(training), str(target), "--int8", str(pictures), "--dynamic-batch"]) == 0
    told = capsys.readouterr().out
    assert "int8" in told and "on 3 calibration images (allowed: 25%)" in told
    expected = torch.stack([by_hand(path) for path in sorted(pictures.rglob("*.png"))])
    torch.testing.assert_close(torch.cat(seen), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = network(training)(expected)
    error = (computed(target, expected)["logits"] - logits).norm() / logits.norm()
    assert 0 < float(error) < 0.25 and f"int8 is {error:.1%} away" in told


def test_so_many_images_are_taken_from_all_over_the_folder(training: Path, pictures: Path, tmp_path: Path) -> None:
    from timm_models.export import _spread

    files = [f"{number:03d}" for number in range(100)]
    assert _spread(files, 5) == ["000", "025", "050", "074", "099"]
    assert _spread(files[:3], 5) == files[:3]


def test_the_best_of_a_search_with_its_own_normalisation(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    search = tmp_path / "search"
    search.mkdir()
    settings = {"data": {"name": "digits", "train_images": 64, "validation_images": 32, "test_images": 16}}
    settings |= {"space": {"init_channels": 4, "num_cells": 3}, "score": {"recalibration_images": 32}}
    (search / "config.yaml").write_text(config.dump(config.parse(settings)))
    (search / "history.jsonl").write_text("")
    torch.save({"state_dict": SuperNet(10, init_channels=4, num_cells=3).state_dict()}, search / "supernet.ckpt")
    arguments = [search, tmp_path / "n.onnx", "--genotype", GENOTYPE]
    assert "--features" in refused([*arguments, "--features"], capsys)
    assert main(["export", *map(str, arguments), "--int8", str(pictures)]) == 0
    assert "int8" in capsys.readouterr().out
    stored = {each.key: each.value for each in onnx.load(tmp_path / "n.onnx").metadata_props}
    # Digits are grey, and have 8 by 8 pixels.
    mean = json.loads(stored["mean"])
    assert json.loads(stored["input_size"]) == [3, 8, 8] and len(set(mean)) == 1 and 0.2 < mean[0] < 0.4


def test_bad_input(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, taken, empty = tmp_path / "n.onnx", tmp_path / "taken.onnx", tmp_path / "empty"
    taken.write_bytes(b"mine")
    empty.mkdir()
    detector = {f"backbone.bottom_up.{name}": value for name, value in network(training).state_dict().items()}
    torch.save({"model": {**detector, "head.cls_score.weight": torch.zeros(2)}}, tmp_path / "model_final.pth")
    cifar = save_network(CellNetwork(find_genotype(GENOTYPE), 4, 3, 5, stem="cifar"), tmp_path / "cifar.safetensors")
    supernet = save_supernet(SuperNet(10, 4, 3), tmp_path / "supernet.safetensors")
    for arguments, message in (
        ([tmp_path / "model_final.pth", target], "holds a detector or a segmentor"),
        ([training, target, "--int8", empty], "empty holds no images"),
        ([training, target, "--int8", tmp_path / "none"], "There is no folder of images"),
        ([training, taken], "taken.onnx exists"),
        ([training, tmp_path / "n.pb"], "exported as .onnx, got the file name 'n.pb'"),
        ([training, target, "--image-size", "0"], "--image-size must be at least 1"),
        ([training, target, "--calibration-images", "0"], "--calibration-images must be at least 1"),
        ([training, target, "--dynamic-size", "--image-size", "32"], "33 to 16,384 pixels"),
        ([tmp_path / "none", target], "There is no checkpoint file"),
        ([supernet, target], "name an architecture with --genotype"),
        ([cifar, target, "--features"], "which gives no features"),
    ):
        assert message in refused(arguments, capsys)
    assert taken.read_bytes() == b"mine" and not target.exists()


def test_int8_needs_to_know_how_images_are_normalised(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    path = save_network(CellNetwork(find_genotype(GENOTYPE), 4, 3, 5, stem="cifar"), tmp_path / "cifar.safetensors")
    told = refused([path, tmp_path / "n.onnx", "--int8", pictures], capsys)
    assert "does not say how its images are normalised" in told


def test_an_image_that_cannot_be_read_is_named(training: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    told = refused([training, tmp_path / "n.onnx", "--int8", tmp_path / "images"], capsys)
    assert "Cannot read the image" in told and not (tmp_path / "n.onnx").exists()


def test_without_the_extra(training: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'genas-plugins[export]'" in refused([training, tmp_path / "n.onnx"], capsys)


def test_features_are_those_of_the_network(training: Path, images: Callable[..., Tensor]) -> None:
    assert callable(run)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        shapes = [tuple(feature.shape) for feature in Features(network(training))(x)]
    assert shapes == [(1, 4, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]
