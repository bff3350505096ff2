"""The experiment on NAS-Bench-201: seeds put together, and one command from archives to the report."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kendalltau, rankdata

from genas_plugins.spaces import NasBench201SearchSpace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import nasbench201

    yield nasbench201
    sys.modules.pop("nasbench201")


def write_scores(folder: Path, columns: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", *columns])
        writer.writerows([number, *row] for number, row in enumerate(zip(*columns.values(), strict=True)))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[int, Path]:
    """Two seeds: one column is the truth, one has no relation to it, and baselines follow it roughly."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(10, 90, 200)
    found = {}
    for seed in (3, 7):
        columns = {"truth": truth, "same": truth, "shuffled": rng.permutation(truth), "live FLOPs": truth // 8}
        columns |= {"flatness": truth + rng.normal(0, 30, 200), "worse": truth + rng.normal(0, 300, 200)}
        found[seed] = write_scores(tmp_path / str(seed), columns)
    return found


def cells(text: str, score: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {score} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tau_of_each_seed_and_of_their_ranks(benchmark, folders: dict[int, Path], tmp_path: Path) -> None:
    text = benchmark.report(folders, tmp_path, resamples=60)
    assert (tmp_path / "report.md").read_text() == text
    # What is the same for all seeds has no sum of its own.
    assert cells(text, "same") == ["same", "", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", ""]
    for cell in cells(text, "shuffled")[2:]:
        tau, low, high = map(float, re.findall(r"-?\d\.\d+", cell))
        assert abs(tau) < 0.15 and low < 0 < high
    tables = [benchmark.read_scores(folder / "scores.csv") for folder in folders.values()]
    truth = [row["truth"] for row in tables[0].values()]
    flat = [[row["flatness"] for row in table.values()] for table in tables]
    expected = [kendalltau(column, truth).statistic for column in (*flat, sum(map(rankdata, flat)))]
    assert cells(text, "flatness")[1] == "0.605"
    assert [float(cell.split()[0]) for cell in cells(text, "flatness")[2:]] == pytest.approx(expected, abs=6e-4)
    # Two noisy columns are better together.
    assert expected[2] > max(expected[:2])


def test_what_is_better_holds_on_both_halves(benchmark, folders: dict[int, Path], tmp_path: Path) -> None:
    text = benchmark.report(folders, tmp_path, resamples=60)
    with (tmp_path / "halves.csv").open() as file:
        rows = list(csv.DictReader(file))
    better, together = (
        {(row["score"], row["baseline"]): row[column] for row in rows}
        for column in ("better with every seed on", "better by the ranks of all seeds on")
    )
    assert better["same", "flatness"] == "both" and better["live FLOPs", "flatness"] == "both"
    assert better["worse", "flatness"] == "" and better["shuffled", "live FLOPs"] == ""
    assert {pair for pair, where in together.items() if where == "both"} >= {
        ("same", "flatness"),
        ("same", "live FLOPs"),
    }
    assert together["worse", "flatness"] == "" and together["shuffled", "live FLOPs"] == ""
    assert "by the ranks of all seeds and on both halves:\n\n- same: " in text


def test_seeds_that_are_better_only_together(benchmark, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(10, 90, 240)
    baseline = truth + rng.normal(0, 12, 240)
    folders = {}
    for seed in range(6):
        columns = {
            "truth": truth,
            "flatness": baseline,
            "live FLOPs": baseline,
            "noisy": truth + rng.normal(0, 12, 240),
        }
        folders[seed] = write_scores(tmp_path / str(seed), columns)
    benchmark.report(folders, tmp_path, resamples=60)
    with (tmp_path / "halves.csv").open() as file:
        (row,) = [r for r in csv.DictReader(file) if r["score"] == "noisy" and r["baseline"] == "live FLOPs"]
    assert row["better with every seed on"] != "both" and row["better by the ranks of all seeds on"] == "both"


def test_architectures_that_one_seed_lacks_are_left_out(benchmark, folders: dict[int, Path], tmp_path: Path) -> None:
    path = folders[7] / "scores.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:101]))
    assert "on 100 architectures" in benchmark.report(folders, tmp_path, resamples=50)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(ValueError, match="4 architectures have a score with every seed, at least 6"):
        benchmark.report(folders, tmp_path, resamples=50)


def test_a_file_that_is_no_archive(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar10_train.zip").write_text("no archive")
    assert benchmark.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "cifar10_train.zip is no ZIP archive" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/cifar10/*"))


@pytest.mark.slow
def test_one_command_from_archives_to_the_report(tmp_path: Path) -> None:
    pytest.importorskip("nni", reason="NNI is not installed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        with zipfile.ZipFile(tmp_path / f"cifar10_{split}.zip", "w") as archive:
            for name in "ab":
                for number in range(count):
                    pixels = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(pixels, "PNG")
                    archive.writestr(f"{name}/{number}.png", pixels.getvalue())
    with (tmp_path / "nasbench201_accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arch", "cifar10"])
        writer.writerows([str(a), 10 + a.index % 80] for a in NasBench201SearchSpace().architectures())
    small = ["space.init_channels=2", "data.image_size=8", "data.validation_images=32", "data.test_images=10"]
    small += ["training.epochs=1", "training.batch_size=16", "score.recalibration_images=16"]
    small += ["score.recalibration_batch_size=8", "search.population=3", "search.generations=1", "search.parents=2"]
    small += ["search.mutants=1", "search.crossovers=0"]
    (tmp_path / "settings.yaml").write_text("- {name: flatness, metric: flatness, sigmas: [0.01, 0.05]}\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "nasbench201.py"), str(tmp_path)]
    command += ["--output", str(tmp_path / "out"), "--sample", "12", "--resamples", "40", "--jobs", "2"]
    command += ["--settings", str(tmp_path / "settings.yaml")]
    for item in small:
        command += ["--set", item]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    reports = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        reports.append((tmp_path / "out" / "report.md").read_text())
    # The second time nothing was left to do.
    assert reports[0] == reports[1]
    assert "on 12 architectures" in reports[0] and len(cells(reports[0], "flatness")) == 5
