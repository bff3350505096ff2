"""A segmentor's training that is resumed knows the images that it began with."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from genas_plugins.files import packaged_configs
from mmseg_backbones._data import training_images
from mmseg_backbones._tools import find_lost_checkpoint, run_tool
from mmseg_backbones.synthetic import write_scenes

QUICKSTART = packaged_configs("mmseg", ".py")["deeplabv3_genas-flatness-c100-d8_1xb8-600_quickstart_synthetic"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "synthetic", training=4, validation=1, size=32)


@pytest.fixture
def launch(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the launcher up to the host's script, which says that it ran and leaves a checkpoint's name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, tmp_path / "data" / "synthetic")
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    ran: list[str] = []

    def script(path: str, **keywords: Any) -> None:
        ran.append(path)
        Path("work", "last_checkpoint").write_text("work/iter_2.pth")

    monkeypatch.setattr(runpy, "run_path", script)

    def command(*arguments: str, config: str | Path = QUICKSTART) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--work-dir", "work", *arguments])
        ran.clear()
        try:
            run_tool("train.py", trains=True)
        except SystemExit as refused:
            assert not ran
            return str(refused.code)
        return "ran" if ran else ""

    return command


def contents() -> dict[str, bytes]:
    """What is in the folder of the run, but for the lock."""
    return {path.name: path.read_bytes() for path in Path("work").iterdir() if not path.name.startswith(".lock")}


def remove_scene(root: Path) -> None:
    for kind in ("images", "masks"):
        (root / kind / "train" / "0001.png").unlink()


def swap_masks(root: Path) -> None:
    first, second = (root / "masks" / "train" / f"000{number}.png" for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "scene-removed": (remove_scene, "train: 3 images instead of 4, 3 masks instead of 4"),
    "scene-renamed": (
        lambda root: (root / "images" / "train" / "0003.png").rename(root / "images" / "train" / "0009.png"),
        "the images differ in their names",
    ),
    "image-replaced": (
        lambda root: shutil.copy(root / "images" / "val" / "0000.png", root / "images" / "train" / "0000.png"),
        "the images differ in their",
    ),
    "masks-swapped": (swap_masks, "the masks differ in their"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_scenes_are_refused_and_the_run_stays_as_it_was(change: str, launch: Callable[..., str]) -> None:
    assert launch() == "ran"
    before = contents()
    assert set(before) == {"data.json", "last_checkpoint"}
    apply, told = CHANGES[change]
    apply(Path("data/synthetic"))
    message = launch("--resume")
    assert message.startswith("train.py: The data is not what the run in work began with (") and told in message
    assert message.endswith("restore it, or start another run.")
    assert contents() == before
    # Another run, as it says; after that this is what it is resumed on.
    assert launch() == "ran"
    assert launch("--resume") == "ran"


def test_other_classes_are_refused(launch: Callable[..., str]) -> None:
    classes = "train_dataloader.dataset.metainfo.classes=sky,lawn,road,house,{}"
    assert launch() == "ran"
    before = contents()
    assert "1 new (sun) and 1 gone (moon)" in launch("--resume", "--cfg-options", classes.format("sun"))
    assert contents() == before
    assert launch("--resume", "--cfg-options", classes.format("moon")) == "ran"


def test_the_same_scenes_elsewhere_go_on(launch: Callable[..., str]) -> None:
    assert launch() == "ran"
    Path("data/synthetic").rename("moved")
    # Other pictures to validate on, which change no weight.
    shutil.rmtree("moved/images/val")
    assert launch("--resume", "--cfg-options", "train_dataloader.dataset.data_root=moved") == "ran"


def test_a_run_of_an_earlier_version_goes_on_and_knows_its_scenes_then(launch: Callable[..., str]) -> None:
    assert launch() == "ran"
    Path("work/data.json").unlink()
    assert launch("--resume") == "ran"
    remove_scene(Path("data/synthetic"))
    assert "3 images instead of 4" in launch("--resume")


def test_without_a_checkpoint_there_is_nothing_to_compare(launch: Callable[..., str]) -> None:
    assert launch() == "ran"
    Path("work/last_checkpoint").unlink()
    remove_scene(Path("data/synthetic"))
    assert launch("--resume") == "ran"


def test_a_damaged_identity_is_named(launch: Callable[..., str]) -> None:
    assert launch() == "ran"
    Path("work/data.json").write_text('{"train"')
    assert "data.json is damaged" in launch("--resume")


def test_other_processes_write_nothing(launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("work").mkdir()
    monkeypatch.setenv("RANK", "1")
    assert launch() == "ran"
    assert set(contents()) == {"last_checkpoint"}


def test_unknown_data_sets_are_not_in_the_way(launch: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"""
_base_ = [{str(QUICKSTART)!r}]
train_dataloader = dict(dataset=dict(_delete_=True, type="OnesOwn", folder="nowhere"))
""")
    assert launch(config="own.py") == "ran"
    assert launch("--resume", config="own.py") == "ran"
    assert set(contents()) == {"last_checkpoint"}
    # The folder that is missing is the script's to tell.
    assert launch("--cfg-options", "train_dataloader.dataset.data_root=missing") == "ran"


def test_data_sets_within_others(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(QUICKSTART)
    one = {**cfg.train_dataloader.dataset, "data_root": str(scenes)}
    few = {**one, "indices": 2}
    wrapped = {
        "type": "RepeatDataset",
        "times": 3,
        "dataset": {"type": "ConcatDataset", "datasets": [one, few]},
    }
    counts = {
        name: training_images({"train_dataloader": {"dataset": dataset}})["train"]["images"][1][0]
        for name, dataset in {"one": one, "few": few, "wrapped": wrapped}.items()
    }
    assert counts == {"one": 4, "few": 2, "wrapped": 6}
    assert training_images({}) is None


def test_a_checkpoint_that_was_not_named_is_found(tmp_path: Path) -> None:
    """mmengine empties the file with the name before it writes it."""
    told = tmp_path / "last_checkpoint"
    find_lost_checkpoint(tmp_path)
    assert not told.exists()
    told.touch()
    find_lost_checkpoint(tmp_path)
    assert not told.exists()
    for number, time in ((20, 100), (40, 300), (9, 200)):
        (tmp_path / f"iter_{number}.pth").touch()
        os.utime(tmp_path / f"iter_{number}.pth", (time, time))
    told.touch()
    find_lost_checkpoint(tmp_path)
    assert told.read_text() == str(tmp_path / "iter_40.pth")
    told.write_text("elsewhere.pth")
    find_lost_checkpoint(tmp_path)
    assert told.read_text() == "elsewhere.pth"
