"""A GeNAS network as MMSegmentation backbone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from genas_plugins.darts.zoo import ZOO
from mmseg_backbones.weights import is_pretrained, read_pretrained
from timm_models import GenasNet

__all__ = ["GeNASBackbone"]


@MODELS.register_module()
class GeNASBackbone(BaseModule):
    """A GeNAS network without its head, as a backbone of MMSegmentation.

    Stages: the stem (0), and the cells up to each reduction (1, 2, 3). Features: 0 is the stem's at stride 4, 1 to
    3 are the stages', at strides 8, 16 and 32 where ``output_stride`` does not keep them lower.

    Args:
        arch: A name of the zoo, the JSON file of a search, or 28 integers.
        init_channels: Channels of the first cells. None: those of the zoo, or for other genotypes the most within 600 M
            multiply-adds.
        in_channels: Channels of the images.
        out_indices: Features to return, ascending.
        output_stride: 8, 16 or 32; see :class:`timm_models.GenasNet`.
        norm_cfg: Normalisation as MMSegmentation writes it, for instance ``dict(type="SyncBN", requires_grad=True)``.
        norm_eval: Keep the statistics of batch normalisation in training.
        frozen_stages: Stages up to this one are not trained; -1: all are.
        drop_path_rate: Probability to drop an operation for an image in training.
        with_cp: Recompute activations: less memory, more time.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` for an official ImageNet checkpoint, a file of
            ``genas convert`` or a checkpoint of timm's training, also by an address; with ``prefix="backbone."`` for
            the backbone of a whole segmentor. Or any other of mmengine's.

    Raises:
        ValueError: ``arch`` is unknown, or ``output_stride``, ``out_indices`` or ``frozen_stages`` is invalid.

    Example:
        >>> import torch
        >>> from mmseg_backbones import GeNASBackbone
        >>> backbone = GeNASBackbone("genas_flatness_c100", init_channels=4, output_stride=16).eval()
        >>> [tuple(feature.shape[1:]) for feature in backbone(torch.zeros(1, 3, 64, 64))]
        [(4, 16, 16), (16, 8, 8), (32, 4, 4), (64, 4, 4)]
    """

    def __init__(
        self,
        arch: str | Sequence[int],
        init_channels: int | None = None,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        output_stride: int = 8,
        norm_cfg: dict[str, Any] | None = None,
        norm_eval: bool = False,
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not -1 <= frozen_stages <= 3:
            raise ValueError(f"frozen_stages must be from -1 (none) to 3 (all), got {frozen_stages}.")
        norm_cfg = {"type": "BN", "requires_grad": True} if norm_cfg is None else norm_cfg
        if init_channels is None and isinstance(arch, str) and arch in ZOO:
            init_channels = ZOO[arch].init_channels
        self.network = GenasNet(
            arch,
            init_channels,
            num_classes=0,
            in_chans=in_channels,
            global_pool="",
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
            # Not a closure, which could not be pickled.
            norm_layer=functools.partial(_normalisation, norm_cfg=norm_cfg),
        )
        self.out_indices = self.network.prune_intermediate_layers(list(out_indices))
        self.network.set_grad_checkpointing(with_cp)
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self._freeze()

    @property
    def out_channels(self) -> list[int]:
        """Channels of the features that are returned."""
        return [self.network.feature_info[index]["num_chs"] for index in self.out_indices]

    @property
    def out_strides(self) -> list[int]:
        """Strides of the features that are returned."""
        return [self.network.feature_info[index]["reduction"] for index in self.out_indices]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features ``(N, C_i, H / s_i, W / s_i)``, rounded up, of images ``(N, in_channels, H, W)``.

        Raises:
            ValueError: The images are smaller than 32 pixels.
        """
        if min(x.shape[2:]) < 32:
            raise ValueError(
                f"Images must have at least 32 pixels on each side, got {tuple(x.shape[2:])}: choose a larger crop."
            )
        return tuple(self.network.forward_intermediates(x, self.out_indices, intermediates_only=True))

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; ``Pretrained`` weights must fit, or an error names those that do not.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: The checkpoint cannot be read.
            RuntimeError: The checkpoint does not fit the network.
        """
        configs = self.init_cfg if isinstance(self.init_cfg, list | tuple) else [self.init_cfg]
        pretrained = [config for config in configs if config and is_pretrained(config)]
        if not pretrained:
            super().init_weights()
            return
        for config in pretrained:
            self.network.load_state_dict(read_pretrained(config))
            print_log(f"The backbone's weights are from {config['checkpoint']}.", logger="current")
        self._is_init = True

    def train(self, mode: bool = True) -> GeNASBackbone:
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        for stage in self.network.stages()[: self.frozen_stages + 1]:
            for module in stage:
                module.eval()
                module.requires_grad_(False)


def _normalisation(channels: int, *, norm_cfg: dict[str, Any], **placement: Any) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]
