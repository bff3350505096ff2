"""A search from a file to a folder: what it writes, that it repeats, and that neither kill nor full disk harm it."""

from __future__ import annotations

import json
import logging
import signal
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genas_plugins.checkpoints import load_supernet
from genas_plugins.darts.genotype import Genotype
from genas_plugins.experiment import config
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.search import History
from nni_strategy.run import run_experiment

RESULTS = {"genotype.json", "cells.svg", "cells.png", "search.png", "loss_curves.png"}
STATE = {"config.yaml", "run.json", "data.json", "initial.safetensors", "supernet.ckpt", "history.jsonl"}
# Time to hit a process in; sleeping changes no number.
SLOWLY = """
import time
import nni_strategy.training
from genas_plugins.experiment.scorer import Scorer
def slow(function):
    def slowed(*arguments, **keywords):
        time.sleep(0.15)
        return function(*arguments, **keywords)
    return slowed
module = nni_strategy.training.SupernetModule
module.training_step = slow(module.training_step)
Scorer.measure = slow(Scorer.measure)
"""
# Kill the process right before its n-th change of a file in the run folder.
KILL_AT = """
import os, signal, sys
left = [{count}]
def hook(event, arguments):
    if event not in ("open", "os.rename", "os.truncate", "os.chmod", "os.remove", "os.mkdir"):
        return
    name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
    if {folder!r} not in name or {pattern!r} not in name or event == "open" and not arguments[2] & 3:
        return
    if {event!r} in event:
        left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
# Let no file grow beyond a limit once a condition holds; the process gets an error, as from a full disk.
FULL_DISK = """
import os, resource, signal
import nni_strategy.training
from genas_plugins.experiment.scorer import Scorer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def watched(function):
    def watching(*arguments, **keywords):
        if {condition}:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        return function(*arguments, **keywords)
    return watching
module = nni_strategy.training.SupernetModule
module.training_step = watched(module.training_step)
Scorer.measure = watched(Scorer.measure)
"""


def test_the_first_search_of_a_process_is_quiet_and_tells_its_result(first_search: Any, finished: Any) -> None:
    done, folder = first_search
    assert (done.returncode, done.stderr) == (0, "")
    assert "The best 5 of 10 architectures:" in done.stdout
    rows = [line.split(None, 1)[1] for line in done.stdout.splitlines() if line[:1].isdigit()]
    best = sorted(folder.records, key=lambda record: -record["score"])[:5]
    for row, record in zip(rows, best, strict=True):
        assert row.startswith(f"{record['score']:.6g} ")
        assert row.endswith(record["candidate"])
        assert " ".join(f"{loss:.4f}" for loss in record["losses"]) in row
        assert f" {record['shares']['slope']:.1%} " in row
    assert f"are in {folder.path}." in done.stdout
    folder.assert_same(finished)


def test_nothing_is_written_outside_the_folder(genas: Any, darts: Any) -> None:
    assert [list(folder.iterdir()) for folder in genas.strangers] == [[], [], []]
    names = {path.name for path in darts.path.iterdir()}
    assert names == STATE | RESULTS | {"training"}


def test_config_is_the_experiment_with_every_setting(genas: Any, darts: Any) -> None:
    path = darts.path / "config.yaml"
    assert config.load(path) == config.load(genas.darts)
    assert path.read_text() == config.dump(config.load(genas.darts))
    assert yaml.safe_load(path.read_text())["training"]["weight_decay"] == 3e-4


def test_history_has_a_line_per_candidate_in_order(darts: Any) -> None:
    lines = [json.loads(line) for line in (darts.path / "history.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    assert [line["generation"] for line in lines] == [0] * 5 + [1] * 5
    assert [line["origin"] for line in lines] == ["random"] * 5 + ["mutation"] * 2 + ["crossover"] * 2 + ["random"]
    assert len({tuple(line["candidate"]) for line in lines}) == 10
    sigmas = (2e-3, 1e-2, 2e-2)
    for line in lines:
        Genotype.from_code(line["candidate"])
        assert line["status"] == "ok"
        assert line["seconds"] > 0
        assert line["sigmas"] == list(sigmas)
        # Eq. 4 and 5 of the paper, from what the line itself says.
        first, second, third = line["losses"]
        slope = abs(second - first) / 8e-3 + abs(third - second) / 1e-2
        flat = 1 / (slope + first / 2e-3 + 1e-5)
        assert line["flatness"] == pytest.approx(flat, rel=1e-12)
        assert line["score"] == pytest.approx(line["angle"] + 16 * flat / 2e-3, rel=1e-12)
        assert line["shares"]["slope"] == pytest.approx(slope * flat, rel=1e-12)
        assert 0 < line["angle"] < 1


def test_genotype_is_the_best_of_the_history_with_its_provenance(darts: Any) -> None:
    genotype = Genotype.load(darts.path / "genotype.json")
    best = sorted(darts.records, key=lambda record: -record["score"])
    assert list(genotype.code) == best[0]["candidate"]
    data = darts.winner
    assert {key: value for key, value in data["record"].items() if key != "seconds"} == best[0]
    assert [entry["code"] for entry in data["top"]] == [record["candidate"] for record in best[:5]]
    assert [entry["score"] for entry in data["top"]] == [record["score"] for record in best[:5]]
    # A fraction of the 32 test images.
    assert data["test_top1"] == data["top"][0]["test_top1"]
    for entry in data["top"]:
        assert entry["test_top1"] * 32 == pytest.approx(round(entry["test_top1"] * 32))
    provenance = data["provenance"]
    assert (provenance["data"], provenance["metric"], provenance["seed"]) == ("digits", "angle+flatness", 1)
    assert (provenance["candidates"], provenance["failed"], provenance["device"]) == (10, 0, "cpu")
    assert provenance["torch"] == torch.__version__


def test_pictures_are_pictures(darts: Any) -> None:
    for name in sorted(RESULTS):
        if name.endswith(".png"):
            with Image.open(darts.path / name) as image:
                pixels = np.asarray(image.convert("L"))
            assert min(pixels.shape) > 300, name
            assert len(np.unique(pixels)) > 20, name
    root = ET.parse(darts.path / "cells.svg").getroot()
    words = Counter(word for element in root.iter() if element.text for word in element.text.split())
    genotype = Genotype.load(darts.path / "genotype.json")
    expected = Counter(operation for operation, _ in (*genotype.normal, *genotype.reduce))
    assert {name: words[name] for name in expected} == expected


def test_supernet_and_initial_weights_load_and_differ_where_training_moved_them(darts: Any) -> None:
    initial = load_supernet(darts.path / "initial.safetensors")
    trained = load_supernet(darts.path / "supernet.ckpt")
    for supernet in (initial, trained):
        assert dict(supernet.arguments) == {"num_classes": 10, "init_channels": 4, "num_cells": 3, "stem": "cifar"}
    before, after = dict(initial.named_parameters()), dict(trained.named_parameters())
    assert before.keys() == after.keys()
    # Eight steps do not sample every operation; these take part in each.
    common = [name for name in before if name.startswith(("stem.", "classifier.")) or ".preprocess" in name]
    assert len(common) > 10
    assert not [name for name in common if torch.equal(before[name], after[name])]
    assert any(not torch.equal(before[name], after[name]) for name in before if "._ops." in name)
    assert darts.training["epoch"] == 3
    assert darts.training["global_step"] == 4 * 2


def test_a_candidate_has_the_score_of_the_history_whenever_it_is_measured(darts: Any) -> None:
    trained = Scorer.from_run(darts.path, device="cpu")
    best = max(darts.records, key=lambda record: record["score"])
    for record in (best, darts.records[0]):
        measured = trained.measure(Genotype.from_code(record["candidate"]))
        assert measured.score == pytest.approx(record["score"], rel=1e-12)
        assert measured.to_dict()["losses"] == pytest.approx(record["losses"], rel=1e-12)
    accuracy = trained.test_accuracy(Genotype.from_code(best["candidate"]))
    assert accuracy is not None
    assert accuracy.top1 == darts.winner["test_top1"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    shown = []

    class Display:
        def __init__(self, name: str, total: int, done: int) -> None:
            shown.append([name, total, done])

        def step(self, values: dict[str, Any]) -> None:
            shown[-1][2] += 1

        def close(self) -> None:
            shown[-1].append("closed")

    level = logging.getLogger("pytorch_lightning").level
    outcome = run_experiment(config.load(genas.config), tmp_path / "again", progress=Display)
    logging.getLogger("pytorch_lightning").setLevel(level)
    folder_at(tmp_path / "again").assert_same(finished)
    assert shown == [["training", 8, 8, "closed"], ["search", 10, 10, "closed"]]
    assert (outcome.folder, outcome.scored, outcome.failed) == (tmp_path / "again", 10, 0)
    assert [str(found.genotype) for found in outcome.best] == [e["code"] for e in finished.winner["top"]]
    assert [found.test_top1 for found in outcome.best] == [e["test_top1"] for e in finished.winner["top"]]
    assert genas.search(tmp_path / "other", "seed=2").wait().status == 0
    other = folder_at(tmp_path / "other")
    ours = {record["candidate"] for record in finished.records}
    assert not ours & {record["candidate"] for record in other.records}
    assert not torch.equal(*(next(iter(f.training["state_dict"].values())) for f in (finished, other)))


def test_another_metric_leaves_out_what_it_does_not_measure(
    genas: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    changes = ("score.metric=accuracy", "data.test_images=null", "score.recalibration_images=0", "search.generations=1")
    done = genas.search(tmp_path / "run", *changes, pictures=True).wait()
    assert done.status == 0, done.stderr
    folder = folder_at(tmp_path / "run")
    assert (folder.path / "search.png").exists() and not (folder.path / "loss_curves.png").exists()
    for record in folder.records:
        assert record["score"] == record["top1"]
        assert not {"losses", "flatness", "angle"} & record.keys()
        # Of 64 validation images.
        assert record["score"] * 64 == pytest.approx(round(record["score"] * 64))
    # 359 of the 1,797 digits are for testing.
    assert folder.winner["test_top1"] * 359 == pytest.approx(round(folder.winner["test_top1"] * 359))


def test_killed_at_every_stage_and_continued_it_ends_like_the_uninterrupted_run(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    checkpoint = folder.path / "supernet.ckpt"
    # Before the first checkpoint.
    first = genas.search(folder.path, before=SLOWLY)
    assert first.wait(until=(folder.path / "initial.safetensors").exists) is None
    first.signal(signal.SIGKILL)
    assert first.wait().status == -signal.SIGKILL
    assert (folder.path / "config.yaml").exists()
    assert not checkpoint.exists()
    # While the second epoch's checkpoint is written, but not yet in place: the first epoch's stays whole.
    hook = KILL_AT.format(folder=str(folder.path), pattern=".supernet-", event="os.rename", count=2)
    assert genas.search(folder.path, resume=True, before=hook).wait().status == -signal.SIGKILL
    load_supernet(checkpoint)
    assert folder.training["epoch"] == 0
    # At some moment of the training after that.
    third = genas.search(folder.path, resume=True, before=SLOWLY)
    written = checkpoint.stat().st_mtime_ns
    assert third.wait(until=lambda: checkpoint.stat().st_mtime_ns != written) is None
    third.signal(signal.SIGKILL)
    assert third.wait().status == -signal.SIGKILL
    assert 1 <= folder.training["epoch"] < 3
    # At some moment of the evolution, in its second generation.
    fourth = genas.search(folder.path, resume=True, before=SLOWLY)
    assert fourth.wait(until=lambda: len(folder.records) >= 6) is None
    fourth.signal(signal.SIGKILL)
    assert fourth.wait().status == -signal.SIGKILL
    assert 6 <= len(folder.records) < 10
    assert not (folder.path / "architecture.json").exists()
    with (folder.path / "history.jsonl").open("ab") as file:
        file.write(b'{"index": 6, "gener')
    last = genas.search(folder.path, resume=True).wait()
    told = f"{folder.path / 'history.jsonl'}: removed 1 cut-off last line, as a crash may leave.\n"
    assert (last.status, last.stderr) == (0, told)
    folder.assert_same(finished)


def test_a_full_disk_is_an_error_after_which_the_run_goes_on(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    checkpoint, history = folder.path / "supernet.ckpt", folder.path / "history.jsonl"
    again = f"Continue with: genas search --output {folder.path} --resume"
    # A checkpoint that does not fit.
    limit = f"os.path.getsize({str(checkpoint)!r}) // 2"
    full = FULL_DISK.format(condition=f"os.path.exists({str(checkpoint)!r})", limit=limit)
    done = genas.search(folder.path, before=full).wait()
    assert str(folder.path) in done.error
    assert done.error.endswith(again)
    assert folder.training["epoch"] == 0
    load_supernet(checkpoint)
    # A line of the history of which a part fits.
    condition = f"os.path.exists({str(history)!r}) and open({str(history)!r}).read().count(chr(10)) == 3"
    full = FULL_DISK.format(condition=condition, limit=f"os.path.getsize({str(history)!r}) + 10")
    done = genas.search(folder.path, resume=True, before=full).wait()
    assert done.error.endswith(again)
    assert folder.records == finished.records[:3]
    assert len(History(history, read_only=True).records) == 3
    assert folder.training["epoch"] == 3
    # The pictures at the end.
    condition = f"open({str(history)!r}).read().count(chr(10)) == 9"
    full = FULL_DISK.format(condition=condition, limit=30_000)
    done = genas.search(folder.path, resume=True, before=full, pictures=True).wait()
    assert done.error.endswith(again)
    assert len(folder.records) == 10
    assert not (folder.path / "architecture.json").exists()
    last = genas.search(folder.path, resume=True, pictures=True).wait()
    assert (last.status, last.stderr) == (0, "")
    folder.assert_same(finished)
    assert {path.name for path in folder.path.iterdir()} == {path.name for path in finished.path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("event", ["os.rename", "open", "os.mkdir"])
def test_killed_before_any_change_of_a_file_it_goes_on(
    event: str, genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    for count in range(1, 100):
        folder = folder_at(tmp_path / f"{count}")
        hook = KILL_AT.format(folder=str(folder.path), pattern="", event=event, count=count)
        killed = genas.search(folder.path, before=hook, pictures=True).wait()
        if killed.status == 0:
            assert count > 2
            return
        assert killed.status == -signal.SIGKILL
        resume = (folder.path / "config.yaml").exists()
        assert genas.search(folder.path, resume=resume, pictures=True).wait().status == 0, count
        folder.assert_same(finished)
    pytest.fail("A search changes fewer files than that.")


def test_a_finished_run_that_is_resumed_only_writes_its_results_again(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    folder.path.mkdir()
    for name in STATE:
        (folder.path / name).write_bytes((finished.path / name).read_bytes())
    written = {name: (folder.path / name).stat().st_mtime_ns for name in STATE}
    assert genas.search(folder.path, resume=True, pictures=True).wait().status == 0
    assert {name: (folder.path / name).stat().st_mtime_ns for name in STATE} == written
    folder.assert_same(finished)
    for name in ("search.png", "loss_curves.png"):
        assert (folder.path / name).read_bytes() == (finished.path / name).read_bytes()


# Poisons what matches in the trained supernet, right before the search.
POISON = """
import re, torch
from nni_strategy.strategy import GeNAS
def search(self, search=GeNAS.search):
    with torch.no_grad():
        for name, parameter in self.supernet.named_parameters():
            if re.search({pattern!r}, name):
                parameter.fill_(float("nan"))
    search(self)
GeNAS.search = search
"""


def test_candidates_without_a_finite_score_are_recorded_and_never_win(
    genas: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    # Both convolutions from the input of the first cell to its output.
    before = POISON.format(pattern=r"cells\.0\.edges\.3<-0\.")

    def is_bad(architecture: str) -> bool:
        return architecture.rpartition("+")[2].startswith("|nor_conv")

    done = genas.search(folder.path, "score.metric=flatness", before=before).wait()
    assert done.status == 0
    bad = {index for index, record in enumerate(folder.records) if is_bad(record["candidate"])}
    assert 0 < len(bad) < 10
    for index, record in enumerate(folder.records):
        assert record["status"] == ("failed" if index in bad else "ok")
        if index in bad:
            assert record["score"] is None
            assert record["reason"] == "The validation loss at sigma 0.002 is nan."
    assert not is_bad(folder.winner["architecture"])
    assert folder.winner["provenance"]["failed"] == len(bad)
    assert f"of 10 architectures, {len(bad)} failed:" in done.stdout
    before_resume = folder.records
    assert genas.search(folder.path, resume=True).wait().status == 0
    assert folder.records == before_resume


def test_a_search_in_which_all_fail_says_so(genas: Any, folder_at: Callable[[Path], Any], tmp_path: Path) -> None:
    done = genas.search(tmp_path / "run", "score.metric=flatness", before=POISON.format(pattern="classifier")).wait()
    assert done.status == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "genas: None of the 10 candidates has a finite score; the first failed because: "
        "The validation loss at sigma 0.002 is nan."
    )
    assert not (tmp_path / "run" / "architecture.json").exists()
    assert [record["status"] for record in folder_at(tmp_path / "run").records] == ["failed"] * 10
