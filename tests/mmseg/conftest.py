"""Before the tests import anything of MMSegmentation: with mmcv-lite it cannot be imported first."""

import mmseg_backbones  # noqa: F401
