"""GeNAS networks as MMSegmentation backbones: importing this package registers ``GeNASBackbone``.

``custom_imports = dict(imports=["mmseg_backbones"])`` in a config is all that MMSegmentation's own tools need. With
mmcv-lite, import this package before ``mmseg.models``.
"""

from genas_plugins._optional import require

for _package in ("timm", "mmengine", "mmcv", "ftfy", "regex", "mmseg"):
    require(_package, extra="mmseg", purpose="mmseg_backbones")

from mmseg_backbones.compatibility import allow_checkpoints, stand_in_for_mmcv_ops  # noqa: E402

stand_in_for_mmcv_ops()
allow_checkpoints()

from mmseg_backbones.backbone import GeNASBackbone  # noqa: E402

__all__ = ["GeNASBackbone"]
