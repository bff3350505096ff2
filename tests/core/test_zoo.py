"""The zoo against the paper's counts, and the ways to name a genotype."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.zoo import ZOO, ZooEntry, find_genotype

# Codes in clovaai/GeNAS@fd3cba8, retrain_architecture/genotypes.py, and the network sizes that the paper's
# tables print: millions of parameters and multiply-adds.
OFFICIAL_CODES = {
    "genas_flatness_c100": "3 5 0 4 4 0 0 4 5 0 4 0 0 7 6 3 2 0 5 0 5 0 7 0 1 1 0 0",
    "genas_angle_flatness_c100": "3 5 1 4 0 0 4 0 4 0 4 0 0 5 6 4 0 7 2 1 3 0 0 0 4 0 0 7",
    "genas_flatness_c10": "3 6 0 4 4 0 6 6 0 0 0 0 4 3 5 2 0 6 4 0 3 0 6 0 0 5 0 7",
    "genas_angle_flatness_c10": "5 4 4 4 0 4 5 0 0 4 0 0 0 4 7 7 2 3 0 4 1 0 0 0 0 0 5 6",
    "genas_angle_c100": "5 5 2 5 0 4 4 0 0 0 4 0 0 4 3 3 0 3 2 3 7 0 0 3 0 0 0 4",
}
# Counted with an independent implementation of the network.
COUNTS = {
    "genas_flatness_c100": (46, 5195205, 579.473),
    "genas_angle_flatness_c100": (48, 5413696, 602.4),
    "genas_flatness_c10": (52, 5564090, 610.059),
    "genas_angle_flatness_c10": (44, 5344118, 592.905),
    "genas_angle_c100": (46, 5425481, 606.548),
    "pcdarts_c100": (50, 5278775, 586.232),
    "dropnas_c100": (46, 5134761, 570.43),
    "sdarts_rs_c10": (50, 5511675, 612.957),
    "sdarts_adv_c10": (52, 5506578, 619.894),
    "pdarts_c10": (48, 4944352, 542.819),
    "darts_v2_c10": (48, 4718752, 529.912),
}


def test_names_in_published_order():
    assert list(ZOO) == list(COUNTS)
    assert all(entry.name == name for name, entry in ZOO.items())


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    channels, params, macs = COUNTS[name]
    entry = ZOO[name]
    assert (entry.init_channels, entry.params, entry.macs_million) == (channels, params, macs)
    with torch.device("meta"):
        network = entry.network()
    assert count_parameters(network) == params
    assert math.isclose(count_macs(network) / 1e6, macs, abs_tol=0.1)


@pytest.mark.parametrize("name", OFFICIAL_CODES)
def test_codes_are_the_official_ones(name):
    assert ZOO[name].genotype.code == tuple(map(int, OFFICIAL_CODES[name].split()))


def test_pairs_keep_the_published_order():
    # DARTS (second order) and PC-DARTS as their authors print them: not sorted by input.
    assert ZOO["darts_v2_c10"].genotype.normal[4:6] == (("sep_conv_3x3", 1), ("skip_connect", 0))
    assert ZOO["pcdarts_c100"].genotype.normal[:2] == (("dil_conv_5x5", 1), ("dil_conv_3x3", 0))


def test_paper_figures():
    assert ZOO["genas_flatness_c100"].paper["top1"] == 76.05
    assert ZOO["darts_v2_c10"].paper == {"top1": 73.3, "top5": 91.3}
    assert "RLNAS" in ZOO["genas_angle_c100"].note
    assert ZOO["pdarts_c10"].note is None


def test_network_options():
    with torch.device("meta"):
        network = ZOO["genas_flatness_c10"].network(num_classes=7, auxiliary=True)
    assert len(network.cells) == 14
    assert network.classifier.out_features == network.auxiliary_head.classifier.out_features == 7
    assert network.stem_kind == "imagenet"


def test_zoo_is_read_only_and_entries_copy():
    with pytest.raises(TypeError):
        ZOO["mine"] = ZOO["pdarts_c10"]
    entry = ZOO["pdarts_c10"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.params = 0
    assert isinstance(entry, ZooEntry)
    assert copy.deepcopy(entry) == entry
    assert len(set(ZOO.values())) == 11


@pytest.mark.parametrize(
    "text",
    [
        OFFICIAL_CODES["genas_flatness_c10"],
        OFFICIAL_CODES["genas_flatness_c10"].replace(" ", ","),
        json.dumps([int(number) for number in OFFICIAL_CODES["genas_flatness_c10"].split()]),
        "genas_flatness_c10",
    ],
)
def test_find_by_name_or_code(text):
    assert find_genotype(text) is not None
    assert str(find_genotype(text)) == OFFICIAL_CODES["genas_flatness_c10"]


def test_find_by_file(tmp_path):
    genotype = ZOO["pcdarts_c100"].genotype
    path = genotype.save(tmp_path / "genotype.json", score=1.5)
    assert find_genotype(path).normal == find_genotype(str(path)).normal == genotype.normal
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"genotype\.json"):
        find_genotype(path)


@pytest.mark.parametrize("text", ["GeNAS-flatness-c10", "genas_flatnes_c10"])
def test_close_match_is_suggested(text):
    with pytest.raises(ValueError, match="did you mean genas_flatness_c10\\?") as caught:
        find_genotype(text)
    assert all(name in str(caught.value) for name in ZOO)


@pytest.mark.parametrize("text", ["", "nowhere/genotype.json", "x" * 5000, ".", "zebra\0"])
def test_unknown_text_lists_the_choices(text):
    with pytest.raises(ValueError, match=r"neither a published genotype.*darts_v2_c10"):
        find_genotype(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "28 operation numbers .* got 3"),
        ("8 " + OFFICIAL_CODES["genas_flatness_c10"][2:], "from 0 to 7, got 8"),
        ("-1 " + OFFICIAL_CODES["genas_flatness_c10"][2:], "from 0 to 7, got -1"),
        ("0 " + OFFICIAL_CODES["genas_flatness_c10"][2:], "Node 2 of the normal cell has 1"),
    ],
)
def test_wrong_codes(text, message):
    with pytest.raises(ValueError, match=message):
        find_genotype(text)


def test_file_named_like_a_zoo_entry_does_not_shadow_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Genotype.from_code(ZOO["pdarts_c10"].genotype.code).save(tmp_path / "darts_v2_c10")
    assert find_genotype("darts_v2_c10") == ZOO["darts_v2_c10"].genotype
