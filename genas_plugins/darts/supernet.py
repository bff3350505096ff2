"""The weight-sharing supernet of the DARTS space: every operation on every edge.

Parameter names follow the official GeNAS code (clovaai/GeNAS@fd3cba8, after RLNAS), so that its checkpoints
load by name. Unlike fixed networks, the supernet normalises after every pooling operation.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genas_plugins.darts.genotype import (
    EDGES,
    NODES,
    OPERATIONS,
    CellGene,
    Genotype,
    cell_edges,
    edge_index,
    path_counts,
)
from genas_plugins.darts.network import (
    Cell,
    CellNetwork,
    CellShape,
    CellStack,
    Stem,
    build_preprocessing,
    cell_shapes,
    operation_stride,
)
from genas_plugins.darts.operations import Identity, build_operation
from genas_plugins.darts.space import DartsSearchSpace
from genas_plugins.devices import full_in_float64

if TYPE_CHECKING:
    from genas_plugins.darts.relaxed import DartsRelaxation

__all__ = ["SubNet", "SuperNet"]


class _Choices(nn.Module):
    """All seven operations of one edge; their keys are the operation numbers of the code."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleDict()
        for number, name in enumerate(OPERATIONS):
            if name == "none":
                continue
            operation = build_operation(name, channels, stride)
            if name.endswith("pool_3x3"):
                operation = nn.Sequential(operation, nn.BatchNorm2d(channels))
            self._ops[str(number)] = operation


class _SuperCell(nn.Module):
    """A cell with all 14 edges and all seven operations on each."""

    def __init__(self, shape: CellShape) -> None:
        super().__init__()
        self.preprocess0, self.preprocess1 = build_preprocessing(shape)
        self._ops = nn.ModuleList(_Choices(shape.channels, operation_stride(shape, source)) for source, _ in EDGES)

    def operation(self, name: str, source: int, node: int) -> nn.Module:
        """The operation ``name`` on the edge from ``source`` into ``node``."""
        return self._ops[edge_index(source, node)]._ops[str(OPERATIONS.index(name))]

    def forward(self, s0: Tensor, s1: Tensor, gene: CellGene) -> Tensor:
        """Compute the concatenated nodes from inputs that are already rectified."""
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        for _, edges in itertools.groupby(cell_edges(gene), key=operator.itemgetter(0)):
            out, *others = [self.operation(name, source, node)(states[source]) for node, name, source in edges]
            for other in others:
                out = out + other
            if out.requires_grad:
                out.register_hook(_dense)
            states.append(out)
        return torch.cat(states[2:], dim=1)

    def mixed(self, s0: Tensor, s1: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Compute :meth:`forward` with all operations on all edges, each times its weight.

        Args:
            s0: Rectified, as ``s1``.
            s1: The output of the cell before.
            weights: For each edge, in the order of the code, eight numbers; that of ``none`` is not read.
        """
        states = [self.preprocess0.after_relu(s0), self.preprocess1.after_relu(s1)]
        for node in NODES:
            outputs = [
                weights[edge_index(source, node)][number] * self.operation(name, source, node)(states[source])
                for source in range(node)
                for number, name in enumerate(OPERATIONS)
                if name != "none"
            ]
            out = functools.reduce(operator.add, outputs)
            if out.requires_grad:
                out.register_hook(_dense)
            states.append(out)
        return torch.cat(states[2:], dim=1)


def _dense(gradient: Tensor) -> Tensor:
    """A contiguous gradient: that of a concatenation is not, and slows batch normalisation on a CPU."""
    last = gradient.stride(1) == 1
    return gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class SuperNet(CellStack):
    """Every genotype of the space in one network; a call or a subnet picks one.

    Args:
        num_classes: Outputs of the classifier.
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack.
        stem: ``"cifar"`` or ``"imagenet"``.

    Raises:
        ValueError: See :func:`genas_plugins.darts.network.cell_shapes`.

    Example:
        >>> import torch
        >>> from genas_plugins import ZOO, SuperNet
        >>> supernet = SuperNet(num_classes=10, init_channels=4, num_cells=3)
        >>> supernet(torch.zeros(2, 3, 32, 32), ZOO["genas_flatness_c100"].genotype).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, init_channels: int = 16, num_cells: int = 8, stem: Stem = "cifar") -> None:
        super().__init__(cell_shapes(init_channels, num_cells, stem), num_classes, stem)
        self.cells.extend(_SuperCell(shape) for shape in self.shapes)

    search_space = DartsSearchSpace()

    @property
    def relaxation(self) -> DartsRelaxation:
        """This supernet as the mixture of all its paths, for differentiable searches."""
        from genas_plugins.darts.relaxed import DartsRelaxation

        return DartsRelaxation(self)

    @property
    def arguments(self) -> Mapping[str, int | str]:
        """The constructor's arguments, enough to build a supernet of the same shape."""
        return {
            "num_classes": self.num_classes,
            "init_channels": self.shapes[0].channels // (2 if self.shapes[0].reduction else 1),
            "num_cells": len(self.shapes),
            "stem": self.stem_kind,
        }

    def forward(self, x: Tensor, genotype: Genotype) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)`` along the path of ``genotype``."""
        genes = {False: genotype.normal, True: genotype.reduce}
        return self.stacked(x, lambda shape, cell, s0, s1: cell(s0, s1, genes[shape.reduction]))

    def stacked(self, x: Tensor, run: Callable[[CellShape, _SuperCell, Tensor, Tensor], Tensor]) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``, with ``run`` for the output of each cell."""
        before, last = self.stem_states(x)
        # Two cells read each state, both through a ReLU, so it is rectified once and in place; the head reads the last
        # state without.
        s0 = before.relu_()
        s1 = s0 if last is before else last.relu_()
        for shape, cell in zip(self.shapes, self.cells, strict=True):
            last = run(shape, cell, s0, s1)
            s0, s1 = s1, last if cell is self.cells[-1] else last.relu_()
        return self.head(s1)

    def path_modules(self, genotype: Genotype) -> Iterator[nn.Module]:
        """The modules that a call along the path of ``genotype`` runs; no two share a parameter."""
        for name, child in self.named_children():
            if name != "cells":
                yield child
        for shape, cell in zip(self.shapes, self.cells, strict=True):
            yield from (cell.preprocess0, cell.preprocess1)
            gene = genotype.reduce if shape.reduction else genotype.normal
            yield from (cell.operation(name, source, node) for node, name, source in cell_edges(gene))

    def vector_pieces(self, genotype: Genotype) -> Iterator[tuple[Tensor, int]]:
        """The tensors of the architecture vector for :func:`genas_plugins.scoring.angle`, and how often each occurs."""
        for name, child in self.named_children():
            if name not in ("cells", "classifier"):
                yield from ((parameter, 1) for parameter in child.parameters())
        for shape, cell in zip(self.shapes, self.cells, strict=True):
            for preprocess in (cell.preprocess0, cell.preprocess1):
                yield from ((parameter, 1) for parameter in preprocess.parameters())
            gene = genotype.reduce if shape.reduction else genotype.normal
            for (node, name, source), count in zip(cell_edges(gene), path_counts(gene), strict=True):
                operation = cell.operation(name, source, node)
                first = next(cell.parameters())
                if isinstance(operation, Identity):
                    yield torch.eye(shape.channels, device=first.device), count
                elif name.endswith("pool_3x3"):
                    yield full_in_float64((shape.channels, 3, 3), 1 / 9, first.device), count
                yield from ((parameter, count) for parameter in operation.parameters())
        yield self.classifier.weight, 1

    def subnet(self, genotype: Genotype) -> SubNet:
        """The path of ``genotype`` as a small module that shares this supernet's parameters.

        Its buffers (the statistics of batch normalisation) are its own copies: recalibrating the subnet does
        not touch the supernet.

        Example:
            >>> from genas_plugins import ZOO, SuperNet
            >>> supernet = SuperNet(num_classes=10, init_channels=4, num_cells=3)
            >>> subnet = supernet.subnet(ZOO["genas_flatness_c100"].genotype)
            >>> subnet.classifier.weight is supernet.classifier.weight
            True
            >>> subnet.stem[1].running_mean is supernet.stem[1].running_mean
            False
        """
        return SubNet(self, genotype)


class SubNet(nn.Module):
    """One path of a supernet; see :meth:`SuperNet.subnet`. Its parameters *are* the supernet's."""

    def __init__(self, supernet: SuperNet, genotype: Genotype) -> None:
        super().__init__()
        self.genotype = genotype
        self.stem_kind = supernet.stem_kind
        for name, child in supernet.named_children():
            if name != "cells":
                self.add_module(name, share_parameters(child))
        self.cells = nn.ModuleList()
        for shape, cell in zip(supernet.shapes, supernet.cells, strict=True):
            gene = genotype.reduce if shape.reduction else genotype.normal
            operations = [cell.operation(name, source, node) for node, name, source in cell_edges(gene)]
            shared = [share_parameters(module) for module in (cell.preprocess0, cell.preprocess1, *operations)]
            self.cells.append(Cell(shared[0], shared[1], shared[2:], gene))
        self.train(supernet.training)

    stem_states = CellStack.stem_states
    head = CellStack.head
    inference = CellNetwork.inference

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        s0, s1 = self.stem_states(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.head(s1)


def share_parameters(module: nn.Module) -> nn.Module:
    """Copy a module tree; the copy shares the parameters and owns its buffers."""
    # copy.deepcopy with the parameters in its memo gives the same, several times slower; a search does this
    # for every candidate.
    copy = module.__new__(type(module))
    own = copy.__dict__
    for name, value in module.__dict__.items():
        # Dictionaries are copied too: a hook on the copy is not one on the original. Most are empty, and creating an
        # empty one takes a tenth of the time.
        own[name] = (value.copy() if value else type(value)()) if isinstance(value, dict | set) else value
    own["_buffers"] = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    own["_modules"] = {
        name: None if child is None else share_parameters(child) for name, child in module._modules.items()
    }
    return copy
