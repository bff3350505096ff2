"""Layers of networks that are rewritten for evaluation: convolutions with what follows them, and poolings.

A convolution takes in the batch normalisation behind it, what is added to its result, and a ReLU. In float32 on a CPU
oneDNN does all of that in one pass over memory; elsewhere it is an addition and a ReLU in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Branch", "Layer", "Parts", "Step", "as_parts", "fused_convolutions", "pooling"]

Parts = tuple[Tensor, ...]
"""An image in pieces: its channels are those of the first tensor, then those of the second, and so on."""

Step = Callable[[Tensor], Tensor]


def as_parts(x: Tensor | Parts) -> Parts:
    """An image in pieces, also if it is in one."""
    return (x,) if isinstance(x, Tensor) else x


@functools.cache
def fused_convolutions() -> bool:
    """Whether this PyTorch has oneDNN's convolutions with what follows them.

    They are not part of PyTorch's interface but what ``torch.compile`` makes of convolutions on a CPU. So they are
    tried once, on a small case: a release that changes them costs speed and nothing else.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    numbers = torch.linspace(-1, 1, 96, dtype=torch.float32, device="cpu")
    x = numbers[:64].view(2, 4, 4, 2).permute(0, 3, 1, 2)
    y = numbers[32:].view(2, 4, 4, 2).permute(0, 3, 1, 2)
    kernel, bias = numbers[::24].view(2, 2, 1, 1), numbers[:2]
    expected = (F.conv2d(x, kernel, bias) + y).relu()
    try:
        packed = _pack(kernel, x.shape, (0, 0), (1, 1), (1, 1), 1)
        found = _convolve(x, packed, bias, (0, 0), (1, 1), (1, 1), 1, y.clone(), rectify=True)
        alone = _convolve(x, kernel, bias, (0, 0), (1, 1), (1, 1), 1, None, rectify=False)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, expected) and torch.allclose((alone + y).relu(), expected)


def _pack(
    kernel: Tensor,
    shape: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The kernels in the order in which oneDNN reads them for images of this shape; others may come all the same."""
    return torch.ops.mkldnn._reorder_convolution_weight(kernel, padding, stride, dilation, groups, shape)


def _convolve(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    onto: Tensor | None,
    *,
    rectify: bool,
) -> Tensor:
    """oneDNN's convolution, added to ``onto`` in place, and a ReLU."""
    geometry = (padding, stride, dilation, groups)
    if onto is None:
        activation = "relu" if rectify else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *geometry, activation, [], "")
    activation = "relu" if rectify else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        onto, x, kernel, bias, *geometry, "add", 1.0, activation, [], ""
    )


@dataclass(eq=False)
class Layer:
    """A convolution and the batch normalisation behind it, or either alone.

    Attributes:
        convolution: Without bias; ``None`` for a normalisation that follows something else.
        norm: ``None`` for a convolution that is not normalised.
        channels: Those of the normalisation that belong here; the halves of a factorized reduction share one.
        stride: Stride of the convolution.
        fused: Use oneDNN's convolutions, see :func:`fused_convolutions`; then images may come in pieces.
        inplace: Overwrite what is normalised, if that is not the result of this layer's convolution anyway.
        rectify: A ReLU follows.
        weight: Kernels, or scales ``(1, C, 1, 1)``, as loaded.
        bias: ``(C)``, or shifts ``(1, C, 1, 1)``, as loaded.
        average: During calibration, by how much the statistics of a batch move those of the normalisation.
    """

    convolution: nn.Conv2d | None
    norm: nn.BatchNorm2d | None
    channels: slice
    stride: tuple[int, ...]
    fused: bool = False
    inplace: bool = True
    rectify: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    average: float | None = None
    _packed: list[Tensor] = field(default_factory=list)

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Use these kernels, or scales, and these shifts."""
        self.weight, self.bias = weight, bias
        self._packed = []

    def __call__(
        self, x: Tensor | Parts, onto: Tensor | None = None, *, rectify: bool = False, reuse: bool = False
    ) -> Tensor:
        """Convolve and normalise ``x``, add ``onto``, apply a ReLU.

        Args:
            x: Image.
            onto: ``None`` to add nothing.
            rectify: Whether there is a ReLU.
            reuse: ``onto`` may be overwritten.
        """
        parts = as_parts(x)
        rectify = rectify or self.rectify
        if self.average is not None:
            return finish(self._normalised(self._convolved(parts)), onto, rectify)
        if self.convolution is None:
            (image,) = parts
            out = torch.addcmul(self.bias, image, self.weight, out=image if self.inplace else None)
            return finish(out, onto, rectify)
        if not self.fused:
            return finish(self._portable(parts, self.weight, self.bias), onto, rectify)
        if not self._packed:
            self._packed = [
                _pack(kernel.contiguous(), part.shape, *self._geometry)
                for part, kernel in zip(parts, _split(self.weight, parts), strict=True)
            ]
        return self._sum(parts, self._packed, self.bias, onto if reuse or onto is None else onto.clone(), rectify)

    @property
    def _geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
        conv = self.convolution
        return conv.padding, self.stride, conv.dilation, conv.groups

    def _portable(self, parts: Parts, weight: Tensor, bias: Tensor | None) -> Tensor:
        (image,) = parts
        conv = self.convolution
        return F.conv2d(image, weight, bias, self.stride, conv.padding, conv.dilation, conv.groups)

    def _sum(
        self, parts: Parts, kernels: Sequence[Tensor], bias: Tensor | None, out: Tensor | None, rectify: bool
    ) -> Tensor:
        """The convolution of an image in pieces is the sum of the pieces' convolutions."""
        for number, (part, kernel) in enumerate(zip(parts, kernels, strict=True), start=1):
            last = number == len(parts)
            out = _convolve(part, kernel, bias, *self._geometry, out, rectify=rectify and last)
            bias = None
        return out

    def _convolved(self, parts: Parts) -> Tensor:
        """With the model's own kernels."""
        if self.convolution is None:
            (image,) = parts
            return image
        weight = self.convolution.weight.detach()
        if not self.fused:
            return self._portable(parts, weight, None)
        return self._sum(parts, _split(weight, parts), None, None, False)

    def _normalised(self, x: Tensor) -> Tensor:
        norm, part = self.norm, self.channels
        if norm is None:
            return x
        weight, bias = (norm.weight[part], norm.bias[part]) if norm.affine else (None, None)
        mean, variance = norm.running_mean[part], norm.running_var[part]
        # One value a channel has no variance: batch_norm says so.
        if x.device.type != "cpu" or x.dtype != mean.dtype or x.numel() == x.shape[1]:
            return F.batch_norm(x, mean, variance, weight, bias, True, self.average, norm.eps)
        # batch_norm as its two halves, the second in place: two thirds of the time on a CPU.
        centre, spread = torch.batch_norm_update_stats(x, mean, variance, self.average)
        scale = (spread + norm.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = torch.zeros_like(centre) if bias is None else bias
        shift = torch.addcmul(shift, centre, scale, value=-1)
        out = x if self.convolution is not None or self.inplace else None
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1), out=out)


def _split(kernels: Tensor, parts: Parts) -> Sequence[Tensor]:
    """Those that belong to each piece of an image."""
    return kernels.split([part.shape[1] for part in parts], dim=1) if len(parts) > 1 else (kernels,)


def finish(x: Tensor, onto: Tensor | None, rectify: bool) -> Tensor:
    """Add ``onto`` to ``x`` and apply a ReLU, both in place."""
    if onto is not None:
        x = x.add_(onto)
    return x.relu_() if rectify else x


@dataclass(eq=False)
class Branch:
    """Layers in a row. Where ``rectified`` they expect what is behind the ReLU that they began with."""

    rectified: bool
    steps: Sequence[Step]

    @property
    def adds(self) -> bool:
        """Its last layer is a convolution: what is to be added to the result is best given to it."""
        return bool(self.steps) and isinstance(self.steps[-1], Layer) and self.steps[-1].convolution is not None

    @property
    def fresh(self) -> bool:
        """What it returns is nobody else's, and may be overwritten."""
        return bool(self.steps)

    def __call__(
        self, x: Tensor | Parts, onto: Tensor | None = None, *, rectify: bool = False, reuse: bool = False
    ) -> Tensor:
        """Run the layers, add ``onto``, which is overwritten at most where ``reuse``, and apply a ReLU."""
        if not self.steps:
            if onto is None:
                return x.relu() if rectify else x
            return finish(onto.add_(x) if reuse else onto + x, None, rectify)
        *before, last = self.steps
        for step in before:
            x = step(x)
        if isinstance(last, Layer):
            return last(x, onto, rectify=rectify, reuse=reuse)
        return finish(last(x), onto, rectify)


def pooling(layer: nn.MaxPool2d | nn.AvgPool2d) -> Step:
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
    leading = (slice(None),) * dim
    centre, after, before = (
        x[(*leading, part)]
        for part in (slice(None, None, stride), slice(1, None, stride), slice(stride - 1, -1, stride))
    )
    out = torch.empty_like(centre)
    count = after.shape[dim]
    torch.maximum(centre.narrow(dim, 0, count), after, out=out.narrow(dim, 0, count))
    if count < centre.shape[dim]:
        out.narrow(dim, count, 1).copy_(centre.narrow(dim, count, 1))
    there = out.narrow(dim, 1, before.shape[dim])
    torch.maximum(there, before, out=there)
    return out
