"""Without MMSegmentation, or with an mmcv that it refuses: one sentence that says what to install."""

from __future__ import annotations

import os
import subprocess
import sys

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


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["mmseg", "mmcv"])
def test_the_others_go_without_it_and_the_package_says_what_is_missing(package: str) -> None:
    assert run(MISSING.format(package=package)) == (
        f"{package} is needed for mmseg_backbones but is not installed: pip install 'genas-plugins[mmseg]'.\n"
    )


def test_an_mmcv_that_is_too_new_is_named_with_its_remedy() -> None:
    said = run(REFUSED)
    assert said.startswith("MMSegmentation refuses the mmcv that is installed, it takes 2.0.0rc4 to 2.1: pip install")
    assert "MMCV==2.2.0" in said
