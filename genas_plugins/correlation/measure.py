"""Do scores rank architectures? Many metrics and settings measured in one pass, and held against the ground truth.

An architecture is measured once, raw: its losses and accuracies, with and without noise. All that settings have in
common (a recalibration, the losses at the same noise, be it of two modes) is measured once for all of them, and what
only combines measured numbers (alpha, gamma, the metric) costs nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins.devices import in_float64
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SearchSpace
from genas_plugins.neighbourhood import Neighbourhood
from genas_plugins.scoring import (
    Accuracy,
    CombinedScore,
    Flatness,
    MeasurementError,
    NeighbourhoodScore,
    Perturbation,
    flatness_from_losses,
)
from genas_plugins.scoring.batchnorm import evaluation_mode, preserve_batchnorm, recalibrate_batchnorm
from genas_plugins.scoring.data import Batches, TensorBatches, first_images, sum_over_batches
from genas_plugins.scoring.flatness import perturbed_losses
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.scoring.losses import check_summed, image_loss, read_images
from genas_plugins.scoring.noise import CommonNoise
from genas_plugins.search import candidate_seed

__all__ = ["Setting", "columns", "evaluate", "measure_raw", "slope_shares", "with_neighbours"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A column of the table.

    Attributes:
        name: Name of the column.
        score: What is measured.
        images: Only the first so many validation images; ``None`` for all.
        recalibration_images: The first so many images for the statistics of batch normalisation; ``None`` for those
            of the run.
        neighbourhood: How the scores of an architecture and of its neighbours are put together; ``None`` for its own.

    Raises:
        ValueError: A number of images is below 1.
    """

    name: str
    score: CombinedScore
    images: int | None = None
    recalibration_images: int | None = None
    neighbourhood: NeighbourhoodScore | None = None

    def __post_init__(self) -> None:
        for name in ("images", "recalibration_images"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or None for all there are, got {count}.")


@dataclass(frozen=True)
class _Statistics:
    """What a network is measured with and on, apart from noise."""

    momentum: float | None
    recalibration_images: int | None
    images: int | None

    @classmethod
    def of(cls, setting: Setting) -> _Statistics:
        return cls(setting.score.recalibration_momentum, setting.recalibration_images, setting.images)

    @property
    def suffix(self) -> str:
        """What tells columns of these statistics from those of the run's own."""
        parts = [] if self.momentum is None else [f"momentum {self.momentum:g}"]
        if self.recalibration_images is not None:
            parts.append(f"recalibrated on {self.recalibration_images} images")
        if self.images is not None:
            parts.append(f"{self.images} images")
        return f" ({', '.join(parts)})" if parts else ""

    @property
    def key(self) -> str:
        """Name in what :func:`measure_raw` gives."""
        return self.suffix.strip(" ()") or "cumulative"


def _first(batches: Batches, count: int | None) -> Batches:
    """The first ``count`` images, or all for ``None``."""
    if count is None:
        return batches
    if isinstance(batches, TensorBatches):
        # As TensorBatches, they can be halved where the memory asks for it.
        return batches.limit(count)
    found = first_images(batches, count)
    if (there := sum(len(labels) for _, labels in found)) < count:
        raise ValueError(f"A setting asks for {count} images, there are {there}.")
    return found


def measure_raw(
    model: nn.Module,
    settings: Sequence[Setting],
    batches: Batches,
    *,
    recalibration: Batches | None = None,
    recalibration_images: int | None = None,
    angle: Callable[[], float] | None = None,
    seed: int = 0,
    common: CommonNoise | None = None,
    parameters: Collection[str] | None = None,
) -> dict[str, Any]:
    """Measure on one architecture all that ``settings`` need, each number once.

    Args:
        model: A candidate that owns its statistics of batch normalisation; it is left as it was.
        settings: The columns.
        batches: Validation images and labels on the model's device, iterated anew for each loss.
        recalibration: Training images for the statistics; ``None`` keeps those that the model has. Settings that name
            no number of their own take the first ``recalibration_images``.
        recalibration_images: See ``recalibration``; ``None`` for all.
        angle: Gives the angle to the initial weights as a fraction of pi, where a setting needs it.
        seed: Seed of the noise; draw number ``d`` has the generator ``seed + d``.
        common: Source of the noise that architectures have in common, where a setting asks for it.
        parameters: Names of the parameters to perturb; ``None`` for all.

    Returns:
        Plain data for JSON: ``angle``, and under ``statistics`` for each recalibration and number of images ``loss``
        (nats), ``top1`` and ``top5`` (fractions) without noise, and ``losses``: for each noise its draws, each a list
        of the losses at the sigmas. What is not finite is ``None``.

    Raises:
        ValueError: A setting needs the angle and ``angle`` is missing, or common noise and ``common`` is, there are
            no batches, or a setting asks for more images than there are.
    """
    raw: dict[str, Any] = {"statistics": {}}
    if any("angle" in setting.score.metrics for setting in settings):
        if angle is None:
            raise ValueError("A setting needs the angle to the initial weights; pass angle=.")
        raw["angle"] = _finite(angle)
    if common is None and any(s.score.common and "flatness" in s.score.metrics for s in settings):
        raise ValueError("A setting needs noise that architectures have in common; pass common=.")
    # Draws that the settings of a noise share are the first of the one that asks for most.
    by_draws = sorted(settings, key=lambda setting: -setting.score.draws)
    with preserve_batchnorm(model):
        # In the order of first use: the same settings give the same numbers.
        for statistics in dict.fromkeys(map(_Statistics.of, settings)):
            if recalibration is not None:
                calibrating = _first(recalibration, statistics.recalibration_images or recalibration_images)
                recalibrate_batchnorm(model, calibrating, statistics.momentum)
            seen = _first(batches, statistics.images)
            part: dict[str, Any] = _without_noise(model, seen)
            part["losses"] = {}
            known: dict[Any, Any] = {}
            raw["statistics"][statistics.key] = part
            for setting in by_draws:
                score, key = setting.score, _noise_key(setting.score)
                measured = "flatness" in score.metrics and _Statistics.of(setting) == statistics
                if measured and key not in part["losses"]:
                    part["losses"][key] = _losses(model, score, seen, seed, common, parameters, known)
    return raw


def evaluate(setting: Setting, raw: Mapping[str, Any]) -> float:
    """The score of a setting from what :func:`measure_raw` gave; NaN where it is not defined.

    Raises:
        KeyError: ``raw`` was measured for other settings.
    """
    score = setting.score
    part = raw["statistics"][_Statistics.of(setting).key]
    flat = _flatness(setting, part) if "flatness" in score.metrics else None
    angle = raw["angle"] if "angle" in score.metrics else None
    top = Accuracy(part["top1"], part["top5"]) if "accuracy" in score.metrics else None
    if ("flatness" in score.metrics and flat is None) or ("angle" in score.metrics and angle is None):
        return math.nan
    try:
        return score.combine(flat, angle, top).score
    except MeasurementError:
        return math.nan


def columns(settings: Sequence[Setting], raws: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Scores by setting, and what they are made of; higher is better in every column.

    Beside each setting's own column: for each recalibration minus the loss without noise, and for each noise and
    recalibration minus the slope term and minus the depth term of Eq. 4.

    Args:
        settings: The columns.
        raws: What :func:`measure_raw` gave for each architecture.
    """
    table = {setting.name: _column(setting, raws) for setting in settings}
    for setting in settings:
        statistics = _Statistics.of(setting)
        suffix = statistics.suffix
        parts = [raw["statistics"][statistics.key] for raw in raws]
        table.setdefault(f"-loss{suffix}", [math.nan if part["loss"] is None else -part["loss"] for part in parts])
        if "flatness" in setting.score.metrics:
            flats = [_flatness(setting, part) for part in parts]
            draws = f", {setting.score.draws} draws" if setting.score.draws > 1 else ""
            name = f"{_noise_key(setting.score)}{draws}{suffix}"
            table.setdefault(f"-slope: {name}", [math.nan if flat is None else -flat.slope for flat in flats])
            table.setdefault(f"-depth: {name}", [math.nan if flat is None else -flat.depth for flat in flats])
    return table


def with_neighbours(
    architectures: Sequence[NasBench201Architecture], settings: Sequence[Setting], seed: int
) -> list[NasBench201Architecture]:
    """Architectures with all neighbours that columns need, each once, behind the first that needs it.

    Args:
        architectures: Those that are to have a row.
        settings: The columns.
        seed: Seed of the samples of neighbours.
    """
    wanted: dict[NasBench201Architecture, None] = {}
    for architecture in architectures:
        wanted[architecture] = None
        for setting in settings:
            wanted |= dict.fromkeys(_around(setting, architecture, seed))
    return list(wanted)


def _around(setting: Setting, architecture: NasBench201Architecture, seed: int) -> list[NasBench201Architecture]:
    if setting.neighbourhood is None:
        return []
    near = Neighbourhood(NasBench201SearchSpace(), architecture, setting.neighbourhood.distance)
    if setting.neighbourhood.size is None:
        return list(near)
    return near.sample(setting.neighbourhood.size, candidate_seed(seed, str(architecture)))


def _column(setting: Setting, raws: Sequence[Mapping[str, Any]]) -> list[float]:
    """A column of all architectures; NaN where the score of one, or of all its neighbourhood, is not known."""
    own = [evaluate(setting, raw) for raw in raws]
    if setting.neighbourhood is None:
        return own
    score, known = setting.neighbourhood, {}
    for raw, value in zip(raws, own, strict=True):
        known[raw["architecture"]] = value
    column = []
    for raw, value in zip(raws, own, strict=True):
        near = _around(setting, NasBench201Architecture.from_string(raw["architecture"]), raw.get("seed", 0))
        scores = [known.get(str(other), math.nan) for other in near] if math.isfinite(value) else []
        scores = [value] * score.include_self + [other for other in scores if math.isfinite(other)]
        complete = all(str(other) in known for other in near)
        column.append(score.of(scores) if complete and scores and math.isfinite(value) else math.nan)
    return column


def slope_shares(setting: Setting, raws: Sequence[Mapping[str, Any]]) -> list[float]:
    """Fraction of ``1 / F`` that the slope term makes up, for each architecture; NaN where it is not defined."""
    key = _Statistics.of(setting).key
    flats = [_flatness(setting, raw["statistics"][key]) for raw in raws]
    return [math.nan if flat is None else flat.slope_share for flat in flats]


def _flatness(setting: Setting, part: Mapping[str, Any]) -> Flatness | None:
    draws = part["losses"][_noise_key(setting.score)][: setting.score.draws]
    if any(loss is None for losses in draws for loss in losses):
        return None
    means = [sum(losses) / len(draws) for losses in zip(*draws, strict=True)]
    return flatness_from_losses(means, setting.score.sigmas, setting.score.alpha)


def _without_noise(model: nn.Module, batches: Batches) -> dict[str, float | None]:
    """Loss and accuracies of one pass over the images that have a label."""
    with evaluation_mode(model), torch.no_grad():
        network = InferenceNetwork.of(model) or model

        def measure(images: Tensor, labels: Tensor) -> Tensor:
            logits = read_images(network, images)
            loss, counted, outside = image_loss(logits, labels, None)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            parts = (loss, hits[:, 0].sum(), hits.sum(), counted.sum(), outside.sum())
            return torch.stack([in_float64(part) for part in parts])

        *sums, count, outside = sum_over_batches(batches, measure)[0].tolist()
    check_summed(count, outside, whole=True)
    loss, top1, top5 = (total / count for total in sums)
    return {"loss": loss if math.isfinite(loss) else None, "top1": top1, "top5": top5}


def _losses(
    model: nn.Module,
    score: CombinedScore,
    batches: Batches,
    seed: int,
    common: CommonNoise | None,
    parameters: Collection[str] | None,
    known: dict[Any, Any],
) -> list[list[float | None]]:
    try:
        draws = perturbed_losses(
            model,
            batches,
            score,
            generator=torch.Generator(next(model.parameters()).device).manual_seed(seed),
            common=common if score.common else None,
            parameters=parameters,
            known=known,
        )
    except MeasurementError:
        # The directions of the noise are not finite: no loss was measured.
        return [[None] * len(score.sigmas)] * score.draws
    return [[loss if math.isfinite(loss) else None for loss in losses] for losses in draws]


def _finite(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except MeasurementError:
        return None


def _noise_key(score: CombinedScore) -> str:
    # Every digit: settings with the same key share their losses.
    sigmas = " ".join(map(repr, score.sigmas))
    switches = "".join(f", {item.name}" for item in fields(Perturbation) if getattr(score, item.name) is True)
    count = score.hessian_directions
    directions = "" if score.noise != "hessian" else f" {count} direction{'s' if count > 1 else ''}"
    return f"{score.noise}{directions}, {score.where}, {sigmas}{switches}"
