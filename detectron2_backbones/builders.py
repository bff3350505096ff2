"""The builders that yacs configurations name: the backbone alone, and with the pyramids of both kinds of detectors."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from detectron2_backbones.backbone import GeNASBackbone

__all__ = ["build_genas_backbone", "build_genas_fpn_backbone", "build_retinanet_genas_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_genas_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> GeNASBackbone:
    """Build the backbone that ``MODEL.GENAS`` describes; ``MODEL.BACKBONE.FREEZE_AT`` counts as Detectron2 does.

    Raises:
        ValueError: A setting is invalid.
    """
    settings = cfg.MODEL.GENAS
    return GeNASBackbone(
        settings.ARCH,
        init_channels=settings.INIT_CHANNELS or None,
        in_channels=input_shape.channels,
        out_features=settings.OUT_FEATURES,
        norm=settings.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        drop_path_rate=settings.DROP_PATH_RATE,
        checkpointing=settings.CHECKPOINTING,
    )


@BACKBONE_REGISTRY.register()
def build_genas_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone with a feature pyramid, P2 to P6 from all four features; P6 is a pooled P5.

    Raises:
        ValueError: A setting is invalid, or the backbone does not return ``MODEL.FPN.IN_FEATURES``.
    """
    return _build_fpn(cfg, build_genas_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_genas_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone with RetinaNet's feature pyramid, P3 to P7; P6 and P7 are convolutions of ``res5``.

    Raises:
        ValueError: See :func:`build_genas_fpn_backbone`.
    """
    bottom_up = build_genas_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    if "res5" not in shapes:
        raise ValueError(f"P6 and P7 are made of res5, which MODEL.GENAS.OUT_FEATURES lacks: {', '.join(shapes)}.")
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(shapes["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_fpn(cfg: CfgNode, bottom_up: GeNASBackbone, top_block: nn.Module) -> FPN:
    settings, given = cfg.MODEL.FPN, list(bottom_up.output_shape())
    wanted = list(settings.IN_FEATURES)
    # Contiguous and ascending, as the pyramid needs them.
    if not wanted or wanted not in (given[start : start + len(wanted)] for start in range(len(given))):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be neighbours among MODEL.GENAS.OUT_FEATURES ({', '.join(given)}), in this "
            f"order, got {', '.join(wanted) or 'none'}."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=wanted,
        out_channels=settings.OUT_CHANNELS,
        norm=settings.NORM,
        top_block=top_block,
        fuse_type=settings.FUSE_TYPE,
    )
