"""What NNI's supernets cannot do with some choices, and how a space's own settings reach its supernet.

Each class here takes the place of NNI's of the same kind; what it computes otherwise, its docstring says. (NNI 3.0 is
archived, and so is not mended at its source.)
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

# First of all, see space.py: else the hub's NDS spaces do not know this strategy for one of NNI's.
import nni.nas.strategy  # noqa: F401
import torch.nn.functional as F
from nni.mutable import MutableExpression, MutableSymbol
from nni.nas.oneshot.pytorch.strategy import MutationHook, RandomOneShot, is_supernet
from nni.nas.oneshot.pytorch.supermodule.operation import (
    MixedBatchNorm2d,
    MixedConv2d,
    MixedLayerNorm,
    MixedMultiHeadAttention,
    MixedOperation,
)
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingRepeat
from torch import Tensor, nn

from genas_plugins._messages import listed

__all__ = ["BatchNorm", "Convolution", "LayerNorm", "Repetition", "UniformPaths", "adopt"]


class Convolution(MixedConv2d):
    """With kernels that are longer in one direction or the other, and padding by values of the image."""

    def super_init_argument(self, name: str, mutable_expr: MutableExpression) -> Any:
        if name in ("kernel_size", "padding"):
            return _largest(mutable_expr)
        with warnings.catch_warnings():
            # Groups beside a choice of channels are a problem for differentiable strategies.
            warnings.simplefilter("ignore", RuntimeWarning)
            return super().super_init_argument(name, mutable_expr)

    def freeze_weight(self, *arguments: Any, **named: Any) -> dict[str, Tensor | None]:
        """The part of weight and bias that the path uses."""
        if not self.mutable_arguments:
            return {"weight": self.weight, "bias": self.bias}
        return super().freeze_weight(*arguments, **named)

    def forward_with_args(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        inputs: Tensor,
    ) -> Tensor:
        """The convolution of the path on images ``(N, in_channels, H, W)``."""
        if self.padding_mode != "zeros":
            around: list[int] = []
            for length, gap, width in zip(*map(self._to_tuple, (kernel_size, dilation, padding)), strict=True):
                both = {"same": gap * (length - 1), "valid": 0}[width] if isinstance(width, str) else 2 * width
                around = [both // 2, both - both // 2, *around]
            inputs, padding = F.pad(inputs, around, mode=self.padding_mode), 0
        part = self.freeze_weight(in_channels, out_channels, kernel_size, groups)
        return F.conv2d(inputs, part["weight"], part["bias"], stride, padding, dilation, groups)


class BatchNorm(MixedBatchNorm2d):
    """Without weights too, and with the attribute ``momentum`` as PyTorch's class reads it.

    So it takes part in a recalibration, and ``None`` is the average over all batches.
    """

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        drawn = super().resample(memo)
        if "momentum" in self.mutable_arguments:
            self.momentum = self.forward_argument("momentum")
        return drawn

    def freeze_weight(self, num_features: int, **arguments: Any) -> dict[str, Tensor | None]:
        """The first ``num_features`` of weight, bias and statistics."""
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: None if (whole := getattr(self, name)) is None else whole[:num_features] for name in names}

    def forward_with_args(self, num_features: int, eps: float, momentum: Any, inputs: Tensor) -> Tensor:
        """The normalisation of the path on features ``(N, num_features, H, W)``."""
        average = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if average is None:
                average = 1.0 / float(self.num_batches_tracked)
        part = self.freeze_weight(num_features)
        return F.batch_norm(
            inputs,
            part["running_mean"],
            part["running_var"],
            part["weight"],
            part["bias"],
            self.training or self.running_mean is None,
            average or 0.0,
            eps,
        )


class LayerNorm(MixedLayerNorm):
    """With choices of eps and of shapes of several dimensions."""

    def super_init_argument(self, name: str, mutable_expr: MutableExpression) -> Any:
        return _largest(mutable_expr)

    def _freeze_weight_impl(self, normalized_shape: Any, **arguments: Any) -> dict[str, Any]:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        first = tuple(slice(size) for size in shape)
        part = {name: None if (whole := getattr(self, name)) is None else whole[first] for name in ("weight", "bias")}
        return {**part, "normalized_shape": shape}


class Repetition(PathSamplingRepeat):
    """With a depth of 0."""

    def forward(self, x: Any) -> Any:
        """The output of the path's last block, or the input if it has none."""
        return x if self._sampled == 0 else super().forward(x)


_MENDED = {cls.__base__: cls for cls in (Convolution, BatchNorm, LayerNorm, Repetition)}


class UniformPaths(RandomOneShot):
    """NNI's strategy of uniform path sampling, with supernets of these operations."""

    def default_mutation_hooks(self) -> list[MutationHook]:
        """NNI's, after those that can do more than they."""
        return [*(cls.mutate for cls in _MENDED.values()), *super().default_mutation_hooks()]

    def run_hook(self, hook: MutationHook, name: str, module: nn.Module, memo: dict[str, Any]) -> Any:
        """Replace a module, if the hook is for it; what was set on it stays."""
        made = super().run_hook(hook, name, module, memo)
        if isinstance(made, MixedOperation):
            _inherit(made, module)
        return made

    def mutate_model(self, model: Any) -> Any:
        """Turn a model space into a supernet, in place; one that another one-shot strategy has made stays as it is.

        Raises:
            TypeError: NNI cannot turn this space into a supernet, or its forward needs more than images.
            ValueError: A choice is known to the space itself only; or NNI cannot compute an attention with it.
        """
        _check_forward(model)
        # NNI asks the outermost space alone what it needs.
        inner = [part for part in model.modules() if part is not model] if isinstance(model, nn.Module) else []
        needed = [part.extra_oneshot_hooks(self) for part in inner if hasattr(part, "extra_oneshot_hooks")]
        given = self.extra_mutation_hooks
        self.extra_mutation_hooks = [*given, *itertools.chain(*needed)]
        try:
            model = model if is_supernet(model) else super().mutate_model(model)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise TypeError(
                f"{type(model).__name__} cannot be turned into a weight-sharing supernet, so GeNAS cannot search it: "
                f"{error}"
            ) from error
        finally:
            self.extra_mutation_hooks = given
        _check_choices(model)
        return model


def adopt(supernet: nn.Module) -> None:
    """Let what another strategy has mutated compute as what these hooks make."""
    for module in supernet.modules():
        if type(module) in _MENDED:
            module.__class__ = _MENDED[type(module)]


def _inherit(mixed: MixedOperation, module: nn.Module) -> None:
    """Give an operation of a supernet what was set on the space's module: NNI builds it from its arguments alone.

    That is type, device and mode; whether parameters are trained; eps and momentum that were set later, as
    MobileNet-like spaces do; and the values of its tensors, where their shapes are not chosen.
    """
    given = dict(module.named_parameters())
    for first in given.values():
        mixed.to(first.device, first.dtype)
        break
    for name, parameter in mixed.named_parameters():
        parameter.requires_grad_(given[name].requires_grad if name in given else True)
    for name in ("eps", "momentum"):
        if hasattr(module, name) and name not in mixed.mutable_arguments:
            setattr(mixed, name, getattr(module, name))
            mixed.init_arguments[name] = getattr(module, name)
    state, own = module.state_dict(), mixed.state_dict()
    if not mixed.mutable_arguments and {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in own.items()
    }:
        mixed.load_state_dict(state)
    mixed.train(module.training)


def _check_forward(space: nn.Module) -> None:
    """Refuse a space that takes more than images.

    Raises:
        TypeError: Its forward needs another number of inputs than one.
    """
    if not isinstance(space, nn.Module):
        return
    try:
        inspect.signature(space.forward).bind(None)
    except TypeError as error:
        raise TypeError(
            f"{type(space).__name__}.forward takes {inspect.signature(space.forward)}, and candidates are measured on "
            f"images alone: {error}. Give other inputs a default, or search a space around this one that makes them."
        ) from error


def _check_choices(supernet: Any) -> None:
    """Refuse a supernet whose paths do not differ where samples do, or cannot run.

    Raises:
        ValueError: A choice is known to the space itself only; or NNI cannot compute an attention with it.
    """
    if hasattr(supernet, "subnet"):
        return
    for name, part in supernet.named_modules():
        if isinstance(part, MixedMultiHeadAttention) and {"kdim", "vdim"} & part.mutable_arguments.keys():
            raise ValueError(
                f"The attention {name} has a choice of kdim or vdim, with which NNI's supernet fails at embed_dim: "
                "choose embed_dim, or project keys and values by a MutableLinear before."
            )
    followed = {label for part in supernet.mutable_descendants() for label in part.simplify()}
    own = {label for label, choice in supernet.simplify().items() if isinstance(choice, MutableSymbol)}
    if left := sorted(own - followed):
        raise ValueError(
            f"{type(supernet).__name__} adds choices to itself (add_mutable) that no layer of its supernet follows, so "
            f"that all their values would be one network: {listed(left, 5)}. Give them to a layer of "
            "nni.nas.nn.pytorch: LayerChoice, InputChoice, Repeat, MutableConv2d and so on."
        )


def _largest(expression: MutableExpression) -> Any:
    """The largest value of a choice; of tuples, the largest in each place."""
    values = list(expression.grid())
    lengths = {len(value) for value in values if isinstance(value, tuple | list)}
    if not lengths:
        return max(values)
    if len(lengths) > 1:
        raise ValueError(f"a choice must be among sizes of as many dimensions each, got {values}")
    rows = [value if isinstance(value, tuple | list) else (value,) * max(lengths) for value in values]
    return tuple(max(column) for column in zip(*rows, strict=True))
