"""A detector's training that is resumed knows the images that it began with."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from detectron2_backbones import lazy_train_net, train_net
from detectron2_backbones._data import known_images
from genas_plugins.datasets import DataChangedError

pytestmark = pytest.mark.detectron2

NAME = "resumed_objects"


def write_objects(root: Path, names: tuple[str, ...] = ("cup", "cat"), images: int = 4, width: int = 9) -> None:
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    entries, annotations = [], []
    for number in range(images):
        picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "pictures" / f"{number}.png")
        entries.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        box = {"bbox": [4, 4, width, 9], "area": 9 * width, "iscrowd": 0}
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1 + number % 2, **box})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "objects.json").write_text(json.dumps(content))


def register(root: Path) -> None:
    forget()
    register_coco_instances(NAME, {}, str(root / "objects.json"), str(root / "pictures"))


def forget() -> None:
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    write_objects(tmp_path / "set")
    register(tmp_path / "set")
    yield tmp_path / "set"
    forget()


def train(run: Path, *, resume: bool = False, evaluate: bool = False) -> None:
    """What a launcher does with images: it asks for them once, and leaves a checkpoint."""
    with known_images(str(run), [NAME], Namespace(resume=resume, eval_only=evaluate)) as begin:
        get_detection_dataset_dicts([NAME])
        begin()
    run.mkdir(exist_ok=True)
    (run / "last_checkpoint").write_text("model_2.pth")


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    train(tmp_path / "run")
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if not path.name.startswith(".lock")}


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "class-renamed": (lambda root: write_objects(root, ("cup", "dog")), "1 new (dog) and 1 gone (cat)"),
    "class-added": (lambda root: write_objects(root, ("cup", "cat", "dog")), "3 classes instead of 2, 1 new (dog)"),
    "image-removed": (lambda root: write_objects(root, images=3), "3 images instead of 4"),
    "box-of-another-width": (lambda root: write_objects(root, width=8), "the annotation files differ in their"),
    "image-replaced": (
        lambda root: shutil.copy(root / "pictures" / "0.png", root / "pictures" / "2.png"),
        "the images differ in their",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_refused_and_the_run_stays_as_it_was(change: str, run: Path, root: Path) -> None:
    before = contents(run)
    apply, told = CHANGES[change]
    apply(root)
    register(root)
    with pytest.raises(DataChangedError) as refused:
        train(run, resume=True)
    message = str(refused.value)
    assert f"what the run in {run} began with ({NAME}: " in message and told in message, message
    assert contents(run) == before
    # Another run, as it says.
    train(run)
    train(run, resume=True)


@pytest.mark.parametrize(
    ("main", "config", "settings"),
    [
        (
            train_net.main,
            "retinanet_genas_flatness_c100_FPN_1x",
            "OUTPUT_DIR {run} DATASETS.TRAIN ('resumed_objects',) DATASETS.TEST ()",
        ),
        (
            lazy_train_net.main,
            "retinanet_genas_flatness_c100_fpn_1x",
            "train.output_dir={run} dataloader.train.dataset.names=resumed_objects",
        ),
    ],
)
def test_the_launchers_refuse_them_in_one_line(
    main: Callable[..., int],
    config: str,
    settings: str,
    run: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(run)
    write_objects(root, images=3)
    register(root)
    assert main(["--resume", "--config-file", config, *settings.format(run=run).split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{main.__module__}: The data is not what the run in {run} began with")
    assert "3 images instead of 4" in error and error.count("\n") == 1
    assert contents(run) == before


def test_the_same_images_elsewhere_go_on(run: Path, root: Path) -> None:
    before = contents(run)
    (root / "pictures").rename(root / "other")
    shutil.copytree(root, root.parent / "moved")
    (root.parent / "moved" / "other").rename(root.parent / "moved" / "pictures")
    register(root.parent / "moved")
    train(run, resume=True)
    assert contents(run) == before


def test_a_run_of_an_earlier_version_goes_on_and_knows_its_images_then(run: Path, root: Path) -> None:
    (run / "data.json").unlink()
    train(run, resume=True)
    write_objects(root, images=3)
    register(root)
    with pytest.raises(DataChangedError, match="3 images instead of 4"):
        train(run, resume=True)


def test_without_a_checkpoint_there_is_nothing_to_compare(run: Path, root: Path) -> None:
    (run / "last_checkpoint").unlink()
    write_objects(root, images=3)
    register(root)
    train(run, resume=True)


def test_a_damaged_identity_is_named(run: Path) -> None:
    (run / "data.json").write_text('{"train"')
    with pytest.raises(ValueError, match=r"data\.json is damaged"):
        train(run, resume=True)


def test_an_evaluation_and_other_processes_write_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", evaluate=True)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    train(tmp_path / "run")
    assert set(contents(tmp_path / "run")) == {"last_checkpoint"}


@pytest.fixture
def registered(root: Path) -> Callable[[Callable[[], Any]], None]:
    """Registers a user's own function under the name."""

    def register_function(load: Callable[[], Any]) -> None:
        DatasetCatalog.pop(NAME)
        DatasetCatalog.register(NAME, load)

    return register_function


def test_images_are_read_once(registered: Callable[..., None], tmp_path: Path) -> None:
    calls: list[int] = []

    def load() -> list[dict[str, Any]]:
        calls.append(1)
        return [{"file_name": "a.png", "height": 2, "width": len(calls)}]

    registered(load)
    with known_images(str(tmp_path), [NAME], Namespace(resume=False, eval_only=False)):
        assert [DatasetCatalog.get(NAME)[0]["width"] for _ in range(3)] == [1, 2, 3]
    # What nobody has asked for is not kept for later.
    with known_images(str(tmp_path), [NAME], Namespace(resume=False, eval_only=False)):
        pass
    assert DatasetCatalog[NAME] is load


@pytest.mark.parametrize("records", [(1, 2), [1, 2], [{"image": 3}], None])
def test_unknown_data_sets_are_not_in_the_way(records: Any, registered: Callable[..., None], tmp_path: Path) -> None:
    def load() -> Any:
        if records is None:
            raise RuntimeError("its own words")
        return records

    registered(load)
    for resume in (False, True):
        with known_images(str(tmp_path), [NAME], Namespace(resume=resume, eval_only=False)) as begin:
            begin()
        (tmp_path / "last_checkpoint").write_text("model_2.pth")
    assert not (tmp_path / "data.json").exists()


def test_the_order_of_records_and_objects_that_json_does_not_know(
    registered: Callable[..., None], tmp_path: Path
) -> None:
    def load(turn: int = 1, count: int = 5) -> list[dict[str, Any]]:
        mask = {"size": [2, 2], "counts": b"04", "box": np.arange(4.0), "own": object(), "category_id": np.int64(1)}
        return [{"file_name": f"{k}.png", "height": 2, "annotations": [mask] * (k + 1)} for k in range(count)][::turn]

    registered(load)
    train(tmp_path)
    registered(lambda: load(turn=-1))
    train(tmp_path, resume=True)
    registered(lambda: [{**record, "annotations": []} for record in load()])
    with pytest.raises(DataChangedError, match="the annotations differ"):
        train(tmp_path, resume=True)
