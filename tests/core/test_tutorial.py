"""The tutorial: its notebook has the same commands, and all of them run, in order, in an empty folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "site" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_that_of_the_page(maker: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    kept = NOTEBOOK.read_text(encoding="utf-8")
    assert kept == maker.notebook(text), "write it anew: python docs/site/notebook.py"
    sources = ["".join(cell["source"]) for cell in json.loads(kept)["cells"] if cell["cell_type"] == "code"]
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8 and len(sources) == len(blocks) + 1
    assert [source.removeprefix("%%bash -e\n") for source in sources[1:]] == blocks


@pytest.mark.slow  # Searches and trains for some ten minutes.
@pytest.mark.parametrize("command", ["genas", "python"])
def test_a_program_that_the_notebook_types_is_there(command: str) -> None:
    assert shutil.which(command), f"{command} is not on the path: install the package and use its environment"


@pytest.mark.slow  # Searches and trains for some ten minutes.
def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("nni", "timm", "mmseg", "nbformat", "ipykernel"):
        pytest.importorskip(host)
    client = pytest.importorskip("nbclient")
    import nbformat

    clone = tmp_path / "clone"
    for folder in ("configs", "examples", "docs"):
        shutil.copytree(ROOT / folder, clone / folder)
    # The space of the last step, as pip would leave it.
    site = tmp_path / "site"
    told = site / "blur_space-1.0.dist-info"
    told.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "blur_space" / "blur_space.py", site)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: blur-space\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[genas_plugins.spaces]\nblur = blur_space:BlurSpace\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    runner = client.NotebookClient(notebook, timeout=1_800, resources={"metadata": {"path": str(clone / "docs")}})
    runner.execute()
    output = "".join(part.get("text", "") for cell in notebook.cells for part in cell.get("outputs", ()))
    # What the page says that its reader should see.
    for name in ("search.png", "loss_curves.png", "cells.png", "genotype.json", "history.jsonl"):
        assert (clone / "runs" / "tutorial" / name).is_file(), name
    found = json.loads((clone / "runs" / "tutorial" / "genotype.json").read_text())
    assert all(0.7 < one["test_top1"] < 0.97 for one in found["top"])
    shares = [float(share) for share in re.findall(r"share of slope +([\d.]+)%", output)]
    assert len(shares) == 2
    assert re.search(r"epoch 5: .* top-1 (8[5-9]|9\d)\.", output)
    assert re.search(r"sky +\| +[5-9]\d\.", output) and list((clone / "pictures").rglob("*.png"))
    best = json.loads((clone / "runs" / "blur" / "architecture.json").read_text())
    assert best["architecture"] <= 2
