"""Experiments as files: what a YAML experiment may say, and one clear sentence where it says something else."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

from genas_plugins._messages import listed, one_line, shown
from genas_plugins._optional import require
from genas_plugins._reading import ReadingError, parse_yaml, read_yaml, user_path
from genas_plugins.checks import MOST_IMAGES, check_count, check_real, check_seed
from genas_plugins.darts.network import MAX_CELLS, MAX_CHANNELS, cell_shapes
from genas_plugins.files import packaged_configs
from genas_plugins.nasbench201 import check_sizes
from genas_plugins.scoring import CombinedScore, Recalibration
from genas_plugins.search import Evolution, InFlight
from genas_plugins.search.racing import check_confidence
from genas_plugins.spaces import DartsSearchSpace

__all__ = ["ConfigError", "Experiment", "build", "config_names", "dump", "find_config", "load", "parse", "plain"]


_CHECK = "check"
_MOST_PIXELS, _MOST_PROCESSES = 16_384, 1_024
# YAML 1.1 reads 1e-5 as text, for want of a dot. 0.1 is text only where somebody has quoted it.
_DOTLESS = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+", re.ASCII)


class ConfigError(ValueError):
    """An experiment file, or a ``--set`` on the command line, says something that cannot be run."""


def _count(default: int | None, least: int = 1, most: int | None = None) -> Any:
    """A field with a whole number, or ``None``, within its bounds."""
    bounds = {"least": least} if most is None else {"least": least, "most": most}
    return field(default=default, metadata={_CHECK: partial(check_count, **bounds)})


def _real(default: float, **bounds: float) -> Any:
    """A field with a finite number within its bounds."""
    return field(default=default, metadata={_CHECK: partial(check_real, **bounds)})


class _Section:
    """Settings that are checked when they are made, by a file as by Python."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if _CHECK in item.metadata and value is not None:
                item.metadata[_CHECK](item.name, value)
        self.check()

    def check(self) -> None:
        """Refuse what no single field shows."""


@dataclass(frozen=True, kw_only=True)
class Space(_Section):
    """The supernet: ``init_channels`` and the numbers of cells of the official supernets by default.

    ``num_cells`` and ``stem`` are of the DARTS space, ``cells_per_stage`` and ``affine`` are of NAS-Bench-201; without
    ``affine`` the batch normalisation of its cells has no weight and bias, as in the supernet of RLNAS.
    """

    name: Literal["darts", "nasbench201"] = "darts"
    init_channels: int = _count(16, most=MAX_CHANNELS)
    num_cells: int = _count(8, most=MAX_CELLS)
    stem: Literal["cifar", "imagenet"] = "cifar"
    cells_per_stage: int = _count(5, most=MAX_CELLS)
    affine: bool = True

    def check(self) -> None:
        if self.name == "darts":
            cell_shapes(self.init_channels, self.num_cells, self.stem)
        else:
            check_sizes(self.init_channels, self.cells_per_stage)


@dataclass(frozen=True, kw_only=True)
class Data(_Section):
    """The images; see :func:`genas_plugins.datasets.load_search_data`. Sizes of ``null`` mean all there are."""

    name: Literal["digits", "cifar10", "cifar100", "imagenet16-120", "image_folder"] = "digits"
    root: str | None = None
    download: bool = False
    image_size: int | None = _count(None, most=_MOST_PIXELS)
    storage: Literal["memory", "disk"] = "memory"
    train_images: int | None = _count(None, most=MOST_IMAGES)
    validation_images: int | None = _count(None, most=MOST_IMAGES)
    test_images: int | None = _count(None, most=MOST_IMAGES)
    random_labels: bool = False
    flip: bool = True
    crop_padding: int = _count(4, 0, 1_024)


@dataclass(frozen=True, kw_only=True)
class Training(_Section):
    """The supernet recipe of the official code, and what Lightning's trainer is told.

    ``threads`` are those of PyTorch on a CPU; ``null`` takes PyTorch's own number, usually that of the cores.
    """

    epochs: int = _count(250)
    batch_size: int = _count(64)
    learning_rate: float = _real(0.025, above=0, most=1e3)
    final_learning_rate: float = _real(0.001, above=0, most=1e3)
    momentum: float = _real(0.9, least=0, below=1)
    weight_decay: float = _real(3e-4, least=0, most=100)
    gradient_clip: float = _real(5.0, least=0)
    decay_unsampled: bool = True
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    devices: int | Literal["auto"] = 1
    threads: int | None = _count(None, most=_MOST_PROCESSES)
    num_workers: int = _count(0, 0, _MOST_PROCESSES)
    checkpoint_every: int = _count(1)

    def check(self) -> None:
        if self.devices != "auto":
            check_count("devices", self.devices, most=_MOST_PROCESSES)
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
class Score(_Section):
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
    recalibration_images: int = _count(850, 0, MOST_IMAGES)
    recalibration_batch_size: int = _count(64, 2)
    recalibration_momentum: float | None = None
    batch_size: int | None = _count(None)

    def check(self) -> None:
        self.build()

    def build(self) -> CombinedScore:
        """The settings as the score that measures."""
        return CombinedScore(**{item.name: getattr(self, item.name) for item in dataclasses.fields(CombinedScore)})

    @property
    def recalibration(self) -> Recalibration:
        """What the statistics of batch normalisation are recomputed from."""
        return Recalibration(
            images=self.recalibration_images,
            batch_size=self.recalibration_batch_size,
            momentum=self.recalibration_momentum,
        )


@dataclass(frozen=True, kw_only=True)
class Search(_Section):
    """The evolution; see :class:`genas_plugins.search.Evolution`.

    ``racing`` is a confidence such as 0.999, with which candidates that cannot be parents are not measured on all
    images (:mod:`genas_plugins.search.racing`); ``null`` measures them on all. Each device measures ``in_flight``
    candidates at a time; ``null`` is as many as PyTorch has threads on a CPU, with one thread each, and 1 on a GPU.
    """

    population: int = 50
    generations: int = 20
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.1
    racing: float | None = None
    in_flight: int | None = None

    def check(self) -> None:
        settings = dataclasses.asdict(self)
        InFlight(settings.pop("in_flight"))
        if (racing := settings.pop("racing")) is not None:
            check_confidence(racing)
        Evolution(DartsSearchSpace(), **settings)


@dataclass(frozen=True, kw_only=True)
class Experiment(_Section):
    """One search: data, supernet, training, score and evolution, under one seed."""

    seed: int = field(default=0, metadata={_CHECK: lambda name, value: check_seed(value, name)})
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
        data = read_yaml(path)
    except ReadingError as error:
        raise ConfigError(f"{path} is not a YAML file: {error}.") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{path} must hold keys and values, got {found}.")
    if not data:
        raise ConfigError(f"{path} holds no setting at all: say at least which data.name to search on.")
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
    yaml = require("yaml", extra="nni", purpose="writing YAML")
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
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section}: {error}" if where else str(error)) from error


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
        if option is float and isinstance(value, str) and _DOTLESS.fullmatch(value):
            return float(value)
        if option is float and number:
            # A whole number may be too large for a float; who checks the bounds says so.
            return float(value) if isinstance(value, float) or abs(value) < 2**63 else value
        if isinstance(option, type) and isinstance(value, option) and (number or option not in (int, float)):
            return value
    raise ConfigError(f"{name} must be {' or '.join(map(_describe, options))}, got {shown(value)}.")


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
