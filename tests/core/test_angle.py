"""The angle against an architecture vector assembled path by path from the published parameter names."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins import ZOO, Genotype, SuperNet
from genas_plugins.darts.genotype import path_counts
from genas_plugins.scoring import angle, parameter_angle
from genas_plugins.spaces import DartsSearchSpace

# Every way from an input (0 or 1) to an intermediate node.
TO_2 = [[0, 2], [1, 2]]
TO_3 = [[0, 3], [1, 3], [0, 2, 3], [1, 2, 3]]
TO_4 = [[0, 4], [1, 4], [0, 2, 4], [1, 2, 4], [0, 3, 4], [1, 3, 4], [0, 2, 3, 4], [1, 2, 3, 4]]
TO_5 = [[0, 5], [1, 5], [0, 2, 5], [1, 2, 5], [0, 3, 5], [1, 3, 5], [0, 2, 3, 5], [1, 2, 3, 5]]
TO_5 += [
    [0, 4, 5],
    [1, 4, 5],
    [0, 2, 4, 5],
    [1, 2, 4, 5],
    [0, 3, 4, 5],
    [1, 3, 4, 5],
    [0, 2, 3, 4, 5],
    [1, 2, 3, 4, 5],
]
PATHS = TO_2 + TO_3 + TO_4 + TO_5
OFFSETS = {2: 0, 3: 2, 4: 5, 5: 9}
CELLS = 3
# One input a node, skips of skips, and a reduction cell that does not read its second input.
THIN = (3, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 3, 0)
ONE_INPUT = [ZOO["fairdarts_b_c10"].genotype, Genotype.from_code(THIN)]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def random_supernet(stem: str, seed: int, around: SuperNet | None = None) -> SuperNet:
    """A supernet without any initial value left, so that no weight or bias goes unnoticed."""
    net = SuperNet(5, init_channels=4, num_cells=CELLS, stem=stem)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 0.5 if around is None else around.get_parameter(name) + 0.5 * noise)
    return net


def vector(net: SuperNet, code: tuple[int, ...]) -> np.ndarray:
    """The architecture vector, concatenated as the definition reads."""
    state = {
        name: value.double().numpy().ravel()
        for name, value in net.state_dict().items()
        if not name.endswith(STATISTICS)
    }

    @functools.cache
    def weights(prefix: str) -> list[np.ndarray]:
        return [value for name, value in state.items() if name.startswith(prefix)]

    pieces = weights("stem")
    for k in range(CELLS):
        pieces += weights(f"cells.{k}.preprocess")
        reduction = k in (CELLS // 3, 2 * CELLS // 3)
        half = code[14:] if reduction else code[:14]
        channels = len(state[f"cells.{k}.preprocess1.op.2.weight"])
        assert len(PATHS) == 30
        for path in PATHS:
            edges = [(source, OFFSETS[node] + source) for source, node in itertools.pairwise(path)]
            if not all(half[edge] for _, edge in edges):
                continue
            for source, edge in edges:
                number = half[edge]
                if number in (1, 2):
                    pieces.append(np.full(channels * 9, 1 / 9))
                if number == 3 and not (reduction and source < 2):
                    pieces.append(np.eye(channels).ravel())
                pieces += weights(f"cells.{k}._ops.{edge}._ops.{number}.")
    return np.concatenate([*pieces, state["classifier.weight"]])


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_angle_by_brute_force(stem):
    initial = random_supernet(stem, 0)
    trained = random_supernet(stem, 1, around=initial)
    rng = np.random.default_rng(3)
    seen = set()
    for genotype in [*(DartsSearchSpace().sample(rng) for _ in range(8)), *ONE_INPUT]:
        a, b = vector(initial, genotype.code), vector(trained, genotype.code)
        expected = math.acos(a @ b / math.sqrt((a @ a) * (b @ b)))
        assert angle(initial, trained, genotype) == pytest.approx(expected, rel=1e-10)
        assert angle(initial, trained, genotype, normalize=True) == pytest.approx(expected / math.pi, rel=1e-10)
        seen.add(expected)
    assert len(seen) == 10 and 0.1 < min(seen) < max(seen) < 1.5


def test_every_operation_counts_its_weight_and_bias():
    initial, trained = random_supernet("cifar", 0), random_supernet("cifar", 0)
    for number in range(1, 8):
        node = [number, number]
        genotype = Genotype.from_code([*node, *node, 0, *node, 0, 0, *node, 0, 0, 0] * 2)
        prefix = f"cells.0._ops.0._ops.{number}."
        affine = [name for name, p in trained.named_parameters() if name.startswith(prefix) and p.dim() == 1]
        before = vector(initial, genotype.code)
        # The identity of the first, normal cell has none; the last normalisation has a weight and a bias.
        assert bool(affine) is (number != 3)
        for name in affine[-2:]:
            with torch.no_grad():
                trained.get_parameter(name).add_(1.0)
            after = vector(trained, genotype.code)
            expected = math.acos(before @ after / math.sqrt((before @ before) * (after @ after)))
            assert expected > 1e-3
            assert angle(initial, trained, genotype) == pytest.approx(expected, rel=1e-7)
            trained.load_state_dict(initial.state_dict())


def test_equal_weights_have_no_angle_and_the_classifier_bias_and_statistics_none_either():
    initial, trained = random_supernet("cifar", 0), random_supernet("cifar", 0)
    genotype = DartsSearchSpace().sample(np.random.default_rng(0))
    with torch.no_grad():
        trained.classifier.bias += 10.0
        for buffer in trained.buffers():
            buffer += 3
    # The cosine is 1 within rounding, whose arccos is at most about sqrt(2 * 2^-52 * a few).
    assert angle(initial, trained, genotype) == pytest.approx(0.0, abs=1e-7)
    outside = random_supernet("cifar", 0)
    with torch.no_grad():
        for edge, number in enumerate(genotype.code[:14]):
            for other in set(range(1, 8)) - {number}:
                for parameter in outside.cells[0]._ops[edge]._ops[str(other)].parameters():
                    parameter += 5.0
    assert angle(initial, outside, genotype) == pytest.approx(0.0, abs=1e-7)


def test_path_counts_by_enumeration():
    rng = np.random.default_rng(1)
    for genotype in [*(DartsSearchSpace().sample(rng) for _ in range(30)), *ONE_INPUT]:
        half = genotype.code[:14]
        counts = dict.fromkeys([edge for edge in range(14) if half[edge]], 0)
        for path in PATHS:
            edges = [OFFSETS[node] + source for source, node in itertools.pairwise(path)]
            if all(half[edge] for edge in edges):
                for edge in edges:
                    counts[edge] += 1
        assert path_counts(genotype.normal) == tuple(counts.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_a_small_angle(value):
    initial, trained = random_supernet("cifar", 0), random_supernet("cifar", 1)
    with torch.no_grad():
        trained.classifier.weight.fill_(value)
    genotype = DartsSearchSpace().sample(np.random.default_rng(0))
    try:
        result = angle(initial, trained, genotype)
    except ArithmeticError:
        return
    assert not math.isfinite(result)


def test_parameter_angle_by_hand():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.fill_(0.0)
    initial = {"weight": torch.tensor([[3.0, 0.0]]), "bias": torch.tensor([4.0])}
    # (3, 0, 4) . (3, 4, 0) = 9 of 5 * 5; the weights alone: 9 of 3 * 5.
    assert parameter_angle(initial, model) == pytest.approx(math.acos(9 / 25), rel=1e-12)
    assert parameter_angle(initial, model, ["weight"]) == pytest.approx(math.acos(3 / 5), rel=1e-12)
    opposite = {"weight": -model.weight.detach(), "bias": torch.zeros(1)}
    assert parameter_angle(opposite, model, normalize=True) == pytest.approx(1.0, abs=1e-7)


def test_states_that_do_not_belong_together_are_refused():
    genotype = DartsSearchSpace().sample(np.random.default_rng(0))
    with pytest.raises(ValueError, match="two states of one supernet"):
        angle(SuperNet(5, 4, 3), SuperNet(5, 4, 4), genotype)
    with pytest.raises(ValueError, match="no parameter named bias"):
        parameter_angle({"weight": torch.zeros(1, 2)}, nn.Linear(2, 1))
