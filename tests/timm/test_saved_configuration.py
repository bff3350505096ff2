"""What timm saves with a network builds the same one anywhere, whatever form its genotype came in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_models  # noqa: F401
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.zoo import ZOO

# Two edges of a node stand in another order than in the code, which has none.
REVERSED = Genotype(
    [
        pair
        for node in range(4)
        for pair in reversed(ZOO["genas_flatness_c100"].genotype.normal[2 * node : 2 * node + 2])
    ],
    ZOO["genas_flatness_c100"].genotype.reduce,
)
SIZES = {"init_channels": 4, "num_cells": 3, "num_classes": 7}

LOAD = """
import json, sys
import timm, timm_models, torch
torch.set_num_threads(1)
folder, images, target = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(images, weights_only=True)), target)
print(json.dumps([model.genotype.to_dict(), model.init_channels, len(model.cells)]))
"""


def forms(genotype: Genotype, folder: Path) -> dict[str, Any]:
    file = genotype.save(folder / "genotype.json", score=1.0)
    return {
        "object": genotype,
        "path": str(file),
        "pathlib": file,
        "json": file.read_text(),
        "mapping": json.loads(file.read_text()),
        "numbers": list(genotype.code),
        "text": str(genotype),
    }


@pytest.mark.parametrize("form", ["object", "path", "pathlib", "json", "mapping", "numbers", "text", "name"])
def test_another_process_in_another_folder_gets_the_same_logits(
    form: str, tmp_path: Path, warm: Callable[..., Any], randomize: Callable[..., Any], images: Callable[..., Any]
) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    genotype = ZOO["sdarts_rs_c10"].genotype if form == "name" else REVERSED
    given = "sdarts_rs_c10" if form == "name" else forms(genotype, source)[form]
    model = randomize(timm.create_model("genas_cell", genotype=given, **SIZES)).eval()
    save_for_hf(model, str(elsewhere / "published"), safe_serialization=True)
    for path in source.iterdir():
        path.unlink()
    x = images(2, 3, 64, 64)
    torch.save(x, elsewhere / "images.pt")
    done = warm("timm_models")(LOAD, "published", "images.pt", "logits.pt", folder=elsewhere)
    assert done.status == 0, done.stderr
    stored, channels, cells = json.loads(done.stdout)
    assert (stored["code"], channels, cells) == (list(genotype.code), 4, 3)
    with torch.no_grad():
        assert torch.equal(torch.load(elsewhere / "logits.pt", weights_only=True), model(x))
    text = (elsewhere / "published" / "config.json").read_text()
    assert str(tmp_path) not in text and "genotype.json" not in text


def test_the_configuration_holds_the_integers_and_the_channels(tmp_path: Path) -> None:
    entry = ZOO["genas_flatness_c100"]
    canonical = Genotype.from_code(entry.genotype.code)
    save_for_hf(timm.create_model("genas_cell", genotype=canonical, num_classes=2), str(tmp_path))
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    # 46 is the paper's, and the largest within 600 M multiply-adds, which nobody gave.
    assert (arguments["genotype"], arguments["init_channels"], arguments["num_cells"]) == (list(canonical.code), 46, 14)


def test_the_order_of_pairs_is_kept_where_the_integers_have_another(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("genas_cell", genotype=REVERSED, **SIZES), str(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())["model_args"]["genotype"]
    assert stored["code"] == list(REVERSED.code)
    assert [tuple(pair) for pair in stored["normal"]] == list(REVERSED.normal)
    assert list(Genotype.from_code(REVERSED.code).normal) != list(REVERSED.normal)


def test_a_network_by_name_says_what_it_is_made_of(tmp_path: Path) -> None:
    entry = ZOO["pcdarts_c100"]
    model = timm.create_model("pcdarts_c100", num_cells=3, init_channels=4, num_classes=3)
    save_for_hf(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["init_channels"]) == ("pcdarts_c100", 4)
    assert str(list(entry.genotype.code))[1:-1] in str(config["model_args"]["genotype"])


def test_other_arguments_and_a_new_classifier_are_saved_too(tmp_path: Path) -> None:
    model = timm.create_model("genas_cell", genotype="darts_v2_c10", act_layer="silu", in_chans=1, **SIZES)
    model.reset_classifier(5)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.num_classes, again.in_chans) == (5, 1)
    assert any(isinstance(module, torch.nn.SiLU) for module in again.modules())


def test_a_layer_that_is_a_class_is_refused_by_timm_with_its_name(tmp_path: Path) -> None:
    model = timm.create_model("genas_cell", genotype="darts_v2_c10", norm_layer=torch.nn.BatchNorm2d, **SIZES)
    with pytest.raises(ValueError, match="'norm_layer' is not serializable"):
        save_for_hf(model, str(tmp_path))


def test_a_damaged_text_of_a_genotype_is_named() -> None:
    with pytest.raises(ValueError, match=r"is not JSON"):
        timm.create_model("genas_cell", genotype='{"format": "genas-genotype", ', device="meta")
    with pytest.raises(ValueError, match=r'Expected a genotype with "format"'):
        timm.create_model("genas_cell", genotype={"normal": []}, device="meta")
