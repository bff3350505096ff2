"""The settings of what is done to a network before and while it is measured: noise on weights, new statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from genas_plugins.checks import MOST_IMAGES, check_count, check_flag, check_real

__all__ = ["Noise", "Perturbation", "Recalibration", "Where", "check_sigmas"]

Noise = Literal["cumulative", "independent", "shared", "random_walk", "hessian"]
Where = Literal["all", "cells"]

_LEAST_SIGMA, _MOST_SIGMA, _MOST_SIGMAS = 1e-12, 1e6, 100
_MOST_DRAWS, _MOST_DIRECTIONS = 10_000, 1_000


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How weights are perturbed for Eq. 4; the weights are written theta, the sigmas s_1 < s_2 < ...

    >>> Perturbation(sigmas=(0.001, 0.003), noise="shared").draws
    1

    Args:
        sigmas: Standard deviations of the noise, strictly increasing.
        noise: ``"cumulative"`` (the published results): ``theta_1 = theta + N(0, s_1)``, ``theta_{i+1} =
            theta_i + N(0, s_{i+1} - s_i)``, standard deviations. ``"independent"`` (the formula as printed):
            ``theta + N(0, s_i)``, a new draw for each sigma. ``"shared"``: one draw, scaled by each sigma.
            ``"random_walk"``: as the first with steps of ``sqrt(s_{i+1}^2 - s_i^2)``, which make the noise as large
            as sigma says. ``"hessian"``: ``theta + s_i * sum_j z_j v_j`` with one draw of ``z_j ~ N(0, 1)`` for all
            sigmas, Gaussian noise in the span of the eigenvectors ``v_j`` of the Hessian with the largest absolute
            eigenvalues. The Hessian is that of the mean cross-entropy of the first 256 images with respect to all
            perturbed parameters together, over which the eigenvectors have length 1 (Table 7; see
            :func:`genas_plugins.scoring.hessian.top_eigenvectors`).
        where: ``"all"`` parameters, or only those of the ``"cells"`` (Table 7), which spares stem and
            classifier.
        relative: Sigmas are fractions of each tensor's root mean square, as in the directions of Li et al.
            (NeurIPS 2018), there for each filter. A tensor of zeros gets no noise. Along eigenvectors they are
            fractions of the norm of all perturbed parameters together, ``theta + s_i * |theta| * sum_j z_j v_j /
            sqrt(k)``, which makes that noise as long as this one.
        draws: How often the noise is drawn; Eq. 4 is computed from the mean losses. Draw number ``d`` has the seed of
            the generator plus ``d``. Eigenvectors are the same for all draws.
        common: All candidates get the same noise on the parameters that they share
            (:class:`genas_plugins.scoring.noise.CommonNoise`), which lowers the noise of comparisons.
        hessian_directions: Number of eigenvectors ``k`` of the noise ``"hessian"``.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: Sigmas that do not increase, an unknown noise or ``where``, fewer draws or directions than one or
            more than anybody would wait for, or common noise along eigenvectors.
    """

    sigmas: tuple[float, ...] = (2e-3, 1e-2, 2e-2)
    noise: Noise = "cumulative"
    where: Where = "all"
    relative: bool = False
    draws: int = 1
    common: bool = False
    hessian_directions: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", check_sigmas(self.sigmas))
        for name, choices in (("noise", get_args(Noise)), ("where", get_args(Where))):
            if getattr(self, name) not in choices:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; valid choices: {', '.join(choices)}.")
        for name in ("relative", "common"):
            check_flag(name, getattr(self, name))
        if self.noise == "hessian" and self.common:
            raise ValueError(
                "The noise 'hessian' cannot be common: it is along eigenvectors that each candidate has for itself. "
                "Set common to false, or take another noise."
            )
        check_count("draws", self.draws, most=_MOST_DRAWS)
        check_count("hessian_directions", self.hessian_directions, most=_MOST_DIRECTIONS)

    @classmethod
    def of(cls, sigmas: Perturbation | Sequence[float], **settings: Any) -> Perturbation:
        """A perturbation as it is, or one of these sigmas and the settings that are not ``None``.

        Raises:
            TypeError: Settings beside a perturbation, which has its own; or one that is not of its kind.
            ValueError: As the class.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if not isinstance(sigmas, Perturbation):
            return cls(sigmas=sigmas, **given)
        if given:
            raise TypeError(f"A Perturbation has its own {', '.join(given)}: leave out, or pass sigmas instead.")
        return sigmas


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """How the statistics of batch normalisation are recomputed for each candidate.

    >>> Recalibration(images=0).images  # keeps the supernet's statistics
    0

    Args:
        images: Number of training images; 0 keeps the statistics that there are.
        batch_size: Images a batch, at least 2.
        momentum: ``None`` for the cumulative average; 0.1 for the running average of the official code, see
            :func:`genas_plugins.scoring.recalibrate_batchnorm`.

    Raises:
        TypeError: A number is none.
        ValueError: One is out of its range.
    """

    images: int = 850
    batch_size: int = 64
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_count("recalibration_images", self.images, 0, MOST_IMAGES)
        check_count("recalibration_batch_size", self.batch_size, 2)
        check_momentum(self.momentum)


def check_momentum(momentum: float | None) -> float | None:
    """Return the momentum of a recalibration.

    Raises:
        TypeError: It is no number.
        ValueError: It is not in (0, 1].
    """
    if momentum is not None and not 0.0 < check_real("recalibration_momentum", momentum) <= 1.0:
        raise ValueError(f"recalibration_momentum must be None (cumulative average) or in (0, 1], got {momentum}.")
    return momentum


def check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return the sigmas as a tuple of floats.

    Raises:
        TypeError: Text or truth values.
        ValueError: Fewer than two or more than a hundred, not finite, not positive, not strictly increasing also as
            float32, or so small or large that no weight would notice or survive.
    """
    if any(isinstance(sigma, str | bytes | bool) for sigma in sigmas):
        raise TypeError(f"sigmas must be numbers, got {list(sigmas)[:_MOST_SIGMAS]}.")
    values = tuple(float(sigma) for sigma in sigmas)
    increasing = all(low < high for low, high in itertools.pairwise(torch.tensor(values).tolist()))
    if not 2 <= len(values) <= _MOST_SIGMAS or not all(map(math.isfinite, values)) or not increasing:
        raise ValueError(
            f"sigmas must be at least two positive, strictly increasing numbers, for instance (0.001, 0.003, 0.006), "
            f"and at most {_MOST_SIGMAS}; got {list(sigmas)[:_MOST_SIGMAS]}."
        )
    if values[0] < _LEAST_SIGMA or values[-1] > _MOST_SIGMA:
        raise ValueError(
            f"sigmas must be positive, from {_LEAST_SIGMA:g} to {_MOST_SIGMA:g}: what weights of float32 can notice "
            f"and survive; got {list(values)}."
        )
    return values
