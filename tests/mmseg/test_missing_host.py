"""Without MMSegmentation, or with an mmcv that it refuses: one sentence that says what to install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MISSING = """
import sys
sys.modules["{package}"] = None
import genas_plugins, genas_plugins.cli, timm_models
try:
    import mmseg_backbones
except ImportError as error:
    print(error)
"""
REFUSED = """
import mmcv
mmcv.__version__ = "2.2.0"
try:
    import mmseg_backbones
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["mmseg", "mmcv"])
def test_the_others_go_without_it_and_the_package_says_what_is_missing(
    package: str, warm: Callable[..., Any], tmp_path: Path
) -> None:
    done = warm("torch")(MISSING.format(package=package), folder=tmp_path)
    assert done.status == 0, done.stderr
    assert done.stdout == (
        f"{package} is needed for mmseg_backbones but is not installed: pip install 'genas-plugins[mmseg]'.\n"
    )


def test_an_mmcv_that_is_too_new_is_named_with_its_remedy(warm: Callable[..., Any], tmp_path: Path) -> None:
    done = warm("torch")(REFUSED, folder=tmp_path)
    assert done.status == 0, done.stderr
    said = done.stdout
    assert said.startswith("MMSegmentation refuses the mmcv that is installed, it takes 2.0.0rc4 to 2.1: pip install")
    assert "MMCV==2.2.0" in said
