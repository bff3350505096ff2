"""Networks of this project as convolutions and little else: what a score needs of them, a thousand times over.

In evaluation mode batch normalisation is a convolution with other weights, an activation that several layers read is
computed once, and one that nobody else reads in place. Logits are those of the network up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.nasbench201 import NasBench201Network, NasBench201SubNet
from genas_plugins.network import Cell, CellNetwork
from genas_plugins.operations import FactorizedReduce, shift_image
from genas_plugins.spaces.nasbench201 import EDGES, NODES
from genas_plugins.supernet import SubNet

__all__ = ["InferenceNetwork"]

Step = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class _Weighted:
    """A convolution and the batch normalisation behind it, or either alone.

    Attributes:
        convolution: Without bias; ``None`` for a normalisation that follows something else.
        norm: ``None`` for a convolution that is not normalised.
        channels: Those of the normalisation that belong here; the halves of a factorized reduction share one.
        stride: Of the convolution.
        weight: Kernels, or scales ``(1, C, 1, 1)``, as loaded.
        bias: ``(C)``, or shifts ``(1, C, 1, 1)``, as loaded.
        average: During calibration, by how much the statistics of a batch move those of the normalisation.
    """

    convolution: nn.Conv2d | None
    norm: nn.BatchNorm2d | None
    channels: slice
    stride: tuple[int, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    average: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.average is not None:
            return self._normalised(self._convolved(x, None))
        if self.convolution is None:
            return torch.addcmul(self.bias, x, self.weight)
        return self._convolved(x, self.weight, self.bias)

    def _convolved(self, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        conv = self.convolution
        if conv is None:
            return x
        weight = conv.weight if weight is None else weight
        return F.conv2d(x, weight, bias, self.stride, conv.padding, conv.dilation, conv.groups)

    def _normalised(self, x: Tensor) -> Tensor:
        norm, part = self.norm, self.channels
        if norm is None:
            return x
        weight, bias = (norm.weight[part], norm.bias[part]) if norm.affine else (None, None)
        mean, variance = norm.running_mean[part], norm.running_var[part]
        return F.batch_norm(x, mean, variance, weight, bias, True, self.average, norm.eps)


@dataclass(eq=False)
class _Branch:
    """Layers in a row. Where ``rectified`` they expect what is behind the ReLU that they began with."""

    rectified: bool
    steps: Sequence[Step]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


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
        self._layers: list[_Weighted] = []
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
                layer.weight = current(layer.convolution.weight)
        gammas = [current(n.weight) if n.affine else torch.ones_like(n.running_var) for _, n in self._normed]
        betas = [current(n.bias) if n.affine else torch.zeros_like(n.running_var) for _, n in self._normed]
        scale, shift = (
            torch.cat([row[layer.channels] for row, (layer, _) in zip(rows, self._normed, strict=True)])
            for rows in (gammas, betas)
        )
        scale = scale * self._inverse
        shift = torch.addcmul(shift, self._mean, scale, value=-1)
        kernels, gains = [], []
        for (layer, _), gain, bias in zip(
            self._normed, scale.split(self._sizes), shift.split(self._sizes), strict=True
        ):
            if layer.convolution is None:
                layer.weight, layer.bias = gain.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
            else:
                layer.bias = bias
                kernels.append(layer.weight)
                gains.append(gain.view(-1, 1, 1, 1))
        folded = iter(torch._foreach_mul(kernels, gains))
        for layer, _ in self._normed:
            if layer.convolution is not None:
                layer.weight = next(folded)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        return F.linear(self._run(x).mean((2, 3)), *self._classifier)

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
            self._run(x)
        finally:
            for layer in self._layers:
                layer.average = None
        for norm in self.norms:
            norm.num_batches_tracked.add_(1)

    def _weighted(
        self, convolution: nn.Conv2d | None, norm: nn.Module | None, channels: slice = slice(None)
    ) -> _Weighted:
        if norm is not None and not (type(norm) is nn.BatchNorm2d and norm.track_running_stats):
            raise _UnknownLayersError(f"{type(norm).__name__} cannot be folded into a convolution.")
        if convolution is not None and convolution.bias is not None:
            raise _UnknownLayersError("A convolution with a bias is not one of these networks' layers.")
        stride = (1, 1) if convolution is None else convolution.stride
        layer = _Weighted(convolution, norm, channels, stride)
        self._layers.append(layer)
        return layer

    def _branch(self, module: nn.Module) -> _Branch:
        if isinstance(module, FactorizedReduce):
            return _Branch(True, [self._factorized_reduce(module)])
        layers = list(_flat(module))
        rectified = bool(layers) and type(layers[0]) is nn.ReLU
        steps: list[Step] = []
        for layer in layers[rectified:]:
            last = steps[-1] if steps else None
            if type(layer) is nn.Conv2d:
                steps.append(self._weighted(layer, None))
            elif isinstance(layer, nn.BatchNorm2d):
                if isinstance(last, _Weighted) and last.norm is None:
                    self._layers.remove(last)
                    steps[-1] = self._weighted(last.convolution, layer)
                else:
                    steps.append(self._weighted(None, layer))
            elif type(layer) is nn.ReLU and steps:
                # Nobody else has seen what the step before it returned.
                steps.append(torch.relu_)
            elif type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
                steps.append(_pooling(layer))
            else:
                raise _UnknownLayersError(f"{type(layer).__name__} cannot be rewritten for inference.")
        return _Branch(rectified, steps)

    def _factorized_reduce(self, module: FactorizedReduce) -> Step:
        if type(module.relu) is not nn.ReLU:
            raise _UnknownLayersError(f"{type(module.relu).__name__} cannot be rewritten for inference.")
        half, stride, distance = module.conv_1.out_channels, module.stride, module.shift
        first = self._weighted(module.conv_1, module.bn, slice(half))
        second = self._weighted(module.conv_2, module.bn, slice(half, None))
        # Its pixels are picked before the convolution, which would copy an image that is shifted and no more.
        second.stride = (1, 1)

        def reduce(x: Tensor) -> Tensor:
            picked = shift_image(x, distance, stride)[:, :, ::stride, ::stride]
            return torch.cat([first(x), second(picked)], dim=1)

        return reduce

    def _cell_stack(self, model: SubNet | CellNetwork) -> Step:
        cells: list[nn.Module] = list(model.cells)
        if model.stem_kind == "imagenet":
            stems = [self._branch(model.stem0), self._branch(model.stem1)]
        else:
            stems = [self._branch(model.stem)]
        run_cells = [self._cell(cell, last=cell is cells[-1]) for cell in cells]

        def run(x: Tensor) -> Tensor:
            # What cells hand over goes through a ReLU in each that takes it: it is done once, and before, where
            # tensors are small.
            s0 = s1 = stems[0](x).relu_()
            if len(stems) > 1:
                s1 = stems[1](s0).relu_()
            for cell in run_cells:
                s0, s1 = s1, cell(s0, s1)
            return s1

        return run

    def _cell(self, cell: nn.Module, last: bool) -> Callable[[Tensor, Tensor], Tensor]:
        if type(cell) is not Cell:
            raise _UnknownLayersError(f"{type(cell).__name__} cannot be rewritten for inference.")
        inputs = [self._branch(cell.preprocess0), self._branch(cell.preprocess1)]
        branches = [self._branch(operation) for operation in cell._ops]
        if not all(branch.rectified for branch in inputs):
            raise _UnknownLayersError("A preprocessing without ReLU is not one of these networks' layers.")
        sources = list(cell._sources)
        states = 2 + len(branches) // 2
        rectified = {source for source, branch in zip(sources, branches, strict=True) if branch.rectified}
        plain = {source for source, branch in zip(sources, branches, strict=True) if not branch.rectified}
        (plain if last else rectified).update(range(2, states))

        def run(s0: Tensor, s1: Tensor) -> Tensor:
            plains: list[Tensor] = []
            behind: list[Tensor] = []

            def add(state: Tensor) -> None:
                number = len(plains)
                plains.append(state)
                if number in rectified:
                    behind.append(state.relu() if number in plain else state.relu_())
                else:
                    behind.append(state)

            add(inputs[0](s0))
            add(inputs[1](s1))
            for node in range(2, states):
                first, second = (
                    branches[k]((behind if branches[k].rectified else plains)[sources[k]])
                    for k in (2 * node - 4, 2 * node - 3)
                )
                add(first + second)
            return torch.cat((plains if last else behind)[2:], dim=1)

        return run

    def _nasbench201(self, model: NasBench201SubNet | NasBench201Network) -> Step:
        operations = model.architecture.operations
        stem = self._branch(model.stem)
        steps: list[Step] = []
        for cell in model.cells:
            if hasattr(cell, "layers"):
                steps.append(self._nasbench201_cell(cell.layers, operations))
            else:
                steps.append(self._residual_block(cell))
        last = self._branch(model.lastact)
        return _Branch(False, [stem, *steps, last])

    def _nasbench201_cell(self, layers: nn.ModuleList, operations: tuple[str, ...]) -> Step:
        # What does not reach the output is not computed. What comes from a node without inputs is: normalisation
        # makes its bias of zeros.
        read = {NODES[-1]}
        edges: list[tuple[int, int, _Branch]] = []
        for (source, end), layer, name in reversed(list(zip(EDGES, layers, operations, strict=True))):
            if end in read and name != "none":
                read.add(source)
                edges.insert(0, (source, end, self._branch(layer)))

        def run(x: Tensor) -> Tensor:
            plain = [x]
            behind: dict[int, Tensor] = {}
            for node in NODES:
                total: Tensor | None = None
                for source, end, branch in edges:
                    if end != node:
                        continue
                    if branch.rectified and source not in behind:
                        behind[source] = plain[source].relu()
                    out = branch(behind[source] if branch.rectified else plain[source])
                    total = out if total is None else total + out
                plain.append(torch.zeros_like(x) if total is None else total)
            return plain[-1]

        return run

    def _residual_block(self, block: nn.Module) -> Step:
        first, second, shortcut = (self._branch(part) for part in (block.conv_a, block.conv_b, block.downsample))

        def run(x: Tensor) -> Tensor:
            return shortcut(x) + second(first(x.relu()).relu_())

        return run


def _pooling(layer: nn.MaxPool2d | nn.AvgPool2d) -> Step:
    """The pooling, by other means on a CPU if it is one of these spaces' 3x3 poolings.

    PyTorch's take several times as long there: the maximum keeps indices, and neither uses vector instructions well.
    """
    maximum = isinstance(layer, nn.MaxPool2d)
    stride = layer.stride
    shape = (layer.kernel_size, layer.padding, layer.ceil_mode)
    if maximum:
        known = (layer.dilation, layer.return_indices) == (1, False)
    else:
        known = (layer.count_include_pad, layer.divisor_override) == (False, None)
    if shape != (3, 1, False) or not known or not isinstance(stride, int):
        return layer

    def pool(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return layer(x)
        if maximum:
            return _running_maximum(_running_maximum(x, 2, stride), 3, stride)
        kernel = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        # Of nine pixels, those that are in the image.
        share = F.avg_pool2d(x.new_ones((1, 1, *x.shape[2:])), 3, stride, 1)
        return F.conv2d(x, kernel, None, stride, 1, 1, x.shape[1]).div_(share)

    return pool


def _running_maximum(x: Tensor, dim: int, stride: int) -> Tensor:
    """Maximum of each ``stride``-th entry along ``dim`` and its two neighbours, as far as there are any."""
    centre = (slice(None),) * dim
    out = x[(*centre, slice(None, None, stride))].clone()
    after = x[(*centre, slice(1, None, stride))]
    before = x[(*centre, slice(stride - 1, -1, stride))]
    for part, start in ((after, 0), (before, 1)):
        count = min(part.shape[dim], out.shape[dim] - start)
        there = out.narrow(dim, start, count)
        torch.maximum(there, part.narrow(dim, 0, count), out=there)
    return out


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
