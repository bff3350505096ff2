"""What is said about Pythons and machines agrees, and what is installed can be imported.

The slow tests install from the package index, into an environment of their own, what a user without constraints gets.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

from genas_plugins._compatibility import RETAGGED
from genas_plugins._optional import MissingPackageError, require

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

SEGMENTING = (
    "import mmseg_backbones, mmseg.models; from mmengine.config import Config\n"
    "from genas_plugins.files import packaged_configs\n"
    "configs = packaged_configs('mmseg', '.py')\n"
    "config = Config.fromfile(configs['deeplabv3_genas-flatness-c100-d8_4xb2-80k_cityscapes-512x1024'])\n"
    "mmseg.models.build_segmentor(config.model)"
)
# By extra: what a user would do first with what it is for.
FIRST_USE = {
    "nni": "import nni_strategy, nni; nni_strategy.GeNAS()",
    "timm": "import timm, timm_models; timm.create_model('genas_flatness_c10')",
    "mmseg": SEGMENTING,
    "onedl": SEGMENTING,
    # Detectron2 itself is not on the package index: all that it, and we, import of others.
    "detectron2": (
        "import cloudpickle, cv2, fvcore.nn, hydra, iopath, matplotlib, omegaconf, pkg_resources, PIL\n"
        "import pycocotools.mask, skimage.draw, tabulate, tensorboard, termcolor, yacs.config\n"
        "try:\n    import detectron2_backbones\n"
        "except ImportError as error:\n    assert 'detectron2.git' in str(error), error"
    ),
    "export": "import onnx, onnxruntime, onnxscript",
    "nasbench201": "import nats_bench; from playhouse.sqlite_ext import SqliteExtDatabase",
    "plots": (
        "from genas_plugins import ZOO; from genas_plugins.plotting import plot_cells\n"
        "plot_cells(ZOO['genas_flatness_c10'].genotype, 'cells.svg')"
    ),
    "all": "import nni_strategy, timm_models, mmseg_backbones, nats_bench, matplotlib, fvcore.nn",
    "docs": "import mkdocs, material, mkdocstrings_handlers.python, nbclient, ipykernel, build, twine",
    "test": "import pytest, xdist, psutil, jsonschema",
}


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """What ``setup.py`` hands to setuptools."""
    handed: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", handed.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return handed


def test_the_pythons_are_the_same_wherever_they_are_listed(packaging):
    kept = "Programming Language :: Python :: "
    classifiers = [name.removeprefix(kept) for name in packaging["classifiers"] if name.startswith(kept)]
    assert classifiers == ["3", *PYTHONS]
    assert packaging["python_requires"] == f">={PYTHONS[0]}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == PYTHONS
    steps = " ".join(str(step) for step in workflow["jobs"]["tests"]["steps"])
    assert "bash .ci/run" in steps and "matrix.python" in steps
    oldest, newest = PYTHONS[0], PYTHONS[-1]
    assert f"Python {oldest} to {newest}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_is_said_of_the_repository_agrees(packaging):
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    before_commits = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = before_commits["repos"][0]["hooks"]
    assert [hook["entry"].split(" --")[0] for hook in hooks] == ["ruff check", "ruff format"]
    assert all(hook["additional_dependencies"] == [f"ruff=={pinned}"] for hook in hooks)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (packaging["version"], packaging["license"])
    assert "arXiv:2305.08611" in str(citation["preferred-citation"])
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem == "config" or all(part["attributes"]["label"] for part in form["body"]), path


def test_every_extra_is_tried_alone_and_what_needs_pkg_resources_asks_for_it(packaging):
    assert set(packaging["extras_require"]) == set(FIRST_USE)
    for extra in ("nni", "mmseg", "detectron2"):
        assert any(re.fullmatch(r"setuptools\b.*<82", name) for name in packaging["extras_require"][extra])


# As on Python 3.14: before it, ast has Str, or makes it when asked.
WITHOUT_STR = """
import ast, sys, typing
sys.path.insert(0, ".")
for name in ("Str", "__getattr__"):
    vars(ast).pop(name, None)
from genas_plugins._compatibility import import_typeguard
"""
CHECKS = """
import_typeguard()
assert not hasattr(ast, "Str")
import typeguard
typeguard.check_type([1, None], list[int | None])
try:
    typeguard.check_type("1", typing.Optional[int])
except typeguard.TypeCheckError:
    print("refused")
"""


def test_the_typeguard_that_nni_asks_for_is_imported_without_what_python_has_dropped(
    warm: Callable[..., Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("typeguard") is None:
        pytest.skip("typeguard, which NNI brings, is not installed")
    done = warm("torch")(WITHOUT_STR + CHECKS, folder=tmp_path)
    assert (done.status, done.stdout, done.stderr) == (0, "refused\n", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from ast import Str, Gone", r"NNI needs typeguard.*Gone.*pip install --no-deps --upgrade typeguard\.$"),
        ("raise ImportError('needs a newer libfoo')", "needs a newer libfoo"),
    ],
)
def test_a_typeguard_that_cannot_be_imported_all_the_same_has_its_remedy(
    source: str, message: str, warm: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "typeguard.py").write_text(source)
    refused = "try:\n    import_typeguard()\nexcept ImportError as error:\n    print(error)\n"
    done = warm("torch")(f"{WITHOUT_STR}{refused}assert not hasattr(ast, 'Str')", folder=tmp_path)
    assert (done.status, done.stderr) == (0, "")
    assert re.search(message, done.stdout.strip())


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le", "x86_64", "AMD64"])
def test_where_nni_has_no_wheel_the_message_has_the_commands(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(MissingPackageError) as refused:
        require("nni", extra="nni", purpose="nni_strategy")
    said = str(refused.value)
    assert said.endswith("pip install 'genas-plugins[nni]'.")
    if machine.lower() in ("x86_64", "amd64"):
        assert said == "nni is needed for nni_strategy but is not installed: pip install 'genas-plugins[nni]'."
    else:
        assert f"has no wheel for {machine}" in said and RETAGGED in said
    # The document has the same commands, one a line.
    lines = (ROOT / "docs" / "nni.md").read_text(encoding="utf-8").splitlines()
    assert set(RETAGGED.split(" && ")) < set(lines)


class Environment:
    """A virtual environment in which nothing is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._uv = importlib.util.find_spec("uv") is not None
        make = ["uv", "venv", "--quiet", "--python", sys.executable] if self._uv else ["venv"]
        self.run(sys.executable, "-m", *make, str(folder))
        names = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
        self.python = str(folder.joinpath(*names))

    def install(self, *requirements: str) -> None:
        how = [sys.executable, "-m", "uv", "pip", "install", "--python", self.python]
        self.run(*(how if self._uv else [self.python, "-m", "pip", "install"]), "--quiet", *requirements)

    def run(self, *command: str) -> str:
        """Run a command outside the checkout; what it prints, or a failure with all that it said."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_CONSTRAINT", "UV_CONSTRAINT")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        done = subprocess.run(command, cwd=self.folder.parent, env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}\n{done.stdout[-4_000:]}\n{done.stderr[-4_000:]}")
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    made = Environment(tmp_path / "environment")
    yield made
    # Each holds gigabytes.
    shutil.rmtree(made.folder)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The checkout without what is not under version control, because building a package writes into its folder."""
    names = ("genas_plugins", "nni_strategy", "timm_models", "mmseg_backbones", "detectron2_backbones", "configs")
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    return str(tmp_path / "source")


@pytest.mark.slow  # Downloads and installs PyTorch for each extra.
@pytest.mark.parametrize("extra", FIRST_USE)
def test_each_extra_alone_with_the_newest_of_everything_can_be_used(
    extra: str, environment: Environment, source: str
) -> None:
    environment.install(f"{source}[{extra}]")
    environment.run(environment.python, "-c", FIRST_USE[extra])


@pytest.mark.slow  # Downloads and installs PyTorch.
def test_the_source_distribution_installs_and_passes_the_core_tests(environment: Environment, tmp_path: Path) -> None:
    pytest.importorskip("build")
    # From a copy: building writes into its folder.
    left_out = shutil.ignore_patterns("__pycache__", ".git", ".*_cache", "build", "dist", "*.egg-info", "runs", "data")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)
    environment.run(sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(tmp_path / "checkout"))
    (made,) = tmp_path.glob("genas_plugins-*.tar.gz")
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    environment.install(f"{made}[export,nni,plots,timm,test]")
    command = [environment.python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--rootdir", str(source)]
    assert " passed" in environment.run(*command, "-c", str(source / "pyproject.toml"), str(source / "tests" / "core"))


RETAGGED_SEARCH = """
import sys
import nni
from genas_plugins.cli import main
assert nni.__file__.startswith(sys.argv[1]), nni.__file__
settings = ["training.epochs=1", "training.accelerator=cpu", "data.train_images=64", "data.validation_images=64"]
settings += ["data.test_images=32", "score.recalibration_images=32", "search.population=4", "search.generations=1"]
settings += ["search.parents=2", "search.mutants=1", "search.crossovers=1", "space.init_channels=4"]
options = [part for setting in settings for part in ("--set", setting)]
raise SystemExit(main(["search", "--config", "quickstart_digits", "--quiet", "--output", sys.argv[2], *options]))
"""


@pytest.mark.slow  # Downloads NNI's wheel, 61 MB.
def test_a_retagged_nni_installs_on_other_machines_and_searches_without_its_server(
    environment: Environment, tmp_path: Path
) -> None:
    environment.install("pip", "wheel")
    download, retag, install = (command.split() for command in RETAGGED.split(" && "))
    environment.run(environment.python, "-m", *download)
    (original,) = tmp_path.glob("nni-3.0-*.whl")
    environment.run(environment.python, *retag[1:-1], original.name)
    retagged = tmp_path / "nni-3.0-py3-none-any.whl"
    assert install[-1] == f"./{retagged.name}"

    # As pip on such machines would: it refuses the one and takes the other.
    elsewhere = ["--no-deps", "--dry-run", "--target", str(tmp_path / "elsewhere"), "--only-binary=:all:"]
    for number, name in enumerate(("manylinux2014_aarch64", "macosx_11_0_arm64")):
        command = [environment.python, "-m", "pip", "install", *elsewhere, "--platform", name]
        assert "Would install nni-3.0" in environment.run(*command, str(retagged)), number
        refused = subprocess.run([*command, str(original)], capture_output=True, text=True)
        assert "is not a supported wheel on this platform" in refused.stderr

    # The rest of what NNI needs is installed where the tests run; of the wheel itself all but what is for x86-64.
    folder = tmp_path / "site"
    environment.run(environment.python, "-m", "pip", "install", "--no-deps", "--target", str(folder), str(retagged))
    shutil.rmtree(folder / "nni_node")
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", RETAGGED_SEARCH, str(folder), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": paths, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "genotype.json").is_file()
