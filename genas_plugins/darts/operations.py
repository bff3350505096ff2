"""The seven operations of the DARTS space, and the layers around them.

Module and parameter names follow the official GeNAS code (clovaai/GeNAS@fd3cba8, after DARTS and RLNAS), so
that its checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from genas_plugins.scoring.inference import InferenceNetwork
    from genas_plugins.scoring.layers import Branch

__all__ = [
    "DilConv",
    "FactorizedReduce",
    "Identity",
    "Layers",
    "NoEdge",
    "ReLUConvBN",
    "SepConv",
    "build_operation",
    "drop_path",
]


@dataclass(frozen=True)
class Layers:
    """The kinds of layers that a network is built from, and where their tensors are created.

    Attributes:
        norm: Builds a normalisation layer for a number of channels.
        act: Builds an activation.
        device: Device of new parameters and buffers; None: PyTorch's default.
        dtype: Type of new parameters; None: PyTorch's default.
    """

    norm: Callable[..., nn.Module] = nn.BatchNorm2d
    act: Callable[[], nn.Module] = nn.ReLU
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def placement(self) -> dict[str, Any]:
        """``device`` and ``dtype`` where they are given, as keyword arguments."""
        given = {"device": self.device, "dtype": self.dtype}
        return {name: value for name, value in given.items() if value is not None}

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, **arguments: Any) -> nn.Conv2d:
        """A convolution without bias."""
        return nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **arguments, **self.placement)

    def normalize(self, channels: int) -> nn.Module:
        """A normalisation layer."""
        return self.norm(channels, **self.placement)

    def activate(self, inplace: bool = False) -> nn.Module:
        """An activation layer, in place if asked for and supported."""
        layer = self.act().to(**self.placement)
        if hasattr(layer, "inplace"):
            layer.inplace = inplace
        return layer


_DEFAULT = Layers()


class Identity(nn.Identity):
    """Skip connection of stride 1; drop path leaves it alone."""


class NoEdge(nn.Identity):
    """Holds the place of an edge that is missing; it is not run."""


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, batch normalisation: ``(N, C_in, H, W)`` to ``(N, C_out, H, W)``."""

    def __init__(self, in_channels: int, out_channels: int, layers: Layers = _DEFAULT) -> None:
        super().__init__()
        self.op = nn.Sequential(
            layers.activate(),
            layers.conv(in_channels, out_channels, 1),
            layers.normalize(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def after_relu(self, x: Tensor) -> Tensor:
        """The layers behind the ReLU."""
        return self.op[2](self.op[1](x))


class FactorizedReduce(nn.Module):
    """Halve the resolution: two strided 1x1 convolutions, the second shifted by one pixel, concatenated.

    ``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / 2), ceil(W / 2))``. On odd sizes the second half reads one row
    and column of zeros beyond the image, so that both halves agree; on even sizes nothing is padded and the
    result is that of the official code.

    Args:
        in_channels: Channels of the input, C_in.
        out_channels: Channels of the output, C_out; even.
        layers: Kinds of layers to build from.
        dilation: Shift of the second convolution in pixels; above 1 only without stride.
        replace_stride: Keep the resolution; every second row and column equals the output of the strided layer.

    Raises:
        ValueError: ``out_channels`` is odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: Layers = _DEFAULT,
        dilation: int = 1,
        replace_stride: bool = False,
    ) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"FactorizedReduce needs an even number of output channels, got {out_channels}.")
        stride = 1 if replace_stride else 2
        self.relu = layers.activate()
        self.conv_1 = layers.conv(in_channels, out_channels // 2, 1, stride=stride)
        self.conv_2 = layers.conv(in_channels, out_channels // 2, 1, stride=stride)
        self.bn = layers.normalize(out_channels)
        self.shift = dilation
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(self.relu(x))

    def after_relu(self, x: Tensor) -> Tensor:
        """The layers behind the ReLU."""
        if self.training and self.stride == 2 and not torch.jit.is_tracing():
            return self.bn(reduce_for_training(x, self.conv_1.weight, self.conv_2.weight))
        shifted = shift_image(x, self.shift)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))

    def inference(self, network: InferenceNetwork) -> Branch:
        """See :meth:`genas_plugins.scoring.inference.InferenceNetwork.branch`."""
        from genas_plugins.darts.inference import factorized_reduce

        return factorized_reduce(network, self)


def shift_image(x: Tensor, distance: int) -> Tensor:
    """Shift ``x`` up and left by ``distance`` pixels and fill up with zeros.

    Even and odd sizes take the same path, so that a network traced or exported at one size runs at all sizes.
    """
    return F.pad(x, [-distance, distance, -distance, distance])


@torch.fx.wrap
def reduce_for_training(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The two convolutions of a :class:`FactorizedReduce` of stride 2, concatenated, with a backward pass for CPUs.

    ``(N, C_in, H, W)`` and kernels ``(C_out / 2, C_in, 1, 1)`` to ``(N, C_out, ceil(H / 2), ceil(W / 2))``. A leaf in
    traced graphs, because it depends on the device.
    """
    if x.device.type != "cpu":
        return torch.cat([F.conv2d(x, first, None, 2), F.conv2d(shift_image(x, 1), second, None, 2)], dim=1)
    # The gradient of a slice is mostly zeros and that of a concatenation is not contiguous, which is slow. One
    # convolution whose kernels read the first or the last pixel of each 2x2 block has neither.
    kernels = torch.cat([F.pad(first, [0, 1, 0, 1]), F.pad(second, [1, 0, 1, 0])])
    if x.shape[2] % 2 > 0 or x.shape[3] % 2 > 0:
        x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
    return F.conv2d(x, kernels, None, 2)


@torch.fx.wrap
def dilated_for_training(x: Tensor, kernels: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """A dilated depthwise convolution with a fast backward pass on CPUs; the result is that of ``conv2d``.

    The gradients of dilated depthwise convolutions take oneDNN 5 to 20 times as long as those of ordinary ones. Pixels
    whose coordinates differ by multiples of the dilation only interact with one another, so they are convolved as
    images of their own, without dilation.

    Args:
        x: ``(N, C, H, W)``.
        kernels: ``(C, 1, k, k)``.
        stride: 1 or ``dilation``; other strides, and other devices, use ``conv2d``.
        padding: A multiple of ``dilation``.
        dilation: Above 1.
    """
    channels, size = kernels.shape[0], kernels.shape[2]
    # Keeps the gradient in the layout of the kernels, as DistributedDataParallel requires.
    kernels = kernels.flatten(0, 1)[:, None]
    if x.device.type != "cpu" or (stride != 1 and stride != dilation):
        return F.conv2d(x, kernels, None, stride, padding, dilation, channels)
    if stride == dilation:
        return F.conv2d(x[:, :, ::stride, ::stride], kernels, None, 1, padding // dilation, 1, channels)
    height, width = x.shape[2], x.shape[3]
    if height % dilation > 0 or width % dilation > 0:
        x = F.pad(x, [0, (dilation - width % dilation) % dilation, 0, (dilation - height % dilation) % dilation])
    rows, columns = x.shape[2] // dilation, x.shape[3] // dilation
    x = x.permute(0, 2, 3, 1).reshape(-1, rows, dilation, columns, dilation, channels)
    x = x.permute(2, 4, 0, 1, 3, 5).reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
    around = padding // dilation
    if min(rows, columns) < size:
        # oneDNN is slow again where the kernel is larger than the image: the padding becomes part of the image.
        x, around = F.pad(x, [around, around, around, around]), 0
    x = F.conv2d(x, kernels, None, 1, around, 1, channels)
    x = x.permute(0, 2, 3, 1).reshape(dilation, dilation, -1, rows, columns, channels)
    x = x.permute(2, 3, 0, 4, 1, 5).reshape(-1, rows * dilation, columns * dilation, channels).permute(0, 3, 1, 2)
    return x[:, :, :height, :width]


class DilConv(nn.Module):
    """ReLU, depthwise convolution of dilation 2, pointwise convolution, batch normalisation."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int,
        layers: Layers = _DEFAULT,
        dilation: int = 1,
        replace_stride: bool = False,
    ) -> None:
        super().__init__()
        depthwise = layers.conv(
            channels,
            channels,
            kernel_size,
            stride=1 if replace_stride else stride,
            padding=(kernel_size - 1) * dilation,
            dilation=2 * dilation,
            groups=channels,
        )
        self.op = nn.Sequential(
            layers.activate(), depthwise, layers.conv(channels, channels, 1), layers.normalize(channels)
        )
        self.stride, self.padding, self.dilation = depthwise.stride[0], depthwise.padding[0], depthwise.dilation[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(self.op[0](x))

    def after_relu(self, x: Tensor) -> Tensor:
        """The layers behind the ReLU."""
        if self.training and not torch.jit.is_tracing():
            x = dilated_for_training(x, self.op[1].weight, self.stride, self.padding, self.dilation)
        else:
            x = self.op[1](x)
        return self.op[3](self.op[2](x))


class SepConv(nn.Module):
    """Depthwise separable convolution, applied twice; the stride is that of the first."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int,
        layers: Layers = _DEFAULT,
        dilation: int = 1,
        replace_stride: bool = False,
    ) -> None:
        super().__init__()
        first_stride, second_dilation = (1, dilation * stride) if replace_stride else (stride, dilation)
        self.op = nn.Sequential(
            *self._half(channels, kernel_size, first_stride, dilation, layers),
            *self._half(channels, kernel_size, 1, second_dilation, layers),
        )

    @staticmethod
    def _half(channels: int, kernel_size: int, stride: int, dilation: int, layers: Layers) -> tuple[nn.Module, ...]:
        padding = kernel_size // 2 * dilation
        return (
            layers.activate(),
            layers.conv(
                channels,
                channels,
                kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=channels,
            ),
            layers.conv(channels, channels, 1),
            layers.normalize(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DilatedAvgPool(nn.Module):
    """3x3 average pooling with dilation that does not count the padding and keeps the resolution.

    PyTorch's own average pooling cannot be dilated.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        return self._sum(x) / self._sum(torch.ones_like(x[:1, :1]))

    def _sum(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = F.pad(x, [d, d, d, d])
        x = x[:, :, : -2 * d] + x[:, :, d:-d] + x[:, :, 2 * d :]
        return x[:, :, :, : -2 * d] + x[:, :, :, d:-d] + x[:, :, :, 2 * d :]


def _max_pool(channels: int, stride: int, layers: Layers, dilation: int, replace_stride: bool) -> nn.Module:
    if dilation > 1:
        # PyTorch pads by at most half of the kernel, dilated or not.
        return nn.Sequential(nn.ConstantPad2d(dilation, float("-inf")), nn.MaxPool2d(3, stride=1, dilation=dilation))
    return nn.MaxPool2d(3, stride=1 if replace_stride else stride, padding=1)


def _avg_pool(channels: int, stride: int, layers: Layers, dilation: int, replace_stride: bool) -> nn.Module:
    if dilation > 1:
        return DilatedAvgPool(dilation)
    return nn.AvgPool2d(3, stride=1 if replace_stride else stride, padding=1, count_include_pad=False)


def _skip(channels: int, stride: int, layers: Layers, dilation: int, replace_stride: bool) -> nn.Module:
    return Identity() if stride == 1 else FactorizedReduce(channels, channels, layers, dilation, replace_stride)


def _convolution(kind: type[nn.Module], kernel_size: int) -> Callable[..., nn.Module]:
    def build(channels: int, stride: int, layers: Layers, dilation: int, replace_stride: bool) -> nn.Module:
        return kind(channels, kernel_size, stride, layers, dilation, replace_stride)

    return build


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _avg_pool,
    "skip_connect": _skip,
    "sep_conv_3x3": _convolution(SepConv, 3),
    "sep_conv_5x5": _convolution(SepConv, 5),
    "dil_conv_3x3": _convolution(DilConv, 3),
    "dil_conv_5x5": _convolution(DilConv, 5),
}


def build_operation(
    name: str,
    channels: int,
    stride: int,
    layers: Layers = _DEFAULT,
    dilation: int = 1,
    replace_stride: bool = False,
) -> nn.Module:
    """Build one operation, ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``.

    Args:
        name: One of :data:`genas_plugins.darts.genotype.OPERATIONS` but ``none``.
        channels: Channels of input and output, C.
        stride: 1, or 2 on the edges that leave the inputs of a reduction cell.
        layers: Kinds of layers to build from.
        dilation: Factor d on the spacing of the kernels' taps, on top of that of dilated convolutions: for an input
            whose reduction by d was left out, so that every d-th pixel has the output that it would have after the
            reduction.
        replace_stride: Keep the resolution where the stride would halve it, and dilate the kernels that follow
            within the operation instead; every second output is that of the strided operation. Above a
            dilation of 1 the stride must be 1 or replaced.

    Raises:
        ValueError: ``name`` is none of the seven operations.
    """
    if name not in _BUILDERS:
        raise ValueError(f"Unknown operation {name!r}; valid operations: {', '.join(_BUILDERS)}.")
    return _BUILDERS[name](channels, stride, layers, dilation, replace_stride)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero whole samples of ``x``, ``(N, C, H, W)``, and scale the others by ``1 / (1 - probability)``.

    Drawn per sample and edge, as FractalNet and DARTS do.
    """
    keep = 1.0 - probability
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        mask = torch.empty((x.shape[0], 1, 1, 1), device=x.device, dtype=x.dtype).bernoulli_(keep)
    else:
        # torch.compile would recompile for each probability given to bernoulli_, and give up after eight; in a
        # comparison the probability is an ordinary number.
        mask = (torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep).to(x.dtype)
    return x * (mask / keep)
