"""Picture of both flatnesses of an architecture: its neighbours' scores, and its loss under noise on the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genas_plugins.plotting._style import GREY, INK, PALETTE, figure_file, short_number
from genas_plugins.plotting.curves import LossCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Neighbour", "plot_neighbourhood"]


@dataclass(frozen=True)
class Neighbour:
    """An architecture one edit away.

    Attributes:
        edge: What was changed, for instance ``"0_1"``.
        choice: What it was changed to, an operation.
        score: Its own score.
        truth: Its true accuracy in percent, where that is known.
    """

    edge: str
    choice: str
    score: float
    truth: float | None = None


def plot_neighbourhood(
    own: float,
    neighbours: Sequence[Neighbour],
    path: str | os.PathLike[str],
    *,
    curve: LossCurve | None = None,
    truth: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw the neighbours' scores, sorted and by edge, and beside them the loss under noise on the weights.

    Args:
        own: Score of the architecture itself.
        neighbours: Its neighbours, one or more.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        curve: Losses of the architecture, where flatness was measured.
        truth: True accuracy of the architecture; a second row is drawn where all neighbours have theirs.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: There is no neighbour, or the suffix is unknown.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    if not neighbours:
        raise ValueError("There is no neighbour to draw.")
    known = truth is not None and all(neighbour.truth is not None for neighbour in neighbours)
    choices = list(dict.fromkeys(sorted(neighbour.choice for neighbour in neighbours)))
    colours = {choice: PALETTE[number % len(PALETTE)] for number, choice in enumerate(choices)}
    with figure_file(path, 12.5, 7.6 if known else 4.4) as figure:
        top = 0.91 if known else 0.85
        panels = figure.subplots(1 + known, 3, squeeze=False, width_ratios=(1, 1.5, 1))
        rows = [("score", own, [n.score for n in neighbours])]
        rows += [("true accuracy, %", truth, [n.truth for n in neighbours])] if known else []
        for (label, middle, values), (sorted_axes, edge_axes, _) in zip(rows, panels, strict=True):
            _draw_sorted(sorted_axes, middle, values, [colours[n.choice] for n in neighbours], label)
            _draw_by_edge(edge_axes, middle, values, neighbours, colours)
        _draw_curve(panels[0][2], curve)
        if known:
            _draw_against_truth(panels[1][2], (own, truth), neighbours, colours)
        figure.tight_layout(rect=(0, 0, 1, top))
        marks = [panels[0][0].scatter([], [], color=colour, label=choice) for choice, colour in colours.items()]
        marks += [panels[0][0].plot([], [], color=INK, linewidth=1.2, label="the architecture itself")[0]]
        marks += [panels[0][0].plot([], [], color=INK, linewidth=1.2, linestyle="--", label="mean of all")[0]]
        place = {"loc": "upper left", "bbox_to_anchor": (0.01, 0.94 if known else 0.91), "ncols": 9}
        figure.legend(handles=marks, **place, fontsize=7.5, columnspacing=1.2, handletextpad=0.3)
        figure.text(0.02, 0.96 if known else 0.94, title or "", fontsize=12, fontweight="bold", parse_math=False)
    return Path(path)


def _draw_sorted(axes: Axes, own: float, values: Sequence[float], colours: Sequence[str], label: str) -> None:
    order = np.argsort(values)[::-1]
    axes.scatter(range(1, len(values) + 1), np.take(values, order), s=18, c=np.take(colours, order), linewidths=0)
    _lines(axes, own, values)
    axes.set_xlabel("neighbour, best first")
    axes.set_ylabel(label)


def _draw_by_edge(
    axes: Axes, own: float, values: Sequence[float], neighbours: Sequence[Neighbour], colours: dict[str, str]
) -> None:
    edges = sorted({neighbour.edge for neighbour in neighbours})
    places = [edges.index(neighbour.edge) for neighbour in neighbours]
    axes.scatter(places, values, s=22, c=[colours[n.choice] for n in neighbours], alpha=0.85, linewidths=0)
    _lines(axes, own, values)
    axes.set_xticks(range(len(edges)), edges, rotation=90 if len(edges) > 8 else 0, fontsize=7.5)
    axes.set_xlabel("edge that was changed")
    axes.grid(axis="x")


def _lines(axes: Axes, own: float, values: Sequence[float]) -> None:
    axes.axhline(own, color=INK, linewidth=1.2, zorder=1)
    axes.axhline(float(np.mean([own, *values])), color=INK, linewidth=1.2, linestyle="--", zorder=1)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)


def _draw_curve(axes: Axes, curve: LossCurve | None) -> None:
    if curve is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "flatness under noise\nwas not measured", ha="center", color=GREY, transform=axes.transAxes)
        return
    axes.plot(curve.sigmas, curve.losses, "o-", color=PALETTE[0], markersize=4)
    axes.set_xlabel(r"noise on the weights, $\sigma$")
    axes.set_ylabel("loss, nats")
    axes.set_ylim(0, 1.06 * max(curve.losses))
    axes.set_xticks(curve.sigmas, map(short_number, curve.sigmas))


def _draw_against_truth(
    axes: Axes, own: tuple[float, float], neighbours: Sequence[Neighbour], colours: dict[str, str]
) -> None:
    points = [n.score for n in neighbours], [n.truth for n in neighbours]
    axes.scatter(*points, s=22, c=[colours[n.choice] for n in neighbours], linewidths=0)
    axes.scatter(*own, s=60, facecolors="none", edgecolors=INK, linewidths=1.4)
    axes.ticklabel_format(axis="x", scilimits=(-2, 4), useMathText=True)
    axes.set_xlabel("score")
    axes.set_ylabel("true accuracy, %")
