"""The supernet against a restatement by parameter name, and what its subnets share with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genas_plugins import ZOO, CellNetwork, Genotype, SuperNet
from genas_plugins.scoring import recalibrate_batchnorm
from genas_plugins.spaces import DartsSearchSpace

OFFSETS = {2: 0, 3: 2, 4: 5, 5: 9}
# One input a node, skips of skips, and a reduction cell that does not read its second input.
THIN = (3, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 5, 0, 2, 0, 3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 3, 0)
# FairDARTS-B, with one and with two inputs, and that.
ONE_INPUT = [ZOO["fairdarts_b_c10"].genotype, Genotype.from_code(THIN)]


def genotypes(count: int, seed: int = 0) -> list[Genotype]:
    rng = np.random.default_rng(seed)
    return [DartsSearchSpace().sample(rng) for _ in range(count)]


def supernet(stem: str = "cifar", cells: int = 3, classes: int = 6) -> SuperNet:
    """A supernet in which no weight, bias or statistic has its initial value."""
    net = SuperNet(classes, init_channels=4, num_cells=cells, stem=stem).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4 + 0.2)
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return net.eval()


def images(count: int = 3, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restated(state: dict[str, Tensor], x: Tensor, code: tuple[int, ...], stem: str, cells: int) -> Tensor:
    """The supernet's forward pass in evaluation mode, from the published parameter names alone."""

    def bn(x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{key}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x: Tensor, key: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1] // weight.shape[1])

    def reduce(x: Tensor, key: str) -> Tensor:
        x = x.relu()
        halves = [conv(x, f"{key}.conv_1", 2), conv(x[:, :, 1:, 1:], f"{key}.conv_2", 2)]
        return bn(torch.cat(halves, 1), f"{key}.bn")

    def operation(x: Tensor, number: int, key: str, stride: int) -> Tensor:
        if number == 1:
            return bn(F.max_pool2d(x, 3, stride, 1), f"{key}.1")
        if number == 2:
            return bn(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False), f"{key}.1")
        if number == 3:
            return x if stride == 1 else reduce(x, key)
        size = 3 if number in (4, 6) else 5
        if number in (4, 5):
            x = conv(x.relu(), f"{key}.op.1", stride, size // 2)
            x = bn(conv(x, f"{key}.op.2"), f"{key}.op.3")
            x = conv(x.relu(), f"{key}.op.5", 1, size // 2)
            return bn(conv(x, f"{key}.op.6"), f"{key}.op.7")
        x = conv(x.relu(), f"{key}.op.1", stride, size - 1, 2)
        return bn(conv(x, f"{key}.op.2"), f"{key}.op.3")

    if stem == "cifar":
        s0 = s1 = bn(conv(x, "stem.0", 1, 1), "stem.1")
    else:
        s0 = bn(conv(x, "stem0.0", 2, 1), "stem0.1").relu()
        s0 = bn(conv(s0, "stem0.3", 2, 1), "stem0.4")
        s1 = bn(conv(s0.relu(), "stem1.1", 2, 1), "stem1.2")
    before_reduced = stem == "imagenet"
    for k in range(cells):
        reduction = k in (cells // 3, 2 * cells // 3)
        half = code[14:] if reduction else code[:14]
        first = f"cells.{k}.preprocess0"
        states = [reduce(s0, first) if before_reduced else bn(conv(s0.relu(), f"{first}.op.1"), f"{first}.op.2")]
        states.append(bn(conv(s1.relu(), f"cells.{k}.preprocess1.op.1"), f"cells.{k}.preprocess1.op.2"))
        for node, offset in OFFSETS.items():
            total = torch.zeros(())
            for source in range(node):
                number, edge = half[offset + source], offset + source
                if number:
                    key = f"cells.{k}._ops.{edge}._ops.{number}"
                    total = total + operation(states[source], number, key, 2 if reduction and source < 2 else 1)
            states.append(total)
        s0, s1, before_reduced = s1, torch.cat(states[2:], 1), reduction
    return s1.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize(("stem", "cells", "size"), [("cifar", 3, 8), ("cifar", 5, 8), ("imagenet", 4, 64)])
def test_forward_is_the_subnet_is_the_restatement(stem, cells, size):
    net, x = supernet(stem, cells), images(size=size)
    state = net.state_dict()
    for genotype in [*genotypes(6, seed=cells), *ONE_INPUT]:
        expected = restated(state, x, genotype.code, stem, cells)
        torch.testing.assert_close(net(x, genotype), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net.subnet(genotype)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stem", "cells", "size"), [("cifar", 3, 8), ("imagenet", 4, 64)])
def test_gradients_are_those_of_the_restatement_and_in_training_those_of_the_subnet(stem, cells, size):
    net, x = supernet(stem, cells), images(size=size)
    parameters = dict(net.named_parameters())

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), list(parameters.values()), allow_unused=True)

    for genotype in [*genotypes(4, seed=cells), *ONE_INPUT]:
        expected = gradients(restated({**net.state_dict(), **parameters}, x, genotype.code, stem, cells))
        pairs = [(gradients(net(x, genotype)), expected)]
        pairs.append((gradients(net.train()(x, genotype)), gradients(net.subnet(genotype)(x))))
        net.eval()
        for ours, theirs in pairs:
            # Normalisation makes some gradients zero but for rounding.
            largest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
            for name, own, other in zip(parameters, ours, theirs, strict=True):
                assert (own is None) == (other is None), name
                if own is not None:
                    torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-12 * largest, msg=name)


def test_the_modules_of_a_path_hold_the_parameters_of_its_subnet():
    net = supernet()
    for genotype in [*genotypes(4), *ONE_INPUT]:
        listed = [parameter for module in net.path_modules(genotype) for parameter in module.parameters()]
        assert len(set(listed)) == len(listed)
        assert set(listed) == set(net.subnet(genotype).parameters())


def test_a_path_without_pooling_is_the_fixed_network():
    code = [3, 4, 5, 0, 6, 7, 0, 4, 0, 0, 3, 0, 0, 5]
    thin = [0, 4, 3, 0, 0, 0, 0, 6, 3, 0, 0, 5, 0, 0]
    net, x, genotype = supernet(cells=4), images(), Genotype.from_code(code + thin)
    network = CellNetwork(genotype, 4, 4, 6, stem="cifar").double().eval()
    network.load_state_dict(net.subnet(genotype).state_dict())
    torch.testing.assert_close(network(x), net(x, genotype), rtol=1e-12, atol=1e-12)


def test_official_parameter_names():
    state = SuperNet(10, 4, 3).state_dict()
    for name in (
        "stem.0.weight",
        "stem.1.running_var",
        "cells.0.preprocess0.op.1.weight",
        "cells.2.preprocess0.conv_2.weight",
        "cells.0._ops.3._ops.4.op.1.weight",
        "cells.0._ops.1._ops.1.1.weight",
        "cells.1._ops.0._ops.3.conv_1.weight",
        "cells.2._ops.13._ops.7.op.3.bias",
        "classifier.bias",
    ):
        assert name in state
    assert {"stem0.0.weight", "stem0.4.bias", "stem1.1.weight"} <= set(SuperNet(10, 4, 3, "imagenet").state_dict())


@pytest.mark.parametrize(("channels", "cells", "classes"), [(4, 3, 6), (16, 8, 10)])
def test_parameters_by_formula(channels, cells, classes):
    def choices(c: int, stride: int) -> int:
        separable = sum(2 * (size * size * c + c * c + 2 * c) for size in (3, 5))
        dilated = sum(size * size * c + c * c + 2 * c for size in (3, 5))
        return 2 * (2 * c) + (c * c + 2 * c if stride == 2 else 0) + separable + dilated

    stem = 3 * channels
    expected = 27 * stem + 2 * stem
    inputs, c = [stem, stem], channels
    for k in range(cells):
        reduction = k in (cells // 3, 2 * cells // 3)
        c *= 1 + reduction
        # Each preprocessing is pointwise; a factorised reduction has the same number of weights.
        expected += sum(size * c + 2 * c for size in inputs)
        from_inputs = 8
        expected += from_inputs * choices(c, 1 + reduction) + (14 - from_inputs) * choices(c, 1)
        inputs = [inputs[1], 4 * c]
    expected += 4 * c * classes + classes
    assert sum(p.numel() for p in SuperNet(classes, channels, cells).parameters()) == expected


def test_a_subnet_shares_parameters_and_owns_its_statistics():
    net, genotype = supernet(), genotypes(1)[0]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    subnet = net.subnet(genotype)
    owned = {id(p) for p in net.parameters()}
    assert len(list(subnet.parameters())) > 20 and all(id(p) in owned for p in subnet.parameters())
    storage = {buffer.data_ptr() for buffer in net.buffers()}
    assert not any(buffer.data_ptr() in storage for buffer in subnet.buffers())
    recalibrate_batchnorm(subnet, [(images(4), torch.zeros(4))])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(subnet.stem[1].running_mean, net.stem[1].running_mean)
    # A later change of the supernet's weights is seen, and gradients arrive in the supernet.
    with torch.no_grad():
        net.classifier.bias += 1.0
    assert torch.equal(subnet.classifier.bias, net.classifier.bias)
    subnet(images()).sum().backward()
    assert net.stem[0].weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_a_subnet_takes_the_mode_of_the_supernet(training):
    net = supernet().train(training)
    assert all(module.training is training for module in net.subnet(genotypes(1)[0]).modules())
    subnet = net.subnet(genotypes(1)[0]).train(not training)
    assert subnet.training is not training
    assert all(module.training is training for module in net.modules())


def test_hooks_of_a_subnet_stay_with_the_subnet():
    net, genotype = supernet(), genotypes(1)[0]
    subnet, calls = net.subnet(genotype), []
    for module in subnet.modules():
        module.register_forward_hook(lambda *args: calls.append(args))
    net(images(), genotype)
    assert not calls


def test_arguments_rebuild_the_supernet():
    for arguments in ((6, 4, 3, "cifar"), (6, 4, 2, "cifar"), (3, 8, 2, "imagenet")):
        net = SuperNet(*arguments)
        assert tuple(net.arguments.values()) == arguments
        SuperNet(**net.arguments).load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="even number, got 3"):
        SuperNet(10, 3)
