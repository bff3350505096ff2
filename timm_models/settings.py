"""What a training is made of: settings with the names of timm's training script, from a YAML file and options."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from timm.utils import ParseKwargs

from genas_plugins._messages import shown, suggestion
from genas_plugins._reading import user_path
from genas_plugins._settings import Listed, checked, read_file, schema_of, settings

__all__ = ["Settings", "SettingsError", "add_options", "from_options", "read_config", "write_config"]

_MOST_ARGUMENTS = 10_000

# The paper's epochs of gentler slope.
_TAIL = 5

SECTION = "genas"
"""Section of a configuration with what timm's own script does not know."""


class SettingsError(ValueError):
    """A setting that does not exist, has another type, or cannot go with the others."""


def _number(value: Any) -> Any:
    # YAML reads 3e-5, without a point, as text.
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


_FROM_TEXT = BeforeValidator(_number)
# The upper ends of what takes memory or time are far beyond what is trained, and below what a machine dies of.
_Images = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=1, le=10**6)]
_Epochs = Annotated[int, Field(ge=0, le=10**6)]
_Above = Annotated[float, Field(gt=0), _FROM_TEXT]
_Least = Annotated[float, Field(ge=0), _FROM_TEXT]
_Below1 = Annotated[float, Field(ge=0, lt=1), _FROM_TEXT]
_Part = Annotated[float, Field(gt=0, le=1), _FROM_TEXT]
_Share = Annotated[float, Field(ge=0, le=1), _FROM_TEXT]
_Classes = Annotated[int, Field(ge=2, le=10**6)]  # of one, every loss is 0
_Pair = Annotated[tuple[float, float], Listed]
_Channels = Annotated[tuple[float] | tuple[float, float, float], Listed]
_Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]
_Shared = Literal["reduce", "broadcast", ""]
_UserPath = Annotated[str, AfterValidator(os.path.expanduser)]


def _setting(default: Any, text: str) -> Any:
    return Field(**{"default_factory" if callable(default) else "default": default}, description=text)


@settings(SettingsError)
class _Values:
    """Settings of which each is checked by itself: a file need not have those that it goes with."""

    data_dir: _UserPath = _setting("", "folder with the training and the validation images, a folder for each class")
    dataset: str = _setting("", "timm's dataset type and name; empty: folders of images")
    dataset_download: bool = _setting(False, "let timm download the dataset, where it can")
    train_split: str = _setting("train", "folder or split to train on")
    val_split: str = _setting("validation", "folder or split to validate on ('val' is found too)")
    class_map: _UserPath = _setting("", "timm's file of class names")

    model: str = _setting("genas_flatness_c100", "any model of timm")
    model_kwargs: dict[str, Any] = _setting(dict, "further arguments of the model, as name=value")
    num_classes: _Classes | None = _setting(None, "classes; default: as many as there are folders, or the model's")
    initial_checkpoint: _UserPath = _setting("", "start from these weights")
    img_size: Annotated[int, Field(ge=1, le=2**14)] | None = _setting(None, "pixels, square; default: the model's")
    mean: _Channels | None = _setting(None, "mean of the pixels; default: the model's")
    std: _Channels | None = _setting(None, "standard deviation of the pixels; default: the model's")
    crop_pct: _Part | None = _setting(None, "share of the validation image that the centre crop keeps")
    interpolation: Literal[_Interpolation, ""] = _setting("", "of validation images; default: the model's")
    grad_checkpointing: bool = _setting(False, "recompute activations: less memory, more time")
    sync_bn: bool = _setting(False, "batch normalisation over all processes (CUDA)")
    dist_bn: _Shared = _setting("reduce", "BN statistics of the processes after an epoch: reduce, broadcast, or empty")

    batch_size: _Images = _setting(128, "images of a process in one pass")
    validation_batch_size: _Images | None = _setting(None, "default: batch_size")
    grad_accum_steps: _Images = _setting(1, "passes that make a step")
    epochs: _Count = _setting(250, "epochs to train (before cooldown_epochs, which only timm's schedulers have)")
    opt: str = _setting("momentum", "timm's optimizer; its 'sgd' is Nesterov's, 'momentum' is not")
    opt_kwargs: dict[str, Any] = _setting(
        lambda: {"filter_bias_and_bn": False}, "further arguments of the optimizer, as name=value"
    )
    lr: _Above = _setting(0.5, "highest learning rate, for the whole batch of a step")
    momentum: _Below1 = _setting(0.9, "momentum")
    weight_decay: _Least = _setting(3e-5, "weight decay")
    clip_grad: _Above | None = _setting(5.0, "largest norm of the gradient")
    clip_mode: Literal["norm", "value", "agc"] = _setting("norm", "norm, value or agc")
    sched: str = _setting("linear_tail", "linear_tail (the paper's) or one of timm's schedulers")
    warmup_epochs: _Epochs = _setting(5, "epochs of linear warm-up")
    warmup_lr: _Least = _setting(1e-5, "first learning rate of the warm-up (timm's schedulers)")
    min_lr: _Least = _setting(0.0, "last learning rate (timm's schedulers)")
    cooldown_epochs: _Epochs = _setting(0, "further epochs at min_lr (timm's schedulers)")
    decay_rate: _Above = _setting(0.1, "decay (step) or power (poly) of timm's schedulers")
    decay_epochs: _Above | None = _setting(None, "interval of the decay (timm's step scheduler)")
    model_ema: bool = _setting(False, "keep an average of the weights, validated beside them")
    model_ema_decay: _Below1 = _setting(0.9998, "its decay")
    model_ema_warmup: bool = _setting(False, "let its decay rise from 0")

    smoothing: _Below1 = _setting(0.1, "label smoothing, of both losses")
    drop: _Below1 = _setting(0.0, "dropout before the classifier")
    no_aug: bool = _setting(False, "train on centre crops without augmentation")
    scale: _Pair = _setting((0.08, 1.0), "area of the random crop")
    ratio: _Pair = _setting((1.0, 1.0), "aspect ratio of the random crop")
    hflip: _Share = _setting(0.5, "probability of a horizontal flip")
    color_jitter: Annotated[float, Field(ge=0, le=100), _FROM_TEXT] = _setting(0.0, "strength of the colour jitter")
    aa: str = _setting("", "timm's AutoAugment or RandAugment policy")
    reprob: _Share = _setting(0.0, "probability of random erasing")
    train_interpolation: Literal[_Interpolation, "random"] = _setting("bilinear", "of training images")

    device: str = _setting("", "cpu or cuda; default: cuda where there is one")
    amp: bool = _setting(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = _setting("float16", "float16 or bfloat16")
    channels_last: bool = _setting(False, "channels-last memory format")
    torchcompile: bool = _setting(False, "compile the network")
    workers: Annotated[int, Field(ge=0, le=1024)] = _setting(4, "processes that load images, per training process")
    pin_mem: bool = _setting(False, "page-locked memory for faster copies to the device")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = _setting(0, "seed of everything random")
    log_interval: Annotated[int, Field(ge=1, le=10**9)] = _setting(50, "steps between two progress lines")
    checkpoint_hist: _Count = _setting(3, "best checkpoints to keep")
    output: _UserPath = _setting("output/train", "folder for runs")
    experiment: str = _setting("", "the run's folder in it; default: date, model, size")

    auxiliary_weight: _Least = _setting(0.0, "weight of the auxiliary loss; 0: no auxiliary head; the paper: 0.4")
    drop_path: _Below1 = _setting(0.0, "highest probability to drop an operation, reached linearly over the epochs")
    lighting: _Least = _setting(0.0, "standard deviation of the colour noise along ImageNet's components; paper: 0.1")
    tail_epochs: _Epochs | None = _setting(
        None, "epochs of gentler slope at the end (linear_tail); default: 5, or one less than epochs"
    )
    global_batch_size: _Images | None = _setting(None, "images of a step over all processes; sets grad_accum_steps")
    tensorboard: bool = _setting(True, "write TensorBoard's files")


@settings(SettingsError)
class Settings(_Values):
    """Settings of a training. Names are those of timm's ``train.py`` where it has the same; defaults are the paper's.

    Each is an option of the command line (``--batch-size``) and a key of the YAML file (``batch_size``).

    Raises:
        SettingsError: Values that cannot be, or cannot go together.
    """

    def __post_init__(self) -> None:
        if self.tail_epochs is None:
            # As a number, which is what a run is stored and compared with.
            object.__setattr__(self, "tail_epochs", max(1, min(_TAIL, self.epochs - 1)))
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise SettingsError(f"{name} must be two numbers above 0 that do not fall, got {low:g} {high:g}.")
        if self.scale[1] > 1:
            raise SettingsError(f"scale is a share of the image's area, at most 1, got {self.scale[1]:g}.")
        if self.std is not None and min(self.std) <= 0:
            raise SettingsError(f"std must be above 0, got {shown(self.std)}.")
        for name in ("model_kwargs", "opt_kwargs"):
            _check_arguments(name, getattr(self, name))
        if self.sched != "linear_tail" and self.min_lr > self.lr:
            raise SettingsError(f"min_lr, the last learning rate, must be at most lr ({self.lr}), got {self.min_lr}.")
        if self.drop_path and self.torchcompile:
            raise SettingsError("drop_path changes in every epoch, and torchcompile would compile anew: leave one out.")
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

    def images_of_a_step(self, processes: int) -> int:
        """Images of a step over so many processes; errors as of :meth:`accumulation`."""
        return self.batch_size * self.accumulation(processes) * processes


@settings(SettingsError)
class File(_Values):
    """A configuration: settings, and in a section those that timm's own script does not know or has otherwise."""

    genas: _Values | None = None


_NAMES = tuple(Settings.__dataclass_fields__)
# By the type in JSON's schema.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "array": {"nargs": "+", "type": float, "metavar": "X"},
    "boolean": {"action": argparse.BooleanOptionalAction},
    "integer": {"type": int, "metavar": "N"},
    "number": {"type": float, "metavar": "X"},
    "object": {"nargs": "*", "action": ParseKwargs, "metavar": "NAME=VALUE"},
    "string": {"type": str, "metavar": "TEXT"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; what is not given is absent from the namespace."""
    defaults = asdict(Settings())
    for name, entry in schema_of(Settings)["properties"].items():
        text = entry["description"]
        if defaults[name] not in (None, "", {}, ()) and "default:" not in text:
            text += f" (default: {_shown(defaults[name])})"
        arguments = _ARGUMENTS[entry.get("type") or entry["anyOf"][0]["type"]]
        if name.startswith("no_"):
            # argparse would read --no-aug as the opposite of --aug.
            arguments = {"action": "store_true"}
        option, text = f"--{name.replace('_', '-')}", text.replace("%", "%%")
        parser.add_argument(option, dest=name, default=argparse.SUPPRESS, help=text, **arguments)


def from_options(options: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a configuration, with the options of the command line over it.

    Raises:
        SettingsError: An unknown name, or a value that cannot be.
    """
    merged = {**(config or {}), **{name: value for name, value in options.items() if name in _NAMES}}
    return _checked(Settings, merged)


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
    data = read_file(path, SettingsError, dict)
    section = data.pop(SECTION, None) or {}
    if not isinstance(section, dict):
        raise SettingsError(f"{path}: the section {SECTION} must hold settings by name, got {type(section).__name__}.")
    merged = {**data, **section}
    if not merged:
        raise SettingsError(f"{path} holds no settings: name some, or leave the configuration out.")
    try:
        values = _checked(_Values, merged)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return {name: getattr(values, name) for name in merged}


def write_config(settings: Settings) -> str:
    """All settings as YAML, which :func:`read_config` reads."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _checked(kind: type[_Values], values: Mapping[Any, Any]) -> Any:
    for name in values:
        if name not in _NAMES:
            hint = suggestion(name, _NAMES) or "; python -m timm_models.train --help lists them all"
            raise SettingsError(f"There is no setting {shown(name)}{hint}.")
    return checked(kind, values, SettingsError, "the settings")


def _check_arguments(name: str, values: Mapping[str, Any]) -> None:
    """Raise for what is no number, and for what aliases of YAML make of a few lines."""
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


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{x:g}" for x in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={content}" for name, content in value.items())
    return str(value)
