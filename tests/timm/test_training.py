"""The launcher against loops written by hand, one process against two, small batches against large ones."""

from __future__ import annotations

import csv
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

import timm_models  # noqa: F401
from genas_plugins.checkpoints import read_state
from genas_plugins.darts.network import Cell
from timm_models.data import Lighting
from timm_models.settings import from_options, read_config
from timm_models.train import main

CLASSES = ("blue", "grey", "red", "stripes")
SIZE = 32
# All kinds of operations, and half as many tensors as a published network has.
CODE = [4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0]
NETWORK: dict[str, Any] = {"genotype": CODE, "init_channels": 4, "num_cells": 3}
# Without kinks: with ReLU and max pooling the rounding of a sum in another order soon becomes another choice.
SMOOTH: dict[str, Any] = {**NETWORK, "genotype": [2 if number == 1 else number for number in CODE], "act_layer": "silu"}
# Without batch statistics, and so an image's part in a gradient does not depend on those beside it.
LARGE: dict[str, Any] = {"model_kwargs": {**SMOOTH, "norm_layer": "groupnorm1"}, "batch_size": 16, "epochs": 2}
# Without clipping, which hides the size of a gradient.
LARGE |= {"auxiliary_weight": 0.4, "lr": 0.005, "clip_grad": None}


def draw(name: str, rng: np.random.Generator) -> np.ndarray:
    pixels = rng.integers(0, 90, (SIZE, SIZE, 3))
    if name == "stripes":
        pixels[np.arange(SIZE) // 4 % 2 == 0] += 160
    elif name != "grey":
        pixels[..., {"red": 0, "blue": 2}[name]] += 160
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 images to train on, one more than batches take, and nine to validate on; both cannot be shared by two."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in (("train", (9, 8, 8, 8)), ("val", (2, 2, 2, 3))):
        for name, count in zip(CLASSES, counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw(name, rng)).save(folder / split / name / f"{number:02d}.png")
    return folder


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def launch(*arguments: str) -> tuple[int, list[str]]:
    """Run the command here; its status and what it logged. Logging is left as it was."""
    root, saver, lines = logging.getLogger(), logging.getLogger("timm.utils.checkpoint_saver"), Lines()
    handlers, levels = list(root.handlers), (root.level, saver.level)
    root.handlers[:] = [lines]
    try:
        return main(arguments), lines.kept
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        saver.setLevel(levels[1])


def configured(folder: Path, images: Path, **changes: Any) -> list[str]:
    """A command for a configuration with these settings; the run is ``folder / "run"``."""
    settings: dict[str, Any] = {
        **{"data_dir": str(images), "model": "genas_cell", "model_kwargs": NETWORK, "img_size": SIZE},
        **{"device": "cpu", "workers": 0, "tensorboard": False, "output": str(folder), "experiment": "run"},
        **{"batch_size": 8, "epochs": 2, "tail_epochs": 1, "warmup_epochs": 0, "lr": 0.05, "no_aug": True},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "settings.yaml")]


def train(folder: Path, images: Path, **changes: Any) -> Path:
    status, lines = launch(*configured(folder, images, **changes))
    assert status == 0, lines
    return folder / "run"


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "summary.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(run: Path, name: str = "last", key: str = "state_dict") -> dict[str, Tensor]:
    return torch.load(run / f"{name}.pth.tar", weights_only=True)[key]


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two networks' parameters and statistics."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first if first[name].is_floating_point())


def listed(folder: Path, resize: bool) -> tuple[Tensor, Tensor]:
    """All images of a split and their classes, in the order of the folders' and the files' names, by Pillow.

    For validation they are enlarged to 32 / 0.875 pixels, of which the centre is cut out.
    """
    files = sorted(folder.glob("*/*.png"))
    images = [Image.open(file) for file in files]
    if resize:
        images = [each.resize((36, 36), Image.Resampling.BILINEAR).crop((2, 2, 34, 34)) for each in images]
    pixels = np.stack([np.asarray(each) for each in images]) / np.float32(255)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([CLASSES.index(f.parent.name) for f in files])


# ---------------------------------------------------------------------------------------------- one real training


@pytest.fixture(scope="module")
def learnt(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of eight epochs with all that the paper's recipe has, and what it logged."""
    folder = tmp_path_factory.mktemp("learnt")
    changes = {"no_aug": False, "auxiliary_weight": 0.4, "lighting": 0.1, "tensorboard": True, "checkpoint_hist": 2}
    changes |= {"scale": [0.5, 1.0], "epochs": 8, "tail_epochs": 2, "warmup_epochs": 2, "lr": 0.03, "batch_size": 4}
    status, lines = launch(*configured(folder, images, **changes))
    assert status == 0
    return folder / "run", lines


def test_it_learns(learnt: tuple[Path, list[str]]) -> None:
    figures = rows(learnt[0])
    # Both losses, smoothed, of a network that knows nothing; and four classes to choose from.
    assert figures[0]["train_loss"] > 1.2 * math.log(4)
    # The best epoch, since batches of four images are noisy.
    assert min(row["train_loss"] for row in figures) < 0.8 * figures[0]["train_loss"]
    assert max(row["eval_top1"] for row in figures) >= 75
    assert min(row["eval_loss"] for row in figures) < 0.7 * math.log(4)


def test_summary(learnt: tuple[Path, list[str]]) -> None:
    figures = rows(learnt[0])
    expected = ["epoch", "train_loss", "train_images_per_second", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert list(figures[0]) == expected
    assert [row["epoch"] for row in figures] == list(range(8))
    assert all(row["eval_top5"] == 100 for row in figures)
    assert all(row["train_images_per_second"] > 0 for row in figures)
    # 8 epochs, tail 2, warm-up 2, peak 0.03.
    rates = [0.015, 0.025, 0.02, 0.015, 0.01, 0.005, 0.005, 0.0025]
    assert [row["lr"] for row in figures] == pytest.approx(rates)


def test_what_is_logged_is_what_is_written(learnt: tuple[Path, list[str]]) -> None:
    run, lines = learnt
    figures = rows(run)
    number = r"([\d.]+)"
    summary = re.compile(rf"epoch (\d+): training loss {number}, validation loss {number}, top-1 {number}, .*")
    told = [match.groups() for match in map(summary.fullmatch, lines) if match]
    assert told == [
        (str(epoch + 1), f"{row['train_loss']:.4f}", f"{row['eval_loss']:.4f}", f"{row['eval_top1']:.2f}")
        for epoch, row in enumerate(figures)
    ]
    # 33 images make eight steps; the last line of an epoch has the mean of all of it.
    progress = re.compile(rf"epoch (\d+)/8  step 8/8  loss {number}  lr {number}  {number} images/s  ETA .*")
    told = [match.groups()[:3] for match in map(progress.fullmatch, lines) if match]
    assert told == [(str(k + 1), f"{row['train_loss']:.4f}", f"{row['lr']:.4g}") for k, row in enumerate(figures)]
    best = max(range(8), key=lambda epoch: figures[epoch]["eval_top1"])
    assert f"best {figures[best]['eval_top1']:.2f} in epoch {best + 1}" in lines[-1]


def test_files_of_a_run(learnt: tuple[Path, list[str]]) -> None:
    run, _ = learnt
    figures = rows(run)
    # The two best, the earlier one of equals.
    ranked = sorted(range(8), key=lambda epoch: (-figures[epoch]["eval_top1"], epoch))
    kept = {f"checkpoint-{epoch}.pth.tar" for epoch in ranked[:2]}
    assert {path.name for path in run.iterdir()} == kept | {
        *("args.yaml", "run.json", "data.json", "network.json", "summary.csv", "tensorboard"),
        *("last.pth.tar", "model_best.pth.tar"),
    }
    assert torch.load(run / "last.pth.tar", weights_only=True)["epoch"] == 7
    best = torch.load(run / "model_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["metric"]) == (ranked[0], figures[ranked[0]]["eval_top1"])


def test_settings_of_a_run(learnt: tuple[Path, list[str]], images: Path) -> None:
    settings = from_options({}, read_config(learnt[0] / "args.yaml"))
    assert settings == from_options({}, read_config(learnt[0].parent / "settings.yaml"))
    assert (settings.data_dir, settings.model_kwargs, settings.scale) == (str(images), NETWORK, (0.5, 1.0))


def test_tensorboard(learnt: tuple[Path, list[str]]) -> None:
    run, _ = learnt
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    columns = {f"train/{name}": f"train_{name}" for name in ("loss", "images_per_second")}
    columns |= {f"eval/{name}": f"eval_{name}" for name in ("loss", "top1", "top5")} | {"train/lr": "lr"}
    assert set(board.Tags()["scalars"]) == set(columns)
    for tag, column in columns.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == list(range(8))
        assert [event.value for event in events] == pytest.approx([row[column] for row in rows(run)], rel=1e-6)


@pytest.mark.parametrize("name", ["last", "model_best"])
def test_a_checkpoint_gives_the_accuracy_that_was_measured(
    name: str, learnt: tuple[Path, list[str]], images: Path
) -> None:
    run, _ = learnt
    checkpoint = run / f"{name}.pth.tar"
    row = rows(run)[torch.load(checkpoint, weights_only=True)["epoch"]]
    model = timm.create_model("genas_cell", checkpoint_path=checkpoint, num_classes=4, **NETWORK).eval()
    batch, classes = listed(images / "val", resize=True)
    with torch.inference_mode():
        logits = model(batch)
    assert F.cross_entropy(logits, classes).item() == pytest.approx(row["eval_loss"], rel=1e-4)
    assert 100 * (logits.argmax(1) == classes).float().mean().item() == pytest.approx(row["eval_top1"], abs=1e-4)
    # Names are those of the network, of its auxiliary head too, without a prefix.
    whole = timm.create_model("genas_cell", num_classes=4, auxiliary=True, **NETWORK)
    assert read_state(checkpoint).keys() == whole.state_dict().keys()


# ------------------------------------------------------------------------------------------- loops written by hand


def by_hand(images: Path, epochs: int, batch: int, auxiliary: float, clip: float, **network: Any) -> nn.Module:
    """The official training loop: label smoothing, auxiliary loss, clipping, classical momentum, decay of all."""
    batches, classes = listed(images / "train", resize=False)
    torch.manual_seed(0)
    model = timm.create_model("genas_cell", num_classes=4, auxiliary=auxiliary > 0, **network)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=3e-5)
    sampler = DistributedSampler(batches, num_replicas=1, rank=0, seed=0)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))
        # Epochs, a tail of one and no warm-up.
        rate = 0.004 * (epochs - 1 - epoch) / (epochs - 1) if epoch < epochs - 1 else 0.004 / (epochs - 1)
        optimizer.param_groups[0]["lr"] = rate
        for chosen in order[: len(order) // batch * batch].split(batch):
            optimizer.zero_grad()
            outputs = model.train()(batches[chosen])
            logits, extra = outputs if auxiliary else (outputs, None)
            loss = F.cross_entropy(logits, classes[chosen], label_smoothing=0.1)
            if auxiliary:
                loss = loss + auxiliary * F.cross_entropy(extra, classes[chosen], label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


@pytest.mark.parametrize(("auxiliary", "clip"), [(0.0, 5.0), (0.4, 5.0), (0.4, 0.5)])
def test_the_training_is_the_official_one(auxiliary: float, clip: float, images: Path, tmp_path: Path) -> None:
    changes = {"auxiliary_weight": auxiliary, "clip_grad": clip, "model_kwargs": SMOOTH}
    run = train(tmp_path, images, epochs=3, lr=0.004, **changes)
    model = by_hand(images, 3, 8, auxiliary, clip, **SMOOTH)
    found = weights(run)
    assert distance(found, model.state_dict()) < 5e-5
    # The distance means something: that far apart are two epochs.
    assert distance(found, weights(run, "checkpoint-0")) > 5e-3


def test_clipping_bounds_the_step(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    step = torch.optim.SGD.step

    def watched(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        before = [each.detach().clone() for each in optimizer.param_groups[0]["params"]]
        result = step(optimizer, *arguments)
        after = optimizer.param_groups[0]["params"]
        taken.append(math.sqrt(sum((x - y).double().square().sum().item() for x, y in zip(before, after, strict=True))))
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(tmp_path, images, clip_grad=0.01, weight_decay=0.0, momentum=0.0, grad_accum_steps=3, batch_size=4)
    # 33 images make eight passes and three steps. Learning rate times norm; the rate is 0.05 in both epochs.
    assert taken == pytest.approx([0.05 * 0.01] * 6, rel=1e-3)


def test_the_average_of_the_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = torch.optim.SGD.step

    def watched(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        result = step(optimizer, *arguments)
        seen.append(optimizer.param_groups[0]["params"][-1].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    changes = {"model_ema": True, "model_ema_decay": 0.96, "epochs": 5, "checkpoint_hist": 5}
    run = train(tmp_path, images, batch_size=4, lr=0.1, **changes)
    average = seen[0]
    for each in seen[1:]:
        average = 0.96 * average + 0.04 * each
    torch.testing.assert_close(weights(run, key="state_dict")["classifier.bias"], seen[-1])
    torch.testing.assert_close(weights(run, key="state_dict_ema")["classifier.bias"], average)
    # It is validated too, and what is best goes by it.
    figures = rows(run)
    metrics = [torch.load(run / f"checkpoint-{epoch}.pth.tar", weights_only=True)["metric"] for epoch in range(5)]
    assert metrics == [row["eval_top1_ema"] for row in figures]
    assert metrics != [row["eval_top1"] for row in figures]
    model = timm.create_model("genas_cell", num_classes=4, **NETWORK)
    model.load_state_dict(weights(run, key="state_dict_ema"))
    batch, classes = listed(images / "val", resize=True)
    with torch.inference_mode():
        loss = F.cross_entropy(model.eval()(batch), classes).item()
    assert loss == pytest.approx(figures[-1]["eval_loss_ema"], rel=1e-4)


@pytest.fixture(scope="module")
def large(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of two steps of 16 images."""
    return train(tmp_path_factory.mktemp("large"), images, **LARGE)


def check_same_training(run: Path, large: Path) -> None:
    """Equal up to the rounding of sums in another order."""
    assert distance(weights(run), weights(large)) < 2e-6
    # Far less than the training moved them.
    assert distance(weights(large), weights(large, "checkpoint-0")) > 0.01
    for row, expected in zip(rows(run), rows(large), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert row["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert (row["eval_top1"], row["eval_top5"], row["lr"]) == tuple(
            expected[name] for name in ("eval_top1", "eval_top5", "lr")
        )


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 8, "grad_accum_steps": 2}, {"batch_size": 4, "global_batch_size": 16}],
    ids=str,
)
def test_small_batches_add_up_to_a_large_one(change: dict[str, Any], large: Path, images: Path, tmp_path: Path) -> None:
    check_same_training(train(tmp_path, images, **{**LARGE, **change}), large)


def test_the_last_step_of_an_epoch_is_the_mean_of_the_passes_that_it_has(images: Path, tmp_path: Path) -> None:
    # Two batches of 16, where three would make a step.
    few = train(tmp_path / "few", images, **{**LARGE, "grad_accum_steps": 3})
    check_same_training(few, train(tmp_path / "one", images, **{**LARGE, "batch_size": 32}))


def test_images_are_prepared_as_told(images: Path, tmp_path: Path) -> None:
    run = train(tmp_path, images, crop_pct=1.0, mean=[0.5, 0.4, 0.3], std=[0.25, 0.5, 0.75])
    model = timm.create_model("genas_cell", num_classes=4, checkpoint_path=run / "last.pth.tar", **NETWORK).eval()
    batch, classes = listed(images / "val", resize=False)
    batch = (batch - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.25, 0.5, 0.75])[:, None, None]
    with torch.inference_mode():
        loss = F.cross_entropy(model(batch), classes).item()
    assert loss == pytest.approx(rows(run)[-1]["eval_loss"], rel=1e-4)


# ------------------------------------------------------------------------------------------------- two processes

PROCESS = """
import os

target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(target, 1)
os.dup2(target, 2)
os.environ.update(environment)
from timm_models.train import main
raise SystemExit(main(arguments))
"""

gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@gloo
@pytest.mark.parametrize(
    "change", [{"batch_size": 8}, {"batch_size": 4, "global_batch_size": 16, "validation_batch_size": 3}], ids=str
)
def test_two_processes_train_as_one(change: dict[str, Any], large: Path, images: Path, tmp_path: Path) -> None:
    # The server has imported everything once; each process is a copy of it that has computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm_models.train"])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    members = []
    for rank in range(2):
        arguments = configured(tmp_path / f"rank{rank}", images, **{**LARGE, **change})
        environment = {**common, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = {"log": tmp_path / f"{rank}.txt", "environment": environment, "arguments": arguments}
        members.append(context.Process(target=exec, args=(PROCESS, given)))
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    for member in members:
        member.kill()
    logs = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert [member.exitcode for member in members] == [0, 0], logs
    # Training loss, weights, and what 9 validation images give, each of them counted once.
    check_same_training(tmp_path / "rank0" / "run", large)
    # Only the first writes and speaks.
    assert "epoch 2: training loss" in logs[0] and logs[1] == ""
    assert [path.name for path in (tmp_path / "rank1").iterdir()] == ["settings.yaml"]


@gloo
@pytest.mark.slow
def test_torchrun(large: Path, images: Path, tmp_path: Path) -> None:
    arguments = configured(tmp_path, images, **{**LARGE, "batch_size": 8})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launcher, "-m", "timm_models.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Checkpoints and figures are in") == 1
    check_same_training(tmp_path / "run", large)


# ------------------------------------------------------------------------------------------------ other ways to run


def test_batches_of_one_image_of_one_pixel_are_refused(images: Path, tmp_path: Path, capsys: Any) -> None:
    status, _ = launch(*configured(tmp_path / "single", images, batch_size=1))
    assert status == 1 and "batch_size is 1, and batch normalisation has no statistics" in capsys.readouterr().err
    # Normalisation without statistics of the batch takes them.
    single = {"batch_size": 1, "epochs": 1, "sched": "cosine"}
    train(tmp_path / "group", images, model_kwargs={**NETWORK, "norm_layer": "groupnorm1"}, **single)


def test_drop_path_rises_linearly(images: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Cell) and module.training:
            seen.append(arguments[2])

    handle = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        train(tmp_path, images, epochs=4, batch_size=16, drop_path=0.2)
    finally:
        handle.remove()
    # Four epochs of two batches through three cells.
    assert seen == pytest.approx([0.2 * epoch / 4 for epoch in range(4) for _ in range(2 * 3)])


def test_mixed_precision_is_near_full_precision(large: Path, images: Path, tmp_path: Path) -> None:
    mixed = train(tmp_path / "mixed", images, **LARGE, amp=True, amp_dtype="bfloat16")
    found, expected = ([row["train_loss"] for row in rows(run)] for run in (mixed, large))
    # A bfloat16 has three digits, and differences grow.
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert found == pytest.approx(expected, rel=0.06)
    # It was used, and the weights themselves stay single precision.
    assert found[0] != pytest.approx(expected[0], rel=1e-6)
    assert all(each.dtype is torch.float32 for each in weights(mixed).values() if each.is_floating_point())


@pytest.mark.parametrize("change", [{"channels_last": True}, {"grad_checkpointing": True}], ids=str)
def test_the_way_of_computing_changes_nothing(
    change: dict[str, Any], large: Path, images: Path, tmp_path: Path
) -> None:
    check_same_training(train(tmp_path, images, **LARGE, **change), large)


def test_starting_from_a_checkpoint(images: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", images, model_kwargs=LARGE["model_kwargs"])
    # A rate at which nothing moves.
    start = {"initial_checkpoint": str(first / "last.pth.tar"), "lr": 1e-30}
    second = train(tmp_path / "second", images, model_kwargs=LARGE["model_kwargs"], **start)
    assert rows(second)[0]["eval_loss"] == pytest.approx(rows(first)[-1]["eval_loss"], rel=1e-6)


def test_a_model_of_timm(images: Path, tmp_path: Path) -> None:
    changes = {"model": "test_resnet", "model_kwargs": {}, "experiment": "", "epochs": 1, "sched": "cosine"}
    status, _ = launch(*configured(tmp_path, images, **changes))
    assert status == 0
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert re.fullmatch(r"\d{8}-\d{6}-test_resnet-32", run.name)
    timm.create_model("test_resnet", num_classes=4, checkpoint_path=run / "last.pth.tar")


@pytest.mark.slow
def test_compiled(images: Path, tmp_path: Path) -> None:
    small = {**LARGE, "model_kwargs": {**LARGE["model_kwargs"], "num_cells": 2}, "epochs": 2, "model_ema": True}
    plain = train(tmp_path / "plain", images, **small)
    compiled = train(tmp_path / "compiled", images, **small, torchcompile=True)
    # The names are those of the network, without what compiling puts before them.
    for key in ("state_dict", "state_dict_ema"):
        assert distance(weights(compiled, key=key), weights(plain, key=key)) < 1e-4
    assert [row["eval_loss"] for row in rows(compiled)] == pytest.approx(
        [row["eval_loss"] for row in rows(plain)], rel=1e-3
    )


# ------------------------------------------------------------------------------------------------------- what fails


def message_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the command ends with when it refuses something."""
    status, _ = launch(*arguments)
    output = capsys.readouterr()
    assert status == 1
    assert output.out == "" and "Traceback" not in output.err
    last = output.err.splitlines()[-1]
    assert last.startswith("timm_models.train: ")
    return last.removeprefix("timm_models.train: ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data_dir": "/nowhere"}, ["/nowhere", "--data-dir"]),
        ({"data_dir": ""}, ["--data-dir"]),
        ({"train_split": "first"}, ["first", "train, val"]),
        ({"val_split": "test"}, ["test", "train, val"]),
        ({"num_classes": 5}, ["num_classes is 5", "4 folders"]),
        ({"model": "nope"}, ["nope"]),
        ({"model": "test_resnet", "model_kwargs": {}, "auxiliary_weight": 0.4}, ["auxiliary_weight", "test_resnet"]),
        ({"model_kwargs": {**NETWORK, "auxiliary": True}}, ["auxiliary_weight"]),
        ({"model": "test_resnet", "model_kwargs": {}, "drop_path": 0.1}, ["drop_path", "test_resnet"]),
        ({"model_kwargs": {"genotype": "nope"}}, ["nope", "genas_flatness_c100"]),
        ({"model_kwargs": {**NETWORK, "colour": 1}}, ["colour"]),
        ({"model_kwargs": {**NETWORK, "norm_layer": "nope"}}, ["nope"]),
        ({"initial_checkpoint": "/nowhere.pth"}, ["/nowhere.pth"]),
        ({"batch_size": 34}, ["33 images", "34"]),
        ({"global_batch_size": 12}, ["global_batch_size 12", "batch_size 8"]),
        ({"opt": "nope"}, ["nope"]),
        ({"opt_kwargs": {"colour": 1}}, ["colour"]),
        ({"sched": "nope"}, ["nope"]),
        # It would wait for a figure that is never told.
        ({"sched": "plateau"}, ["plateau"]),
        ({"tail_epochs": 2}, ["tail", "2"]),
        ({"dataset": "nope"}, ["nope"]),
        ({"dataset": "torch/nope"}, ["nope"]),
        ({"class_map": "/nowhere.txt"}, ["/nowhere.txt"]),
        ({"aa": "nope", "no_aug": False}, ["nope"]),
        ({"device": "toaster"}, ["toaster"]),
    ],
    ids=str,
)
def test_refused_in_one_line(
    changes: dict[str, Any], expected: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message_of(capsys, *configured(tmp_path, images, **changes))
    assert all(part in message for part in expected), message
    # Before anything is written.
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(capsys, *configured(tmp_path, images, device="cuda"))
    assert "cuda" in message and "--device cpu" in message


@pytest.mark.parametrize("content", [b"", b"text\n", b"no weights", b"PK\x03\x04"], ids=repr)
def test_a_damaged_checkpoint_to_start_from(
    content: bytes, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    message = message_of(capsys, *configured(tmp_path, images, initial_checkpoint=str(tmp_path / "weights.pth")))
    assert "weights.pth" in message


def test_folders_that_do_not_fit(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    shutil.rmtree(folder / "val" / "grey")
    message = message_of(capsys, *configured(tmp_path, folder))
    assert "grey" in message and "(4)" in message and "(3)" in message
    shutil.rmtree(folder / "val")
    message = message_of(capsys, *configured(tmp_path, folder))
    assert "validation" in message and "it has: train" in message
    (folder / "val").mkdir()
    assert "images/val" in message_of(capsys, *configured(tmp_path, folder))
    shutil.rmtree(folder / "val")
    (folder / "train").rename(folder / "val")
    message = message_of(capsys, *configured(tmp_path, folder))
    assert "train" in message and "it has: val" in message


def test_a_dataset_without_an_order_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In place of what reads with webdataset, which is not needed here.
    reader = ModuleType("timm.data.readers.reader_wds")
    reader.ReaderWds = lambda **arguments: iter(())
    monkeypatch.setitem(sys.modules, reader.__name__, reader)
    message = message_of(capsys, *configured(tmp_path, images, dataset="wds/stream", num_classes=4))
    assert "wds/stream" in message


# With a warm-up of one epoch the first is tame.
WILD = {"sched": "cosine", "lr": 1e12, "warmup_lr": 1e-3, "warmup_epochs": 1, "epochs": 3}


def test_a_loss_that_is_no_number_ends_the_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message_of(capsys, *configured(tmp_path, images, **WILD))
    assert "training loss is" in message and "epoch 2" in message and "learning rate" in message
    run = tmp_path / "run"
    assert [row["epoch"] for row in rows(run)] == [0]
    assert torch.load(run / "last.pth.tar", weights_only=True)["epoch"] == 0
    assert all(each.isfinite().all() for each in weights(run).values())


def test_weights_that_are_no_numbers_are_not_kept(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One step an epoch: its loss is that of the weights before it.
    message_of(capsys, *configured(tmp_path, images, **{**WILD, "lr": 1e38, "batch_size": 32}))
    assert all(math.isfinite(row["eval_loss"]) for row in rows(tmp_path / "run"))
    assert all(each.isfinite().all() for each in weights(tmp_path / "run").values())


def test_interrupted_and_continued(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, count = torch.optim.SGD.step, 0
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def watched(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            # As the terminal's Ctrl-C.
            signal.raise_signal(signal.SIGINT)
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    try:
        status, _ = launch(*configured(tmp_path, images))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert launch("--resume", str(tmp_path / "run"))[0] == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]


# ---------------------------------------------------------------------------------------------------------- lighting

# The principal components of ImageNet's pixels and their deviations, as published with AlexNet's successors.
DEVIATIONS = (0.2175, 0.0188, 0.0045)
COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@pytest.fixture
def numpy_seed() -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(5)
    yield
    np.random.set_state(state)


def test_lighting_adds_one_colour(numpy_seed: None) -> None:
    image = Image.new("RGB", (3, 2), (100, 128, 150))
    for _ in range(5):
        state = np.random.get_state()
        found = np.asarray(Lighting(0.1)(image))
        np.random.set_state(state)
        factors = np.random.normal(0.0, 0.1, 3)
        added = [255 * sum(c * d * f for c, d, f in zip(row, DEVIATIONS, factors, strict=True)) for row in COMPONENTS]
        expected = [math.floor(value + more) for value, more in zip((100, 128, 150), added, strict=True)]
        assert found.shape == (2, 3, 3) and (found == expected).all()
        assert max(abs(more) for more in added) > 0.5


def test_lighting_has_the_covariance_of_the_components(numpy_seed: None) -> None:
    grey, lighting = Image.new("RGB", (1, 1), (128, 128, 128)), Lighting(0.3)
    shifts = np.array([np.asarray(lighting(grey))[0, 0].astype(float) - 127.5 for _ in range(4000)])
    components = np.array(COMPONENTS)
    expected = (255 * 0.3) ** 2 * components @ np.diag(np.square(DEVIATIONS)) @ components.T
    assert np.cov(shifts.T) == pytest.approx(expected, rel=0.06)
    assert shifts.mean(0) == pytest.approx([0, 0, 0], abs=0.6)


def test_lighting_keeps_to_the_range_and_to_colours(numpy_seed: None) -> None:
    white = np.stack([np.asarray(Lighting(2.0)(Image.new("RGB", (1, 1), (255,) * 3))) for _ in range(50)])
    assert white.max() == 255 and white.min() < 200
    # Without wrapping round: a channel that grows stays at 255.
    assert (white == 255).mean() > 0.3
    assert np.asarray(Lighting(0.0)(Image.new("L", (4, 4), 77))).tolist() == [[[77] * 3] * 4] * 4
