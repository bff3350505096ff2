"""The DARTS space relaxed (Liu et al., ICLR 2019): a supernet whose edges mix all operations, and what it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from genas_plugins.darts.genotype import EDGES, NODES, OPERATIONS, CellGene, Genotype

if TYPE_CHECKING:
    from genas_plugins.darts.supernet import SuperNet

__all__ = ["DartsRelaxation"]


class DartsRelaxation:
    """A supernet of the DARTS space as the mixture of all its paths.

    A node adds what all of its edges give, and an edge the sum of its operations' outputs, each times its weight;
    ``none`` gives zeros. Normal cells share their weights, and so do reduction cells. With weights of 0 and 1 that are
    a genotype's, the mixture is the supernet's path of the genotype.

    Attributes:
        choices: What is mixed under each label: the eight operations, ``none`` first, of the 28 edges, which are
            called ``{normal,reduce}/{source}_{node}``.

    Args:
        supernet: Its operations are run.
    """

    choices: Mapping[str, tuple[str, ...]] = {
        f"{cell}/{source}_{node}": OPERATIONS for cell in ("normal", "reduce") for source, node in EDGES
    }

    def __init__(self, supernet: SuperNet) -> None:
        self._supernet = supernet

    def logits(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``.

        Args:
            x: The images.
            weights: Eight numbers for each of :attr:`choices`.
        """
        rows = {
            reduction: [weights[f"{cell}/{source}_{node}"] for source, node in EDGES]
            for reduction, cell in ((False, "normal"), (True, "reduce"))
        }
        return self._supernet.stacked(x, lambda shape, cell, s0, s1: cell.mixed(s0, s1, rows[shape.reduction]))

    def discretize(self, weights: Mapping[str, Sequence[float]]) -> Genotype:
        """The genotype of a mixture, by DARTS's rule.

        The strength of an edge is the largest weight of its operations but ``none``; each node keeps the strongest
        two edges, each with that operation. Of equals the first is kept.

        Args:
            weights: Eight numbers for each of :attr:`choices`.
        """
        return Genotype(*(_discretized(cell, weights) for cell in ("normal", "reduce")))


def _discretized(cell: str, weights: Mapping[str, Sequence[float]]) -> CellGene:
    pairs: list[tuple[str, int]] = []
    for node in NODES:
        # The best operation of each edge; max() and sorted() keep the first of equals.
        best = []
        for source in range(node):
            row = [float(weight) for weight in weights[f"{cell}/{source}_{node}"]]
            number = max(range(1, len(OPERATIONS)), key=row.__getitem__)
            best.append((row[number], OPERATIONS[number], source))
        strongest = sorted(best, key=lambda edge: -edge[0])[:2]
        pairs += sorted(((name, source) for _, name, source in strongest), key=lambda pair: pair[1])
    return tuple(pairs)
