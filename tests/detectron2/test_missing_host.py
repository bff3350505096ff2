"""Without Detectron2: one sentence that says what to install, and the other packages do not notice."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CODE = """
import sys
sys.modules[{missing!r}] = None
import genas_plugins, genas_plugins.cli
try:
    import detectron2_backbones
except ImportError as error:
    print(error)
{others}
assert genas_plugins.cli.main(["fit", "genas_flatness_c100", "--image-size", "32", "--macs", "1M"]) == 0
"""
GIT = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


@pytest.fixture
def sentence(warm: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """What is said without a package, where the others are imported and a command of the core runs."""

    def say(missing: str, others: str = "") -> str:
        code = "import warnings; warnings.simplefilter('ignore')\n" + CODE.format(missing=missing, others=others)
        done = warm("torch")(code, folder=tmp_path)
        assert (done.status, done.stderr) == (0, "")
        first, rest = done.stdout.split("\n", 1)
        assert rest.startswith("init_channels")
        return first

    return say


def test_the_sentence_has_the_line_that_installs_detectron2(sentence: Callable[..., str]) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    others = [
        f"import {package}"
        for package, host in (("timm_models", "timm"), ("mmseg_backbones", "mmseg"), ("nni_strategy", "nni"))
        if importlib.util.find_spec(host) is not None
    ]
    assert sentence("detectron2", "\n".join(others)) == (
        "detectron2 is needed for detectron2_backbones but is not installed: pip install "
        f"'genas-plugins[detectron2]' && {GIT}."
    )


def test_without_timm_it_names_the_extra(sentence: Callable[..., str]) -> None:
    assert sentence("timm") == (
        "timm is needed for detectron2_backbones but is not installed: pip install 'genas-plugins[detectron2]'."
    )
