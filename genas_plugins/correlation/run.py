"""Scores of NAS-Bench-201 architectures with a trained supernet, against the accuracy that training each gives."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genas_plugins._messages import one_line, shown
from genas_plugins._reading import read_json, read_text
from genas_plugins.correlation import Setting, columns, measure_raw
from genas_plugins.correlation.report import ON_SUPERNET, TRAINING_FREE
from genas_plugins.correlation.training_free import naswot, synflow, zico
from genas_plugins.datasets import DATA_FILE, check_identity, write_identity
from genas_plugins.experiment import config
from genas_plugins.experiment.resuming import state_digest
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.files import write_text
from genas_plugins.interrupts import raise_pending
from genas_plugins.locking import lock_folder
from genas_plugins.nasbench201 import (
    NasBench201Architecture,
    NasBench201Network,
    NasBench201SearchSpace,
    NasBench201SuperNet,
)
from genas_plugins.nasbench201.truth import lookup
from genas_plugins.scoring.paths import named_as_in_nni
from genas_plugins.search import JsonLines, candidate_seed

__all__ = ["check_folder", "choose", "measure_all"]

SETTINGS_FILE = "settings.json"
MEASUREMENTS_FILE = "measurements.jsonl"
_LONGEST_SETTINGS = 2**24
"""Bytes: ten times what all architectures of the benchmark and a hundred settings take."""

_GENERATOR = threading.Lock()
"""Held while networks are initialised from the generator of the whole process."""


def check_folder(folder: str | Path, resume: bool) -> None:
    """Raise if a folder holds measurements already.

    Raises:
        ConfigError: It does, and ``resume`` is not set.
    """
    if not resume and (Path(folder) / SETTINGS_FILE).exists():
        raise config.ConfigError(f"{folder} already holds measurements: go on with --resume, or name another folder.")


def choose(truth: Mapping[str, float], sample: int | None, seed: int) -> list[NasBench201Architecture]:
    """The architectures to measure: all, in the order of their index, or a seeded sample without repetition.

    The sample is in random order, so that what a stopped run has measured is a sample as well.

    Raises:
        ValueError: ``sample`` is out of range, or the truth lacks one of them.
    """
    space = NasBench201SearchSpace()
    if sample is not None and not 3 <= sample <= space.size:
        raise ValueError(f"The sample must have 3 to {space.size} architectures, got {sample}.")
    numbers = range(space.size)
    if sample is not None:
        numbers = np.random.default_rng(seed).choice(space.size, sample, replace=False).tolist()
    chosen = [NasBench201Architecture.from_index(number) for number in numbers]
    lookup(truth, map(str, chosen))
    return chosen


def measure_all(
    scorer: Scorer,
    architectures: Sequence[NasBench201Architecture],
    settings: Sequence[Setting],
    folder: str | Path,
    *,
    images: int | None = None,
    training_free: bool = False,
    resume: bool = False,
    seconds: float | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure architectures one by one; a killed run goes on with ``resume`` behind the last that it measured.

    Args:
        scorer: The trained supernet, of NAS-Bench-201.
        architectures: What to measure.
        settings: The columns.
        folder: Where ``measurements.jsonl`` and ``settings.json`` are written.
        images: Only the first so many of the run's validation images; ``None`` for all.
        training_free: Also NASWOT, SynFlow and ZiCo, on freshly initialised networks of the benchmark's size and on
            the supernet's trained weights.
        resume: Go on with what the folder holds.
        seconds: Begin no further architecture after so long; ``None`` measures all.
        progress: Makes the progress display.

    Returns:
        What :func:`genas_plugins.correlation.measure_raw` gave, with ``architecture``, of all that are measured now.

    Raises:
        TypeError: The supernet is of another space.
        ValueError: There are fewer images than a setting asks for.
        ConfigError: The folder holds measurements and ``resume`` is not set, or those of other settings or another
            supernet.
        DataChangedError: It holds measurements on other images.
        HistoryError: Its measurements are damaged, or of other architectures.
        FolderInUseError: Another process writes to the folder.
        OSError: The folder cannot be written to.
    """
    supernet = scorer.paths.supernet
    if not isinstance(supernet, NasBench201SuperNet):
        raise TypeError(f"The supernet is a {type(supernet).__name__}, expected a NasBench201SuperNet.")
    with lock_folder(folder):
        return _measure_all(
            scorer, architectures, settings, Path(folder), images, training_free, resume, seconds, progress
        )


def _measure_all(
    scorer: Scorer,
    architectures: Sequence[NasBench201Architecture],
    settings: Sequence[Setting],
    folder: Path,
    images: int | None,
    training_free: bool,
    resume: bool,
    seconds: float | None,
    progress: Callable[[str, int, int], Any] | None,
) -> list[dict[str, Any]]:
    validation = scorer.validation if images is None else scorer.validation.limit(images)
    history = _open(scorer, architectures, settings, folder, validation.num_images, training_free, resume)
    done = len(history.records)
    display = None if progress is None else progress("measuring", len(architectures), done)
    example, _ = next(iter(validation))
    common = scorer.paths.common_noise(scorer.seed)
    recalibration = scorer.recalibration
    own = None if recalibration is None else len(scorer.data.recalibration)
    if wanted := [s.recalibration_images for s in settings if s.recalibration_images is not None]:
        recalibration = scorer.recalibration_on(max(*wanted, own or 0))
    end = math.inf if seconds is None else time.monotonic() + seconds

    def measured(architecture: NasBench201Architecture) -> dict[str, Any] | None:
        if time.monotonic() >= end:
            return None
        with scorer.paths.open(architecture, example) as (model, names):
            raw = measure_raw(
                model,
                settings,
                validation,
                recalibration=recalibration,
                recalibration_images=own,
                angle=lambda: scorer.paths.angle(architecture, names),
                seed=candidate_seed(scorer.seed, str(architecture)),
                common=common,
                parameters=names,
            )
            if training_free:
                raw["training_free"] = _training_free(architecture, model, scorer)
        # Of the samples of neighbours.
        seed = {"seed": scorer.seed} if any(setting.neighbourhood for setting in settings) else {}
        return {"architecture": str(architecture), **seed, **raw}

    for record in scorer.in_flight.map(measured, architectures[done:]):
        if record is None:
            break
        history.append(record)
        raise_pending()
        if display is not None:
            display.step({})
    if display is not None:
        display.close()
    return history.records


def _open(
    scorer: Scorer,
    architectures: Sequence[NasBench201Architecture],
    settings: Sequence[Setting],
    folder: Path,
    images: int,
    training_free: bool,
    resume: bool,
) -> JsonLines:
    """The measurements that the folder holds; refused, before anything is written, where they are others than these."""
    told = {
        "settings": [_plain(setting) for setting in settings],
        "images": images,
        "seed": scorer.seed,
        "training_free": training_free,
        "architectures": list(map(str, architectures)),
        **_told_of(scorer),
    }
    begun = (folder / SETTINGS_FILE).exists()
    if begun:
        check_folder(folder, resume)
        _check_told(folder / SETTINGS_FILE, told)
    if scorer.data.identity is not None:
        check_identity(folder, scorer.data.identity, ("images",))
    history = JsonLines(folder / MEASUREMENTS_FILE)
    done = [record.get("architecture") for record in history.records]
    for number, architecture in enumerate(done):
        if number >= len(architectures) or architecture != str(architectures[number]):
            raise history.error(number, "is not of the architecture that comes there")
    _check_measured(history, settings, training_free)
    text = json.dumps(told, indent=1)
    if not begun or read_text(folder / SETTINGS_FILE, limit=_LONGEST_SETTINGS) != text:
        write_text(folder / SETTINGS_FILE, text)
    if scorer.data.identity is not None and not (folder / DATA_FILE).exists():
        write_identity(folder, scorer.data.identity)
    return history


def _told_of(scorer: Scorer) -> dict[str, Any]:
    """What decides a measurement, of the supernet and of how it is measured."""
    weights = named_as_in_nni(scorer.paths.supernet.state_dict())
    told: dict[str, Any] = {"supernet": state_digest(weights), "recalibration": None}
    if scorer.paths.initial is not None:
        told["initial"] = state_digest(named_as_in_nni(scorer.paths.initial))
    if scorer.recalibration is not None:
        told["recalibration"] = [len(scorer.data.recalibration), scorer.recalibration.batch_size]
    return told


def _check_told(path: Path, told: Mapping[str, Any]) -> None:
    """Raise if other things were measured before; what an older version did not store is not compared."""
    try:
        before = read_json(path, limit=_LONGEST_SETTINGS)
        for setting in before.get("settings", []):
            # As earlier versions called it.
            if "momentum" in setting:
                setting["recalibration_momentum"] = setting.pop("momentum")
        changed = [key for key, value in told.items() if key in before and before[key] != value]
    except (ValueError, TypeError) as error:
        raise config.ConfigError(
            f"{path} is damaged ({one_line(error, 300)}), so that it is not known what was measured: name another "
            "folder."
        ) from error
    if changed:
        key, is_long = changed[0], isinstance(told[changed[0]], list | str)
        difference = f"other {key}" if is_long else f"{key} is {shown(before[key])}, not {told[key]}"
        raise config.ConfigError(
            f"{path.parent} holds measurements of other settings or architectures ({difference}): name another folder."
        )


def _check_measured(history: JsonLines, settings: Sequence[Setting], training_free: bool) -> None:
    """Raise if the columns cannot be made from the records."""
    for number, record in enumerate(history.records):
        try:
            columns(settings, [record])
            if training_free:
                {name: record["training_free"][name] for name in (*TRAINING_FREE, *ON_SUPERNET)}
        except KeyError as error:
            raise history.error(number, f"lacks {error}") from error
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise history.error(number, f"is not as a measurement is ({one_line(error, 300)})") from error


def _training_free(architecture: NasBench201Architecture, subnet: nn.Module, scorer: Scorer) -> dict[str, float | None]:
    """Scores of a network that was never scorer, and of the supernet's weights by the same formulas.

    None where one is not finite (NASWOT of a cell cut off).
    """
    if scorer.recalibration is None:
        raise ValueError("The training-free scores need training images: the run has score.recalibration_images 0.")
    batches = list(itertools.islice(scorer.recalibration, 2))
    images = torch.cat([batch for batch, _ in batches])
    # The same draws for each architecture, as far as their layers agree; nothing else draws from this generator.
    # Not torch.manual_seed, which seeds the generators of all devices, and these are not put back.
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(scorer.seed)
        network = NasBench201Network(architecture, num_classes=scorer.data.num_classes).to(images.device)
    scores = [
        score
        for model in (network, subnet)
        for score in (naswot(model, images), synflow(model, tuple(images.shape[1:])), zico(model, batches))
    ]
    names = (*TRAINING_FREE, *ON_SUPERNET)
    return {name: score if math.isfinite(score) else None for name, score in zip(names, scores, strict=True)}


def _plain(setting: Setting) -> dict[str, Any]:
    score = {item.name: getattr(setting.score, item.name) for item in fields(setting.score)}
    counts = {name: getattr(setting, name) for name in ("images", "recalibration_images")}
    counts = {name: count for name, count in counts.items() if count is not None}
    if (near := setting.neighbourhood) is not None:
        counts["neighbourhood"] = {item.name: getattr(near, item.name) for item in fields(near) if item.name != "score"}
    return {"name": setting.name, **score, "sigmas": list(setting.score.sigmas), **counts}
