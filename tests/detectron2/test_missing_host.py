"""Without Detectron2: one sentence that says what to install, and the other packages do not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CODE = """
import sys, warnings
warnings.simplefilter("ignore")
for missing in sys.argv[1:]:
    sys.modules[missing] = None
    import genas_plugins, genas_plugins.cli
    try:
        import detectron2_backbones
    except ImportError as error:
        print(error)
    if missing == "detectron2":
        import timm_models
    assert genas_plugins.cli.main(["fit", "genas_flatness_c100", "--image-size", "32", "--macs", "1M"]) == 0
    del sys.modules[missing]
"""
GIT = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


def test_the_sentence_has_the_line_that_installs_it(warm: Callable[..., Any], tmp_path: Path) -> None:
    """Without timm it names the extra; the core, and where it is there the package for timm, do not notice.

    The packages of other hosts may not name Detectron2 (tests/core/test_house.py), and need no trial of seconds.
    """
    pytest.importorskip("timm", reason="timm is not installed")
    done = warm("torch")(CODE, "timm", "detectron2", folder=tmp_path)
    assert (done.status, done.stderr) == (0, "")
    told = [line for line in done.stdout.splitlines() if " is needed for " in line or line.startswith("init_channels")]
    assert told[0] == (
        "timm is needed for detectron2_backbones but is not installed: pip install 'genas-plugins[detectron2]'."
    )
    assert told[2] == (
        "detectron2 is needed for detectron2_backbones but is not installed: pip install "
        f"'genas-plugins[detectron2]' && {GIT}."
    )
    assert told[1] == told[3] and told[1].startswith("init_channels")
