"""What ``genas correlate`` is to measure, columns and sums of their ranks, and whether a run has the images for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from genas_plugins._messages import listed, shown
from genas_plugins._settings import ImageCount, Listed, checked, find_file, read_file, settings
from genas_plugins.checks import MOST_IMAGES, check_count, check_seed
from genas_plugins.correlation import Setting, columns
from genas_plugins.correlation.report import ON_SUPERNET, TRAINING_FREE, RankSum, references
from genas_plugins.correlation.statistics import fewest_resamples
from genas_plugins.datasets import SearchData
from genas_plugins.experiment import config

__all__ = ["Images", "check_options", "check_sums", "load_settings"]

_MOST_RESAMPLES = 100_000
_Name = Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, int | float) else name)]
_Names = Annotated[tuple[_Name, ...], Field(min_length=2), Listed]
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
    ``images``, ``recalibration_images`` and ``neighbourhood`` are those of
    :class:`genas_plugins.correlation.Setting`. What several files
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
    path = find_file(name_or_path, "correlate", "file of settings", config.ConfigError)
    data = read_file(path, config.ConfigError, list)
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
    """A column: what a score measures, on how many images.

    Attributes:
        name: Name of the column.
        images: Validation images to score on, the first ones; ``null`` for all.
        recalibration_images: Training images for the statistics of batch normalisation; ``null`` for the run's.
        neighbourhood: As the section of an experiment's score.
    """

    name: str
    images: ImageCount | None = None
    recalibration_images: ImageCount | None = None
    neighbourhood: config.Neighbourhood | None = None


@settings(config.ConfigError)
class Sum:
    """A column that adds the ranks of others.

    Attributes:
        name: Name of the column.
        rank_sum: Names of the columns.
    """

    name: str
    rank_sum: _Names


@settings(config.ConfigError)
class LogarithmicSum:
    """A column that adds the logarithms of the ranks of others.

    Attributes:
        name: Name of the column.
        log_rank_sum: Names of the columns.
    """

    name: str
    log_rank_sum: _Names


File = Annotated[list[Column | Sum | LogarithmicSum], Field(min_length=1)]
"""What a file holds."""


def _setting(data: Any, where: str) -> Setting | RankSum:
    keys = data if isinstance(data, Mapping) else {}
    if "momentum" in keys and "recalibration_momentum" not in keys:
        # As earlier versions called it.
        data = {"recalibration_momentum" if key == "momentum" else key: value for key, value in data.items()}
    try:
        for key, kind in (("rank_sum", Sum), ("log_rank_sum", LogarithmicSum)):
            if key in keys:
                found = checked(kind, data, config.ConfigError, "a sum")
                return RankSum(found.name, getattr(found, key), logarithm=kind is LogarithmicSum)
        found = checked(Column, data, config.ConfigError, "a setting")
    except config.ConfigError as error:
        raise config.ConfigError(f"{where}: {error}") from error
    return Setting(
        name=found.name,
        score=found.build(),
        images=found.images,
        recalibration_images=found.recalibration_images,
        neighbourhood=None if found.neighbourhood is None else found.neighbourhood.build(found.build()),
    )


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
