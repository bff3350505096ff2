"""The identity of data: equal for equal data wherever it lies, another for every change that matters, in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from genas_plugins.datasets import (
    DataChangedError,
    ImageTensors,
    check_identity,
    data_identity,
    describe_change,
    files_identity,
    write_identity,
)


@dataclass
class Files:
    samples: list[tuple[str, int]]
    class_names: tuple[str, ...]


def listed(root: Path) -> Files:
    folders = sorted(root.iterdir())
    samples = [(str(path), label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    return Files(samples, tuple(folder.name for folder in folders))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("ant", "bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            content = f"{name}{number}".encode() * 4000
            (tmp_path / "images" / name / f"{number}.png").write_bytes(content)
    return tmp_path / "images"


def identity(root: Path) -> dict:
    return data_identity({"train": listed(root)})


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def change_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_equal_data_elsewhere_and_touched(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "elsewhere" / "pictures")
    os.utime(copy / "ant" / "0.png", (0, 0))
    before = json.loads(json.dumps(identity(root)))
    assert before == identity(copy)
    assert describe_change(before, identity(copy)) == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: shutil.copytree(root / "ant", root / "dog"), ["4 classes instead of 3", "1 new (dog)"]),
        (lambda root: remove(root / "bee"), ["2 classes instead of 3", "1 gone (bee)"]),
        (lambda root: (root / "bee").rename(root / "bug"), ["1 new (bug)", "1 gone (bee)"]),
        (lambda root: remove(root / "bee" / "1.png"), ["'bee' has 3 images instead of 4"]),
        (lambda root: (root / "cow" / "1.png").rename(root / "cow" / "9.png"), ["'cow'", "names"]),
        (lambda root: (root / "cow" / "1.png").write_bytes(b"short"), ["'cow'", "sizes and contents"]),
        (lambda root: change_last_byte(root / "ant" / "2.png"), ["'ant' differ in their contents"]),
        (lambda root: (root / "ant" / "3.png").rename(root / "bee" / "8.png"), ["'ant' has 3", "'bee' has 5"]),
    ],
)
def test_a_change_is_named(change: Callable[[Path], object], expected: list[str], root: Path) -> None:
    before = identity(root)
    change(root)
    found = describe_change(before, identity(root))
    assert found.startswith("train: ") and all(part in found for part in expected), found


def test_order_and_labels_count(root: Path) -> None:
    files = listed(root)
    turned = Files(files.samples[::-1], files.class_names)
    # The order within each class stays, that of the classes does not.
    woven = Files([files.samples[4 * k + i] for i in range(4) for k in range(3)], files.class_names)
    relabelled = Files([(path, (label + 1) % 3) for path, label in files.samples], files.class_names)
    first, *others = (data_identity({"train": each}) for each in (files, turned, woven, relabelled))
    assert all(describe_change(first, other) for other in others)
    assert describe_change(first, others[1]) == "train: the images are in another order"


def test_classes_in_another_order(root: Path) -> None:
    files = listed(root)
    order = Files([(path, 2 - label) for path, label in files.samples], files.class_names[::-1])
    assert "in another order" in describe_change(identity(root), data_identity({"train": order}))


def test_a_thousand_classes_are_a_short_message_and_little_reading(tmp_path: Path, monkeypatch) -> None:
    for number in range(300):
        (tmp_path / f"class{number}").mkdir()
        for name in range(10):
            (tmp_path / f"class{number}" / f"{name}.png").write_bytes(b"x" * name)
    before = identity(tmp_path)
    for number in range(300):
        remove(tmp_path / f"class{number}" / "0.png")
    found = describe_change(before, identity(tmp_path))
    assert len(found) < 400 and "and 295 classes more" in found
    # 8 KiB of each of 1,024 files at most, of a file of a megabyte too.
    (tmp_path / "class0" / "0.png").write_bytes(bytes(2**20))
    middle = identity(tmp_path)
    with (tmp_path / "class0" / "0.png").open("r+b") as file:
        file.seek(2**19)
        file.write(b"unseen")
    assert identity(tmp_path) == middle


def grouped(root: Path, classes: tuple[str, ...] = ("sky", "road"), notes: tuple[bytes, ...] = (b"1",)) -> dict:
    pictures, masks = (sorted(map(str, (root / name).iterdir())) for name in ("ant", "bee"))
    return {"train": files_identity({"images": pictures, "masks": masks}, classes, notes)}


def test_files_without_classes(root: Path, tmp_path: Path) -> None:
    before = json.loads(json.dumps(grouped(root)))
    # Elsewhere, and in a folder of another name.
    shutil.copytree(root, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "ant").rename(tmp_path / "elsewhere" / "spare")
    shutil.copytree(tmp_path / "elsewhere" / "spare", tmp_path / "elsewhere" / "ant")
    assert grouped(tmp_path / "elsewhere") == before
    assert describe_change(before, grouped(root, ("sky", "lawn"))) == (
        "train: 2 classes instead of 2, 1 new (lawn) and 1 gone (road)"
    )
    assert describe_change(before, grouped(root, notes=(b"2",))) == "train: the annotations differ"
    change_last_byte(root / "bee" / "2.png")
    assert describe_change(before, grouped(root)) == "train: the masks differ in their contents"
    (root / "ant" / "0.png").rename(root / "ant" / "00.png")
    assert "the images differ in their names" in describe_change(before, grouped(root))
    (root / "ant" / "00.png").unlink()
    assert "train: 3 images instead of 4" in describe_change(before, grouped(root))


def test_files_that_cannot_be_opened_are_known_by_their_names(tmp_path: Path) -> None:
    paths = [f"{tmp_path}/part{k % 7}/{k}.png" for k in range(50_000)]
    one = files_identity({"images": paths})
    assert one == files_identity({"images": [path.replace(str(tmp_path), "server:/x") for path in paths]})
    assert one != files_identity({"images": [*paths[:-1], f"{tmp_path}/part5/other.png"]})


def images(*, classes: tuple[str, ...] = ("a", "b"), seed: int = 0) -> ImageTensors:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.tensor([0, 1, 0, 1, 0, 1]), classes)


def test_tensors() -> None:
    base = images()
    before = data_identity({"images": base})
    assert data_identity({"images": base.subset(range(6))}) == before
    one_changed = base.subset(range(6))
    one_changed.images[3] = 255 - one_changed.images[3]
    for other, expected in (
        (base.subset(range(5)), "'b' has 2 images instead of 3"),
        (base.subset([2, 1, 0, 3, 4, 5]), "'a' differ in their contents"),
        (base.subset([1, 0, 2, 3, 4, 5]), "another order"),
        (one_changed, "'b' differ in their contents"),
        (images(classes=("a", "c")), "1 new (c) and 1 gone (b)"),
    ):
        assert expected in describe_change(before, data_identity({"images": other}))
    wider = ImageTensors(torch.cat([base.images, base.images], 3), base.labels, base.class_names)
    assert "size" in describe_change(before, data_identity({"images": wider}))


def test_parts_that_come_and_go(root: Path) -> None:
    one, two = identity(root), data_identity({"train": listed(root), "test": images()})
    assert describe_change(one, two) == "the part 'test' is new"
    assert describe_change(two, one) == "the part 'test' is gone"
    assert "train:" in describe_change(one, data_identity({"train": images()}))


def test_stored_with_a_run(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert not check_identity(run, identity(root))
    write_identity(run, identity(root))
    assert check_identity(run, identity(root))
    remove(root / "bee" / "1.png")
    with pytest.raises(DataChangedError, match=r"run began with .*'bee' has 3 images instead of 4.*another run"):
        check_identity(run, identity(root))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": 1}', '{"train": {"classes": 3}}', "\x00" * 30])
def test_a_damaged_identity_is_named(content: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json is damaged.*restore"):
        check_identity(tmp_path, identity(root))
