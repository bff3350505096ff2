"""Flatness: Eq. 4 by hand, expected losses in closed form, a float64 brute force, and no traces."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins import CellNetwork, Genotype
from genas_plugins.scoring import (
    CommonNoise,
    MeasurementError,
    flatness,
    flatness_from_losses,
    mean_loss,
    recalibrate_batchnorm,
)
from genas_plugins.scoring.flatness import perturbed_losses
from genas_plugins.scoring.noise import perturbations
from genas_plugins.scoring.perturbation import Perturbation

SIGMAS = (0.01, 0.03, 0.06)
GENOTYPE = Genotype.from_code([3, 5, 0, 4, 4, 0, 0, 4, 5, 0, 4, 0, 0, 7, 6, 3, 2, 0, 5, 0, 5, 0, 7, 0, 1, 1, 0, 0])
NOISES = ("cumulative", "independent", "shared")


class Quadratic(nn.Module):
    """A network whose cross-entropy for label 0 is exactly ``base + sum_i a_i theta_i^2 / 2``.

    Half of the parameters live in ``cells``. The softmax of the logits ``(-log(e^L - 1), 0)`` gives ``L``.
    """

    base = 2.0

    def __init__(self, dimension: int = 20_000) -> None:
        super().__init__()
        # Not random: a generator with the seed of the noise would correlate the two.
        self.curvature = torch.linspace(0.1, 2.0, 2 * dimension, dtype=torch.float64).view(2, -1)
        self.outside = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))
        self.cells = nn.ModuleList([nn.ParameterList([torch.zeros(dimension, dtype=torch.float64)])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = torch.stack([self.outside, self.cells[0][0]])
        loss = self.base + (self.curvature * theta.square()).sum() / 2
        first = (-loss.expm1().log()).expand(len(x))
        return torch.stack([first, torch.zeros_like(first)], 1)


def small_network(dtype: torch.dtype = torch.float64) -> CellNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CellNetwork(GENOTYPE, 4, 3, 6, stem="cifar").to(dtype)
    recalibrate_batchnorm(network, batches(dtype))
    return network


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unequal size: the loss is a mean over images, not over batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator).to(dtype), torch.randint(6, (n,), generator=generator))
        for n in (8, 8, 3)
    ]


@pytest.mark.parametrize(
    ("noise", "variances"),
    [
        # Cumulative: 0.01^2, + (0.03 - 0.01)^2, + (0.06 - 0.03)^2.
        ("cumulative", (1e-4, 1e-4 + 4e-4, 1e-4 + 4e-4 + 9e-4)),
        ("independent", (1e-4, 9e-4, 36e-4)),
        ("shared", (1e-4, 9e-4, 36e-4)),
        ("random_walk", (1e-4, 9e-4, 36e-4)),
    ],
)
@pytest.mark.parametrize("where", ["all", "cells"])
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_loss_of_a_quadratic(noise, variances, where, seed):
    model = Quadratic()
    curvature = model.curvature if where == "all" else model.curvature[1]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(3, dtype=torch.long)
    result = flatness(model, [(labels, labels)], SIGMAS, noise=noise, where=where, generator=generator)
    # The loss under N(0, v) noise has mean base + v trace / 2 and variance v^2 sum(a^2) / 2.
    for loss, variance in zip(result.losses, variances, strict=True):
        error = variance * math.sqrt(curvature.square().sum() / 2)
        assert abs(loss - model.base - variance * curvature.sum() / 2) < 4 * error
    rises = [(loss - model.base) / variance for loss, variance in zip(result.losses, variances, strict=True)]
    assert (max(rises) - min(rises) < 1e-9 * max(rises)) is (noise == "shared")
    assert mean_loss(model, [(labels, labels)]) == pytest.approx(model.base, rel=1e-14)


def brute_force(model, data, sigmas, noise, where, seed, dtype) -> list[float]:
    """Losses from noise added in place, in float64, to a copy of the whole model."""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, _ in model.named_parameters() if where == "all" or n.startswith("cells.")]
    sizes = [model.get_parameter(name).numel() for name in names]

    def draw() -> list[torch.Tensor]:
        flat = torch.randn(sum(sizes), generator=generator, dtype=dtype)
        return list(flat.double().split(sizes))

    fixed, losses = draw() if noise == "shared" else None, []
    noisy = copy.deepcopy(model).double().eval()
    for i, sigma in enumerate(sigmas):
        scale = sigma - (sigmas[i - 1] if i else 0.0) if noise == "cumulative" else sigma
        if noise != "cumulative":
            noisy = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for name, piece in zip(names, fixed or draw(), strict=True):
                parameter = noisy.get_parameter(name)
                parameter += scale * piece.view_as(parameter)
            log_p = [torch.log_softmax(noisy(images.double()), 1)[range(len(y)), y] for images, y in data]
        losses.append(-float(torch.cat(log_p).mean()))
    return losses


@pytest.mark.parametrize("where", ["all", "cells"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_brute_force(noise, where, dtype, tolerance):
    model, data = small_network(dtype), batches(dtype)
    generator = torch.Generator().manual_seed(5)
    result = flatness(model, data, SIGMAS, noise=noise, where=where, generator=generator)
    expected = brute_force(model, data, SIGMAS, noise, where, 5, dtype)
    assert result.losses == pytest.approx(expected, rel=tolerance)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("noise", ["cumulative", "independent", "shared", "random_walk"])
def test_relative_noise_is_as_large_as_a_share_of_each_tensor(noise: str) -> None:
    tensors = {"a": torch.full((40, 100), 3.0), "b": torch.linspace(-1, 1, 5000), "zero": torch.zeros(9)}
    model = nn.ParameterDict(tensors)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn, scaled = (
        list(
            perturbations(
                model, ["a", "b", "zero"], Perturbation(sigmas=(0.1, 0.2), noise=noise, relative=relative), generator
            )
        )
        for generator, relative in zip(generators, (False, True), strict=True)
    )
    for plain, ours in zip(drawn, scaled, strict=True):
        # A uniform variable on (-1, 1) has variance 1/3.
        for name, size in (("a", 3.0), ("b", math.sqrt(1 / 3)), ("zero", 0.0)):
            noise_of = [(tensors[name] - model[name]).detach() for tensors in (plain, ours)]
            torch.testing.assert_close(noise_of[1], size * noise_of[0], rtol=1e-3, atol=1e-5)
    if noise != "cumulative":
        assert float((scaled[1]["a"] - model["a"]).detach().std()) == pytest.approx(0.2 * 3, rel=0.05)


def test_draws_are_measurements_of_their_own_and_their_losses_are_averaged():
    model, data = small_network(), batches()
    alone = [flatness(model, data, SIGMAS, generator=torch.Generator().manual_seed(3 + d)).losses for d in range(4)]
    assert perturbed_losses(model, data, SIGMAS, generator=torch.Generator().manual_seed(3), draws=4) == [
        list(losses) for losses in alone
    ]
    result = flatness(model, data, SIGMAS, generator=torch.Generator().manual_seed(3), draws=4, alpha=0.5)
    means = np.mean(alone, axis=0)
    assert result.losses == pytest.approx(means, rel=1e-14)
    assert result.score == pytest.approx(flatness_from_losses(means, SIGMAS, 0.5).score, rel=1e-12)


def test_common_noise_needs_no_generator():
    model, data = small_network(), batches()
    first, again, other = (flatness(model, data, SIGMAS, common=CommonNoise(model, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.losses != other.losses


def test_named_parameters_alone_move():
    model, data = small_network(), batches()
    names = ["classifier.bias", "stem.0.weight"]
    result = flatness(model, data, SIGMAS, parameters=names, generator=torch.Generator().manual_seed(2))
    others = copy.deepcopy(model)
    assert result.losses != (mean_loss(others, data),) * 3
    draw = torch.randn(
        6 + model.stem[0].weight.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    with torch.no_grad():
        # Model order: the stem comes before the classifier.
        others.stem[0].weight += 0.01 * draw[:-6].view_as(others.stem[0].weight)
        others.classifier.bias += 0.01 * draw[-6:]
    assert result.losses[0] == pytest.approx(mean_loss(others, data), rel=1e-12)


def test_same_seed_same_result_and_no_generator_is_seed_zero():
    model, data = small_network(), batches()
    first = flatness(model, data, SIGMAS)
    assert first == flatness(model, data, SIGMAS, generator=torch.Generator().manual_seed(0))
    assert first.losses != flatness(model, data, SIGMAS, generator=torch.Generator().manual_seed(1)).losses


def test_equation_4_by_hand():
    # |2.3 - 2| / 0.002 + |2.1 - 2.3| / 0.003 = 150 + 66.6667; 2 / 0.001 = 2000.
    result = flatness_from_losses([2.0, 2.3, 2.1], (1e-3, 3e-3, 6e-3), alpha=0.5)
    assert result.slope == pytest.approx(216.0 + 2 / 3, rel=1e-12)
    assert result.depth == pytest.approx(2000.0, rel=1e-12)
    assert result.score == pytest.approx(1 / (1216 + 2 / 3 + 1e-5), rel=1e-12)
    assert result.slope_share == pytest.approx((216 + 2 / 3) / (1216 + 2 / 3), rel=1e-7)
    assert flatness_from_losses([0.0, 0.0], (1.0, 2.0)).score == pytest.approx(1e5)


def test_flatness_is_equation_4_of_its_losses():
    result = flatness(small_network(), batches(), SIGMAS, alpha=2.0)
    a, b, c = result.losses
    assert result.score == pytest.approx(1 / (abs(b - a) / 0.02 + abs(c - b) / 0.03 + 2 * a / 0.01 + 1e-5), rel=1e-12)


def snapshot(model: nn.Module) -> list[object]:
    """Everything that a measurement must leave as it was."""
    numpy_state = np.random.get_state()
    return [
        [(name, value.tolist()) for name, value in model.state_dict().items()],
        [(id(p), p.data_ptr(), p.requires_grad, p.grad) for p in model.parameters()],
        [(module.training, getattr(module, "momentum", None)) for module in model.modules()],
        torch.get_rng_state().tolist(),
        (numpy_state[1].tolist(), *numpy_state[2:]),
        random.getstate(),
    ]


class SecondPassFails(list):
    """Batches of which the second pass, that of the second sigma, fails after one batch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        yield self[0]
        if self.passes == 2:
            raise OSError("unreadable")
        yield from self[1:]


def measurable_network() -> CellNetwork:
    network = small_network().train()
    network.cells[1].eval()
    network.cells[0].preprocess0.op[2].momentum = 0.25
    network.add_module("unused", nn.Dropout(0.5))
    return network


@pytest.mark.parametrize("noise", NOISES)
def test_no_traces_after_success(noise):
    network = measurable_network()
    before = snapshot(network)
    flatness(network, batches(), SIGMAS, noise=noise)
    assert snapshot(network) == before


def test_no_traces_after_a_failing_loader():
    network = measurable_network()
    before = snapshot(network)
    with pytest.raises(OSError, match="unreadable"):
        flatness(network, SecondPassFails(batches()), SIGMAS)
    assert snapshot(network) == before


def test_a_loss_that_is_not_finite_is_a_measurement_error_without_traces():
    network = measurable_network()
    images, labels = batches()[0]
    before = snapshot(network)
    with pytest.raises(MeasurementError, match=r"sigma 0\.01 is nan"):
        flatness(network, [(images * math.nan, labels)], SIGMAS)
    assert snapshot(network) == before
    with pytest.raises(MeasurementError, match=r"sigma 0\.06 is inf"):
        flatness_from_losses([1.0, 2.0, math.inf], SIGMAS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": (0.1,)}, "at least two positive"),
        ({"sigmas": (0.1, 0.1)}, "strictly increasing"),
        ({"sigmas": (0.2, 0.1)}, "strictly increasing"),
        ({"sigmas": (0.0, 0.1)}, "positive"),
        ({"sigmas": (0.1, math.inf)}, "at least two positive"),
        ({"sigmas": (0.1, math.nan)}, "at least two positive"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1"),
        ({"alpha": math.nan}, "alpha must be at least 0, got nan"),
        ({"noise": "uniform"}, "valid choices: cumulative, independent, shared, random_walk, hessian"),
        ({"noise": "hessian", "common": CommonNoise(small_network(), 0)}, "'hessian' cannot be common"),
        ({"noise": "hessian", "hessian_directions": 0}, "hessian_directions must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"where": "stem"}, "valid choices: all, cells"),
        ({"parameters": ["nothing.weight"]}, "no parameters named nothing.weight"),
        ({"parameters": []}, "No parameter of CellNetwork"),
        ({"parameters": ["stem.0.weight"], "where": "cells"}, "attribute named cells"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        flatness(**{"model": small_network(), "batches": batches(), "sigmas": SIGMAS, **change})


def test_losses_must_match_the_sigmas():
    with pytest.raises(ValueError, match="each of the 3 sigmas, got 2"):
        flatness_from_losses([1.0, 2.0], SIGMAS)
