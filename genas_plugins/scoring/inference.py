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

from genas_plugins.scoring.layers import Branch, Layer, Parts, Step, fused_convolutions, pooling

__all__ = ["InferenceNetwork", "UnknownLayersError"]


class UnknownLayersError(TypeError):
    """A network is not one that can be rewritten."""


class InferenceNetwork:
    """A network rewritten for evaluation; its parameters can be replaced without rewriting it again.

    Args:
        model: A network whose class has a method ``inference(network)``, which rewrites its layers by :meth:`branch`
            and returns a function of images that gives the features, in pieces of channels; the logits are those of
            their means and of the linear layer ``classifier``. So have the subnets and fixed networks of this package.
            The statistics of its batch normalisation are used as they are now.

    Raises:
        TypeError: ``model`` is no such network, or has layers or hooks that cannot be rewritten.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise UnknownLayersError("A network with hooks cannot be rewritten for inference.")
        self._own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._layers: list[Layer] = []
        parameter = next(model.parameters())
        if any(other.dtype != parameter.dtype for other in model.parameters()):
            raise UnknownLayersError("A network of several types of numbers cannot be rewritten for inference.")
        self._dtype = parameter.dtype
        on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
        self.fused = on_cpu and torch.backends.mkldnn.enabled and fused_convolutions()
        # Not inherited: a subclass may run its layers otherwise.
        if "inference" not in vars(type(model)):
            raise UnknownLayersError(f"{type(model).__name__} cannot be rewritten for inference.")
        self._run: Callable[[Tensor], Parts] = model.inference(self)
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
        except UnknownLayersError:
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
        return self._run(x.contiguous(memory_format=torch.channels_last) if self.fused else x)

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

    def layer(
        self,
        convolution: nn.Conv2d | None,
        norm: nn.Module | None,
        channels: slice = slice(None),
        inplace: bool = True,
    ) -> Layer:
        """A convolution with the batch normalisation behind it, or one of them.

        Args:
            convolution: Without bias.
            norm: Batch normalisation with running statistics.
            channels: Those of the normalisation that are the convolution's.
            inplace: A normalisation alone may overwrite what it is given.

        Raises:
            TypeError: They are of another kind.
        """
        if norm is not None and not (type(norm) is nn.BatchNorm2d and norm.track_running_stats):
            raise UnknownLayersError(f"{type(norm).__name__} cannot be folded into a convolution.")
        if convolution is not None and convolution.bias is not None:
            raise UnknownLayersError("A convolution with a bias is not one of these networks' layers.")
        stride = (1, 1) if convolution is None else convolution.stride
        layer = Layer(convolution, norm, channels, stride, self.fused, inplace)
        self._layers.append(layer)
        return layer

    def branch(self, module: nn.Module) -> Branch:
        """Layers that run one after another, as convolutions that normalise, add and rectify.

        A module with layers of its own gives the branch by a method ``inference(network)``.

        Raises:
            TypeError: There is a layer that cannot be rewritten.
        """
        if "inference" in vars(type(module)):
            return module.inference(self)
        layers = list(_flat(module))
        rectified = bool(layers) and type(layers[0]) is nn.ReLU
        steps: list[Step] = []
        for layer in layers[rectified:]:
            last = steps[-1] if steps else None
            if type(layer) is nn.Conv2d:
                steps.append(self.layer(layer, None))
            elif isinstance(layer, nn.BatchNorm2d):
                if isinstance(last, Layer) and last.norm is None and not last.rectify:
                    self._layers.remove(last)
                    steps[-1] = self.layer(last.convolution, layer)
                else:
                    # Nobody else has seen what a step before it returned.
                    steps.append(self.layer(None, layer, inplace=bool(steps)))
            elif type(layer) is nn.ReLU and isinstance(last, Layer):
                last.rectify = True
            elif type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
                steps.append(pooling(layer))
            else:
                raise UnknownLayersError(f"{type(layer).__name__} cannot be rewritten for inference.")
        return Branch(rectified, steps)


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
