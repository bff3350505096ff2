"""The paper's evidence in minutes: how many epochs fit, the tables, and every step of it on a CPU, with few images."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kendalltau, rankdata

from genas_plugins.checkpoints import read_metadata
from genas_plugins.search import JsonLines
from genas_plugins.spaces import NasBench201SearchSpace

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("evidence")
    for name in ("evidence", "nasbench201", "gpu", "gpu_plans", "gpu_kit", "gpu_collect"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("milliseconds", "seconds", "epochs"),
    [
        # 391 steps of 3 ms are 1.173 s, 95 % of 300 s are 242 of them.
        (3.0, 300, 240),
        (1.0, 300, 250),
        (30.0, 300, 20),
        # 285 / (391 * 0.1) is 7.3.
        (100.0, 300, 7),
        (5000.0, 300, 1),
        (3.0, -20, 1),
    ],
)
def test_the_epochs_fit_the_time(evidence: Any, milliseconds: float, seconds: float, epochs: int) -> None:
    assert evidence.choose_epochs(milliseconds / 1000, 391, seconds) == epochs


def test_the_pace_is_that_after_the_first_third(evidence: Any) -> None:
    pace = evidence.Pace()
    pace.ends = [0.0, 10.0, 20.0, 20.5, 21.0, 21.5, 22.0, 22.5, 23.0]
    assert pace.seconds_a_step == 0.5


def test_tables_are_taus_beside_the_papers(evidence: Any) -> None:
    rng = np.random.default_rng(0)
    names = [f"a{number}" for number in range(40)]
    wanted = {"angle", "accuracy", *(column for table in evidence.TABLES.values() for column in table)}
    scores = {
        seed: {column: dict(zip(names[seed:], rng.normal(size=40 - seed), strict=True)) for column in sorted(wanted)}
        for seed in (0, 3)
    }
    truth = dict(zip(names, rng.uniform(10, 95, 40), strict=True))
    text = evidence.table_text(scores, truth, 120, 50)
    assert "Kendall's tau on 37 random architectures" in text and "supernets of 120 epochs" in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    common = names[3:]
    columns = [
        {column: [table[column][name] for name in common] for column in ("angle", "flatness", "flatness, alpha 0.1")}
        for table in scores.values()
    ]
    accuracies = [truth[name] for name in common]
    added = rankdata(columns[0]["flatness, alpha 0.1"]) + rankdata(columns[1]["flatness, alpha 0.1"])
    taus = [kendalltau(own["flatness, alpha 0.1"], accuracies).statistic for own in columns]
    taus.append(kendalltau(added, accuracies).statistic)
    _, _, paper, *cells, _ = lines["flatness, alpha 0.1"].split("|")
    # Table 6 of the paper.
    assert float(paper) == 0.403
    assert [float(cell.split()[0]) for cell in cells] == pytest.approx(taus, abs=6e-4)
    _, _, paper, first, *_ = lines["angle, flatness"].split("|")
    # Table 1 of the paper.
    assert float(paper) == 0.430
    tau = kendalltau(columns[0]["angle"], columns[0]["flatness"]).statistic
    assert float(first.split()[0]) == pytest.approx(tau, abs=6e-4)


def test_tables_of_hardly_anything_are_refused(evidence: Any) -> None:
    scores = {0: {"flatness": {"a": 1.0, "b": 2.0, "c": 3.0}}, 1: {"flatness": {"a": 1.0, "b": 2.0}}}
    with pytest.raises(
        ValueError, match="2 architectures have a score with every seed, a correlation takes at least 3"
    ):
        evidence.table_text(scores, dict.fromkeys("abc", 50.0), 1, 10)


def test_a_seed_that_fails_ends_the_others_and_says_why(evidence: Any, tmp_path: Path) -> None:
    commands = {0: ["-c", "import time; time.sleep(100)"], 1: ["-c", "raise SystemExit('no images')"]}
    with pytest.raises(RuntimeError, match="train of seed 1 ended with 1: no images"):
        evidence.together(commands, tmp_path, "train")


def test_a_training_that_was_cut_off_goes_on(evidence: Any, tmp_path: Path) -> None:
    args = evidence.parse(["train", str(tmp_path), "--source", "S", "--device", "cpu"])
    begun = evidence.train_command(args, 4, 120)
    assert {"training.epochs=120", "training.checkpoint_every=5", "seed=4"} <= set(begun)
    assert "--resume" not in begun
    (tmp_path / "seed4").mkdir()
    (tmp_path / "seed4" / "config.yaml").touch()
    again = evidence.train_command(args, 4, 120)
    assert again[-1] == "--resume" and "--config" not in again and "--train-only" in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "DIR", "--source", "S", "--seeds", "1", "1"], "--seeds must differ and not be negative, got [1, 1]"),
        (["train", "DIR", "--source", "S", "--seconds", "0"], "--seconds and --resamples must be above 0, got 0.0"),
        (["train", "DIR"], "the following arguments are required: --source"),
    ],
)
def test_what_cannot_be_run_is_refused(
    evidence: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evidence.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pictures of two classes and the accuracies of all architectures."""
    data = tmp_path / "kit" / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 256), ("test", 20)):
        with zipfile.ZipFile(data / f"cifar10_{split}.zip", "w") as archive:
            for number in range(count):
                # Bright and dark ones.
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 127 * (number % 2)
                path = tmp_path / "picture.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                archive.write(path, f"class{number % 2}/{number:04}.png")
    lines = [f"{name},{10 + index * 7919 % 80}" for index, name in enumerate(NasBench201SearchSpace().architectures())]
    (data / "nasbench201_accuracy.csv").write_text("\n".join(["arch,cifar10", *lines]) + "\n")
    return data


def check_measurements(folder: Path, count: int) -> list[list[Any]]:
    """What was measured is so many architectures with both supernets, the same in one order; returns it."""
    measured = [JsonLines(folder / f"correlation{seed}" / "measurements.jsonl").records for seed in (0, 1)]
    orders = [[record["architecture"] for record in records] for records in measured]
    assert orders[0] == orders[1] and len(set(orders[0])) == count
    assert measured[0] != measured[1]
    return measured


def check_elsewhere(genas: Any, supernet: Path, images: Path, measured: list[Any], later: Path, *more: Any) -> None:
    """The file of a supernet and the images are enough, the angle included: measurements are the same."""
    run = ("--run", supernet, "--data-root", images, "--device", "cpu", "--quiet", "--sample", len(measured))
    run += ("--resamples", "40", "--output", later, "--minutes", "0.005", *more)
    stopped = genas("correlate", *run, pictures=False)
    assert stopped.status == 0 or "a correlation takes 3: go on with --resume" in stopped.stderr
    again = JsonLines(later / "measurements.jsonl").records
    assert 1 <= len(again) <= len(measured)
    for ours, theirs in zip(again, measured, strict=False):
        for record in (ours, theirs):
            record.pop("training_free", None)
        assert ours == theirs


def test_all_steps_of_the_evidence(
    evidence: Any, source: Path, genas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = tmp_path / "out", tmp_path / "settings.yaml"
    settings.write_text(
        "- {name: flatness, metric: flatness}\n- {name: 'flatness, alpha 0.1', metric: flatness, alpha: 0.1}\n"
        "- {name: angle, metric: angle}\n- {name: accuracy, metric: accuracy}\n"
    )

    def together(commands: dict[int, list[str]], folder: Path, name: str) -> None:
        for command in commands.values():
            if "--sample" in command:
                command[command.index("--sample") + 1] = "4"
        for running in [genas.python(*command, pictures=False) for command in commands.values()]:
            done = running.wait()
            assert done.status == 0, done.stderr

    # In processes that have imported all that they need.
    monkeypatch.setattr(evidence, "together", together)
    monkeypatch.setattr(evidence, "SETTINGS", (str(settings),))
    options = (str(folder), "--source", str(source), "--device", "cpu", "--seeds", "0", "1", "--resamples", "50")
    for step in ("train", "score", "tables"):
        assert evidence.main([step, *options, *["--rehearse"] * (step != "tables")]) == 0
    measured = check_measurements(folder, 4)
    card = read_metadata(folder / "seed1.safetensors")["card"]
    assert card["epochs"] == 2 and card["seeds_at_once"] == 2
    assert "**Table 6, alpha: with the accuracy of trained networks**" in (folder / "tables.md").read_text()
    more = ("--truth", source / "nasbench201_accuracy.csv", "--settings", settings, "--training-free")
    check_elsewhere(genas, folder / "seed0.safetensors", folder / "cifar10", measured[0], tmp_path / "later", *more)


def gpu(*arguments: Any) -> str:
    """Run benchmarks/gpu.py, which must end with 0."""
    command = [sys.executable, str(FOLDER / "gpu.py"), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_whole_plan_is_rehearsed_on_a_cpu(source: Path, genas: Any, tmp_path: Path) -> None:
    kit, output, back = source.parent, tmp_path / "out", tmp_path / "back"
    gpu("--seal", "--kit", kit)
    options = ("--plan", "evidence", "--rehearse", "--device", "cpu", "--kit", kit, "--collect", back)
    gpu(output, *options)
    folder = output / "evidence-rehearsal"
    files = {path.name for path in back.iterdir()}
    assert files == {"report.md", "results.tar.gz", "seed0.safetensors", "seed1.safetensors"}
    assert sum(path.stat().st_size for path in back.iterdir()) < 16 * 2**20
    report = (back / "report.md").read_text()
    assert "**A rehearsal: no figure here means anything.**" in report
    for step in ("train", "score", "tables"):
        assert json.loads((folder / f"{step}.json").read_text())["code"] == 0
    assert "**Table 6, alpha: with the accuracy of trained networks**" in report
    measured = check_measurements(folder, 10)
    with tarfile.open(back / "results.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"train.txt", "score.json", "tables.md", "seed0/config.yaml", "correlation1/measurements.jsonl"} <= names
    more = ("--truth", source / "nasbench201_accuracy.csv", "--settings", "paper_tables", "label_free")
    more += ("--training-free",)
    check_elsewhere(genas, back / "seed0.safetensors", folder / "cifar10", measured[0], tmp_path / "later", *more)
    # Done is done.
    before = (folder / "report.md").stat().st_mtime_ns
    gpu(output, *options)
    assert {path.name for path in back.iterdir()} == files
    assert (folder / "report.md").stat().st_mtime_ns > before
