"""What a training is made of: settings with the names of timm's training script, from a YAML file and options."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from genas_plugins._messages import shown
from genas_plugins._reading import ReadingError, read_yaml, user_path

__all__ = ["Settings", "SettingsError", "add_options", "from_options", "read_config", "write_config"]

_MOST_ARGUMENTS = 10_000

SECTION = "genas"
"""Section of a configuration with what timm's own script does not know."""


class SettingsError(ValueError):
    """A setting that does not exist, has another type, or cannot go with the others."""


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Settings of a training. Names are those of timm's ``train.py`` where it has the same; defaults are the paper's.

    Each is an option of the command line (``--batch-size``) and a key of the YAML file (``batch_size``).

    Raises:
        SettingsError: Values that cannot be, or cannot go together.
    """

    data_dir: str = _setting("", "folder with the training and the validation images, a folder for each class")
    dataset: str = _setting("", "timm's dataset type and name; empty: folders of images")
    dataset_download: bool = _setting(False, "let timm download the dataset, where it can")
    train_split: str = _setting("train", "folder or split to train on")
    val_split: str = _setting("validation", "folder or split to validate on ('val' is found too)")
    class_map: str = _setting("", "timm's file of class names")

    model: str = _setting("genas_flatness_c100", "any model of timm")
    model_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further arguments of the model, as name=value"}
    )
    num_classes: int | None = _setting(None, "classes; default: as many as there are folders, or the model's")
    initial_checkpoint: str = _setting("", "start from these weights")
    img_size: int | None = _setting(None, "pixels, square; default: the model's")
    mean: tuple[float, ...] | None = _setting(None, "mean of the pixels; default: the model's")
    std: tuple[float, ...] | None = _setting(None, "standard deviation of the pixels; default: the model's")
    crop_pct: float | None = _setting(None, "share of the validation image that the centre crop keeps")
    interpolation: str = _setting("", "of validation images; default: the model's")
    grad_checkpointing: bool = _setting(False, "recompute activations: less memory, more time")
    sync_bn: bool = _setting(False, "batch normalisation over all processes (CUDA)")
    dist_bn: str = _setting("reduce", "BN statistics of the processes after an epoch: reduce, broadcast, or empty")

    batch_size: int = _setting(128, "images of a process in one pass")
    validation_batch_size: int | None = _setting(None, "default: batch_size")
    grad_accum_steps: int = _setting(1, "passes that make a step")
    epochs: int = _setting(250, "epochs to train (before cooldown_epochs, which only timm's schedulers have)")
    opt: str = _setting("momentum", "timm's optimizer; its 'sgd' is Nesterov's, 'momentum' is not")
    opt_kwargs: dict[str, Any] = field(
        default_factory=lambda: {"filter_bias_and_bn": False},
        metadata={"help": "further arguments of the optimizer, as name=value"},
    )
    lr: float = _setting(0.5, "highest learning rate, for the whole batch of a step")
    momentum: float = _setting(0.9, "momentum")
    weight_decay: float = _setting(3e-5, "weight decay")
    clip_grad: float | None = _setting(5.0, "largest norm of the gradient")
    clip_mode: str = _setting("norm", "norm, value or agc")
    sched: str = _setting("linear_tail", "linear_tail (the paper's) or one of timm's schedulers")
    warmup_epochs: int = _setting(5, "epochs of linear warm-up")
    warmup_lr: float = _setting(1e-5, "first learning rate of the warm-up (timm's schedulers)")
    min_lr: float = _setting(0.0, "last learning rate (timm's schedulers)")
    cooldown_epochs: int = _setting(0, "further epochs at min_lr (timm's schedulers)")
    decay_rate: float = _setting(0.1, "decay (step) or power (poly) of timm's schedulers")
    decay_epochs: float | None = _setting(None, "interval of the decay (timm's step scheduler)")
    model_ema: bool = _setting(False, "keep an average of the weights, validated beside them")
    model_ema_decay: float = _setting(0.9998, "its decay")
    model_ema_warmup: bool = _setting(False, "let its decay rise from 0")

    smoothing: float = _setting(0.1, "label smoothing, of both losses")
    drop: float = _setting(0.0, "dropout before the classifier")
    no_aug: bool = _setting(False, "train on centre crops without augmentation")
    scale: tuple[float, float] = _setting((0.08, 1.0), "area of the random crop")
    ratio: tuple[float, float] = _setting((1.0, 1.0), "aspect ratio of the random crop")
    hflip: float = _setting(0.5, "probability of a horizontal flip")
    color_jitter: float = _setting(0.0, "strength of the colour jitter")
    aa: str = _setting("", "timm's AutoAugment or RandAugment policy")
    reprob: float = _setting(0.0, "probability of random erasing")
    train_interpolation: str = _setting("bilinear", "of training images: bilinear, bicubic, random")

    device: str = _setting("", "cpu or cuda; default: cuda where there is one")
    amp: bool = _setting(False, "mixed precision")
    amp_dtype: str = _setting("float16", "float16 or bfloat16")
    channels_last: bool = _setting(False, "channels-last memory format")
    torchcompile: bool = _setting(False, "compile the network")
    workers: int = _setting(4, "processes that load images, per training process")
    pin_mem: bool = _setting(False, "page-locked memory for faster copies to the device")
    seed: int = _setting(0, "seed of everything random")
    log_interval: int = _setting(50, "steps between two progress lines")
    checkpoint_hist: int = _setting(3, "best checkpoints to keep")
    output: str = _setting("output/train", "folder for runs")
    experiment: str = _setting("", "the run's folder in it; default: date, model, size")

    auxiliary_weight: float = _setting(0.0, "weight of the auxiliary loss; 0: no auxiliary head; the paper: 0.4")
    drop_path: float = _setting(0.0, "highest probability to drop an operation, reached linearly over the epochs")
    lighting: float = _setting(0.0, "standard deviation of the colour noise along ImageNet's components; paper: 0.1")
    tail_epochs: int = _setting(5, "epochs of gentler slope at the end (linear_tail)")
    global_batch_size: int | None = _setting(None, "images of a step over all processes; sets grad_accum_steps")
    tensorboard: bool = _setting(True, "write TensorBoard's files")

    def __post_init__(self) -> None:
        for name in _PATHS:
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for name, bounds in _RANGES.items():
            value = getattr(self, name)
            if value is not None:
                bounds.check(name, value)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise SettingsError(f"{name} must be two numbers above 0 that do not fall, got {low:g} {high:g}.")
        if self.scale[1] > 1:
            raise SettingsError(f"scale is a share of the image's area, at most 1, got {self.scale[1]:g}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (
                len(values) not in (1, 3) or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0)
            ):
                raise SettingsError(
                    f"{name} must be one finite number or three{', above 0' * (name == 'std')}, got {shown(values)}."
                )
        for name in ("model_kwargs", "opt_kwargs"):
            _check_arguments(name, getattr(self, name))
        if self.sched != "linear_tail" and self.min_lr > self.lr:
            raise SettingsError(f"min_lr, the last learning rate, must be at most lr ({self.lr}), got {self.min_lr}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choice or "empty" for choice in choices)
                raise SettingsError(f"{name} must be one of {known}, got {shown(getattr(self, name))}.")
        if self.drop_path and self.torchcompile:
            raise SettingsError(
                "drop_path changes in every epoch, and torchcompile would compile anew each time: leave one out."
            )
        if self.sched == "plateau":
            raise SettingsError("sched plateau needs figures that a resumed run would not have: choose another.")
        if self.global_batch_size is not None and self.grad_accum_steps != 1:
            raise SettingsError("global_batch_size sets grad_accum_steps: give one of them.")

    def accumulation(self, processes: int) -> int:
        """Passes that make a step, on so many processes.

        Raises:
            SettingsError: They cannot make ``global_batch_size`` exactly.
        """
        if self.global_batch_size is None:
            return self.grad_accum_steps
        passes, rest = divmod(self.global_batch_size, self.batch_size * processes)
        if rest or not passes:
            raise SettingsError(
                f"{processes} process(es) with batch_size {self.batch_size} cannot make a step of "
                f"global_batch_size {self.global_batch_size}: choose a batch_size that divides "
                f"{self.global_batch_size / processes:g}."
            )
        return passes


@dataclass(frozen=True)
class _Range:
    """From ``least`` to ``most``, without an end that is excluded."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def check(self, name: str, value: float) -> None:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below or self.most == math.inf else value <= self.most
        if low and high:
            return
        start = f"{'above' if self.above else 'at least'} {self.least}"
        end = "finite" if self.most == math.inf else f"{'below' if self.below else 'at most'} {self.most}"
        raise SettingsError(f"{name} must be {start} and {end}, got {shown(value)}.")


_PATHS = ("data_dir", "class_map", "initial_checkpoint", "output")

# The upper ends of what takes memory or time are far beyond what is trained, and below what a machine dies of.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("batch_size", "validation_batch_size", "grad_accum_steps", "global_batch_size"), _Range(1, 2**20)),
    **dict.fromkeys(("epochs", "checkpoint_hist"), _Range(1, 10**6)),
    **dict.fromkeys(("warmup_epochs", "cooldown_epochs"), _Range(0, 10**6)),
    "tail_epochs": _Range(0, 10**6),
    "log_interval": _Range(1, 10**9),
    # Of one class every loss is 0.
    "num_classes": _Range(2, 10**6),
    "img_size": _Range(1, 2**14),
    "workers": _Range(0, 1024),
    "seed": _Range(0, 2**32 - 1),
    **dict.fromkeys(("lr", "clip_grad", "decay_rate", "decay_epochs"), _Range(0, above=True)),
    **dict.fromkeys(("weight_decay", "warmup_lr", "min_lr", "auxiliary_weight", "lighting"), _Range(0)),
    "color_jitter": _Range(0, 100),
    **dict.fromkeys(("momentum", "smoothing", "drop", "drop_path", "model_ema_decay"), _Range(0, 1, below=True)),
    **dict.fromkeys(("hflip", "reprob"), _Range(0, 1)),
    "crop_pct": _Range(0, 1, above=True),
}
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_CHOICES: dict[str, tuple[str, ...]] = {
    "amp_dtype": ("float16", "bfloat16"),
    "dist_bn": ("reduce", "broadcast", ""),
    "clip_mode": ("norm", "value", "agc"),
    "interpolation": (*_INTERPOLATIONS, ""),
    "train_interpolation": (*_INTERPOLATIONS, "random"),
}
_FIELDS: dict[str, Field] = {entry.name: entry for entry in fields(Settings)}
_TYPES = typing.get_type_hints(Settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; what is not given is absent from the namespace."""
    for name, entry in _FIELDS.items():
        option, text = f"--{name.replace('_', '-')}", entry.metadata["help"]
        default = entry.default if entry.default is not MISSING else entry.default_factory()
        if default not in (None, "", {}, ()) and "default:" not in text:
            text += f" (default: {_shown(default)})"
        arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        kind = _plain_type(name)
        if kind is bool and name.startswith("no_"):
            # argparse would read --no-aug as the opposite of --aug.
            arguments["action"] = "store_true"
        elif kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            arguments |= {"nargs": "*", "action": ParseKwargs, "metavar": "NAME=VALUE"}
        elif kind is tuple:
            arguments |= {"nargs": "+", "type": float, "metavar": "X"}
        else:
            arguments |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        parser.add_argument(option, **arguments)


def from_options(options: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a configuration, with the options of the command line over it.

    Raises:
        SettingsError: An unknown name, or a value that cannot be.
    """
    merged = {**(config or {}), **{name: value for name, value in options.items() if name in _FIELDS}}
    return Settings(**{name: _checked(name, value) for name, value in merged.items()})


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file: settings, and in the section ``genas`` those that only this launcher knows or changes.

    The same file serves timm's own ``train.py``, which ignores the section.

    Raises:
        FileNotFoundError: There is no such file.
        SettingsError: It is not a mapping of known settings; the message names the file.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration {path}.")
    try:
        data = read_yaml(path)
    except ReadingError as error:
        raise SettingsError(f"{path} is not YAML: {error}.") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path} must hold settings by name, got {type(data).__name__}.")
    section = data.pop(SECTION, None) or {}
    if not isinstance(section, dict):
        raise SettingsError(f"{path}: the section {SECTION} must hold settings by name, got {type(section).__name__}.")
    merged = {**data, **section}
    if not merged:
        raise SettingsError(f"{path} holds no settings: name some, or leave the configuration out.")
    try:
        return {name: _checked(name, value) for name, value in merged.items()}
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def write_config(settings: Settings) -> str:
    """All settings as YAML, which :func:`read_config` reads."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _annotation(name: str) -> Any:
    """The type of a setting, without ``None``."""
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def _plain_type(name: str) -> type:
    return typing.get_origin(_annotation(name)) or _annotation(name)


def _checked(name: Any, value: Any) -> Any:
    if name not in _FIELDS:
        close = difflib.get_close_matches(str(name)[:100], _FIELDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; python -m timm_models.train --help lists them all."
        raise SettingsError(f"There is no setting {shown(name)}{hint}")
    kind = _plain_type(name)
    if value is None and isinstance(_TYPES[name], types.UnionType):
        return None
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 3e-5, without a point, as text.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    elif kind is tuple and isinstance(value, Sequence) and all(_is_number(x) for x in value):
        if Ellipsis in typing.get_args(_annotation(name)) or len(value) == 2:
            with contextlib.suppress(OverflowError):
                return tuple(float(x) for x in value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return dict(value) if kind is dict else value
    expected = {tuple: "numbers (two for a range)", dict: "names with values", str: "text"}.get(kind, kind.__name__)
    raise SettingsError(f"{name} must be {expected}, got {shown(value)}.")


def _check_arguments(name: str, values: Mapping[str, Any]) -> None:
    """Refuse what is no number, and what aliases of YAML make of a few lines."""
    rest, count = [values], 0
    while rest:
        value = rest.pop()
        count += 1
        if count > _MOST_ARGUMENTS:
            raise SettingsError(f"{name} must have at most {_MOST_ARGUMENTS} values.")
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{name} must hold finite numbers, got {value}: {shown(values)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{x:g}" for x in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={content}" for name, content in value.items())
    return str(value)
