"""Networks rewritten for evaluation give the logits and losses of the networks as they were."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins import ZOO, CellNetwork, Genotype, SuperNet
from genas_plugins.nasbench201 import OPERATIONS, NasBench201Architecture, NasBench201Network, NasBench201SuperNet
from genas_plugins.scoring import flatness, layers, mean_loss, recalibrate_batchnorm
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.scoring.layers import fused_convolutions, pooling
from genas_plugins.scoring.noise import perturbations
from genas_plugins.scoring.perturbation import Perturbation
from genas_plugins.spaces import DartsSearchSpace

# FairDARTS-B, with one and with two inputs a node; and one input a node, skips of skips, a cell that reads one input.
THIN = (3, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 3, 0)
ONE_INPUT = {"fairdarts": ZOO["fairdarts_b_c10"].genotype, "thin": Genotype.from_code(THIN)}
SIGMAS = (1e-5, 5e-5, 1e-4)


def images(size: int, count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def prepared(network: nn.Module, x: Tensor) -> nn.Module:
    """With weights that are not those of an initialisation, statistics that are not 0 and 1, in training mode."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    recalibrate_batchnorm(network, [(x, torch.zeros(len(x)))])
    return network.train()


def assert_same_logits(network: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ours = InferenceNetwork(network)(x)
    with torch.no_grad():
        expected = network.eval()(x)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [16, 19])
def test_subnets_of_the_darts_space(seed: int, size: int) -> None:
    torch.manual_seed(0)
    supernet = SuperNet(10, init_channels=4, num_cells=4).double()
    x = images(size)
    assert_same_logits(prepared(supernet.subnet(DartsSearchSpace().sample(np.random.default_rng(seed))), x), x)


@pytest.mark.parametrize("name", ONE_INPUT)
def test_nodes_of_one_input(name: str) -> None:
    torch.manual_seed(0)
    x = images(17)
    assert_same_logits(prepared(SuperNet(10, init_channels=4, num_cells=4).double().subnet(ONE_INPUT[name]), x), x)
    assert_same_logits(prepared(CellNetwork(ONE_INPUT[name], 4, 5, 7, stem="cifar").double(), x), x)
    # And where convolutions are oneDNN's, which write onto what they add to.
    fused, x = prepared(CellNetwork(ONE_INPUT[name], 4, 5, 7, stem="cifar"), x.float()).eval(), x.float()
    with torch.no_grad():
        torch.testing.assert_close(InferenceNetwork(fused)(x), fused(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 64), ("imagenet", 65), ("cifar", 16)])
@pytest.mark.parametrize("name", ["genas_flatness_c100", "genas_angle_c100"])
def test_fixed_networks(name: str, stem: str, size: int) -> None:
    torch.manual_seed(0)
    network = CellNetwork(ZOO[name].genotype, 4, 5, 7, stem=stem, auxiliary=True).double()
    assert_same_logits(prepared(network, images(size)).eval(), images(size))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_subnets_of_nasbench201(seed: int, affine: bool) -> None:
    torch.manual_seed(0)
    supernet = NasBench201SuperNet(4, 1, 10, affine).double()
    operations = tuple(np.random.default_rng(seed).choice(OPERATIONS, 6).tolist())
    x = images(9)
    assert_same_logits(prepared(supernet.subnet(NasBench201Architecture(operations)), x), x)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_cell_of_one_operation(operation: str) -> None:
    network = NasBench201Network(NasBench201Architecture((operation,) * 6), 4, 2).double()
    assert_same_logits(prepared(network, images(8)), images(8))


@pytest.mark.parametrize("noise", ["cumulative", "independent", "shared"])
@pytest.mark.parametrize("space", ["darts", "one input", "nasbench201"])
def test_losses_under_noise_are_those_of_a_float64_brute_force(space: str, noise: str) -> None:
    torch.manual_seed(0)
    if space != "nasbench201":
        genotype = ONE_INPUT["fairdarts"] if space == "one input" else ZOO["genas_flatness_c100"].genotype
        subnet = SuperNet(10, 8, 8).subnet(genotype)
    else:
        subnet = NasBench201SuperNet(8, 1, 10).subnet(NasBench201Architecture((*OPERATIONS, "nor_conv_3x3")))
    x = images(16, 64, torch.float32)
    labels = torch.randint(10, (64,), generator=torch.Generator().manual_seed(3))
    recalibrate_batchnorm(subnet, [(x, labels)])
    batches = [(x[:40], labels[:40]), (x[40:], labels[40:])]
    ours = flatness(subnet, batches, SIGMAS, noise=noise, generator=torch.Generator().manual_seed(4)).losses
    drawn = perturbations(
        subnet,
        [n for n, _ in subnet.named_parameters()],
        Perturbation(sigmas=SIGMAS, noise=noise),
        torch.Generator().manual_seed(4),
    )
    noisy = list(drawn)
    with torch.no_grad():
        for loss, replaced in zip(ours, noisy, strict=True):
            for name, parameter in subnet.named_parameters():
                parameter.copy_(replaced[name])
            logits = subnet.double().eval()(x.double())
            subnet.float()
            assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def eager_statistics(network: nn.Module, batches: list[tuple[Tensor, Tensor]], momentum: float | None) -> None:
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = momentum
    with torch.no_grad():
        for x, _ in batches:
            network.train()(x)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("space", ["darts", "imagenet stem", "nasbench201", "dead edges"])
def test_recalibration_gives_the_statistics_of_the_network_itself(space: str, momentum: float | None) -> None:
    torch.manual_seed(0)
    if space == "darts":
        network: nn.Module = SuperNet(10, 4, 4).double().subnet(ZOO["genas_flatness_c10"].genotype)
    elif space == "imagenet stem":
        network = CellNetwork(ZOO["genas_flatness_c100"].genotype, 4, 5, 7, stem="imagenet").double()
    else:
        # The last of the six edges alone reaches the output, in the second case.
        dead = ("nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3", "none", "none", "nor_conv_3x3")
        operations = (*OPERATIONS[1:], "nor_conv_3x3", "avg_pool_3x3") if space == "nasbench201" else dead
        network = NasBench201Network(NasBench201Architecture(operations), 4, 2).double()
    size = 64 if space == "imagenet stem" else 17
    batches = [(x, torch.zeros(3)) for x in images(size, 9).split(3)]
    found = copy.deepcopy(network)
    recalibrate_batchnorm(found, batches, momentum)
    eager_statistics(network, batches, momentum)
    expected = network.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.skipif(not fused_convolutions(), reason="this PyTorch has no fused convolutions of oneDNN")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 6, 8])
@pytest.mark.parametrize("space", ["darts", "imagenet stem", "nasbench201"])
def test_fused_convolutions_give_the_logits_of_float64(space: str, channels: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    size = 64 if space == "imagenet stem" else 17
    if space == "darts":
        candidate = DartsSearchSpace().sample(np.random.default_rng(channels))
        network: nn.Module = SuperNet(10, 2 * channels, 4).subnet(candidate)
    elif space == "imagenet stem":
        network = CellNetwork(ZOO["genas_flatness_c100"].genotype, 2 * channels, 5, 7, stem="imagenet")
    else:
        operations = tuple(np.random.default_rng(channels).choice(OPERATIONS, 6).tolist())
        network = NasBench201Network(NasBench201Architecture(operations), channels, 2)
    x = images(size, 5, torch.float32)
    prepared(network, x)
    rewritten = InferenceNetwork(network)
    assert all(layer.fused for layer in rewritten._layers)
    exact = copy.deepcopy(network).double().eval()
    for batch in (x, x[:2]):
        before = batch.contiguous(memory_format=layout).clone(memory_format=torch.preserve_format)
        ours = rewritten(before)
        assert torch.equal(before, batch)
        with torch.no_grad():
            expected = exact(batch.double())
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("space", ["darts", "nasbench201"])
def test_recalibration_in_float32_gives_the_statistics_of_float64(space: str) -> None:
    torch.manual_seed(0)
    if space == "darts":
        network: nn.Module = SuperNet(10, 8, 4).subnet(ZOO["genas_flatness_c10"].genotype)
    else:
        operations = (*OPERATIONS[1:], "nor_conv_3x3", "avg_pool_3x3")
        network = NasBench201SuperNet(8, 1, 10, affine=False).subnet(NasBench201Architecture(operations))
    batches = [(x, torch.zeros(3)) for x in images(16, 9, torch.float32).split(3)]
    exact = copy.deepcopy(network).double()
    recalibrate_batchnorm(network, batches)
    eager_statistics(exact, [(x.double(), y) for x, y in batches], None)
    for (name, found), wanted in zip(network.named_modules(), exact.modules(), strict=True):
        if isinstance(found, nn.BatchNorm2d):
            torch.testing.assert_close(found.running_var.double(), wanted.running_var, rtol=1e-5, atol=0, msg=name)
            # Means are as exact as the values that they are means of.
            error = (found.running_mean.double() - wanted.running_mean) / (wanted.running_var + found.eps).sqrt()
            assert float(error.abs().max()) < 1e-5, name


def test_without_onednn_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NasBench201Network(NasBench201Architecture(("nor_conv_1x1",) * 6), 4, 1).eval()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fused_convolutions.cache_clear()
    rewritten = InferenceNetwork(network)
    fused_convolutions.cache_clear()
    assert not any(layer.fused for layer in rewritten._layers)
    x = images(8, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(x), network(x))


@pytest.mark.parametrize("change", ["missing", "other arguments", "other result"])
def test_a_pytorch_that_changed_its_fused_convolutions_goes_without(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(x: Tensor, *unused: object, rectify: bool) -> Tensor:
        if change == "missing":
            raise AttributeError("_convolution_pointwise")
        if change == "other arguments":
            raise RuntimeError("expected at most 3 arguments")
        return torch.zeros_like(x)

    monkeypatch.setattr(layers, "_convolve", changed)
    fused_convolutions.cache_clear()
    assert not fused_convolutions()
    monkeypatch.undo()
    fused_convolutions.cache_clear()


def test_one_value_a_channel_has_no_statistics() -> None:
    network = NasBench201Network(NasBench201Architecture(("nor_conv_1x1",) * 6), 4, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        recalibrate_batchnorm(network, [(images(1, 1, torch.float32), torch.zeros(1))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_poolings_are_those_of_torch(stride: int, layout: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    maximum, mean = nn.MaxPool2d(3, stride, 1), nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    for height, width in itertools.product((1, 2, 3, 4, 7, 8), (1, 2, 5, 8)):
        x = torch.randn(2, 3, height, width, generator=generator, dtype=dtype).contiguous(memory_format=layout)
        before = x.clone()
        assert torch.equal(pooling(maximum)(x), maximum(x))
        torch.testing.assert_close(pooling(mean)(x), mean(x))
        assert torch.equal(x, before)
    # Others are left as they are.
    for other in (nn.AvgPool2d(3, stride, 1), nn.MaxPool2d(3, stride, 1, dilation=2), nn.AvgPool2d(2, 2)):
        assert pooling(other) is other


def test_parameters_are_replaced_one_loading_after_another() -> None:
    torch.manual_seed(0)
    subnet = prepared(SuperNet(10, 4, 4).double().subnet(ZOO["genas_flatness_c10"].genotype), images(16))
    network = InferenceNetwork(subnet)
    plain = network(images(16))
    network.load({"classifier.bias": subnet.classifier.bias.detach() + 1})
    torch.testing.assert_close(network(images(16)), plain + 1)
    network.load({})
    assert torch.equal(network(images(16)), plain)


def test_networks_that_cannot_be_rewritten_are_measured_as_they_are() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert InferenceNetwork.of(plain) is None
    with pytest.raises(TypeError, match="Sequential"):
        InferenceNetwork(plain)
    x, labels = images(2, 5, torch.float32), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(plain(x), labels).item()
    assert mean_loss(plain, [(x, labels)]) == pytest.approx(expected, rel=1e-6)


def test_a_hook_is_not_passed_by() -> None:
    network = NasBench201Network(NasBench201Architecture(("nor_conv_1x1",) * 6), 4, 1)
    calls = itertools.count(1)
    handle = network.classifier.register_forward_hook(lambda *unused: next(calls) and None)
    labels = torch.zeros(6, dtype=torch.long)
    mean_loss(network, [(images(8, dtype=torch.float32), labels)])
    assert next(calls) == 2
    handle.remove()
    assert InferenceNetwork.of(network) is not None


def test_a_subclass_is_run_as_it_says() -> None:
    class Silent(NasBench201Network):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    network = Silent(NasBench201Architecture(("nor_conv_1x1",) * 6), 4, 1)
    labels = torch.zeros(6, dtype=torch.long)
    # Equal logits for ten classes.
    assert mean_loss(network, [(images(8, dtype=torch.float32), labels)]) == pytest.approx(np.log(10), rel=1e-6)
