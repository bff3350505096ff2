"""The house: its public addresses, which way the arrows between its rooms point, and how large its parts may be."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from genas_plugins._moved import MOVED

ROOT = Path(__file__).parents[2]

# What README, the documents and DESIGN name. Hosts other than NNI and timm are looked at in their own tests.
ADDRESSES = {
    "genas_plugins": "ZOO CellNetwork Genotype SuperNet",
    "genas_plugins.checkpoints": "CheckpointError load_supernet read_state save_supernet",
    "genas_plugins.correlation": "Setting columns evaluate measure_raw slope_shares",
    "genas_plugins.datasets": "ImageTensors SearchData load_search_data",
    "genas_plugins.exporting": "ExportError Exported check_target export_onnx",
    "genas_plugins.nasbench201": "NasBench201Architecture NasBench201Network NasBench201SearchSpace nasbench201_costs",
    "genas_plugins.plotting": "LossCurve plot_cells plot_loss_curves plot_scatter plot_search",
    "genas_plugins.ranking": "compare ndcg partial_kendall precision_at rank_correlation",
    "genas_plugins.scoring": (
        "METRICS CombinedScore CommonNoise Measurement MeasurementError accuracy angle flatness mean_loss "
        "recalibrate_batchnorm top_eigenvectors"
    ),
    "genas_plugins.search": "Evolution History InFlight Race SearchSpace SharedSearch candidate_seed run_search",
    "genas_plugins.search.racing": "Race check_confidence spared_images",
    "genas_plugins.spaces": "DartsSearchSpace NasBench201Architecture NasBench201SearchSpace",
    "nni_strategy": (
        "CombinedEvaluator DartsSpace FlatnessEvaluator GeNAS NADarts NasBench201Space SupernetModule "
        "supernet_evaluator"
    ),
    "nni_strategy.trained": "TrainedSupernet load_data save_trained",
    "timm_models.settings": "Settings",
}

# By package: which of ours it may import, and which hosts it may name.
HOSTS = {"nni", "pytorch_lightning", "lightning", "timm", "mmseg", "mmengine", "mmcv", "detectron2", "fvcore"}
ARROWS = {
    "genas_plugins": (set(), set()),
    "nni_strategy": ({"genas_plugins"}, {"nni", "pytorch_lightning"}),
    "timm_models": ({"genas_plugins"}, {"timm"}),
    "mmseg_backbones": ({"genas_plugins", "timm_models"}, {"mmseg", "mmengine", "mmcv"}),
    "detectron2_backbones": ({"genas_plugins", "timm_models"}, {"detectron2", "fvcore"}),
}


def test_every_module_of_nni_strategy_needs_nni():
    modules = sorted((ROOT / "nni_strategy").glob("*.py"))
    without = [path.name for path in modules if "nni" not in {name for _, name in imported(path)}]
    # The package itself asks for it by name, for a sentence where it is missing.
    assert modules and without == ["__init__.py"]


FILE_LINES, FUNCTION_LINES = 400, 60


@pytest.mark.parametrize("module", ADDRESSES)
def test_public_names_stand_where_they_are_documented(module):
    found = importlib.import_module(module)
    assert [name for name in ADDRESSES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("old", MOVED)
def test_modules_are_found_under_the_names_that_they_had(old):
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])
    package, _, name = old.rpartition(".")
    assert getattr(importlib.import_module(package), name) is importlib.import_module(MOVED[old])


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module.partition(".")[0]


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package):
    ours, hosts = ARROWS[package]
    forbidden = (ARROWS.keys() - ours - {package}) | (HOSTS - hosts)
    against = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in imported(path)
        if name in forbidden
    ]
    assert against == []


def too_large(source: str) -> Iterator[str]:
    """What is beyond the limits in a file; a function's docstring does not count."""
    if (lines := len(source.splitlines())) > FILE_LINES:
        yield f"{lines} lines, at most {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, at most {FUNCTION_LINES}"


@pytest.mark.parametrize("package", ARROWS)
def test_files_and_functions_are_small(package):
    found = [
        f"{path.relative_to(ROOT)}: {problem}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for problem in too_large(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_what_is_too_large_is_found():
    body = "    x = 1\n" * 59
    assert list(too_large(f"def f():\n{body}")) == []
    assert list(too_large(f'def f():\n    """One.\n\n    Two.\n    """\n{body}')) == []
    assert list(too_large(f"class C:\n    def g(self):\n{body.replace('    ', ' ' * 8)}        y = 2\n")) == [
        "g has 61 lines, at most 60"
    ]
    assert list(too_large("x = 1\n" * 401)) == ["401 lines, at most 400"]
