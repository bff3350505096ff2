"""Architectures of NAS-Bench-201 (Dong and Yang, ICLR 2020, arXiv 2001.00326): six edges, five operations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from genas_plugins._messages import shown

__all__ = ["EDGES", "NODES", "OPERATIONS", "NasBench201Architecture"]

OPERATIONS: tuple[str, ...] = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The benchmark's operation names in its order."""

NODES: tuple[int, ...] = (1, 2, 3)
"""Nodes that add what arrives; node 0 is the cell's input, node 3 its output."""

EDGES: tuple[tuple[int, int], ...] = tuple((source, node) for node in NODES for source in range(node))
"""The six edges ``(source, node)`` in the order of the benchmark's strings."""

_OUTPUT = NODES[-1]
_FORM = "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|"


@dataclass(frozen=True)
class NasBench201Architecture:
    """One cell: an operation on each edge. ``str`` gives the benchmark's notation, :meth:`from_string` reads it.

    Attributes:
        operations: Six of :data:`OPERATIONS`, in the order of :data:`EDGES`.

    Raises:
        ValueError: Not six operations, or an unknown one.

    Example:
        >>> from genas_plugins.nasbench201 import NasBench201Architecture
        >>> text = "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|"
        >>> architecture = NasBench201Architecture.from_string(text)
        >>> architecture.index, architecture.connected
        (10102, True)
        >>> print(architecture.live())
        |none~0|+|skip_connect~0|none~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|
    """

    operations: tuple[str, ...]

    def __post_init__(self) -> None:
        operations = tuple(self.operations)
        if len(operations) != len(EDGES):
            raise ValueError(
                f"An architecture has {len(EDGES)} operations, one for each edge; got {len(operations)}: "
                f"{shown(operations)}."
            )
        for operation, (source, node) in zip(operations, EDGES, strict=True):
            if operation not in OPERATIONS:
                raise ValueError(
                    f"Unknown operation {shown(operation)} on the edge from node {source} to node {node}; "
                    f"valid operations: {', '.join(OPERATIONS)}."
                )
        object.__setattr__(self, "operations", operations)

    @classmethod
    def from_string(cls, text: str) -> NasBench201Architecture:
        """Read ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``: the inputs of nodes 1, 2 and 3.

        Raises:
            ValueError: Another number of nodes or inputs, a wrong input number, or an unknown operation.
            TypeError: ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"An architecture string like {_FORM} is needed, got {type(text).__name__}: {shown(text)}.")
        parts = text.split("+")
        if len(parts) != len(NODES):
            raise ValueError(f"{shown(text)} has {len(parts)} nodes, expected {len(NODES)}: {_FORM}.")
        operations: list[str] = []
        for node, part in zip(NODES, parts, strict=True):
            inputs = part[1:-1].split("|")
            if len(inputs) != node or part[:1] + part[-1:] != "||":
                raise ValueError(
                    f"Node {node} in {shown(text)} is {shown(part)}, expected {node} inputs, each between "
                    f"bars: {_FORM}."
                )
            for source, given in enumerate(inputs):
                operation, _, number = given.partition("~")
                if number != str(source):
                    raise ValueError(
                        f"Input {source} of node {node} in {shown(text)} is {shown(given)}, expected an operation and "
                        f"~{source}."
                    )
                operations.append(operation)
        try:
            return cls(tuple(operations))
        except ValueError as error:
            raise ValueError(f"{shown(text)}: {error}") from error

    @classmethod
    def from_index(cls, index: int) -> NasBench201Architecture:
        """The inverse of :attr:`index`.

        Raises:
            ValueError: ``index`` is not in 0..15,624.
        """
        count = len(OPERATIONS) ** len(EDGES)
        if index not in range(count):
            raise ValueError(f"An index must be an integer from 0 to {count - 1}, got {shown(index)}.")
        digits = [int(index) // len(OPERATIONS) ** place % len(OPERATIONS) for place in reversed(range(len(EDGES)))]
        return cls(tuple(OPERATIONS[digit] for digit in digits))

    @property
    def index(self) -> int:
        """Position in the order of :meth:`~.NasBench201SearchSpace.architectures`; the benchmark's own is shuffled.

        A number in base 5 whose digits are the operations, the first edge leading.
        """
        index = 0
        for operation in self.operations:
            index = len(OPERATIONS) * index + OPERATIONS.index(operation)
        return index

    def __str__(self) -> str:
        nodes = []
        for node in NODES:
            inputs = (f"{op}~{source}" for op, (source, end) in zip(self.operations, EDGES, strict=True) if end == node)
            nodes.append(f"|{'|'.join(inputs)}|")
        return "+".join(nodes)

    @property
    def path_counts(self) -> tuple[int, ...]:
        """For each edge, how many paths from the cell's input to its output run through it and have no ``none``."""
        edges = [edge for edge, operation in zip(EDGES, self.operations, strict=True) if operation != "none"]
        arriving, leaving = Counter({0: 1}), Counter({_OUTPUT: 1})
        # The edges are sorted by the node they enter; leaving a node needs them sorted by their source.
        for source, node in edges:
            arriving[node] += arriving[source]
        for source, node in sorted(edges, reverse=True):
            leaving[source] += leaving[node]
        return tuple(arriving[source] * leaving[node] if (source, node) in edges else 0 for source, node in EDGES)

    @property
    def connected(self) -> bool:
        """Whether any path leads from the cell's input to its output."""
        return any(self.path_counts)

    def live(self) -> NasBench201Architecture:
        """Replace every operation on no path from input to output by ``none``; 9,445 different cells remain.

        The output changes in one case only: a convolution of zeros outputs the bias of its batch normalisation, which
        is lost here.
        """
        pairs = zip(self.operations, self.path_counts, strict=True)
        return NasBench201Architecture(tuple(operation if count else "none" for operation, count in pairs))

    def canonical(self) -> str:
        """A string that is equal for architectures the benchmark's authors call isomorphic; there are 6,466 of them.

        A node is written as the sorted sum of its inputs; a skip connection stands for its source, ``none`` and
        every operation on ``none`` for zero (``#``). This is the published procedure, kept so that the published
        count holds. It is not quite "computes the same function": zeros stay in a sum, so that 0 + f is not f,
        and one convolution used twice looks like two. :meth:`function` has neither flaw.
        """
        values = {0: "0"}
        inputs: dict[int, list[str]] = {node: [] for node in NODES}
        for operation, (source, node) in zip(self.operations, EDGES, strict=True):
            # A node's inputs are complete before an edge leaves it.
            if source not in values:
                values[source] = "+".join(sorted(inputs[source]))
            value = values[source]
            if operation == "none" or value == "#":
                value = "#"
            elif operation != "skip_connect":
                value = f"({value})@{operation}"
            inputs[node].append(value)
        return "+".join(sorted(inputs[_OUTPUT]))

    def function(self) -> str:
        """A string that is equal exactly for cells that compute the same function of matched weights; there are 5,044.

        Sums, skip connections and the linearity of average pooling are multiplied out; a convolution that is
        used twice is not two convolutions. As in :meth:`live`, an operation on zeros counts as zero.
        """
        live = self.live()
        edges = [edge for edge, operation in enumerate(live.operations) if operation.startswith("nor_conv")]
        # The numbering of the weights is arbitrary: take the first string of all numberings.
        numberings = itertools.permutations(range(len(edges)))
        return min(live._expression(dict(zip(edges, numbers, strict=True))) for numbers in numberings)

    def _expression(self, numbers: Mapping[int, int]) -> str:
        # A node's value: how often each term occurs in the sum. A pooled sum is the sum of the pooled terms.
        values: list[Counter[str]] = [Counter({"x": 1}), Counter(), Counter(), Counter()]
        for edge, (operation, (source, node)) in enumerate(zip(self.operations, EDGES, strict=True)):
            terms = values[source]
            if operation == "none" or not terms:
                continue
            if operation == "skip_connect":
                values[node] += terms
            elif operation == "avg_pool_3x3":
                values[node] += Counter({f"pool({term})": count for term, count in terms.items()})
            else:
                values[node][f"{operation}#{numbers[edge]}({_sum(terms)})"] += 1
        return _sum(values[_OUTPUT])


def _sum(terms: Counter[str]) -> str:
    return "+".join(f"{count}*{term}" for term, count in sorted(terms.items()))
