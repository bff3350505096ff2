"""``python -m detectron2_backbones.visualize``: draw what a trained detector finds, and annotations beside it.

A data set of Detectron2 gives pictures with the detections on the left and the annotations on the right; image files
give the detections alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from detectron2_backbones._launch import config_path, register_datasets
from detectron2_backbones.train_net import read_config
from detectron2_backbones.weights import GenasCheckpointer
from genas_plugins._messages import message_of
from genas_plugins._reading import expand_home

__all__ = ["detect", "draw", "main", "visualize"]

_READABLE = 480
"""Pixels of the longer side from which on the names of classes are legible."""

_Image = NDArray[np.uint8]


def detect(model: nn.Module, cfg: CfgNode, image: _Image) -> Instances:
    """Run a detector on one picture.

    Args:
        model: Detector in evaluation mode.
        cfg: Configuration of the detector; the picture is resized to ``INPUT.MIN_SIZE_TEST``.
        image: ``(H, W, 3)``, 0 to 255, in the order of ``INPUT.FORMAT``.

    Returns:
        Boxes in pixels of ``image``, scores and classes, on the CPU.
    """
    height, width = image.shape[:2]
    shortest = cfg.INPUT.MIN_SIZE_TEST
    # 0 keeps the size, as in Detectron2's data loader.
    if shortest > 0:
        resize = ResizeShortestEdge([shortest, shortest], cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
        image = resize.apply_image(image)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
    with torch.no_grad():
        return model([{"image": pixels, "height": height, "width": width}])[0]["instances"].to("cpu")


def draw(
    image: _Image,
    detections: Instances,
    metadata: Metadata | None = None,
    record: Mapping[str, Any] | None = None,
    threshold: float = 0.5,
) -> _Image:
    """Draw detections on a picture.

    Args:
        image: ``(H, W, 3)``, RGB, 0 to 255.
        detections: Fields ``pred_boxes``, ``scores`` and ``pred_classes``.
        metadata: Metadata with the names of the classes; None: classes are numbers.
        record: Record of the picture in a data set, whose ``annotations`` are drawn on the right; None: none are.
        threshold: Lowest score that is drawn.

    Returns:
        The drawing, RGB. Small pictures are enlarged; with annotations it is twice as wide.
    """
    found = detections[detections.scores >= threshold]
    drawings = [_canvas(image, metadata).draw_instance_predictions(found, jittering=False)]
    if record is not None and "annotations" in record:
        annotations = [dict(annotation) for annotation in record["annotations"]]
        if not found.has("pred_masks"):
            # Boxes are compared with boxes.
            for annotation in annotations:
                annotation.pop("segmentation", None)
        drawings.append(_canvas(image, metadata).draw_dataset_dict({"annotations": annotations}))
    return np.concatenate([drawing.get_image() for drawing in drawings], axis=1)


def _canvas(image: _Image, metadata: Metadata | None) -> Visualizer:
    scale = max(1.0, _READABLE / max(image.shape[:2]))
    # A colour for each class, where the metadata have them.
    return Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)


def visualize(
    cfg: CfgNode,
    weights: str | Path,
    output: str | Path,
    *,
    dataset: str | None = None,
    images: Sequence[str | Path] = (),
    threshold: float = 0.5,
    limit: int | None = None,
) -> list[Path]:
    """Draw the detections of a trained detector, one PNG file a picture.

    Args:
        cfg: Configuration of the detector.
        weights: Checkpoint of the detector.
        output: Folder of the drawings; made if need be. Files have the names of the pictures.
        dataset: Name of a registered data set to draw; instead of ``images``.
        images: Image files to draw; instead of ``dataset``.
        threshold: Lowest score that is drawn, 0 to 1; below the configuration's ``SCORE_THRESH_TEST`` nothing is found.
        limit: Most pictures to draw; None: all.

    Returns:
        The files.

    Raises:
        ValueError: Both or neither of ``dataset`` and ``images``, an unknown data set, a file that is no picture, a
            drawing that would replace its picture, or a number out of range.
        FileNotFoundError: ``weights``, a picture or the data set is missing.
        NotADirectoryError: ``output`` is a file.
        CheckpointError: ``weights`` are damaged or do not fit.
    """
    output = Path(output)
    if (dataset is None) == (not images):
        raise ValueError("Name either a data set (--dataset NAME) or image files.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"The threshold must be from 0 to 1, got {threshold}.")
    if limit is not None and limit < 1:
        raise ValueError(f"The limit must be at least 1, got {limit}.")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file: name a folder for the drawings.")
    records = _records(dataset, images)[:limit]
    targets = _targets(records, output)
    model = build_model(cfg).eval()
    GenasCheckpointer(model, strict=cfg.MODEL.GENAS.STRICT_WEIGHTS).load(str(weights))
    metadata = _metadata(cfg, dataset)
    output.mkdir(parents=True, exist_ok=True)
    for record, target in zip(records, targets, strict=True):
        image = _read(record["file_name"], cfg.INPUT.FORMAT)
        rgb = np.asarray(convert_image_to_rgb(image, cfg.INPUT.FORMAT))
        drawing = draw(rgb, detect(model, cfg, image), metadata, record, threshold)
        Image.fromarray(drawing).save(target)
    return targets


def _records(dataset: str | None, images: Iterable[str | Path]) -> list[dict[str, Any]]:
    if dataset is None:
        return [{"file_name": str(path)} for path in images]
    register_datasets([dataset])
    if dataset not in DatasetCatalog:
        raise ValueError(f"Detectron2 knows no data set {dataset!r}; such as coco_2017_val and genas_synthetic_val.")
    return DatasetCatalog.get(dataset)


def _targets(records: Iterable[Mapping[str, Any]], output: Path) -> list[Path]:
    targets: dict[Path, None] = {}
    for record in records:
        source = Path(record["file_name"])
        if not source.is_file():
            raise FileNotFoundError(f"There is no picture {source}.")
        target = output / f"{source.stem}.png"
        while target in targets:
            # A picture of that name from another folder.
            target = target.with_stem(f"{target.stem}_")
        if target.exists() and target.samefile(source):
            raise ValueError(f"The drawing would replace the picture {source}: name another folder.")
        targets[target] = None
    return list(targets)


def _metadata(cfg: CfgNode, dataset: str | None) -> Metadata | None:
    if dataset is None:
        if not cfg.DATASETS.TEST:
            return None
        dataset = cfg.DATASETS.TEST[0]
        # Image files are drawn also where the data set is missing; its classes are then numbers.
        with contextlib.suppress(FileNotFoundError):
            register_datasets([dataset])
    return MetadataCatalog.get(dataset)


def _read(path: str, pixel_format: str) -> _Image:
    try:
        return read_image(path, format=pixel_format)
    # Pillow's errors for damaged files have no common base class.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m detectron2_backbones.visualize", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files to draw on, instead of --dataset")
    parser.add_argument("--config-file", required=True, metavar="CONFIG", help="a yacs file, or a name of the package")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of the detector")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the drawings")
    parser.add_argument("--dataset", metavar="NAME", help="a data set of Detectron2, or genas_synthetic_val")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="T", help="lowest score drawn (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="draw only the first N pictures")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of the configuration")
    options = expand_home(parser.parse_args(arguments))
    try:
        cfg = read_config(config_path(options.config_file, ".yaml"), options.opts)
        choice = {name: getattr(options, name) for name in ("dataset", "images", "threshold", "limit")}
        files = visualize(cfg, options.weights, options.output, **choice)
        print(f"{len(files)} drawings in {options.output}")
    # Detectron2 and its configurations raise whatever a wrong setting leads to.
    except Exception as error:
        if options.debug:
            raise
        print(f"detectron2_backbones.visualize: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
