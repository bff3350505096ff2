"""Layout of a cell as a layered graph, after Sugiyama, Tagawa and Toda (1981).

The labels are nodes of their own, as in Gansner et al., "A technique for drawing directed graphs" (1993), so
that no label covers a node, a line or another label.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from genas_plugins.darts.genotype import NODES, CellGene, cell_edges

__all__ = ["LABEL_SIZE", "NODE_SIZE", "OUTPUT", "CellLayout", "Point", "bends", "cell_layout"]

Point = tuple[float, float]
# One place in one rank of the layered graph: (kind, number, rank), kind "node", "edge", "concat" or "unseen".
Item = tuple[str, int, int]
Segment = tuple[Item, Item]
Orders = tuple[tuple[Item, ...], ...]

NODE_SIZE: Point = (0.52, 0.38)
"""Width and height in inches of the box of a node."""

LABEL_SIZE: Point = (0.95, 0.22)
"""Width and height in inches of the box with an operation's name."""

OUTPUT = NODES[-1] + 1
"""The number of the output, where the nodes are concatenated."""

_LANE, _GAP = 0.06, 0.14
_SHUFFLES, _SWEEPS, _CANDIDATES = 24, 8, 12


@dataclass(frozen=True)
class CellLayout:
    """Positions of the parts of one cell, in columns (x) and inches (y); the inputs are in column 0.

    Attributes:
        nodes: Middle of the box of every node, with the inputs 0 and 1 and the output.
        edges: Points that the line of each edge passes, from its source to its node, in the cell's order.
        labels: Middle of the box with the name of each edge, one of the points of its line.
        concat: Points of the line from each intermediate node to the output.
    """

    nodes: dict[int, Point]
    edges: tuple[tuple[Point, ...], ...]
    labels: tuple[Point, ...]
    concat: dict[int, tuple[Point, ...]]

    @property
    def extent(self) -> Point:
        """Lowest and highest y that anything reaches, in inches."""
        boxes = [(y, NODE_SIZE[1]) for _, y in self.nodes.values()]
        boxes += [(y, LABEL_SIZE[1]) for _, y in self.labels]
        boxes += [(y, _LANE) for points in (*self.edges, *self.concat.values()) for _, y in points]
        return min(y - size / 2 for y, size in boxes), max(y + size / 2 for y, size in boxes)


def cell_layout(cell: CellGene) -> CellLayout:
    """Lay one cell out from left to right; a node's column is the longest path to it from the inputs."""
    columns = {0: 0, 1: 0}
    for node, _, source in cell_edges(cell):
        columns[node] = max(columns.get(node, 0), columns[source] + 1)
    last = max(columns.values())
    columns[OUTPUT] = last + 1

    def chain(kind: str, number: int, source: int, target: int) -> list[Item]:
        first, end = 2 * columns[source], 2 * columns[target]
        inner = [(kind, number, rank) for rank in range(first + 1, end)]
        return [("node", source, first), *inner, ("node", target, end)]

    edges = [chain("edge", i, source, node) for i, (node, _, source) in enumerate(cell_edges(cell))]
    # The four lines into the concatenation share one lane: they mean the same and would only add clutter.
    concat = {node: chain("concat", 0, node, OUTPUT) for node in NODES}
    # An input that no node reads has no line to be placed by; node 2 is always in the column behind it.
    read = {source for _, _, source in cell_edges(cell)}
    unseen = [chain("unseen", source, source, NODES[0]) for source in (0, 1) if source not in read]
    chains = [*edges, *concat.values(), *unseen]
    segments = sorted({pair for path in chains for pair in itertools.pairwise(path)})
    labels = _label_items(edges)

    def size(item: Item) -> float:
        return NODE_SIZE[1] if item[0] == "node" else LABEL_SIZE[1] if item in labels else _LANE

    candidates = (_heights(orders, segments, size) for orders in _fewest_crossings(segments))
    # Rounded, so that ties do not fall to the noise of floating point, which differs between machines.
    heights, _ = min(candidates, key=lambda result: round(result[1], 6))
    # Of the two mirror images, the one with c_{k-2} on top is customary.
    sign = 1.0 if heights["node", 0, 0] > heights["node", 1, 0] else -1.0

    def point(item: Item) -> Point:
        # No name stands before the output: its column comes closer, which leaves more room to the others.
        return min(item[2] / 2, last + 0.34 * (item[2] - 2 * last)), sign * heights[item]

    return CellLayout(
        nodes={node: point(("node", node, 2 * column)) for node, column in columns.items()},
        edges=tuple(tuple(map(point, path)) for path in edges),
        labels=tuple(map(point, labels)),
        concat={node: tuple(map(point, path)) for node, path in concat.items()},
    )


def bends(points: Sequence[Point], pitch: float, entry: float) -> np.ndarray:
    """The line through ``points`` as Bezier control points, (1 + 3n, 2) in inches.

    It is level wherever a box may be its neighbour and monotone in between: so it stays within its lane.

    Args:
        points: A line of a :class:`CellLayout`.
        pitch: Distance of two columns in inches.
        entry: Height of the line's end, in inches above the middle of its target's side.
    """
    line = [(points[0][0] * pitch + NODE_SIZE[0] / 2, points[0][1])]
    for column, y in points[1:-1]:
        half = {0.0: NODE_SIZE[0] / 2, 0.5: LABEL_SIZE[0] / 2}.get(column % 1, 0.0)
        line += [(column * pitch - half, y), (column * pitch + half, y)]
    line.append((points[-1][0] * pitch - NODE_SIZE[0] / 2, points[-1][1] + entry))
    knots = np.array([(x, y) for i, (x, y) in enumerate(line) if i == 0 or x > line[i - 1][0]])
    half_step = np.diff(knots[:, 0])[:, None] / 2 * np.array([1.0, 0.0])
    steps = np.stack([knots[:-1] + half_step, knots[1:] - half_step, knots[1:]], axis=1)
    return np.concatenate([knots[:1], steps.reshape(-1, 2)])


def _label_items(edges: Sequence[Sequence[Item]]) -> list[Item]:
    """Place each edge's label in the gap between columns, of those it crosses, that has the fewest labels."""
    load: dict[int, int] = {}
    items: dict[int, Item] = {}
    for edge in sorted(range(len(edges)), key=lambda e: len(edges[e])):
        items[edge] = min(edges[edge][1:-1:2], key=lambda item: load.get(item[2], 0))
        load[items[edge][2]] = load.get(items[edge][2], 0) + 1
    return [items[edge] for edge in range(len(edges))]


def _fewest_crossings(segments: Sequence[Segment]) -> list[Orders]:
    """The first few orders of the items in each rank with the fewest crossings that sweeping finds."""
    crossings = {orders: _crossings(orders, segments) for orders in _sweeps(segments)}
    fewest = min(crossings.values())
    return [orders for orders, count in crossings.items() if count == fewest][:_CANDIDATES]


def _crossings(orders: Orders, segments: Sequence[Segment]) -> int:
    place = {item: position for order in orders for position, item in enumerate(order)}
    by_rank: dict[int, list[Point]] = {}
    for a, b in segments:
        by_rank.setdefault(a[2], []).append((place[a], place[b]))
    pairs = itertools.chain.from_iterable(itertools.combinations(ends, 2) for ends in by_rank.values())
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)


def _sweeps(segments: Sequence[Segment]) -> Iterator[Orders]:
    """Orders of the items in each rank, by barycentre sweeps from several seeded shuffles."""
    before: dict[Item, list[Item]] = {}
    after: dict[Item, list[Item]] = {}
    for a, b in segments:
        before.setdefault(b, []).append(a)
        after.setdefault(a, []).append(b)
    items = sorted(before.keys() | after.keys())
    ranks = [[item for item in items if item[2] == rank] for rank in range(1 + max(i[2] for i in items))]
    for attempt in range(_SHUFFLES):
        shuffle = random.Random(attempt).shuffle
        orders = [list(rank) for rank in ranks]
        for order in orders:
            shuffle(order)
        for sweep in range(_SWEEPS):
            forward = sweep % 2 == 0
            neighbours = before if forward else after
            for rank in range(1, len(orders)) if forward else range(len(orders) - 2, -1, -1):
                fixed = orders[rank - 1 if forward else rank + 1]
                place = {item: (i + 0.5) / len(fixed) for i, item in enumerate(fixed)}
                orders[rank].sort(key=lambda i, p=place, n=neighbours: np.mean([p[j] for j in n[i]]))
            yield tuple(map(tuple, orders))


def _heights(
    orders: Orders, segments: Sequence[Segment], size: Callable[[Item], float]
) -> tuple[dict[Item, float], float]:
    """The y of every item that keeps the order and the clearances and makes the lines as level as possible.

    Unknowns are the lowest y of a rank (free) and the extra room between neighbours (not negative), in which
    the clearances are plain bounds of a linear least-squares problem. The second value is its residual.
    """
    row = {item: i for i, item in enumerate(itertools.chain.from_iterable(orders))}
    to_y = np.zeros((len(row), len(row)))
    offset, lower = np.zeros(len(row)), np.zeros(len(row))
    for order in orders:
        first = row[order[0]]
        lower[first] = -np.inf
        for i, item in enumerate(order, first):
            to_y[i, first : i + 1] = 1
            if i > first:
                clearance = (size(order[i - first - 1]) + size(item)) / 2 + _GAP
                offset[i] = offset[i - 1] + clearance
    rows, targets = [0.05 * to_y], [-0.05 * offset]
    for a, b in segments:
        # Bends between two lanes look worst, slopes between two boxes best.
        weight = (1.0, 2.0, 50.0)[(a[0] != "node") + (b[0] != "node")]
        rows.append(weight * (to_y[row[a]] - to_y[row[b]])[None])
        targets.append(np.array([-weight * (offset[row[a]] - offset[row[b]])]))
    solution = lsq_linear(np.concatenate(rows), np.concatenate(targets), bounds=(lower, np.inf), method="bvls")
    heights = to_y @ solution.x + offset
    return {item: float(heights[i]) for item, i in row.items()}, float(solution.cost)
