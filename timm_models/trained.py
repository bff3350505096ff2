"""A trained network out of what a training leaves: its folder, one checkpoint, or a folder that was published."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from genas_plugins._messages import listed, one_line
from genas_plugins._reading import user_path
from genas_plugins._settings import read_file
from genas_plugins.checkpoints import CheckpointError, load_official_network, read_metadata, read_state, read_torch
from genas_plugins.darts.genotype import Genotype
from genas_plugins.datasets import read_identity
from genas_plugins.experiment.run_folder import GENOTYPE_FILE, SUPERNET_FILE
from genas_plugins.states import existing, is_safetensors, read_safetensors, tensors_of, unwrapped
from timm_models.data import image_config
from timm_models.genotypes import read_genotype
from timm_models.network import GenasNet
from timm_models.runs import CONFIG, SUMMARY
from timm_models.searches import NETWORK_FILE
from timm_models.settings import SettingsError
from timm_models.validate import load_model

__all__ = ["TrainedNetwork", "holds_supernet", "is_search", "open_trained"]

_WEIGHTS = ("model_best.pth.tar", "last.pth.tar")
_HUB_CONFIG, _HUB_WEIGHTS = "config.json", "model.safetensors"
# Settings that say how images are prepared; timm's script and ours name them alike.
_IMAGES = ("img_size", "input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_CELL = re.compile(r"(.*?)cells\.0\.(?:preprocess0|_ops|edges)\.")
_SUPERNET_CELL = re.compile(r"(?:.*\.)?cells\.\d+\.(?:_ops\.\d+\._ops|edges)\.")
_HEADS = r"roi_heads|proposal_generator|rpn_head|bbox_head|decode_head|head\.cls_(?:subnet|score)"
_DENSE = re.compile(rf"(?:.*\.)?(?:{_HEADS})\.")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its trained weights, in evaluation mode on the CPU.

    Attributes:
        model: The network.
        name: timm's name of it, or that of its class.
        checkpoint: The file, or published folder, that its weights are from.
        data_config: How its images are prepared, as ``timm.data.create_transform`` takes it; None: unknown.
        settings: Settings of its training by name; empty if unknown.
        figures: What the training measured of these weights on its validation images: ``top1`` and ``top5`` in percent,
            ``loss``; empty if unknown.
        epoch: Number of the epoch, from 0, after which it was saved; None: unknown.
        class_names: Names of the classes; empty if unknown.
        images: Number of training and of validation images; None: unknown.
        genotype_file: JSON file of its genotype, which may know its search; None: there is none.
    """

    model: nn.Module
    name: str
    checkpoint: Path
    data_config: Mapping[str, Any] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    epoch: int | None = None
    class_names: tuple[str, ...] = ()
    images: tuple[int | None, int | None] = (None, None)
    genotype_file: Path | None = None


def is_search(place: str | Path) -> bool:
    """Whether a path is the folder of ``genas search``, or its checkpoint of the supernet."""
    place = user_path(place)
    folder = place if place.is_dir() else place.parent if place.name == SUPERNET_FILE else None
    return folder is not None and ((folder / SUPERNET_FILE).is_file() or (folder / "history.jsonl").is_file())


def holds_supernet(path: str | Path) -> bool:
    """Whether a file holds a supernet, by its metadata or the names of its tensors.

    Raises:
        CheckpointError: It cannot be read.
    """
    if (kind := read_metadata(path).get("format")) is not None:
        return kind == "genas-supernet"
    return any(map(_SUPERNET_CELL.match, read_state(path)))


def open_trained(place: str | Path, genotype: str | None = None) -> TrainedNetwork:
    """Open a trained network.

    Args:
        place: Folder of ``timm_models.train`` or of timm's script, of which the best checkpoint is taken; a checkpoint;
            a file of ``genas convert``; or a folder that was published.
        genotype: Genotype of the network, for a file that does not say it: a name, a JSON file or 28 integers.

    Raises:
        FileNotFoundError: There is no such place, or no weights in it.
        ValueError: It holds something else, such as a supernet or a detector, or its files do not go together.
        RuntimeError: Its tensors are not those of the network that its settings describe.
    """
    path = user_path(place)
    asked = None if genotype is None else read_genotype(genotype)
    if is_search(path):
        raise ValueError(
            f"{path} is a search: it holds a supernet, and no trained weights of the network that it found. Train that "
            f"with python -m timm_models.train --model genas_cell --model-kwargs genotype={_found(path)} ..., and name "
            "the folder of that training."
        )
    if path.is_dir() and (path / _HUB_CONFIG).is_file():
        return _published(path)
    checkpoint = _weights(path) if path.is_dir() else existing(path)
    saved = read_safetensors(checkpoint)[0] if is_safetensors(checkpoint) else read_torch(checkpoint)
    _refuse_others(checkpoint, list(unwrapped(tensors_of(saved, checkpoint))))
    settings = _settings(checkpoint, saved)
    if settings is None:
        return _bare(checkpoint, asked)
    return _of_training(checkpoint, saved, settings, asked)


def _found(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / GENOTYPE_FILE


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is a training without weights: it has neither {' nor '.join(_WEIGHTS)}. Continue it with "
            f"python -m timm_models.train --resume {folder}"
        )
    raise FileNotFoundError(
        f"{folder} is not the folder of a training ({CONFIG} is missing), nor one that was published ({_HUB_CONFIG} is "
        "missing): name one, or a checkpoint."
    )


def _refuse_others(checkpoint: Path, names: list[str]) -> None:
    """Raise if these tensors are those of a supernet, or of a network of which ours is only a part."""
    prefixes = {found[1] for name in names if (found := _CELL.match(name))}
    prefix = min(prefixes, default="")
    beside = [name for name in names if not name.startswith(prefix)]
    if beside or any(map(_DENSE.match, names)):
        part = f", whose backbone is {prefix}*," if prefixes and prefix else ""
        raise ValueError(
            f"{checkpoint} holds a detector or a segmentor{part} ({listed(beside or filter(_DENSE.match, names))}), "
            "expected an image classifier. Their hosts export them: Detectron2 with tools/deploy/export_model.py, "
            "MMSegmentation with MMDeploy."
        )
    if any(map(_SUPERNET_CELL.match, names)):
        raise ValueError(f"{checkpoint} holds a supernet, expected the trained network of one genotype.")


def _settings(checkpoint: Path, saved: Any) -> dict[str, Any] | None:
    """What the training was told: beside the checkpoint, or, of timm's script, in it; None: nothing is known."""
    if (checkpoint.parent / CONFIG).is_file():
        found = read_file(checkpoint.parent / CONFIG, SettingsError, dict)
        # timm's script ignores this section, whose settings ours has over the others.
        section = found.pop("genas", None)
        found |= section if isinstance(section, dict) else {}
    elif isinstance(saved, Mapping) and isinstance(saved.get("args"), argparse.Namespace):
        found = vars(saved["args"])
    else:
        return None
    return found if isinstance(found.get("model"), str) else None


def _of_training(checkpoint: Path, saved: Any, settings: dict[str, Any], asked: Genotype | None) -> TrainedNetwork:
    arguments = settings.get("model_kwargs")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    # Which only training uses.
    arguments.pop("auxiliary", None)
    folder = checkpoint.parent
    kept = folder / NETWORK_FILE
    genotype_file: Path | None = kept if kept.is_file() else None
    if "genotype" in arguments:
        given = arguments["genotype"]
        if genotype_file is None and isinstance(given, str) and user_path(given).is_file():
            genotype_file = user_path(given)
        arguments["genotype"] = _genotype(checkpoint, kept if kept.is_file() else given, asked)
    identity = read_identity(folder) or {}
    training, validation = (identity.get(part) or {} for part in ("train", "validation"))
    names = tuple(map(str, training.get("classes") or ()))
    if settings.get("in_chans") is not None:
        arguments.setdefault("in_chans", settings["in_chans"])
    classes = settings.get("num_classes") or arguments.pop("num_classes", None) or len(names) or None
    model = load_model(settings["model"], checkpoint, classes, arguments).eval()
    if isinstance(model, GenasNet) and asked is not None and asked != model.genotype:
        raise ValueError(f"{checkpoint} is of a training of the genotype {model.genotype}, not {asked}.")
    images = {name: settings[name] for name in _IMAGES if settings.get(name) not in (None, "")}
    epoch = saved.get("epoch") if isinstance(saved, Mapping) else None
    averaged = isinstance(saved, Mapping) and bool(saved.get("state_dict_ema"))
    return TrainedNetwork(
        model,
        settings["model"],
        checkpoint,
        image_config(images, model, arguments.get("in_chans")),
        settings,
        _figures(folder / SUMMARY, epoch, "_ema" if averaged else ""),
        epoch if isinstance(epoch, int) else None,
        names if len(names) == model.num_classes else (),
        (_count(training), _count(validation)),
        genotype_file,
    )


def _genotype(checkpoint: Path, given: Any, asked: Genotype | None) -> Genotype:
    try:
        return read_genotype(given)
    except (ValueError, TypeError) as error:
        if asked is not None:
            return asked
        raise ValueError(
            f"{checkpoint} is of a training whose genotype cannot be read any more: {error} Say which with --genotype."
        ) from error


def _figures(summary: Path, epoch: Any, suffix: str) -> dict[str, float]:
    """What a training measured after an epoch."""
    if not summary.is_file() or not isinstance(epoch, int):
        return {}
    with summary.open(newline="", encoding="utf-8", errors="replace") as file:
        row = next((row for row in csv.DictReader(file) if row.get("epoch") == str(epoch)), {})
    found = {}
    for name in ("top1", "top5", "loss"):
        try:
            found[name] = float(row[f"eval_{name}{suffix}"])
        except (KeyError, TypeError, ValueError):  # a column that timm's script does not have, or half a line
            continue
    return found


def _count(part: Mapping[str, Any]) -> int | None:
    """Number of images of a part of an identity."""
    if isinstance(part.get("length"), int):
        return part["length"]
    counts = [each[0] for each in part.get("images") or () if isinstance(each, list) and each]
    return sum(counts) if counts and all(isinstance(count, int) for count in counts) else None


def _bare(checkpoint: Path, asked: Genotype | None) -> TrainedNetwork:
    """A network of ours without its training."""
    try:
        network = load_official_network(checkpoint, asked)
    except CheckpointError as error:
        advice = ": pass --genotype" if "does not say which genotype" in str(error) else ""
        raise CheckpointError(one_line(error).replace(": pass genotype=...", "") + advice) from error
    if network.stem_kind != "imagenet":
        # Not one of timm's networks, which begin with ImageNet's stem.
        return TrainedNetwork(network.eval(), type(network).__name__, checkpoint, None)
    sizes = {"init_channels": network.shapes[0].channels, "num_cells": len(network.shapes)}
    model = timm.create_model("genas_cell", genotype=network.genotype, num_classes=network.num_classes, **sizes)
    model.load_state_dict(network.state_dict())
    return TrainedNetwork(model.eval(), "genas_cell", checkpoint, image_config({}, model))


def _published(folder: Path) -> TrainedNetwork:
    if not (folder / _HUB_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has {_HUB_CONFIG} and no {_HUB_WEIGHTS}: publish it again.")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # What timm raises for a file that it did not write depends on what is in it.
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{folder} cannot be opened as a published network: {one_line(error, 500)}") from error
    names = model.pretrained_cfg.get("label_names") or ()
    return TrainedNetwork(
        model,
        str(model.pretrained_cfg.get("architecture")),
        folder,
        image_config({}, model),
        class_names=tuple(map(str, names)) if isinstance(names, list | tuple) else (),
    )
