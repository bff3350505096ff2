"""Picture of a search by several objectives: all candidates, and the front of those that none dominates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from genas_plugins.plotting._style import FAINT, GREY, INK, PALETTE, figure_file
from genas_plugins.search.budget import in_units
from genas_plugins.search.pareto import OBJECTIVES, objective
from genas_plugins.search.record import Record

__all__ = ["plot_front"]


def plot_front(
    records: Sequence[Record],
    front: Sequence[Record],
    objectives: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Path:
    """Draw the first objective against each of the others.

    Args:
        records: All candidates of the search; those without a score are left out.
        front: Those of them that no other dominates.
        objectives: Their names, two or more.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: There is no front, or the suffix is unknown.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    if not front:
        raise ValueError("There is no front to draw: no candidate was measured.")
    first, *others = objectives
    scored = [record for record in records if record.score is not None]
    with figure_file(path, 1.0 + 5.4 * len(others), 4.8) as figure:
        panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
        for axes, other in zip(panels, others, strict=True):
            last = max(record.generation for record in scored) or 1
            shades = axes.scatter(
                *([objective(record, name) for record in scored] for name in (other, first)),
                c=[record.generation for record in scored],
                cmap="Greys",
                vmin=-0.4 * last,
                vmax=1.3 * last,
                s=14,
                linewidths=0,
                label=f"{len(scored)} candidates, later ones darker",
            )
            shades.set_zorder(1)
            ordered = sorted(front, key=lambda record: objective(record, other))
            points = [[objective(record, name) for record in ordered] for name in (other, first)]
            if len(others) == 1:
                # Between two of the front nothing better was found: from a cost on, its value is to be had.
                style = {"where": "post" if other not in OBJECTIVES else "pre", "color": PALETTE[0], "linewidth": 1.2}
                axes.step(*points, **style, zorder=2)
            label = f"front: {len(front)} that none dominates"
            axes.scatter(*points, s=30, color=PALETTE[0], edgecolors="white", linewidths=0.7, label=label, zorder=3)
            axes.grid(color=FAINT, alpha=0.4)
            axes.set_xlabel(f"{other} ({'higher' if other in OBJECTIVES else 'less'} is better)")
            if other not in OBJECTIVES:
                axes.xaxis.set_major_formatter(lambda value, position: in_units(value))
        panels[0].set_ylabel(first if first not in OBJECTIVES else f"{first} (higher is better)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.tight_layout(rect=(0, 0, 1, 0.86))
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.02, 0.925), ncols=2, labelcolor=GREY)
        figure.text(0.035, 0.945, title or "", fontsize=12.5, fontweight="bold", color=INK, parse_math=False)
    return Path(path)
