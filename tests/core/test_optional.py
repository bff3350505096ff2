"""Importing the core needs torch, NumPy and SciPy only; anything else that is missing is one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genas_plugins._optional import require

OPTIONAL = (
    *("matplotlib", "PIL", "sklearn", "torchvision", "tqdm", "click", "tensorboard"),
    *("nni", "pytorch_lightning", "lightning", "timm", "mmseg", "mmengine", "mmcv", "detectron2", "fvcore"),
    *("peewee", "nats_bench", "onnx", "onnxscript", "onnxruntime", "huggingface_hub"),
)
MODULES = (
    *("genas_plugins", "genas_plugins.scoring", "genas_plugins.search", "genas_plugins.spaces"),
    *("genas_plugins.counting", "genas_plugins.nasbench201.truth", "genas_plugins.ranking"),
    *("genas_plugins.correlation", "genas_plugins.cli.score", "genas_plugins.cli.correlate"),
    *("genas_plugins.exporting", "genas_plugins.exporting.subnets"),
)


@pytest.fixture
def run(warm: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs code that prints JSON in a process that has imported PyTorch alone."""

    def report(code: str, *arguments: str) -> dict[str, Any]:
        result = warm("torch")(code, *arguments, folder=tmp_path)
        assert (result.status, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return report


# torch is imported first: what it needs or finds by itself is not the core's doing.
IMPORTED = """
import importlib, json, logging, sys
import numpy, scipy, torch
before = set(sys.modules)
handlers = list(logging.root.handlers)
state = torch.get_rng_state().tolist()
for name in sys.argv[1].split():
    importlib.import_module(name)
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps({
    "new": sorted(new),
    "quiet": logging.root.handlers == handlers and not logging.getLogger("genas_plugins").handlers,
    "random": torch.get_rng_state().tolist() == state,
}))
"""


def test_importing_the_core_imports_nothing_optional_and_only_defines(run):
    found = run(IMPORTED, " ".join(MODULES))
    assert not set(found["new"]) & set(OPTIONAL)
    assert "genas_plugins" in found["new"]
    assert found["quiet"] and found["random"]


def test_importing_the_core_does_not_load_what_only_files_of_settings_need(run):
    found = run(IMPORTED, "genas_plugins genas_plugins.scoring genas_plugins.search genas_plugins.correlation")
    assert not set(found["new"]) & {"yaml", "pydantic", "pydantic_core"}


MASKED = """
import importlib, json, sys
import torch
for name in sys.argv[1].split():
    sys.modules[name] = None
for name in sys.argv[2].split():
    importlib.import_module(name)
from genas_plugins._optional import require
messages = {}
for name in sys.argv[1].split():
    for module in (name, name + ".inner"):
        try:
            require(module, extra="plots", purpose="drawing figures")
        except ImportError as error:
            messages[module] = [str(error), error.name]
print(json.dumps(messages))
"""


def test_without_any_optional_package_the_core_works_and_the_missing_one_is_a_sentence(run):
    messages = run(MASKED, " ".join(OPTIONAL), " ".join(MODULES))
    for name in OPTIONAL:
        sentence = f"{name} is needed for drawing figures but is not installed: pip install 'genas-plugins[plots]'."
        assert messages[name] == messages[f"{name}.inner"] == [sentence, name]


def test_an_installed_package_is_returned():
    assert require("json.decoder", extra="plots", purpose="reading") is sys.modules["json.decoder"]


def test_a_broken_package_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "genas_test_broken.py").write_text("import genas_test_dependency\n")
    (tmp_path / "genas_test_old.py").write_text("raise ImportError('needs a newer libfoo')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'genas_test_dependency'"):
        require("genas_test_broken", extra="plots", purpose="drawing")
    with pytest.raises(ImportError, match="needs a newer libfoo"):
        require("genas_test_old", extra="plots", purpose="drawing")
