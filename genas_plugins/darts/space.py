"""The DARTS space as GeNAS searches it: each node takes two distinct inputs, each through one of seven operations.

Genotypes whose nodes have one input are not in it: they can be read and measured, mutation and crossover give them a
second one, and histories and samples of a search have none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import comb
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from genas_plugins.darts.genotype import EDGES_PER_CELL, NODES, OPERATIONS, Genotype, cell_edges, node_edges
from genas_plugins.neighbourhood import Neighbourhood, Parts

if TYPE_CHECKING:
    from genas_plugins.counting import Size
    from genas_plugins.darts.network import CellNetwork
    from genas_plugins.darts.supernet import SuperNet

__all__ = ["DartsSearchSpace"]

_CELLS = ("normal", "reduce")
_INPUTS = 2
_REAL = len(OPERATIONS) - 1


def _choices() -> dict[str, tuple[tuple[Any, ...], int]]:
    choices: dict[str, tuple[tuple[Any, ...], int]] = {}
    for cell in _CELLS:
        for node in NODES:
            choices[f"{cell}/inputs_{node}"] = (tuple(range(node)), _INPUTS)
            choices |= {f"{cell}/op_{node}_{position}": (OPERATIONS[1:], 1) for position in range(_INPUTS)}
    return choices


class DartsSearchSpace:
    """Sampling, mutation and crossover of genotypes. All randomness comes from the generator passed in.

    Example:
        >>> import numpy as np
        >>> from genas_plugins.spaces import DartsSearchSpace
        >>> space = DartsSearchSpace()
        >>> f"{space.size:.2g}"
        '1.1e+18'
        >>> genotype = space.sample(np.random.default_rng(0))
        >>> len([operation for operation in genotype.code if operation])
        16
    """

    candidate = Genotype
    choices = _choices()
    trained = MappingProxyType(
        {"init_channels": 48, "num_cells": 14, "stem": "imagenet", "num_classes": 1000, "image_size": 224}
    )
    """Sizes of the network that is trained after a search, unless somebody says otherwise."""

    @property
    def supernet_type(self) -> type[SuperNet]:
        """Class of the supernet."""
        from genas_plugins.darts.supernet import SuperNet

        return SuperNet

    @property
    def size(self) -> int:
        """Number of genotypes: the square, for two cells, of the product over nodes of pairs times operations."""
        cell = 1
        for node in NODES:
            cell *= comb(node, _INPUTS) * _REAL**_INPUTS
        return cell * cell

    def sample(self, rng: np.random.Generator) -> Genotype:
        """Draw uniformly: for each node a uniform pair of inputs and two uniform operations."""
        code = [0] * (2 * EDGES_PER_CELL)
        for edges in _all_node_edges():
            for edge in rng.choice(edges, _INPUTS, replace=False):
                code[edge] = int(rng.integers(1, _REAL + 1))
        return Genotype.from_code(code)

    def mutate(self, genotype: Genotype, probability: float, rng: np.random.Generator) -> Genotype:
        """Redraw each of the 28 edges with ``probability`` (``none`` included), then repair.

        Both cells mutate; the official code redraws the normal cell's edges only.
        """
        code = list(genotype.code)
        for edge in range(len(code)):
            if rng.random() < probability:
                code[edge] = int(rng.integers(len(OPERATIONS)))
        return self.repair(code, rng)

    def crossover(self, first: Genotype, second: Genotype, rng: np.random.Generator) -> Genotype:
        """Take each edge from either parent with equal chance, then repair."""
        pick = rng.random(2 * EDGES_PER_CELL) < 0.5
        return self.repair([a if p else b for a, b, p in zip(first.code, second.code, pick, strict=True)], rng)

    def repair(self, code: Sequence[int], rng: np.random.Generator) -> Genotype:
        """Make a code valid at random: nodes with too many edges lose some, nodes with too few get some."""
        fixed = list(code)
        for edges in _all_node_edges():
            used = [edge for edge in edges if fixed[edge]]
            free = [edge for edge in edges if not fixed[edge]]
            for edge in rng.choice(used, max(0, len(used) - _INPUTS), replace=False) if used else ():
                fixed[edge] = 0
            for edge in rng.choice(free, max(0, _INPUTS - len(used)), replace=False) if free else ():
                fixed[edge] = int(rng.integers(1, _REAL + 1))
        return Genotype.from_code(fixed)

    def neighbours(self, genotype: Genotype) -> Iterator[Genotype]:
        """Every genotype that differs in one edge: by its operation, or by its input with the operation kept."""
        return iter(Neighbourhood(self, genotype, inputs=True))

    def parts(self, genotype: Genotype, inputs: bool = False) -> Parts[Genotype]:
        """The edges and their operations, or the nodes with inputs and operations where inputs can be moved.

        One edit replaces an operation, or moves an edge to another input and keeps its operation.
        """
        nodes = _node_states(genotype)
        if inputs:
            return Parts([_near(node, edges) for node, edges in nodes], _joined)
        edges = [edge for _, node in nodes for edge in node]
        states = [((own,), [(own[0], n) for n in range(1, _REAL + 1) if n != own[1]]) for own in edges]
        counts = [len(node) for _, node in nodes]

        def combine(chosen: Sequence[Any]) -> Genotype:
            rest = iter(chosen)
            return _joined([tuple(itertools.islice(rest, count)) for count in counts])

        return Parts(states, combine)

    def distance(self, first: Genotype, second: Genotype) -> int:
        """How many edits lie between two genotypes: operations replaced, and edges moved to another input.

        Raises:
            ValueError: A node has one input in one of them and two in the other.
        """
        pairs = zip(_node_states(first), _node_states(second), strict=True)
        return sum(_edits(one, other) for (_, one), (_, other) in pairs)

    def to_json(self, genotype: Genotype) -> list[int]:
        """The code, for a history or a state."""
        return list(genotype.code)

    def from_json(self, data: Any) -> Genotype:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: Not a valid code, or a node has one input: no search of this space proposes that.
        """
        return _checked(Genotype.from_code(data))

    def to_sample(self, genotype: Genotype) -> dict[str, Any]:
        """For each node its two inputs, in increasing order, and their operations, as in NNI's samples.

        Raises:
            ValueError: A node has one input, which NNI's samples cannot say.
        """
        _checked(genotype)
        sample: dict[str, Any] = {}
        for cell, gene in zip(_CELLS, (genotype.normal, genotype.reduce), strict=True):
            for node in NODES:
                edges = sorted((source, name) for target, name, source in cell_edges(gene) if target == node)
                sample[f"{cell}/inputs_{node}"] = [source for source, _ in edges]
                sample.update({f"{cell}/op_{node}_{position}": name for position, (_, name) in enumerate(edges)})
        return sample

    def from_sample(self, sample: Mapping[str, Any]) -> Genotype:
        """The inverse of :meth:`to_sample`.

        Raises:
            KeyError: A label is missing.
            ValueError: Not a valid genotype.
        """
        cells = []
        for cell in _CELLS:
            pairs: list[tuple[str, int]] = []
            for node in NODES:
                inputs = enumerate(sample[f"{cell}/inputs_{node}"])
                pairs += [(sample[f"{cell}/op_{node}_{position}"], int(source)) for position, source in inputs]
            cells.append(tuple(pairs))
        return _checked(Genotype(*cells))

    def read(self, text: str) -> Genotype:
        """See :func:`genas_plugins.darts.zoo.find_genotype`."""
        from genas_plugins.darts.zoo import find_genotype

        return find_genotype(text)

    def supernet_arguments(self, num_classes: int, settings: Any) -> dict[str, Any]:
        """Arguments of :class:`SuperNet` from the section ``space`` of an experiment.

        Raises:
            ValueError: See :func:`genas_plugins.darts.network.cell_shapes`.
        """
        from genas_plugins.darts.network import cell_shapes

        arguments = {name: getattr(settings, name) for name in ("init_channels", "num_cells", "stem")}
        cell_shapes(**arguments)
        return {"num_classes": num_classes, **arguments}

    def network(self, genotype: Genotype, arguments: Mapping[str, Any]) -> CellNetwork:
        """A network with fresh weights, as the paper retrains them: without normalisation after pooling."""
        from genas_plugins.darts.network import CellNetwork

        return CellNetwork(genotype, **arguments)

    def costs(self, genotype: Genotype, arguments: Mapping[str, Any], image_size: Size) -> tuple[int, int]:
        """Parameters and multiply-adds of :meth:`network`; see :class:`genas_plugins.darts.costs.DartsCosts`."""
        from genas_plugins.darts.costs import darts_costs

        sizes = (arguments[name] for name in ("init_channels", "num_cells", "num_classes", "stem"))
        return darts_costs(*sizes, image_size)(genotype)


Edges = tuple[tuple[int, int], ...]
"""The edges into a node as inputs and numbers of operations, by input."""


def _node_states(genotype: Genotype) -> list[tuple[int, Edges]]:
    """Each node with its edges, of the normal and then of the reduction cell."""
    code, states = genotype.code, []
    for first in (0, EDGES_PER_CELL):
        for node in NODES:
            edges = [first + edge for edge in node_edges(node)]
            states.append((node, tuple((source, code[edge]) for source, edge in enumerate(edges) if code[edge])))
    return states


def _joined(states: Sequence[Edges]) -> Genotype:
    code = [0] * (2 * EDGES_PER_CELL)
    for number, state in enumerate(states):
        cell, node = divmod(number, len(NODES))
        for source, operation in state:
            code[cell * EDGES_PER_CELL + node_edges(NODES[node])[source]] = operation
    return Genotype.from_code(code)


def _edits(one: Edges, other: Edges) -> int:
    if len(one) != len(other):
        raise ValueError("No edits lead from a node with one input to one with two: compare genotypes that agree.")
    # Two inputs are never exchanged: replacing both operations takes no more edits.
    ways = itertools.permutations(other)
    return min(sum((a != c) + (b != d) for (a, b), (c, d) in zip(one, way, strict=True)) for way in ways)


@lru_cache(maxsize=4096)
def _near(node: int, own: Edges) -> list[list[Edges]]:
    """All that a node can be, by the number of edits from ``own``."""
    states: list[list[Edges]] = [[] for _ in range(2 * len(own) + 1)]
    for sources in itertools.combinations(range(node), len(own)):
        for operations in itertools.product(range(1, _REAL + 1), repeat=len(own)):
            state = tuple(zip(sources, operations, strict=True))
            states[_edits(own, state)].append(state)
    return states


def _all_node_edges() -> Iterator[list[int]]:
    for first in (0, EDGES_PER_CELL):
        for node in NODES:
            yield [first + edge for edge in node_edges(node)]


def _checked(genotype: Genotype) -> Genotype:
    for cell, gene in zip(_CELLS, (genotype.normal, genotype.reduce), strict=True):
        for number, (operation, _) in enumerate(gene):
            if operation == "none":
                raise ValueError(
                    f"Node {NODES[number // _INPUTS]} of the {cell} cell has one input, and the nodes of this space "
                    "have two: such a genotype can be scored (genas score), but is none of a search."
                )
    return genotype
