"""Export a trained network, or one of a supernet, to ONNX in float32 or int8."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn

from genas_plugins._reading import user_path
from genas_plugins._version import __version__
from genas_plugins.checks import check_count
from genas_plugins.datasets._images import ImageReader, bounded_aspect, open_image
from genas_plugins.datasets._listing import images_below
from genas_plugins.exporting import TOLERANCE, Exported, check_target, export_onnx
from genas_plugins.exporting.int8 import LARGEST_ERROR
from genas_plugins.exporting.subnets import Subnet, open_subnet
from timm_models.data import image_mode
from timm_models.network import GenasNet
from timm_models.trained import TrainedNetwork, holds_supernet, is_search, open_trained

__all__ = ["Features", "add", "calibration_batches", "run"]

_BATCH = 16
_LARGEST_IMAGE = 2**14


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = "example: genas export output/train/my-run network.onnx --dynamic-batch --int8 imagenet/train"
    add_option = parser.add_argument
    add_option(
        "checkpoint", metavar="CHECKPOINT", help="a training's folder or checkpoint, a published folder, a search"
    )
    add_option("output", metavar="OUT.onnx", help="the file to write; must not exist")
    add_option("--dynamic-batch", action="store_true", help="any number of images at a time, instead of one")
    add_option(
        "--dynamic-size", action="store_true", help="any height and width from 33 pixels on, instead of one size"
    )
    add_option("--features", action="store_true", help="the features of strides 4 to 32 instead of the logits")
    add_option("--int8", metavar="DIR", help="quantise to int8, by images in this folder or in folders inside it")
    add_option("--calibration-images", type=int, default=256, metavar="N", help="so many of them (%(default)s)")
    add_option("--image-size", type=int, metavar="PIXELS", help="height and width; default: the training's")
    add_option("--genotype", help="of a file that does not say it, or which of a search; default: its best")
    add_option("--data-root", metavar="DIR", help="where a search's images are now; --int8 needs their mean")


def run(options: argparse.Namespace) -> int:
    """Write the file, and print what is in it and how far it is from PyTorch."""
    check_target(options.output)
    check_count("--calibration-images", options.calibration_images, most=100_000)
    if options.image_size is not None:
        check_count("--image-size", options.image_size, most=_LARGEST_IMAGE)
    files = None if options.int8 is None else _spread(images_below(user_path(options.int8)), options.calibration_images)
    place = user_path(options.checkpoint)
    if is_search(place) or (place.is_file() and holds_supernet(place)):
        source = _of_search(open_subnet(place, options.genotype), options, files is not None)
    else:
        source = _of_training(open_trained(place, options.genotype), options)
    if files is not None and source.prepare is None:
        raise ValueError(f"{place} does not say how its images are normalised, which --int8 needs: export float32.")
    exported = export_onnx(
        source.model,
        options.output,
        source.size,
        channels=source.channels,
        dynamic_batch=options.dynamic_batch,
        dynamic_size=options.dynamic_size,
        output_names=source.names,
        calibration=None if files is None else calibration_batches(files, source.prepare),
        metadata={**source.metadata, "genas_plugins": __version__, "torch": torch.__version__},
    )
    print("\n".join(_told(exported, source, options)))
    return 0


@dataclass(frozen=True)
class _Source:
    """What is exported, and how an image file becomes its input."""

    model: nn.Module
    size: tuple[int, int]
    channels: int
    names: Sequence[str] | None
    metadata: Mapping[str, str]
    prepare: Callable[[str], Tensor] | None


class Features(nn.Module):
    """The features of a network of timm as its outputs, from the largest to the smallest."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features ``(N, C, H / stride, W / stride)``, rounded up, of images ``(N, in_chans, H, W)``."""
        return self.model.forward_intermediates(x, intermediates_only=True)


def _of_training(network: TrainedNetwork, options: argparse.Namespace) -> _Source:
    model, config = network.model, network.data_config
    names = None
    metadata = {"architecture": network.name}
    if (genotype := getattr(model, "genotype", None)) is not None:
        metadata["genotype"] = str(genotype)
    if network.class_names:
        metadata["class_names"] = json.dumps(network.class_names)
    if options.features:
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{network.checkpoint} holds a {network.name}, which gives no features.")
        if isinstance(model, GenasNet):
            names = [f"features_{info['reduction']}" for info in model.feature_info]
        model = Features(model)
    if config is None:
        size = options.image_size or 32
        return _Source(model, (size, size), 3, names, metadata, None)
    channels, height, width = config["input_size"]
    if options.image_size is not None:
        height = width = options.image_size
    config = {**config, "input_size": (channels, height, width)}
    metadata |= {name: json.dumps(value) for name, value in config.items()}
    transform, mode = create_transform(**config, is_training=False), image_mode(config)

    def prepare(path: str) -> Tensor:
        return transform(bounded_aspect(open_image(path, mode)))

    return _Source(model, (height, width), channels, names, metadata, prepare)


def _of_search(subnet: Subnet, options: argparse.Namespace, calibrated: bool) -> _Source:
    if options.features:
        raise ValueError("--features are those of a trained network; the networks of a search give logits.")
    size, statistics = options.image_size or subnet.image_size, None
    if subnet.run is not None and (calibrated or size is None):
        data = subnet.run.data(options.data_root)
        size, statistics = size or data.image_size, (data.mean, data.std)
    if size is None:
        raise ValueError("The supernet's file does not say how large its images are: pass --image-size.")
    metadata = {"architecture": type(subnet.model).__name__, "genotype": subnet.architecture}
    metadata["input_size"] = json.dumps((3, size, size))
    if statistics is None:
        return _Source(subnet.model, (size, size), 3, None, metadata, None)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in statistics)
    metadata |= {"mean": json.dumps(statistics[0]), "std": json.dumps(statistics[1])}
    reader = ImageReader(size, resize=True)

    def prepare(path: str) -> Tensor:
        return (torch.from_numpy(reader.read(path).copy()).float() / 255 - mean) / std

    return _Source(subnet.model, (size, size), 3, None, metadata, prepare)


def calibration_batches(files: Sequence[str], prepare: Callable[[str], Tensor]) -> Iterator[Tensor]:
    """Batches ``(N, C, H, W)`` of image files, each as ``prepare`` makes it.

    Raises:
        ValueError: A file cannot be read.
    """
    for start in range(0, len(files), _BATCH):
        yield torch.stack([prepare(path) for path in files[start : start + _BATCH]])


def _spread(files: list[str], count: int) -> list[str]:
    """So many files at equal distances, so that no class is left out where folders are classes."""
    chosen = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[index] for index in np.unique(chosen)]


def _told(exported: Exported, source: _Source, options: argparse.Namespace) -> Iterator[str]:
    batch = "N" if options.dynamic_batch else "1"
    size = "H, W" if options.dynamic_size else ", ".join(map(str, source.size))
    kind = "float32" if exported.fidelity is None else "int8"
    yield (
        f"{Path(exported.path)}: {kind}, {exported.size / 1e6:.2f} MB, images ({batch}, {source.channels}, {size}) to "
        f"{', '.join(exported.outputs)}."
    )
    yield (
        f"float32 is at most {exported.difference:.1e} of an output's largest value away from PyTorch "
        f"(allowed: {TOLERANCE:g})."
    )
    if (fidelity := exported.fidelity) is not None:
        same = "" if fidelity.agreement is None else f", and the same class is highest on {fidelity.agreement:.1%}"
        yield (
            f"int8 is {fidelity.error:.1%} away on {fidelity.images} calibration images "
            f"(allowed: {LARGEST_ERROR:.0%}){same}."
        )
