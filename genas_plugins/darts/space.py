"""The DARTS space as GeNAS searches it: each node takes two distinct inputs, each through one of seven operations.

Genotypes whose nodes have one input are not in it: they can be read and measured, mutation and crossover give them a
second one, and histories and samples of a search have none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from genas_plugins.darts.genotype import EDGES_PER_CELL, NODES, OPERATIONS, Genotype, cell_edges, node_edges

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
        code = genotype.code
        for edges in _all_node_edges():
            for edge in (edge for edge in edges if code[edge]):
                for operation in range(1, len(OPERATIONS)):
                    if operation != code[edge]:
                        yield _replaced(code, {edge: operation})
                for other in edges:
                    if not code[other]:
                        yield _replaced(code, {edge: 0, other: code[edge]})

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


def _replaced(code: Sequence[int], changes: dict[int, int]) -> Genotype:
    return Genotype.from_code([changes.get(edge, operation) for edge, operation in enumerate(code)])
