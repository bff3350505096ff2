"""Networks of the NAS-Bench-201 space (Dong and Yang, ICLR 2020): one architecture, and the weight-sharing supernet.

A 3x3 stem, three stages of cells with a residual block of stride 2 between them, channels C, 2C and 4C. Parameter
names follow the official code (D-X-Y/AutoDL-Projects@94a149b; megvii-model/RLNAS@5a8d1b7 for the supernet).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from genas_plugins.checks import check_count
from genas_plugins.darts.network import MAX_CELLS, MAX_CHANNELS, MAX_CLASSES
from genas_plugins.darts.supernet import share_parameters
from genas_plugins.devices import full_in_float64
from genas_plugins.nasbench201.architecture import NasBench201Architecture
from genas_plugins.nasbench201.cells import Cell, ResidualBlock, SuperCell, build_operation, reaching_edges
from genas_plugins.nasbench201.costs import stage_channels
from genas_plugins.nasbench201.space import NasBench201SearchSpace

if TYPE_CHECKING:
    from genas_plugins.nasbench201.relaxed import NasBench201Relaxation
    from genas_plugins.scoring.inference import InferenceNetwork
    from genas_plugins.scoring.layers import Parts

__all__ = [
    "NasBench201Network",
    "NasBench201SubNet",
    "NasBench201SuperNet",
    "check_sizes",
]

_STAGES = 3


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
                self.cells.append(ResidualBlock(channels // 2))
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
            return Cell(build_operation(name, channels) for name in architecture.operations)

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
    def relaxation(self) -> NasBench201Relaxation:
        """This supernet as the mixture of all its paths, for differentiable searches."""
        from genas_plugins.nasbench201.relaxed import NasBench201Relaxation

        return NasBench201Relaxation(self)

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
            ValueError: The size cannot be told; the message completes the name of a file.
        """
        cells = {found[1] for name in state if (found := re.match(r"cells\.(\d+)\.edges\.", name))}
        if not cells:
            return None
        needed = ("stem.0.weight", "classifier.weight")
        missing = [name for name in needed if name not in state or state[name].dim() == 0]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}, so the size of its network is unknown.")
        if len(cells) % _STAGES:
            raise ValueError(f"has {len(cells)} cells, expected as many in each of three stages.")
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
                    kernel = full_in_float64((cell.channels, 3, 3), 1 / 9, device)
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
            Cell(share_parameters(layer) for layer in cell.layers(architecture))
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
