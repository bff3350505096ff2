"""NASWOT, SynFlow and ZiCo against their definitions, worked out by hand, in NumPy or with a loop over autograd."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.correlation.training_free import naswot, synflow, zico
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201Network
from genas_plugins.scoring import MeasurementError

ARCHITECTURE = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|"
EMPTY = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


def benchmark_network(seed: int = 0, architecture: str = ARCHITECTURE, init_channels: int = 4) -> NasBench201Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NasBench201Network(NasBench201Architecture.from_string(architecture), init_channels, 1)


def images(count: int = 6, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(images(size, seed), torch.randint(10, (size,), generator=generator)) for seed in range(count)]


def bias_free(*widths: int, seed: int = 0) -> nn.Sequential:
    """A chain of linear layers with ReLUs between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def logdet(matrix: np.ndarray) -> float:
    sign, value = np.linalg.slogdet(matrix)
    assert sign == 1
    return value


class TwoLayers(nn.Module):
    """Hands its input to the first ReLU and a permutation with another sign to the second."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(inplace), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(1.0 - self.first(x)[:, :2])


@pytest.mark.parametrize("inplace", [False, True])
def test_naswot_of_codes_made_by_hand(inplace):
    points = torch.tensor([[2.0, -1.0, 3.0], [-1.0, -2.0, 5.0], [2.0, 4.0, -1.0]])
    # First codes 101, 001, 110; then 1 - relu of two columns is (-1, 1), (1, 1), (-1, -3): codes 01, 11, 00.
    # Agreements of the pairs: (0, 1): 2 + 1; (0, 2): 1 + 1; (1, 2): 0 + 0; an image agrees with itself on all 5.
    kernel = np.array([[5, 3, 2], [3, 5, 0], [2, 0, 5]])
    assert naswot(TwoLayers(inplace), points.clone()) == pytest.approx(logdet(kernel)) == pytest.approx(math.log(60))


def test_naswot_of_a_benchmark_network_is_the_sum_over_layers_in_numpy():
    network, batch = benchmark_network(), images()
    codes: list[np.ndarray] = []
    reference = benchmark_network().train()
    for module in reference.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, args, out: codes.append((args[0] > 0).flatten(1).double().numpy()))
    reference(batch)
    # Two ReLUs in each of two residual blocks, one in the head, three convolutions in each of three cells.
    assert len(codes) == 2 * 2 + 1 + 3 * 3
    kernel = sum(x @ x.T + (1 - x) @ (1 - x).T for x in codes)
    assert naswot(network.eval(), batch) == pytest.approx(logdet(kernel), rel=1e-12)


def test_naswot_counts_a_shared_relu_at_each_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(x) - 1.0)

    points = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    # Codes 10 and 11 agree once; codes 10 and 01 never.
    assert naswot(Twice(), points) == pytest.approx(math.log(4 * 4 - 1 * 1))


def test_naswot_of_images_with_the_same_code_is_minus_infinity():
    points = torch.tensor([[2.0, -1.0, 3.0], [4.0, -5.0, 1.0], [-1.0, 4.0, -1.0]])
    assert naswot(nn.Sequential(nn.ReLU()), points) == -math.inf
    # One unit more tells the two apart.
    assert math.isfinite(naswot(nn.Sequential(nn.ReLU()), torch.cat([points, torch.tensor([[1.0], [-1], [1]])], 1)))


def test_naswot_of_more_images_than_the_codes_can_tell_apart_is_minus_infinity():
    # All 32 codes of five units are distinct, but their products span six dimensions only.
    points = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    assert naswot(nn.Sequential(nn.ReLU()), points) == -math.inf


def test_synflow_of_a_linear_chain_is_the_number_of_layers_times_the_flow():
    network = bias_free(12, 7, 5, 3)
    flow = np.ones(12)
    for module in network:
        if isinstance(module, nn.Linear):
            flow = np.abs(module.weight.detach().double().numpy()) @ flow
    assert synflow(network, (3, 2, 2)) == pytest.approx(3 * flow.sum(), rel=1e-12)


def test_synflow_makes_biases_positive_but_does_not_count_them():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[-1.0, 2.0, -3.0]]))
        network[1].bias.fill_(-4.0)
        network[3].weight.copy_(torch.tensor([[5.0], [-6.0]]))
        network[3].bias.fill_(-7.0)
    # First layer: 6 * (5 + 6). Second layer: (6 + 4) * (5 + 6).
    assert synflow(network, (3, 1, 1)) == pytest.approx(66 + 110)


def test_synflow_leaves_batch_normalization_out():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(2.0, 3.0, generator=torch.Generator().manual_seed(1))
    normalized = nn.Sequential(plain[0], norm, nn.ReLU(inplace=True), plain[2])
    assert synflow(normalized, (3, 5, 5)) == synflow(plain, (3, 5, 5))


def test_synflow_with_a_branch_around_batch_normalization_and_an_activation_in_place():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.act = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return x * x + self.two(self.act(x))

    block = Block()
    one, two = (np.abs(conv.weight.detach().double().numpy())[:, :, 0, 0] for conv in (block.one, block.two))
    x = one @ np.ones(3)
    # By Euler's theorem, the square counts twice for the first convolution and the branch once for each.
    expected = 2 * (x * x).sum() + 2 * (two @ x).sum()
    assert synflow(block, (3, 1, 1)) == pytest.approx(expected, rel=1e-12)


def test_synflow_does_not_overflow_where_float32_does():
    network = bias_free(*[64] * 41)
    with torch.no_grad():
        for module in network[1::2]:
            module.weight.fill_(0.25)
    # Forty layers multiply by 64 / 4 each.
    expected = 40 * 64 * 16.0**40
    assert torch.finfo(torch.float32).max < expected
    assert synflow(network, (1, 8, 8)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("deviation", ["signed", "absolute"])
@pytest.mark.parametrize("count", [2, 3])
def test_zico_against_a_loop_over_autograd(count, deviation):
    network, data = benchmark_network(), batches(count)
    reference = benchmark_network().train()
    layers = [module for module in reference.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found: list[list[np.ndarray]] = [[] for _ in layers]
    for inputs, labels in data:
        reference.zero_grad()
        F.cross_entropy(reference(inputs), labels).backward()
        for gradients, layer in zip(found, layers, strict=True):
            # A convolution whose output the cell does not use has no gradient, which is one of 0.
            grad = layer.weight.grad
            gradients.append(np.zeros(layer.weight.shape) if grad is None else grad.double().numpy())
    expected = 0.0
    for gradients in found:
        stacked = np.stack(gradients)
        spread = np.std(stacked if deviation == "signed" else np.abs(stacked), axis=0)
        mean = np.abs(stacked).mean(0)
        if spread.any():
            expected += np.log(np.sum(mean[spread > 0] / spread[spread > 0]))
    assert zico(network.eval(), iter(data), deviation) == pytest.approx(expected, rel=1e-5)


def test_zico_of_one_layer_by_hand():
    network = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        network.weight.zero_()
    # Softmax gives 1/2 each, so the gradients of label 0 are -x/2 and x/2.
    data = [(torch.tensor([[2.0]]), torch.tensor([0])), (torch.tensor([[6.0]]), torch.tensor([0]))]
    # (-1, 1) and (-3, 3): mean 2, deviation 1, twice.
    assert zico(network, data) == pytest.approx(math.log(4))
    data[1] = (data[1][0], torch.tensor([1]))
    # (-1, 1) and (3, -3): the signed deviation is 2, the one of the absolute values still 1.
    assert zico(network, data) == pytest.approx(math.log(2))
    assert zico(network, data, "absolute") == pytest.approx(math.log(4))


def test_zico_of_two_layers_by_hand_has_a_negative_term():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False))
    data = [(torch.tensor([[x]]), torch.tensor([0])) for x in (0.0, 0.0, 0.0, 6.0)]
    # Each gradient is (0, 0, 0, g): mean |g| / 4, deviation sqrt(3) |g| / 4; one weight, then two.
    assert zico(network, data) == pytest.approx(math.log(1 / math.sqrt(3)) + math.log(2 / math.sqrt(3)))


def test_zico_leaves_out_what_does_not_vary():
    batch = batches(1)[0]
    assert zico(benchmark_network(), [batch, batch]) == 0.0

    class Idle(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.unused = network, nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    assert zico(Idle(benchmark_network()), batches()) == zico(benchmark_network(), batches())


SCORES: dict[str, Callable[[nn.Module], float]] = {
    "naswot": lambda network: naswot(network, images()),
    "synflow": lambda network: synflow(network, (3, 8, 8)),
    "zico": lambda network: zico(network, batches()),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a measurement must leave as it was; bytes, so that -0.0 and 0.0 differ."""
    return {
        "state": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "dtype": [p.dtype for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.random.get_state()[1].tobytes(),
        "python": random.getstate(),
    }


def worn_network() -> nn.Module:
    """Used statistics, some gradients, a frozen parameter, a zero of each sign, mixed modes and a dropout."""
    network = benchmark_network()
    network.lastact.append(nn.Dropout(0.5))
    network.train()
    network(images(seed=3)).sum().backward()
    network.stem[0].weight.grad = None
    network.classifier.weight.requires_grad_(False)
    with torch.no_grad():
        network.classifier.weight[0, :2] = torch.tensor([0.0, -0.0])
    network.cells[1].eval()
    return network


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_no_trace_is_left(name, grad):
    network = worn_network()
    before = snapshot(network)
    with torch.set_grad_enabled(grad):
        score = SCORES[name](network)
        assert SCORES[name](network) == score
    assert math.isfinite(score) and snapshot(network) == before


@pytest.mark.parametrize("name", SCORES)
def test_no_trace_is_left_after_a_failure(name):
    network = worn_network()
    network.classifier.register_forward_hook(lambda *_: 1 / 0)
    before = snapshot(network)
    with pytest.raises(ZeroDivisionError):
        SCORES[name](network)
    assert snapshot(network) == before


@pytest.mark.parametrize("name", SCORES)
def test_the_seed_of_the_weights_decides_the_score(name):
    score = SCORES[name]
    assert score(benchmark_network(1)) == score(benchmark_network(1)) != score(benchmark_network(2))
    # What the network was doing before does not matter.
    assert score(benchmark_network(1).eval()) == score(benchmark_network(1).train())


@pytest.mark.parametrize(("name", "without_cells"), [("naswot", -math.inf), ("synflow", 0.0), ("zico", 0.0)])
def test_more_operations_score_higher_and_an_empty_cell_has_a_score(name, without_cells):
    full = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    empty, rich = (SCORES[name](benchmark_network(0, architecture)) for architecture in (EMPTY, full))
    # The logits of the empty one are the classifier's bias, whatever the image.
    assert empty == without_cells < rich < math.inf


class Functional(nn.Module):
    """A network whose activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("network", [Functional(), nn.Sequential(nn.Conv2d(3, 2, 1), nn.GELU())])
def test_naswot_refuses_a_network_whose_relus_it_cannot_see(network):
    with pytest.raises(ValueError, match=r"nn\.ReLU modules, and \w+ called none.*F\.relu"):
        naswot(network, images())
    # The others do not care.
    assert math.isfinite(synflow(network, (3, 4, 4)))


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="at least two, got 1"):
        naswot(benchmark_network(), images(1))
    for data in ([], batches(1)):
        with pytest.raises(ValueError, match=f"at least two batches, got {len(data)}"):
            zico(benchmark_network(), data)


def test_images_and_weights_that_are_not_finite_are_refused():
    broken = images()
    broken[2, 0, 0, 0], broken[4, 1, 1, 1] = math.nan, math.inf
    network = benchmark_network()
    before = snapshot(network)
    for score in (
        lambda: naswot(network, broken),
        lambda: zico(network, [*batches(1), (broken, torch.zeros(6).long())]),
    ):
        with pytest.raises(ValueError, match="2 of 6 images have pixels that are not finite"):
            score()
    assert snapshot(network) == before

    with torch.no_grad():
        network.stem[0].weight[0, 0, 0, 0] = math.nan
    for name, message in (("naswot", "logits"), ("synflow", "SynFlow is nan"), ("zico", "gradient of stem.0.weight")):
        with pytest.raises(MeasurementError, match=message):
            SCORES[name](network)


def test_unusable_arguments_are_refused():
    for shape in ((3, 32), (3, 0, 32), (3, 32.0, 32), ()):
        with pytest.raises(ValueError, match=r"\(C, H, W\), three positive integers"):
            synflow(benchmark_network(), shape)
    for score in (lambda: synflow(nn.ReLU()), lambda: zico(nn.ReLU(), batches())):
        with pytest.raises(ValueError, match="ReLU has no convolution or linear layer"):
            score()
    with pytest.raises(ValueError, match="Unknown deviation 'std'; valid choices: signed, absolute"):
        zico(benchmark_network(), batches(), "std")
