"""Validates the settings of users where they enter.

Upper bounds are far beyond anything in use: larger values would not fit into memory, never end, or overflow float32.
"""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch

from genas_plugins._messages import shown

__all__ = ["MOST", "MOST_IMAGES", "MOST_SEED", "check_count", "check_device", "check_flag", "check_real", "check_seed"]

MOST = 1_000_000
"""Default upper bound of counts."""

MOST_IMAGES = 2**40
"""Upper bound of numbers of images, more than any data set has."""

MOST_SEED = 2**63 - 1
"""The largest seed that both PyTorch and NumPy accept, a signed 64-bit integer."""

_LARGEST = sys.float_info.max
_SHOWN = 80


def check_count(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """Return ``value`` as an integer from ``least`` to ``most``.

    Raises:
        TypeError: ``value`` is not an integer; ``bool`` does not count as one.
        ValueError: It is out of bounds; the message begins with ``name``.

    Example:
        >>> from genas_plugins.checks import check_count
        >>> check_count("epochs", 0)
        Traceback (most recent call last):
            ...
        ValueError: epochs must be at least 1, got 0.
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
    """Return ``value`` as a finite float within its bounds, of which ``above`` and ``below`` are exclusive.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: It is not finite or out of bounds.
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
    """Return ``value`` if it is a ``bool``.

    Raises:
        TypeError: It is text, a number or anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {shown(value, _SHOWN)}.")
    return value


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return ``seed`` if PyTorch and NumPy both accept it.

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: It is negative or above :data:`MOST_SEED`.
    """
    return check_count(name, seed, 0, MOST_SEED)


def check_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return ``device`` if this machine has it.

    Raises:
        ValueError: The kind of device is unknown, or this machine has no CUDA device of that index, or no MPS.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be cpu, cuda, cuda:1 or another of PyTorch's, got {shown(device, _SHOWN)}."
        ) from error
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{name} is {found}, but PyTorch finds no such GPU of Apple's here; expected cpu or another.")
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
