"""Networks of the NAS-Bench-201 space (Dong and Yang, ICLR 2020): one architecture, and the weight-sharing supernet.

A 3x3 stem, three stages of cells with a residual block of stride 2 between them, channels C, 2C and 4C. Parameter
names follow the official code (D-X-Y/AutoDL-Projects@94a149b; megvii-model/RLNAS@5a8d1b7 for the supernet).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genas_plugins.checks import check_count
from genas_plugins.darts.network import MAX_CELLS, MAX_CHANNELS, MAX_CLASSES
from genas_plugins.darts.supernet import share_parameters
from genas_plugins.nasbench201.architecture import EDGES, NODES, OPERATIONS, NasBench201Architecture
from genas_plugins.nasbench201.costs import stage_channels
from genas_plugins.nasbench201.space import NasBench201SearchSpace
from genas_plugins.states import CheckpointError

if TYPE_CHECKING:
    from genas_plugins.scoring.inference import InferenceNetwork
    from genas_plugins.scoring.layers import Parts

__all__ = [
    "NasBench201Network",
    "NasBench201SubNet",
    "NasBench201SuperNet",
    "SuperCell",
    "check_sizes",
    "reaching_edges",
]

_STAGES = 3
# Keys of the operations in torch's containers of modules.
_KEYS = {name: str(number) for number, name in enumerate(OPERATIONS)}


class _ConvBlock(nn.Module):
    """ReLU, convolution, batch normalisation: ``(N, C_in, H, W)`` to ``(N, C_out, ceil(H/s), ceil(W/s))``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def after_relu(self, x: Tensor) -> Tensor:
        """Apply the layers behind the ReLU."""
        # Not through nn.Sequential, whose Python overhead is a fair part of a training step on a GPU.
        _, convolution, norm = self.op._modules.values()
        return norm(convolution(x))


class _Zero(nn.Module):
    """The operation ``none``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _ResidualBlock(nn.Module):
    """Halves the resolution and doubles the channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        out_channels = 2 * in_channels
        self.conv_a = _ConvBlock(in_channels, out_channels, 3, stride=2)
        self.conv_b = _ConvBlock(out_channels, out_channels, 3)
        self.downsample = nn.Sequential(
            # Rounds odd sizes up, as the convolution does; the official code only takes even ones.
            nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


def _build_operation(name: str, channels: int, affine: bool = True) -> nn.Module:
    if name == "none":
        return _Zero()
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _ConvBlock(channels, channels, {"nor_conv_1x1": 1, "nor_conv_3x3": 3}[name], affine=affine)


def _run_cell(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """The output node of a cell, from one layer per edge."""
    states = [x]
    for node in NODES:
        outputs = [
            layer(states[source])
            for layer, (source, end) in zip(layers, EDGES, strict=True)
            if end == node and not isinstance(layer, _Zero)
        ]
        total = outputs[0] if outputs else torch.zeros_like(x)
        for output in outputs[1:]:
            total = total + output
        states.append(total)
    return states[-1]


@functools.lru_cache(maxsize=1024)
def reaching_edges(architecture: NasBench201Architecture) -> tuple[int, ...]:
    """Indices in ``EDGES`` of the edges that affect a cell's output.

    Unlike live edges they need not be connected to the cell's input, since normalising zeros gives the bias. ``none``
    is not among them, and neither is a skip connection or a pooling of zeros.
    """
    filled, reached = {0}, {NODES[-1]}
    edges = list(enumerate(zip(EDGES, architecture.operations, strict=True)))
    for _, ((source, node), operation) in edges:
        if operation.startswith("nor_conv") or (operation != "none" and source in filled):
            filled.add(node)
    found = []
    for number, ((source, node), operation) in reversed(edges):
        if node in reached and (operation.startswith("nor_conv") or (operation != "none" and source in filled)):
            reached.add(source)
            found.append(number)
    return tuple(reversed(found))


def _run_reaching(x: Tensor, layers: Sequence[nn.Module], numbers: Sequence[int]) -> Tensor:
    """Compute :func:`_run_cell` from the edges ``numbers`` alone, with one ReLU and one pooling per state.

    Fewer operators mean less kernel-launch overhead on a GPU, also in the backward pass.
    """
    states: list[Tensor | None] = [x, None, None, None]
    # By identity: a node that only receives a skip connection is the same tensor as its source.
    behind: dict[int, Tensor] = {}
    pooled: dict[int, Tensor] = {}
    zeros: Tensor | None = None
    for number in numbers:
        source, node = EDGES[number]
        layer, state = layers[number], states[source]
        if state is None:
            zeros = torch.zeros_like(x) if zeros is None else zeros
            output = layer.after_relu(zeros)
        elif isinstance(layer, _ConvBlock):
            key = id(state)
            if key not in behind:
                behind[key] = state.relu()
            output = layer.after_relu(behind[key])
        elif isinstance(layer, nn.AvgPool2d):
            key = id(state)
            if key not in pooled:
                pooled[key] = layer(state)
            output = pooled[key]
        else:
            output = state
        total = states[node]
        states[node] = output if total is None else total + output
    return torch.zeros_like(x) if states[-1] is None else states[-1]


class _Cell(nn.Module):
    """A cell with one layer on each of the six edges."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return _run_cell(x, self.layers)


class SuperCell(nn.Module):
    """A cell with all five operations on each edge, under the official keys ``node<-source``."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.channels = channels
        self.edges = nn.ModuleDict(
            {
                f"{node}<-{source}": nn.ModuleList(_build_operation(name, channels, affine) for name in OPERATIONS)
                for source, node in EDGES
            }
        )

    def layers(self, architecture: NasBench201Architecture) -> list[nn.Module]:
        """The operations of ``architecture``, one per edge."""
        # Reads the dictionaries: the containers' own access is a fair part of a training step on a GPU.
        return [
            choices._modules[_KEYS[name]]
            for choices, name in zip(self.edges._modules.values(), architecture.operations, strict=True)
        ]

    def forward(self, x: Tensor, architecture: NasBench201Architecture) -> Tensor:
        """Compute the output node; in training mode, edges that do not affect it are skipped."""
        layers = self.layers(architecture)
        return _run_reaching(x, layers, reaching_edges(architecture)) if self.training else _run_cell(x, layers)


def check_sizes(init_channels: int, cells_per_stage: int, num_classes: int = 1) -> None:
    """Check the sizes of a network.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below 1, or beyond the limits of :mod:`genas_plugins.darts.network`.
    """
    limits = {
        "init_channels": (init_channels, MAX_CHANNELS),
        "cells_per_stage": (cells_per_stage, MAX_CELLS),
        "num_classes": (num_classes, MAX_CLASSES),
    }
    for name, (size, most) in limits.items():
        check_count(name, size, most=most)


class _Stack(nn.Module):
    """Base of the networks: stem, cells with a residual block between stages, head."""

    def __init__(
        self, init_channels: int, cells_per_stage: int, num_classes: int, build_cell: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        check_sizes(init_channels, cells_per_stage, num_classes)
        self.init_channels = init_channels
        self.cells_per_stage = cells_per_stage
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(3, init_channels, 3, padding=1, bias=False), nn.BatchNorm2d(init_channels))
        self.cells = nn.ModuleList()
        for channels in stage_channels(init_channels):
            if channels > init_channels:
                self.cells.append(_ResidualBlock(channels // 2))
            self.cells.extend(build_cell(channels) for _ in range(cells_per_stage))
        self.lastact = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` from the last cell's output."""
        return self.classifier(self.lastact(x).mean((2, 3)))


class NasBench201Network(_Stack):
    """One architecture as a network with its own freshly initialised weights.

    Args:
        architecture: The cell.
        init_channels: C, channels of the first stage; the benchmark has 16.
        cells_per_stage: N, cells in each of the three stages; the benchmark has 5.
        num_classes: Outputs of the classifier.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        architecture: NasBench201Architecture,
        init_channels: int = 16,
        cells_per_stage: int = 5,
        num_classes: int = 10,
    ) -> None:
        def build_cell(channels: int) -> nn.Module:
            return _Cell(_build_operation(name, channels) for name in architecture.operations)

        super().__init__(init_channels, cells_per_stage, num_classes, build_cell)
        self.architecture = architecture

    def inference(self, network: InferenceNetwork) -> Callable[[Tensor], Parts]:
        """See :class:`genas_plugins.scoring.inference.InferenceNetwork`."""
        from genas_plugins.nasbench201.inference import stack

        return stack(network, self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.head(x)


class NasBench201SuperNet(_Stack):
    """Every architecture of the space in one network; a call or a subnet picks one.

    Args:
        init_channels: C, channels of the first stage.
        cells_per_stage: N, cells in each of the three stages.
        num_classes: Outputs of the classifier.
        affine: Whether batch normalisation in the cells has weight and bias, as in the benchmark's networks. RLNAS
            trains its supernet without. Stem, residual blocks and head always have them.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> import torch
        >>> from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SuperNet
        >>> supernet = NasBench201SuperNet(init_channels=4, cells_per_stage=1)
        >>> subnet = supernet.subnet(NasBench201Architecture(6 * ("skip_connect",)))
        >>> subnet(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, init_channels: int = 16, cells_per_stage: int = 5, num_classes: int = 10, affine: bool = True
    ) -> None:
        super().__init__(init_channels, cells_per_stage, num_classes, lambda channels: SuperCell(channels, affine))
        self.affine = affine

    search_space = NasBench201SearchSpace()

    @property
    def arguments(self) -> Mapping[str, int | bool]:
        """The constructor's arguments, enough to build a supernet of the same shape."""
        return {
            "init_channels": self.init_channels,
            "cells_per_stage": self.cells_per_stage,
            "num_classes": self.num_classes,
            "affine": self.affine,
        }

    @staticmethod
    def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The constructor's arguments, read off tensors by their names; ``None`` for those of another network.

        Raises:
            CheckpointError: The size cannot be told.
        """
        cells = {found[1] for name in state if (found := re.match(r"cells\.(\d+)\.edges\.", name))}
        if not cells:
            return None
        needed = ("stem.0.weight", "classifier.weight")
        missing = [name for name in needed if name not in state or state[name].dim() == 0]
        if missing:
            raise CheckpointError(f"A checkpoint lacks {', '.join(missing)}, so the size of its network is unknown.")
        if len(cells) % _STAGES:
            raise CheckpointError(f"A checkpoint has {len(cells)} cells, expected as many in each of three stages.")
        return {
            "init_channels": state["stem.0.weight"].shape[0],
            "cells_per_stage": len(cells) // _STAGES,
            "num_classes": state["classifier.weight"].shape[0],
            # An operation's batch normalisation is the third of its layers.
            "affine": any(re.match(r"cells\.0\.edges\..*\.op\.2\.weight", name) for name in state),
        }

    def forward(self, x: Tensor, architecture: NasBench201Architecture) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)`` along the path of ``architecture``."""
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, architecture) if isinstance(cell, SuperCell) else cell(x)
        return self.head(x)

    def path_modules(self, architecture: NasBench201Architecture) -> Iterator[nn.Module]:
        """The modules that a training step along the path of ``architecture`` runs; no two share a parameter."""
        for name, child in self.named_children():
            if name != "cells":
                yield child
        numbers = reaching_edges(architecture)
        for cell in self.cells:
            if isinstance(cell, SuperCell):
                layers = cell.layers(architecture)
                yield from (layers[number] for number in numbers)
            else:
                yield cell

    def vector_pieces(self, architecture: NasBench201Architecture) -> list[tuple[Tensor, int]] | None:
        """RLNAS's architecture vector for :func:`genas_plugins.scoring.angle`, and how often each occurs.

        ``None`` for a cell without a path from input to output.
        """
        if not architecture.connected:
            return None
        pieces: list[tuple[Tensor, int]] = []
        device = self.classifier.weight.device
        for module in (self.stem, self.lastact, self.classifier):
            pieces += [(parameter, 1) for parameter in module.parameters()]
        for cell in self.cells:
            if not isinstance(cell, SuperCell):
                pieces += [(parameter, 1) for parameter in cell.parameters()]
                continue
            layers = zip(architecture.operations, cell.layers(architecture), architecture.path_counts, strict=True)
            for name, layer, count in layers:
                if name == "avg_pool_3x3":
                    kernel = torch.full((cell.channels, 3, 3), 1 / 9, dtype=torch.float64, device=device)
                    pieces.append((kernel, count))
                pieces += [(parameter, count) for parameter in layer.parameters()]
        return pieces

    def subnet(self, architecture: NasBench201Architecture) -> NasBench201SubNet:
        """The path of ``architecture`` as a small module that shares this supernet's parameters.

        Its buffers (the statistics of batch normalisation) are its own copies: recalibrating the subnet does
        not touch the supernet. Its parameter names are those of :class:`NasBench201Network`.
        """
        return NasBench201SubNet(self, architecture)


class NasBench201SubNet(nn.Module):
    """One path of a supernet; see :meth:`NasBench201SuperNet.subnet`. Its parameters *are* the supernet's."""

    def __init__(self, supernet: NasBench201SuperNet, architecture: NasBench201Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.stem = share_parameters(supernet.stem)
        self.cells = nn.ModuleList(
            _Cell(share_parameters(layer) for layer in cell.layers(architecture))
            if isinstance(cell, SuperCell)
            else share_parameters(cell)
            for cell in supernet.cells
        )
        self.lastact = share_parameters(supernet.lastact)
        self.classifier = share_parameters(supernet.classifier)
        self.train(supernet.training)

    head = _Stack.head
    forward = NasBench201Network.forward
    inference = NasBench201Network.inference
