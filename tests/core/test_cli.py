"""Subcommands: found by their entry points, loaded when they are asked for, and those of the core run without hosts."""

from __future__ import annotations

import configparser
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import kendalltau
from torch import nn

import genas_plugins
from genas_plugins import ZOO, CellNetwork, SuperNet, _plugins
from genas_plugins.cli import GROUP, main, subcommands
from genas_plugins.experiment import config
from genas_plugins.experiment.run_folder import load_data
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SuperNet

ROOT = Path(genas_plugins.__file__).parents[1]
HOSTS = ("nni", "pytorch_lightning", "lightning", "timm", "mmseg", "mmengine", "mmcv", "detectron2", "fvcore")
OURS = ("nni_strategy", "timm_models", "mmseg_backbones", "detectron2_backbones")
NAME = "genas_flatness_c10"
GREET = '''"""Greet 100 % of the people.

And so on.
"""

print("imported")


def add(parser):
    parser.add_argument("name")


def run(options):
    print(f"Hello {options.name}, {options.line}")
    return 7
'''


def register(site: Path, name: str, points: dict[str, str]) -> None:
    """Write what an installation of a package leaves beside its code."""
    # As pip names it: what stands before the first hyphen is the name.
    metadata = site / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{key} = {value}" for key, value in points.items())
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package of one module that brings subcommands."""

    def install(module: str, source: str, *names: str) -> None:
        site = tmp_path / "site"
        register(site, module, dict.fromkeys(names, module))
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))

    yield install
    for module in ("greeting", "faulty"):
        sys.modules.pop(module, None)


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_another_package_brings_a_subcommand(brought: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    brought("greeting", GREET, "greet")
    # Its line of help is there, and yet it is not imported.
    assert " greet greet 100 % of the people " in helped(capsys)
    assert main(["greet", "Ada"]) == 7
    assert capsys.readouterr().out == "imported\nHello Ada, ['greet', 'Ada']\n"
    assert "Greet 100 % of the people. positional arguments: name" in helped(capsys, "greet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import none_such", "No module named 'none_such'"),
        ("1 / 0", "division by zero"),
        ("def", "invalid syntax (faulty.py, line 1)"),
        ("raise RuntimeError('two\\nlines')", "two lines"),
        ("def add(parser): ...", "module 'faulty' has no attribute 'run'"),
    ],
)
def test_a_subcommand_that_cannot_be_loaded_is_named_and_harms_no_other(
    source: str, message: str, brought: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    brought("faulty", source, "fail")
    assert " fail faulty " in helped(capsys)
    assert main(["zoo"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["fail", "--whatever"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("genas: fail (faulty) cannot be loaded: ") and message in error
    assert len(error.splitlines()) == 1
    with pytest.raises(ImportError, match="fail \\(faulty\\)"):
        main(["--debug", "fail"])


def test_no_package_replaces_our_own_subcommands(brought: Callable[..., None]) -> None:
    before = subcommands()
    brought("greeting", GREET, *before)
    assert subcommands() == before


@pytest.mark.parametrize("order", [("stranger", "genas-plugins"), ("genas-plugins", "stranger")])
def test_nor_those_of_our_packages_where_they_are_installed(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genas_plugins, "__file__", str(tmp_path / "genas_plugins" / "__init__.py"))
    for name in order:
        register(tmp_path / name, name, {"search": "ours" if name == "genas-plugins" else "theirs"})
        monkeypatch.syspath_prepend(str(tmp_path / name))
    assert subcommands()["search"].value == "ours"


@pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="not a checkout")
def test_a_checkout_needs_no_installation_and_an_installation_is_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plugins, "entry_points", lambda group: ())
    found = {name: point.value for name, point in subcommands().items()}
    assert found["search"] == "nni_strategy.command"
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = configparser.ConfigParser(delimiters=("=",))
    written.read(tmp_path / "genas_plugins.egg-info" / "entry_points.txt")
    assert dict(written["console_scripts"]) == {"genas": "genas_plugins.cli:main"}
    assert written[GROUP].items() <= found.items()


# Without hosts

WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys({missing!r}))
from genas_plugins.cli import main
for line in json.loads(sys.argv[1]):
    print("$", line[0], flush=True)
    assert main(line) == 0, line
"""


def without(server: Any, missing: tuple[str, ...], folder: Path, *lines: list[str]) -> dict[str, str]:
    """What commands print in a process in which packages cannot be imported."""
    environment = {"MPLCONFIGDIR": str(folder / "matplotlib")}
    done = server(WITHOUT.format(missing=missing), json.dumps(lines), folder=folder, environment=environment)
    assert (done.status, done.stderr) == (0, ""), done.stderr
    return dict(part.split("\n", 1) for part in done.stdout.split("$ ")[1:])


def run_folder(folder: Path, supernet: nn.Module, **space: object) -> config.Experiment:
    """The folder of a search whose supernet is as good as untrained."""
    data = {"name": "digits", "train_images": 64, "validation_images": 64, "test_images": 32}
    score = {"metric": "accuracy", "recalibration_images": 64, "recalibration_batch_size": 64}
    experiment = config.parse({"space": space, "data": data, "score": score})
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(experiment))
    torch.save({"state_dict": supernet.state_dict()}, folder / "supernet.ckpt")
    record = {"index": 0, "generation": 0, "origin": "random", "candidate": list(ZOO[NAME].genotype.code)}
    record |= {"status": "ok", "seconds": 1.0, "score": -0.5, "shares": {"flatness": 1.0, "slope": 0.5}}
    record |= {"sigmas": [0.1, 0.2], "losses": [2.0, 2.5]}
    (folder / "history.jsonl").write_text(json.dumps(record) + "\n")
    return experiment


def top1(network: nn.Module, experiment: config.Experiment) -> tuple[float, float]:
    """On validation and test images, after PyTorch's own statistics of the one batch that recalibrates."""
    data = load_data(experiment)

    def batch(images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        return (images / 255 - mean) / std

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(batch(data.recalibration.images))
        network.eval()
        validation, test = (
            float((network(batch(part.images)).argmax(1) == part.labels).double().mean())
            for part in (data.validation, data.test)
        )
    return validation, test


def test_all_but_search_run_without_hosts(warm: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    genotype = ZOO[NAME].genotype
    supernet = SuperNet(init_channels=4, num_cells=3, num_classes=10)
    experiment = run_folder(tmp_path / "run", supernet, init_channels=4, num_cells=3)
    validation, test = top1(supernet.subnet(genotype), experiment)
    small = NasBench201SuperNet(4, 1, 10)
    experiment = run_folder(tmp_path / "cells", small, name="nasbench201", init_channels=4, cells_per_stage=1)
    torch.save(CellNetwork(genotype, 4, 6, 7).state_dict(), tmp_path / "official.pth")
    cells = map(NasBench201Architecture.from_index, range(15625))
    truth = {str(cell): 50.0 + 7 * number % 40 for number, cell in enumerate(cells)}
    (tmp_path / "truth.csv").write_text("arch,cifar10\n" + "".join(f"{k},{v}\n" for k, v in truth.items()))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump([{"name": "top-1", "metric": "accuracy"}]))
    said = without(
        warm("torch"),
        (*HOSTS, *OURS, "tqdm"),
        tmp_path,
        ["score", NAME, "--run", "run", "--device", "cpu"],
        [
            *("correlate", "--run", "cells", "--truth", "truth.csv", "--settings", "settings.yaml", "--sample", "6"),
            *("--quiet", "--resamples", "100", "--output", "out", "--device", "cpu"),
        ],
        ["zoo"],
        ["fit", NAME, "--macs", "1M", "--image-size", "32"],
        ["convert", "official.pth", "clean.safetensors"],
        ["plot", "losses", "run", "losses.png"],
    )
    rows = dict(line.rsplit(maxsplit=1) for line in said["score"].splitlines())
    assert rows["validation top-1"] == f"{validation:.2%}" and rows["test top-1"] == f"{test:.2%}"
    with (tmp_path / "out" / "scores.csv").open() as file:
        measured = {row["architecture"]: row for row in csv.DictReader(file)}
    scores = [float(row["top-1"]) for row in measured.values()]
    expected = [top1(small.subnet(NasBench201Architecture.from_string(name)), experiment)[0] for name in measured]
    assert scores == pytest.approx(expected) and len(set(scores)) > 2
    (row,) = (line.split() for line in said["correlate"].splitlines() if line.startswith("top-1 "))
    assert float(row[1]) == pytest.approx(kendalltau(expected, [truth[name] for name in measured]).statistic, abs=1e-3)
    assert NAME in said["zoo"] and "init_channels" in said["fit"] and str(genotype) in said["convert"]
    assert said["plot"] == "losses.png\n" and (tmp_path / "losses.png").stat().st_size > 1000
