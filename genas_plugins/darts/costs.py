"""Parameters and multiply-adds of any network of the DARTS space, without building it."""

from __future__ import annotations

from functools import lru_cache

import torch

from genas_plugins.counting import Size, count_macs, count_parameters, height_and_width
from genas_plugins.darts.genotype import OPERATIONS, Genotype, cell_edges
from genas_plugins.darts.network import CellNetwork, Stem
from genas_plugins.darts.operations import build_operation

__all__ = ["DartsCosts", "darts_costs"]

_FREE = "max_pool_3x3"
_STEM_HALVINGS: dict[Stem, int] = {"cifar": 0, "imagenet": 3}


class DartsCosts:
    """What the genotypes of one size cost: a sum over their edges, of a table that is counted once.

    Counts agree with :func:`~genas_plugins.counting.count_parameters` and :func:`~genas_plugins.counting.count_macs` of
    the :class:`~genas_plugins.CellNetwork`, without auxiliary head.

    >>> from genas_plugins import ZOO
    >>> DartsCosts(46, 14, 1000)(ZOO["genas_flatness_c100"].genotype)
    (5195205, 579473040)

    Args:
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack.
        num_classes: Outputs of the classifier.
        stem: ``"imagenet"`` or ``"cifar"``.
        image_size: Height and width of the image in pixels; a number for both.

    Raises:
        ValueError: See :func:`genas_plugins.darts.network.cell_shapes`.
    """

    def __init__(
        self, init_channels: int, num_cells: int, num_classes: int, stem: Stem = "imagenet", image_size: Size = 224
    ) -> None:
        # Pooling has neither: a network of it is what all others have in common.
        cell = tuple((_FREE, source) for node in range(4) for source in (node, node + 1))
        with torch.device("meta"):
            common = CellNetwork(Genotype(cell, cell), init_channels, num_cells, num_classes, stem)
            self._common = count_parameters(common), count_macs(common, image_size)
            self._edges: dict[tuple[bool, bool, str], tuple[int, int]] = {}
            size = height_and_width(image_size)
            for _ in range(_STEM_HALVINGS[stem]):
                size = _halved(size)
            for shape in common.shapes:
                if shape.reduction:
                    self._add(True, shape.channels, size, strided=True)
                    size = _halved(size)
                self._add(shape.reduction, shape.channels, size, strided=False)

    def __call__(self, genotype: Genotype) -> tuple[int, int]:
        """Parameters and multiply-adds of one image."""
        parameters, macs = self._common
        for reduction, cell in ((False, genotype.normal), (True, genotype.reduce)):
            for _, operation, source in cell_edges(cell):
                more = self._edges.get((reduction, reduction and source < 2, operation), (0, 0))
                parameters, macs = parameters + more[0], macs + more[1]
        return parameters, macs

    def _add(self, reduction: bool, channels: int, size: tuple[int, int], strided: bool) -> None:
        for name in OPERATIONS[1:]:
            operation = build_operation(name, channels, 2 if strided else 1)
            parameters = count_parameters(operation)
            macs = count_macs(operation, size, channels) if parameters else 0
            key = (reduction, strided, name)
            before = self._edges.get(key, (0, 0))
            self._edges[key] = before[0] + parameters, before[1] + macs


darts_costs = lru_cache(DartsCosts)
"""The costs of one size, which are counted once."""


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2
