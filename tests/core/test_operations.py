"""The seven operations against their formulas in plain tensor arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from genas_plugins.darts.operations import (
    FactorizedReduce,
    ReLUConvBN,
    build_operation,
    dilated_for_training,
    drop_path,
    reduce_for_training,
    shift_image,
)

C = 4
# Parameters by hand: a separable convolution is two times depthwise, pointwise and an affine batch norm.
PARAMETERS = {
    "max_pool_3x3": (0, 0),
    "avg_pool_3x3": (0, 0),
    "skip_connect": (0, C * C + 2 * C),
    "sep_conv_3x3": (2 * (9 * C + C * C + 2 * C),) * 2,
    "sep_conv_5x5": (2 * (25 * C + C * C + 2 * C),) * 2,
    "dil_conv_3x3": (9 * C + C * C + 2 * C,) * 2,
    "dil_conv_5x5": (25 * C + C * C + 2 * C,) * 2,
}


def images(height: int, width: int, channels: int = C) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_shape_and_parameters(name, stride):
    operation = build_operation(name, C, stride).double()
    assert sum(p.numel() for p in operation.parameters()) == PARAMETERS[name][stride - 1]
    for height, width in ((8, 8), (7, 9), (5, 6)):
        out = operation(images(height, width))
        assert out.shape == (2, C, math.ceil(height / stride), math.ceil(width / stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_by_hand(stride):
    x = images(6, 6)
    padded = {"max": F.pad(x, (1,) * 4, value=-math.inf), "sum": F.pad(x, (1,) * 4)}
    inside = F.pad(torch.ones_like(x), (1,) * 4)
    positions = range(0, 6, stride)

    def windows(values):
        return torch.stack([torch.stack([values[:, :, i : i + 3, j : j + 3] for j in positions]) for i in positions])

    largest = windows(padded["max"]).amax((-2, -1)).permute(2, 3, 0, 1)
    # The average is over the pixels inside the image only.
    average = (windows(padded["sum"]).sum((-2, -1)) / windows(inside).sum((-2, -1))).permute(2, 3, 0, 1)
    torch.testing.assert_close(build_operation("max_pool_3x3", C, stride)(x), largest, rtol=0, atol=0)
    torch.testing.assert_close(build_operation("avg_pool_3x3", C, stride)(x), average, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "size", "dilation"), [("dil_conv_3x3", 3, 2), ("sep_conv_5x5", 5, 1)])
def test_convolutions_by_formula(name, size, dilation):
    operation = build_operation(name, C, 2).double().eval()
    x = expected = images(9, 9)
    weights = [p for p in operation.parameters() if p.dim() == 4]
    for half, (depthwise, pointwise) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        padding = dilation * (size - 1) // 2
        stride = 2 if half == 0 else 1
        expected = F.conv2d(expected.relu(), depthwise, None, stride, padding, dilation, groups=C)
        # A fresh batch norm in evaluation mode divides by sqrt(1 + eps).
        expected = F.conv2d(expected, pointwise) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(operation(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (97, 97), (7, 8), (6, 9), (1, 1)])
def test_factorized_reduce_halves_rounding_up(size):
    layer = FactorizedReduce(3, 6).double().eval()
    x = images(*size, channels=3).requires_grad_()
    out = layer(x)
    height, width = size
    assert out.shape == (2, 6, math.ceil(height / 2), math.ceil(width / 2))
    canvas = torch.zeros(2, 3, height + height % 2, width + width % 2, dtype=x.dtype)
    canvas[:, :, :height, :width] = x.detach().relu()
    # Official formula: even pixels through one convolution, odd pixels through the other.
    first = torch.einsum("oi,nihw->nohw", layer.conv_1.weight[:, :, 0, 0], canvas[:, :, ::2, ::2])
    second = torch.einsum("oi,nihw->nohw", layer.conv_2.weight[:, :, 0, 0], canvas[:, :, 1::2, 1::2])
    expected = torch.cat([first, second], 1) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    if size != (1, 1):
        out.square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in (x, layer.conv_1.weight, layer.conv_2.weight))


def test_factorized_reduce_on_even_sizes_is_the_official_call():
    layer = FactorizedReduce(4, 8).eval()
    x = images(8, 10).float()
    official = [
        F.conv2d(x.relu(), layer.conv_1.weight, stride=2),
        F.conv2d(x.relu()[:, :, 1:, 1:], layer.conv_2.weight, stride=2),
    ]
    assert torch.equal(layer(x), layer.bn(torch.cat(official, 1)))


def assert_same_with_gradients(ours, theirs, *inputs):
    """The same values, and the same gradients of a sum with random factors."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    factors, gradients = None, []
    for function in (ours, theirs):
        out = function(*inputs)
        factors = torch.randn(out.shape, dtype=out.dtype) if factors is None else factors
        gradients.append((out, *torch.autograd.grad((out * factors).sum(), inputs)))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (16, 12), (7, 9), (4, 4), (3, 6), (1, 1)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 2), (2, 2), (1, 3), (1, 4), (2, 4)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_dilated_convolutions_in_training_are_those_of_pytorch(kernel, stride, dilation, size, layout):
    x = images(*size).contiguous(memory_format=layout)
    kernels = torch.randn(C, 1, kernel, kernel, dtype=x.dtype)
    padding = (kernel - 1) // 2 * dilation
    assert_same_with_gradients(
        lambda x, kernels: dilated_for_training(x, kernels, stride, padding, dilation),
        lambda x, kernels: F.conv2d(x, kernels, None, stride, padding, dilation, C),
        x,
        kernels,
    )


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 8), (6, 9), (1, 1)])
def test_factorized_reduction_in_training_is_two_convolutions(size):
    x = images(*size)
    first, second = torch.randn(2, 3, C, 1, 1, dtype=x.dtype)
    assert_same_with_gradients(
        reduce_for_training,
        lambda x, first, second: torch.cat(
            [F.conv2d(x, first, None, 2), F.conv2d(shift_image(x, 1), second, None, 2)], 1
        ),
        x,
        first,
        second,
    )


@pytest.mark.parametrize(("name", "stride"), [("skip_connect", 2), ("dil_conv_3x3", 1), ("dil_conv_5x5", 2)])
def test_training_and_evaluation_differ_in_the_normalisation_only(name, stride):
    operation = build_operation(name, C, stride).double()
    norm = next(module for module in operation.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for training in (True, False):
        operation.train(training)(images(8, 8))
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-12)


def test_identity_and_preprocessing():
    x = images(5, 5)
    assert build_operation("skip_connect", C, 1)(x) is x
    layer = ReLUConvBN(C, 6).double().eval()
    expected = torch.einsum("oi,nihw->nohw", layer.op[1].weight[:, :, 0, 0], x.relu()) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = drop_path(torch.ones(4000, 2, 3, 3), 0.25)
    samples = out.flatten(1)
    assert bool((samples == samples[:, :1]).all())
    assert sorted(set(samples[:, 0].tolist())) == pytest.approx([0.0, 4 / 3])
    # Four standard errors of the kept fraction.
    assert abs(float((samples[:, 0] > 0).float().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_drop_path_is_compiled_once_for_all_probabilities():
    counter = CompileCounter()
    compiled = torch.compile(drop_path, backend=counter, fullgraph=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for probability in (0.1, 0.15, 0.2, 0.25, 0.3):
            samples = compiled(torch.ones(4000, 2, 1, 1), probability).flatten(1)
            assert bool((samples == samples[:, :1]).all())
            kept = 1 - probability
            assert sorted(set(samples[:, 0].tolist())) == pytest.approx([0.0, 1 / kept])
            assert abs(float((samples[:, 0] > 0).float().mean()) - kept) < 4 * math.sqrt(kept * probability / 4000)
    # The first is taken for a constant; before 2.6 each is, unless dynamo is told otherwise.
    assert counter.frame_count <= (2 if not torch._dynamo.config.specialize_float else 5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"Unknown operation 'conv'.*sep_conv_3x3"):
        build_operation("conv", 4, 1)
    with pytest.raises(ValueError, match="Unknown operation 'none'"):
        build_operation("none", 4, 1)
    with pytest.raises(ValueError, match="even number of output channels, got 5"):
        FactorizedReduce(4, 5)
