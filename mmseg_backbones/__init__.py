"""GeNAS networks as MMSegmentation backbones: importing this package registers ``GeNASBackbone``.

``custom_imports = dict(imports=["mmseg_backbones"])`` in a config is all that MMSegmentation's own tools need. With
mmcv-lite, import this package before ``mmseg.models``.
"""

from genas_plugins._optional import require

for _package in ("timm", "mmengine", "mmcv", "ftfy", "regex"):
    require(_package, extra="mmseg", purpose="mmseg_backbones")
try:
    require("mmseg", extra="mmseg", purpose="mmseg_backbones")
except AssertionError as error:
    # MMSegmentation refuses mmcv 2.2 this way; its message only names the lower limit.
    raise ImportError(
        "MMSegmentation refuses the mmcv that is installed, it takes 2.0.0rc4 to 2.1: pip install 'mmcv-lite<2.2'. "
        f"({error})"
    ) from error

from mmseg_backbones.compatibility import allow_checkpoints, stand_in_for_mmcv_ops, supply_find_loader  # noqa: E402

stand_in_for_mmcv_ops()
supply_find_loader()
allow_checkpoints()

from mmseg_backbones.backbone import GeNASBackbone  # noqa: E402

__all__ = ["GeNASBackbone"]
