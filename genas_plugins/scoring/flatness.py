"""Flatness of the loss surface around trained weights: Eq. 4 of GeNAS (Jeong et al., IJCAI 2023).

The weights are perturbed with Gaussian noise of growing standard deviation; an architecture is better the
less its validation loss moves (flat) and the lower it is (deep).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genas_plugins._keywords import keywords_of
from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.hessian import noise_directions
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.scoring.losses import Loss, SummedLoss, check_summed, loss_of_each, loss_of_image, summed_loss
from genas_plugins.scoring.noise import CommonNoise, noise_shares, perturbations
from genas_plugins.scoring.perturbation import Noise, Perturbation, Where, check_sigmas

__all__ = [
    "Flatness",
    "MeasurementError",
    "Where",
    "check_sigmas",
    "flatness",
    "flatness_from_losses",
    "mean_loss",
    "perturbed_image_losses",
    "perturbed_losses",
]

Result = TypeVar("Result")
_EPSILON = 1e-5


@dataclass(frozen=True)
class Flatness:
    """Eq. 4 and its two terms.

    Attributes:
        score: ``1 / (slope + alpha * depth + 1e-5)``; higher is better.
        losses: Mean validation cross-entropy in nats at each sigma, over all draws of the noise.
        sigmas: Standard deviations of the noise on the weights.
        slope: ``sum_i |L(s_{i+1}) - L(s_i)| / (s_{i+1} - s_i)``, how fast the loss moves.
        depth: ``|L(s_1) / s_1|``, how low it lies, in units of the first sigma.
        alpha: Weight of the depth term.
    """

    score: float
    losses: tuple[float, ...]
    sigmas: tuple[float, ...]
    slope: float
    depth: float
    alpha: float

    @property
    def slope_share(self) -> float:
        """Fraction of ``1 / score`` that the slope term makes up; the rest is depth."""
        return self.slope * self.score


def flatness_from_losses(losses: Sequence[float], sigmas: Sequence[float], alpha: float = 1.0) -> Flatness:
    """Eq. 4 from losses that are known already.

    >>> found = flatness_from_losses((1.0, 1.5), (0.1, 0.2))
    >>> round(found.slope, 6), round(found.depth, 6), round(found.score, 6)
    (5.0, 10.0, 0.066667)

    Args:
        losses: Mean validation loss in nats at each sigma.
        sigmas: Strictly increasing standard deviations, as many.
        alpha: Weight of the depth term, at least 0.

    Raises:
        ValueError: Wrong sigmas, another number of losses, or a negative alpha.
        MeasurementError: A loss is not finite.
    """
    sigmas = check_sigmas(sigmas)
    losses = tuple(float(loss) for loss in losses)
    if len(losses) != len(sigmas):
        raise ValueError(f"Expected one loss for each of the {len(sigmas)} sigmas, got {len(losses)}.")
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be at least 0, got {alpha}.")
    for sigma, loss in zip(sigmas, losses, strict=True):
        if not math.isfinite(loss):
            raise MeasurementError(f"The validation loss at sigma {sigma:g} is {loss}.")
    slope = sum(abs(losses[i + 1] - losses[i]) / (sigmas[i + 1] - sigmas[i]) for i in range(len(sigmas) - 1))
    depth = abs(losses[0] / sigmas[0])
    return Flatness(1.0 / (slope + alpha * depth + _EPSILON), losses, sigmas, slope, depth, alpha)


@keywords_of(Perturbation)
def flatness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    sigmas: Perturbation | Sequence[float],
    alpha: float = 1.0,
    noise: Noise | None = None,
    where: Where | None = None,
    generator: torch.Generator | None = None,
    *,
    common: CommonNoise | None = None,
    parameters: Collection[str] | None = None,
    loss: Loss | None = None,
    **settings: Any,
) -> Flatness:
    """Measure Eq. 4 of GeNAS on a network whose batch normalisation is calibrated.

    The model is not changed: noise is added to copies of its parameters, all of them (convolutions, weight
    and bias of batch normalisation, classifier) unless ``where`` or ``parameters`` restricts them. Mode,
    buffers and the global random state are bit-equal before and after, also when a batch fails.

    Noise on the weights of a linear layer does nothing to images of zeros; the loss of two classes is log 2:

    >>> images, labels = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    >>> found = flatness(nn.Linear(3, 2, bias=False), [(images, labels)], (0.1, 0.2))
    >>> found.slope, round(found.depth, 4)
    (0.0, 6.9315)

    Args:
        model: Maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
        batches: Validation images and labels ``(N,)`` on the model's device; iterated once per sigma.
        sigmas: A :class:`Perturbation`, or standard deviations of the noise, strictly increasing, with its other
            settings as keywords.
        alpha: Weight of the depth term.
        noise: Kind of the noise, see :class:`Perturbation`.
        where: Which parameters are perturbed, see :class:`Perturbation`.
        generator: Source of the noise, on any device. ``None`` is a generator with seed 0.
        common: Noise that all candidates share, in place of ``generator``.
        parameters: Names to perturb; ``None`` for all. For a supernet that runs with one path fixed: the
            names on that path.
        loss: Function of outputs and labels: one number an image, or their mean; PyTorch's losses are asked for the
            former. ``None`` is cross-entropy in nats of class numbers. There an image with the label -100 or 255 has
            none and does not enter the mean, unless that is one of the network's classes; another loss gets all images.
        **settings: The other settings of :class:`Perturbation`.

    Raises:
        TypeError: Settings that :class:`Perturbation` does not have.
        ValueError: Settings that it refuses, a negative alpha, names that do not exist, no parameter left to perturb,
            no batches, or labels that do not fit the network or the loss.
        MeasurementError: A loss, or the Hessian, is not finite.
    """
    perturbation = Perturbation.of(sigmas, noise=noise, where=where, **settings)
    losses = perturbed_losses(
        model, batches, perturbation, generator=generator, common=common, parameters=parameters, loss=loss
    )
    means = [sum(column) / perturbation.draws for column in zip(*losses, strict=True)]
    return flatness_from_losses(means, perturbation.sigmas, alpha)


@keywords_of(Perturbation)
def perturbed_losses(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    sigmas: Perturbation | Sequence[float],
    *,
    generator: torch.Generator | None = None,
    common: CommonNoise | None = None,
    parameters: Collection[str] | None = None,
    loss: Loss | None = None,
    known: dict[Any, Any] | None = None,
    **settings: Any,
) -> list[list[float]]:
    """What :func:`flatness` is computed from: for each draw of the noise the mean loss in nats at each sigma.

    Losses that are not finite are returned as they are. Arguments and other errors are those of :func:`flatness`.

    Args:
        known: What earlier calls measured with the same weights, images, loss, ``parameters``, ``common`` and seed of
            the generator; this call reads it and adds to it. Most noises are the same at the same first sigma.
    """
    perturbation = Perturbation.of(sigmas, **settings)
    pairs = _at_each_noise(summed_loss, model, batches, perturbation, generator, common, parameters, loss, known)
    losses, count = _means(pairs), len(perturbation.sigmas)
    return [losses[start : start + count] for start in range(0, len(losses), count)]


@keywords_of(Perturbation)
def perturbed_image_losses(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    sigmas: Perturbation | Sequence[float],
    *,
    generator: torch.Generator | None = None,
    common: CommonNoise | None = None,
    parameters: Collection[str] | None = None,
    loss: Loss | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The losses behind :func:`perturbed_losses`, image by image and batch by batch.

    Arguments and errors are those of :func:`flatness`.

    Returns:
        Loss of each image that has a label, ``(draws, sigmas, N)``, and its sum over each batch in float64,
        ``(draws, sigmas, batches)``. Added up in the order of the batches and divided by ``N``, the sums give
        what :func:`perturbed_losses` returns, bit for bit.
    """
    perturbation = Perturbation.of(sigmas, **settings)
    state = None if generator is None else generator.get_state()
    while True:
        pairs = _at_each_noise(loss_of_each, model, batches, perturbation, generator, common, parameters, loss)
        if len({len(sums) for _, sums in pairs}) == 1:
            break
        # A pass that did not fit the memory has halved the batches on the way.
        if generator is not None:
            generator.set_state(state)
    images, sums = (torch.stack(part).unflatten(0, (perturbation.draws, -1)) for part in zip(*pairs, strict=True))
    return images, sums


def _at_each_noise(
    measure: Callable[..., Result],
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    perturbation: Perturbation,
    generator: torch.Generator | None,
    common: CommonNoise | None,
    parameters: Collection[str] | None,
    loss: Loss | None,
    known: dict[Any, Result] | None = None,
) -> list[Result]:
    """What ``measure`` gives of the perturbed network, for each draw and each sigma of it."""
    # The source decides: noise along eigenvectors is refused with one that is common.
    perturbation = dataclasses.replace(perturbation, common=common is not None)
    names = _perturbed_names(model, perturbation.where, parameters)
    directions: Sequence[dict[str, Tensor]] = ()
    if perturbation.noise == "hessian":
        directions = noise_directions(model, batches, names, perturbation.hessian_directions, generator, loss)
    network = InferenceNetwork.of(model) or model
    loss = loss_of_image(loss)
    found = known if known is not None and perturbation.noise != "hessian" else {}
    # What the noise depends on beside its shares, also what is added to the settings one day.
    alike = dataclasses.replace(perturbation, sigmas=(1.0, 2.0), noise="cumulative", draws=1)
    results = []
    for draw in range(perturbation.draws):
        each = perturbations(model, names, perturbation, generator, draw=draw, common=common, directions=directions)
        for shares, noisy in zip(noise_shares(perturbation), each, strict=True):
            key = (alike, draw, shares)
            if key not in found:
                found[key] = _perturbed(measure, network, noisy, batches, loss)
            results.append(found[key])
    return results


def mean_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss | None = None) -> float:
    """Mean loss over all images that have a label, in evaluation mode and without noise.

    Args:
        model: Maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
        batches: Images and labels on the model's device.
        loss: See :func:`flatness`; ``None`` for cross-entropy in nats.

    Raises:
        ValueError: ``batches`` is empty or has no label, or labels do not fit the network or the loss.
    """
    return _means([_perturbed(summed_loss, InferenceNetwork.of(model) or model, {}, batches, loss_of_image(loss))])[0]


def _means(sums: Sequence[SummedLoss]) -> list[float]:
    """Mean losses, read from the device all at once."""
    totals = [part.total for part in sums]
    values = [totals[0].item()] if len(totals) == 1 else torch.stack(totals).tolist()
    counts: list[float] = [part.count for part in sums]
    if isinstance(counts[0], Tensor):
        # Labels are the same at each sigma.
        counts, outside = [counts[0].item()] * len(sums), sums[0].outside.item()
        check_summed(counts[0], outside, whole=True)
    # Divided here: on a GPU, PyTorch multiplies by the reciprocal, which rounds otherwise.
    return [value / count for value, count in zip(values, counts, strict=True)]


class _Pass(nn.Module):
    """One measurement over all batches as one call, so that parameters are swapped once and not for every batch."""

    def __init__(self, measure: Callable[..., Any], model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        # In tuples: a loss that is a module is not part of the network.
        self._measure = (measure, loss)

    def forward(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Any:
        measure, loss = self._measure
        return measure(self.model, batches, loss)


def _perturbed(
    measure: Callable[..., Result],
    model: nn.Module | InferenceNetwork,
    noisy: dict[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss | None,
) -> Result:
    with torch.no_grad():
        if isinstance(model, InferenceNetwork):
            model.load(noisy)
            return measure(model, batches, loss)
        replaced = {f"model.{name}": tensor for name, tensor in noisy.items()}
        with evaluation_mode(model):
            return functional_call(_Pass(measure, model, loss), replaced, (batches,))


def _perturbed_names(model: nn.Module, where: Where, parameters: Collection[str] | None) -> list[str]:
    existing = [name for name, _ in model.named_parameters()]
    if parameters is not None:
        unknown = sorted(set(parameters) - set(existing))
        if unknown:
            raise ValueError(f"The model has no parameters named {', '.join(unknown[:5])} ({len(unknown)} in all).")
        wanted = set(parameters)
        existing = [name for name in existing if name in wanted]
    if where == "cells":
        existing = [name for name in existing if name.startswith("cells.") or ".cells." in name]
    if not existing:
        raise ValueError(
            f"No parameter of {type(model).__name__} is left to perturb with where={where!r}"
            + ("; its cells must live in an attribute named cells." if where == "cells" else ".")
        )
    return existing
