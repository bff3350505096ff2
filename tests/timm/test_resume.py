"""A run that is killed, at any moment, and continued gives what an uninterrupted one gives, to the last bit."""

from __future__ import annotations

import csv
import logging
import multiprocessing
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from timm_models.runs import find_checkpoint
from timm_models.settings import SettingsError
from timm_models.train import main

EPOCHS = 3
NETWORK = "darts_v2_c10"
# 20 images make five batches and three steps, the last of one pass only.
STEPS = 3

# What the other process runs: the command, until the given call of a function of a host, and then it is killed
# as by the system, without a chance to tidy up.
PROCESS = """
import importlib, multiprocessing, os, signal
from pathlib import Path

# As in a process that a user starts, for the loader's workers.
multiprocessing.set_start_method("fork", force=True)
target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(target, 1)
os.dup2(target, 2)

os.environ.update(environment)
calls = []

def watched(*args, **kwargs):
    if str(args[-1]).endswith(death.get("argument", "")):
        calls.append(args)
    last = len(calls) == death["call"]
    if last and death["when"] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if last:
        if death["when"] == "halfway":
            content = Path(args[-1]).read_bytes()
            Path(args[-1]).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return result

if death:
    module, _, path = death["function"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original = getattr(owner, name)
    setattr(owner, name, watched)
from timm_models.train import main
raise SystemExit(main(arguments))
"""

SAVE = "timm.utils:CheckpointSaver.save_checkpoint"
AFTER_CHECKPOINT = {"function": SAVE, "call": 2, "when": "after"}
BEFORE_CHECKPOINT = {"function": SAVE, "call": 2, "when": "before"}
MIDDLE = {"function": "torch.optim:SGD.step", "call": STEPS + 2, "when": "after"}
# timm removes last.pth.tar and then renames tmp.pth.tar to it.
BETWEEN = {"function": "os:replace", "argument": "last.pth.tar", "call": 2, "when": "before"}
NO_OTHER_NAME = {"function": "os:link", "argument": "checkpoint-1.pth.tar", "call": 1, "when": "before"}
NOT_BEST = {"function": "os:link", "argument": "model_best.pth.tar", "call": 1, "when": "before"}
WHILE_WRITING = {"function": "torch:save", "argument": "tmp.pth.tar", "call": 2, "when": "halfway"}
FIRST_EPOCH = {"function": "torch.optim:SGD.step", "call": 2, "when": "after"}
FIRST_FIGURES = {"function": SAVE, "call": 1, "when": "before"}


def launch(*arguments: str) -> int:
    """Run the command here, and leave logging as it was: the command adds a handler for the standard error of now."""
    loggers = logging.getLogger(), logging.getLogger("timm.utils.checkpoint_saver")
    handlers, levels = list(loggers[0].handlers), [logger.level for logger in loggers]
    loggers[0].handlers[:] = []
    try:
        return main(arguments)
    finally:
        loggers[0].handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in "abcd":
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def command(images: Path, run: Path, *more: str) -> list[str]:
    """A training in which all is random or has a memory: augmentation, drop path, averaged weights, accumulation."""
    # Few tensors, since a checkpoint of many takes longer to read than an epoch.
    network = [f"genotype={NETWORK}", "init_channels=4", "num_cells=2"]
    return [
        *("--data-dir", str(images), "--output", str(run.parent), "--experiment", run.name),
        *("--model", "genas_cell", "--model-kwargs", *network, "--img-size", "32", "--device", "cpu"),
        *("--batch-size", "4", "--grad-accum-steps", "2", "--epochs", str(EPOCHS), "--lr", "0.05"),
        *("--tail-epochs", "1", "--warmup-epochs", "1", "--auxiliary-weight", "0.4", "--drop-path", "0.2"),
        *("--lighting", "0.1", "--color-jitter", "0.4", "--reprob", "0.5", "--drop", "0.1"),
        *("--model-ema", "--model-ema-decay", "0.7", "--seed", "3", "--workers", "0", "--no-tensorboard"),
        *more,
    ]


def elsewhere(tmp_path: Path, arguments: list[str], death: dict[str, Any] | None, count: int = 1) -> set[int]:
    """Run the command in so many other processes, which may be killed; their exit statuses."""
    # The server has imported everything once; each process is a copy of it that has computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm_models.train"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(count)}
    members = []
    for rank in map(str, range(count)):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
        given = {"environment": environment, "death": death, "arguments": arguments, "log": tmp_path / f"log{rank}.txt"}
        members.append(context.Process(target=exec, args=(PROCESS, given)))
    for member in members:
        member.start()
    for member in members:
        member.join(120)
        if member.exitcode is None:
            member.kill()
            member.join()
    return {member.exitcode for member in members}


def kill(tmp_path: Path, arguments: list[str], death: dict[str, Any]) -> None:
    """Run the command in another process until it is killed."""
    assert elsewhere(tmp_path, arguments, death) == {-signal.SIGKILL}, (tmp_path / "log0.txt").read_text()


def figures(run: Path) -> list[dict[str, str]]:
    """The lines of summary.csv, as text, without the only figure that is a matter of the machine."""
    with (run / "summary.csv").open(newline="") as file:
        return [{name: x for name, x in row.items() if "per_second" not in str(name)} for row in csv.DictReader(file)]


def content(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True)


def check_equal(run: Path, other: Path, epochs: int = EPOCHS) -> None:
    assert [row["epoch"] for row in figures(run)] == [str(epoch) for epoch in range(epochs)]
    assert figures(run) == figures(other)
    found, expected = content(run / "last.pth.tar"), content(other / "last.pth.tar")
    assert found["epoch"] == expected["epoch"] == epochs - 1
    for name in ("state_dict", "state_dict_ema"):
        assert list(found[name]) == list(expected[name])
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in found[name].items())
    buffers = found["optimizer"]["state"]
    assert len(buffers) > 30
    for key, state in buffers.items():
        assert torch.equal(state["momentum_buffer"], expected["optimizer"]["state"][key]["momentum_buffer"])


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert launch(*command(images, run)) == 0
    return run


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which two epochs are done; to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    kill(folder, command(images, folder / "run"), AFTER_CHECKPOINT)
    return folder / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A run of which two epochs are done, in another folder than it was begun in."""
    return shutil.copytree(begun, tmp_path / "moved")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said of an error; no traceback."""
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return output.err.splitlines()[-1]


def test_the_run_has_something_to_lose(whole: Path) -> None:
    # Otherwise equal figures would say little.
    first, last = content(whole / "checkpoint-0.pth.tar"), content(whole / "last.pth.tar")
    assert len({row["train_loss"] for row in figures(whole)}) == EPOCHS
    weight = "classifier.weight"
    assert not torch.equal(first["state_dict"][weight], last["state_dict"][weight])
    assert not torch.equal(last["state_dict_ema"][weight], last["state_dict"][weight])


def test_the_same_command_gives_the_same_run(images: Path, whole: Path, tmp_path: Path) -> None:
    assert launch(*command(images, tmp_path / "run")) == 0
    check_equal(tmp_path / "run", whole)
    assert launch(*command(images, tmp_path / "other", "--seed", "4")) == 0
    assert figures(tmp_path / "other")[0]["train_loss"] != figures(whole)[0]["train_loss"]


@pytest.mark.parametrize(
    ("death", "left"),
    [
        pytest.param(AFTER_CHECKPOINT, {"last"}, id="after-checkpoint"),
        pytest.param(BEFORE_CHECKPOINT, {"last"}, id="before-checkpoint"),
        pytest.param(MIDDLE, {"last"}, id="middle-of-epoch"),
        pytest.param(BETWEEN, {"tmp"}, id="between-unlink-and-rename"),
        pytest.param(WHILE_WRITING, {"last", "tmp"}, id="while-writing"),
        pytest.param(NO_OTHER_NAME, {"last"}, id="no-other-name"),
        pytest.param(NOT_BEST, {"last"}, id="not-best"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    death: dict[str, Any], left: set[str], images: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill(tmp_path, command(images, run), death)
    assert {name for name in ("last", "tmp") if (run / f"{name}.pth.tar").exists()} == left
    assert launch("--resume", str(run)) == 0
    check_equal(run, whole)
    # The best checkpoints are kept as in the uninterrupted run.
    assert sorted(path.name for path in run.glob("*.tar")) == sorted(path.name for path in whole.glob("*.tar"))
    assert content(run / "last.pth.tar")["saver"] == content(whole / "last.pth.tar")["saver"]
    for name in ("model_best", "checkpoint-1"):
        found, expected = content(run / f"{name}.pth.tar"), content(whole / f"{name}.pth.tar")
        assert found["epoch"] == expected["epoch"] and found["metric"] == expected["metric"]


def test_with_a_worker_process(images: Path, tmp_path: Path) -> None:
    options = ("--workers", "1", "--epochs", "2")
    assert launch(*command(images, tmp_path / "whole", *options)) == 0
    kill(tmp_path, command(images, tmp_path / "run", *options), MIDDLE)
    assert launch("--resume", str(tmp_path / "run")) == 0
    check_equal(tmp_path / "run", tmp_path / "whole", 2)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(images: Path, tmp_path: Path) -> None:
    whole, run = (command(images, tmp_path / name, "--batch-size", "2") for name in ("whole", "run"))
    assert elsewhere(tmp_path, whole, None, 2) == {0}
    assert elsewhere(tmp_path, run, MIDDLE, 2) == {-signal.SIGKILL}
    assert elsewhere(tmp_path, ["--resume", str(tmp_path / "run")], None, 2) == {0}
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_killed_again_and_again(images: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill(tmp_path, command(images, run), {**MIDDLE, "call": STEPS + 1})
    kill(tmp_path, ["--resume", str(run)], MIDDLE)
    kill(tmp_path, ["--resume", str(run)], {**BETWEEN, "call": 1})
    assert launch("--resume", str(run)) == 0
    check_equal(run, whole)


@pytest.mark.parametrize("death", [FIRST_EPOCH, FIRST_FIGURES], ids=["in-training", "figures-written"])
def test_killed_before_the_first_checkpoint(
    death: dict[str, Any], images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    kill(tmp_path, command(images, run), death)
    if launch("--resume", str(run)) != 0:
        # What it says is to be done can be done.
        assert "has no checkpoint yet: start it again" in last_line(capsys)
        assert launch(*command(images, run)) == 0
    check_equal(run, whole)


def test_tensorboard_has_each_epoch_once(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill(tmp_path, command(images, run, "--tensorboard"), BEFORE_CHECKPOINT)
    # TensorBoard orders files by the second in their names.
    time.sleep(1.1)
    assert launch("--resume", str(run)) == 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name, column in (("train/loss", "train_loss"), ("eval/top1", "eval_top1"), ("train/lr", "lr")):
        events = board.Scalars(name)
        assert [event.step for event in events] == list(range(EPOCHS))
        expected = [float(row[column]) for row in figures(run)]
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)


def test_run_and_images_may_move(run: Path, begun: Path, images: Path, whole: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in begun.iterdir()}
    shutil.copytree(images, tmp_path / "elsewhere")
    assert launch("--resume", str(run), "--data-dir", str(tmp_path / "elsewhere"), "--log-interval", "1") == 0
    check_equal(run, whole)
    assert {path.name: path.stat().st_mtime_ns for path in begun.iterdir()} == before


def test_an_earlier_checkpoint_can_be_named(run: Path, whole: Path) -> None:
    assert launch("--resume", str(run / "checkpoint-0.pth.tar")) == 0
    check_equal(run, whole)


def test_a_finished_run_says_so(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    assert launch("--resume", str(run)) == 0
    output = capsys.readouterr()
    assert f"All {EPOCHS} epochs are done." in output.err
    assert str(run) in output.out
    check_equal(run, whole)


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    # A new file: timm's copies of a checkpoint are hard links.
    path.unlink()
    damaged = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "tail": data[:-40],
        "text": b"no weights",
        "line": b"text\n",
    }
    path.write_bytes(damaged[kind])


@pytest.mark.parametrize("kind", ["empty", "half", "tail", "text", "line"])
def test_a_damaged_checkpoint_gives_way_to_one_that_is_whole(
    kind: str, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "last.pth.tar", run / "tmp.pth.tar")
    damage(run / "last.pth.tar", kind)
    assert find_checkpoint(run) == run / "tmp.pth.tar"
    if kind == "half":
        assert launch("--resume", str(run)) == 0
        assert "last.pth.tar is damaged" in capsys.readouterr().err
        check_equal(run, whole)


@pytest.mark.parametrize("kind", ["empty", "half", "tail", "text", "line"])
def test_damaged_checkpoints_only(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "summary.csv").read_bytes()
    damage(run / "last.pth.tar", kind)
    with pytest.raises(SettingsError, match="damaged"):
        find_checkpoint(run)
    assert launch("--resume", str(run)) == 1
    message = last_line(capsys)
    assert "damaged" in message and "last.pth.tar" in message
    # And by name.
    assert launch("--resume", str(run / "last.pth.tar")) == 1
    assert "last.pth.tar" in last_line(capsys)
    assert (run / "summary.csv").read_bytes() == before


def test_a_file_that_is_no_checkpoint_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content(run / "last.pth.tar")["state_dict"], run / "weights.pth")
    assert launch("--resume", str(run / "weights.pth")) == 1
    assert "weights.pth" in last_line(capsys)


def test_a_run_is_not_overwritten(images: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    assert launch(*command(images, run)) == 1
    message = last_line(capsys)
    assert f"--resume {run}" in message
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before


@pytest.mark.parametrize("name", ["nowhere", "nowhere/last.pth.tar", ".", "empty", "file.pth.tar"])
def test_nothing_to_resume(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pth.tar").touch()
    assert launch("--resume", str(tmp_path / name)) == 1
    # It names what was asked for.
    assert str(tmp_path / name) in last_line(capsys) or name == "file.pth.tar"


def test_resuming_takes_no_configuration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--resume", str(run), "--config", "genas_flatness_c100_imagenet") == 1
    assert "--config" in last_line(capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", "genas_flatness_c100"),
        ("num-classes", "7"),
        ("auxiliary-weight", "0"),
        ("sched", "cosine"),
        ("epochs", "9"),
        ("tail-epochs", "2"),
        ("opt", "sgd"),
        ("model-kwargs", "genotype=genas_flatness_c100"),
    ],
)
def test_what_makes_a_run_cannot_change(option: str, value: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "args.yaml").read_bytes(), (run / "last.pth.tar").read_bytes()
    assert launch("--resume", str(run), f"--{option}", value) == 1
    assert option.replace("-", "_") in last_line(capsys)
    assert ((run / "args.yaml").read_bytes(), (run / "last.pth.tar").read_bytes()) == before


def test_the_same_value_is_no_change(run: Path, whole: Path) -> None:
    assert launch("--resume", str(run), "--epochs", str(EPOCHS), "--opt", "momentum") == 0
    check_equal(run, whole)


@pytest.mark.parametrize(("name", "value"), [("lr", 0.02), ("weight_decay", 0.1), ("momentum", 0.5)])
def test_another_value_is_refused_or_taken_and_kept(name: str, value: float, run: Path) -> None:
    if launch("--resume", str(run), f"--{name.replace('_', '-')}", str(value)) == 0:
        group = content(run / "last.pth.tar")["optimizer"]["param_groups"][0]
        # One epoch, which is the tail, follows: the curve is at a half there.
        assert group[name] == pytest.approx(value / 2 if name == "lr" else value)
        assert yaml.safe_load((run / "args.yaml").read_text())[name] == value


def test_averaging_that_begins_later_is_refused_or_has_its_columns(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill(tmp_path, command(images, run, "--no-model-ema"), AFTER_CHECKPOINT)
    if launch("--resume", str(run), "--model-ema") == 0:
        assert all(None not in row and "eval_top1_ema" in row for row in figures(run))


def edit(run: Path, **changes: Any) -> None:
    """As a user who opens args.yaml in an editor."""
    settings = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, **changes}))


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


EDITS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"seed": 4}, ("seed 3, not 4",)),
    ({"lr": 0.02}, ("lr 0.05, not 0.02",)),
    ({"weight_decay": 0.1}, ("weight_decay 3e-05, not 0.1",)),
    ({"drop_path": 0.3}, ("drop_path 0.2, not 0.3",)),
    ({"model_kwargs": {"genotype": NETWORK, "init_channels": 8, "num_cells": 2}}, ("model_kwargs", "8")),
    ({"epochs": 9, "smoothing": 0.0}, ("epochs 3, not 9", "smoothing 0.1, not 0.0")),
    ({"scale": [0.5, 1.0]}, ("scale [0.08, 1.0], not [0.5, 1.0]",)),
    ({"mean": [0.5, 0.5, 0.5]}, ("mean None, not [0.5, 0.5, 0.5]",)),
    ({"opt_kwargs": {"nesterov": True}}, ("opt_kwargs", "nesterov")),
    ({"train_split": "val"}, ("train_split 'train', not 'val'",)),
    # Twice the images in a step, at the same learning rate.
    ({"batch_size": 8}, ("8 images", "batch_size 4", "16 now (batch_size 8")),
    ({"grad_accum_steps": 1}, ("8 images", "4 now", "grad_accum_steps 1")),
]


@pytest.mark.parametrize(("changes", "told"), EDITS, ids=["-".join(changes) for changes, _ in EDITS])
def test_settings_edited_before_a_resume_are_refused(
    changes: dict[str, Any], told: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, **changes)
    before = files(run)
    assert launch("--resume", str(run)) == 1
    message = last_line(capsys)
    assert all(part in message for part in told) and "or start another run" in message, message
    assert files(run) == before


def test_what_decides_no_result_may_be_edited(run: Path, images: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "elsewhere")
    where = {"data_dir": str(tmp_path / "elsewhere"), "output": "another", "experiment": "name", "log_interval": 1}
    edit(run, **where, checkpoint_hist=2)
    assert launch("--resume", str(run)) == 0
    check_equal(run, whole)


def test_a_step_of_as_many_images_goes_on(run: Path) -> None:
    edit(run, batch_size=8, grad_accum_steps=1)
    before = (run / "run.json").read_bytes()
    assert launch("--resume", str(run)) == 0
    # The run is still the one that it was.
    assert (run / "run.json").read_bytes() == before


def test_the_weights_to_start_from_need_not_be_kept(images: Path, begun: Path, tmp_path: Path) -> None:
    weights = shutil.copy(begun / "last.pth.tar", tmp_path / "weights.pth.tar")
    run = tmp_path / "run"
    kill(tmp_path, command(images, run, "--initial-checkpoint", str(weights)), AFTER_CHECKPOINT)
    Path(weights).unlink()
    edit(run, initial_checkpoint="")
    assert launch("--resume", str(run)) == 0


def test_a_run_of_an_earlier_version_is_taken_as_it_is(run: Path) -> None:
    (run / "run.json").unlink()
    edit(run, lr=0.02)
    assert launch("--resume", str(run)) == 0
    # From here on it is known.
    edit(run, lr=0.03)
    assert launch("--resume", str(run)) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"lr": -1}, "step": 8}', '{"settings": {"lr": 0.05}}'])
def test_damaged_settings_of_the_start_are_named(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "run.json").write_text(text)
    before = files(run)
    assert launch("--resume", str(run)) == 1
    message = last_line(capsys)
    assert "run.json" in message and "is damaged" in message and "remove it" in message
    assert files(run) == before
