"""A smaller output stride: what was skipped by strides is computed too, and what was computed stays the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins import Genotype
from genas_plugins.darts.genotype import OPERATIONS
from genas_plugins.darts.zoo import ZOO
from genas_plugins.spaces import DartsSearchSpace


def random_genotypes(count: int) -> list[Genotype]:
    rng = np.random.default_rng(0)
    return [DartsSearchSpace().sample(rng) for _ in range(count)]


# One input a node, skips of skips, and a reduction cell that does not read its second input.
THIN = (3, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 3, 0)
RANDOM = [*random_genotypes(10), Genotype.from_code(THIN)]
# Every operation on every edge of a reduction cell, where strides are replaced.
UNIFORM = [Genotype([(name, 0), (name, 1)] * 4, [(name, 0), (name, 1)] * 4) for name in OPERATIONS[1:]]


def assert_subsampled(small, randomize, images, genotype: Genotype, sizes: dict[int, list[tuple[int, int]]]) -> None:
    """With each output stride every ``step``-th row and column of a feature is that of the network with its strides."""
    # Normal cells before, between and behind the reductions.
    arguments = {"genotype": genotype, "num_cells": 5, "features_only": True, "dtype": torch.float64}
    strided = randomize(small(**arguments)).eval()
    for output_stride in sizes:
        dilated = small(output_stride=output_stride, **arguments).eval()
        dilated.load_state_dict(strided.state_dict())
        for size in sizes[output_stride]:
            x = images(2, 3, *size, dtype=torch.float64)
            with torch.no_grad():
                expected, actual = strided(x), dilated(x)
            for one, other, stride in zip(actual, expected, (4, 8, 16, 32), strict=True):
                step = max(1, stride // output_stride)
                assert one.shape[2:] == tuple(math.ceil(pixels * step / stride) for pixels in size)
                assert other.abs().max() > 0.1
                torch.testing.assert_close(one[:, :, ::step, ::step], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_published_genotypes(small, randomize, images, name):
    assert_subsampled(small, randomize, images, ZOO[name].genotype, {16: [(97, 70)], 8: [(70, 97), (64, 64)]})


@pytest.mark.parametrize("genotype", RANDOM, ids=str)
def test_random_genotypes(small, randomize, images, genotype):
    assert_subsampled(small, randomize, images, genotype, {16: [(75, 98)], 8: [(75, 98)]})


@pytest.mark.parametrize("genotype", UNIFORM, ids=OPERATIONS[1:])
def test_each_operation(small, randomize, images, genotype):
    assert_subsampled(small, randomize, images, genotype, {16: [(33, 62)], 8: [(129, 40)]})


@pytest.mark.parametrize("num_cells", [2, 3, 14])
def test_any_number_of_cells(small, randomize, images, num_cells):
    # With two cells both are reductions, and one follows the other.
    def build(**arguments: object) -> nn.Module:
        return randomize(small(num_cells=num_cells, dtype=torch.float64, **arguments)).eval()

    x = images(1, 3, 97, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = build().forward_features(x)
        for output_stride, step in ((16, 2), (8, 4)):
            actual = build(output_stride=output_stride).forward_features(x)
            torch.testing.assert_close(actual[:, :, ::step, ::step], expected, rtol=1e-12, atol=1e-12)


def test_32_is_the_network_itself(small, images):
    plain, model = small().eval(), small(output_stride=32).eval()
    assert str(plain) == str(model)
    x = images(2, 3, 64, 97)
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("output_stride", [16, 8])
def test_strides_that_are_declared(small, images, output_stride):
    model = small(output_stride=output_stride, auxiliary=True)
    assert [info["reduction"] for info in model.feature_info] == [
        min(stride, output_stride) for stride in (4, 8, 16, 32)
    ]
    logits, auxiliary = model(images(2, 3, 224, 64))
    assert logits.shape == auxiliary.shape == (2, 10)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.forward_features(images(1, 3, 224, 64)).shape[2:] == (224 // output_stride, 64 // output_stride)


@pytest.mark.parametrize("output_stride", [4, 64, 0, 24])
def test_other_strides_are_refused(small, output_stride):
    with pytest.raises(ValueError, match=f"output_stride must be one of 8, 16, 32, got {output_stride}"):
        small(output_stride=output_stride)
