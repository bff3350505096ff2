"""Without timm: one sentence that says what to install, and the core does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE = """
import sys
sys.modules["timm"] = None
import genas_plugins, genas_plugins.cli
try:
    import timm_models
except ImportError as error:
    print(error)
assert genas_plugins.cli.main(["fit", "genas_flatness_c100", "--image-size", "32", "--macs", "1M"]) == 0
"""


def test_the_core_goes_without_timm_and_the_package_says_what_is_missing(
    warm: Callable[..., Any], tmp_path: Path
) -> None:
    done = warm("torch")(CODE, folder=tmp_path)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "timm is needed for timm_models but is not installed: pip install 'genas-plugins[timm]'.\ninit_channels"
    )
