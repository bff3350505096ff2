"""A trained supernet as one file, and training without the search behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genas_plugins import SuperNet
from genas_plugins.checkpoints import CheckpointError, load_supernet, read_metadata, save_supernet
from genas_plugins.datasets import DataChangedError
from genas_plugins.experiment.run_folder import save_trained
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201 import NasBench201Architecture


@pytest.fixture(scope="module")
def file(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained(finished.path, tmp_path_factory.mktemp("file") / "tiny.safetensors", note="a test")


def test_a_file_scores_what_its_run_scored(finished: Any, file: Path) -> None:
    trained = Scorer.from_run(file, device="cpu")
    for record in finished.records[:2]:
        # Angle and flatness: the weights before training are there too.
        measured = trained.measure(NasBench201Architecture.from_string(record["candidate"]))
        assert measured.score == pytest.approx(record["score"], rel=1e-12)
        assert measured.to_dict()["losses"] == pytest.approx(record["losses"], rel=1e-12)


def test_a_file_has_one_supernet_and_says_how_it_was_trained(finished: Any, file: Path) -> None:
    state, own = load_supernet(file).state_dict(), load_supernet(finished.path / "supernet.ckpt").state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in state)
    metadata = read_metadata(file)
    assert metadata["card"] == {"note": "a test"}
    assert metadata["experiment"]["seed"] == 1
    assert metadata["experiment"]["training"]["epochs"] == 4


def test_opening_a_file_draws_nothing_from_the_global_generator(file: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    Scorer.from_run(file, device="cpu")
    assert torch.equal(torch.rand(3), wanted)


def test_where_the_first_weights_cannot_be_drawn_again_only_the_angle_is_refused(
    finished: Any, file: Path, tmp_path: Path
) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    # As after a release of PyTorch that draws other numbers.
    metadata["initial_sha256"] = json.dumps("0" * 64)
    other = tmp_path / "other.safetensors"
    save_file(load_file(file), other, metadata)
    trained = Scorer.from_run(other, device="cpu")
    candidate = NasBench201Architecture.from_string(finished.records[0]["candidate"])
    with pytest.raises(ValueError, match="The angle needs the weights before training"):
        trained.measure(candidate)
    flat = type(trained.score)(metric="flatness", sigmas=trained.score.sigmas)
    assert 0 < trained.measure(candidate, flat).score < 1


def test_a_file_is_not_scored_on_other_images(file: Path, tmp_path: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    images = json.loads(metadata["images"])
    images["images"][3][2] = "0" * 16
    metadata["images"] = json.dumps(images)
    other = tmp_path / "other.safetensors"
    save_file(load_file(file), other, metadata)
    with pytest.raises(DataChangedError, match=r"other.safetensors was trained on .*the images of '3' differ in"):
        Scorer.from_run(other, device="cpu")


def test_a_file_without_its_experiment_is_refused(tmp_path: Path) -> None:
    path = save_supernet(SuperNet(10, 4, 2), tmp_path / "bare.safetensors")
    with pytest.raises(
        CheckpointError, match=r"bare\.safetensors does not say how its supernet was trained: pass the "
    ):
        Scorer.from_run(path)
    path = save_supernet(SuperNet(10, 4, 2), tmp_path / "odd.safetensors", experiment={"seeed": 1})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors has an experiment that cannot be read: unknown key"):
        Scorer.from_run(path)


def test_a_folder_whose_training_has_not_ended_gives_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a search with a trained supernet: no config"):
        save_trained(tmp_path, tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


def test_training_alone_ends_with_a_supernet_that_is_searched_later_with_the_same_result(
    genas: Any, finished: Any, folder_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = folder_at(tmp_path / "run")
    arguments = ("search", "--config", genas.config, "--quiet", "--output", folder.path)
    done = genas(*arguments, "--train-only")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == (
        f"The trained supernet is in {folder.path}; search it with: genas search --output {folder.path} --resume\n"
    )
    assert folder.records == []
    assert not (folder.path / "architecture.json").exists()
    candidate = NasBench201Architecture.from_string(finished.records[0]["candidate"])
    measured = Scorer.from_run(folder.path, device="cpu").measure(candidate)
    assert measured.score == pytest.approx(finished.records[0]["score"], rel=1e-12)
    again = genas("search", "--quiet", "--output", folder.path, "--resume", "--train-only")
    assert (again.status, again.stderr) == (0, "")
    last = genas.search(folder.path, resume=True).wait()
    assert (last.status, last.stderr) == (0, "")
    folder.assert_same(finished)
