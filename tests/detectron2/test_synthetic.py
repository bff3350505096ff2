"""The generated detection set: exact boxes, COCO's format, reproducible, and nothing shared between its two parts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2_backbones import synthetic
from genas_plugins.datasets._scenes import half_of, texture

pytestmark = pytest.mark.detectron2

TRAINING, VALIDATION, SIZE = 12, 8, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_dataset(
        tmp_path_factory.mktemp("root") / "genas_synthetic", TRAINING, VALIDATION, size=SIZE, seed=3
    )


@pytest.fixture
def catalogs():
    yield
    for name in synthetic.DATASETS:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def annotations(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_boxes_and_areas_are_those_of_the_pixels(folder: Path) -> None:
    for split, count in (("train", TRAINING), ("val", VALIDATION)):
        content = annotations(folder, split)
        found = {}
        for number in range(count):
            rng = np.random.default_rng((3, split == "val", number))
            image, owner, classes = synthetic.draw_scene(rng, SIZE, held_out=split == "val")
            np.testing.assert_array_equal(np.asarray(Image.open(folder / split / f"{number:04d}.png")), image)
            # Pixel by pixel, in plain Python.
            for index, label in enumerate(classes, start=1):
                pixels = [(y, x) for y in range(SIZE) for x in range(SIZE) if owner[y, x] == index]
                top, left = min(y for y, _ in pixels), min(x for _, x in pixels)
                bottom, right = max(y for y, _ in pixels) + 1, max(x for _, x in pixels) + 1
                found[number + 1, index] = ([left, top, right - left, bottom - top], len(pixels), label + 1)
        written = {}
        for annotation in content["annotations"]:
            index = 1 + sum(key[0] == annotation["image_id"] for key in written)
            key = annotation["image_id"], index
            written[key] = (annotation["bbox"], annotation["area"], annotation["category_id"])
        assert written == found


def test_masks_are_the_boxes(folder: Path) -> None:
    """COCO's own library counts the pixels of the run lengths."""
    for annotation in annotations(folder, "train")["annotations"]:
        assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"]


def test_objects_are_whole_and_do_not_overlap(folder: Path) -> None:
    content = annotations(folder, "train")
    for image in content["images"]:
        covered = np.zeros((SIZE, SIZE), dtype=int)
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert 1 <= len(own) <= 4
        for annotation in own:
            x, y, wide, high = annotation["bbox"]
            assert x >= 0 and y >= 0 and x + wide <= SIZE and y + high <= SIZE
            # 30 to 60 % of the image; half a pixel of rounding, and one that a thin end may lose.
            assert 0.3 * SIZE - 1.5 <= max(wide, high) <= 0.6 * SIZE + 0.5
            covered += coco_mask.decode(annotation["segmentation"])
        assert covered.max() == 1


def test_classes_are_those_of_the_pixels() -> None:
    """Cups are red, coins are grey: no light of the scenes turns that."""
    rng = np.random.default_rng(0)
    seen = {"cup": 0, "coin": 0}
    for _ in range(40):
        image, owner, classes = synthetic.draw_scene(rng, 96, held_out=False)
        for index, label in enumerate(classes, start=1):
            name = synthetic.CLASSES[label]
            if name in seen:
                red, green, blue = image[owner == index].mean(axis=0)
                assert (red > 1.4 * blue) == (name == "cup"), (name, red, green, blue)
                seen[name] += 1
    assert min(seen.values()) > 5


def test_pycocotools_reads_it_and_a_perfect_prediction_scores_one(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations" / "val.json"))
        perfect = [
            {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
            for annotation in truth.loadAnns(truth.getAnnIds())
        ]
        scores = {}
        for shift in (0, 3):
            moved = [dict(entry, bbox=[entry["bbox"][0] + shift, *entry["bbox"][1:]]) for entry in perfect]
            evaluation = COCOeval(truth, truth.loadRes(moved), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[shift] = evaluation.stats[0]
    assert scores[0] == pytest.approx(1.0)
    assert scores[3] < 0.9
    assert [category["id"] for category in truth.loadCats(truth.getCatIds())] == [1, 2, 3, 4, 5]
    assert len(truth.getImgIds()) == VALIDATION
    assert {annotation["iscrowd"] for annotation in truth.loadAnns(truth.getAnnIds())} == {0}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    sizes = {"training": 3, "validation": 2, "size": 64}
    first, again, other = (
        digests(synthetic.write_dataset(tmp_path / name, **sizes, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    pictures = [name for name in first if name.endswith(".png")]
    assert len(pictures) == 5
    assert all(first[name] != other[name] for name in pictures)


def test_training_and_validation_share_no_background_and_no_coin() -> None:
    for name in synthetic._BACKGROUNDS:
        picture = np.asarray(getattr(skimage.data, name)())
        halves = [half_of(texture(name, "detectron2"), held_out)[..., 0] for held_out in (False, True)]
        whole = picture if picture.ndim == 2 else picture[..., 0]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    training, validation = (
        {coin[..., :3][coin[..., 3] > 0].tobytes() for coin in synthetic._cutouts(held_out)[0]}
        for held_out in (False, True)
    )
    assert (len(training), len(validation)) == (18, 6)
    assert not training & validation


def test_each_coin_is_cut_out_whole() -> None:
    """Coins are lighter than the cloth that they lie on: what is cut out is, and what is left over is not."""
    picture = skimage.data.coins()
    inside = np.zeros(picture.shape, dtype=bool)
    for row in synthetic._COINS:
        for top, left, bottom, right in row:
            y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
            center, radii = ((top + bottom - 1) / 2, (left + right - 1) / 2), ((bottom - top) / 2, (right - left) / 2)
            coin = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1
            assert not (inside & coin).any()
            inside |= coin
            ring = np.zeros_like(inside)
            ring[max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4] = True
            assert picture[coin].mean() > picture[ring & ~inside].mean() + 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "0"], "at least 1 image"),
        (["--val", "-1"], "at least 1 image"),
        (["--size", "63"], "64 to 256 pixels, got 63"),
        (["--size", "257"], "64 to 256 pixels, got 257"),
        (["--seed", "-1"], "0 or above, got -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthetic.main([str(tmp_path / "set"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_refuses_an_existing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path / "new" / "set"), "--train", "2", "--val", "1", "--size", "64"]
    assert synthetic.main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'set'}\n"
    before = digests(tmp_path)
    assert synthetic.main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert digests(tmp_path) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]


def test_largest_images_fit_all_backgrounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        assert synthetic.draw_scene(rng, 256, held_out=True)[0].shape == (256, 256, 3)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def interrupted(*arguments: object) -> object:
        drawn.append(len(list(tmp_path.rglob("*.png"))))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = synthetic.draw_scene
    monkeypatch.setattr(synthetic, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_dataset(tmp_path / "set", 5, 1, size=64)
    assert drawn == [0, 1, 2, 3]
    assert not list(tmp_path.iterdir())


def test_register(folder: Path, tmp_path: Path, catalogs: None) -> None:
    for _ in range(2):
        synthetic.register(folder.parent)
        records = DatasetCatalog.get("genas_synthetic_train")
        assert len(records) == TRAINING
        assert len(DatasetCatalog.get("genas_synthetic_val")) == VALIDATION
    assert MetadataCatalog.get("genas_synthetic_val").thing_classes == ["coin", "cup", "cat", "shuttle", "face"]
    assert MetadataCatalog.get("genas_synthetic_val").evaluator_type == "coco"
    assert Path(records[0]["file_name"]).is_file()
    first = annotations(folder, "train")["annotations"][0]
    assert records[0]["annotations"][0]["bbox"] == first["bbox"]
    assert records[0]["annotations"][0]["category_id"] == first["category_id"] - 1
    # Another root: the names mean its folder.
    synthetic.write_dataset(tmp_path / "genas_synthetic", 2, 1, size=64)
    synthetic.register(tmp_path)
    assert len(DatasetCatalog.get("genas_synthetic_train")) == 2


def test_register_without_the_set_names_the_command(tmp_path: Path, catalogs: None) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        synthetic.register(tmp_path)
    assert f"python -m detectron2_backbones.synthetic {tmp_path / 'genas_synthetic'}" in str(refusal.value)
    assert not set(synthetic.DATASETS) & set(DatasetCatalog.list())
