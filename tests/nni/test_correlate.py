"""genas correlate: architectures measured once each, resumed after a kill, and the table's own check."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import kendalltau, rankdata

from genas_plugins import SuperNet
from genas_plugins.correlation import Setting
from genas_plugins.correlation.report import TRAINING_FREE, remarks, table_of, write_report
from genas_plugins.correlation.run import _training_free, choose, measure_all
from genas_plugins.correlation.settings import check_sums, load_settings
from genas_plugins.experiment import config
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201 import NasBench201Network
from genas_plugins.scoring import CombinedScore
from genas_plugins.search import Record
from genas_plugins.spaces import NasBench201Architecture, NasBench201SearchSpace
from nni_strategy.command import _report
from nni_strategy.run import Found, Outcome, run_experiment

SETTINGS = [
    {"name": "flat", "metric": "flatness", "sigmas": [0.01, 0.05]},
    {"name": "flat, no depth", "metric": "flatness", "sigmas": [0.01, 0.05], "alpha": 0.0},
    {"name": "common", "metric": "flatness", "sigmas": [0.01, 0.05], "common": True, "draws": 2},
    {"name": "bent", "metric": "flatness", "noise": "hessian", "hessian_directions": 2, "images": 32},
    {"name": "accuracy", "metric": "accuracy"},
    {"name": "few", "metric": "accuracy", "images": 32, "recalibration_images": 100},
    {"name": "turned", "metric": "angle"},
    {"name": "ranks", "rank_sum": ["flat", "live FLOPs"]},
    {"name": "log ranks", "log_rank_sum": ["flat", "live FLOPs"]},
]


def accuracy_of(architecture: NasBench201Architecture) -> float:
    """A truth for tests: some order of all architectures."""
    return 10.0 + 80.0 * ((architecture.index * 7919) % 15625) / 15625


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    return {str(architecture): accuracy_of(architecture) for architecture in NasBench201SearchSpace().architectures()}


@pytest.fixture(scope="module")
def experiment(tiny: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The tiny one with a search that is hardly any, and images for two batches of what needs no training."""
    return tiny(
        data={"train_images": 128},
        training={"epochs": 1},
        score={"metric": "accuracy", "recalibration_images": 128},
        search={"population": 3, "generations": 1, "mutants": 1, "crossovers": 1},
    )


@pytest.fixture(scope="module")
def files(experiment: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, truth: dict[str, float]) -> Path:
    """A run, a table of accuracies and settings."""
    folder = tmp_path_factory.mktemp("correlate")
    run_experiment(config.parse(experiment), folder / "run")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    # Of the samples that are asked for; each process reads the whole file.
    known = {str(name): None for count, seed in ((5, 0), (5, 1), (3, 0)) for name in choose(truth, count, seed)}
    lines = ["arch,cifar10", *(f"{name},{truth[name]}" for name in known)]
    (folder / "truth.csv").write_text("\n".join(lines) + "\n")
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "few.yaml").write_text(yaml.safe_dump(SETTINGS[4:6]))
    return folder


def command(files: Path, output: Path, *more: str) -> list[str]:
    return [
        *("correlate", "--run", str(files / "run"), "--truth", str(files / "truth.csv"), "--device", "cpu", "--quiet"),
        *("--settings", str(files / "settings.yaml"), "--output", str(output), "--sample", "5", "--resamples", "50"),
        *more,
    ]


def training(files: Path, output: Path, *more: str) -> list[str]:
    """The command with an experiment in place of a run."""
    arguments = command(files, output, "--config", str(files / "experiment.yaml"), *more)
    del arguments[1:3]
    return arguments


@pytest.fixture(scope="module")
def whole(files: Path, genas: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes, and what it prints."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = genas(*command(files, folder, "--training-free"))
    assert done.status == 0, done.stderr
    assert "\n5 architectures." in done.stdout
    return folder


def test_the_command_writes_scores_and_their_taus(whole: Path, truth: dict[str, float]) -> None:
    with (whole / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    with (whole / "correlations.csv").open() as file:
        table = {row["score"]: row for row in csv.DictReader(file)}
    assert len(scores) == 5
    parts = [rankdata([float(line[name]) for line in scores]) for name in ("flat", "live FLOPs")]
    assert [float(line["ranks"]) for line in scores] == (parts[0] + parts[1]).tolist()
    assert [float(line["log ranks"]) for line in scores] == pytest.approx(np.log(parts[0] * parts[1]))
    assert [float(row["truth"]) for row in scores] == [truth[row["architecture"]] for row in scores]
    named = {"parameters", "live FLOPs", "NASWOT", "SynFlow", "ZiCo", "SynFlow, supernet", "flat", "turned", "-loss"}
    assert set(table) >= named
    for name, row in table.items():
        tau = kendalltau([float(line[name]) for line in scores], [float(line["truth"]) for line in scores]).statistic
        assert float(row["tau"]) == pytest.approx(tau)
        assert float(row["tau_low"]) <= float(row["tau"]) <= float(row["tau_high"])
    taus = [float(row["tau"]) for row in table.values()]
    assert taus == sorted(taus, reverse=True)
    # Without the depth term nothing but the slope is left.
    assert float(table["flat, no depth"]["median_slope_share"]) == pytest.approx(1.0, abs=1e-4)
    with (whole / "taus.csv").open() as file:
        between = {row[""]: row for row in csv.DictReader(file)}
    tau = kendalltau([float(line["flat"]) for line in scores], [float(line["turned"]) for line in scores]).statistic
    assert float(between["flat"]["turned"]) == float(between["turned"]["flat"]) == pytest.approx(tau)
    assert (whole / "scatter.png").read_bytes().startswith(b"\x89PNG")


def test_training_free_scores_leave_the_generators_of_all_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.manual_seed seeds those of GPUs as well, and putting back that of the CPU does not undo it.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"GPUs were seeded with {seed}."))
    images = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(batch, torch.arange(4)) for batch in images]
    trained = SimpleNamespace(recalibration=batches, seed=3, data=SimpleNamespace(num_classes=4))
    architecture = NasBench201Architecture.from_index(11_111)
    before = torch.get_rng_state()
    first, again = (_training_free(architecture, NasBench201Network(architecture, 2, 1, 4), trained) for _ in range(2))
    torch.set_rng_state(before)
    fresh = [first[name] for name in TRAINING_FREE]
    assert fresh == [again[name] for name in TRAINING_FREE] and None not in fresh


def test_a_killed_run_goes_on_and_ends_the_same(
    files: Path, whole: Path, genas: Callable[..., Any], tmp_path: Path
) -> None:
    cut = shutil.copytree(whole, tmp_path / "cut")
    # As after a kill in the middle of the fourth line.
    lines = (cut / "measurements.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "measurements.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    (cut / "correlations.csv").unlink()
    again = genas(*command(files, cut, "--training-free"))
    assert "already holds measurements: go on with --resume" in again.error
    assert genas(*command(files, cut, "--training-free", "--resume"), pictures=False).status == 0
    for name in ("measurements.jsonl", "correlations.csv", "scores.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    for different in (["--seed", "1"], ["--images", "48"]):
        other = genas(*command(files, cut, "--training-free", "--resume", *different))
        assert "measurements of other settings or architectures" in other.error


def test_the_truth_itself_has_tau_1_and_shuffled_it_has_about_0(tmp_path: Path, truth: dict[str, float]) -> None:
    architectures = choose(truth, 300, 0)
    values = [truth[str(architecture)] for architecture in architectures]
    shuffled = np.random.default_rng(0).permutation(values)
    raws = [
        {
            "architecture": str(architecture),
            "angle": float(noise) / 100,
            "statistics": {"cumulative": {"loss": 1.0 + index % 7, "top1": value / 100, "top5": 1.0, "losses": {}}},
        }
        for index, (architecture, value, noise) in enumerate(zip(architectures, values, shuffled, strict=True))
    ]
    settings = [Setting(name=metric, score=CombinedScore(metric=metric)) for metric in ("accuracy", "angle")]
    rows, left_out = write_report(tmp_path, raws, settings, truth, resamples=200)
    found = {row.name: row.ranking for row in rows}
    assert left_out == 0 and rows[0].name == "accuracy"
    perfect = found["accuracy"]
    assert (perfect.tau.value, perfect.rho.value, perfect.precision, perfect.gap) == pytest.approx((1, 1, 1, 0))
    assert found["angle"].tau.low < 0 < found["angle"].tau.high and abs(found["angle"].tau.value) < 0.1


def test_what_has_no_finite_score_is_left_out_of_all_columns(tmp_path: Path, truth: dict[str, float]) -> None:
    raws = []
    for index, architecture in enumerate(choose(truth, 20, 0)):
        loss = None if index in (3, 8) else 1.0 + (index * 7) % 20
        part = {"loss": loss, "top1": index / 20, "top5": 1.0, "losses": {}}
        raws.append({"architecture": str(architecture), "statistics": {"cumulative": part}})
    settings = [Setting(name="accuracy", score=CombinedScore(metric="accuracy"))]
    rows, left_out = write_report(tmp_path, raws, settings, truth, resamples=200)
    assert left_out == 2 and {row.ranking.count for row in rows} == {18}


def test_a_sum_of_columns_that_are_not_measured_is_refused_before_anything_is(
    files: Path, genas: Callable[..., Any], tmp_path: Path
) -> None:
    settings = [*SETTINGS, {"name": "with NASWOT", "rank_sum": ["flat", "NASWOT"]}]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    refused = genas(*command(files, tmp_path / "out", "--settings", str(tmp_path / "settings.yaml")))
    assert "with NASWOT: there is no column 'NASWOT'; there are: parameters, live FLOPs, flat" in refused.error
    assert not (tmp_path / "out").exists()


def test_numbers_of_images_are_those_of_the_run_or_of_the_setting(files: Path) -> None:
    trained = Scorer.from_run(files / "run", device="cpu")
    own = torch.cat([images for images, _ in trained.recalibration])
    more, fewer = (torch.cat([images for images, _ in trained.recalibration_on(n)]) for n in (128, 100))
    assert torch.equal(more, own) and torch.equal(fewer, own[:100])
    with pytest.raises(ValueError, match="Recalibration on 129 images: this run has 1 to 128 to train on"):
        trained.recalibration_on(129)


def test_samples_are_seeded_and_all_is_all(truth: dict[str, float]) -> None:
    assert len(set(choose(truth, None, 0))) == 15625
    assert choose(truth, 50, 1) == choose(truth, 50, 1) != choose(truth, 50, 2)
    sample = choose(truth, 50, 1)
    assert len(set(sample)) == 50
    assert sample != sorted(sample, key=lambda architecture: architecture.index)
    with pytest.raises(ValueError, match="3 to 15625 architectures, got 2"):
        choose(truth, 2, 0)
    lacking = {name: value for name, value in truth.items() if not name.startswith("|none")}
    with pytest.raises(ValueError, match="has no accuracy for 3125 of 15625 architectures"):
        choose(lacking, None, 0)


def test_the_shipped_settings_are_those_of_the_papers_tables() -> None:
    settings = {setting.name: setting.score for setting in load_settings("paper_tables")[0]}
    assert {score.alpha for score in settings.values() if score.metric == "flatness"} == {0, 0.1, 0.5, 1, 4, 16}
    assert {score.sigmas for score in settings.values()} == {
        *((1e-6, 5e-6, 1e-5), (5e-4, 1e-3, 2e-3), (2e-3, 1e-2, 2e-2), (2e-3, 2e-2, 4e-2)),
    }
    assert {score.where for score in settings.values()} == {"all", "cells"}
    assert {score.noise for score in settings.values()} == {"cumulative", "independent", "shared"}
    assert {setting.score.noise for setting in load_settings("hessian")[0]} == {"cumulative", "hessian"}
    assert settings["angle + flatness"].gamma == 16 and settings["accuracy + flatness"].gamma == 32


def test_settings_of_several_files_are_put_together(tmp_path: Path) -> None:
    settings, sums = load_settings("paper_tables", "estimators")
    first, second = load_settings("paper_tables"), load_settings("estimators")
    assert {item.name for item in settings} == {item.name for item in (*first[0], *second[0])}
    assert len(settings) < len(first[0]) + len(second[0]) and len(sums) == len(first[1]) + len(second[1])
    check_sums(sums, settings, training_free=True)
    # What won is what was tried.
    kept, kept_sums = load_settings("label_free")
    assert set(kept_sums) <= set(sums) and {item.name for item in kept} == {"accuracy"}
    check_sums(kept_sums, kept, training_free=True)
    (tmp_path / "other.yaml").write_text("- {name: flatness, metric: flatness, sigmas: [0.1, 0.2]}\n")
    with pytest.raises(config.ConfigError, match=r"other\.yaml says 'flatness' otherwise than the files before it"):
        load_settings("paper_tables", tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list of settings, got {}"),
        ("- {metric: accuracy}", "number 1: a setting must hold keys and values, among them name, got"),
        ("- {name: a, metric: sharpness}", "number 1: metric must be one of flatness, .*, got 'sharpness'"),
        ("- {name: a, metrik: accuracy}", "unknown key metrik .did you mean metric"),
        ("- {name: a, draws: 0}", "draws must be at least 1, got 0"),
        ("- {name: a, images: many}", "number 1: images must be a whole number or null, got 'many'"),
        ("- {name: a, recalibration_images: 0}", "recalibration_images must be at least 1"),
        ("- {name: a, noise: hessian, common: true}", "number 1: The noise 'hessian' cannot be common"),
        ("- {name: a, draws: many}", "draws must be a whole number, got 'many'"),
        ("- {name: a, rank_sum: [b]}", "rank_sum must be a list of 2 or more texts, got .'b'."),
        ("- {name: a, log_rank_sum: b}", "log_rank_sum must be a list of 2 or more texts, got 'b'"),
        ("- {name: a, rank_sum: [b, c]}", "have nothing to measure: only sums of ranks"),
        ("- {name: truth}", "The table itself has columns of the name truth"),
        ("- {name: a}\n- {name: a}", "several settings of the name a"),
        ("- {name: a, sigmas: [0.2, 0.1]}", "strictly increasing"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(config.ConfigError, match=message):
        load_settings(tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"--settings": "nowhere"},
            "There is no file of settings 'nowhere'; the package has: estimators, hessian, label_free, paper",
        ),
        ({"--images": "65"}, "--images asks for 65 images, the validation half has 64"),
        ({"--sample": "20000"}, "The sample must have 3 to 15625 architectures, got 20000"),
        ({"--dataset": "cifar100"}, "cifar100"),
        ({"--config": "quickstart_digits"}, "Name either --run"),
    ],
)
def test_what_the_command_cannot_do_it_says(
    files: Path, genas: Callable[..., Any], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    arguments = command(files, tmp_path / "out")
    for option, value in changes.items():
        arguments += [option, value]
    assert re.search(message, genas(*arguments).error)
    assert not (tmp_path / "out").exists()


def test_moved_images_are_those_of_a_run(files: Path, genas: Callable[..., Any], tmp_path: Path) -> None:
    arguments = command(files, tmp_path / "out")
    place = arguments.index("--run")
    arguments[place : place + 2] = ["--config", "nasbench201_cifar10_small", "--data-root", files]
    assert "--data-root belongs to --run" in genas(*arguments).error
    assert not (tmp_path / "out").exists()


def test_a_supernet_of_another_space_is_refused(tmp_path: Path, files: Path) -> None:
    trained = Scorer(SuperNet(10, 4, 2), CombinedScore(), validation=[])
    with pytest.raises(TypeError, match="The supernet is a SuperNet, expected a NasBench201SuperNet"):
        measure_all(trained, [], load_settings(files / "settings.yaml")[0], tmp_path / "out")


def test_a_slope_term_that_decides_next_to_nothing_is_told(tmp_path: Path, truth: dict[str, float]) -> None:
    raws = []
    for index, architecture in enumerate(choose(truth, 20, 0)):
        losses = {"cumulative, all, 0.001 0.002": [[1.0 + index, 1.0 + index + 1e-4 * (index % 5 + 1)]]}
        part = {"loss": 1.0 + index, "top1": 0.1, "top5": 1.0, "losses": losses}
        raws.append({"architecture": str(architecture), "statistics": {"cumulative": part}})
    scores = {f"alpha {alpha:g}": CombinedScore(sigmas=(1e-3, 2e-3), alpha=alpha) for alpha in (1.0, 1e-4)}
    settings = [Setting(name=name, score=score) for name, score in scores.items()]
    rows, left_out = write_report(tmp_path, raws, settings, truth, resamples=50)
    shares = {row.name: row.slope_share for row in rows if row.slope_share is not None}
    # The slope is at most 5e-4 / 1e-3, the depth at least 1 / 1e-3, and weighs 1 or 1e-4.
    assert shares["alpha 1"] < 5e-4 and shares["alpha 0.0001"] > 0.1
    (told,) = [line for line in remarks(rows, left_out) if "decides" in line]
    assert told == "The slope term decides less than 1% of the score in: alpha 1."


def test_what_a_score_adds_to_loss_and_to_accuracy(tmp_path: Path, truth: dict[str, float]) -> None:
    # What the loss and the accuracy know of the truth is independent; the angle knows what the accuracy knows.
    rng = np.random.default_rng(0)
    architectures = choose(truth, 300, 0)
    order = np.argsort(np.argsort([truth[str(architecture)] for architecture in architectures])) / 300
    loss, top1 = 2 - order + rng.normal(0, 0.3, 300), order / 2 + rng.normal(0, 0.1, 300)
    raws = [
        {
            "architecture": str(architecture),
            "angle": float(top1[index] + rng.normal(0, 0.02)),
            "statistics": {"cumulative": {"loss": loss[index], "top1": top1[index], "top5": 1.0, "losses": {}}},
        }
        for index, architecture in enumerate(architectures)
    ]
    settings = [Setting(name=metric, score=CombinedScore(metric=metric)) for metric in ("accuracy", "angle")]
    rows = {row.name: row for row in write_report(tmp_path, raws, settings, truth, resamples=200)[0]}
    assert set(rows["accuracy"].given) == {"loss"} and not rows["live FLOPs"].given
    assert rows["angle"].given["loss"].low > 0.1
    assert rows["angle"].given["accuracy"].low < 0 < rows["angle"].given["accuracy"].high
    with (tmp_path / "correlations.csv").open() as file:
        written = {row["score"]: row for row in csv.DictReader(file)}
    assert float(written["angle"]["tau_given_accuracy"]) == rows["angle"].given["accuracy"].value
    assert written["accuracy"]["tau_given_accuracy_low"] == "" and written["accuracy"]["tau_given_loss_low"] != ""
    head, *lines = table_of(list(rows.values()))
    assert head[8:] == ("tau given loss", "tau given accuracy", "slope") and {len(line) for line in lines} == {11}


@pytest.mark.parametrize(("share", "told"), [(0.004, True), (0.02, False)])
def test_a_search_tells_it_too(share: float, told: bool, tmp_path: Path) -> None:
    named = {"index": 0, "generation": 0, "origin": "random", "status": "ok", "score": 1.0}
    records = [Record(**named, shares={"slope": part}, losses=[1.0, 1.1]) for part in (0.001, share)]
    best = tuple(Found(NasBench201Architecture.from_index(7), record, None) for record in records)
    lines = list(_report(Outcome(tmp_path, best, 2, 0)))
    assert any("decides less than 1% of these scores" in line for line in lines) is told


def test_config_trains_first(files: Path, genas: Callable[..., Any], tmp_path: Path) -> None:
    few = ("--settings", str(files / "few.yaml"), "--sample", "3")
    done = genas(*training(files, tmp_path / "out", "--set", "seed=3", *few), pictures=False)
    assert done.status == 0, done.stderr
    assert json.loads((tmp_path / "out" / "search" / "architecture.json").read_text())["provenance"]["seed"] == 3
    assert (tmp_path / "out" / "correlations.csv").exists()


def test_after_so_many_minutes_what_there_is_is_reported_and_the_rest_follows(
    files: Path, genas: Callable[..., Any], tmp_path: Path
) -> None:
    """Time stands still until two are measured, and then is over."""
    clock = """
import time, types, genas_plugins.correlation.run as module
count = [0]
def monotonic():
    count[0] += 1
    return 0.0 if count[0] < LIMIT else 1e9
module.time = types.SimpleNamespace(monotonic=monotonic)
"""
    few = ("--settings", str(files / "few.yaml"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert genas(*command(files, whole, *few)).status == 0
    none = genas(*command(files, out, *few, "--minutes", "1"), before=clock.replace("LIMIT", "4"))
    assert none.status == 1
    assert none.stderr == "genas: 2 architectures are measured, a correlation takes 3: go on with --resume.\n"
    line = command(files, out, *few, "--resume")
    some = genas(*line, "--minutes", "1", before=clock.replace("LIMIT", "4"), pictures=False)
    assert some.status == 0, some.stderr
    assert "\n4 architectures." in some.stdout
    assert genas(*line).status == 0
    for name in ("measurements.jsonl", "scores.csv", "correlations.csv", "scatter.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    refused = genas(*command(files, tmp_path / "none", "--minutes", "0"))
    assert (refused.status, refused.stderr) == (1, "genas: --minutes must be above 0, got 0.0.\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The report's intervals of 95 % need 40.
        (["--resamples", "20"], "--resamples must be at least 40, got 20"),
        (["--resamples", "10000000000"], "--resamples must be at most"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--images", "1000000"], "--images asks for 1000000 images, the validation half has 64"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--device", "cudaa"], "--device must be cpu, cuda, cuda:1"),
        (["--device", "cuda:99"], "--device is cuda:99, but PyTorch finds"),
        (["--settings", "many.yaml"], "The setting 'a' asks for 100000 images, there are 64"),
        (["--settings", "again.yaml"], "The setting 'a' recalibrates on 100000 images; the run has 128 to train on"),
        (["--training-free", "--set", "score.recalibration_images=64"], "--training-free needs two batches of 64"),
    ],
)
def test_all_that_can_be_wrong_is_found_before_anything_is_trained(
    files: Path, genas: Callable[..., Any], tmp_path: Path, changes: list[str], message: str
) -> None:
    (tmp_path / "many.yaml").write_text("- {name: a, metric: accuracy, images: 100000}\n")
    (tmp_path / "again.yaml").write_text("- {name: a, metric: accuracy, recalibration_images: 100000}\n")
    more = [str(tmp_path / change) if change.endswith(".yaml") else change for change in changes]
    assert message in genas(*training(files, tmp_path / "out"), *more).error
    assert not (tmp_path / "out").exists()


def test_settings_of_a_run_are_not_set_again(files: Path, genas: Callable[..., Any], tmp_path: Path) -> None:
    refused = genas(*command(files, tmp_path / "out", "--set", "seed=3"))
    assert "--set belongs to --config" in refused.error
    assert not (tmp_path / "out").exists()


def test_measurements_that_are_there_are_found_before_a_training(
    files: Path, genas: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    assert "already holds measurements" in genas(*training(files, tmp_path / "out")).error
    assert not (tmp_path / "out" / "search").exists()
