"""Networks of cells of the DARTS space, rewritten for :class:`genas_plugins.scoring.inference.InferenceNetwork`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.darts.network import Cell, CellNetwork
from genas_plugins.scoring.inference import InferenceNetwork, UnknownLayersError
from genas_plugins.scoring.layers import Branch, Parts, as_parts

if TYPE_CHECKING:
    from genas_plugins.darts.operations import FactorizedReduce
    from genas_plugins.darts.supernet import SubNet

__all__ = ["cell_stack", "factorized_reduce"]


def cell_stack(network: InferenceNetwork, model: SubNet | CellNetwork) -> Callable[[Tensor], Parts]:
    cells: list[nn.Module] = list(model.cells)
    if model.stem_kind == "imagenet":
        stems = [network.branch(model.stem0), network.branch(model.stem1)]
    else:
        stems = [network.branch(model.stem)]
    run_cells = [_cell(network, cell, last=cell is cells[-1]) for cell in cells]

    def run(x: Tensor) -> Parts:
        # What cells hand over goes through a ReLU in each that takes it: it is done once, and before, where
        # tensors are small.
        s0 = s1 = as_parts(stems[0](x, rectify=True))
        if len(stems) > 1:
            s1 = as_parts(stems[1](s0, rectify=True))
        for cell in run_cells:
            s0, s1 = s1, cell(s0, s1)
        return s1

    return run


def factorized_reduce(network: InferenceNetwork, module: FactorizedReduce) -> Branch:
    if type(module.relu) is not nn.ReLU:
        raise UnknownLayersError(f"{type(module.relu).__name__} cannot be rewritten for inference.")
    half, stride, distance = module.conv_1.out_channels, module.stride, module.shift
    first = network.layer(module.conv_1, module.bn, slice(half))
    second = network.layer(module.conv_2, module.bn, slice(half, None))
    # Its pixels are picked before the convolution, which would copy an image that is shifted and no more.
    second.stride = (1, 1)

    def reduce(x: Tensor | Parts) -> Tensor:
        parts = as_parts(x)
        picked = tuple(_shifted_pixels(part, distance, stride) for part in parts)
        return torch.cat([first(parts), second(picked)], dim=1)

    return Branch(True, [reduce])


def _cell(network: InferenceNetwork, cell: nn.Module, last: bool) -> Callable[[Parts, Parts], Parts]:
    if type(cell) is not Cell:
        raise UnknownLayersError(f"{type(cell).__name__} cannot be rewritten for inference.")
    inputs = [network.branch(cell.preprocess0), network.branch(cell.preprocess1)]
    if not all(branch.rectified for branch in inputs):
        raise UnknownLayersError("A preprocessing without ReLU is not one of these networks' layers.")
    slots = [(network.branch(op), source) for op, source in zip(cell._ops, cell._sources, strict=True)]
    pairs = [[edge for edge in slots[k : k + 2] if edge[1] >= 0] for k in range(0, len(slots), 2)]
    edges = [edge for pair in pairs for edge in pair]
    for pair in pairs:  # The last adds the other, where there is one, to its result.
        pair.sort(key=lambda edge: edge[0].adds)
    rectified = {source for branch, source in edges if branch.rectified}
    plain = {source for branch, source in edges if not branch.rectified}
    (plain if last else rectified).update(range(2, 2 + len(pairs)))
    # Nobody but the means at the end, or convolutions that can sum over pieces, reads what a cell returns.
    pieces = last or network.fused

    def run(s0: Parts, s1: Parts) -> Parts:
        plains: list[Tensor] = []
        behind: list[Tensor] = []

        def read(branch: Branch, source: int) -> Tensor:
            return (behind if branch.rectified else plains)[source]

        for number in range(2 + len(pairs)):
            rectify = number not in plain
            if number < 2:
                state = inputs[number]((s0, s1)[number], rectify=rectify)
            else:
                *others, (branch, source) = pairs[number - 2]
                out, fresh = None, False
                for other, a in others:
                    out, fresh = other(read(other, a)), other.fresh
                state = branch(read(branch, source), out, rectify=rectify, reuse=fresh)
            plains.append(state)
            behind.append(state.relu() if number in plain and number in rectified else state)
        states = tuple((plains if last else behind)[2:])
        return states if pieces else (torch.cat(states, dim=1),)

    return run


def _shifted_pixels(x: Tensor, distance: int, stride: int) -> Tensor:
    """Each ``stride``-th pixel of ``x`` behind the first ``distance``, with zeros where there are none left."""
    height, width = (-(-size // stride) for size in x.shape[2:])
    x = x[:, :, distance::stride, distance::stride]
    missing = height - x.shape[2], width - x.shape[3]
    return F.pad(x, [0, missing[1], 0, missing[0]]) if any(missing) else x
