"""GeNAS networks as timm models: importing this package registers them with ``timm.create_model``."""

from genas_plugins._optional import require

require("timm", extra="timm", purpose="timm_models")

from timm_models.genas import GenasNet  # noqa: E402
from timm_models.task import AuxiliaryClassificationTask  # noqa: E402

__all__ = ["AuxiliaryClassificationTask", "GenasNet"]
