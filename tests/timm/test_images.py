"""What the training reads of folders of images: as the search and the validation, or a sentence."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import CIFAR10, ImageFolder

from timm_models import validate
from timm_models.data import Checked, load_datasets
from timm_models.settings import Settings
from timm_models.train import main

NETWORK: dict[str, Any] = {"genotype": "genas_flatness_c10", "init_channels": 4, "num_cells": 2}


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def deep(path: Path) -> None:
    """A picture of 16 bits."""
    Image.fromarray(np.random.default_rng(0).integers(300, 65000, (32, 32)).astype(np.uint16)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("a", "b")):
            for number in range(count):
                picture(tmp_path / "set" / split / name / f"{number}.png", 10 * label + number)
    return tmp_path / "set"


def command(root: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        **{"data_dir": str(root), "model": "genas_cell", "model_kwargs": NETWORK, "img_size": 32, "device": "cpu"},
        **{"workers": 0, "tensorboard": False, "output": str(root.parent / "out"), "experiment": "run"},
        **{"batch_size": 4, "epochs": 1, "sched": "cosine", "warmup_epochs": 0, "lr": 0.01},
        **changes,
    }
    (root.parent / "settings.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(root.parent / "settings.yaml")]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(root: Path, **changes: Any) -> str:
        assert main(command(root, **changes)) == 1
        output = capsys.readouterr()
        assert "Traceback" not in output.err and not (root.parent / "out" / "run" / "last.pth.tar").exists()
        return output.err.splitlines()[-1]

    return run


def test_the_order_is_that_of_timm(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("class10", "class2", "Class1"):
            for number in (1, 2, 10):
                picture(tmp_path / split / name / f"{number}.png")
    train, _ = load_datasets(Settings(data_dir=str(tmp_path)))
    expected = create_dataset("", root=str(tmp_path), split="train").reader
    assert list(train.samples) == expected.samples
    assert train.class_to_idx == expected.class_to_idx


@pytest.mark.parametrize("split", ["val", "valid", "validation", "eval", "evaluation"])
def test_the_names_of_the_validation_folder_are_timms(split: str, root: Path) -> None:
    (root / "val").rename(root / split)
    assert len(load_datasets(Settings(data_dir=str(root)))[1]) == 4


def test_every_suffix_of_the_search_is_read(root: Path) -> None:
    suffixes = (".jpg", ".JPEG", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
    for suffix in suffixes:
        picture(root / "train" / "a" / f"more{suffix}")
    assert len(load_datasets(Settings(data_dir=str(root)))[0]) == 8 + len(suffixes)


def test_tiny_imagenets_own_layout_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    for name in ("n01", "n02", "n03", "n04"):
        picture(tmp_path / "set" / "train" / name / "images" / f"{name}_0.jpg")
    picture(tmp_path / "set" / "val" / "images" / "val_0.jpg")
    message = refused(tmp_path / "set")
    assert "n01 holds 1 images in folders inside class folders: images/n01_0.jpg" in message
    assert not (tmp_path / "out").exists()


def test_images_in_a_folder_inside_a_class_make_no_class(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(root / "train" / "a" / "extra" / "0.png")
    with caplog.at_level(logging.INFO):
        train, _ = load_datasets(Settings(data_dir=str(root)))
    assert set(train.class_to_idx) == {"a", "b"} and len(train) == 8
    assert "1 images in folders inside class folders: a/extra/0.png" in caplog.text
    assert "4 files, 4 used as images of 2 classes (.png 4), none left out" in caplog.text


def test_a_single_class_is_refused(root: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for path in (root / split / "b").iterdir():
            path.unlink()
        (root / split / "b").rmdir()
    assert "has 1 class folder (a), expected at least two" in refused(root)
    assert "num_classes must be at least 2" in refused(root, num_classes=1)
    arguments = ["--model", "genas_cell", "--checkpoint", "none.pt", "--workers", "0"]
    assert validate.main([str(root / "val"), *arguments]) == 1
    assert "has 1 class folder (a), expected at least two" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_sixteen_bits_are_refused(split: str, root: Path, refused: Callable[..., str]) -> None:
    deep(root / split / "b" / "deep.png")
    message = refused(root)
    assert "b/deep.png has more than 8 bits a channel" in message and not (root.parent / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_decoded_is_named_not_replaced(workers: int, root: Path, refused: Callable[..., str]) -> None:
    path = root / "train" / "a" / "1.png"
    data = path.read_bytes()
    # The header is whole: it is found when its turn comes.
    path.write_bytes(data[: len(data) // 2])
    message = refused(root, workers=workers)
    assert message.startswith("timm_models.train: Cannot read the image ") and "a/1.png" in message


def test_all_that_is_no_picture_is_counted_before_the_training(root: Path, refused: Callable[..., str]) -> None:
    for number in range(3):
        (root / "train" / "a" / f"{number}.png").write_bytes(b"")
    message = refused(root)
    assert "a/0.png" in message and "2 more of 8 (1.png, 2.png)" in message


def test_links_that_lead_nowhere_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "b" / "link.png").symlink_to(root / "nowhere.png")
    load_datasets(Settings(data_dir=str(root)))
    assert "1 links that lead nowhere: b/link.png" in caplog.text


def test_grey_pictures_are_read_as_colours_and_for_grey_networks_as_grey(root: Path) -> None:
    for split in ("train", "val"):
        for path in (root / split / "a").iterdir():
            picture(path, mode="L")
        picture(root / split / "b" / "alpha.png", mode="LA")
    assert main(command(root)) == 0
    grey = {"model_kwargs": {**NETWORK, "in_chans": 1}, "experiment": "grey"}
    assert main(command(root, **grey, auxiliary_weight=0.4)) == 0
    saved = torch.load(root.parent / "out" / "grey" / "last.pth.tar", weights_only=True)["state_dict"]
    assert saved["stem0.0.weight"].shape[1] == 1
    checkpoint = ["--checkpoint", str(root.parent / "out" / "grey" / "last.pth.tar"), "--workers", "0"]
    arguments = ["genotype=genas_flatness_c10", "init_channels=4", "num_cells=2", "in_chans=1"]
    options = ["--model", "genas_cell", *checkpoint, "--input-size", "32", "--model-kwargs", *arguments]
    assert validate.main([str(root / "val"), *options]) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_kwargs": {**NETWORK, "in_chans": 4}}, "4 input channels"),
        ({"model_kwargs": {**NETWORK, "in_chans": 1}, "lighting": 0.1}, "lighting"),
    ],
)
def test_channels_that_images_do_not_have(
    changes: dict[str, Any], expected: str, root: Path, refused: Callable[..., str]
) -> None:
    assert expected in refused(root, **changes)


@pytest.mark.parametrize("no_aug", [False, True])
def test_thin_pictures_take_little_memory(no_aug: bool, root: Path) -> None:
    """Enlarged before they are cropped, each would have 256 x 5,120,000 pixels and more, nearly 4 GB."""
    for split in ("train", "val"):
        Image.new("1", (1, 20_000)).save(root / split / "a" / "thin.png")
        Image.new("1", (20_000, 1)).save(root / split / "b" / "thin.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network = {"model": "test_resnet", "model_kwargs": {}}
    assert main(command(root, **network, img_size=224, no_aug=no_aug)) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


def test_the_largest_seed_trains(root: Path) -> None:
    assert main(command(root, seed=2**32 - 1, epochs=2)) == 0


# Class maps


def test_a_class_map_numbers_and_chooses(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        picture(root / split / "c" / "0.png")
    (root / "map.txt").write_text("b\nz\na\n", encoding="utf-8-sig")
    train, validation = load_datasets(Settings(data_dir=str(root), class_map="map.txt"))
    assert {(Path(path).parent.name, label) for path, label in train.samples} == {("b", 0), ("a", 2)}
    assert len(validation) == 4
    assert "1 images of classes that are not asked for: c/0.png" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("map.txt", b"a\nb\na\n", "twice"),
        ("map.txt", b"\xff\xfe\x00", "cannot be read"),
        ("map.pkl", b"no pickle", "cannot be read"),
        ("map.pkl", b"cos\nsystem\n(S'true'\ntR.", "cannot be read"),
        ("map.pkl", b"\x80\x02}(X\x01\x00\x00\x00aK\x00X\x01\x00\x00\x00bK\x09u.", "from 0 to 1"),
        ("map.csv", b"a,b", "cannot be read"),
    ],
)
def test_a_class_map_that_is_none(
    name: str, content: bytes, expected: str, root: Path, refused: Callable[..., str]
) -> None:
    (root / name).write_bytes(content)
    message = refused(root, class_map=name)
    assert name in message and expected in message


# Other sources of timm


def test_torchvisions_folders_are_read_strictly(root: Path, refused: Callable[..., str]) -> None:
    path = root / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    assert "Cannot read the image" in refused(root, dataset="torch/folder")
    deep(path)
    assert "more than 8 bits" in refused(root, dataset="torch/folder")


class Reader:
    """As timm's readers: open files by number."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.class_to_idx = {"a": 0, "b": 1}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.paths[index].open("rb"), index % 2


def test_timms_readers_are_read_strictly(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    deep(tmp_path / "2.png")
    Image.new("1", (1, 20_000)).save(tmp_path / "3.png")
    dataset = create_dataset("", root=str(tmp_path))
    dataset.reader = Reader([tmp_path / f"{number}.png" for number in range(4)])
    checked = Checked(dataset)
    image, target = checked[0]
    assert (image.mode, image.size, target) == ("RGB", (32, 32), 0)
    with pytest.raises(ValueError, match="Cannot read the image 1 of the dataset"):
        checked[1]
    with pytest.raises(ValueError, match="more than 8 bits"):
        checked[2]
    assert checked[3][0].size == (1, 16)
    assert checked.class_names == ("a", "b")


def test_a_dataset_of_torchvision_gives_its_own_pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ImageFolder(str(root / "train"))
    checked = Checked(ImageFolder(str(root / "train")))
    for number in range(len(plain)):
        assert np.array_equal(np.asarray(checked[number][0]), np.asarray(plain[number][0]))
        assert checked[number][1] == plain[number][1]
    # Without files: only what the class keeps.
    cifar = CIFAR10.__new__(CIFAR10)
    cifar.data = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    cifar.targets, cifar.transform, cifar.target_transform = [0, 1, 1], None, None
    cifar.class_to_idx = {"cat": 0, "dog": 1}
    assert np.array_equal(np.asarray(Checked(cifar)[2][0]), cifar.data[2])
