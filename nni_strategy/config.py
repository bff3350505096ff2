"""Experiments as files: what a YAML experiment may say, and one clear sentence where it says something else."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from genas_plugins._messages import listed, one_line, shown
from genas_plugins._reading import ReadingError, parse_yaml, read_yaml, user_path
from genas_plugins.files import packaged_configs
from genas_plugins.nasbench201 import check_sizes
from genas_plugins.network import cell_shapes
from genas_plugins.scoring import CombinedScore
from genas_plugins.search import Evolution, InFlight
from genas_plugins.search.racing import check_confidence
from genas_plugins.spaces import DartsSearchSpace

__all__ = ["ConfigError", "Experiment", "build", "config_names", "dump", "find_config", "load", "parse", "plain"]


class ConfigError(ValueError):
    """An experiment file, or a ``--set`` on the command line, says something that cannot be run."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The supernet: ``init_channels`` and the numbers of cells of the official supernets by default.

    ``num_cells`` and ``stem`` are of the DARTS space, ``cells_per_stage`` and ``affine`` are of NAS-Bench-201; without
    ``affine`` the batch normalisation of its cells has no weight and bias, as in the supernet of RLNAS.
    """

    name: Literal["darts", "nasbench201"] = "darts"
    init_channels: int = 16
    num_cells: int = 8
    stem: Literal["cifar", "imagenet"] = "cifar"
    cells_per_stage: int = 5
    affine: bool = True

    def check(self) -> None:
        if self.name == "darts":
            cell_shapes(self.init_channels, self.num_cells, self.stem)
        else:
            check_sizes(self.init_channels, self.cells_per_stage)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images; see :func:`genas_plugins.datasets.load_search_data`. Sizes of ``null`` mean all there are."""

    name: Literal["digits", "cifar10", "cifar100", "imagenet16-120", "image_folder"] = "digits"
    root: str | None = None
    download: bool = False
    image_size: int | None = None
    storage: Literal["memory", "disk"] = "memory"
    train_images: int | None = None
    validation_images: int | None = None
    test_images: int | None = None
    random_labels: bool = False
    flip: bool = True
    crop_padding: int = 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """The supernet recipe of the official code, and what Lightning's trainer is told."""

    epochs: int = 250
    batch_size: int = 64
    learning_rate: float = 0.025
    final_learning_rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    gradient_clip: float = 5.0
    decay_unsampled: bool = True
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    num_workers: int = 0
    checkpoint_every: int = 1

    def check(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.epochs % self.checkpoint_every:
            raise ValueError(
                f"checkpoint_every must divide epochs ({self.epochs}), so that the last epoch is saved, "
                f"got {self.checkpoint_every}."
            )
        if not 0 < self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be positive and at most learning_rate ({self.learning_rate}), "
                f"got {self.final_learning_rate}."
            )


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metric; see :class:`genas_plugins.scoring.CombinedScore`."""

    metric: str = "flatness"
    sigmas: tuple[float, ...] = (2e-3, 1e-2, 2e-2)
    alpha: float = 1.0
    gamma: float = 16.0
    gamma_accuracy: float = 0.1
    noise: str = "cumulative"
    where: str = "all"
    relative: bool = False
    draws: int = 1
    common: bool = False
    hessian_directions: int = 1
    recalibration_images: int = 850
    recalibration_batch_size: int = 64
    recalibration_momentum: float | None = None
    batch_size: int | None = None

    def check(self) -> None:
        self.build()
        if self.recalibration_images < 0 or self.recalibration_batch_size < 2:
            raise ValueError("recalibration_images must not be negative and recalibration_batch_size at least 2.")

    def build(self) -> CombinedScore:
        """The settings as the score that measures."""
        names = {item.name for item in dataclasses.fields(CombinedScore)}
        values = {name: getattr(self, name) for name in names if name != "momentum"}
        return CombinedScore(**values, momentum=self.recalibration_momentum)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The evolution; see :class:`genas_plugins.search.Evolution`.

    ``racing`` is a confidence such as 0.999, with which candidates that cannot be parents are not measured on all
    images (:mod:`genas_plugins.search.racing`); ``null`` measures them on all. Each device measures ``in_flight``
    candidates at a time.
    """

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.1
    racing: float | None = None
    in_flight: int = 1

    def check(self) -> None:
        settings = dataclasses.asdict(self)
        InFlight(settings.pop("in_flight"))
        if (racing := settings.pop("racing")) is not None:
            check_confidence(racing)
        Evolution(DartsSearchSpace(), **settings)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One search: data, supernet, training, score and evolution, under one seed."""

    seed: int = 0
    deterministic: bool = False
    space: Space = field(default_factory=Space)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    score: Score = field(default_factory=Score)
    search: Search = field(default_factory=Search)


def config_names() -> dict[str, Path]:
    """The experiments that come with the package, by name."""
    return packaged_configs("nni")


def find_config(name_or_path: str | Path) -> Path:
    """A YAML file by its path, or one that comes with the package by its name.

    Raises:
        ConfigError: There is neither.
    """
    path = user_path(name_or_path)
    if path.is_file():
        return path
    known = config_names()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    raise ConfigError(
        f"There is no experiment file {shown(str(name_or_path))}{_suggestion(str(name_or_path), known)}; "
        f"those that come with the package: {', '.join(known)}."
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment, with ``section.key=value`` overrides on top.

    Raises:
        ConfigError: See :func:`parse`; the message names the file.
    """
    path = find_config(name_or_path)
    try:
        data = read_yaml(path) or {}
    except ReadingError as error:
        raise ConfigError(f"{path} is not a YAML file: {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(data).__name__}.")
    for override in overrides:
        _apply(data, override)
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def parse(data: Mapping[str, Any]) -> Experiment:
    """Validate plain data as an experiment.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of its range. One sentence, with the valid choices.
    """
    return build(Experiment, data, "")


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, every setting spelled out."""
    return yaml.safe_dump(plain(experiment), sort_keys=False)


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as data for YAML or JSON, every setting spelled out."""
    return _plain(dataclasses.asdict(experiment))


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes section.key=value, for instance search.generations=5; got {shown(override)}.")
    try:
        value = parse_yaml(text)
    except ReadingError as error:
        raise ConfigError(f"--set {shown(override)}: the value is not YAML: {error}.") from error
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {shown(override)}: {one_line(section, 100)} is not a section.")
    data[last] = value


def build(kind: type, data: Any, where: str = "") -> Any:
    """Build a dataclass from plain data, checked against its types.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of its range.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}
    section = where.rstrip(".") or "the experiment"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{section} must hold keys and values, got {shown(data)}.")
    types_of = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(
                f"unknown key {where}{listed([key])}{_suggestion(str(key), fields)}; "
                f"valid keys of {section}: {', '.join(fields)}."
            )
        wanted = types_of[key]
        nested = dataclasses.is_dataclass(wanted)
        values[key] = build(wanted, value, f"{where}{key}.") if nested else _convert(wanted, value, f"{where}{key}")
    built = kind(**values)
    try:
        getattr(built, "check", lambda: None)()
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error
    return built


def _convert(wanted: Any, value: Any, name: str) -> Any:
    options = typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option) and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(option)[0]
            return tuple(_convert(inner, item, f"{name}[{i}]") for i, item in enumerate(value))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if option is float and isinstance(value, str) and _is_number(value):
            # YAML 1.1 reads 1e-5 as text, for want of a dot.
            return float(value)
        if option is float and number:
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (number or option not in (int, float)):
            return value
    raise ConfigError(f"{name} must be {' or '.join(map(_describe, options))}, got {shown(value)}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    if typing.get_origin(option) is tuple:
        return "a list of numbers"
    words = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[option]


def _suggestion(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
