"""Picture of a rank correlation: every score against the accuracy, one panel each."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import rankdata

from genas_plugins.plotting._style import GREY, INK, PALETTE, figure_file

__all__ = ["plot_scatter"]

_COLUMNS = 4
_TITLE_WIDTH = 40
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plot_scatter(
    columns: Mapping[str, Sequence[float]],
    accuracies: Sequence[float],
    path: str | os.PathLike[str],
    taus: Mapping[str, float],
) -> Path:
    """Draw the rank of each architecture by a score against its rank by accuracy.

    Ranks, because they are what tau compares, and because a few architectures that learn nothing would press all others
    together. Beside the vertical axis stand the accuracies at its quarters.

    Args:
        columns: Scores by name, higher is better, shape ``(n,)`` each.
        accuracies: Shape ``(n,)``, in percent.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        taus: Kendall's tau of each column, for its title.

    Returns:
        The path written.

    Raises:
        ValueError: No column, lengths that differ, or an unknown suffix.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    if not columns:
        raise ValueError("There is no column to draw.")
    if wrong := [name for name, column in columns.items() if len(column) != len(accuracies)]:
        raise ValueError(
            f"{wrong[0]} has {len(columns[wrong[0]])} scores for {len(accuracies)} accuracies: one each is needed."
        )
    rows = math.ceil(len(columns) / _COLUMNS)
    heights = _ranks(accuracies)
    ordered = sorted(accuracies)
    labels = [f"{ordered[round(place * (len(ordered) - 1))]:.1f}" for place in _TICKS]
    with figure_file(path, 3.0 * _COLUMNS, 2.6 * rows) as figure:
        for number, (name, column) in enumerate(columns.items()):
            axes = figure.add_subplot(rows, _COLUMNS, number + 1)
            axes.scatter(_ranks(column), heights, s=5, color=PALETTE[0], alpha=0.5, linewidths=0)
            # As wide as a panel, whose neighbours have titles too.
            title = textwrap.fill(name, _TITLE_WIDTH)
            axes.set_title(f"{title}\nτ = {taus[name]:.3f}", fontsize=7.5, color=INK)
            axes.set_yticks(_TICKS, labels)
            axes.tick_params(labelsize=7)
            if number % _COLUMNS == 0:
                axes.set_ylabel("accuracy, %", fontsize=7.5, color=GREY)
            if number >= len(columns) - _COLUMNS:
                axes.set_xlabel("rank by score, worst to best", fontsize=7.5, color=GREY)
        figure.tight_layout()
    return Path(path)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0, the lowest, to 1; equal values share their mean rank."""
    return ((rankdata(values) - 1) / max(1, len(values) - 1)).tolist()
