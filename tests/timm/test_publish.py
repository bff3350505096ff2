"""A trained network as a folder that opens without its run, and whose card says what is known and nothing else."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import timm.models._hub
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import timm_models  # noqa: F401
from genas_plugins import ZOO, CellNetwork, Genotype, SuperNet
from genas_plugins.checkpoints import read_state, save_network, save_supernet
from genas_plugins.cli import main
from genas_plugins.experiment import config
from timm_models import publishing
from timm_models.settings import from_options
from timm_models.trained import open_trained
from timm_models.training import train

CLASSES = ("blue", "gr|ey", "red")
GENOTYPE = Genotype.from_code(ZOO["genas_flatness_c10"].genotype.code)
SCORE, TOP1 = 0.0123456, 0.375
FILES = ["README.md", "cells.png", "config.json", "model.safetensors"]

LOAD = """
import sys
import timm, timm_models, torch
torch.set_num_threads(1)
model = timm.create_model(sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    torch.save(model(torch.load("images.pt", weights_only=True)), "logits.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The folders of a search, as one that has come to its end leaves them, and of a training of what it found."""
    folder = tmp_path_factory.mktemp("trained")
    search = folder / "search"
    search.mkdir()
    settings = {"data": {"name": "image_folder", "root": "/home/me/secret"}, "score": {"metric": "flatness"}}
    settings |= {"search": {"population": 7, "parents": 3, "mutants": 3, "crossovers": 4, "generations": 9}}
    (search / "config.yaml").write_text(config.dump(config.parse(settings)))
    record = {"index": 3, "score": SCORE, "shares": {"flatness": 1.0, "slope": 0.21}, "sigmas": [0.002, 0.01]}
    provenance = {"genas_plugins": "0.1.0", "data": "image_folder", "candidates": 63, "seed": 5}
    GENOTYPE.save(search / "genotype.json", record=record, test_top1=TOP1, provenance=provenance)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in CLASSES:
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    options = {
        **{"data_dir": str(folder / "images"), "model": "genas_cell", "img_size": 32, "crop_pct": 0.9},
        "model_kwargs": {"genotype": str(search / "genotype.json"), "init_channels": 4, "num_cells": 3},
        **{"batch_size": 4, "epochs": 2, "tail_epochs": 1, "warmup_epochs": 0, "lr": 0.05, "auxiliary_weight": 0.4},
        **{"device": "cpu", "workers": 0, "tensorboard": False, "output": str(folder), "experiment": "run"},
    }
    with torch.random.fork_rng(devices=[]):
        run = train(from_options(options))
    yield search, run


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the training alone, to be spoilt; its search is not beside it."""
    return Path(shutil.copytree(trained[1], tmp_path / "training"))


@pytest.fixture(scope="module")
def folder(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is published of it while its search is gone."""
    search, run = trained
    place = tmp_path_factory.mktemp("published")
    gone = search.rename(search.with_name("gone"))
    assert main(["publish", str(run), str(place / "my-network")]) == 0
    gone.rename(search)
    return place / "my-network"


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which the command ends."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def logits(run: Path, x: Tensor, name: str = "model_best") -> Tensor:
    """What the training's network computes, by its checkpoint alone."""
    model = timm.create_model("genas_cell", genotype=GENOTYPE, init_channels=4, num_cells=3, num_classes=3)
    model.load_state_dict(torch.load(run / f"{name}.pth.tar", weights_only=True)["state_dict"])
    with torch.no_grad():
        return model.eval()(x)


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| (.*?) \|$", card, re.MULTILINE))


# ------------------------------------------------------------------------------------------------- what is published


def test_another_process_gets_the_same_logits_when_run_and_search_are_gone(
    folder: Path, trained: tuple[Path, Path], tmp_path: Path, warm: Callable[..., Any], images: Callable[..., Tensor]
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    shutil.copytree(folder, tmp_path / "downloaded")
    x = images(2, 3, 32, 32)
    torch.save(x, tmp_path / "images.pt")
    done = warm("timm_models")(LOAD, "local-dir:downloaded", folder=tmp_path)
    assert done.status == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(trained[1], x))


def test_the_configuration_has_genotype_classes_and_how_images_are_prepared(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    arguments, images = found["model_args"], found["pretrained_cfg"]
    assert (arguments["genotype"], arguments["init_channels"]) == (list(GENOTYPE.code), 4)
    assert (found["architecture"], found["label_names"]) == ("genas_cell", list(CLASSES))
    assert (images["input_size"], images["crop_pct"]) == ([3, 32, 32], 0.9)
    assert (images["mean"], images["std"]) == ([0, 0, 0], [1, 1, 1])
    # Those are the authors' of other weights.
    assert "license" not in images and "origin_url" not in images


def test_the_card_says_what_run_and_search_say(folder: Path, trained: tuple[Path, Path]) -> None:
    card = (folder / "README.md").read_text()
    told = rows(card)
    with (trained[1] / "summary.csv").open(newline="") as file:
        figures = list(csv.DictReader(file))
    best = torch.load(trained[1] / "model_best.pth.tar", weights_only=True)
    assert told["top-1"] == f"{float(figures[best['epoch']]['eval_top1']):.2f} % of the training's 9 validation images"
    assert told["weights"] == f"after epoch {best['epoch'] + 1}"
    assert (told["score"], told["shares of the score"]) == ("0.0123456", "flatness 100.0%, slope 21.0%")
    assert (told["sigmas of the noise"], told["candidates"]) == ("0.002, 0.01", "63")
    assert told["top-1 with the supernet's weights"] == "37.5%"
    assert told["evolution"] == "population 7, generations 9, parents 3, mutants 3, crossovers 4"
    assert told["metric"] == "flatness"
    assert (told["lr"], told["epochs"], told["auxiliary_weight"]) == ("0.05", "2", "0.4")
    assert "12 for training, 9 for validation" in card
    assert r"gr\|ey" in told["classes"] and str(GENOTYPE) in card
    assert "](cells.png)" in card and "license: unknown" in card


def test_the_card_counts_parameters_and_multiply_adds(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    macs = 0

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal macs
        weight = layer.weight
        macs += output.numel() * weight.numel() // weight.shape[0]

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    told = rows((folder / "README.md").read_text())
    assert told["parameters"] == f"{sum(each.numel() for each in model.parameters()) / 1e6:.3f} M"
    assert told["multiply-adds"] == f"{macs / 1e6:.3f} M for an image of 32 x 32 pixels"


def test_nothing_says_where_anything_lay(folder: Path, trained: tuple[Path, Path]) -> None:
    for name in ("README.md", "config.json"):
        text = (folder / name).read_text()
        assert "secret" not in text and str(trained[1].parent) not in text and str(folder.parent) not in text


def test_the_picture_is_one(folder: Path) -> None:
    with Image.open(folder / "cells.png") as picture:
        assert picture.size > (400, 200)


def test_what_is_not_known_is_said_to_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_network(CellNetwork(GENOTYPE, 4, 3, 7), tmp_path / "network.safetensors")
    assert main(["publish", str(file), str(tmp_path / "out"), "--license", "mit"]) == 0
    assert "top-1 unknown" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert (rows(card)["top-1"], rows(card)["top-5"]) == ("unknown", "unknown")
    assert "license: mit" in card and "Unknown: the weights came without the settings of their training." in card
    # The published genotype of which these are the cells.
    assert "`genas_flatness_c10`, published with the GeNAS paper: searched on CIFAR-10" in card


def test_nodes_of_one_input(tmp_path: Path) -> None:
    network = CellNetwork(ZOO["fairdarts_b_c10"].genotype, 4, 3, 7)
    out = tmp_path / "out"
    assert main(["publish", str(save_network(network, tmp_path / "network.safetensors")), str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "`fairdarts_b_c10`, published in xiaomi-automl/FairDARTS@270cfc9, " in card
    assert str(network.genotype) in card and "github.com" not in (out / "config.json").read_text()
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x), network.eval()(x))


def test_a_search_may_be_named_and_must_be_that_of_the_network(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_network(CellNetwork(GENOTYPE, 4, 3, 7), tmp_path / "network.safetensors")
    arguments = ["publish", file, tmp_path / "out", "--search"]
    ZOO["darts_v2_c10"].genotype.save(tmp_path / "other.json")
    assert "found the genotype" in refused([*arguments, tmp_path / "other.json"], capsys)
    assert "no genotype.json" in refused([*arguments, tmp_path], capsys)
    assert not (tmp_path / "out").exists()
    assert main([str(each) for each in (*arguments, trained[0])]) == 0
    assert rows((tmp_path / "out" / "README.md").read_text())["score"] == "0.0123456"


def test_a_training_keeps_its_genotype_and_what_is_known_of_the_search(trained: tuple[Path, Path]) -> None:
    kept = json.loads((trained[1] / "network.json").read_text())
    assert (kept["code"], kept["record"]["score"]) == (list(GENOTYPE.code), SCORE)
    assert kept["search"]["search"]["population"] == 7 and "secret" not in json.dumps(kept)


def test_a_checkpoint_of_timms_own_script_says_itself_what_it_is(run: Path, tmp_path: Path) -> None:
    import argparse

    saved = torch.load(run / "last.pth.tar", weights_only=True)
    arguments = {"model": "genas_cell", "num_classes": 3, "img_size": 32, "lr": 0.1, "mean": None}
    arguments["model_kwargs"] = {"genotype": str(GENOTYPE), "init_channels": 4, "num_cells": 3, "auxiliary": True}
    torch.save({**saved, "args": argparse.Namespace(**arguments)}, tmp_path / "lone.pth.tar")
    found = open_trained(tmp_path / "lone.pth.tar")
    assert (found.model.genotype, found.settings["lr"], found.figures) == (GENOTYPE, 0.1, {})
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(x), logits(run, x, "last"))


def test_averaged_weights_are_taken_with_their_own_accuracy(run: Path) -> None:
    saved = torch.load(run / "model_best.pth.tar", weights_only=True)
    saved["state_dict_ema"] = {name: value * 2 for name, value in saved["state_dict"].items()}
    torch.save(saved, run / "model_best.pth.tar")
    with (run / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (run / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "eval_top1_ema"])
        writer.writeheader()
        writer.writerows({**line, "eval_top1_ema": 61.5} for line in lines)
    found = open_trained(run)
    assert found.figures == {"top1": 61.5}
    assert torch.equal(found.model.classifier.bias, 2 * saved["state_dict"]["classifier.bias"])


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_that_is_not_empty_is_left_alone(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty (mine.txt)" in refused(["publish", trained[1], tmp_path / "full"], capsys)
    assert "is a file" in refused(["publish", trained[1], tmp_path / "full" / "mine.txt"], capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["publish", str(trained[1]), str(tmp_path / "empty")]) == 0
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == FILES


def test_a_run_without_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.glob("*.pth.tar"):
        path.unlink()
    told = refused(["publish", run, tmp_path / "out"], capsys)
    assert "a training without weights" in told and f"--resume {run}" in told


def test_a_search_has_no_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "search"
    search.mkdir()
    (search / "history.jsonl").write_text("")
    told = refused(["publish", search, tmp_path / "out"], capsys)
    assert "is a search" in told and f"--model-kwargs genotype={search}/genotype.json" in told
    file = save_supernet(SuperNet(10, 4, 3), tmp_path / "supernet.safetensors")
    assert "holds a supernet" in refused(["publish", file, tmp_path / "out"], capsys)


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "backbone."])
def test_a_detector_or_segmentor(prefix: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"{prefix}{name}": value for name, value in read_state(run / "last.pth.tar").items()}
    head = "head.cls_subnet.0.weight" if "bottom_up" in prefix else "decode_head.conv_seg.weight"
    torch.save({"model": {**state, head: torch.zeros(2)}}, tmp_path / "model_final.pth")
    told = refused(["publish", tmp_path / "model_final.pth", tmp_path / "out"], capsys)
    assert "a detector or a segmentor" in told and f"backbone is {prefix}*" in told and head in told


def test_other_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    bare = tmp_path / "bare.pt"
    torch.save(CellNetwork(GENOTYPE, 4, 3, 7).state_dict(), bare)
    cifar = save_network(CellNetwork(GENOTYPE, 4, 3, 7, stem="cifar"), tmp_path / "cifar.safetensors")
    evil = tmp_path / "evil.pt"
    torch.save({"state_dict": {"weight": Path("/")}}, evil)
    for source, message in (
        (tmp_path / "none.pt", "There is no checkpoint file"),
        (tmp_path / "nothing", "is not the folder of a training (args.yaml is missing)"),
        (bare, "does not say which genotype it holds: pass --genotype"),
        (cifar, "with the stem for CIFAR"),
        (evil, "could execute code"),
    ):
        assert message in refused(["publish", source, out], capsys)
    assert "of a training of the genotype" in refused(["publish", run, out, "--genotype", "darts_v2_c10"], capsys)
    assert "OWNER/NAME" in refused(["publish", run, out, "--push", "name"], capsys)
    assert not out.exists()


def test_a_network_that_is_not_ours(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({**settings, "model": "test_resnet", "model_kwargs": {}}))
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, run / "model_best.pth.tar")
    assert "timm's test_resnet, expected a GeNAS network" in refused(["publish", run, tmp_path / "out"], capsys)


def test_a_published_folder_that_is_damaged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "config.json").write_text("{}")
    assert "cannot be opened as a published network" in refused(["publish", damaged, tmp_path / "out"], capsys)
    (damaged / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(["publish", damaged, tmp_path / "out"], capsys)


@pytest.mark.parametrize("at", ["save_for_hf", "plot_cells"])
def test_nothing_half_written_stays(
    at: str, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    kept = getattr(publishing, at)

    def fail(*arguments: Any, **named: Any) -> None:
        kept(*arguments, **named)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publishing, at, fail)
    assert "No space left" in refused(["publish", trained[1], tmp_path / "deep" / "out"], capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]


# ------------------------------------------------------------------------------------------------------------- the hub


class Hub:
    """What timm and we ask of the hub's client, on folders; as the hub, it takes no repository that does not exist."""

    root = Path()
    endpoint = "https://hub.example"

    def __init__(self, **settings: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Url", (), {"repo_id": repo_id})

    def file_exists(self, *, repo_id: str, filename: str, **settings: Any) -> bool:
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: Any = None, **settings: Any) -> None:
        assert (self.root / repo_id).is_dir()
        for path in Path(folder_path).iterdir():
            if allow_patterns is None or path.name in allow_patterns:
                shutil.copy(path, self.root / repo_id / path.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in in place of the client, for timm and for us."""

    def download(repo: str, filename: str = "", repo_id: str = "", **settings: Any) -> str:
        path = Hub.root / (repo or repo_id) / filename
        if not path.is_file():
            raise FileNotFoundError(path)
        return str(path)

    monkeypatch.setattr(Hub, "root", tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(timm.models._hub, "HfApi", Hub)
    monkeypatch.setattr(
        timm.models._hub,
        "hf_hub_download",
        lambda repo="", filename="", repo_id="", **settings: download(repo, filename, repo_id),
    )
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["hf-hub", "hf_hub"])
def test_what_is_pushed_is_opened_from_the_hub(
    source: str, hub: Path, run: Path, tmp_path: Path, capsys: Any, images: Callable[..., Tensor]
) -> None:
    assert main(["publish", str(run), str(tmp_path / "out"), "--push", "me/my-network"]) == 0
    assert "https://hub.example/me/my-network" in capsys.readouterr().out
    x = images(2, 3, 32, 32)
    expected = logits(run, x)
    shutil.rmtree(run)
    pushed = hub / "me" / "my-network"
    assert sorted(path.name for path in pushed.iterdir()) == FILES
    for name in FILES:
        assert (pushed / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert 'create_model("hf-hub:me/my-network"' in (pushed / "README.md").read_text()
    with torch.no_grad():
        model = timm.create_model(f"{source}:me/my-network", pretrained=True).eval()
        assert torch.equal(model(x), expected)
    transform = timm.data.resolve_model_data_config(model)
    assert (transform["input_size"], transform["crop_pct"]) == ((3, 32, 32), 0.9)


def test_a_card_that_lies_there_stays(hub: Path, run: Path, tmp_path: Path) -> None:
    (hub / "me" / "mine").mkdir(parents=True)
    (hub / "me" / "mine" / "README.md").write_text("written by hand")
    assert main(["publish", str(run), str(tmp_path / "out"), "--push", "me/mine"]) == 0
    assert (hub / "me" / "mine" / "README.md").read_text() == "written by hand"
    assert sorted(path.name for path in (hub / "me" / "mine").iterdir()) == FILES


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(
    hub: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(self: Hub, repo_id: str, **settings: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert main(["publish", str(run), str(tmp_path / "out"), "--push", "me/mine"]) == 1
    told = capsys.readouterr().err
    assert "Token is required" in told and f"hf upload me/mine {tmp_path / 'out'}" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
