"""The ``genas`` command: what it prints, and that a mistake is one line and no traceback."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genas_plugins.cli import main
from genas_plugins.darts.zoo import ZOO
from genas_plugins.experiment import config

ARCHITECTURE = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.path, folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """An image folder of two classes with twelve pictures of 8 pixels each to train on, and four to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    yield tmp_path / "images"


def image_settings(root: Path) -> list[str]:
    return [
        "data.name=image_folder",
        f"data.root={root}",
        "data.image_size=8",
        "data.train_images=null",
        "data.validation_images=null",
        "data.test_images=null",
        "score.recalibration_images=8",
    ]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch '{self.target}'",)


# Refused starts


def test_a_folder_that_holds_a_run_is_not_overwritten(genas: Any, finished: Any) -> None:
    before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    message = genas.search(finished.path).wait().error
    assert message == f"{finished.path} already holds a run: continue it with --resume, or choose another --output."
    assert {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_not_written_to(genas: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    message = genas.search(tmp_path).wait().error
    assert message == f"{tmp_path} is not an empty folder: choose another --output."
    assert genas.search(tmp_path / "thesis.tex").wait().error.startswith(f"{tmp_path}/thesis.tex is not an empty")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_needs_a_run(genas: Any, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    message = genas("search", "--config", genas.config, "--output", folder, "--resume").error
    assert message == f"{folder} holds no run to resume (no config.yaml); start it without --resume."
    message = genas("search", "--output", folder, "--resume").error
    assert message == f"{folder} holds no run to resume (no config.yaml); start it with --config."
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("seed=3", "seed is 1, not 3"),
        ("search.parents=3", "search.parents is 2, not 3"),
        ("score.sigmas=[0.1, 0.2]", "score.sigmas is (0.002, 0.01, 0.02), not (0.1, 0.2)"),
    ],
)
def test_resume_with_another_experiment_names_the_difference(
    change: str, difference: str, genas: Any, finished: Any
) -> None:
    for source in (["--config", genas.config], []):
        message = genas("search", *source, "--set", change, "--output", finished.path, "--resume").error
        assert message == (
            f"{finished.path} holds a run of another experiment ({difference}): resume it without --config and --set, "
            "or choose another --output."
        )


def test_without_a_config_the_shipped_ones_are_listed(genas: Any, tmp_path: Path) -> None:
    message = genas("search", "--output", tmp_path / "run").error
    assert message.startswith("--config is missing")
    for name in config.config_names():
        assert name in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["serch.population=3"], "tiny.yaml: unknown key serch (did you mean search?)"),
        (["search.population"], "--set takes section.key=value"),
        (["score.sigmas=[2, 1]"], "tiny.yaml: score: sigmas must be"),
        (["data.name=cifar10"], "cifar10 needs root"),
        (["data.name=cifar10", "data.root=/nonexistent"], "/nonexistent"),
        (["data.name=imagenet16-120", "data.root=/nonexistent"], "/nonexistent"),
        (["data.name=image_folder", "data.root=/nonexistent"], "There is no image folder at /nonexistent"),
        (
            ["score.recalibration_images=65"],
            "recalibration_images=65 asks for more images than the train half has (64)",
        ),
        (["data.test_images=1000"], "test_images=1000 asks for more images than the test set has (359)"),
        (["training.accelerator=abacus"], "abacus"),
        (["space.num_cells=0"], "space: num_cells"),
    ],
)
def test_a_search_that_cannot_start_leaves_nothing(changes: list[str], words: str, genas: Any, tmp_path: Path) -> None:
    assert words in genas.search(tmp_path / "run", *changes).wait().error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_an_accelerator_that_is_not_there_is_a_sentence(genas: Any, tmp_path: Path) -> None:
    message = genas.search(tmp_path / "run", "training.accelerator=cuda").wait().error
    assert "CUDAAccelerator" in message
    assert not (tmp_path / "run").exists()


def test_a_class_without_images_is_named(genas: Any, images: Path, tmp_path: Path) -> None:
    (images / "train" / "emu").mkdir()
    message = genas.search(tmp_path / "run", *image_settings(images)).wait().error
    assert "emu" in message
    assert not (tmp_path / "run").exists()


def test_a_run_on_an_image_folder_finds_its_images_where_they_were_moved_to(
    genas: Any, images: Path, tmp_path: Path, folder_at: Any
) -> None:
    changes = [*image_settings(images), "search.generations=1", "training.epochs=1"]
    done = genas.search(tmp_path / "run", *changes).wait()
    assert (done.status, done.stderr) == (0, "")
    winner = folder_at(tmp_path / "run").winner
    # Eight test images.
    assert winner["test_top1"] * 8 == pytest.approx(round(winner["test_top1"] * 8))
    arguments = ("score", winner["architecture"], "--run", tmp_path / "run")
    moved = images.rename(tmp_path / "moved")
    message = genas(*arguments).error
    assert f"no image folder at {images}" in message and f"data.root {str(images)!r}, seen from" in message
    done = genas(*arguments, "--data-root", moved)
    assert (done.status, done.stderr) == (0, "")
    assert f"{winner['record']['score']:.6g}" in done.stdout
    assert f"no image folder at {tmp_path / 'gone'}" in genas(*arguments, "--data-root", tmp_path / "gone").error


# Damaged and foreign files


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"half"])
def test_a_damaged_supernet_is_refused(content: bytes, genas: Any, copy: Path) -> None:
    path = copy / "supernet.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    for arguments in (("score", ARCHITECTURE, "--run", copy), ("search", "--output", copy, "--resume")):
        assert f"{path} is damaged or is not a checkpoint" in genas(*arguments).error


def test_a_supernet_that_would_execute_code_is_not_loaded(genas: Any, copy: Path, tmp_path: Path) -> None:
    path, target = copy / "supernet.ckpt", tmp_path / "executed"
    bare = io.BytesIO()
    pickle.dump(Evil(target), bare, protocol=2)
    zipped = io.BytesIO()
    torch.save({"state_dict": {"cells.0.preprocess0.op.1.weight": Evil(target)}}, zipped)
    for content in (bare, zipped):
        path.write_bytes(content.getvalue())
        for arguments in (("score", ARCHITECTURE, "--run", copy), ("search", "--output", copy, "--resume")):
            assert str(path) in genas(*arguments).error
    assert not target.exists()
    # The trap works.
    bare.seek(0)
    pickle.load(bare)
    assert target.exists()


def test_a_supernet_of_another_training_is_not_continued(genas: Any, copy: Path) -> None:
    path = copy / "supernet.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, path)
    message = genas("search", "--output", copy, "--resume").error
    assert message == f"{path} holds no training to continue (no loops): it is not this run's own."
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path)
    assert f"{path} holds no cells" in genas("score", ARCHITECTURE, "--run", copy).error


def test_damaged_initial_weights_and_history_are_refused(genas: Any, copy: Path) -> None:
    lines = (copy / "history.jsonl").read_text().splitlines()
    (copy / "history.jsonl").write_text(f"{lines[0]}\nnot JSON\n")
    assert f"Line 2 of {copy}/history.jsonl is not JSON" in genas("search", "--output", copy, "--resume").error
    assert f"Line 2 of {copy}/history.jsonl is not JSON" in genas("plot", "search", copy, copy / "new.png").error
    (copy / "history.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"candidate": ARCHITECTURE}) + "\n")
    message = genas("search", "--output", copy, "--resume", "--quiet").error
    assert "the history belongs to other settings or another seed" in message
    (copy / "initial.safetensors").write_bytes(b"x" * 100)
    for arguments in (("score", ARCHITECTURE, "--run", copy), ("search", "--output", copy, "--resume")):
        assert f"{copy}/initial.safetensors is damaged" in genas(*arguments).error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"normal": [["sep_conv_3x3", 0]]}', 'Expected a genotype with "format": "genas-genotype", got None'),
        ("[1, 2]", 'Expected a genotype with "format": "genas-genotype", got \'list\''),
        ("not JSON", "is not a JSON file"),
    ],
)
def test_a_foreign_genotype_is_refused(text: str, words: str, genas: Any, darts: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text)
    for arguments in (("score", path, "--run", darts.path), ("plot", "cells", path, tmp_path / "cells.svg")):
        message = genas(*arguments).error
        assert words in message
        assert str(path) in message


# Score


def test_score_gives_the_score_of_the_history(genas: Any, darts: Any) -> None:
    done = genas("score", darts.path / "genotype.json", "--run", darts.path, "--device", "cpu")
    assert (done.status, done.stderr) == (0, "")
    record = darts.winner["record"]
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {key: value.strip() for key, value in rows.items()}
    assert rows == {
        "metric": "angle+flatness",
        "score": f"{record['score']:.6g}",
        "share of angle": f"{record['shares']['angle']:.1%}",
        "share of flatness": f"{record['shares']['flatness']:.1%}",
        "share of slope": f"{record['shares']['slope']:.1%}",
        **{f"loss at sigma {s:g}": f"{x:.6f}" for s, x in zip(record["sigmas"], record["losses"], strict=True)},
        "angle / pi": f"{record['angle']:.6f}",
        "test top-1": f"{darts.winner['test_top1']:.2%}",
    }


@pytest.mark.parametrize("classes", [1, 3])
def test_images_of_other_classes_are_refused(classes: int, genas: Any, images: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    done = genas.search(run, *image_settings(images), "search.generations=1").wait()
    assert done.status == 0, done.stderr
    for split in ("train", "test"):
        for number in range(classes):
            name = ("cat", "dog", "owl")[number]
            shutil.copytree(images / split / ("dog" if name == "owl" else name), other / split / name)
    # One class is refused by who reads the images; an older run has not stored which it was trained on.
    for words in ("3 classes instead of 2", "The supernet has 2 classes, and the images (image_folder) have 3"):
        found = genas("score", ARCHITECTURE, "--run", run, "--data-root", other)
        assert found.status == 1 and len(found.stderr.splitlines()) == 1
        assert classes == 1 or words in found.stderr
        (run / "data.json").unlink(missing_ok=True)
    shutil.rmtree(images)
    other.rename(images)
    (run / "history.jsonl").unlink()
    (run / "supernet.ckpt").unlink()
    again = genas.search(run, resume=True).wait()
    assert again.status == 1 and len(again.stderr.splitlines()) == 1, again.stderr
    assert not (run / "supernet.ckpt").exists()


@pytest.mark.parametrize(("space", "metric"), [("darts", "flatness"), ("config", "angle+flatness")])
def test_a_search_in_float64_is_resumed_and_scored_in_it(
    space: str, metric: str, genas: Any, tmp_path: Path, folder_at: Any
) -> None:
    run = tmp_path / "run"
    settings = ["training.precision=64-true", "training.epochs=1", "data.train_images=32", f"score.metric={metric}"]
    settings += ["search={population: 3, generations: 1, parents: 1, mutants: 1, crossovers: 1}"]
    settings += ["space.num_cells=2"] * (space == "darts")
    assert genas.search(run, *settings, config=getattr(genas, space)).wait().status == 0
    before = folder_at(run).records
    assert all(record["status"] == "ok" for record in before)
    (run / "history.jsonl").write_text("".join((run / "history.jsonl").read_text().splitlines(True)[:2]))
    assert genas.search(run, resume=True).wait().status == 0
    assert folder_at(run).records == before
    best = folder_at(run).winner["record"]
    code = best["candidate"] if space == "config" else " ".join(map(str, best["candidate"]))
    scored = genas("score", code, "--run", run, "--device", "cpu")
    assert f"{best['score']:.6g}" in scored.stdout and f"{best['losses'][0]:.6f}" in scored.stdout


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_one_image_more_than_batches_take(storage: str, genas: Any, tmp_path: Path) -> None:
    # Features of one pixel, which a batch of one image has no variance of.
    for name in "ab":
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = [
        *("data.name=image_folder", f"data.root={tmp_path / 'images'}", f"data.storage={storage}"),
        *("data.train_images=17", "data.validation_images=null", "data.test_images=null"),
        *("space.stem=imagenet", "space.num_cells=2", "training.epochs=1", "training.batch_size=16"),
        "search={population: 2, generations: 1, parents: 1, mutants: 0, crossovers: 0}",
        *("score.recalibration_images=17", "score.recalibration_batch_size=16"),
    ]
    done = genas.search(tmp_path / "run", *settings, config=genas.darts).wait()
    assert done.status == 0, done.stderr
    # A batch size of one is what cannot be mended.
    refused = genas.search(tmp_path / "single", *settings, "training.batch_size=1", config=genas.darts).wait()
    assert "The training loader has a batch of one image" in refused.error
    assert not (tmp_path / "single" / "supernet.ckpt").exists()


def test_score_takes_names_and_codes_metrics_and_sigmas(genas: Any, darts: Any, finished: Any) -> None:
    code = " ".join(map(str, ZOO["genas_flatness_c10"].genotype.code))
    by_name = genas("score", "genas_flatness_c10", "--run", darts.path, "--metric", "accuracy")
    by_code = genas("score", code, "--run", darts.path, "--metric", "accuracy")
    assert (by_name.status, by_name.stderr) == (0, "")
    assert by_name.stdout == by_code.stdout
    assert "validation top-1" in by_name.stdout
    # A node may have one input, though the search has none of these.
    fair = genas("score", "fairdarts_b_c10", "--run", darts.path, "--metric", "accuracy")
    assert (fair.status, fair.stderr) == (0, "") and "validation top-1" in fair.stdout
    assert "loss at sigma" not in by_name.stdout
    other = genas("score", ARCHITECTURE, "--run", finished.path, "--metric", "flatness", "--sigmas", "0.5", "1.5")
    assert [line.split()[3] for line in other.stdout.splitlines() if line.startswith("loss")] == ["0.5", "1.5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "sharpness"], "Unknown metric 'sharpness'; valid metrics: flatness, angle"),
        (["--sigmas", "2", "1"], "sigmas must be at least two positive, strictly increasing numbers"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_score_refuses_wrong_settings(arguments: list[str], words: str, genas: Any, finished: Any) -> None:
    assert words in genas("score", ARCHITECTURE, "--run", finished.path, *arguments).error


def test_score_needs_a_run_and_a_genotype(genas: Any, darts: Any, tmp_path: Path) -> None:
    message = genas("score", "genas_flatness_c10", "--run", tmp_path).error
    assert message == f"{tmp_path} is not the folder of a search with a trained supernet: no config.yaml."
    shutil.copy(darts.path / "config.yaml", tmp_path)
    assert genas("score", "genas_flatness_c10", "--run", tmp_path).error.endswith("no supernet.ckpt.")
    message = genas("score", "genas_flatnes_c10", "--run", darts.path).error
    assert "did you mean genas_flatness_c10?" in message
    assert "8" in genas("score", "1 2 3", "--run", darts.path).error


# Zoo, plot, help


def test_zoo_lists_the_published_genotypes_as_they_are_counted(genas: Any) -> None:
    stored, measured = genas("zoo"), genas("zoo", "--measure")
    assert (stored.status, stored.stderr, measured.status, measured.stderr) == (0, "", 0, "")
    # The stored counts are what counting gives.
    assert stored.stdout == measured.stdout
    rows = stored.stdout.split("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(ZOO)
    assert len(rows) == 16
    # Table 4 of the paper.
    (row,) = (row.split() for row in rows if row.startswith("genas_flatness_c100 "))
    assert " ".join(row) == "genas_flatness_c100 CIFAR-100 flatness 46 5.195 5.2 579.5 580 76.05 92.64"


def test_plot_draws_all_three(genas: Any, finished: Any, tmp_path: Path) -> None:
    cells = genas("plot", "cells", "genas_flatness_c100", tmp_path / "cells.svg")
    assert (cells.status, cells.stdout, cells.stderr) == (0, f"{tmp_path}/cells.svg\n", "")
    assert ET.parse(tmp_path / "cells.svg").getroot().tag.endswith("svg")
    for what in ("search", "losses"):
        done = genas("plot", what, finished.path, tmp_path / f"{what}.png")
        assert (done.status, done.stdout, done.stderr) == (0, f"{tmp_path}/{what}.png\n", "")
        with Image.open(tmp_path / f"{what}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    one = genas("plot", "losses", finished.path, tmp_path / "one.png", "--top", "1")
    assert one.status == 0
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "losses.png").read_bytes()


def test_plot_refuses_what_it_cannot_draw(genas: Any, finished: Any, tmp_path: Path) -> None:
    for what in ("search", "losses"):
        message = genas("plot", what, tmp_path, tmp_path / "x.png").error
        assert message == f"{tmp_path} is not the folder of a search: no history.jsonl."
    record = {"index": 0, "generation": 0, "origin": "random", "candidate": [1], "status": "ok", "seconds": 1.0}
    record |= {"score": 0.5, "shares": {"accuracy": 1.0}, "top1": 0.5}
    (tmp_path / "history.jsonl").write_text(json.dumps(record) + "\n")
    assert genas("plot", "losses", tmp_path, tmp_path / "x.png").error.endswith("did not measure flatness.")
    assert genas("plot", "losses", finished.path, tmp_path / "x.png", "--top", "0").error.startswith("--top must be")
    assert ".svg, .png or .pdf" in genas("plot", "cells", "genas_flatness_c10", tmp_path / "x.gif").error
    assert "does not exist" in genas("plot", "cells", "genas_flatness_c10", tmp_path / "no" / "x.png").error
    assert not list(tmp_path.glob("*.png"))


EXAMPLES = {
    "search": "genas search --config quickstart_digits --output runs/digits",
    "score": "genas score genas_flatness_c10 --run runs/cifar10 --metric accuracy",
    "zoo": "genas zoo",
    "plot": "genas plot cells genas_flatness_c100 cells.svg",
}


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_has_a_worked_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: genas {command} ")
    assert text.endswith(f"example: {EXAMPLES[command]}")


def test_the_examples_name_what_there_is() -> None:
    assert "quickstart_digits" in config.config_names()
    assert {"genas_flatness_c10", "genas_flatness_c100"} <= set(ZOO)


def test_a_wrong_command_line_is_argparse_s_to_tell(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["correct"], ["plot", "cell", "a", "b"], ["score", "genas_flatness_c10"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a search"):
        main(["--debug", "plot", "search", str(tmp_path), "x.png"])


def test_the_module_is_the_same_command(genas: Any) -> None:
    done = genas.process("zoo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == genas("zoo").stdout
    assert "did you mean genas_flatness_c10?" in genas("plot", "cells", "genas_flatnes_c10", "x.svg").error


# As `genas ... | head -0` does.
NOBODY_READS = """
import os
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
"""


def test_output_that_nobody_reads_is_no_error(genas: Any) -> None:
    done = genas("zoo", before=NOBODY_READS)
    assert (done.status, done.stderr) == (141, "")
