"""Without timm: one sentence that says what to install, and the core does not notice."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_the_core_goes_without_timm_and_the_package_says_what_is_missing() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "timm is needed for timm_models but is not installed: pip install 'genas-plugins[timm]'.\ninit_channels"
    )
