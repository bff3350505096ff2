"""The networks of :mod:`timm_models` as Detectron2 backbones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn

from genas_plugins.darts.zoo import ZOO
from timm_models import GenasNet

__all__ = ["GeNASBackbone"]

_FEATURES = ("stem", "res3", "res4", "res5")
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN")


class GeNASBackbone(Backbone):
    """A GeNAS network without its head, as a backbone of Detectron2.

    Features are ``stem``, ``res3``, ``res4`` and ``res5``, of strides 4, 8, 16 and 32. They are outputs of
    convolutions and poolings, not activated.

    Args:
        arch: A name of the zoo, the JSON file of a search, or 28 integers.
        init_channels: Channels of the first cells. None: those of the zoo, or for other genotypes the most within 600 M
            multiply-adds.
        in_channels: Channels of the images.
        out_features: Features to return; what lies behind the last of them is left out.
        norm: ``BN``, ``SyncBN``, ``FrozenBN``, ``GN``, or a function of the number of channels. ``FrozenBN`` cannot
            train from random weights. ``GN`` has the largest number of groups up to 32 that divides the channels;
            Detectron2's own 32 do not.
        freeze_at: How many stages are frozen, as in :meth:`freeze`.
        drop_path_rate: Probability to drop an operation for an image in training.
        checkpointing: Recompute activations in the backward pass: less memory, more time. Statistics of ``BN``
            then move twice in a step.

    Raises:
        ValueError: ``arch``, ``out_features``, ``norm``, ``freeze_at`` or another value is invalid.
        TypeError: ``arch`` has another type.

    Example:
        >>> from detectron2_backbones import GeNASBackbone
        >>> backbone = GeNASBackbone("genas_flatness_c100", init_channels=4)
        >>> {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()}
        {'res3': (16, 8), 'res4': (32, 16), 'res5': (64, 32)}
    """

    def __init__(
        self,
        arch: str | Sequence[int],
        init_channels: int | None = None,
        in_channels: int = 3,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str | Callable[[int], nn.Module] = "BN",
        freeze_at: int = 0,
        drop_path_rate: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(out_features, str) or not out_features or not set(out_features) <= set(_FEATURES):
            raise ValueError(f"out_features must be some of {', '.join(_FEATURES)}, got {out_features!r}.")
        # LazyConfig passes lists of its own type.
        arch = tuple(arch) if isinstance(arch, Iterable) and not isinstance(arch, str) else arch
        if init_channels is None and arch in ZOO:
            init_channels = ZOO[arch].init_channels
        self.network = GenasNet(
            arch,
            init_channels,
            num_classes=0,
            in_chans=in_channels,
            global_pool="",
            drop_path_rate=drop_path_rate,
            norm_layer=_norm_layer(norm),
        )
        self._out_features = [name for name in _FEATURES if name in out_features]
        self._out_feature_channels = {}
        self._out_feature_strides = {}
        for name, info in zip(_FEATURES, self.network.feature_info, strict=True):
            self._out_feature_channels[name] = info["num_chs"]
            self._out_feature_strides[name] = info["reduction"]
        indices = self.network.prune_intermediate_layers([_FEATURES.index(name) for name in self._out_features])
        self._taps = [self.network._taps[index] for index in indices]
        self.network.set_grad_checkpointing(checkpointing)
        self._frozen = 0
        self._has_weights = not any(isinstance(module, FrozenBatchNorm2d) for module in self.modules())
        self.freeze(freeze_at)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features ``(N, C_i, H / s_i, W / s_i)``, rounded up, of images ``(N, in_channels, H, W)``, by name.

        Raises:
            ValueError: In training, see :meth:`check_weights`.
        """
        if not torch.jit.is_scripting() and self.training:
            self.check_weights()
        # Not forward_intermediates, which does the same: TorchScript cannot compile it.
        features = self.network._run(x, self._taps, self._taps[-1])[1]
        named: dict[str, Tensor] = {}
        for name, feature in zip(self._out_features, features):  # noqa: B905  (TorchScript has no strict)
            named[name] = feature
        return named

    @torch.jit.ignore
    def check_weights(self) -> None:
        """Raise if frozen batch normalisation would be trained without loaded weights.

        Raises:
            ValueError: A ``FrozenBN`` layer still has the values it was made with.
        """
        if self._has_weights:
            return
        layers = [module for module in self.modules() if isinstance(module, FrozenBatchNorm2d)]
        if fresh := sum(_is_fresh(layer) for layer in layers):
            raise ValueError(
                f"{fresh} of {len(layers)} FrozenBN layers have no weights, so the backbone cannot be trained: load "
                "ImageNet weights (MODEL.WEIGHTS, or train.init_checkpoint of a LazyConfig), or choose another norm "
                "(MODEL.GENAS.NORM BN)."
            )
        self._has_weights = True

    @torch.jit.ignore
    def freeze(self, freeze_at: int = 0) -> GeNASBackbone:
        """Freeze the first stages for good: no gradients, statistics and drop path as in evaluation.

        Args:
            freeze_at: Number of stages, as Detectron2 counts them: 0 nothing, 1 the stem, 2 also the cells up to
                ``res3``, 3 up to ``res4``, 4 all.

        Returns:
            The backbone.

        Raises:
            ValueError: ``freeze_at`` is none of these.
        """
        if freeze_at not in range(len(_FEATURES) + 1):
            raise ValueError(f"freeze_at must be from 0 (nothing) to {len(_FEATURES)} (all), got {freeze_at!r}.")
        self._frozen = max(self._frozen, int(freeze_at))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        return self.train(self.training)

    @torch.jit.ignore
    def train(self, mode: bool = True) -> GeNASBackbone:
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [module for stage in self.network.stages()[: self._frozen] for module in stage]


def _norm_layer(norm: str | Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    if not callable(norm) and norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, or a function of the channels, got {norm!r}.")
    found = _group_norm if norm == "GN" else norm
    # Not a closure, which could not be pickled.
    return functools.partial(_normalisation, norm=found)


def _normalisation(channels: int, *, norm: str | Callable[[int], nn.Module], **placement: Any) -> nn.Module:
    return get_norm(norm, channels)


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = max(number for number in range(1, 33) if channels % number == 0)
    return nn.GroupNorm(groups, channels)


def _is_fresh(layer: FrozenBatchNorm2d) -> bool:
    # The variances are 1 - eps in a new layer, and 1 in the weights of a network that was never trained.
    values = ((layer.weight, 1.0), (layer.bias, 0.0), (layer.running_mean, 0.0), (layer.running_var, 1.0))
    return all(bool((tensor - value).abs().max() <= 2 * layer.eps) for tensor, value in values)
