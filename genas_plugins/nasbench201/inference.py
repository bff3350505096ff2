"""Networks of NAS-Bench-201, rewritten for :class:`genas_plugins.scoring.inference.InferenceNetwork`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genas_plugins.nasbench201.architecture import EDGES, NODES
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.scoring.layers import Branch, Parts, Step

if TYPE_CHECKING:
    from genas_plugins.nasbench201.networks import NasBench201Network, NasBench201SubNet

__all__ = ["stack"]


def stack(network: InferenceNetwork, model: NasBench201SubNet | NasBench201Network) -> Callable[[Tensor], Parts]:
    operations = model.architecture.operations
    stem = network.branch(model.stem)
    steps: list[Step] = []
    for cell in model.cells:
        if hasattr(cell, "layers"):
            steps.append(_cell(network, cell.layers, operations))
        else:
            steps.append(_residual_block(network, cell))
    whole = Branch(False, [stem, *steps, network.branch(model.lastact)])
    return lambda x: (whole(x),)


def _cell(network: InferenceNetwork, layers: nn.ModuleList, operations: tuple[str, ...]) -> Step:
    # What does not reach the output is not computed. What comes from a node without inputs is: normalisation
    # makes its bias of zeros.
    read = {NODES[-1]}
    edges: list[tuple[int, int, Branch]] = []
    for (source, end), layer, name in reversed(list(zip(EDGES, layers, operations, strict=True))):
        if end in read and name != "none":
            read.add(source)
            edges.insert(0, (source, end, network.branch(layer)))

    def run(x: Tensor) -> Tensor:
        plain = [x]
        behind: dict[int, Tensor] = {}
        for node in NODES:
            total: Tensor | None = None
            ours = False
            for source, end, branch in edges:
                if end != node:
                    continue
                if branch.rectified and source not in behind:
                    behind[source] = plain[source].relu()
                image = behind[source] if branch.rectified else plain[source]
                added = branch(image, total, reuse=ours)
                ours = branch.fresh or total is not None
                total = added
            plain.append(torch.zeros_like(x) if total is None else total)
        return plain[-1]

    return run


def _residual_block(network: InferenceNetwork, block: nn.Module) -> Step:
    first, second, shortcut = (network.branch(part) for part in (block.conv_a, block.conv_b, block.downsample))

    def run(x: Tensor) -> Tensor:
        return second(first(x.relu(), rectify=True), shortcut(x), reuse=shortcut.fresh)

    return run
