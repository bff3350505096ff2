"""Settings that a user hands over: what no measurement and no training can use is refused where it enters.

Upper bounds are far beyond anything in use. What they refuse would not fit into any machine, would never end, or would
leave the range of float32.
"""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch

from genas_plugins._messages import shown

__all__ = ["MOST", "MOST_IMAGES", "MOST_SEED", "check_count", "check_device", "check_flag", "check_real", "check_seed"]

MOST = 1_000_000
"""Of whatever is counted and names no bound of its own."""

MOST_IMAGES = 2**40
"""More than any data set has."""

MOST_SEED = 2**63 - 1
"""The largest seed that PyTorch and NumPy take both, as a number with a sign."""

_LARGEST = sys.float_info.max
_SHOWN = 80


def check_count(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """Return a whole number within its bounds.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is out of its bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {shown(value, _SHOWN)}.")
    if value < least:
        bound = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {bound}, got {shown(value, _SHOWN)}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {shown(value, _SHOWN)}.")
    return int(value)


def check_real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Return a finite number within its bounds; ``above`` and ``below`` are not in them, ``least`` and ``most`` are.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite or out of its bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value, _SHOWN)}.")
    # Comparisons with NaN are false; a whole number may be too large for a float.
    kept = (
        (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
        and -_LARGEST <= value <= _LARGEST
    )
    if not kept:
        raise ValueError(f"{name} must be {_interval(least, above, below, most)}, got {shown(value, _SHOWN)}.")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return what is true or false; text and numbers are neither.

    Raises:
        TypeError: It is no truth value.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {shown(value, _SHOWN)}.")
    return value


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed that all generators take.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is negative or above :data:`MOST_SEED`.
    """
    return check_count(name, seed, 0, MOST_SEED)


def check_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return a device that this machine has.

    Raises:
        ValueError: There is no such kind of device, or this machine has none, or not so many of it.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be cpu, cuda, cuda:1 or another of PyTorch's, got {shown(device, _SHOWN)}."
        ) from error
    if found.type != "cuda":
        return found
    there = torch.cuda.device_count()
    if (found.index or 0) >= there:
        raise ValueError(f"{name} is {found}, but PyTorch finds {there} CUDA devices here; expected cpu or another.")
    return found


def _interval(least: float | None, above: float | None, below: float | None, most: float | None) -> str:
    if above is not None and most is not None:
        return f"in ({above:g}, {most:g}]"
    bounds = {"at least": least, "larger than": above, "smaller than": below, "at most": most}
    return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None) or "finite"
