"""What ``genas correlate`` is to measure, columns and sums of their ranks, and whether a run has the images for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from genas_plugins._messages import listed, shown
from genas_plugins._reading import ReadingError, read_yaml, user_path
from genas_plugins._settings import ImageCount, Listed, checked, schema_of, settings
from genas_plugins.checks import MOST_IMAGES, check_count, check_seed
from genas_plugins.correlation import Setting, columns
from genas_plugins.correlation.report import ON_SUPERNET, TRAINING_FREE, RankSum, references
from genas_plugins.correlation.statistics import fewest_resamples
from genas_plugins.datasets import SearchData
from genas_plugins.experiment import config
from genas_plugins.files import packaged_configs

__all__ = ["Images", "check_options", "check_sums", "load_settings"]

_MOST_RESAMPLES = 100_000
_RESERVED = {"architecture", "truth", "parameters", "live FLOPs", *TRAINING_FREE, *ON_SUPERNET}


@dataclass(frozen=True)
class Images:
    """How many images a run has to train, to recalibrate and to score on."""

    train: int
    recalibration: int
    validation: int
    recalibration_batch_size: int | None

    @classmethod
    def of(cls, data: SearchData, recalibration_batch_size: int | None) -> Images:
        """Those of the data of a search; with ``None``, it does not recalibrate."""
        recalibration = 0 if recalibration_batch_size is None else len(data.recalibration)
        return cls(len(data.train), recalibration, len(data.validation), recalibration_batch_size)


def load_settings(*names_or_paths: str | Path) -> tuple[list[Setting], list[RankSum]]:
    """Read settings from YAML files: lists, each item with a ``name`` and the fields of ``CombinedScore``.

    One with ``rank_sum``, a list of columns, adds their ranks instead, and one with ``log_rank_sum`` their logarithms.
    ``images`` and ``recalibration_images`` are those of :class:`genas_plugins.correlation.Setting`. What several files
    say alike is measured once.

    Raises:
        ConfigError: There is no such file, or it says something that cannot be measured.
    """
    items: dict[str, Setting | RankSum] = {}
    for name in names_or_paths:
        for item in _read(name):
            if items.setdefault(item.name, item) != item:
                raise config.ConfigError(f"{name} says {shown(item.name)} otherwise than the files before it.")
    if taken := sorted(_RESERVED.intersection(items)):
        raise config.ConfigError(f"The table itself has columns of the name {', '.join(taken)}.")
    settings = [item for item in items.values() if isinstance(item, Setting)]
    if not settings:
        raise config.ConfigError("The settings have nothing to measure: only sums of ranks.")
    return settings, [item for item in items.values() if isinstance(item, RankSum)]


def _read(name_or_path: str | Path) -> list[Setting | RankSum]:
    known = packaged_configs("correlate")
    path = user_path(name_or_path) if user_path(name_or_path).is_file() else known.get(str(name_or_path))
    if path is None:
        raise config.ConfigError(
            f"There are no settings {shown(str(name_or_path))}; the package has: {', '.join(known)}."
        )
    try:
        data = read_yaml(path)
    except ReadingError as error:
        raise config.ConfigError(f"{path} is not a YAML file: {error}.") from error
    if not isinstance(data, list) or not data:
        raise config.ConfigError(f"{path.name} must hold a list of settings, got {type(data).__name__}.")
    items = [_setting(item, f"{path.name}, number {number}") for number, item in enumerate(data, 1)]
    names = [item.name for item in items]
    if twice := {name for name in names if names.count(name) > 1}:
        raise config.ConfigError(f"{path.name} has several settings of the name {listed(sorted(twice))}.")
    return items


def check_sums(sums: Sequence[RankSum], settings: Sequence[Setting], training_free: bool) -> None:
    """Raise if a sum has a column that there will not be.

    Raises:
        ConfigError: The message has the column and those that there are.
    """
    there = [*references([]), *columns(settings, []), *((*TRAINING_FREE, *ON_SUPERNET) if training_free else ())]
    for one in sums:
        if missing := [name for name in one.of if name not in there]:
            raise config.ConfigError(
                f"{one.name}: there is no column {shown(missing[0])}; there are: {', '.join(there)}."
            )


@settings(config.ConfigError)
class Column(config.Measured):
    """A column: what a score measures, on how many images."""

    name: str
    images: ImageCount | None = None
    recalibration_images: ImageCount | None = None

    def build(self) -> Setting:
        """As what is measured."""
        return Setting(
            name=self.name, score=super().build(), images=self.images, recalibration_images=self.recalibration_images
        )


_Name = Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, int | float) else name)]
_Names = Annotated[tuple[_Name, ...], Field(min_length=2), Listed]


@settings(config.ConfigError)
class Sum:
    """A column that adds the ranks of others, or the logarithms of their ranks."""

    name: str
    rank_sum: _Names | None = None
    log_rank_sum: _Names | None = None

    def __post_init__(self) -> None:
        if (self.rank_sum is None) == (self.log_rank_sum is None):
            raise ValueError("a sum is of ranks or of their logarithms.")

    def build(self) -> RankSum:
        """As what adds."""
        return RankSum(self.name, self.rank_sum or self.log_rank_sum, logarithm=self.rank_sum is None)


def json_schema() -> dict[str, Any]:
    """What a file of settings may say, for editors."""
    return schema_of(Annotated[list[Column | Sum], Field(min_length=1)], "Settings of genas correlate")


def _setting(data: Any, where: str) -> Setting | RankSum:
    named = next((kind for kind in ("rank_sum", "log_rank_sum") if isinstance(data, Mapping) and kind in data), None)
    if isinstance(data, Mapping) and "recalibration_momentum" not in data:
        # Its name in older files.
        data = {"recalibration_momentum" if key == "momentum" else key: value for key, value in data.items()}
    try:
        return checked(Column if named is None else Sum, data, config.ConfigError, "a setting").build()
    except ValueError as error:
        told = error if named is None else f"a sum has a name and, as {named}, a list of two or more columns."
        raise config.ConfigError(f"{where}: {told}") from error


def check_options(
    settings: Sequence[Setting],
    *,
    seed: int,
    resamples: int,
    images: int | None,
    training_free: bool,
    available: Images | None = None,
) -> None:
    """Raise what :func:`measure_all` or the report would raise after an hour.

    Args:
        settings: The columns.
        seed: Seed of the sample and the bootstrap.
        resamples: Number of bootstrap resamples.
        images: Validation images to score on; ``None`` for all.
        training_free: Whether NASWOT, SynFlow and ZiCo are wanted, which need two batches of training images.
        available: What the run has; ``None`` where that is not known yet.

    Raises:
        TypeError: A number is not whole.
        ValueError: An option is out of its range, or asks for more than there is.
    """
    check_seed(seed, "--seed")
    check_count("--resamples", resamples, fewest_resamples(), _MOST_RESAMPLES)
    if images is not None:
        check_count("--images", images, most=MOST_IMAGES)
    if available is None:
        return
    if images is not None and images > available.validation:
        raise ValueError(f"--images asks for {images} images, the validation half has {available.validation}.")
    for setting in settings:
        there = available.validation if images is None else images
        if setting.images is not None and setting.images > there:
            raise ValueError(f"The setting {setting.name!r} asks for {setting.images} images, there are {there}.")
        wanted = setting.recalibration_images
        if wanted is not None and (available.recalibration == 0 or wanted > available.train):
            had = f"has {available.train} to train on" if available.recalibration else "does not recalibrate"
            raise ValueError(f"The setting {setting.name!r} recalibrates on {wanted} images; the run {had}.")
    if training_free and available.recalibration <= (available.recalibration_batch_size or 0):
        size = available.recalibration_batch_size
        raise ValueError(
            f"--training-free needs two batches of {'' if size is None else f'{size} '}training images, "
            f"score.recalibration_images is {available.recalibration}."
        )
