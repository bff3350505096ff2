"""Picture of a genotype: its two cells as directed graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genas_plugins.darts.genotype import NODES, CellGene, Genotype, cell_edges
from genas_plugins.plotting._layout import (
    LABEL_SIZE,
    NODE_SIZE,
    OUTPUT,
    CellLayout,
    Point,
    bends,
    cell_layout,
)
from genas_plugins.plotting._style import FAINT, GREY, INK, PALETTE, figure_file, matplotlib_module

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cells"]

# Inches: one data unit of the drawing is one inch, so that text and boxes keep their proportions.
_WIDTH, _MARGIN, _MAX_PITCH = 11.0, 0.35, 3.0

# Name in the legend, colour and dashes of each operation, in the order of the legend.
_SEPARABLE = ("separable convolution", PALETTE[0], "solid")
_DILATED = ("dilated convolution", PALETTE[1], "solid")
_POOLING = ("pooling", PALETTE[3], "solid")
_SKIP = ("skip connection", PALETTE[2], (0, (4, 1.6)))
_FAMILIES = {
    "sep_conv_3x3": _SEPARABLE,
    "sep_conv_5x5": _SEPARABLE,
    "dil_conv_3x3": _DILATED,
    "dil_conv_5x5": _DILATED,
    "max_pool_3x3": _POOLING,
    "avg_pool_3x3": _POOLING,
    "skip_connect": _SKIP,
}


def plot_cells(genotype: Genotype, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw the normal and the reduction cell of a genotype as directed graphs, one above the other.

    Args:
        genotype: The genotype to draw; ``c_{k-2}`` and ``c_{k-1}`` are the outputs of the two cells before, and the
            nodes 2 to 5 are concatenated to ``c_k``.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline above the cells.

    Returns:
        The path written.

    Raises:
        TypeError: ``genotype`` is not a :class:`~genas_plugins.Genotype`.
        ValueError: The suffix is unknown.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.

    Example:
        >>> from genas_plugins import ZOO
        >>> from genas_plugins.plotting import plot_cells
        >>> plot_cells(ZOO["genas_flatness_c100"].genotype, "cells.svg")
        PosixPath('cells.svg')
    """
    if not isinstance(genotype, Genotype):
        raise TypeError(
            f"plot_cells draws a Genotype, got {type(genotype).__name__}: pass the genotype of a ZOO entry, "
            "or what find_genotype or Genotype.load returns."
        )
    cells = {"Normal cell": genotype.normal, "Reduction cell": genotype.reduce}
    layouts = {name: cell_layout(cell) for name, cell in cells.items()}
    heights = {name: layout.extent[1] - layout.extent[0] for name, layout in layouts.items()}
    columns = max(layout.nodes[OUTPUT][0] for layout in layouts.values())
    pitch = min(_MAX_PITCH, (_WIDTH - 2 * _MARGIN - NODE_SIZE[0]) / columns)
    headline, heading, footer = (0.5 if title else 0.12), 0.5, 0.6
    height = headline + sum(heights.values()) + len(cells) * heading + footer
    with figure_file(path, _WIDTH, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, height))
        axes.set_axis_off()
        if title:
            axes.text(_MARGIN, height - 0.38, title, fontsize=13, fontweight="bold", parse_math=False)
        top = height - headline
        for name, layout in layouts.items():
            axes.text(_MARGIN, top - 0.3, name, fontsize=10.5, fontweight="bold", color=GREY)
            top -= heading
            left = (_WIDTH - pitch * layout.nodes[OUTPUT][0]) / 2
            _draw_cell(axes, cells[name], layout, (left, top - layout.extent[1]), pitch)
            top -= heights[name]
        _draw_legend(axes)
    return Path(path)


def _draw_cell(axes: Axes, cell: CellGene, layout: CellLayout, origin: Point, pitch: float) -> None:
    """Draw one cell, the inputs' column and y = 0 of the layout at ``origin`` (inches)."""
    patches, path_of = matplotlib_module("patches"), matplotlib_module("path").Path

    def line(points: Sequence[Point], entry: float, **style: Any) -> None:
        vertices = bends(points, pitch, entry) + origin
        curve = path_of(vertices, [path_of.MOVETO] + [path_of.CURVE4] * (len(vertices) - 1))
        axes.add_patch(patches.FancyArrowPatch(path=curve, arrowstyle="-|>", shrinkA=0, shrinkB=0, **style))

    def box(at: Point, size: Point, rounding: float, text: str, font: dict[str, Any], **style: Any) -> None:
        x, y = np.array([at[0] * pitch, at[1]]) + origin
        shape = f"round,pad=0,rounding_size={rounding}"
        corner = (x - size[0] / 2, y - size[1] / 2)
        axes.add_patch(patches.FancyBboxPatch(corner, *size, boxstyle=shape, **style))
        axes.text(x, y, text, ha="center", va="center_baseline", zorder=style["zorder"] + 0.1, **font)

    for points in layout.concat.values():
        line(points, 0.0, mutation_scale=9, color=FAINT, linewidth=1.2, zorder=1)
    lines = list(zip(cell_edges(cell), layout.edges, layout.labels, strict=True))
    for (target, operation, _), points, label in lines:
        _, colour, dashes = _FAMILIES[operation]
        # Two arrows into a node end apart, the one that comes from above at the top.
        others = [other[-2][1] for (node, _, _), other, _ in lines if node == target and other is not points]
        entry = math.copysign(0.07, points[-2][1] - others[0]) if others else 0.0
        style = {"color": colour, "linewidth": 1.5, "linestyle": dashes, "zorder": 2}
        line(points, entry, mutation_scale=10, **style)
        style = {"facecolor": "white", "edgecolor": colour, "linewidth": 0.8, "zorder": 3}
        box(label, LABEL_SIZE, 0.07, operation, {"color": colour, "fontsize": 8.5}, **style)
    looks = {0: ("$c_{k-2}$", "#e9edf2", "#7c8794"), 1: ("$c_{k-1}$", "#e9edf2", "#7c8794")}
    looks |= {node: (str(node), "#fbf3dc", "#b99a4b") for node in NODES}
    looks[OUTPUT] = ("$c_{k}$", "#dfeee6", "#5f8f76")
    for node, (name, face, edge) in looks.items():
        style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.0, "zorder": 4}
        box(layout.nodes[node], NODE_SIZE, 0.1, name, {"color": INK, "fontsize": 10.5}, **style)


def _draw_legend(axes: Axes) -> None:
    for name, colour, dashes in (*dict.fromkeys(_FAMILIES.values()), ("concatenation", FAINT, "solid")):
        axes.plot([], [], color=colour, linestyle=dashes, linewidth=1.8, label=name)
    axes.legend(loc="lower center", ncols=5, handlelength=2.2)
