"""The seven operations of the DARTS space, and the layers around them.

Module and parameter names follow the official GeNAS code (clovaai/GeNAS@fd3cba8, after DARTS and RLNAS), so
that its checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DilConv",
    "FactorizedReduce",
    "Identity",
    "ReLUConvBN",
    "SepConv",
    "build_operation",
    "drop_path",
]


class Identity(nn.Identity):
    """Skip connection of stride 1; drop path leaves it alone."""


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, batch normalisation: ``(N, C_in, H, W)`` to ``(N, C_out, H, W)``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halve the resolution: two strided 1x1 convolutions, the second one pixel further, concatenated.

    ``(N, C_in, H, W)`` to ``(N, C_out, ceil(H / 2), ceil(W / 2))``. On odd sizes the second half reads one row
    and column of zeros beyond the image, so that both halves agree; on even sizes nothing is padded and the
    result is that of the official code.

    Raises:
        ValueError: ``out_channels`` is odd.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"FactorizedReduce needs an even number of output channels, got {out_channels}.")
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        shifted = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))


class DilConv(nn.Module):
    """ReLU, depthwise convolution of dilation 2, pointwise convolution, batch normalisation."""

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(
                channels,
                channels,
                kernel_size,
                stride=stride,
                padding=kernel_size - 1,
                dilation=2,
                groups=channels,
                bias=False,
            ),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise separable convolution, applied twice; the stride is that of the first."""

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            *self._half(channels, kernel_size, stride),
            *self._half(channels, kernel_size, 1),
        )

    @staticmethod
    def _half(channels: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
        padding = kernel_size // 2
        return (
            nn.ReLU(inplace=False),
            nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda channels, stride: nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    "skip_connect": lambda channels, stride: Identity() if stride == 1 else FactorizedReduce(channels, channels),
    "sep_conv_3x3": lambda channels, stride: SepConv(channels, 3, stride),
    "sep_conv_5x5": lambda channels, stride: SepConv(channels, 5, stride),
    "dil_conv_3x3": lambda channels, stride: DilConv(channels, 3, stride),
    "dil_conv_5x5": lambda channels, stride: DilConv(channels, 5, stride),
}


def build_operation(name: str, channels: int, stride: int) -> nn.Module:
    """Build one operation, ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``.

    Args:
        name: One of :data:`genas_plugins.genotype.OPERATIONS` but ``none``.
        channels: C, in and out.
        stride: 1, or 2 on the edges that leave the inputs of a reduction cell.

    Raises:
        ValueError: ``name`` is none of the seven operations.
    """
    if name not in _BUILDERS:
        raise ValueError(f"Unknown operation {name!r}; valid operations: {', '.join(_BUILDERS)}.")
    return _BUILDERS[name](channels, stride)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero whole samples of ``x``, ``(N, C, H, W)``, and scale the others by ``1 / (1 - probability)``.

    Drawn per sample and edge, as FractalNet and DARTS do.
    """
    keep = 1.0 - probability
    mask = torch.empty((x.shape[0], 1, 1, 1), device=x.device, dtype=x.dtype).bernoulli_(keep)
    return x * (mask / keep)
