"""The NAS-Bench-201 space relaxed: a supernet whose edges mix all operations, and the architecture that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from genas_plugins.nasbench201.architecture import EDGES, OPERATIONS, NasBench201Architecture
from genas_plugins.nasbench201.cells import SuperCell

if TYPE_CHECKING:
    from genas_plugins.nasbench201.networks import NasBench201SuperNet

__all__ = ["NasBench201Relaxation"]


class NasBench201Relaxation:
    """A supernet of NAS-Bench-201 as the mixture of all its paths (Dong and Yang, ICLR 2020, for DARTS).

    An edge is the sum of its operations' outputs, each times its weight; all cells share the weights. With weights of 0
    and 1 the mixture is the supernet's path of an architecture.

    Attributes:
        choices: What is mixed under each label: the five operations of the six edges, ``cell/{source}_{node}``.

    Args:
        supernet: Its operations are run.
    """

    choices: Mapping[str, tuple[str, ...]] = {f"cell/{source}_{node}": OPERATIONS for source, node in EDGES}

    def __init__(self, supernet: NasBench201SuperNet) -> None:
        self._supernet = supernet

    def logits(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``.

        Args:
            x: The images.
            weights: Five numbers for each of :attr:`choices`.
        """
        rows = [weights[label] for label in self.choices]
        x = self._supernet.stem(x)
        for cell in self._supernet.cells:
            x = cell.mixed(x, rows) if isinstance(cell, SuperCell) else cell(x)
        return self._supernet.head(x)

    def discretize(self, weights: Mapping[str, Sequence[float]]) -> NasBench201Architecture:
        """The operation of the largest weight on each edge, ``none`` included; of equals the first.

        Args:
            weights: Five numbers for each of :attr:`choices`.
        """
        rows = [[float(weight) for weight in weights[label]] for label in self.choices]
        return NasBench201Architecture(tuple(OPERATIONS[row.index(max(row))] for row in rows))
