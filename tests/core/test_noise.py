"""Noise on weights: its standard deviation in closed form, its streams, and what candidates have in common."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from genas_plugins import ZOO
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.nasbench201 import NasBench201SuperNet
from genas_plugins.scoring import CommonNoise
from genas_plugins.scoring.noise import noise_shares, perturbations
from genas_plugins.scoring.perturbation import Perturbation
from genas_plugins.spaces import NasBench201Architecture

SIGMAS = (0.01, 0.03, 0.06)
NOISES = ("cumulative", "independent", "shared", "random_walk")


def tensors(size: int = 200_000) -> nn.ParameterDict:
    return nn.ParameterDict({"a": torch.full((size // 100, 100), 3.0), "b": torch.linspace(-1, 1, 5000)})


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("common", [False, True])
def test_standard_deviations_are_those_of_the_definition(noise: str, common: bool) -> None:
    model = tensors()
    shared = CommonNoise(model, 3) if common else None
    steps = {"cumulative": (0.01, 0.02, 0.03)}.get(noise)
    found = perturbations(
        model, ["a"], Perturbation(sigmas=SIGMAS, noise=noise), torch.Generator().manual_seed(3), common=shared
    )
    for step, (sigma, noisy) in enumerate(zip(SIGMAS, found, strict=True)):
        # Variances of independent steps add up.
        expected = sigma if steps is None else math.sqrt(sum(s**2 for s in steps[: step + 1]))
        drawn = (noisy["a"] - model["a"]).detach()
        # Five standard errors of 200,000 draws: those of a standard deviation are 1 / sqrt(2 n), of a mean 1 / sqrt(n).
        assert float(drawn.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * drawn.numel()))
        assert abs(float(drawn.mean())) < 5 * expected / math.sqrt(drawn.numel())


@pytest.mark.parametrize("noise", NOISES)
def test_the_stream_is_one_draw_for_all_tensors_at_each_sigma(noise: str) -> None:
    model = tensors(1000)
    generator = torch.Generator().manual_seed(8)
    draws = [torch.randn(6000, generator=generator) for _ in SIGMAS]
    expected = torch.cat([model["a"].flatten(), model["b"]]).detach()
    weights, previous = expected, 0.0
    found = perturbations(model, ["a", "b"], Perturbation(sigmas=SIGMAS, noise=noise), torch.Generator().manual_seed(8))
    for sigma, draw, noisy in zip(SIGMAS, draws, found, strict=True):
        if noise == "cumulative":
            expected = torch.add(expected, draw, alpha=sigma - previous)
        elif noise == "random_walk":
            expected = torch.add(expected, draw, alpha=math.sqrt(sigma**2 - previous**2))
        else:
            expected = torch.add(weights, draws[0] if noise == "shared" else draw, alpha=sigma)
        previous = sigma
        assert torch.equal(torch.cat([noisy["a"].flatten(), noisy["b"]]), expected)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_its_shares_of_the_draws_and_as_large_as_its_definition(noise: str) -> None:
    model = tensors(1000).double()
    generator = torch.Generator().manual_seed(8)
    draws = [torch.randn(6000, generator=generator, dtype=torch.float64) for _ in SIGMAS]
    weights = torch.cat([model["a"].flatten(), model["b"]]).detach()
    found = perturbations(model, ["a", "b"], Perturbation(sigmas=SIGMAS, noise=noise), torch.Generator().manual_seed(8))
    shares = noise_shares(Perturbation(sigmas=SIGMAS, noise=noise))
    assert shares[0] == SIGMAS[:1]
    for noisy, factors in zip(found, shares, strict=True):
        expected = weights + sum(factor * draw for factor, draw in zip(factors, draws, strict=False))
        torch.testing.assert_close(torch.cat([noisy["a"].flatten(), noisy["b"]]), expected, rtol=0, atol=1e-13)
    if noise != "cumulative":
        assert [math.hypot(*factors) for factors in shares] == pytest.approx(SIGMAS, rel=1e-12)


def test_draws_have_streams_of_their_own() -> None:
    model = tensors(1000)

    def first(seed: int, draw: int, common: CommonNoise | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return next(perturbations(model, ["a", "b"], Perturbation(sigmas=SIGMAS), generator, draw=draw, common=common))[
            "a"
        ]

    assert torch.equal(first(5, 2), first(7, 0))
    assert torch.equal(first(5, 2, CommonNoise(model, 1)), first(9, 2, CommonNoise(model, 1)))
    drawn = [first(5, 0), first(5, 1), *(first(5, draw, CommonNoise(model, s)) for s in (1, 2) for draw in (0, 1))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def noise_of(supernet: nn.Module, subnet: nn.Module, noise: str = "cumulative") -> list[dict[str, Tensor]]:
    """The noise at each sigma by the supernet's name, whatever the subnet calls it."""
    names = {id(parameter): name for name, parameter in supernet.named_parameters()}
    parameters = dict(subnet.named_parameters())
    found = perturbations(subnet, parameters, Perturbation(sigmas=SIGMAS, noise=noise), common=CommonNoise(supernet, 4))
    return [
        {names[id(parameters[name])]: tensor - parameters[name].detach() for name, tensor in noisy.items()}
        for noisy in found
    ]


@pytest.mark.parametrize("noise", NOISES)
def test_subnets_get_the_same_noise_on_what_they_share(noise: str) -> None:
    supernet = NasBench201SuperNet(init_channels=2, cells_per_stage=1)
    texts = (
        "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|nor_conv_3x3~1|none~2|",
        # The same convolution into the first node, and another operation wherever the first has one.
        "|nor_conv_3x3~0|+|nor_conv_1x1~0|none~1|+|nor_conv_3x3~0|nor_conv_1x1~1|nor_conv_1x1~2|",
    )
    first, second = (
        noise_of(supernet, supernet.subnet(NasBench201Architecture.from_string(text)), noise) for text in texts
    )
    for ours, others in zip(first, second, strict=True):
        both = ours.keys() & others.keys()
        assert {name for name in both if ".edges." in name} == {
            f"cells.{cell}.edges.1<-0.{operation}"
            for cell in (0, 2, 4)
            for operation in ("3.op.1.weight", "3.op.2.weight", "3.op.2.bias")
        }
        assert {"stem.0.weight", "classifier.bias"} < both < ours.keys()
        assert all(torch.equal(ours[name], others[name]) for name in both)
        # Kernels of the same shape in the same cell, but not the same kernel.
        mine, other = ours["cells.0.edges.2<-1.2.op.1.weight"], others["cells.0.edges.2<-0.2.op.1.weight"]
        assert mine.shape == other.shape and not torch.equal(mine, other)
    flat = torch.cat([tensor.flatten() for tensor in first[0].values()])
    assert len(flat.unique()) > 0.99 * len(flat)


def test_genotypes_of_the_darts_space_too_and_a_supernet_is_its_own_path() -> None:
    supernet = SuperNet(4, init_channels=4, num_cells=3)
    whole = noise_of(supernet, supernet)
    for genotype in (ZOO[name].genotype for name in list(ZOO)[:2]):
        for ours, every in zip(noise_of(supernet, supernet.subnet(genotype)), whole, strict=True):
            assert ours.keys() < every.keys()
            assert all(torch.equal(tensor, every[name]) for name, tensor in ours.items())


def test_relative_sigmas_scale_common_noise() -> None:
    model = tensors(1000)
    plain, scaled = (
        next(
            perturbations(
                model, ["a", "b"], Perturbation(sigmas=SIGMAS, relative=relative), common=CommonNoise(model, 0)
            )
        )
        for relative in (False, True)
    )
    torch.testing.assert_close(scaled["a"] - model["a"], 3.0 * (plain["a"] - model["a"]), rtol=1e-4, atol=1e-6)


def test_what_is_not_the_supernets_is_refused() -> None:
    supernet = NasBench201SuperNet(init_channels=2, cells_per_stage=1)
    other = NasBench201SuperNet(init_channels=2, cells_per_stage=1)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3, 3\) is none of the supernet's"):
        noise_of(supernet, other.subnet(NasBench201Architecture.from_index(0)))
