"""Relaxed supernets: what a mixture computes, and the architecture that it becomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genas_plugins.darts.genotype import NODES, OPERATIONS, Genotype
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.nasbench201 import NasBench201Architecture
from genas_plugins.nasbench201.architecture import EDGES as BENCHMARK_EDGES
from genas_plugins.nasbench201.networks import NasBench201SuperNet
from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def darts() -> SuperNet:
    torch.manual_seed(0)
    return SuperNet(10, 4, 3)


@pytest.fixture(scope="module")
def benchmark201() -> NasBench201SuperNet:
    torch.manual_seed(0)
    return NasBench201SuperNet(4, 1)


def one_hot(supernet: SuperNet | NasBench201SuperNet, numbers: list[int]) -> dict[str, Tensor]:
    choices = supernet.relaxation.choices
    assert len(choices) == len(numbers)
    return {
        label: F.one_hot(torch.tensor(number), len(options)).float()
        for (label, options), number in zip(choices.items(), numbers, strict=True)
    }


@pytest.mark.parametrize("training", [True, False])
def test_weights_of_zero_and_one_are_a_path(darts, benchmark201, images, training):
    rng = np.random.default_rng(0)
    for _ in range(3):
        genotype = DartsSearchSpace().sample(rng)
        darts.train(training)
        mixed = darts.relaxation.logits(images, one_hot(darts, list(genotype.code)))
        torch.testing.assert_close(mixed, darts(images, genotype))
    for _ in range(5):
        architecture = NasBench201SearchSpace().sample(rng)
        benchmark201.train(training)
        numbers = [benchmark201.relaxation.choices["cell/0_1"].index(name) for name in architecture.operations]
        mixed = benchmark201.relaxation.logits(images, one_hot(benchmark201, numbers))
        torch.testing.assert_close(mixed, benchmark201(images, architecture))


def test_an_edge_is_the_weighted_sum_of_its_operations(benchmark201):
    """One cell in which only the edge from input to output is mixed, with the operations called by hand."""
    cell = benchmark201.cells[0].train()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    rows = [torch.eye(5)[0] for _ in BENCHMARK_EDGES]
    rows[BENCHMARK_EDGES.index((0, 3))] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    _, skip, small, large, pool = cell.edges["3<-0"]
    expected = 0.2 * skip(x) + 0.3 * small(x) + 0.4 * large(x) + 0.5 * pool(x)
    torch.testing.assert_close(cell.mixed(x, rows), expected)


def test_every_weight_gets_a_gradient(darts, images):
    weights = {label: torch.full((8,), 1 / 8, requires_grad=True) for label in darts.relaxation.choices}
    F.cross_entropy(darts.relaxation.logits(images, weights), torch.arange(4)).backward()
    for label, weight in weights.items():
        # That of none, the first, has nothing to change.
        assert weight.grad[0] == 0, label
        # One normal cell and two reductions: all edges take part.
        assert (weight.grad[1:] != 0).all(), label


def strongest(weights: dict[str, np.ndarray], cell: str) -> set[tuple[str, int, int]]:
    """DARTS's rule once more: every pair of edges of a node, by their sum of strengths."""
    kept = set()
    for node in NODES:
        strengths = {source: weights[f"{cell}/{source}_{node}"][1:].max() for source in range(node)}
        first, second = sorted(strengths, key=strengths.__getitem__)[-2:]
        for source in (first, second):
            number = 1 + weights[f"{cell}/{source}_{node}"][1:].argmax()
            kept.add((OPERATIONS[number], source, node))
    return kept


def test_a_mixture_becomes_its_strongest_edges(darts):
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = {label: rng.dirichlet(np.ones(8)) for label in darts.relaxation.choices}
        # The largest weight of all, and yet no operation.
        weights["normal/0_5"] = np.array([0.93] + 7 * [0.01])
        genotype = darts.relaxation.discretize(weights)
        assert isinstance(genotype, Genotype)
        for cell, gene in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            found = {(name, source, NODES[number // 2]) for number, (name, source) in enumerate(gene)}
            assert found == strongest(weights, cell)


def test_equals_keep_the_first(darts, benchmark201):
    even = {label: [1 / 8] * 8 for label in darts.relaxation.choices}
    genotype = darts.relaxation.discretize(even)
    assert genotype.normal == genotype.reduce == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * len(NODES)
    even = {label: [1 / 5] * 5 for label in benchmark201.relaxation.choices}
    assert benchmark201.relaxation.discretize(even) == NasBench201Architecture(6 * ("none",))
