"""Parameters and multiply-adds of a network, and the widest network within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from genas_plugins._messages import shown
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import MAX_CHANNELS, CellNetwork
from genas_plugins.scoring.batchnorm import evaluation_mode

__all__ = ["Size", "count_macs", "count_parameters", "fit_channels", "height_and_width"]

Size = int | tuple[int, int]
"""Height and width in pixels; a number for both."""

_LARGEST_IMAGE = 2**16


def height_and_width(size: Size) -> tuple[int, int]:
    """Both, also where one number stands for them."""
    return (size, size) if isinstance(size, int) else size


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: Size = 224, channels: int = 3) -> int:
    """Multiply-adds of one image ``(1, channels, height, width)`` in evaluation mode.

    Counts convolutions and linear layers (:mod:`torch.utils.flop_counter`, halved), as the paper's tables do.
    The model's mode is restored.

    Example:
        >>> from torch import nn
        >>> from genas_plugins.counting import count_macs
        >>> count_macs(nn.Conv2d(3, 8, kernel_size=3, padding=1), image_size=32)  # 32 * 32 * 3 * 8 * 9
        221184
    """
    first = next(model.parameters())
    image = torch.empty((1, channels, *height_and_width(image_size)), device=first.device, dtype=first.dtype)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter, _WithoutMultiplications():
        model(image)
    return counter.get_total_flops() // 2


def fit_channels(genotype: Genotype, macs: float = 600e6, image_size: int = 224, num_cells: int = 14) -> int:
    """The largest even number of initial channels with which an ImageNet network stays within a budget.

    Args:
        genotype: The two cells.
        macs: The budget: most multiply-adds of one image, for 3 channels and 1000 classes; the paper's networks are
            near
            600 million.
        image_size: Height and width of the image in pixels.
        num_cells: Cells in the stack.

    Raises:
        ValueError: Even the narrowest network needs more; the message says how much. Or ``macs`` is not a finite
            number, or more than the widest network of :func:`~genas_plugins.darts.network.cell_shapes` needs; or
            ``image_size`` is not from 1 to 65,536.

    Example:
        >>> from genas_plugins import ZOO
        >>> from genas_plugins.counting import fit_channels
        >>> genotype = ZOO["genas_flatness_c100"].genotype
        >>> fit_channels(genotype), fit_channels(genotype, macs=300e6)
        (46, 32)
    """
    if not math.isfinite(macs):
        raise ValueError(f"A budget of multiply-adds must be a finite number, got {macs}.")
    if not 1 <= image_size <= _LARGEST_IMAGE:
        raise ValueError(f"image_size must be from 1 to {_LARGEST_IMAGE:,} pixels, got {shown(image_size)}.")
    narrow, wide = (_count(genotype, channels, image_size, num_cells) for channels in (2, 4))
    if narrow > macs:
        raise ValueError(
            f"No network of this genotype fits {macs / 1e6:g} M multiply-adds: the narrowest (2 channels) needs "
            f"{narrow / 1e6:.1f} M at {image_size} pixels."
        )
    # Each layer has a multiple of C channels on one or both sides, so the count is exactly quadratic in C. With C = 2 k
    # it is a k^2 + b k with integers a and b, whose positive root is rounded down in integer arithmetic.
    a, b = (wide - 2 * narrow) // 2, (4 * narrow - wide) // 2
    channels = 2 * ((math.isqrt(b * b + 4 * a * math.floor(macs)) - b) // (2 * a))
    if channels > MAX_CHANNELS:
        most = a * (MAX_CHANNELS // 2) ** 2 + b * (MAX_CHANNELS // 2)
        raise ValueError(
            f"A budget of {macs / 1e6:g} M multiply-adds is beyond the widest network that is built: with "
            f"{MAX_CHANNELS:,} channels it needs {most / 1e6:.4g} M at {image_size} pixels."
        )
    return channels


class _WithoutMultiplications(TorchFunctionMode):
    """Passes over layers that keep the shape and are not counted; on the meta device they take most of the time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (F.batch_norm, F.relu) and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@lru_cache
def _count(genotype: Genotype, channels: int, image_size: int, num_cells: int) -> int:
    with torch.device("meta"):
        return count_macs(CellNetwork(genotype, channels, num_cells, 1000), image_size)
