"""GeNAS networks as Detectron2 backbones: importing this package registers the builders that configurations name.

``add_genas_config(cfg)`` adds the settings to a yacs configuration; LazyConfig files call :class:`GeNASBackbone`.
"""

from genas_plugins._optional import require

require("timm", extra="detectron2", purpose="detectron2_backbones")
try:
    require("detectron2", extra="detectron2", purpose="detectron2_backbones")
except ImportError as _error:
    if _error.name != "detectron2":
        raise
    # The extra cannot install it: it is not on PyPI.
    raise ImportError(
        "detectron2 is needed for detectron2_backbones but is not installed: pip install 'genas-plugins[detectron2]' "
        "&& pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'.",
        name="detectron2",
    ) from _error.__cause__

from detectron2_backbones.backbone import GeNASBackbone  # noqa: E402
from detectron2_backbones.builders import (  # noqa: E402
    build_genas_backbone,
    build_genas_fpn_backbone,
    build_retinanet_genas_fpn_backbone,
)
from detectron2_backbones.config import add_genas_config  # noqa: E402

__all__ = [
    "GeNASBackbone",
    "add_genas_config",
    "build_genas_backbone",
    "build_genas_fpn_backbone",
    "build_retinanet_genas_fpn_backbone",
]
