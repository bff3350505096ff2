"""Where numbers of float64 are computed: on the device that has what they are made from, or else on the CPU.

Apple's MPS has no float64, and neither have some of Intel's GPUs: a tensor of that type raises there. What is summed
over many images, or over all weights, or multiplied over many layers is kept in it nevertheless. Where the device
cannot, it is read from there and added up on the CPU, which waits for it at every batch; on all others nothing is read
in between.

Nothing in these packages makes a tensor of float64 by any other way than through this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["check_float64", "float64_device", "full_in_float64", "has_float64", "host_float64", "in_float64"]


def has_float64(device: torch.device) -> bool:
    """Whether a device computes with float64."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it has float64, otherwise the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def in_float64(value: Tensor) -> Tensor:
    """The same numbers as float64, where these can be; gradients flow through.

    >>> in_float64(torch.tensor([0.5, 3.0], dtype=torch.float16))
    tensor([0.5000, 3.0000], dtype=torch.float64)
    """
    # In two steps: a copy that also converts would convert on the device.
    return value.double() if has_float64(value.device) else value.cpu().double()


def full_in_float64(size: Sequence[int], value: float, device: torch.device) -> Tensor:
    """A tensor of one number, where a device has float64; for what :func:`in_float64` gives to be added to."""
    return torch.full(tuple(size), value, dtype=torch.float64, device=float64_device(device))


def host_float64(values: Sequence[float]) -> Tensor:
    """A row of numbers on the CPU, whatever PyTorch's default device is."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def check_float64(dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Raise if a network is to compute in float64 on a device that has none.

    Args:
        dtypes: Types of its parameters.
        device: Where it is to be.

    Raises:
        ValueError: The message has the device.
    """
    if torch.float64 in dtypes and not has_float64(device):
        raise ValueError(
            f"The network is of float64, which {device.type} does not have: take float32 (in an experiment "
            "training.precision: 32-true), or another device (training.accelerator: cpu)."
        )
