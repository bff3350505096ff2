"""Without MMSegmentation, or with an mmcv that it refuses: one sentence that says what to install."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import packages_distributions
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
MIXED = """
import sys
sys.path.insert(0, "site")
import genas_plugins.cli
try:
    import mmseg_backbones
except ImportError as error:
    print(error)
assert "mmcv" not in sys.modules
"""
FORK = "onedl-mmsegmentation" in packages_distributions().get("mmseg", ())
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
        f"{package} is needed for mmseg_backbones but is not installed: pip install "
        f"'genas-plugins[{'onedl' if FORK else 'mmseg'}]'.\n"
    )


def test_an_mmcv_that_is_too_new_is_named_with_its_remedy(warm: Callable[..., Any], tmp_path: Path) -> None:
    done = warm("torch")(REFUSED, folder=tmp_path)
    assert done.status == 0, done.stderr
    said = done.stdout
    if FORK:
        # It takes any.
        assert said == ""
        return
    assert said.startswith("MMSegmentation refuses the mmcv that is installed, it takes 2.0.0rc4 to 2.1: pip install")
    assert "MMCV==2.2.0" in said


def test_two_families_over_one_another_are_refused_before_they_are_imported(
    warm: Callable[..., Any], tmp_path: Path
) -> None:
    for name, version in {"mmcv-lite": "2.1.0", "onedl-mmcv": "2.3.6"}.items():
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done = warm("torch")(MIXED, folder=tmp_path)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("mmcv-lite 2.1.0 and onedl-mmcv 2.3.6 are both installed as mmcv")
    assert "pip uninstall -y " in done.stdout
