"""A run knows what it was begun with: images, settings, weights; and it has one writer."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genas_plugins.correlation.run import choose
from genas_plugins.experiment import config
from genas_plugins.experiment.resuming import MAY_CHANGE, difference
from genas_plugins.locking import lock_folder
from genas_plugins.nasbench201 import NasBench201SearchSpace
from genas_plugins.search import History, HistoryError
from nni_strategy.strategy import GeNAS

ARCHITECTURE = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
STATE = ("config.yaml", "run.json", "data.json", "initial.safetensors", "supernet.ckpt", "history.jsonl")


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def killed_copy(finished: Any, folder: Path) -> Path:
    """A run as if it had been killed in its second generation."""
    folder.mkdir()
    for name in STATE:
        (folder / name).write_bytes((finished.path / name).read_bytes())
    lines = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "history.jsonl").write_bytes(b"".join(lines[:7]))
    return folder


@pytest.fixture
def killed(finished: Any, tmp_path: Path) -> Path:
    return killed_copy(finished, tmp_path / "run")


def test_a_search_of_darts_goes_on(genas: Any, darts: Any, folder_at: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = killed_copy(darts, tmp_path / "run")
    assert genas.search(folder, resume=True).wait().status == 0
    folder_at(folder).assert_same(darts)


# The images


@pytest.fixture(scope="module")
def begun(genas: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A search on an image folder that was killed after its first generation, and the images."""
    base = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "ab":
        (base / "images" / name).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / "images" / name / f"{number:02}.png")
    changes = ["data.name=image_folder", f"data.root={base / 'images'}", "data.train_images=null"]
    changes += ["data.validation_images=null", "data.test_images=null", "training.epochs=1", "training.batch_size=8"]
    changes += ["score.recalibration_images=8"]
    done = genas.search(base / "run", *changes).wait()
    assert done.status == 0, done.stderr
    history = base / "run" / "history.jsonl"
    history.write_bytes(b"".join(history.read_bytes().splitlines(keepends=True)[:5]))
    return base / "run", base / "images"


def remove_one(images: Path) -> None:
    (images / "a" / "07.png").unlink()


def rename_one(images: Path) -> None:
    (images / "a" / "07.png").rename(images / "a" / "99.png")


def edit_one(images: Path) -> None:
    path = images / "b" / "03.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def add_a_class(images: Path) -> None:
    shutil.copytree(images / "a", images / "c")


def move_one(images: Path) -> None:
    (images / "a" / "07.png").rename(images / "b" / "07b.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (remove_one, r"images: 'a' has 2\d images instead of 2\d"),
        (rename_one, "images: the images of 'a' differ in their names"),
        (edit_one, "the images of 'b' differ in their (sizes and )?contents"),
        (add_a_class, r"3 classes instead of 2, 1 new \(c\)"),
        (move_one, "'a' has 2"),
    ],
)
def test_other_images_are_refused_before_anything_is_written(
    change: Callable[[Path], None], told: str, genas: Any, begun: tuple[Path, Path], tmp_path: Path
) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(begun[0], run)
    shutil.copytree(begun[1], images)
    change(images)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(begun[1]), str(images)))
    before = state(run)
    for command in (["search", "--output", run, "--resume", "--quiet"], ["score", ARCHITECTURE, "--run", run]):
        done = genas(*command)
        message = done.error
        assert message.startswith(f"The data is not what the run in {run} began with (")
        with pytest.raises(ValueError, match=told):
            raise ValueError(message)
        assert state(run) == before


def test_images_that_were_moved_are_the_same(genas: Any, begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, images = tmp_path / "run", tmp_path / "elsewhere" / "pictures"
    shutil.copytree(begun[0], run)
    shutil.copytree(begun[1], images)
    assert genas.search(run, f"data.root={images}", resume=True).wait().status == 0
    assert len(History(run / "history.jsonl").records) == 10
    # From now on they are known to be there.
    assert config.load(run / "config.yaml").data.root == str(images)


def test_a_run_of_an_earlier_version_goes_on_and_learns_what_it_is_run_on(
    genas: Any, finished: Any, killed: Path, folder_at: Callable[[Path], Any]
) -> None:
    for name in ("run.json", "data.json"):
        (killed / name).unlink()
    assert genas.search(killed, resume=True).wait().status == 0
    folder_at(killed).assert_same(finished)
    for name in ("run.json", "data.json"):
        assert (killed / name).read_bytes() == (finished.path / name).read_bytes()


# The settings


def edited(folder: Path, section: str | None, key: str, value: Any) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (content if section is None else content[section])[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("score", "sigmas", [2e-3, 1e-2, 3e-2], r"score.sigmas is \(0.002, 0.01, 0.02\), not \(0.002, 0.01, 0.03\)"),
        (None, "seed", 2, "seed is 1, not 2"),
        ("search", "generations", 3, "search.generations is 2, not 3"),
        ("search", "population", 6, "search.population is 5, not 6"),
        ("score", "gamma", 8.0, "score.gamma is 16.0, not 8.0"),
        ("score", "recalibration_images", 16, "score.recalibration_images is 32, not 16"),
        ("training", "learning_rate", 0.02, "training.learning_rate is 0.025, not 0.02"),
        ("data", "random_labels", True, "data.random_labels is False, not True"),
    ],
)
def test_settings_that_were_edited_since_are_refused(
    section: str | None, key: str, value: Any, told: str, genas: Any, killed: Path
) -> None:
    edited(killed, section, key, value)
    before = state(killed)
    message = genas.search(killed, resume=True).wait().error
    assert f"{killed}/config.yaml is not what the run began with (" in message
    with pytest.raises(ValueError, match=told):
        raise ValueError(message)
    assert state(killed) == before


def test_where_and_on_what_is_computed_may_change(
    genas: Any, finished: Any, killed: Path, folder_at: Callable[[Path], Any]
) -> None:
    edited(killed, "training", "num_workers", 1)
    done = genas.search(killed, "training.accelerator=auto", "search.in_flight=2", resume=True).wait()
    assert done.status == 0, done.stderr
    folder = folder_at(killed)
    assert [r["candidate"] for r in folder.records] == [r["candidate"] for r in finished.records]
    assert [r["score"] for r in folder.records] == pytest.approx([r["score"] for r in finished.records])
    kept = config.load(killed / "config.yaml")
    assert (kept.training.num_workers, kept.training.accelerator, kept.search.in_flight) == (1, "auto", 2)


@pytest.mark.parametrize(
    "change",
    [
        *("seed=3", "deterministic=true", "space.name=darts", "space.init_channels=8", "space.num_cells=6"),
        *("space.stem=imagenet", "space.affine=false", "data.name=cifar10", "data.image_size=16", "data.storage=disk"),
        *("data.train_images=4", "data.flip=true", "training.epochs=2", "training.batch_size=3", "score.metric=angle"),
        *("training.precision=bf16-mixed", "training.devices=2", "score.draws=3", "score.common=true"),
        *("score.batch_size=7", "search.parents=3", "search.racing=0.9", "search.mutation_probability=0.5"),
    ],
)
def test_every_setting_that_decides_is_compared(change: str) -> None:
    base = ["space.name=nasbench201", "data.name=cifar100"]
    before, now = (config.load("quickstart_digits", [*base, *more]) for more in ([], [change]))
    key, _, value = change.partition("=")
    told = str(difference(before, now))
    assert told.startswith(f"{key} is ") and told.lower().endswith(f", not {value}")


def test_what_may_change_is_not_compared() -> None:
    free = ["data.root=x", "data.download=true", "training.accelerator=cpu", "training.num_workers=4"]
    before, now = (config.load("quickstart_digits", more) for more in ([], [*free, "search.in_flight=3"]))
    assert before != now and difference(before, now) is None
    assert not [name for name in MAY_CHANGE if name.startswith("score.")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"experiment": {"sed": 1}}', '{"weights": 3}', "[" * 100_000])
def test_a_damaged_note_of_the_beginning_is_refused_with_what_to_do(content: str, genas: Any, killed: Path) -> None:
    (killed / "run.json").write_text(content)
    message = genas.search(killed, resume=True).wait().error
    assert f"{killed}/run.json" in message and "remove it if you are sure" in message and len(message) < 600


# The weights


@pytest.mark.parametrize("name", ["supernet.ckpt", "initial.safetensors"])
def test_other_weights_than_the_candidates_were_scored_with_are_refused(name: str, genas: Any, killed: Path) -> None:
    path = killed / name
    if name.endswith(".ckpt"):
        content = torch.load(path, weights_only=True)
        next(iter(content["state_dict"].values())).add_(1e-3)
        torch.save(content, path)
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        content = load_file(path)
        next(value for value in content.values() if value.is_floating_point()).add_(1e-3)
        save_file(content, path, metadata)
    before = state(killed)
    message = genas.search(killed, resume=True).wait().error
    assert message.startswith(f"{path} is not the one that the candidates of this run were scored with: ")
    assert state(killed) == before
    # Without what was scored, there is nothing to mix.
    (killed / "history.jsonl").unlink()
    assert genas.search(killed, resume=True).wait().status == 0


def test_a_checkpoint_that_was_saved_again_is_the_same(
    genas: Any, finished: Any, killed: Path, folder_at: Callable[[Path], Any]
) -> None:
    torch.save(torch.load(killed / "supernet.ckpt", weights_only=True), killed / "supernet.ckpt")
    assert genas.search(killed, resume=True).wait().status == 0
    folder_at(killed).assert_same(finished)


# A history through the Python interface


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "angle+flatness", "sigmas": (2e-3, 2e-2)}, r"Line 1 of .* at the sigmas \[0.002, 0.01, 0.02\]"),
        ({"metric": "flatness"}, "Line 1 of .* was measured with angle, this search goes by flatness"),
        ({"metric": "accuracy+flatness"}, "Line 1 of .* was measured with angle"),
    ],
)
def test_a_history_of_another_score_is_refused(settings: dict[str, Any], message: str, finished: Any) -> None:
    history = History(finished.path / "history.jsonl", read_only=True)
    GeNAS(metric="angle+flatness", history=history)
    with pytest.raises(HistoryError, match=message):
        GeNAS(history=history, **settings)


# Damage and one writer


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        (lambda last: b"\n", "1 empty line"),
        (
            lambda last: last + b"\0" * 512 + b'\n{"index": 7, "gen',
            "1 empty line and 1 repeated line and 1 cut-off last line",
        ),
    ],
)
def test_what_a_crash_left_at_the_end_of_the_history_is_told_and_removed(
    tail: Callable[[bytes], bytes],
    told: str,
    genas: Any,
    finished: Any,
    killed: Path,
    folder_at: Callable[[Path], Any],
) -> None:
    path = killed / "history.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with path.open("ab") as file:
        file.write(tail(last))
    done = genas.search(killed, resume=True).wait()
    assert (done.status, done.stderr) == (0, f"{path}: removed {told}, as a crash may leave.\n")
    folder_at(killed).assert_same(finished)


@pytest.mark.parametrize("key", ["score", "shares", "status", "candidate", "seconds", "losses"])
def test_a_record_without_a_key_is_refused_by_its_line(key: str, genas: Any, killed: Path, tmp_path: Path) -> None:
    path = killed / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[2][key]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = state(killed)
    for command in (
        ["search", "--output", killed, "--resume", "--quiet"],
        ["plot", "search", killed, tmp_path / "search.png"],
        ["plot", "losses", killed, tmp_path / "losses.png"],
    ):
        message = genas(*command).error
        assert message.startswith(f"Line 3 of {path} ") and "remove it and all lines after it" in message
    assert state(killed) == before


def test_of_two_searches_in_one_folder_one_is_refused(
    genas: Any, finished: Any, killed: Path, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    with lock_folder(killed):
        message = genas.search(killed, resume=True).wait().error
        assert message.startswith(f"{killed} is in use by process ")
    with lock_folder(tmp_path / "new"):
        assert f"{tmp_path}/new is in use by process " in genas.search(tmp_path / "new").wait().error
    # Two real ones: whichever comes second is refused, or finds the work done.
    both = [genas.search(killed, resume=True) for _ in range(2)]
    ends = [running.wait() for running in both]
    assert all(end.status == 0 or "is in use by process" in end.error for end in ends)
    assert any(end.status == 0 for end in ends)
    folder_at(killed).assert_same(finished)
    assert not (killed / ".lock").exists()


def test_what_a_killed_search_left_half_written_is_removed(genas: Any, killed: Path) -> None:
    left = killed / ".supernet-abcd1234.partial.ckpt"
    left.write_bytes(b"half")
    (killed / ".mine").write_text("x")
    assert genas.search(killed, resume=True).wait().status == 0
    assert not left.exists() and (killed / ".mine").exists()


# genas correlate


@pytest.fixture(scope="module")
def correlated(
    genas: Any, tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A command that has run to its end, and its folder."""
    base = tmp_path_factory.mktemp("correlated")
    rows = [("arch", "cifar10")]
    everything = {str(architecture): 1.0 for architecture in NasBench201SearchSpace().architectures()}
    # Of the sample that is asked for; each process reads the whole file.
    for architecture in choose(everything, 6, 0):
        rows.append((str(architecture), str(10 + architecture.index * 7919 % 8000 / 100)))
    with (base / "truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (base / "settings.yaml").write_text("- {name: flat, metric: flatness, sigmas: [0.01, 0.05]}\n")
    search = {"population": 2, "generations": 1, "parents": 1, "mutants": 0, "crossovers": 0}
    experiment = tiny(training={"epochs": 1}, score={"metric": "accuracy"}, search=search)
    (base / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    line = ["correlate", "--truth", base / "truth.csv", "--settings", base / "settings.yaml", "--sample", "6"]
    line += ["--resamples", "50", "--quiet"]
    done = genas(*line, "--config", base / "experiment.yaml", "--output", base / "out", pictures=False)
    assert done.status == 0, done.stderr
    return [*line, "--run", str(base / "run")], base


@pytest.fixture
def measured(correlated: tuple[list[str], Path], tmp_path: Path) -> tuple[list[str], Path]:
    """The same for a run of its own, killed behind its third architecture."""
    line, base = correlated
    shutil.copytree(base / "out" / "search", tmp_path / "run")
    shutil.copytree(base / "out", tmp_path / "out", ignore=shutil.ignore_patterns("search", "*.csv", "*.png"))
    path = tmp_path / "out" / "measurements.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    return [*line[:-1], str(tmp_path / "run"), "--output", str(tmp_path / "out")], tmp_path / "out"


def test_a_killed_correlation_goes_on(genas: Any, correlated: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    assert genas(*line, "--resume", pictures=False).status == 0
    for name in ("measurements.jsonl", "correlations.csv", "scores.csv"):
        assert (out / name).read_bytes() == (correlated[1] / "out" / name).read_bytes()


def test_a_correlation_of_another_supernet_is_refused(genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    path = out.parent / "run" / "supernet.ckpt"
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values())).add_(1e-3)
    torch.save(content, path)
    before = state(out)
    assert "(other supernet)" in genas(*line, "--resume").error
    assert state(out) == before


@pytest.mark.parametrize("key", ["seed", "images", "training_free", "architectures", "settings", "recalibration"])
def test_a_correlation_otherwise_is_refused_by_name(key: str, genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    told = json.loads((out / "settings.json").read_text())
    told[key] = told[key][:-1] if isinstance(told[key], list) else 7
    (out / "settings.json").write_text(json.dumps(told))
    before = state(out)
    message = genas(*line, "--resume").error
    assert "measurements of other settings or architectures" in message and key in message.partition("(")[2]
    assert state(out) == before


def test_a_correlation_of_an_earlier_version_goes_on(genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    told = json.loads((out / "settings.json").read_text())
    keys = ("settings", "images", "seed", "training_free", "architectures")
    (out / "settings.json").write_text(json.dumps({key: told[key] for key in keys}, indent=1))
    (out / "data.json").unlink()
    assert genas(*line, "--resume", pictures=False).status == 0
    assert json.loads((out / "settings.json").read_text()) == told and (out / "data.json").exists()


def test_damaged_measurements_are_repaired_or_refused(genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    path = out / "measurements.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole, whole[-1], b"\0" * 64 + b"\n", b"\n"]))
    done = genas(*line, "--resume", pictures=False)
    assert done.stderr == f"{path}: removed 2 empty lines and 1 repeated line, as a crash may leave.\n"
    assert done.status == 0
    for key in ("statistics", "architecture"):
        record = {name: value for name, value in json.loads(whole[1]).items() if name != key}
        path.write_bytes(whole[0] + json.dumps(record).encode() + b"\n" + whole[2])
        assert genas(*line, "--resume").error.startswith(f"Line 2 of {path} ")


def test_of_two_correlations_in_one_folder_one_is_refused(genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    with lock_folder(out):
        assert genas(*line, "--resume").error.startswith(f"{out} is in use by process ")
    both = [genas.start(*line, "--resume", pictures=False) for _ in range(2)]
    ends = [running.wait() for running in both]
    assert all(end.status == 0 or "is in use by process" in end.error for end in ends)
    names = [json.loads(text)["architecture"] for text in (out / "measurements.jsonl").read_text().splitlines()]
    assert len(names) == len(set(names)) == 6


# How to go on

SLOWLY = """
import time
import genas_plugins.correlation.run, nni_strategy.training
from genas_plugins.experiment.scorer import Scorer
def slow(function):
    def slowed(*arguments, **keywords):
        time.sleep(0.15)
        return function(*arguments, **keywords)
    return slowed
module = nni_strategy.training.SupernetModule
module.training_step = slow(module.training_step)
Scorer.measure = slow(Scorer.measure)
genas_plugins.correlation.run.measure_raw = slow(genas_plugins.correlation.run.measure_raw)
"""
SWALLOWED = (
    SLOWLY
    + """
import os, signal
steps = [0]
def training_step(self, *arguments, step=module.training_step, **keywords):
    steps[0] += 1
    if steps[0] == 2:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
    return step(self, *arguments, **keywords)
module.training_step = training_step
"""
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_training_and_in_the_search_says_how_to_go_on(
    number: signal.Signals, status: int, genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    # The folder's name has a space in it.
    folder = folder_at(tmp_path / "a run")
    conditions = ((folder.path / "supernet.ckpt").exists, lambda: len(folder.records) >= 7)
    for resume, condition in enumerate(conditions):
        running = genas.search(folder.path, resume=bool(resume), before=SLOWLY)
        assert running.wait(until=condition) is None
        running.signal(number)
        done = running.wait()
        assert done.stderr == f"\nInterrupted. Continue with: genas search --output '{folder.path}' --resume\n"
        assert (done.status, done.stdout) == (status, "")
        assert {path.name for path in folder.path.iterdir()} <= {*STATE, "training"}
    assert folder.training["epoch"] == 3
    assert 7 <= len(folder.records) < 10
    last = genas.search(folder.path, resume=True).wait()
    assert (last.status, last.stderr) == (0, "")
    folder.assert_same(finished)


def test_an_interrupt_that_something_swallows_is_not_lost(genas: Any, tmp_path: Path) -> None:
    done = genas.search(tmp_path / "run", before=SWALLOWED).wait()
    assert done.status == 130 and done.stderr.count("Continue with: ") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_correlation_says_how_to_go_on(
    number: signal.Signals, status: int, genas: Any, measured: tuple[list[str], Path]
) -> None:
    line, out = measured
    running = genas.start(*line, "--resume", before=SLOWLY)
    assert running.wait(until=lambda: (out / "measurements.jsonl").read_bytes().count(b"\n") > 3) is None
    running.signal(number)
    done = running.wait()
    words = " ".join(map(str, line))
    assert done.stderr == f"\nInterrupted. Continue with: genas {words} --resume\n" and done.status == status
    assert genas(*line, "--resume", pictures=False).status == 0


FULL = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""


def test_a_full_disk_under_a_correlation_is_told_by_its_name(genas: Any, measured: tuple[list[str], Path]) -> None:
    line, out = measured
    size = (out / "measurements.jsonl").stat().st_size
    message = genas(*line, "--resume", before=FULL.format(limit=size + 10)).error
    assert message.startswith(f"{out} cannot be written to: File too large. Make room. Continue with: genas correlate ")
    assert (out / "measurements.jsonl").stat().st_size == size
    assert genas(*line, "--resume", pictures=False).status == 0
