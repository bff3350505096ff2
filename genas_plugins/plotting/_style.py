"""Shared by all figures: colours, style, number format and atomic output files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from genas_plugins._optional import require
from genas_plugins.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAINT", "GREY", "INK", "PALETTE", "figure_file", "matplotlib_module", "short_number"]

INK, GREY, FAINT = "#2b2f36", "#6f7680", "#c3c8cf"
PALETTE = ("#3a6ea5", "#c9822b", "#2f8f83", "#9c4f7c", "#8a7a2f", "#5b5ea6", "#b5534c", "#5f7f4f")
_DPI = 160
_STYLE = {
    "svg.hashsalt": "genas-plugins",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#8a9099",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "xtick.color": "#5a616b",
    "ytick.color": "#5a616b",
}
# Without the time of writing, the same input gives the same bytes.
_METADATA = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}


def matplotlib_module(name: str) -> ModuleType:
    """Import ``matplotlib.<name>``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return require(f"matplotlib.{name}", extra="plots", purpose="drawing figures")


@contextmanager
def figure_file(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure in the house style; write it, whole or not at all, when the block succeeds.

    Args:
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        width: Width of the figure in inches.
        height: Height of the figure in inches.

    Raises:
        ValueError: The suffix is unknown.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in _METADATA:
        raise ValueError(
            f"The figure's file name must end in .svg, .png or .pdf, but {str(target)!r} ends in "
            f"{target.suffix!r}: choose one of these suffixes."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(target.parent)!r} for the figure does not exist: create it first.")
    style, figures = matplotlib_module("style"), matplotlib_module("figure")
    with style.context(["default", _STYLE]):
        figure = figures.Figure(figsize=(width, height), dpi=_DPI)
        yield figure
        with atomic_path(target) as scratch:
            figure.savefig(scratch, metadata=_METADATA[suffix])


def short_number(value: float) -> str:
    """``value`` in few characters: 0.003, but 5e-5."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:.4g}" if int(exponent) >= -3 else f"{float(mantissa):g}e{int(exponent)}"
