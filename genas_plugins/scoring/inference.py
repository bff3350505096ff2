"""Networks of this project as convolutions and little else: what a score needs of them, a thousand times over.

In evaluation mode batch normalisation is a convolution with other weights, and sums and activations belong to the
convolution before them; an activation that several layers read is computed once. Logits are those of the network up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.darts.network import Cell, CellNetwork
from genas_plugins.darts.operations import FactorizedReduce
from genas_plugins.darts.supernet import SubNet
from genas_plugins.nasbench201 import EDGES, NODES, NasBench201Network, NasBench201SubNet
from genas_plugins.scoring.layers import Branch, Layer, Parts, Step, as_parts, fused_convolutions, pooling

__all__ = ["InferenceNetwork"]


class _UnknownLayersError(TypeError):
    """A network is not one that can be rewritten."""


class InferenceNetwork:
    """A network rewritten for evaluation; its parameters can be replaced without rewriting it again.

    Args:
        model: A subnet of a supernet, of the DARTS space or of NAS-Bench-201, or a fixed network of these spaces. The
            statistics of its batch normalisation are used as they are now.

    Raises:
        TypeError: ``model`` is none of these, or has layers or hooks that cannot be rewritten.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise _UnknownLayersError("A network with hooks cannot be rewritten for inference.")
        self._own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._layers: list[Layer] = []
        parameter = next(model.parameters())
        if any(other.dtype != parameter.dtype for other in model.parameters()):
            raise _UnknownLayersError("A network of several types of numbers cannot be rewritten for inference.")
        self._dtype = parameter.dtype
        on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
        self._fused = on_cpu and torch.backends.mkldnn.enabled and fused_convolutions()
        # Not isinstance: a subclass may run its layers otherwise.
        if type(model) in (SubNet, CellNetwork):
            self._run = self._cell_stack(model)
        elif type(model) in (NasBench201SubNet, NasBench201Network):
            self._run = self._nasbench201(model)
        else:
            raise _UnknownLayersError(f"{type(model).__name__} cannot be rewritten for inference.")
        self._head = (model.classifier.weight, model.classifier.bias)
        self._classifier: list[Tensor] = []
        self._normed = [(layer, layer.norm) for layer in self._layers if layer.norm is not None]
        means = [norm.running_mean[layer.channels] for layer, norm in self._normed]
        variances = [norm.running_var[layer.channels] + norm.eps for layer, norm in self._normed]
        self._sizes = [len(mean) for mean in means]
        # One row for the channels of all layers: on a GPU a launch for each layer would cost more than the arithmetic.
        self._mean, self._inverse = torch.cat(means), torch.cat(variances).rsqrt()
        self.load({})

    @classmethod
    def of(cls, model: nn.Module) -> InferenceNetwork | None:
        """The network rewritten, or ``None`` where it is not one that can be."""
        try:
            return cls(model)
        except _UnknownLayersError:
            return None

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Use these parameters, by the model's names; those that are missing are the model's own."""
        tensors = {**self._own, **parameters}

        def current(parameter: Tensor) -> Tensor:
            return tensors[self._names[id(parameter)]]

        self._classifier = [current(parameter) for parameter in self._head]
        for layer in self._layers:
            if layer.convolution is not None:
                layer.load(current(layer.convolution.weight), None)
        gammas = [current(n.weight) if n.affine else torch.ones_like(n.running_var) for _, n in self._normed]
        betas = [current(n.bias) if n.affine else torch.zeros_like(n.running_var) for _, n in self._normed]
        scale, shift = (
            torch.cat([row[layer.channels] for row, (layer, _) in zip(rows, self._normed, strict=True)])
            for rows in (gammas, betas)
        )
        scale = scale * self._inverse
        shift = torch.addcmul(shift, self._mean, scale, value=-1)
        kernels, gains, shifts = [], [], []
        for (layer, _), gain, bias in zip(
            self._normed, scale.split(self._sizes), shift.split(self._sizes), strict=True
        ):
            if layer.convolution is None:
                layer.load(gain.view(1, -1, 1, 1), bias.view(1, -1, 1, 1))
            else:
                kernels.append(layer.weight)
                gains.append(gain.view(-1, 1, 1, 1))
                shifts.append(bias)
        normed = (layer for layer, _ in self._normed if layer.convolution is not None)
        for layer, folded, bias in zip(normed, torch._foreach_mul(kernels, gains), shifts, strict=True):
            layer.load(folded, bias)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        features = torch.cat([part.mean((2, 3)) for part in self._features(x)], dim=1)
        return F.linear(features, *self._classifier)

    def _features(self, x: Tensor) -> Parts:
        x = x.to(self._dtype) if x.is_floating_point() else x
        return self._run(x.contiguous(memory_format=torch.channels_last) if self._fused else x)

    @property
    def norms(self) -> set[nn.BatchNorm2d]:
        """The modules whose statistics :meth:`calibrate` replaces: not those that do not reach the output."""
        return {norm for _, norm in self._normed}

    @torch.no_grad()
    def calibrate(self, x: Tensor, average: float) -> None:
        """Move the running statistics of the model's batch normalisation, as a pass in training mode does.

        The model's own parameters are used. What was loaded keeps the statistics that it was loaded with.

        Args:
            x: Images ``(N, 3, H, W)``.
            average: How much of the new statistics are these images'.
        """
        try:
            for layer in self._layers:
                layer.average = average
            self._features(x)
        finally:
            for layer in self._layers:
                layer.average = None
        # One launch on a GPU, not one a layer.
        torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)

    def _layer(
        self,
        convolution: nn.Conv2d | None,
        norm: nn.Module | None,
        channels: slice = slice(None),
        inplace: bool = True,
    ) -> Layer:
        if norm is not None and not (type(norm) is nn.BatchNorm2d and norm.track_running_stats):
            raise _UnknownLayersError(f"{type(norm).__name__} cannot be folded into a convolution.")
        if convolution is not None and convolution.bias is not None:
            raise _UnknownLayersError("A convolution with a bias is not one of these networks' layers.")
        stride = (1, 1) if convolution is None else convolution.stride
        layer = Layer(convolution, norm, channels, stride, self._fused, inplace)
        self._layers.append(layer)
        return layer

    def _branch(self, module: nn.Module) -> Branch:
        if isinstance(module, FactorizedReduce):
            return Branch(True, [self._factorized_reduce(module)])
        layers = list(_flat(module))
        rectified = bool(layers) and type(layers[0]) is nn.ReLU
        steps: list[Step] = []
        for layer in layers[rectified:]:
            last = steps[-1] if steps else None
            if type(layer) is nn.Conv2d:
                steps.append(self._layer(layer, None))
            elif isinstance(layer, nn.BatchNorm2d):
                if isinstance(last, Layer) and last.norm is None and not last.rectify:
                    self._layers.remove(last)
                    steps[-1] = self._layer(last.convolution, layer)
                else:
                    # Nobody else has seen what a step before it returned.
                    steps.append(self._layer(None, layer, inplace=bool(steps)))
            elif type(layer) is nn.ReLU and isinstance(last, Layer):
                last.rectify = True
            elif type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
                steps.append(pooling(layer))
            else:
                raise _UnknownLayersError(f"{type(layer).__name__} cannot be rewritten for inference.")
        return Branch(rectified, steps)

    def _factorized_reduce(self, module: FactorizedReduce) -> Step:
        if type(module.relu) is not nn.ReLU:
            raise _UnknownLayersError(f"{type(module.relu).__name__} cannot be rewritten for inference.")
        half, stride, distance = module.conv_1.out_channels, module.stride, module.shift
        first = self._layer(module.conv_1, module.bn, slice(half))
        second = self._layer(module.conv_2, module.bn, slice(half, None))
        # Its pixels are picked before the convolution, which would copy an image that is shifted and no more.
        second.stride = (1, 1)

        def reduce(x: Tensor | Parts) -> Tensor:
            parts = as_parts(x)
            picked = tuple(_shifted_pixels(part, distance, stride) for part in parts)
            return torch.cat([first(parts), second(picked)], dim=1)

        return reduce

    def _cell_stack(self, model: SubNet | CellNetwork) -> Callable[[Tensor], Parts]:
        cells: list[nn.Module] = list(model.cells)
        if model.stem_kind == "imagenet":
            stems = [self._branch(model.stem0), self._branch(model.stem1)]
        else:
            stems = [self._branch(model.stem)]
        run_cells = [self._cell(cell, last=cell is cells[-1]) for cell in cells]

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

    def _cell(self, cell: nn.Module, last: bool) -> Callable[[Parts, Parts], Parts]:
        if type(cell) is not Cell:
            raise _UnknownLayersError(f"{type(cell).__name__} cannot be rewritten for inference.")
        inputs = [self._branch(cell.preprocess0), self._branch(cell.preprocess1)]
        if not all(branch.rectified for branch in inputs):
            raise _UnknownLayersError("A preprocessing without ReLU is not one of these networks' layers.")
        edges = [(self._branch(op), source) for op, source in zip(cell._ops, cell._sources, strict=True)]
        # The second of a pair adds the first to its result.
        pairs = [sorted(edges[k : k + 2], key=lambda edge: edge[0].adds) for k in range(0, len(edges), 2)]
        rectified = {source for branch, source in edges if branch.rectified}
        plain = {source for branch, source in edges if not branch.rectified}
        (plain if last else rectified).update(range(2, 2 + len(pairs)))
        # Nobody but the means at the end, or convolutions that can sum over pieces, reads what a cell returns.
        pieces = last or self._fused

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
                    (first, a), (second, b) = pairs[number - 2]
                    out = first(read(first, a))
                    state = second(read(second, b), out, rectify=rectify, reuse=first.fresh)
                plains.append(state)
                behind.append(state.relu() if number in plain and number in rectified else state)
            states = tuple((plains if last else behind)[2:])
            return states if pieces else (torch.cat(states, dim=1),)

        return run

    def _nasbench201(self, model: NasBench201SubNet | NasBench201Network) -> Callable[[Tensor], Parts]:
        operations = model.architecture.operations
        stem = self._branch(model.stem)
        steps: list[Step] = []
        for cell in model.cells:
            if hasattr(cell, "layers"):
                steps.append(self._nasbench201_cell(cell.layers, operations))
            else:
                steps.append(self._residual_block(cell))
        whole = Branch(False, [stem, *steps, self._branch(model.lastact)])
        return lambda x: (whole(x),)

    def _nasbench201_cell(self, layers: nn.ModuleList, operations: tuple[str, ...]) -> Step:
        # What does not reach the output is not computed. What comes from a node without inputs is: normalisation
        # makes its bias of zeros.
        read = {NODES[-1]}
        edges: list[tuple[int, int, Branch]] = []
        for (source, end), layer, name in reversed(list(zip(EDGES, layers, operations, strict=True))):
            if end in read and name != "none":
                read.add(source)
                edges.insert(0, (source, end, self._branch(layer)))

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

    def _residual_block(self, block: nn.Module) -> Step:
        first, second, shortcut = (self._branch(part) for part in (block.conv_a, block.conv_b, block.downsample))

        def run(x: Tensor) -> Tensor:
            return second(first(x.relu(), rectify=True), shortcut(x), reuse=shortcut.fresh)

        return run


def _shifted_pixels(x: Tensor, distance: int, stride: int) -> Tensor:
    """Each ``stride``-th pixel of ``x`` behind the first ``distance``, with zeros where there are none left."""
    height, width = (-(-size // stride) for size in x.shape[2:])
    x = x[:, :, distance::stride, distance::stride]
    missing = height - x.shape[2], width - x.shape[3]
    return F.pad(x, [0, missing[1], 0, missing[0]]) if any(missing) else x


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that run one after another, without the modules around them."""
    if isinstance(module, nn.Identity):
        return
    inner = module if isinstance(module, nn.Sequential) else getattr(module, "op", None)
    if inner is None:
        yield module
    else:
        for child in inner:
            yield from _flat(child)
