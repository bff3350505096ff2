"""Figures: the two cells of a genotype, loss-against-sigma curves, and the progress of a search.

Every function draws with the object-oriented interface of matplotlib (extra ``plots``) in a temporary style:
the caller's pyplot state, backend and rcParams are left alone, and the same input gives the same bytes.
The cells are drawn as layered graphs after Sugiyama, Tagawa and Toda (1981), with the labels as nodes of
their own as in Gansner et al., "A technique for drawing directed graphs" (1993), so that none covers a node.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import isotonic_regression, lsq_linear

from genas_plugins._optional import require
from genas_plugins.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from genas_plugins.genotype import Genotype

__all__ = ["LossCurve", "plot_cells", "plot_loss_curves", "plot_search"]

Cell = Sequence[tuple[str, int]]
Point = tuple[float, float]
# One place in one rank of the layered graph: (kind, number, rank), kind "node", "edge" or "concat".
Item = tuple[str, int, int]

_DPI = 160
_STYLE = {
    "svg.hashsalt": "genas-plugins",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": "#2b2f36",
    "axes.edgecolor": "#8a9099",
    "axes.labelcolor": "#2b2f36",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "xtick.color": "#5a616b",
    "ytick.color": "#5a616b",
}
_INK, _GREY, _FAINT = "#2b2f36", "#6f7680", "#c3c8cf"
_PALETTE = ("#3a6ea5", "#c9822b", "#2f8f83", "#9c4f7c", "#8a7a2f", "#5b5ea6", "#b5534c", "#5f7f4f")
_FAMILIES = {
    "sep": ("separable convolution", "#3a6ea5", "solid"),
    "dil": ("dilated convolution", "#c9822b", "solid"),
    "pool": ("pooling", "#9c4f7c", "solid"),
    "skip": ("skip connection", "#2f8f83", (0, (4, 1.6))),
}
_FAMILY_OF = {
    "max_pool_3x3": "pool",
    "avg_pool_3x3": "pool",
    "skip_connect": "skip",
    "sep_conv_3x3": "sep",
    "sep_conv_5x5": "sep",
    "dil_conv_3x3": "dil",
    "dil_conv_5x5": "dil",
}
_ORIGINS = {"random": "#8d949e", "mutation": "#3a6ea5", "crossover": "#c9822b"}

# Inches: one data unit of the cell drawing is one inch, so that text and boxes keep their proportions.
_CELL_WIDTH, _MARGIN = 11.0, 0.35
_NODE_SIZE, _LABEL_SIZE, _LANE = (0.52, 0.38), (0.95, 0.22), 0.06
_GAP, _OUTPUT = 0.14, 6


def _matplotlib(module: str) -> ModuleType:
    return require(f"matplotlib.{module}", extra="plots", purpose="drawing figures")


@contextmanager
def _figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure in the house style; write it, whole or not at all, when the block succeeds."""
    target = Path(path)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    if target.suffix.lower() not in metadata:
        raise ValueError(
            f"The figure's file name must end in .svg, .png or .pdf, but {str(target)!r} ends in "
            f"{target.suffix!r}: choose one of these suffixes."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(target.parent)!r} for the figure does not exist: create it first."
        )
    style, figures = _matplotlib("style"), _matplotlib("figure")
    suffix = target.suffix.lower()
    with style.context(["default", _STYLE]):
        figure = figures.Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        yield figure
        with atomic_path(target) as scratch:
            figure.savefig(scratch, format=suffix[1:], dpi=_DPI, metadata=metadata[suffix])


# --------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class _Layout:
    """Where everything of one cell goes, in columns (x) and inches (y); the middle is y = 0."""

    nodes: dict[int, Point]
    edges: tuple[tuple[Point, ...], ...]
    labels: tuple[Point, ...]
    concat: dict[int, tuple[Point, ...]]

    @property
    def extent(self) -> Point:
        """Lowest and highest y that anything reaches."""
        boxes = [(y, _NODE_SIZE[1]) for _, y in self.nodes.values()]
        boxes += [(y, _LABEL_SIZE[1]) for _, y in self.labels]
        boxes += [(y, _LANE) for points in (*self.edges, *self.concat.values()) for _, y in points]
        return min(y - size / 2 for y, size in boxes), max(y + size / 2 for y, size in boxes)


def _check_cell(cell: Cell, name: str) -> None:
    if len(cell) != 8:
        raise ValueError(
            f"The {name} cell must have 8 (operation, input) pairs, two a node; got {len(cell)}."
        )
    for position, (operation, source) in enumerate(cell):
        node = 2 + position // 2
        if operation not in _FAMILY_OF:
            raise ValueError(
                f"Unknown operation {operation!r} in the {name} cell: choose from {', '.join(_FAMILY_OF)}."
            )
        if not 0 <= source < node:
            raise ValueError(
                f"Node {node} of the {name} cell takes input {source}: expected 0 to {node - 1}."
            )
    for node in range(2, 6):
        if cell[2 * node - 4][1] == cell[2 * node - 3][1]:
            raise ValueError(f"Node {node} of the {name} cell takes input {cell[2 * node - 4][1]} twice.")


def _label_ranks(cell: Cell, columns: Mapping[int, int]) -> list[int]:
    """The rank in which each edge shows its name: among the gaps it crosses, the one with fewest names."""
    spans = [(columns[source], columns[2 + edge // 2]) for edge, (_, source) in enumerate(cell)]
    load: dict[int, int] = {}
    ranks = [0] * len(cell)
    for edge in sorted(range(len(cell)), key=lambda e: (spans[e][1] - spans[e][0], e)):
        gap = min(range(*spans[edge]), key=lambda g: (load.get(g, 0), g))
        load[gap] = load.get(gap, 0) + 1
        ranks[edge] = 2 * gap + 1
    return ranks


def _crossings(orders: Sequence[Sequence[Item]], segments: Iterable[tuple[Item, Item]]) -> int:
    place = {item: position for order in orders for position, item in enumerate(order)}
    by_rank: dict[int, list[Point]] = {}
    for a, b in segments:
        by_rank.setdefault(a[2], []).append((place[a], place[b]))
    pairs = itertools.chain.from_iterable(itertools.combinations(ends, 2) for ends in by_rank.values())
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)


def _sweeps(
    ranks: list[list[Item]], segments: Sequence[tuple[Item, Item]], tries: int
) -> Iterator[list[list[Item]]]:
    """Orders of the items in each rank, by barycentre sweeps from several seeded shuffles."""
    before: dict[Item, list[Item]] = {}
    after: dict[Item, list[Item]] = {}
    for a, b in segments:
        before.setdefault(b, []).append(a)
        after.setdefault(a, []).append(b)
    for attempt in range(tries):
        shuffle = random.Random(attempt).shuffle
        orders = [list(rank) for rank in ranks]
        for order in orders:
            shuffle(order)
        for sweep in range(8):
            forward = sweep % 2 == 0
            neighbours = before if forward else after
            for rank in range(1, len(orders)) if forward else range(len(orders) - 2, -1, -1):
                fixed = orders[rank - 1 if forward else rank + 1]
                place = {item: (i + 0.5) / len(fixed) for i, item in enumerate(fixed)}
                orders[rank].sort(key=lambda i, p=place, n=neighbours: np.mean([p[j] for j in n[i]] or [0.5]))
            yield [list(order) for order in orders]


def _heights(
    orders: Sequence[Sequence[Item]], segments: Iterable[tuple[Item, Item]], size: Callable[[Item], float]
) -> tuple[dict[Item, float], float]:
    """The y of every item that keeps the order and the clearances and makes the lines as level as possible.

    Unknowns are the lowest y of a rank (free) and the extra room between neighbours (not negative), in which
    the clearances are plain bounds of a linear least-squares problem.
    """
    column: dict[Item, int] = {item: i for i, item in enumerate(itertools.chain.from_iterable(orders))}
    to_y = np.zeros((len(column), len(column)))
    offset = np.zeros(len(column))
    lower = np.zeros(len(column))
    for order in orders:
        lower[column[order[0]]] = -np.inf
        for position, item in enumerate(order):
            to_y[column[item], [column[other] for other in order[: position + 1]]] = 1
            if position:
                below = order[position - 1]
                clearance = (size(below) + size(item)) / 2 + _GAP
                offset[column[item]] = offset[column[below]] + clearance
    rows, targets = [0.05 * to_y], [-0.05 * offset]
    for a, b in segments:
        # Bends between two lanes are the ugliest, a slope between two boxes the most natural.
        weight = (1.0, 2.0, 50.0)[(a[0] != "node") + (b[0] != "node")]
        rows.append(weight * (to_y[column[a]] - to_y[column[b]])[None])
        targets.append(np.array([-weight * (offset[column[a]] - offset[column[b]])]))
    matrix, target = np.concatenate(rows), np.concatenate(targets)
    solution = lsq_linear(matrix, target, bounds=(lower, np.inf), method="bvls")
    heights = to_y @ solution.x + offset
    return {item: float(heights[i]) for item, i in column.items()}, float(solution.cost)


def _cell_layout(cell: Cell) -> _Layout:
    """Lay one cell out from left to right; a node's column is the longest path to it from the inputs."""
    columns = {0: 0, 1: 0}
    for node in range(2, 6):
        columns[node] = 1 + max(columns[source] for _, source in cell[2 * node - 4 : 2 * node - 2])
    columns[_OUTPUT] = 1 + max(columns.values())

    def chain(kind: str, number: int, source: int, target: int) -> list[Item]:
        first, last = 2 * columns[source], 2 * columns[target]
        inner = [(kind, number, rank) for rank in range(first + 1, last)]
        return [("node", source, first), *inner, ("node", target, last)]

    edges = [chain("edge", edge, source, 2 + edge // 2) for edge, (_, source) in enumerate(cell)]
    # The four lines into the concatenation share one lane: they mean the same and would only add clutter.
    concat = {node: chain("concat", 0, node, _OUTPUT) for node in range(2, 6)}
    chains = [*edges, *concat.values()]
    items = sorted(set(itertools.chain.from_iterable(chains)))
    segments = sorted({pair for path in chains for pair in itertools.pairwise(path)})
    ranks = [[item for item in items if item[2] == rank] for rank in range(2 * columns[_OUTPUT] + 1)]
    label_ranks = _label_ranks(cell, columns)

    def size(item: Item) -> float:
        if item[0] == "node":
            return _NODE_SIZE[1]
        labelled = item[0] == "edge" and label_ranks[item[1]] == item[2]
        return _LABEL_SIZE[1] if labelled else _LANE

    found = {
        tuple(map(tuple, orders)): _crossings(orders, segments) for orders in _sweeps(ranks, segments, 24)
    }
    best = sorted(found, key=found.__getitem__)[:12]
    best = [orders for orders in best if found[orders] == found[best[0]]]
    heights, _ = min((_heights(orders, segments, size) for orders in best), key=lambda result: result[1])
    # A mirror image is as good: the one with c_{k-2} on top is the custom.
    sign = 1.0 if heights["node", 0, 0] > heights["node", 1, 0] else -1.0

    # No name stands before the output: its column comes closer, which leaves more room to the others.
    last = columns[_OUTPUT] - 1

    def points(path: Sequence[Item]) -> tuple[Point, ...]:
        columns_of = [min(rank / 2, last + 0.34 * (rank - 2 * last)) for _, _, rank in path]
        return tuple((x, sign * heights[item]) for x, item in zip(columns_of, path, strict=True))

    labels = [path[rank - path[0][2]] for path, rank in zip(edges, label_ranks, strict=True)]
    return _Layout(
        nodes={node: points([("node", node, 2 * column)])[0] for node, column in columns.items()},
        edges=tuple(map(points, edges)),
        labels=points(labels),
        concat={node: points(path) for node, path in concat.items()},
    )


def _bends(points: Sequence[Point], pitch: float, entry: float) -> np.ndarray:
    """The line through ``points`` as Bezier control points, (1 + 3n, 2) in inches.

    It ends ``entry`` above the middle of its target's side. It is level wherever a box may be its neighbour
    and monotone in between: so it stays within its lane.
    """
    line = [(points[0][0] * pitch + _NODE_SIZE[0] / 2, points[0][1])]
    for column, y in points[1:-1]:
        half = {0.0: _NODE_SIZE[0] / 2, 0.5: _LABEL_SIZE[0] / 2}.get(column % 1, 0.0)
        line += [(column * pitch - half, y), (column * pitch + half, y)]
    line.append((points[-1][0] * pitch - _NODE_SIZE[0] / 2, points[-1][1] + entry))
    knots = np.array([(x, y) for i, (x, y) in enumerate(line) if i == 0 or x > line[i - 1][0]])
    half_step = np.diff(knots[:, 0])[:, None] / 2 * np.array([1.0, 0.0])
    steps = np.stack([knots[:-1] + half_step, knots[1:] - half_step, knots[1:]], axis=1)
    return np.concatenate([knots[:1], steps.reshape(-1, 2)])


def _draw_cell(axes: Axes, cell: Cell, layout: _Layout, left: float, middle: float, pitch: float) -> None:
    """Draw one cell, the inputs' column at x = ``left`` and y = 0 of the layout at ``middle`` (inches)."""
    patches, path_of = _matplotlib("patches"), _matplotlib("path").Path
    origin = np.array([left, middle])

    def line(points: Sequence[Point], entry: float, **style: Any) -> None:
        vertices = _bends(points, pitch, entry) + origin
        codes = [path_of.MOVETO] + [path_of.CURVE4] * (len(vertices) - 1)
        curve = path_of(vertices, codes)
        axes.add_patch(patches.FancyArrowPatch(path=curve, arrowstyle="-|>", shrinkA=0, shrinkB=0, **style))

    def box(at: Point, size: Point, rounding: float, text: str, font: dict[str, Any], **style: Any) -> None:
        x, y = np.array([at[0] * pitch, at[1]]) + origin
        shape = f"round,pad=0,rounding_size={rounding}"
        corner = (x - size[0] / 2, y - size[1] / 2)
        axes.add_patch(patches.FancyBboxPatch(corner, *size, boxstyle=shape, **style))
        axes.text(x, y, text, ha="center", va="center_baseline", zorder=style["zorder"] + 0.1, **font)

    for points in layout.concat.values():
        line(points, 0.0, mutation_scale=9, color=_FAINT, linewidth=1.2, zorder=1)
    for edge, ((operation, _), label) in enumerate(zip(cell, layout.labels, strict=True)):
        _, colour, dashes = _FAMILIES[_FAMILY_OF[operation]]
        # The two arrows into a node end apart, the one that comes from above at the top.
        entry = math.copysign(0.07, layout.edges[edge][-2][1] - layout.edges[edge ^ 1][-2][1])
        style = {"color": colour, "linewidth": 1.5, "linestyle": dashes, "zorder": 2}
        line(layout.edges[edge], entry, mutation_scale=10, **style)
        style = {"facecolor": "white", "edgecolor": colour, "linewidth": 0.8, "zorder": 3}
        box(label, _LABEL_SIZE, 0.07, operation, {"color": colour, "fontsize": 8.5}, **style)
    looks = {0: ("$c_{k-2}$", "#e9edf2", "#7c8794"), 1: ("$c_{k-1}$", "#e9edf2", "#7c8794")}
    looks |= {node: (str(node), "#fbf3dc", "#b99a4b") for node in range(2, 6)}
    looks[_OUTPUT] = ("$c_{k}$", "#dfeee6", "#5f8f76")
    for node, (name, face, edge) in looks.items():
        style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.0, "zorder": 4}
        box(layout.nodes[node], _NODE_SIZE, 0.1, name, {"color": _INK, "fontsize": 10.5}, **style)


def plot_cells(genotype: Genotype, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw the normal and the reduction cell of a genotype as directed graphs, one above the other.

    Args:
        genotype: ``normal`` and ``reduce``, each 8 pairs (operation, input); pairs 2k and 2k + 1 go into node
            2 + k, inputs 0 and 1 are the outputs of the two cells before, and nodes 2 to 5 are concatenated.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline above the cells.

    Returns:
        The path written.

    Raises:
        ValueError: A cell is not a valid cell of the search space, or the suffix is unknown.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    cells = {"Normal cell": genotype.normal, "Reduction cell": genotype.reduce}
    for name, cell in cells.items():
        _check_cell(cell, name.partition(" ")[0].lower())
    layouts = {name: _cell_layout(cell) for name, cell in cells.items()}
    columns = max(layout.nodes[_OUTPUT][0] for layout in layouts.values())
    pitch = min(3.0, (_CELL_WIDTH - 2 * _MARGIN - _NODE_SIZE[0]) / columns)
    headline, heading, footer = (0.5 if title else 0.12), 0.5, 0.6
    heights = {name: layout.extent[1] - layout.extent[0] for name, layout in layouts.items()}
    height = headline + sum(heights.values()) + len(cells) * heading + footer
    with _figure(path, _CELL_WIDTH, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _CELL_WIDTH), ylim=(0, height))
        axes.set_axis_off()
        if title:
            axes.text(_MARGIN, height - 0.38, title, fontsize=13, fontweight="bold", parse_math=False)
        top = height - headline
        for name, layout in layouts.items():
            axes.text(_MARGIN, top - 0.3, name, fontsize=10.5, fontweight="bold", color=_GREY)
            top -= heading
            left = (_CELL_WIDTH - pitch * layout.nodes[_OUTPUT][0]) / 2
            _draw_cell(axes, cells[name], layout, left, top - layout.extent[1], pitch)
            top -= heights[name]
        _cell_legend(axes)
    return Path(path)


def _cell_legend(axes: Axes) -> None:
    for name, colour, dashes in (*_FAMILIES.values(), ("concatenation", _FAINT, "solid")):
        axes.plot([], [], color=colour, linestyle=dashes, linewidth=1.8, label=name)
    axes.legend(loc="lower center", ncols=5, handlelength=2.2)


# --------------------------------------------------------------------------------------------- loss curves


@dataclass(frozen=True)
class LossCurve:
    """The loss of one architecture under growing noise on its weights, as flatness (Eq. 4) measures it.

    Attributes:
        label: Name of the architecture.
        sigmas: Standard deviations of the noise, not negative, strictly increasing; 0 is without noise.
        losses: Mean validation cross-entropy in nats at each sigma.
        score: Flatness score (higher is flatter and deeper), or ``None``.
    """

    label: str
    sigmas: tuple[float, ...]
    losses: tuple[float, ...]
    score: float | None = None


def _check_curves(curves: Sequence[LossCurve]) -> None:
    if not curves:
        raise ValueError("There is no loss curve to draw: pass at least one LossCurve.")
    for curve in curves:
        if not curve.sigmas or len(curve.sigmas) != len(curve.losses):
            raise ValueError(
                f"Curve {curve.label!r} has {len(curve.sigmas)} sigmas and {len(curve.losses)} losses: "
                "expected the same number of both, at least one."
            )
        score = () if curve.score is None else (curve.score,)
        if not all(map(math.isfinite, (*curve.sigmas, *curve.losses, *score))):
            raise ValueError(
                f"Curve {curve.label!r} has a value that is not finite: leave that architecture out."
            )
        if curve.sigmas[0] < 0 or any(b <= a for a, b in itertools.pairwise(curve.sigmas)):
            raise ValueError(
                f"Curve {curve.label!r} has sigmas {curve.sigmas}: expected increasing values, none below 0."
            )


def _short(value: float) -> str:
    """``value`` in few characters: 0.003, but 5e-5."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:.4g}" if value == 0 or int(exponent) >= -3 else f"{float(mantissa):g}e{int(exponent)}"


def _sigma_axis(axes: Axes, sigmas: Sequence[float]) -> None:
    """Scale and ticks of the sigma axis: the measured sigmas themselves as far as they find room."""
    positive = [sigma for sigma in sigmas if sigma > 0]
    if not positive:
        axes.set_xticks([0.0])
        return
    if sigmas[0] > 0:
        axes.set_xscale("log")
    elif positive[-1] > 20 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    place = {sigma: float(to_axes.transform((sigma, 1.0))[0]) for sigma in sigmas}
    ticks: list[float] = []
    for sigma in sigmas:
        if not ticks or place[sigma] - place[ticks[-1]] > 0.075:
            ticks.append(sigma)
    axes.set_xticks(ticks, map(_short, ticks))
    axes.minorticks_off()


def _spread(wanted: Sequence[float], clearance: float) -> list[float]:
    """The places in [0, 1] nearest to ``wanted``, in its order, that lie at least ``clearance`` apart."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    rise = clearance * np.arange(len(order))
    # Without the clearances this is monotone regression, which stays one when both ends are cut off.
    free = isotonic_regression(np.array(wanted)[order] - rise).x
    places = np.clip(free, 0.0, max(0.0, 1.0 - rise[-1])) + rise
    return [float(places[order.index(i)]) for i in range(len(wanted))]


def plot_loss_curves(
    curves: Sequence[LossCurve], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw the validation loss of architectures against the size of the weight perturbation.

    Each line ends in its label and score; the highest score is emphasised. With more than 8 curves only the
    8 best (without scores: the first 8) have a colour and a label.

    Args:
        curves: One curve an architecture.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: No curve, one with unequal lengths or a value that is not finite, sigmas that are negative
            or do not increase, or an unknown suffix.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    _check_curves(curves)
    ranking = sorted(
        range(len(curves)), key=lambda i: math.inf if (score := curves[i].score) is None else -score
    )
    colours = dict(zip(sorted(ranking[: len(_PALETTE)]), _PALETTE, strict=False))
    best = None if curves[ranking[0]].score is None else ranking[0]
    with _figure(path, 9.0, 5.0) as figure:
        axes = figure.add_axes((0.085, 0.13, 0.65, 0.75 if title else 0.82))
        for i, curve in enumerate(curves):
            width = 2.6 if i == best else 1.5 if i in colours else 0.9
            style = {"linewidth": width, "markersize": 1.5 + 1.6 * width, "zorder": 2 + width}
            style |= {"color": colours.get(i, _FAINT), "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(curve.sigmas, curve.losses, "o-", **style)
        axes.margins(x=0.03, y=0.07)
        axes.grid(axis="y")
        axes.set_xlabel(r"perturbation of the weights, $\sigma$")
        axes.set_ylabel("validation loss (cross-entropy, nats)")
        _sigma_axis(axes, sorted({sigma for curve in curves for sigma in curve.sigmas}))
        if title:
            figure.text(0.085, 0.94, title, fontsize=12, fontweight="bold", parse_math=False)
        _end_labels(axes, curves, colours, best)
    return Path(path)


def _end_labels(
    axes: Axes, curves: Sequence[LossCurve], colours: Mapping[int, str], best: int | None
) -> None:
    """Name each coloured line beside its end, moved apart where ends are close, with a thin leader."""
    to_axes = axes.transData + axes.transAxes.inverted()
    shown = sorted(colours)
    ends = [to_axes.transform((curves[i].sigmas[-1], curves[i].losses[-1])) for i in shown]
    for i, (x, y), place in zip(shown, ends, _spread([y for _, y in ends], 0.092), strict=True):
        curve, style = curves[i], {"transform": axes.transAxes, "color": colours[i], "clip_on": False}
        axes.plot((x, 1.025, 1.04), (y, place, place), linewidth=0.7, alpha=0.6, **style)
        label = curve.label if len(curve.label) <= 28 else curve.label[:27] + "…"
        style |= {"parse_math": False, "fontweight": "bold" if i == best else "normal"}
        axes.text(1.05, place, label, va="center" if curve.score is None else "bottom", **style)
        if curve.score is not None:
            text = f"score {_short(curve.score)}{', best' if i == best else ''}"
            axes.text(1.05, place - 0.004, text, va="top", fontsize=7.5, **(style | {"fontweight": "normal"}))
    if len(curves) > len(shown):
        style = {"transform": axes.transAxes, "va": "top", "color": _GREY, "fontsize": 7.5}
        axes.text(1.05, -0.06, f"grey: {len(curves) - len(shown)} more", **style)


# -------------------------------------------------------------------------------------------------- search


def _check_records(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records in the order of their index; a clear error for one that is not as in the history file."""
    if not records:
        raise ValueError("There is no candidate to draw: pass at least one record of the search history.")
    for record in records:
        if missing := {"index", "generation", "origin", "status", "score", "seconds"} - set(record):
            raise ValueError(
                f"A record of the search history lacks {', '.join(sorted(missing))}: {dict(record)!r}."
            )
        for key, choices in (("origin", tuple(_ORIGINS)), ("status", ("ok", "failed"))):
            if record[key] not in choices:
                valid = ", ".join(choices)
                raise ValueError(
                    f"Candidate {record['index']} has {key} {record[key]!r}: choose from {valid}."
                )
        if record["status"] == "ok" and (record["score"] is None or not math.isfinite(record["score"])):
            raise ValueError(
                f"Candidate {record['index']} is ok but has score {record['score']}: expected a number."
            )
    return sorted(records, key=lambda record: record["index"])


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _summary(records: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> str:
    failed = sum(record["status"] == "failed" for record in records)
    spent = _duration(sum(record["seconds"] for record in records))
    parts = [f"{len(records)} candidate{'s' * (len(records) > 1)}, {failed} failed, {spent} of scoring"]
    if best is not None:
        shares = "".join(
            f", {100 * share:.0f} % {name}" for name, share in (best.get("shares") or {}).items()
        )
        parts.append(f"best: candidate {best['index']}, score {_short(best['score'])}{shares}")
    return "; ".join(parts)


def plot_search(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw the progress of a search: every candidate's score, the best so far, and each generation's scores.

    Args:
        records: One a candidate, as in the history file: ``index``, ``generation``, ``origin`` ("random",
            "mutation" or "crossover"), ``status`` ("ok" or "failed"), ``score`` (a number if ok; higher is
            better), ``seconds``, and optionally ``shares``, the share of each term in the score (fractions).
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: No record, one that is not as described, or an unknown suffix.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    history = _check_records(records)
    scored = [record for record in history if record["status"] == "ok"]
    best = max(scored, key=lambda record: record["score"], default=None)
    with _figure(path, 11.0, 5.2) as figure:
        low, tall = 0.125, 0.69 if title else 0.745
        main = figure.add_axes((0.075, low, 0.62, tall))
        side = figure.add_axes((0.715, low, 0.27, tall), sharey=main)
        _draw_history(main, history, scored)
        _draw_generations(side, history, scored)
        if scored:
            scores = [record["score"] for record in scored]
            room = (max(scores) - min(scores)) or abs(scores[0]) or 1.0
            main.set_ylim(min(scores) - 0.13 * room, max(scores) + 0.08 * room)
            main.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
        else:
            main.set_yticks([])
            style = {"transform": main.transAxes, "ha": "center", "color": _GREY, "backgroundcolor": "white"}
            main.text(0.5, 0.5, "no candidate was scored", **style)
        if title:
            figure.text(0.075, 0.945, title, fontsize=12.5, fontweight="bold", parse_math=False)
        figure.text(0.075, 0.9 if title else 0.945, _summary(history, best), color=_GREY, parse_math=False)
    return Path(path)


def _draw_history(
    axes: Axes, history: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
) -> None:
    """The left panel: scores by candidate, generations as bands, the best so far, failures at the bottom."""
    spans: dict[int, list[int]] = {}
    for record in history:
        spans.setdefault(record["generation"], []).append(record["index"])
    every = math.ceil(len(spans) / 20)
    for position, (generation, span) in enumerate(spans.items()):
        if position % 2:
            axes.axvspan(span[0] - 0.5, span[-1] + 0.5, color="#eef1f4", linewidth=0, zorder=0)
        if position % every == 0:
            style = {"ha": "center", "va": "top", "fontsize": 7, "color": _GREY}
            middle = (span[0] + span[-1]) / 2
            axes.text(middle, 0.99, str(generation), transform=axes.get_xaxis_transform(), **style)
    for origin, colour in _ORIGINS.items():
        if chosen := [(record["index"], record["score"]) for record in scored if record["origin"] == origin]:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=16, color=colour, alpha=0.75, linewidths=0, label=origin, zorder=2)
    if scored:
        x, scores = [record["index"] for record in scored], [record["score"] for record in scored]
        y = list(itertools.accumulate(scores, max))
        style = {"where": "post", "color": _INK, "linewidth": 1.5, "label": "best so far", "zorder": 3}
        axes.step([*x, history[-1]["index"] + 0.5], [*y, y[-1]], **style)
        best = scores.index(y[-1])
        axes.scatter(x[best], y[-1], s=42, color="white", edgecolors=_INK, linewidths=1.5, zorder=4)
    if failed := [record["index"] for record in history if record["status"] == "failed"]:
        style = {"marker": "x", "linewidths": 1.2, "color": "#b5534c", "label": "failed", "zorder": 3}
        axes.scatter(failed, [0.035] * len(failed), s=22, transform=axes.get_xaxis_transform(), **style)
    pad = 0.5 + 0.005 * len(history)
    axes.set_xlim(history[0]["index"] - pad, history[-1]["index"] + pad)
    axes.set_xlabel("candidate")
    axes.set_ylabel("score")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style = {"handlelength": 1.6, "handletextpad": 0.3, "columnspacing": 1.4, "markerscale": 1.3}
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, **style)


def _draw_generations(
    axes: Axes, history: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
) -> None:
    """The right panel: the scores of each generation side by side, with quartiles."""
    by_generation: dict[int, list[float]] = {}
    for record in scored:
        by_generation.setdefault(record["generation"], []).append(record["score"])
    for generation, scores in by_generation.items():
        # Multiples of the golden ratio spread the points evenly without a random number.
        x = [generation + 0.7 * ((0.5 + 0.6180339887 * i) % 1 - 0.5) for i in range(len(scores))]
        axes.scatter(x, scores, s=7, color="#b3bac3", linewidths=0, zorder=1)
        low, middle, high = quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else scores * 3
        axes.plot((generation, generation), (low, high), color=_PALETTE[0], linewidth=2.2, zorder=2)
        axes.plot(generation, middle, "o", color="white", mec=_PALETTE[0], mew=1.2, ms=4.2, zorder=3)
    axes.tick_params(labelleft=False, left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
    generations = [record["generation"] for record in history]
    axes.set_xlim(min(generations) - 0.6, max(generations) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("generation (bar: middle half, ring: median)")
