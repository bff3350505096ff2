"""Without Detectron2: one sentence that says what to install, and the other packages do not notice."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

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


def sentence(missing: str, others: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    code = CODE.format(missing=missing, others=others)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, rest = done.stdout.split("\n", 1)
    assert rest.startswith("init_channels")
    return first


def test_the_sentence_has_the_line_that_installs_detectron2() -> None:
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


def test_without_timm_it_names_the_extra() -> None:
    assert sentence("timm") == (
        "timm is needed for detectron2_backbones but is not installed: pip install 'genas-plugins[detectron2]'."
    )
