"""Scores of one candidate: a single metric, or two of them combined by Eq. 5 of GeNAS (IJCAI 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins._keywords import renamed
from genas_plugins.checks import check_real
from genas_plugins.scoring.accuracy import Accuracy, accuracy
from genas_plugins.scoring.batchnorm import recalibrate_batchnorm
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.flatness import Flatness, flatness
from genas_plugins.scoring.losses import Loss
from genas_plugins.scoring.noise import CommonNoise
from genas_plugins.scoring.perturbation import Perturbation, check_momentum

__all__ = ["METRICS", "CombinedScore", "Measurement"]

METRICS: tuple[str, ...] = (
    "flatness",
    "angle",
    "accuracy",
    "angle+flatness",
    "accuracy+flatness",
    "angle+accuracy",
)
_MOST_WEIGHT = 1e9


@dataclass(frozen=True)
class Measurement:
    """What was measured on one candidate.

    Attributes:
        score: What the search maximises.
        shares: Fraction of the score that each metric contributes (the paper's "Flatness (%)"), and under
            ``"slope"`` the fraction of Eq. 4 that the slope term makes up.
        flatness: Eq. 4, where the metric contains it.
        angle: Fraction of pi, where the metric contains it.
        accuracy: On the validation images, where the metric contains it.
        neighbourhood: Where the score is that of a neighbourhood: the architecture's ``own`` score, how many ``scores``
            were put together, how many ``failed``, and how many architectures were measured anew (``new``).
    """

    score: float
    shares: dict[str, float] = field(default_factory=dict)
    flatness: Flatness | None = None
    angle: float | None = None
    accuracy: Accuracy | None = None
    neighbourhood: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; metrics that were not measured are left out."""
        data: dict[str, Any] = {"score": self.score, "shares": self.shares}
        if self.flatness is not None:
            data["flatness"] = self.flatness.score
            data["sigmas"] = list(self.flatness.sigmas)
            data["losses"] = list(self.flatness.losses)
            data["slope"] = self.flatness.slope
            data["depth"] = self.flatness.depth
        if self.angle is not None:
            data["angle"] = self.angle
        if self.accuracy is not None:
            data["top1"] = self.accuracy.top1
            data["top5"] = self.accuracy.top5
        if self.neighbourhood is not None:
            data["neighbourhood"] = self.neighbourhood
        return data


@dataclass(frozen=True, kw_only=True)
class CombinedScore(Perturbation):
    """The settings of a score, and the call that measures it on one network.

    >>> sorted(CombinedScore(metric="angle+flatness", sigmas=(0.001, 0.003)).metrics)
    ['angle', 'flatness']

    Beside its own settings it has those of :class:`Perturbation`, which flatness is measured with.

    Args:
        metric: One of :data:`METRICS`. With flatness, ``S + gamma * F / s_1`` (Eq. 5), where ``S`` is the
            angle as a fraction of pi or the top-1 accuracy as a fraction; ``"angle+accuracy"`` is ``angle +
            gamma_accuracy * top1`` (Table 10).
        alpha: Weight of the depth term of Eq. 4.
        gamma: Weight of the flatness term (the paper: 16 with angle, Table 8; 32 with accuracy, Table 9).
        gamma_accuracy: Weight of the accuracy in ``"angle+accuracy"`` (Table 10: 0.1 is best).
        recalibration_momentum: ``None`` for the cumulative average of batch statistics, 0.1 for the official code's
            running average; was called ``momentum``, which is still taken.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: An unknown metric, a weight that is negative or not finite, or what :class:`Perturbation` refuses.
    """

    metric: str = "flatness"
    alpha: float = 1.0
    gamma: float = 16.0
    gamma_accuracy: float = 0.1
    recalibration_momentum: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"Unknown metric {self.metric!r}; valid metrics: {', '.join(METRICS)}.")
        super().__post_init__()
        for name in ("alpha", "gamma", "gamma_accuracy"):
            check_real(name, getattr(self, name), least=0, most=_MOST_WEIGHT)
        check_momentum(self.recalibration_momentum)

    @property
    def momentum(self) -> float | None:
        """The name that ``recalibration_momentum`` had."""
        return self.recalibration_momentum

    @property
    def metrics(self) -> frozenset[str]:
        """The single metrics that are measured."""
        return frozenset(self.metric.split("+"))

    def __call__(
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
    ) -> Measurement:
        """Measure one candidate.

        Args:
            model: A candidate that owns its statistics of batch normalisation (a subnet); they are replaced
                when ``recalibration`` is given, and nothing else is.
            batches: Validation images and labels.
            recalibration: Training images for the statistics; ``None`` keeps those that the model has.
            angle: Gives the angle as a fraction of pi; needed where the metric contains it.
            generator: Source of the noise, unless it is common.
            common: Source of the noise that is common to all candidates; needed where the setting ``common`` is set.
            parameters: Names of the parameters to perturb; ``None`` for all.
            loss: See :func:`genas_plugins.scoring.flatness`; ``None`` for cross-entropy.

        Raises:
            ValueError: The metric contains the angle and ``angle`` is missing, or the noise is to be common and
                ``common`` is missing.
            MeasurementError: A number is not finite.
        """
        self.check_sources(angle, common)
        if recalibration is not None and self.metrics != {"angle"}:
            recalibrate_batchnorm(model, recalibration, self.recalibration_momentum)
        top = accuracy(model, batches) if "accuracy" in self.metrics else None
        flat = None
        if "flatness" in self.metrics:
            flat = flatness(
                model,
                batches,
                self,
                self.alpha,
                generator=generator,
                common=common if self.common else None,
                parameters=parameters,
                loss=loss,
            )
        return self.combine(flat, angle() if "angle" in self.metrics and angle is not None else None, top)

    def check_sources(self, angle: Callable[[], float] | None, common: CommonNoise | None) -> None:
        """Raise if a measurement lacks what the metric needs.

        Raises:
            ValueError: As :meth:`__call__`.
        """
        if "angle" in self.metrics and angle is None:
            raise ValueError(f"The metric {self.metric!r} needs the angle to the initial weights; pass angle=.")
        if self.common and "flatness" in self.metrics and common is None:
            raise ValueError("Noise that candidates have in common needs their supernet; pass common=CommonNoise(...).")

    def combine(
        self, flat: Flatness | None = None, angle: float | None = None, top: Accuracy | None = None
    ) -> Measurement:
        """Combine measured metrics into a score and the share of each (Eq. 5).

        Raises:
            MeasurementError: The score is not finite.
        """
        terms: dict[str, float] = {}
        if angle is not None:
            terms["angle"] = angle
        if top is not None:
            terms["accuracy"] = top.top1 * (self.gamma_accuracy if angle is not None else 1.0)
        if flat is not None:
            terms["flatness"] = flat.score * (self.gamma / flat.sigmas[0] if terms else 1.0)
        score = sum(terms.values())
        if not math.isfinite(score):
            raise MeasurementError(f"The score is {score}: " + ", ".join(f"{k} {v}" for k, v in terms.items()) + ".")
        shares = {name: term / score if score else 0.0 for name, term in terms.items()}
        if flat is not None:
            shares["slope"] = flat.slope_share
        return Measurement(score, shares, flat, angle, top)


CombinedScore.__init__ = renamed(CombinedScore.__init__, momentum="recalibration_momentum")  # type: ignore[method-assign]
