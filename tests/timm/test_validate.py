"""Evaluation: known logits on folders of generated images, and the folders that are refused."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset
from torch import Tensor, nn
from torchvision import datasets, transforms

from timm_models import shifted
from timm_models.validate import evaluate, load_model, main

SYNSETS = tuple(ImageNetInfo().label_names())
INFO = Path(timm.data.__file__).parent / "_info"
LISTED = {kind: tuple((INFO / f"imagenet_{kind}_synsets.txt").read_text().split()) for kind in "ar"}
# Every fifth: 200 classes that are neither those of ImageNet-A nor those of ImageNet-R.
OTHER_200 = SYNSETS[::5]
ROWS = 1024
Run = Callable[..., dict]


@cache
def picture(number: int) -> bytes:
    """A PNG of 8x8 pixels whose colour spells a number below 1024."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (8 * (number // 32), 8 * (number % 32), 0)).save(file, "png")
    return file.getvalue()


class Lookup(nn.Module):
    """Reads the number that the colour spells, and returns that row of its table as logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(ROWS, num_classes))
        self.num_classes = num_classes
        self.pretrained_cfg = {"num_classes": 1000, "input_size": (3, 8, 8), "crop_pct": 0.5, "mean": (0.0, 0.0, 0.0)}
        self.pretrained_cfg |= {"std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}

    def forward(self, x: Tensor) -> Tensor:
        red, green, _ = (x.mean((2, 3)) * (255 / 8)).round().long().unbind(1)
        return self.table[32 * red + green]


def fill(root: Path, classes: Mapping[str, Iterable[int]]) -> Path:
    for name, numbers in classes.items():
        folder = root / name
        folder.mkdir(parents=True)
        for index, number in enumerate(numbers):
            (folder / f"{index}.png").write_bytes(picture(number))
    return root


def random_numbers(names: Iterable[str], seed: int, images: int = 2) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {name: [rng.randrange(ROWS) for _ in range(images)] for name in names}


def random_table(seed: int, classes: int = 1000) -> Tensor:
    return torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(seed))


def identity() -> Tensor:
    """Row k has its highest logit, by far, at class k."""
    return torch.eye(ROWS)[:, :1000]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image for each class of ImageNet, which spells the number of its class."""
    root = tmp_path_factory.mktemp("imagenet") / "val"
    return fill(root, {name: [number] for number, name in enumerate(SYNSETS)})


@pytest.fixture
def lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm.create_model also knows "lookup"."""
    create = timm.create_model

    def create_model(name: str, **arguments: object) -> nn.Module:
        return Lookup(arguments["num_classes"] or 1000) if name == "lookup" else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.fixture
def run(lookup: None, tmp_path: Path) -> Run:
    """Runs the command with a table of logits; returns what it writes."""

    def run(table: Tensor, *arguments: object) -> dict:
        torch.save({"table": table}, tmp_path / "table.pt")
        results = tmp_path / "results.json"
        options = ["--model", "lookup", "--checkpoint", tmp_path / "table.pt", "--workers", 0, "--results", results]
        assert main([str(argument) for argument in (*arguments, *options)]) == 0
        return json.loads(results.read_text())

    return run


def brute_force(rows: np.ndarray, targets: Iterable[int]) -> tuple[float, float]:
    """Top-1 and top-5 in per cent, from how many logits are higher than that of the target."""
    ranks = [int((row > row[target]).sum()) for row, target in zip(rows, targets, strict=True)]
    return 100 * float(np.mean([rank < 1 for rank in ranks])), 100 * float(np.mean([rank < 5 for rank in ranks]))


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Sum over the thresholds of precision times the gain in recall."""
    total, recall = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        found, wrong = (positive >= threshold).sum(), (negative >= threshold).sum()
        total += (found / len(positive) - recall) * found / (found + wrong)
        recall = found / len(positive)
    return float(total)


# Measures


class Direct(nn.Module):
    """Its images are logits already."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def batches(logits: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits[:, :, None, None].split(size), targets.split(size), strict=True))


@pytest.mark.parametrize("indices", [None, (1, 4, 5, 6, 9, 11)])
def test_accuracy_and_confidence_are_those_of_brute_force_with_a_partial_last_batch(indices):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(23, 12, generator=generator)
    columns = list(range(12)) if indices is None else list(indices)
    targets = torch.randint(len(columns), (23,), generator=generator)
    found = evaluate(Direct(), batches(logits, targets, 10), indices)
    rows = logits[:, columns].double().numpy()
    top1, top5 = brute_force(rows, targets.tolist())
    assert 0 < top1 < top5 < 100
    assert (100 * found.top1, 100 * found.top5, found.images) == (pytest.approx(top1), pytest.approx(top5), 23)
    powers = np.exp(rows)
    assert found.confidences.numpy() == pytest.approx(powers.max(1) / powers.sum(1), rel=1e-6)


def test_the_network_is_evaluated_in_evaluation_mode_and_gets_its_mode_back():
    model = nn.Sequential(Direct(), nn.Dropout(0.5)).train()
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    assert evaluate(model, batches(logits, logits.argmax(1), 64)).top1 == 1.0
    assert model.training and model[1].training


def test_with_fewer_than_five_classes_top5_is_that_of_all():
    assert evaluate(Direct(), batches(torch.eye(3), torch.tensor([1, 2, 0]), 2)).top5 == 1.0


def test_mixed_precision_is_used_and_counts_in_float32():
    seen = []
    model = nn.Sequential(Direct(), nn.Linear(4, 4))
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = batches(torch.eye(4), torch.arange(4), 4)
    assert evaluate(model, data, amp_dtype=torch.bfloat16).confidences.dtype == torch.float32
    evaluate(model, data)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Direct(), [], "no images"),
        (Direct(), batches(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), 2), "not finite"),
        (Direct(), batches(torch.tensor([[torch.inf, 0.0]]), torch.tensor([0]), 2), "not finite"),
        (nn.Identity(), batches(torch.eye(2), torch.tensor([0, 1]), 2), "must return logits"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, data)


def test_aupr_of_four_images_by_hand():
    # From the most anomalous: positive (1/1), negative, positive (2/3), negative.
    found = shifted.anomaly_aupr(torch.tensor([0.1, 0.4]), torch.tensor([0.9, 0.3]))
    assert found == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_aupr_with_ties_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(2)
    anomalous, known = (torch.randint(1, 8, (count,), generator=generator) / 8 for count in (30, 50))
    found = shifted.anomaly_aupr(anomalous, known)
    assert found == pytest.approx(average_precision(-anomalous.numpy(), -known.numpy()))


def test_aupr_needs_images_of_both_kinds():
    with pytest.raises(ValueError, match="0 anomalous and 2 others"):
        shifted.anomaly_aupr(torch.zeros(0), torch.ones(2))


# The sets, by the command


def test_imagenet_is_scored_in_the_order_of_the_synsets(imagenet, run, capsys):
    table = random_table(3) + 3 * identity()
    found = run(table, imagenet, "--batch-size", 300)
    top1, top5 = brute_force(table[:1000].numpy(), range(1000))
    assert 10 < top1 < top5 < 90
    assert (found["images"], found["top1"], found["top5"]) == (1000, pytest.approx(top1), pytest.approx(top5))
    assert f"top1           {top1:.2f}\n" in capsys.readouterr().out


def test_v2_is_numbered_by_the_names_of_its_folders_not_by_their_order(tmp_path, run):
    root = fill(tmp_path / "v2", {str(number): [number] for number in range(1000)})
    found = run(identity(), root, "--kind", "v2")
    assert (found["top1"], found["images"]) == (100.0, 1000)
    # The trap: sorted as text, nearly every class gets another's number.
    trapped = datasets.ImageFolder(str(root), transforms.ToTensor())
    assert sum(int(Path(path).parent.name) == target for path, target in trapped.samples) < 20


@pytest.mark.parametrize("kind", ["a", "r"])
def test_a_and_r_let_only_their_200_classes_compete(kind, tmp_path, run):
    numbers = random_numbers(LISTED[kind], seed=4)
    table = random_table(5)
    for name, images in numbers.items():
        for number in images[:1]:
            table[number, SYNSETS.index(name)] += 2.5
    found = run(table, fill(tmp_path / kind, numbers), "--kind", kind)
    columns = [index for index, name in enumerate(SYNSETS) if name in LISTED[kind]]
    pairs = [(number, SYNSETS.index(name)) for name, images in numbers.items() for number in images]
    restricted = table[[number for number, _ in pairs]][:, columns].numpy()
    top1, top5 = brute_force(restricted, [columns.index(target) for _, target in pairs])
    unrestricted = brute_force(table[[number for number, _ in pairs]].numpy(), [target for _, target in pairs])
    assert unrestricted[0] < top1 < 90
    assert (found["images"], found["top1"], found["top5"]) == (400, pytest.approx(top1), pytest.approx(top5))


@pytest.mark.parametrize("complete", [True, False])
def test_o_finds_anomalies_among_the_images_of_its_200_classes(complete, imagenet, tmp_path, run):
    anomalous = random_numbers(OTHER_200, seed=6)
    inside = imagenet
    if not complete:
        inside = tmp_path / "inside"
        inside.mkdir()
        for name in OTHER_200:
            (inside / name).symlink_to(imagenet / name)
    table = random_table(7) + 4 * identity()
    found = run(table, fill(tmp_path / "o", anomalous), "--kind", "o", "--in-distribution", inside)

    logits = table[:, ::5].double().numpy()
    confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    outside = np.array([confidence[number] for numbers in anomalous.values() for number in numbers])
    expected = 100 * average_precision(-outside, -confidence[:1000:5])
    assert 70 < expected < 99
    assert (found["images"], found["aupr"]) == (600, pytest.approx(expected, abs=0.01))
    assert found["aupr_of_chance"] == pytest.approx(100 * 400 / 600)


def test_c_averages_severities_and_then_the_corruptions_that_count(tmp_path, run, capsys, monkeypatch):
    # A tenth of the classes, for fifteen folders of them.
    monkeypatch.setattr(shifted, "_class_names", lambda kind: SYNSETS[:100])
    errors = {"fog": (0, 0, 10, 25, 50), "snow": (10,) * 5, "saturate": (100,) * 5}
    for percent in (0, 10, 25, 50, 100):
        fill(tmp_path / str(percent), {name: [k + (k < percent)] for k, name in enumerate(SYNSETS[:100])})
    for name, percents in errors.items():
        (tmp_path / "c" / name).mkdir(parents=True)
        for severity, percent in enumerate(percents, 1):
            (tmp_path / "c" / name / str(severity)).symlink_to(tmp_path / str(percent))
    found = run(identity(), tmp_path / "c", "--kind", "c")
    means = [found[f"error_{name}"] for name in errors]
    assert means == [pytest.approx(17.0), pytest.approx(10.0), pytest.approx(100.0)]
    # saturate is one of the four corruptions that the paper holds out.
    assert found["unnormalised_mean_error"] == pytest.approx(13.5)
    missing = found["missing"].split(", ")
    assert len(missing) == 13 and "gaussian_noise" in missing and not {"fog", "snow"} & set(missing)
    # Its images are 224 pixels as they are to be seen, other than the model's own crop.
    assert found["crop_pct"] == "1.0"
    assert "fog: 0.00, 0.00, 10.00, 25.00, 50.00 % error" in capsys.readouterr().err


def test_another_dataset_has_the_classes_of_its_folders_in_the_order_of_timm(tmp_path, run):
    names = ("class10", "class2", "Class1", "zebra")
    root = fill(tmp_path / "set", {name: [number] for number, name in enumerate(names)})
    order = create_dataset("", root=str(root)).reader.class_to_idx
    assert sorted(order, key=order.get) == ["Class1", "class2", "class10", "zebra"]
    table = torch.zeros(ROWS, 4)
    for number, name in enumerate(names):
        table[number, order[name]] = 9.0
    assert run(table, root)["top1"] == 100.0


@pytest.mark.parametrize("count", [10, 1000])
def test_classes_of_imagenet_or_1000_others_are_a_dataset_of_their_own_when_their_number_is_given(count, tmp_path, run):
    names = SYNSETS[100:110] if count == 10 else [f"class{number:03}" for number in range(1000)]
    root = fill(tmp_path / "set", {name: [number] for number, name in enumerate(names)})
    assert run(identity()[:, :count], root, "--num-classes", count)["top1"] == 100.0


@pytest.mark.parametrize(("arguments", "top1"), [([], 50.0), (["--no-antialias"], 100.0)])
def test_without_antialiasing_images_are_resized_as_opencv_does(arguments, top1, tmp_path, run):
    # To a quarter: OpenCV looks at the two middle columns of four, which are bright, antialiasing at all of them.
    root = fill(tmp_path / "set", {"black": [0], "stripes": []})
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, [x for x in range(32) if x % 4 in (1, 2)], :2] = 248
    Image.fromarray(pixels).save(root / "stripes" / "0.png")
    table = torch.zeros(ROWS, 2)
    table[:1023, 0] = table[1023, 1] = 9.0
    assert run(table, root, "--crop-pct", 1, *arguments)["top1"] == top1


@cache
def genas(classes: int, **changes: object) -> nn.Module:
    """A small network whose batch normalisation has seen images, so that its answers differ from image to image."""
    arguments = {"genotype": "darts_v2_c10", "init_channels": 4, "num_cells": 3, **changes}
    torch.manual_seed(0)
    model = timm.create_model("genas_cell", num_classes=classes, **arguments).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The mean over all batches.
            module.momentum = None
    with torch.no_grad():
        for _ in range(4):
            model(torch.rand(16, 3, 32, 32))
    return model.eval()


GENAS = ["--model", "genas_cell", "--workers", "0", "--input-size", "32"]
GENAS += ["--model-kwargs", "genotype=darts_v2_c10", "init_channels=4", "num_cells=3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of eleven pictures of 40 x 56 pixels, of one colour and noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in "abcdef":
        (root / name).mkdir()
        for index in range(11):
            pixels = rng.integers(0, 256, (1, 1, 3)) * 0.7 + rng.integers(0, 76, (40, 56, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_genas_checkpoint_scores_what_torchvision_and_a_plain_loop_say(suffix, pictures, tmp_path, capsys):
    model = genas(6)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "best.pth.tar")
    results = tmp_path / f"results.{suffix}"
    arguments = [str(pictures), "--checkpoint", str(tmp_path / "best.pth.tar"), "--results", str(results)]
    assert main([*arguments, "--batch-size", "25", "--channels-last", *GENAS]) == 0

    # The official evaluation at another size: shorter side to size / 0.875, bilinear; crop; no mean, no deviation.
    steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()]
    dataset = datasets.ImageFolder(str(pictures), transforms.Compose(steps))
    images = torch.stack([image for image, _ in dataset])
    with torch.no_grad():
        top1, top5 = brute_force(model(images).numpy(), dataset.targets)
    assert 0 < top1 < top5 < 100
    if suffix == "json":
        found = json.loads(results.read_text())
    else:
        (found,) = csv.DictReader(results.open(newline=""))
    assert float(found["top1"]) == pytest.approx(top1)
    assert float(found["top5"]) == pytest.approx(top5)
    assert (found["model"], str(found["images"])) == ("genas_cell", "66")
    assert f"top1           {top1:.2f}\n" in capsys.readouterr().out


# What is refused


@pytest.fixture
def refused(lookup: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must fail with one line on standard error; returns the line."""

    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    return refused


@pytest.fixture
def saved(tmp_path: Path) -> list[object]:
    """Arguments for the table of logits with which ImageNet is all right."""
    torch.save({"table": identity()}, tmp_path / "table.pt")
    return ["--model", "lookup", "--checkpoint", tmp_path / "table.pt", "--workers", 0]


def folders(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        # ImageNet
        (
            "imagenet",
            [str(number) for number in range(1000)],
            r"not ImageNet:.*It looks like ImageNet-V2: use --kind v2",
        ),
        ("imagenet", LISTED["a"], "found 200; 800 missing .*ImageNet-A: use --kind a.*--num-classes 200"),
        ("imagenet", LISTED["r"], "ImageNet-R: use --kind r"),
        ("imagenet", OTHER_200, "ImageNet-O: use --kind o"),
        ("imagenet", ("fog", "snow"), "fog holds nothing, expected images .*ImageNet-C: use --kind c"),
        ("imagenet", SYNSETS[:-1], r"found 999; 1 missing \(n15075141\)"),
        ("imagenet", [*SYNSETS, "others"], r"found 1001; 1 unknown \(others\)"),
        ("imagenet", [f"class{number}" for number in range(1000)], "1000 missing .*1000 unknown .*--num-classes 1000"),
        ("imagenet", ("cat", "dog"), "cat holds nothing, expected images"),
        ("imagenet", ("train/cat", "train/dog", "val/cat", "val/dog"), r"train holds cat, dog.*Did you mean .*/val\?"),
        ("imagenet", ["train/cat", *(f"val/{name}" for name in SYNSETS)], r"Did you mean .*/val\?"),
        # ImageNet-V2
        ("v2", [str(number) for number in range(999)], r"not ImageNet-V2: .*found 999; 1 missing \(999\)"),
        ("v2", [f"{number:03}" for number in range(1000)], r"100 missing \(0, 1, 2, 3, \.{3}\), 100 unknown \(000, "),
        ("v2", SYNSETS, "ImageNet: use --kind imagenet"),
        ("v2", [f"format-val/{number}" for number in range(1000)], r"Did you mean .*/format-val\?"),
        # ImageNet-A and -R
        ("a", LISTED["r"], "not ImageNet-A: expected 200 .*ImageNet-R: use --kind r"),
        ("r", LISTED["r"][1:], r"found 199; 1 missing \(n01443537\)"),
        ("a", [f"imagenet-a/{name}" for name in LISTED["a"]], r"Did you mean .*/imagenet-a\?"),
        # ImageNet-C
        ("c", ("fog/1", "fog/2", "fog/4", "snow/1"), "snow has 1; fog has 1, 2, 4"),
        ("c", [f"fog/{severity}" for severity in range(1, 7)], "fog has 1, 2, 3, 4, 5, 6"),
        ("c", ("fog/1", "mist/1"), r"found 1 others \(mist\)"),
        ("c", [f"weather/{name}/1" for name in ("fog", "snow")], r"found 1 others .*Did you mean .*/weather\?"),
        ("c", SYNSETS, "ImageNet: use --kind imagenet"),
        ("c", [f"fog/{severity}/{name}" for severity in range(1, 6) for name in "ab"], "fog/1 is not a severity of"),
    ],
)
def test_another_layout_is_named(kind, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        shifted.open_images(kind, folders(tmp_path / "set", names))


def test_a_class_of_one_severity_without_images_is_named(imagenet, tmp_path):
    root = folders(tmp_path / "c" / "fog", ["5"])
    for severity in "1234":
        (root / severity).symlink_to(imagenet)
    for name in SYNSETS:
        (root / "5" / name).symlink_to(imagenet / name)
    (root / "5" / SYNSETS[7]).unlink()
    (root / "5" / SYNSETS[7]).mkdir()
    with pytest.raises(ValueError, match=f"fog/5/{SYNSETS[7]} holds nothing"):
        shifted.find_corruptions(tmp_path / "c")


def test_files_where_folders_are_expected_are_named(tmp_path):
    root = folders(tmp_path / "v2", [str(number) for number in range(1000) if number != 7])
    (root / "7").write_text("")
    with pytest.raises(ValueError, match=r"1 missing \(7\), 1 files \(7\)"):
        shifted.open_shifted(root, "v2")
    (tmp_path / "flat").mkdir()
    for index in range(2):
        (tmp_path / "flat" / f"{index}.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 files \(0.JPEG, 1.JPEG\), expected folders"):
        shifted.open_imagenet(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"0\.JPEG is a file, expected a folder"):
        shifted.open_imagenet(tmp_path / "flat" / "0.JPEG")
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        shifted.open_imagenet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="empty holds nothing"):
        shifted.open_imagenet(folders(tmp_path, ["empty"]) / "empty")


def test_what_lies_beside_the_class_folders_and_hidden_files_are_left_out(tmp_path):
    root = fill(tmp_path / "set", {"a": [1], "b": [2]})
    (root / "README.txt").write_text("ImageNet-R has one")
    (root / ".cache").mkdir()
    (root / "a" / "._0.png").write_bytes(b"macOS")
    (root / "a" / "notes.txt").write_text("")
    assert shifted.open_imagenet(root).samples == ((str(root / "a" / "0.png"), 0), (str(root / "b" / "0.png"), 1))


@pytest.mark.parametrize(
    ("outside", "inside", "message"),
    [
        (OTHER_200[1:], OTHER_200, "not ImageNet-O: expected 200 folders .*found 199"),
        ([*OTHER_200[1:], "verdigris"], OTHER_200, r"1 have other names \(verdigris\)"),
        (LISTED["a"], OTHER_200, "ImageNet-A: use --kind a"),
        (OTHER_200, LISTED["a"], "not ImageNet's validation set: .*800 missing"),
        (OTHER_200, [f"val/{name}" for name in SYNSETS], r"not ImageNet's validation set.*Did you mean .*/val\?"),
    ],
)
def test_another_layout_of_imagenet_o_or_of_the_images_in_distribution_is_named(outside, inside, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        shifted.open_imagenet_o(folders(tmp_path / "o", outside), folders(tmp_path / "val", inside))


def test_imagenet_o_is_not_compared_with_itself(tmp_path):
    root = folders(tmp_path / "o", OTHER_200)
    with pytest.raises(ValueError, match="given both as"):
        shifted.open_imagenet_o(root, root)


def test_imagenet_o_without_scikit_learn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'genas-plugins\[timm\]'"):
        shifted.open_imagenet_o(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "o"], "--in-distribution"),
        (["--in-distribution", "/val"], "--kind o"),
        (["--kind", "a", "--num-classes", "200"], "ImageNet-A needs a model of 1000 classes, got 200"),
        (["--num-classes", "10"], "expected 10 class folders, found 1000"),
        (["--crop-pct", "1.5"], "--crop-pct must be above 0 and at most 1, got 1.5"),
        (["--crop-pct", "0"], "--crop-pct must be above 0"),
        (["--results", "table.txt"], "must be a .csv or .json file"),
        (["--results", "/nowhere/table.csv"], "existing folder, got /nowhere/table.csv"),
        (["--pretrained"], "Give --checkpoint FILE or --pretrained, one of them"),
        (["--batch-size", "0"], "--batch-size must be from 1"),
        (["--workers", "-1"], "--workers must be from 0"),
        (["--input-size", "1000000000"], "--input-size must be from 1 to 16384"),
        (["--num-classes", "0"], "--num-classes must be from 2"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, imagenet, saved, refused):
    assert message in refused(imagenet, *saved, *arguments)


def test_random_weights_are_not_scored(imagenet, refused):
    assert "random weights are not scored" in refused(imagenet, "--model", "lookup")
    assert "Unknown model (nothing)" in refused(imagenet, "--model", "nothing", "--pretrained")
    # Nor is the fresh classifier that timm puts on published weights for another number of classes.
    with pytest.raises(ValueError, match="lookup are for 1000 classes, not 4"):
        load_model("lookup", None, 4, {})


def test_a_network_with_another_number_of_outputs_is_named(imagenet, saved, refused, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: Lookup(1003))
    torch.save({"table": torch.zeros(ROWS, 1003)}, saved[3])
    assert "has 1000 classes, lookup has 1003 outputs" in refused(imagenet, *saved)


def test_a_checkpoint_for_other_classes_does_not_leave_a_random_classifier(pictures, tmp_path, refused):
    torch.save(genas(10).state_dict(), tmp_path / "ten.pt")
    line = refused(pictures, "--checkpoint", tmp_path / "ten.pt", *GENAS)
    assert "2 parameters (classifier.weight, classifier.bias)" in line and "with 6 classes" in line


def test_a_checkpoint_of_another_network_or_of_a_diverged_training_is_named(pictures, tmp_path, refused):
    torch.save(genas(6, init_channels=8).state_dict(), tmp_path / "wide.pt")
    assert "does not fit" in refused(pictures, "--checkpoint", tmp_path / "wide.pt", *GENAS)
    state = dict(genas(6).state_dict())
    state["stem0.0.weight"] = torch.full_like(state["stem0.0.weight"], torch.nan)
    torch.save(state, tmp_path / "diverged.pt")
    line = refused(pictures, "--checkpoint", tmp_path / "diverged.pt", *GENAS)
    assert "1 parameters (stem0.0.weight)" in line and "diverge" in line
    assert "There is no checkpoint file" in refused(pictures, "--checkpoint", tmp_path / "none.pt", *GENAS)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_checkpoint_is_not_executed(save, pictures, tmp_path, refused):
    save({"state_dict": genas(6).state_dict(), "extra": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    assert "evil.pt is " in refused(pictures, "--checkpoint", tmp_path / "evil.pt", *GENAS)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_not_replaced(workers, tmp_path, refused):
    root = fill(tmp_path / "set", {"a": [0, 0], "b": [1]})
    whole = (root / "a" / "1.png").read_bytes()
    (root / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    torch.save({"table": identity()[:, :2]}, tmp_path / "table.pt")
    arguments = ["--model", "lookup", "--checkpoint", tmp_path / "table.pt", "--workers", workers]
    line = refused(root, *arguments)
    assert line.startswith("timm_models.validate: Cannot read the image ") and "a/1.png" in line


def test_an_image_of_16_bits_is_named_instead_of_clipped(tmp_path):
    fill(tmp_path, {"a": [], "b": [0]})
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .*more than 8 bits"):
        shifted.ImageFiles(shifted.open_imagenet(tmp_path).samples)[0]


def test_arguments_of_the_model_are_pairs(imagenet, saved, capsys):
    with pytest.raises(SystemExit):
        main([str(argument) for argument in (imagenet, *saved, "--model-kwargs", "genotype")])
    assert "--model-kwargs takes arguments KEY=VALUE" in capsys.readouterr().err


def test_debug_shows_the_error(imagenet, saved):
    with pytest.raises(ValueError, match="--crop-pct"):
        main([str(argument) for argument in (imagenet, *saved, "--crop-pct", 7, "--debug")])
