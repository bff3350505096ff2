"""Cells of NAS-Bench-201 and their operations, under the names of the official code."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from genas_plugins.nasbench201.architecture import EDGES, NODES, OPERATIONS, NasBench201Architecture

__all__ = ["Cell", "ResidualBlock", "SuperCell", "build_operation", "reaching_edges"]

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


class ResidualBlock(nn.Module):
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


def build_operation(name: str, channels: int, affine: bool = True) -> nn.Module:
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


class Cell(nn.Module):
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
                f"{node}<-{source}": nn.ModuleList(build_operation(name, channels, affine) for name in OPERATIONS)
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

    def mixed(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Compute the output node with all operations on all edges, each times its weight.

        Args:
            x: ``(N, C, H, W)``.
            weights: For each edge, in the benchmark's order, five numbers; that of ``none`` is not read.
        """
        states = [x]
        for node in NODES:
            outputs = [
                row[number] * operation(states[source])
                for row, (source, end), choices in zip(weights, EDGES, self.edges.values(), strict=True)
                if end == node
                for number, operation in enumerate(choices)
                if not isinstance(operation, _Zero)
            ]
            states.append(functools.reduce(operator.add, outputs))
        return states[-1]
