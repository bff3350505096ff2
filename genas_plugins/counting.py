"""Parameters and multiply-adds of a network."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genas_plugins.scoring.batchnorm import evaluation_mode

__all__ = ["count_macs", "count_parameters"]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_size: int = 224) -> int:
    """Multiply-adds of one image ``(1, 3, image_size, image_size)`` in evaluation mode.

    Counts convolutions and linear layers (:mod:`torch.utils.flop_counter`, halved), as the paper's tables do.
    The model is left in the mode it had.
    """
    first = next(model.parameters())
    image = torch.empty((1, 3, image_size, image_size), device=first.device, dtype=first.dtype)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter:
        model(image)
    return counter.get_total_flops() // 2
