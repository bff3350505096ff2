"""Accuracy, size and latency of a network trained on images of one's own: in PyTorch, as ONNX, and in int8.

A small ``genas_cell`` is trained for minutes on a folder with one folder a class (``DIR/train``, ``DIR/test``),
exported and quantised as ``genas export`` does it, and evaluated in all three forms on all images of ``DIR/test``.
Latencies, of one image at a time, are taken in turns, in the opposite order every second round, beside those of
MobileNetV3 with the same images; and of both networks as they are used on ImageNet, with 1000 classes at 224 pixels.
What was not trained has random weights: of it only sizes and latencies mean anything. From a checkout that is installed
with the extra ``export``, for CIFAR-10 as JPEG files::

    python benchmarks/export.py DIR --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

# The neighbouring scripts: running this one puts their folder on the path.
from networks import environment
from scoring import CLOCKS, print_table
from timm.data import create_transform
from torch import Tensor, nn

from genas_plugins.counting import count_parameters
from genas_plugins.datasets._images import bounded_aspect, open_image
from genas_plugins.datasets._listing import class_folders, images_below, list_images
from genas_plugins.exporting import export_onnx
from genas_plugins.exporting.int8 import measure_fidelity, quantize
from genas_plugins.exporting.session import OnnxSession, quiet
from timm_models.export import calibration_batches
from timm_models.settings import from_options
from timm_models.trained import open_trained
from timm_models.training import train

__all__ = ["main"]

RELATIVE, FULL = "mobilenetv3_large_100", "genas_flatness_c100"
FORMS = ("PyTorch", "ONNX", "int8")
RANDOM_CALIBRATION = 32

Network = Callable[[Tensor], Tensor]


def trained(args: argparse.Namespace, folder: Path) -> Path:
    """Train the small network; returns its checkpoint after the last epoch, which no test image has chosen."""
    options = {
        "data_dir": str(args.data),
        "val_split": "test",
        "model": "genas_cell",
        "model_kwargs": {
            "genotype": args.genotype,
            "init_channels": args.init_channels,
            "num_cells": args.num_cells,
        },
        "img_size": args.image_size,
        "crop_pct": 1.0,
        "batch_size": 64,
        "epochs": args.epochs,
        "warmup_epochs": 0,
        "tail_epochs": 1,
        "lr": 0.1,
        "weight_decay": 3e-4,
        "scale": (0.6, 1.0),
        "channels_last": True,
        "workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "output": str(folder),
        "experiment": "training",
        "seed": args.seed,
    }
    return train(from_options(options)) / "last.pth.tar"


def forms(model: nn.Module, size: int, images: Iterable[Tensor], folder: Path, name: str) -> dict[str, Any]:
    """The network in its three forms, and the megabytes of each."""
    calibration = torch.cat(list(images))
    paths = {form: folder / f"{name}-{form}.onnx" for form in FORMS[1:]}
    told = export_onnx(model, paths["ONNX"], size)
    # Not by export_onnx, which does not keep what random weights become in int8; its latency is the same.
    with quiet():
        quantize(paths["ONNX"], paths["int8"], calibration)
    sessions = {form: OnnxSession(path) for form, path in paths.items()}

    def eager(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    fidelity = measure_fidelity(sessions["int8"], lambda batch: [eager(batch)], calibration)
    sizes = [4 * count_parameters(model), told.size, paths["int8"].stat().st_size]
    return {
        "run": {"PyTorch": eager} | {form: lambda x, run=run: run(x)[0] for form, run in sessions.items()},
        "megabytes": dict(zip(FORMS, (size / 1e6 for size in sizes), strict=True)),
        "difference": told.difference,
        "error": fidelity.error,
        "agreement": fidelity.agreement,
    }


def accuracies(run: dict[str, Network], data: Path, prepare: Callable[[str], Tensor]) -> tuple[dict[str, float], int]:
    """Top-1 of each form, as fractions, on all images of a folder with one folder a class."""
    folders = class_folders(data)
    samples = list_images(data, folders, sorted(folders)).samples
    right = dict.fromkeys(run, 0)
    for start in range(0, len(samples), 64):
        part = samples[start : start + 64]
        images, labels = torch.stack([prepare(path) for path, _ in part]), torch.tensor([label for _, label in part])
        for form, network in run.items():
            right[form] += int((network(images).argmax(1) == labels).sum())
    return {form: count / len(samples) for form, count in right.items()}, len(samples)


def untrained(name: str, classes: int) -> nn.Module:
    """A network of timm with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes).eval()


def latencies(arms: dict[tuple[str, str], tuple[Network, Tensor]], args: argparse.Namespace) -> dict[Any, list[float]]:
    """Milliseconds of an image by round; all arms take turns."""
    clock, taken = CLOCKS[args.clock], {arm: [] for arm in arms}
    for network, image in arms.values():
        network(image)
    for index in range(args.rounds):
        for arm in list(arms)[:: -1 if index % 2 else 1]:
            network, image = arms[arm]
            start = clock()
            for _ in range(args.steps):
                network(image)
            taken[arm].append(1e3 * (clock() - start) / args.steps)
    return taken


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, export, evaluate, and time."""
    source = open_trained(trained(args, folder))
    transform = create_transform(**source.data_config, is_training=False)
    files = images_below(args.data / "train")
    files = files[:: max(1, len(files) // args.calibration_images)][: args.calibration_images]

    def prepare(path: str) -> Tensor:
        return transform(bounded_aspect(open_image(path)))

    size, classes = args.image_size, source.model.num_classes
    batches = list(calibration_batches(files, prepare))
    large = create_transform((3, 224, 224), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_pct=1.0)
    enlarged = list(
        calibration_batches(files[:: len(files) // RANDOM_CALIBRATION], lambda path: large(open_image(path)))
    )
    few = batches[: max(1, RANDOM_CALIBRATION // len(batches[0]))]
    networks = {
        f"genas_cell, trained, {size} px": forms(source.model, size, batches, folder, "ours"),
        f"{RELATIVE}, {size} px": forms(untrained(RELATIVE, classes), size, few, folder, "relative"),
        f"{FULL}, 224 px": forms(untrained(FULL, 1000), 224, enlarged, folder, "full"),
        f"{RELATIVE}, 224 px": forms(untrained(RELATIVE, 1000), 224, enlarged, folder, "relative-224"),
    }
    first, *_ = networks.values()
    top1, count = accuracies(first["run"], args.data / "test", prepare)
    arms = {
        (name, form): (network["run"][form], (enlarged if "224" in name else batches)[0][:1])
        for name, network in networks.items()
        for form in FORMS
    }
    taken = latencies(arms, args)
    return {
        "test_images": count,
        "top1": top1,
        "networks": {
            name: {
                **{key: network[key] for key in ("megabytes", "difference", "error", "agreement")},
                "milliseconds": {form: taken[name, form] for form in FORMS},
            }
            for name, network in networks.items()
        },
    }


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for index, (name, network) in enumerate(found["networks"].items()):
        for form in FORMS:
            times = network["milliseconds"][form]
            latency = f"{statistics.median(times):.2f} ({min(times):.2f} - {max(times):.2f})"
            top1 = f"{found['top1'][form]:.2%}" if index == 0 else "-"
            rows.append([name, form, top1, f"{network['megabytes'][form]:.2f}", latency])
        away = f"ONNX {network['difference']:.1e}, int8 {network['error']:.1%} away from PyTorch"
        same = f", the same class on {network['agreement']:.1%} of the calibration images" if index == 0 else ""
        print(f"{name}: {away}{same}", flush=True)
    print(f"top-1 on {found['test_images']} images of DIR/test")
    print_table(["", "form", "top-1", "size [MB]", "latency [ms], median (min - max)"], rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, metavar="DIR", help="the images: DIR/train/CLASS, DIR/test/CLASS")
    add("--genotype", default="genas_flatness_c10", help="of the trained network (default: %(default)s)")
    add("--init-channels", type=int, default=16)
    add("--num-cells", type=int, default=6)
    add("--image-size", type=int, default=48, help="of the trained network (default: %(default)s)")
    add("--epochs", type=int, default=2)
    add("--calibration-images", type=int, default=256)
    add("--rounds", type=int, default=10)
    add("--steps", type=int, default=5, help="images of an arm in a round (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: of this process's work only")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args(arguments)
    for name, least in {"epochs": 2, "calibration_images": 1, "rounds": 1, "steps": 1, "threads": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    args.device = "cpu"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = {**environment(args), "onnxruntime": onnxruntime.__version__, "date": str(datetime.date.today())}
    print(", ".join(f"{key}: {value}" for key, value in record.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    report(found)
    if args.output:
        args.output.write_text(json.dumps({**record, **found}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
