"""A score on the first images of a set, with its error, extended slice by slice until it is the score on all.

A score is a smooth function of a few means over images: the losses at the sigmas (Eq. 4 of GeNAS) and the top-1 hits.
Linearised at the means of the images seen so far (the delta method), it is a mean itself, of one number an image: the
image's influence. Influences of two candidates on the same images are paired, and what images have in common, that one
is harder than another, drops out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genas_plugins.scoring.accuracy import Accuracy, image_hits
from genas_plugins.scoring.batchnorm import load_statistics, recalibrate_batchnorm, saved_statistics
from genas_plugins.scoring.combined import CombinedScore, Measurement
from genas_plugins.scoring.flatness import flatness_from_losses, perturbed_image_losses
from genas_plugins.scoring.losses import Loss
from genas_plugins.scoring.noise import CommonNoise

__all__ = ["Linearised", "PartialScore", "linearise"]


@dataclass(frozen=True, eq=False)
class Linearised:
    """A score near the means of the images seen: a value and what each image adds to it.

    Attributes:
        value: Orders candidates as the score does. With flatness alone it is ``-1 / F``, which is linear in the
            losses where the score is not; otherwise it is the score.
        influence: ``(n,)``, one an image, of mean 0, in the unit of ``value``: with other images in their place, the
            value moves by the mean of the others' influences.
        rate: How much the score moves when ``value`` moves by 1.
        bends: ``(sigmas - 1, 3)``, for each difference of losses in Eq. 4: its absolute value, the standard deviation
            of the difference over the images, and by how much ``value`` falls for each nat that the absolute value
            grows.
    """

    value: float
    influence: np.ndarray
    rate: float
    bends: np.ndarray

    def overestimate(self, reach: float) -> float:
        """By how much the linearised value can lie above the true one where a difference of losses changes sign.

        ``|d|`` lies above its tangent, so that a candidate can be worse than linearised, and never better. Within an
        error of ``e`` of ``d``, the tangent is at most ``2 (e - |d|)`` too low.

        Args:
            reach: Errors to reckon with, in standard deviations of a single image: ``q * sqrt((1 / n) (1 - n / N))``.
        """
        size, deviation, weight = self.bends.T
        return float(2.0 * (weight * np.maximum(0.0, reach * deviation - size)).sum())


def linearise(score: CombinedScore, losses: np.ndarray, hits: np.ndarray, angle: float | None = None) -> Linearised:
    """Linearise a score at the means of some images.

    Args:
        score: Its settings.
        losses: ``(n, sigmas)``, cross-entropy in nats; not read unless the metric contains flatness.
        hits: ``(n,)``, whether top-1 is right; not read unless the metric contains the accuracy.
        angle: As a fraction of pi; not read unless the metric contains it.

    Raises:
        MeasurementError: The score of these images is not finite.
    """
    flat = None
    influence = np.zeros(len(losses if "flatness" in score.metrics else hits))
    rate, bends = 1.0, np.zeros((0, 3))
    if "flatness" in score.metrics:
        flat = flatness_from_losses(losses.mean(0).tolist(), score.sigmas, score.alpha)
    top = Accuracy(float(hits.mean()), math.nan) if "accuracy" in score.metrics else None
    value = score.combine(flat, angle if "angle" in score.metrics else None, top).score
    if top is not None:
        weight = score.gamma_accuracy if "angle" in score.metrics else 1.0
        influence = influence + weight * (hits - top.top1)
    if flat is not None:
        # Of 1 / F: the loss at the first sigma, and the differences with the signs that they have at the means.
        differences, gaps = np.diff(losses, axis=1), np.diff(score.sigmas)
        means = differences.mean(0)
        rows = score.alpha / score.sigmas[0] * losses[:, 0] + differences @ (np.sign(means) / gaps)
        if score.metric == "flatness":
            value, weight, rate = -1.0 / flat.score, 1.0, flat.score**2
        else:
            weight = score.gamma / score.sigmas[0] * flat.score**2
        influence = influence - weight * (rows - rows.mean())
        deviations = differences.std(0, ddof=1) if len(losses) > 1 else np.full(len(gaps), math.inf)
        bends = np.stack([np.abs(means), deviations, weight / gaps], axis=1)
    return Linearised(value, influence, rate, bends)


class PartialScore:
    """What one candidate has shown so far. On all images its :meth:`measurement` is bit for bit that of ``score``.

    The noise is drawn anew for each slice, from generators of the same seed, and the statistics of batch normalisation
    are kept, so that a candidate takes no more memory between two slices than these statistics and a number for
    each image and sigma.

    Args:
        score: Its settings; with the angle alone there is nothing to extend.

    Raises:
        ValueError: The metric is the angle alone, or the noise follows the Hessian, whose eigenvectors depend on the
            images.
    """

    def __init__(self, score: CombinedScore) -> None:
        if score.metrics == {"angle"}:
            raise ValueError(
                "The metric 'angle' reads no images, so a race has none to spare; expected another metric."
            )
        if score.noise == "hessian" and "flatness" in score.metrics:
            raise ValueError(
                "The noise 'hessian' depends on the images that are seen, so that a slice of them has another; "
                "expected another noise, or no race."
            )
        self.score = score
        self.angle: float | None = None
        self._statistics: list[Tensor] | None = None
        self._losses: list[np.ndarray] = []
        self._hits: list[np.ndarray] = []
        self._sums: Tensor | None = None
        self._correct: Tensor | None = None

    @property
    def count(self) -> int:
        """Images seen so far."""
        return sum(map(len, self._losses or self._hits))

    def extend(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        recalibration: Iterable[tuple[Tensor, Tensor]] | None = None,
        angle: Callable[[], float] | None = None,
        generator: torch.Generator | None = None,
        common: CommonNoise | None = None,
        parameters: Collection[str] | None = None,
        loss: Loss | None = None,
    ) -> None:
        """Measure the candidate on the images that follow those seen so far.

        Arguments are those of :class:`CombinedScore`, the generator as fresh as at the first call; what is recalibrated
        and the angle are measured at the first call.

        Raises:
            ValueError: As :class:`CombinedScore`.
            MeasurementError: A number is not finite, and the score on all images would not be either.
        """
        score = self.score
        score.check_sources(angle, common)
        if self._statistics is not None:
            load_statistics(model, self._statistics)
        elif recalibration is not None:
            recalibrate_batchnorm(model, recalibration, score.recalibration_momentum)
            self._statistics = saved_statistics(model)
        if "accuracy" in score.metrics:
            hits = image_hits(model, batches)
            found = hits.sum(0).cpu()
            self._correct = found if self._correct is None else self._correct + found
            self._hits.append(hits[:, 0].cpu().numpy())
        if "flatness" in score.metrics:
            images, sums = perturbed_image_losses(
                model,
                batches,
                score,
                generator=generator,
                common=common if score.common else None,
                parameters=parameters,
                loss=loss,
            )
            for batch in sums.cpu().unbind(-1):
                self._sums = batch if self._sums is None else self._sums + batch
            self._losses.append(images.mean(0).T.cpu().numpy())
        if angle is not None and "angle" in score.metrics and self.angle is None:
            self.angle = angle()
        self.measurement()

    def measurement(self) -> Measurement:
        """The score on the images seen so far.

        Raises:
            MeasurementError: It is not finite.
        """
        flat = top = None
        if self._sums is not None:
            columns = zip(*(self._sums / self.count).tolist(), strict=True)
            means = [sum(column) / self.score.draws for column in columns]
            flat = flatness_from_losses(means, self.score.sigmas, self.score.alpha)
        if self._correct is not None:
            top = Accuracy(*(correct / self.count for correct in self._correct.tolist()))
        return self.score.combine(flat, self.angle, top)

    def linearise(self, count: int) -> Linearised:
        """The score linearised at the means of the first ``count`` images that were seen."""
        losses = self._rows(self._losses, count)
        return linearise(self.score, losses, self._rows(self._hits, count), self.angle)

    def standard_error(self, total: int) -> float:
        """Standard error of the score so far as an estimate of that on ``total`` images, drawn without replacement."""
        linear = self.linearise(self.count)
        variance = float(linear.influence.var(ddof=1)) / self.count * (1.0 - self.count / total)
        return linear.rate * math.sqrt(variance)

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far, on the CPU: another process goes on with it to the same last bit."""
        return {
            "statistics": None if self._statistics is None else [value.cpu() for value in self._statistics],
            "sums": self._sums,
            "correct": self._correct,
            "angle": self.angle,
            "losses": list(self._losses),
            "hits": list(self._hits),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._statistics, self._sums, self._correct = (state_dict[name] for name in ("statistics", "sums", "correct"))
        self.angle = state_dict["angle"]
        self._losses, self._hits = list(state_dict["losses"]), list(state_dict["hits"])

    @staticmethod
    def _rows(parts: list[np.ndarray], count: int) -> np.ndarray:
        return np.concatenate(parts)[:count].astype(np.float64) if parts else np.zeros(0)
