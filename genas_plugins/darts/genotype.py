"""Genotypes of the DARTS search space: two cells, each of four nodes with one or two incoming operations.

The space is that of DARTS (Liu et al., ICLR 2019); the 28-integer code is the one that RLNAS (Zhang et al.,
CVPR 2021) and GeNAS (Jeong et al., IJCAI 2023) use: one operation number per edge, 14 edges of the normal
cell and then 14 of the reduction cell.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genas_plugins._messages import shown
from genas_plugins._reading import ReadingError, read_json
from genas_plugins.files import write_text

__all__ = [
    "EDGES",
    "EDGES_PER_CELL",
    "NODES",
    "OPERATIONS",
    "Genotype",
    "edge_index",
    "node_edges",
    "path_counts",
]

OPERATIONS: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""Operation names; the position is the operation's number in the code. ``none`` is an edge that is missing."""

NODES: tuple[int, ...] = (2, 3, 4, 5)
"""Intermediate nodes of a cell; 0 and 1 are its inputs, the outputs of the two cells before."""

EDGES: tuple[tuple[int, int], ...] = tuple((source, node) for node in NODES for source in range(node))
"""The 14 possible edges ``(source, node)`` of a cell in the order of the code."""

EDGES_PER_CELL = len(EDGES)

_FORMAT = "genas-genotype"
_OPERATION_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
_EDGE_NUMBERS = {edge: number for number, edge in enumerate(EDGES)}

CellGene = tuple[tuple[str, int], ...]


def edge_index(source: int, node: int) -> int:
    """Position in a cell's code of the edge from ``source`` (0..4) into ``node`` (2..5)."""
    return _EDGE_NUMBERS[source, node]


def node_edges(node: int) -> range:
    """Positions in a cell's code of all edges into ``node`` (2..5)."""
    first = _EDGE_NUMBERS[0, node]
    return range(first, first + node)


@dataclass(frozen=True, eq=False)
class Genotype:
    """A normal and a reduction cell.

    Genotypes are equal if their codes are, whatever the order of a node's two edges. The order is kept, because
    published checkpoints number a network's operations by it. A node may have one input, as in FairDARTS: its other
    pair is ``("none", input)``, with any input but that one. It takes a number and nothing else.

    Attributes:
        normal: Eight pairs ``(operation, input)``; pairs ``2k`` and ``2k + 1`` enter node ``2 + k``.
        reduce: Eight such pairs for the cell that halves the resolution.

    Raises:
        ValueError: An unknown operation, an input that does not exist, a node whose two inputs coincide, or one without
            any operation but ``none``.
        TypeError: A cell is not a sequence of eight pairs.

    Example:
        >>> from genas_plugins import Genotype
        >>> node = [("sep_conv_3x3", 0), ("skip_connect", 1)]
        >>> genotype = Genotype(normal=4 * node, reduce=4 * node)
        >>> genotype.code[:9]
        (4, 3, 4, 3, 0, 4, 3, 0, 0)
        >>> Genotype.from_code(genotype.code) == genotype
        True
    """

    normal: CellGene
    reduce: CellGene

    def __post_init__(self) -> None:
        object.__setattr__(self, "normal", _checked_cell(self.normal, "normal"))
        object.__setattr__(self, "reduce", _checked_cell(self.reduce, "reduce"))

    @classmethod
    def from_code(cls, code: Iterable[int]) -> Genotype:
        """Build a genotype from its 28 operation numbers.

        Raises:
            ValueError: Not 28 integers, a number outside 0..7, or a node without one or two incoming edges.
        """
        numbers = _checked_code(code)
        return cls(
            _cell_from_code(numbers[:EDGES_PER_CELL], "normal"),
            _cell_from_code(numbers[EDGES_PER_CELL:], "reduce"),
        )

    @property
    def code(self) -> tuple[int, ...]:
        """The 28 operation numbers: normal cell, then reduction cell; 0 where there is no edge."""
        numbers = [0] * (2 * EDGES_PER_CELL)
        for offset, cell in ((0, self.normal), (EDGES_PER_CELL, self.reduce)):
            for node, operation, source in cell_edges(cell):
                numbers[offset + edge_index(source, node)] = _OPERATION_NUMBERS[operation]
        return tuple(numbers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the code beside the readable cells."""
        return {
            "format": _FORMAT,
            "normal": [list(pair) for pair in self.normal],
            "reduce": [list(pair) for pair in self.reduce],
            "code": list(self.code),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genotype:
        """Build a genotype from the output of :meth:`to_dict`; other keys (score, provenance) are ignored.

        Raises:
            ValueError: The data is not in this format, or its code contradicts its cells.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f'Expected a genotype with "format": "{_FORMAT}", got {shown(found)}; '
                "genas search writes such a file as genotype.json."
            )
        for key in ("normal", "reduce"):
            if not isinstance(data.get(key), Sequence) or isinstance(data[key], str):
                raise ValueError(f'The genotype has no list "{key}" of eight [operation, input] pairs.')
        try:
            genotype = cls(data["normal"], data["reduce"])
        except TypeError as error:
            raise ValueError(str(error)) from error
        if "code" in data and list(genotype.code) != data["code"]:
            raise ValueError(
                f"The genotype's code {shown(data['code'])} does not describe its cells, whose code is "
                f"{list(genotype.code)}."
            )
        return genotype

    def save(self, path: str | Path, **extra: Any) -> Path:
        """Write the genotype as JSON, with ``extra`` keys (score, provenance) beside it.

        The file appears whole or not at all.

        Raises:
            OSError: The file cannot be written; an older one of that name is left as it was.
        """
        return write_text(path, json.dumps({**self.to_dict(), **extra}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Genotype:
        """Read a genotype from a JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not JSON or not a genotype; the message names the file.
        """
        try:
            data = read_json(path)
        except ReadingError as error:
            raise ValueError(f"{path} is not a JSON file: {error}.") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return self.code == other.code if isinstance(other, Genotype) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.code)

    def __str__(self) -> str:
        return " ".join(str(number) for number in self.code)


def cell_edges(cell: CellGene) -> Iterator[tuple[int, str, int]]:
    """Iterate over a cell's edges, without those that are missing, as ``(node, operation, source)``."""
    for position, (operation, source) in enumerate(cell):
        if operation != "none":
            yield NODES[position // 2], operation, source


def _checked_cell(cell: Any, name: str) -> CellGene:
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in cell]
    if len(pairs) != 2 * len(NODES) or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise TypeError(
            f"The {name} cell must be {2 * len(NODES)} pairs (operation, input), two for each of the nodes "
            f"{NODES}; got {shown(cell)}."
        )
    for position, node in enumerate(NODES):
        inputs = pairs[2 * position : 2 * position + 2]
        for operation, source in inputs:
            if operation not in OPERATIONS:
                raise ValueError(
                    f"Unknown operation {shown(operation)} in the {name} cell; "
                    f"valid operations: {', '.join(OPERATIONS[1:])}; none for an edge that is missing."
                )
            if _integer(source) not in range(node):
                raise ValueError(
                    f"Node {node} of the {name} cell cannot take input {shown(source)}; valid inputs: 0 to {node - 1}."
                )
        if inputs[0][1] == inputs[1][1]:
            raise ValueError(
                f"Node {node} of the {name} cell takes input {inputs[0][1]} twice; its two inputs must differ."
            )
        if inputs[0][0] == inputs[1][0] == "none":
            raise ValueError(
                f"Node {node} of the {name} cell has no input: at most one of its two operations may be none."
            )
    return tuple((operation, int(source)) for operation, source in pairs)


def _checked_code(code: Iterable[int]) -> tuple[int, ...]:
    numbers = tuple(code)
    if len(numbers) != 2 * EDGES_PER_CELL:
        raise ValueError(
            f"A code has {2 * EDGES_PER_CELL} operation numbers ({EDGES_PER_CELL} a cell), got {len(numbers)}."
        )
    for number in numbers:
        if _integer(number) not in range(len(OPERATIONS)):
            raise ValueError(
                f"An operation number must be an integer from 0 to {len(OPERATIONS) - 1}, got {shown(number)}."
            )
    return tuple(int(number) for number in numbers)


def _integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return None


def _cell_from_code(numbers: Sequence[int], name: str) -> CellGene:
    cell: list[tuple[str, int]] = []
    for node in NODES:
        edges = [(OPERATIONS[numbers[edge]], EDGES[edge][0]) for edge in node_edges(node) if numbers[edge]]
        if len(edges) not in (1, 2):
            raise ValueError(
                f"Node {node} of the {name} cell has {len(edges)} incoming edges that are not none, expected 1 or 2."
            )
        # The first input that is not taken, of which there is always one.
        missing = [("none", 1 if edges[0][1] == 0 else 0)]
        cell += (edges + missing)[:2]
    return tuple(cell)


def path_counts(gene: CellGene) -> tuple[int, ...]:
    """For each of a cell's edges, as :func:`cell_edges` has them, how many input-to-node paths run through it."""
    arriving = {0: 1, 1: 1}
    for node in NODES:
        arriving[node] = sum(arriving[source] for target, _, source in cell_edges(gene) if target == node)
    leaving: dict[int, int] = {}
    for node in reversed(NODES):
        # A path may end at any intermediate node, hence the 1.
        leaving[node] = 1 + sum(leaving[target] for target, _, source in cell_edges(gene) if source == node)
    return tuple(arriving[source] * leaving[node] for node, _, source in cell_edges(gene))
