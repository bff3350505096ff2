"""How a training ends and goes on: by a signal, by a full disk, by a kill, and on other images than it began with."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genas_plugins.interrupts import exit_status, interruptible, pending_signal, raise_pending
from timm_models.runs import find_checkpoint
from timm_models.settings import SettingsError
from timm_models.train import main

# Few tensors, since a checkpoint of many takes longer to read than an epoch.
NETWORK: dict[str, Any] = {"genotype": "darts_v2_c10", "init_channels": 4, "num_cells": 2}


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def write_images(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("a", "b", "c")):
            for number in range(count):
                picture(root / split / name / f"{number}.png", 10 * label + number)
    return root


def command(root: Path, output: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        **{"data_dir": str(root), "model": "genas_cell", "model_kwargs": NETWORK, "img_size": 32, "device": "cpu"},
        **{"workers": 0, "tensorboard": False, "output": str(output), "experiment": "run", "model_ema": True},
        **{"batch_size": 4, "epochs": 2, "sched": "cosine", "warmup_epochs": 0, "lr": 0.01},
        **changes,
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a run of them; to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    write_images(folder / "set")
    assert main(command(folder / "set", folder / "out")) == 0
    return folder


@pytest.fixture
def place(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "copy")


def resume(place: Path) -> int:
    return main(["--resume", str(place / "out" / "run"), "--data-dir", str(place / "set")])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Other images


def add_class(root: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(root / split / "c", root / split / "d")


def remove_class(root: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "b")


def rename_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / "bb")


def swap_labels(root: Path) -> None:
    first, second = (root / "train" / name / "0.png" for name in "ab")
    first.rename(root / "spare.png")
    second.rename(first)
    (root / "spare.png").rename(second)


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "class-added": (add_class, ["4 classes instead of 3", "1 new (d)"]),
    "class-removed": (remove_class, ["2 classes instead of 3", "1 gone (b)"]),
    "class-renamed": (rename_class, ["1 new (bb)", "1 gone (b)"]),
    "image-removed": (lambda root: (root / "train" / "b" / "3.png").unlink(), ["train: 'b' has 3 images instead of 4"]),
    "validation-image-added": (lambda root: picture(root / "val" / "c" / "9.png", 9), ["validation: 'c' has 3"]),
    "image-replaced": (lambda root: picture(root / "train" / "a" / "2.png", 99), ["train: the images of 'a' differ"]),
    "labels-swapped": (swap_labels, ["'a'", "'b'"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_refused_and_the_run_stays_as_it_was(
    change: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place / "out")
    apply, expected = CHANGES[change]
    apply(place / "set")
    assert resume(place) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is not what the run in" in message and all(part in message for part in expected), message
    assert contents(place / "out") == before


def test_the_same_images_elsewhere_are_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "set").rename(place / "moved")
    (place / "set").symlink_to(place / "moved")
    for path in (place / "moved").rglob("*.png"):
        os.utime(path, (0, 0))
    assert resume(place) == 0


def test_a_run_of_an_earlier_version_goes_on_and_knows_its_images_then(place: Path) -> None:
    (place / "out" / "run" / "data.json").unlink()
    assert resume(place) == 0
    assert (place / "out" / "run" / "data.json").is_file()


def test_without_an_identity_the_classifier_is_kept_all_the_same(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "out" / "run" / "data.json").unlink()
    add_class(place / "set")
    before = contents(place / "out")
    assert resume(place) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "does not fit the network of this run" in message and "classifier.weight is (3," in message
    assert contents(place / "out") == before


def test_a_damaged_identity_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out" / "run" / "data.json").write_text('{"train"')
    before = contents(place / "out")
    assert resume(place) == 1
    assert "data.json is damaged" in capsys.readouterr().err
    assert contents(place / "out") == before


@pytest.mark.parametrize("missing", ["optimizer", "state_dict_ema", "state_dict"])
def test_half_a_checkpoint_is_refused(missing: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "out" / "run" / "last.pth.tar"
    saved = torch.load(path, weights_only=True)
    del saved[missing]
    path.unlink()
    torch.save(saved, path)
    before = contents(place / "out")
    assert resume(place) == 1
    assert f"it lacks {missing}" in capsys.readouterr().err
    assert contents(place / "out") == before


# Kills


@pytest.fixture
def fresh(place: Path) -> Path:
    """A run that was killed in its first epoch."""
    run = place / "out" / "run"
    for path in run.iterdir():
        if path.name not in ("args.yaml", "data.json"):
            path.unlink()
    return place


@pytest.mark.parametrize("kept", [0, 100, 0.5, -30])
def test_torn_at_the_first_checkpoint_it_begins_anew(kept: float, begun: Path, fresh: Path) -> None:
    data = (begun / "out" / "run" / "last.pth.tar").read_bytes()
    length = int(kept * len(data)) if 0 < kept < 1 else int(kept) if kept >= 0 else len(data) + int(kept)
    (fresh / "out" / "run" / "tmp.pth.tar").write_bytes(data[:length])
    (fresh / "out" / "run" / "summary.csv").write_text("epoch,train_loss\n0,1")
    assert find_checkpoint(fresh / "out" / "run") is None
    assert resume(fresh) == 0
    found, expected = (torch.load(each / "out" / "run" / "last.pth.tar", weights_only=True) for each in (fresh, begun))
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert not (fresh / "out" / "run" / "tmp.pth.tar").exists()


def test_without_the_latest_the_earlier_ones_are_named(fresh: Path, begun: Path) -> None:
    run = fresh / "out" / "run"
    (run / "tmp.pth.tar").write_bytes(b"torn")
    shutil.copy(begun / "out" / "run" / "checkpoint-0.pth.tar", run)
    with pytest.raises(SettingsError, match=r"name an earlier one: checkpoint-0\.pth\.tar"):
        find_checkpoint(run)
    (run / "checkpoint-0.pth.tar").unlink()
    (run / "last.pth.tar").write_bytes(b"damaged")
    with pytest.raises(SettingsError, match="no other is left, so start another run"):
        find_checkpoint(run)


def test_what_a_killed_process_left_is_removed(place: Path) -> None:
    (place / "out" / "run" / "tmp.pth.tar").write_bytes(b"torn")
    assert resume(place) == 0
    assert not (place / "out" / "run" / "tmp.pth.tar").exists()


@pytest.mark.parametrize("tail", ["1,2.0", "1", "\x00" * 40, "\n\n", "1,1,1,1,1,1,1,1,1,1\n1,1,1,1,1,1,1,1,1,1\n"])
def test_a_summary_that_ends_in_rubbish_is_repaired(tail: str, place: Path, begun: Path) -> None:
    path = place / "out" / "run" / "summary.csv"
    whole = path.read_text()
    path.write_text(whole + tail)
    assert resume(place) == 0
    assert path.read_text().splitlines() == whole.splitlines()


# Signals and a full disk, in processes of their own

PROCESS = """
import multiprocessing, os, resource, signal
multiprocessing.set_start_method("fork", force=True)
target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(target, 1)
os.dup2(target, 2)
signal.signal(signal.SIGINT, signal.default_int_handler)
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
original = torch.optim.SGD.step
calls = []
def step(*args, **kwargs):
    calls.append(args)
    # The third of each three steps is the last of its epoch.
    if len(calls) == 4 and number:
        if swallow:
            class Finalizer:
                def __del__(self):
                    signal.raise_signal(number)
            Finalizer()
        else:
            os.kill(os.getpid(), number)
    return original(*args, **kwargs)
torch.optim.SGD.step = step
from timm_models.train import main
raise SystemExit(main(arguments))
"""


def elsewhere(folder: Path, arguments: list[str], **given: Any) -> tuple[int | None, str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm_models.train"])
    values = {"number": 0, "swallow": False, "largest": 0, **given}
    values |= {"arguments": arguments, "log": str(folder / "log.txt")}
    process = context.Process(target=exec, args=(PROCESS, values))
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode, (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("workers", "number", "swallow"),
    [
        *((0, number, swallow) for number in (signal.SIGTERM, signal.SIGINT) for swallow in (False, True)),
        # SIGTERM ends a worker too.
        *((1, signal.SIGTERM, swallow) for swallow in (False, True)),
        (1, signal.SIGINT, False),
    ],
)
def test_a_signal_ends_it_with_the_command_that_goes_on(
    workers: int, number: int, swallow: bool, begun: Path, tmp_path: Path
) -> None:
    status = 128 + number
    arguments = command(begun / "set", tmp_path / "my out", workers=workers)
    code, log = elsewhere(tmp_path, arguments, number=number, swallow=swallow)
    assert code == status, log
    line = log.splitlines()[-1]
    before, _, rest = line.partition("python -m timm_models.train ")
    assert before == "Interrupted. Continue with: "
    run = tmp_path / "my out" / "run"
    assert torch.load(run / "last.pth.tar", weights_only=True)["epoch"] == 0
    assert main(shlex.split(rest)) == 0
    found, expected = (torch.load(each / "last.pth.tar", weights_only=True) for each in (run, begun / "out" / "run"))
    assert found["epoch"] == 1
    # Workers draw other augmentations.
    if not workers:
        assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())


def test_a_signal_before_the_run_begins_says_so(begun: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(folder: Any, scan: Any = os.scandir) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return scan(folder)

    # While images are looked for.
    monkeypatch.setattr(os, "scandir", interrupted)
    assert main(command(begun / "set", tmp_path / "out")) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted before the run began: start it again."
    assert not (tmp_path / "out").exists()


def test_handlers_are_put_back_and_what_is_ignored_stays_ignored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGTERM)
            raise_pending()
    finally:
        signal.signal(signal.SIGTERM, ignored)
    assert pending_signal() is None
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert exit_status() == 143
    # Nothing is left of it for what comes next.
    assert pending_signal() is None
    raise_pending()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with interruptible():
        raise_pending()


def test_a_process_that_is_forked_meanwhile_ends_by_sigterm() -> None:
    with interruptible():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(3)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_full_disk_is_called_that_and_the_run_goes_on(begun: Path, tmp_path: Path) -> None:
    size = (begun / "out" / "run" / "last.pth.tar").stat().st_size
    arguments = command(begun / "set", tmp_path / "out")
    code, log = elsewhere(tmp_path, arguments, largest=size // 2)
    line = log.splitlines()[-1]
    # To a process with a limit the system says this, and "No space left on device" where there is none.
    assert code == 1 and "File too large" in line, log
    assert f"make room, then continue with: python -m timm_models.train --resume {tmp_path / 'out' / 'run'}" in line
    assert "inline_container" not in line and "iostream" not in line
    run = tmp_path / "out" / "run"
    assert not list(run.glob("*.tar"))
    assert main(["--resume", str(run)]) == 0
    assert torch.load(run / "last.pth.tar", weights_only=True)["epoch"] == 1
