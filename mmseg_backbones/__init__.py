"""GeNAS networks as MMSegmentation backbones: importing this package registers ``GeNASBackbone``.

``custom_imports = dict(imports=["mmseg_backbones"])`` in a config is all that MMSegmentation's own tools need. With
mmcv-lite, import this package before ``mmseg.models``.
"""

from genas_plugins._optional import require
from mmseg_backbones._distributions import check_families, fork_is_installed

check_families()
_extra = "onedl" if fork_is_installed() else "mmseg"
for _package in ("timm", "mmengine", "mmcv", "ftfy", "regex"):
    require(_package, extra=_extra, purpose="mmseg_backbones")
try:
    require("mmseg", extra=_extra, purpose="mmseg_backbones")
except AssertionError as error:
    # MMSegmentation refuses mmcv 2.2 this way; its message only names the lower limit.
    _remedy = "pip install 'mmcv-lite<2.2'"
    if _extra == "onedl":
        _remedy = "pip uninstall -y mmsegmentation && pip install 'genas-plugins[onedl]'"
    raise ImportError(
        f"MMSegmentation refuses the mmcv that is installed, it takes 2.0.0rc4 to 2.1: {_remedy}. ({error})"
    ) from error

from mmseg_backbones.compatibility import (  # noqa: E402
    allow_checkpoints,
    find_configurations,
    stand_in_for_mmcv_ops,
    supply_find_loader,
)

stand_in_for_mmcv_ops()
supply_find_loader()
allow_checkpoints()
find_configurations()

from mmseg_backbones.backbone import GeNASBackbone  # noqa: E402

__all__ = ["GeNASBackbone"]
