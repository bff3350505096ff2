"""Without a host, or without what draws and reads: one sentence that says what to install, and nothing done yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Hosts look in the metadata whether a package is installed, and then import it.
MASK = """
import importlib.metadata, sys
masked, there = {packages!r}, importlib.metadata.distribution
sys.modules.update(dict.fromkeys(masked))
importlib.metadata.distribution = lambda name: there("none-such" if name in masked else name)
"""


@pytest.fixture
def run(warm: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Runs code in a process in which packages cannot be imported."""
    return lambda code, *packages: warm("torch")(mask(*packages) + code, folder=tmp_path)


def mask(*packages: str) -> str:
    return MASK.format(packages=packages)


IMPORTS = """
import genas_plugins, genas_plugins.cli
try:
    import nni_strategy
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["nni", "pytorch_lightning"])
def test_the_core_goes_without_the_host_and_its_package_says_what_is_missing(
    package: str, run: Callable[..., Any]
) -> None:
    done = run(IMPORTS, package)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == (
        f"{package} is needed for nni_strategy but is not installed: pip install 'genas-plugins[nni]'.\n"
    )


SEARCH = """
from genas_plugins.cli import main
sys.exit(main(["search", "--config", "quickstart_digits", "--output", "run"]))
"""


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("matplotlib", "matplotlib is needed for the search's pictures but is not installed: pip install"
         " 'genas-plugins[plots]'."),
        ("nni", "nni is needed for nni_strategy but is not installed: pip install 'genas-plugins[nni]'."),
        ("tqdm", "tqdm is needed for nni_strategy but is not installed: pip install 'genas-plugins[nni]'."),
        ("sklearn", "pip install 'genas-plugins[nni]'."),
    ],
)  # fmt: skip
def test_a_search_says_what_is_missing_before_it_starts(
    package: str, message: str, run: Callable[..., Any], genas: Any, tmp_path: Path
) -> None:
    if package == "matplotlib":
        # It is asked for by name, so that NNI may have been imported before.
        done = genas("search", "--config", "quickstart_digits", "--output", tmp_path / "run", before=mask(package))
    else:
        done = run(SEARCH, package)
    assert (done.status, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"genas: {package}" if package != "sklearn" else "genas: ")
    assert line.endswith(message)
    assert not list(tmp_path.iterdir())


COMMANDS = """
from genas_plugins.cli import main
assert main(["zoo"]) == 0
assert main(["score", "genas_flatness_c10", "--run", "nowhere"]) == 1
assert main(["plot", "cells", "genas_flatness_c10", "cells.svg"]) == 1
"""


def test_the_other_commands_need_only_what_they_use(run: Callable[..., Any]) -> None:
    done = run(COMMANDS, "nni", "pytorch_lightning", "matplotlib", "torchvision", "sklearn", "tqdm", "PIL")
    assert done.status == 0, done.stderr
    assert "genas_flatness_c10" in done.stdout
    assert done.stderr.splitlines() == [
        "genas: nowhere is not the folder of a search with a trained supernet: no config.yaml.",
        "genas: matplotlib is needed for drawing figures but is not installed: pip install 'genas-plugins[plots]'.",
    ]
