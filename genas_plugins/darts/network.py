"""One fixed genotype, stacked into a network for CIFAR or ImageNet.

Stacking and parameter names follow the official GeNAS code (clovaai/GeNAS@fd3cba8, after DARTS and RLNAS), so
that its checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins._messages import shown
from genas_plugins.darts.genotype import NODES, CellGene, Genotype, cell_edges
from genas_plugins.darts.operations import (
    FactorizedReduce,
    Identity,
    Layers,
    NoEdge,
    ReLUConvBN,
    build_operation,
    drop_path,
)

if TYPE_CHECKING:
    from genas_plugins.scoring.inference import InferenceNetwork
    from genas_plugins.scoring.layers import Parts

__all__ = [
    "AuxiliaryHead",
    "Cell",
    "CellNetwork",
    "CellShape",
    "CellStack",
    "Stem",
    "build_imagenet_stem",
    "cell_shapes",
]

Stem = Literal["imagenet", "cifar"]
STEMS: tuple[Stem, ...] = ("imagenet", "cifar")
MAX_CELLS, MAX_CHANNELS, MAX_CLASSES = 256, 2**16, 2**24
"""Upper bounds of sizes from files and options, far beyond any network that can be trained."""
_STEM_STRIDES: dict[Stem, int] = {"imagenet": 8, "cifar": 1}
_DEFAULT = Layers()
CELL_OUTPUTS = len(NODES)
"""A cell's output has this many times its channels: the concatenation of the intermediate nodes."""


@dataclass(frozen=True)
class CellShape:
    """Channels of one cell of a stack.

    Attributes:
        before_previous: Channels of ``c_{k-2}``, the output of the cell before the previous one.
        previous: Channels of ``c_{k-1}``.
        channels: Channels of each intermediate node.
        reduction: The cell halves the resolution.
        previous_reduced: The previous cell (or the ImageNet stem) halved it, so ``c_{k-2}`` is twice as large.
        dilation: Factor by which ``c_{k-1}`` is larger than in the official network, because strides were left out.
        replace_stride: The reduction cell keeps the resolution; later layers are dilated instead.
        previous_replaced: ``replace_stride`` of the previous cell.
    """

    before_previous: int
    previous: int
    channels: int
    reduction: bool
    previous_reduced: bool
    dilation: int = 1
    replace_stride: bool = False
    previous_replaced: bool = False

    @property
    def out_dilation(self) -> int:
        """The dilation of the cell's output."""
        return 2 * self.dilation if self.replace_stride else self.dilation

    @property
    def out_channels(self) -> int:
        """Channels of the cell's output."""
        return CELL_OUTPUTS * self.channels


def cell_shapes(
    init_channels: int, num_cells: int, stem: Stem, output_stride: int | None = None
) -> tuple[CellShape, ...]:
    """Shapes of the cells of a stack; reduction cells, where channels double, are at one and two thirds.

    Args:
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack.
        stem: ``"imagenet"`` (the cells start at stride 8) or ``"cifar"`` (at stride 1).
        output_stride: Stride of the last cell. None: 4 times that of the first. If it is smaller, the last reduction
            cell, or both, keep the resolution.

    Raises:
        ValueError: ``init_channels`` is not a positive even number up to 65,536, ``num_cells`` is not from 2 to 256,
            ``stem`` is neither ``"imagenet"`` nor ``"cifar"``, or ``output_stride`` is not 1, 2 or 4 times the stride
            of the first cell.
    """
    if stem not in STEMS:
        raise ValueError(f"Unknown stem {stem!r}; valid stems: {', '.join(STEMS)}.")
    if init_channels < 2 or init_channels % 2:
        raise ValueError(f"init_channels must be a positive even number, got {init_channels}.")
    if num_cells < 2:
        raise ValueError(f"num_cells must be at least 2 (two reduction cells), got {num_cells}.")
    if init_channels > MAX_CHANNELS or num_cells > MAX_CELLS:
        raise ValueError(
            f"A stack has at most {MAX_CHANNELS:,} init_channels and {MAX_CELLS} cells, got {shown(init_channels)} and "
            f"{shown(num_cells)}."
        )
    stride = _STEM_STRIDES[stem]
    strides = (stride, 2 * stride, 4 * stride)
    output_stride = strides[-1] if output_stride is None else output_stride
    if output_stride not in strides:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, strides))}, got {output_stride!r}.")
    stem_channels = init_channels if stem == "imagenet" else 3 * init_channels
    before_previous = previous = stem_channels
    channels, dilation = init_channels, 1
    previous_reduced, previous_replaced = stem == "imagenet", False
    shapes = []
    for index in range(num_cells):
        reduction = index in (num_cells // 3, 2 * num_cells // 3)
        channels *= 2 if reduction else 1
        replace = reduction and stride == output_stride
        stride *= 2 if reduction and not replace else 1
        shape = CellShape(
            before_previous, previous, channels, reduction, previous_reduced, dilation, replace, previous_replaced
        )
        shapes.append(shape)
        before_previous, previous, dilation = previous, shape.out_channels, shape.out_dilation
        previous_reduced, previous_replaced = reduction, replace
    return tuple(shapes)


class Cell(nn.Module):
    """A cell: two preprocessed inputs, and four nodes that add one or two operations each and are concatenated.

    Args:
        preprocess0: Brings ``c_{k-2}`` to the cell's channels and to the resolution of ``c_{k-1}``.
        preprocess1: Brings ``c_{k-1}`` to the cell's channels.
        operations: The operations in the order of :func:`~genas_plugins.darts.genotype.cell_edges`.
        gene: Eight pairs ``(operation, input)``.
    """

    def __init__(
        self, preprocess0: nn.Module, preprocess1: nn.Module, operations: Iterable[nn.Module], gene: CellGene
    ) -> None:
        super().__init__()
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        built = iter(operations)
        # A missing edge keeps its place, which numbers the operations behind it; its source is -1.
        self._ops = nn.ModuleList(NoEdge() if name == "none" else next(built) for name, _ in gene)
        self._sources = [-1 if name == "none" else source for name, source in gene]
        self._droppable = [not isinstance(operation, Identity) for operation in self._ops]

    @classmethod
    def from_shape(cls, shape: CellShape, gene: CellGene, layers: Layers = _DEFAULT) -> Cell:
        """Build a freshly initialised cell."""
        preprocess0, preprocess1 = build_preprocessing(shape, layers)
        operations = []
        for _, operation, source in cell_edges(gene):
            stride = operation_stride(shape, source)
            dilation = shape.dilation if source < 2 else shape.out_dilation
            replace = shape.replace_stride and stride > 1
            operations.append(build_operation(operation, shape.channels, stride, layers, dilation, replace))
        return cls(preprocess0, preprocess1, operations, gene)

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        """Compute ``c_k`` from ``c_{k-2}`` and ``c_{k-1}``.

        Args:
            s0: ``(N, C_pp, H0, W0)``, twice the size of ``s1`` where the previous cell reduced.
            s1: ``(N, C_p, H, W)``.
            drop_path_prob: Probability to drop an operation for a sample, applied in training only.

        Returns:
            ``(N, 4 C, H', W')``, halved (rounded up) in a reduction cell.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        node = states[0]
        # One loop over the operations, because TorchScript unrolls it; pairs of them enter the same node.
        for position, operation in enumerate(self._ops):
            source = self._sources[position]
            if source >= 0:
                out = operation(states[source])
                if self.training and drop_path_prob > 0.0 and self._droppable[position]:
                    out = drop_path(out, drop_path_prob)
                node = node + out if position % 2 == 1 and self._sources[position - 1] >= 0 else out
            if position % 2 == 1:
                states.append(node)
        return torch.cat(states[2:], dim=1)


class AuxiliaryHead(nn.Module):
    """Classifier on an intermediate cell, for training only: ``(N, C, H, W)`` to ``(N, num_classes)``.

    Made for 7x7 (ImageNet at 224) or 8x8 (CIFAR) features; larger ones are averaged at the end and smaller ones resized
    first. On ImageNet its second convolution has no batch normalisation, as in the official code and DARTS.
    """

    def __init__(self, in_channels: int, num_classes: int, stem: Stem = "imagenet", layers: Layers = _DEFAULT) -> None:
        super().__init__()
        parts: list[nn.Module] = [
            layers.activate(),
            nn.AvgPool2d(5, stride=2 if stem == "imagenet" else 3, padding=0, count_include_pad=False),
            layers.conv(in_channels, 128, 1),
            layers.normalize(128),
            layers.activate(inplace=True),
            layers.conv(128, 768, 2),
        ]
        if stem == "cifar":
            parts.append(layers.normalize(768))
        self.features = nn.Sequential(*parts, layers.activate(inplace=True))
        self.classifier = nn.Linear(768, num_classes, **layers.placement)
        self._least = 7 if stem == "imagenet" else 8

    def forward(self, x: Tensor) -> Tensor:
        x = _at_least(x, self._least)
        return self.classifier(self.features(x).mean((2, 3)))


@torch.fx.wrap
def _at_least(x: Tensor, size: int) -> Tensor:
    """Enlarge images that are smaller than ``size``; a leaf in traced graphs."""
    if min(x.shape[2], x.shape[3]) < size:
        x = F.adaptive_avg_pool2d(x, [size, size])
    return x


class CellStack(nn.Module):
    """Base of fixed networks and supernets: the stem, the list of cells, the head.

    Args:
        shapes: Shapes of the cells, from :func:`cell_shapes`.
        num_classes: Outputs of the classifier.
        stem: ``"imagenet"`` (three strided convolutions; the cells start at stride 8) or ``"cifar"`` (one
            3x3 convolution to 3 C; the cells start at full resolution).
    """

    def __init__(self, shapes: tuple[CellShape, ...], num_classes: int, stem: Stem) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if num_classes > MAX_CLASSES:
            raise ValueError(f"num_classes must be at most {MAX_CLASSES:,}, got {shown(num_classes)}.")
        self.num_classes = num_classes
        self.shapes = shapes
        self.stem_kind = stem
        channels = shapes[0].previous
        if stem == "imagenet":
            self.stem0, self.stem1 = build_imagenet_stem(channels)
        else:
            self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        self.classifier = nn.Linear(shapes[-1].out_channels, num_classes)

    def stem_states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first two states ``(c_{-2}, c_{-1})`` from images ``(N, 3, H, W)``."""
        if self.stem_kind == "imagenet":
            s0 = self.stem0(x)
            return s0, self.stem1(s0)
        s0 = self.stem(x)
        return s0, s0

    def head(self, features: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` from the last cell's output."""
        return self.classifier(features.mean((2, 3)))


class CellNetwork(CellStack):
    """A genotype as a network, with its own freshly initialised weights.

    Args:
        genotype: The two cells.
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack (the paper: 14 on ImageNet, 20 on CIFAR).
        num_classes: Outputs of the classifier.
        stem: ``"imagenet"`` or ``"cifar"``.
        auxiliary: Add the auxiliary head on the cell at two thirds; the network then returns
            ``(logits, auxiliary_logits)`` in training mode, and logits alone in evaluation mode.

    Attributes:
        drop_path_prob: Probability to drop an operation for a sample in training; 0 unless set.

    Raises:
        ValueError: See :func:`cell_shapes`.

    Example:
        >>> import torch
        >>> from genas_plugins import ZOO, CellNetwork
        >>> genotype = ZOO["genas_flatness_c100"].genotype
        >>> network = CellNetwork(genotype, init_channels=4, num_cells=3, num_classes=10, stem="cifar")
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        genotype: Genotype,
        init_channels: int,
        num_cells: int,
        num_classes: int,
        stem: Stem = "imagenet",
        auxiliary: bool = False,
    ) -> None:
        super().__init__(cell_shapes(init_channels, num_cells, stem), num_classes, stem)
        self.genotype = genotype
        self.drop_path_prob = 0.0
        self._auxiliary_cell = 2 * num_cells // 3
        for shape in self.shapes:
            self.cells.append(Cell.from_shape(shape, genotype.reduce if shape.reduction else genotype.normal))
        self.auxiliary_head: AuxiliaryHead | None = None
        if auxiliary:
            features = self.shapes[self._auxiliary_cell].out_channels
            self.auxiliary_head = AuxiliaryHead(features, num_classes, stem)

    def inference(self, network: InferenceNetwork) -> Callable[[Tensor], Parts]:
        """See :class:`genas_plugins.scoring.inference.InferenceNetwork`."""
        from genas_plugins.darts.inference import cell_stack

        return cell_stack(network, self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``; a pair in training with an auxiliary head."""
        s0, s1 = self.stem_states(x)
        auxiliary_logits = None
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if index == self._auxiliary_cell and self.auxiliary_head is not None and self.training:
                auxiliary_logits = self.auxiliary_head(s1)
        logits = self.head(s1)
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)


def build_imagenet_stem(
    channels: int, in_channels: int = 3, layers: Layers = _DEFAULT
) -> tuple[nn.Sequential, nn.Sequential]:
    """Build the two parts of the stem: ``(N, in_channels, H, W)`` to stride 4, and from there to stride 8."""
    half = channels // 2
    stem0 = nn.Sequential(
        layers.conv(in_channels, half, 3, stride=2, padding=1),
        layers.normalize(half),
        layers.activate(inplace=True),
        layers.conv(half, channels, 3, stride=2, padding=1),
        layers.normalize(channels),
    )
    stem1 = nn.Sequential(
        layers.activate(),
        layers.conv(channels, channels, 3, stride=2, padding=1),
        layers.normalize(channels),
    )
    return stem0, stem1


def build_preprocessing(shape: CellShape, layers: Layers = _DEFAULT) -> tuple[nn.Module, nn.Module]:
    """Build the two input layers of a cell."""
    second = ReLUConvBN(shape.previous, shape.channels, layers)
    if not shape.previous_reduced:
        return ReLUConvBN(shape.before_previous, shape.channels, layers), second
    dilation = shape.dilation // 2 if shape.previous_replaced else shape.dilation
    first = FactorizedReduce(shape.before_previous, shape.channels, layers, dilation, shape.previous_replaced)
    return first, second


def operation_stride(shape: CellShape, source: int) -> int:
    """Stride of an operation on ``source``: 2 on the inputs of a reduction cell."""
    return 2 if shape.reduction and source < 2 else 1
