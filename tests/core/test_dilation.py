"""Operations that keep the resolution: a dilated one treats every d-th pixel as an image of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genas_plugins.darts.genotype import OPERATIONS
from genas_plugins.darts.network import AuxiliaryHead, build_imagenet_stem, cell_shapes
from genas_plugins.darts.operations import DilatedAvgPool, FactorizedReduce, Layers, build_operation

C = 4


def image(height: int, width: int) -> Tensor:
    return torch.randn(2, C, height, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)


def pair(build, *arguments: object) -> tuple[nn.Module, nn.Module]:
    """A strided layer, with random statistics, and one with the same weights that keeps the resolution."""
    strided, dilated = build(1, False).double().eval(), build(*arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator, dtype=torch.float64) - (0.0 if "var" in name else 0.5)
        for name, value in strided.state_dict().items()
    }
    strided.load_state_dict(state)
    dilated.load_state_dict(state)
    return strided, dilated


def assert_same_by_phase(strided: nn.Module, dilated: nn.Module, x: Tensor, dilation: int, stride: int) -> None:
    full = dilated(x)
    assert full.shape == x.shape[:1] + full.shape[1:2] + x.shape[2:]
    for row in range(dilation):
        for column in range(dilation):
            expected = strided(x[:, :, row::dilation, column::dilation])
            actual = full[:, :, row :: dilation * stride, column :: dilation * stride]
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(12, 12), (13, 11), (9, 16), (4, 5)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("name", OPERATIONS[1:])
def test_every_phase_of_an_operation_is_the_strided_one(name, stride, dilation, size):
    strided, dilated = pair(
        lambda d, replace: build_operation(name, C, stride, dilation=d, replace_stride=replace), dilation, stride == 2
    )
    assert_same_by_phase(strided, dilated, image(*size), dilation, stride)


@pytest.mark.parametrize("size", [(12, 12), (13, 11), (3, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_phase_of_a_factorized_reduction_is_the_strided_one(dilation, size):
    strided, dilated = pair(
        lambda d, replace: FactorizedReduce(C, 6, dilation=d, replace_stride=replace), dilation, True
    )
    assert_same_by_phase(strided, dilated, image(*size), dilation, 2)


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (1, 3)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_dilated_average_by_brute_force(dilation, size):
    height, width = size
    x = image(height, width)
    expected = torch.empty_like(x)
    for row in range(height):
        for column in range(width):
            rows = [row + step * dilation for step in (-1, 0, 1) if 0 <= row + step * dilation < height]
            columns = [column + step * dilation for step in (-1, 0, 1) if 0 <= column + step * dilation < width]
            expected[:, :, row, column] = x[:, :, rows][:, :, :, columns].mean((2, 3))
    torch.testing.assert_close(DilatedAvgPool(dilation)(x), expected, rtol=1e-13, atol=1e-13)


def test_dilated_pooling_has_gradients_and_ignores_what_is_outside():
    x = -1.0 - image(6, 6).abs()
    for name in ("max_pool_3x3", "avg_pool_3x3"):
        inside = x.clone().requires_grad_()
        # Negative everywhere: a zero from the padding would be the largest, and would lift the average.
        out = build_operation(name, C, 1, dilation=2)(inside)
        assert out.max() <= x.max() and out.min() >= x.min()
        out.sum().backward()
        # Each output is one input, or an average of weights that sum to 1.
        assert float(inside.grad.sum()) == pytest.approx(out.numel())


@pytest.mark.parametrize(
    ("stem", "output_stride", "dilations", "replaced"),
    [
        ("imagenet", None, [1, 1, 1, 1, 1, 1], []),
        ("imagenet", 32, [1, 1, 1, 1, 1, 1], []),
        ("imagenet", 16, [1, 1, 1, 1, 1, 2], [4]),
        ("imagenet", 8, [1, 1, 1, 2, 2, 4], [2, 4]),
        ("cifar", 4, [1, 1, 1, 1, 1, 1], []),
        ("cifar", 2, [1, 1, 1, 1, 1, 2], [4]),
        ("cifar", 1, [1, 1, 1, 2, 2, 4], [2, 4]),
    ],
)
def test_dilation_doubles_behind_each_stride_that_is_left_out(stem, output_stride, dilations, replaced):
    plain, shapes = cell_shapes(8, 6, stem), cell_shapes(8, 6, stem, output_stride)
    assert [shape.dilation for shape in shapes] == dilations
    assert [index for index, shape in enumerate(shapes) if shape.replace_stride] == replaced
    assert [index for index, shape in enumerate(shapes) if shape.previous_replaced] == [index + 1 for index in replaced]
    assert [shape.out_dilation for shape in shapes] == [*dilations[1:], dilations[-1]]
    # Channels, and which cells are reduction cells, stay.
    for one, other in zip(shapes, plain, strict=True):
        assert (one.before_previous, one.previous, one.channels) == (
            other.before_previous,
            other.previous,
            other.channels,
        )
        assert (one.reduction, one.previous_reduced) == (other.reduction, other.previous_reduced)


@pytest.mark.parametrize(
    ("stem", "output_stride", "choices"),
    [("imagenet", 4, "8, 16, 32"), ("imagenet", 64, "8, 16, 32"), ("cifar", 8, "1, 2, 4"), ("cifar", 0, "1, 2, 4")],
)
def test_other_output_strides_are_refused(stem, output_stride, choices):
    with pytest.raises(ValueError, match=f"output_stride must be one of {choices}, got {output_stride}"):
        cell_shapes(8, 6, stem, output_stride)


class Named(nn.Hardswish):
    """An activation that is told apart from the others."""


class Plain(nn.Module):
    """An activation that cannot work in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def group(channels: int, **placement: object) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels, **placement)


def parts() -> list[tuple[str, object]]:
    operations = [(name, stride) for name in OPERATIONS[1:] for stride in (1, 2)]
    return [
        *(
            (f"{name} {stride}", lambda layers, n=name, s=stride: build_operation(n, C, s, layers))
            for name, stride in operations
        ),
        ("stem", lambda layers: nn.Sequential(*build_imagenet_stem(C, 5, layers))),
        ("head", lambda layers: AuxiliaryHead(C, 3, "imagenet", layers)),
        ("cifar head", lambda layers: AuxiliaryHead(C, 3, "cifar", layers)),
    ]


@pytest.mark.parametrize(("name", "build"), parts(), ids=[name for name, _ in parts()])
def test_everything_is_made_of_the_given_layers(name, build):
    default, other = build(Layers()), build(Layers(group, Named, torch.device("meta"), torch.float16))

    def count(module: nn.Module, *kinds: type[nn.Module]) -> int:
        return sum(isinstance(part, kinds) for part in module.modules())

    assert count(other, nn.GroupNorm) == count(default, nn.BatchNorm2d)
    assert count(other, Named) == count(default, nn.ReLU)
    assert count(other, nn.BatchNorm2d, nn.ReLU) == 0
    assert {(p.device.type, p.dtype) for p in other.parameters()} <= {("meta", torch.float16)}
    # In place at the same spots, and nowhere else.
    flags = [[m.inplace for m in module.modules() if isinstance(m, nn.ReLU | Named)] for module in (default, other)]
    assert flags[0] == flags[1]
    assert count(build(Layers(act=Plain)), Plain) == count(default, nn.ReLU)


def test_layers_alone():
    assert Layers().placement == {}
    layers = Layers(device="meta")
    assert layers.placement == {"device": "meta"}
    convolution = layers.conv(4, 6, 3, stride=2, padding=1, groups=2)
    assert convolution.bias is None and convolution.weight.shape == (6, 2, 3, 3) and convolution.weight.is_meta
    assert convolution.stride == (2, 2) and convolution.padding == (1, 1)
    assert isinstance(layers.normalize(6), nn.BatchNorm2d) and layers.normalize(6).weight.shape == (6,)
    assert layers.activate(inplace=True).inplace and not layers.activate().inplace
    # What does not know "in place" is taken as it is.
    assert not hasattr(Layers(act=Plain).activate(inplace=True), "inplace")


def test_the_imagenet_stem_halves_three_times():
    stem0, stem1 = build_imagenet_stem(8, 5)
    x = torch.zeros(2, 5, 97, 64)
    assert stem0(x).shape == (2, 8, math.ceil(97 / 4), 16)
    assert stem1(stem0(x)).shape == (2, 8, math.ceil(97 / 8), 8)
