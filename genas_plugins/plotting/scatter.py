"""Picture of a rank correlation: every score against the accuracy, one panel each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from genas_plugins.plotting._style import GREY, INK, PALETTE, figure_file

__all__ = ["plot_scatter"]

_COLUMNS = 4


def plot_scatter(
    columns: Mapping[str, Sequence[float]],
    accuracies: Sequence[float],
    path: str | os.PathLike[str],
    taus: Mapping[str, float],
) -> Path:
    """Draw the rank of each architecture by a score against its accuracy.

    Ranks, not scores: the units of scores differ by orders of magnitude, and ranks are what is compared.

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
    with figure_file(path, 3.0 * _COLUMNS, 2.6 * rows) as figure:
        for number, (name, column) in enumerate(columns.items()):
            axes = figure.add_subplot(rows, _COLUMNS, number + 1)
            order = sorted(range(len(column)), key=lambda index, column=column: column[index])
            ranks = [0.0] * len(order)
            for rank, index in enumerate(order):
                ranks[index] = rank / max(1, len(order) - 1)
            axes.scatter(ranks, accuracies, s=5, color=PALETTE[0], alpha=0.5, linewidths=0)
            axes.set_title(f"{name}\nτ = {taus[name]:.3f}", fontsize=7.5, color=INK)
            axes.tick_params(labelsize=7)
            if number % _COLUMNS == 0:
                axes.set_ylabel("accuracy, %", fontsize=7.5, color=GREY)
            if number >= len(columns) - _COLUMNS:
                axes.set_xlabel("rank by score, worst to best", fontsize=7.5, color=GREY)
        figure.tight_layout()
    return Path(path)
