"""Drawings: right colours, boxes where the detections are, annotations beside them, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor, nn

from detectron2_backbones import synthetic, visualize
from detectron2_backbones.train_net import read_config

pytestmark = pytest.mark.detectron2

CONFIG = "retinanet_genas_flatness_c100_FPN_quickstart_synthetic"
SMALL = ["MODEL.GENAS.INIT_CHANNELS", "2", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"]
# Untrained, all scores are near 0.01.
SMALL += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
CONFIG_FILE = Path(__file__).parents[2] / "configs" / "detectron2" / f"{CONFIG}.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    synthetic.write_dataset(root / "genas_synthetic", 1, 3, size=64, seed=0)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(read_config(CONFIG_FILE, SMALL))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(autouse=True)
def catalogs(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    # Detectron2 draws in random colours.
    np.random.seed(0)
    yield
    for name in synthetic.DATASETS:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)


def run(weights: Path, output: Path, *rest: str) -> int:
    fixed = ["--config-file", CONFIG, "--weights", str(weights), "--output", str(output)]
    return visualize.main([*fixed, *rest, "--opts", *SMALL])


def instances(boxes: list[list[float]], scores: list[float], size: tuple[int, int]) -> Instances:
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return found


def changed(drawing: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Where a drawing of a plain picture differs clearly from its colour."""
    return (np.abs(drawing.astype(int) - color) > 40).any(axis=2)


def test_boxes_are_drawn_where_they_are_and_weak_ones_are_not() -> None:
    color = (200, 100, 50)
    image = np.full((480, 480, 3), color, dtype=np.uint8)
    found = instances([[40, 200, 140, 300], [300, 200, 400, 300]], [0.9, 0.4], (480, 480))
    drawn = changed(visualize.draw(image, found), color)
    # The outline of the first, up to its width; its middle keeps its colour, and nothing is at the second.
    assert drawn[298:303, 50:130].any(axis=0).all()
    assert drawn[230:290, 138:143].any(axis=1).all()
    assert not drawn[250:290, 60:120].any()
    assert not drawn[:, 200:].any()
    both = changed(visualize.draw(image, found, threshold=0.4), color)
    assert both[230:290, 398:403].any(axis=1).all()
    nothing = visualize.draw(image, found, threshold=0.95)
    np.testing.assert_array_equal(nothing, image)


def test_small_pictures_are_enlarged_and_annotations_are_on_the_right() -> None:
    color = (200, 100, 50)
    image = np.full((60, 120, 3), color, dtype=np.uint8)
    record = {"annotations": [{"bbox": [10, 20, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]}
    found = instances([[80, 10, 110, 50]], [0.9], (60, 120))
    drawing = visualize.draw(image, found, record=record)
    assert drawing.shape == (240, 960, 3)
    drawn = changed(drawing, color)
    # Four times as large: the detection ends at 110, the annotation at 10 + 40 of the right half.
    assert drawn[60:180, 437:444].any(axis=1).all() and not drawn[:, 20:300].any()
    assert drawn[100:190, 480 + 197 : 480 + 204].any(axis=1).all() and not drawn[:, 480 + 300 :].any()


def test_a_class_has_one_colour_on_both_sides_and_boxes_are_compared_with_boxes() -> None:
    gray = (100, 100, 100)
    image = np.full((480, 480, 3), gray, dtype=np.uint8)
    box = {"bbox": [100, 100, 200, 200], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    polygon = [[100.0, 100.0, 300.0, 100.0, 300.0, 300.0, 100.0, 300.0]]
    record = {"annotations": [{**box, "segmentation": polygon}]}
    metadata = Metadata(thing_classes=["it"], thing_colors=[(255, 0, 255)])
    found = instances([[100, 100, 300, 300]], [0.9], (480, 480))
    drawing = visualize.draw(image, found, metadata, record)
    for half in (drawing[:, :480], drawing[:, 480:]):
        # Half transparent, and Detectron2 varies the colours of annotations a little.
        red, green, blue = half[250, 298:303].astype(int).mean(axis=0)
        assert min(red, blue) > green + 40
        assert not changed(half, gray)[150:280, 150:280].any()
    assert "segmentation" in record["annotations"][0]


class Recorder(nn.Module):
    """Stands for a detector: keeps what it was given, and finds a box of the whole picture."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, batch: list[dict]) -> list[dict]:
        self.inputs.append(batch[0]["image"])
        size = batch[0]["height"], batch[0]["width"]
        return [{"instances": instances([[0, 0, size[1], size[0]]], [0.9], size)}]


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_model_and_drawing_get_their_own_order_of_colours(
    order: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 40), (250, 120, 10)).save(tmp_path / "orange.png")
    cfg = read_config(CONFIG_FILE, [*SMALL, "INPUT.FORMAT", order])
    model = Recorder(cfg)
    monkeypatch.setattr(visualize, "build_model", lambda cfg: model)
    files = visualize.visualize(cfg, weights, tmp_path / "out", images=[tmp_path / "orange.png"])
    expected = [250.0, 120.0, 10.0] if order == "RGB" else [10.0, 120.0, 250.0]
    # 128 pixels is the shorter side of the configuration.
    assert model.inputs[0].shape == (3, 128, 192)
    assert model.inputs[0].mean(dim=(1, 2)).tolist() == expected
    assert np.asarray(Image.open(files[0]))[200, 240].tolist() == [250, 120, 10]


def test_a_data_set_is_drawn_beside_its_annotations(root: Path, weights: Path, tmp_path: Path) -> None:
    assert run(weights, tmp_path / "out", "--dataset", "genas_synthetic_val", "--threshold", "0", "--limit", "2") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]
    drawing = np.asarray(Image.open(tmp_path / "out" / "0000.png"))
    assert drawing.shape == (480, 960, 3)
    source = Image.open(root / "genas_synthetic" / "val" / "0000.png").resize((480, 480))
    for half in (drawing[:, :480], drawing[:, 480:]):
        assert (np.abs(half.astype(int) - np.asarray(source)) > 40).any(axis=2).mean() > 0.01


def test_detections_are_in_pixels_of_the_picture(weights: Path) -> None:
    torch.manual_seed(0)
    cfg = read_config(CONFIG_FILE, SMALL)
    found = visualize.detect(build_model(cfg).eval(), cfg, np.zeros((300, 900, 3), dtype=np.uint8))
    assert found.image_size == (300, 900)
    assert len(found) > 0
    assert found.pred_boxes.tensor[:, 2].max() > 300


def test_pictures_of_the_same_name_do_not_replace_each_other(weights: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), (200, 200, 200)).save(tmp_path / folder / "same.png")
    assert run(weights, tmp_path / "out", str(tmp_path / "a" / "same.png"), str(tmp_path / "b" / "same.png")) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_image_files_need_no_data_set(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.jpg")
    assert run(weights, tmp_path / "out", str(tmp_path / "grey.jpg")) == 0
    assert (tmp_path / "out" / "grey.png").is_file()


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("detectron2_backbones.visualize: ")
    return error


def test_errors_are_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, text, output = tmp_path / "picture.png", tmp_path / "text.png", tmp_path / "out"
    Image.new("RGB", (32, 32)).save(picture)
    text.write_text("no picture")
    cases = [
        ((tmp_path / "no.pth", output, str(picture)), "no checkpoint file"),
        ((weights, output, str(text)), f"{text} cannot be read as a picture"),
        ((weights, output, str(tmp_path / "no.png")), "There is no picture"),
        ((weights, output, "--dataset", "coco_2071_val"), "knows no data set 'coco_2071_val'"),
        ((weights, text, str(picture)), f"{text} is a file"),
        ((weights, tmp_path, str(picture)), "would replace the picture"),
        ((weights, output), "either a data set"),
        ((weights, output, "--dataset", "genas_synthetic_val", str(picture)), "either a data set"),
        ((weights, output, str(picture), "--threshold", "50"), "from 0 to 1, got 50"),
        ((weights, output, str(picture), "--limit", "0"), "at least 1, got 0"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 1
        assert message in failure(capsys)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert text.read_text() == "no picture"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert run(weights, output, "--dataset", "genas_synthetic_val") == 1
    assert "detectron2_backbones.synthetic" in failure(capsys)
