"""The zoo against the paper's counts, and the ways to name a genotype."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from genas_plugins.counting import count_macs, count_parameters
from genas_plugins.darts.genotype import Genotype, cell_edges
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.zoo import ZOO, ZooEntry, find_genotype

# Codes in clovaai/GeNAS@fd3cba8, retrain_architecture/genotypes.py, and the network sizes that the paper's
# tables print: millions of parameters and multiply-adds.
OFFICIAL_CODES = {
    "genas_flatness_c100": "3 5 0 4 4 0 0 4 5 0 4 0 0 7 6 3 2 0 5 0 5 0 7 0 1 1 0 0",
    "genas_angle_flatness_c100": "3 5 1 4 0 0 4 0 4 0 4 0 0 5 6 4 0 7 2 1 3 0 0 0 4 0 0 7",
    "genas_flatness_c10": "3 6 0 4 4 0 6 6 0 0 0 0 4 3 5 2 0 6 4 0 3 0 6 0 0 5 0 7",
    "genas_angle_flatness_c10": "5 4 4 4 0 4 5 0 0 4 0 0 0 4 7 7 2 3 0 4 1 0 0 0 0 0 5 6",
    "genas_angle_c100": "5 5 2 5 0 4 4 0 0 0 4 0 0 4 3 3 0 3 2 3 7 0 0 3 0 0 0 4",
    # "cand" in the two genotypes.py of megvii-model/RLNAS@6a6d838, whose numbers are these.
    "rlnas_c10": "5 4 6 0 5 4 0 0 7 0 7 6 0 0 5 6 4 0 5 0 6 0 4 0 1 5 0 0",
    "rlnas_imagenet": "4 4 0 3 4 0 4 4 0 3 0 0 0 4 4 1 4 3 0 4 6 0 0 3 4 0 0 0",
}
# FairDARTS_b as its authors print it (xiaomi-automl/FairDARTS@270cfc9, fairdarts/genotypes.py): operation, node, input.
FAIR_NORMAL = (
    "sep_conv_3x3 2 0, sep_conv_3x3 2 1, sep_conv_3x3 3 1, dil_conv_3x3 4 0, sep_conv_5x5 4 1, dil_conv_5x5 5 1"
)
FAIR_REDUCE = (
    "skip_connect 2 0, dil_conv_3x3 2 1, skip_connect 3 0, dil_conv_3x3 3 1, "
    "max_pool_3x3 4 0, sep_conv_3x3 4 1, skip_connect 5 2, max_pool_3x3 5 0"
)
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
    # These five with this one; test_cli_networks.py compares them with what the paper prints.
    "rlnas_c10": (46, 5257581, 579.816),
    "rlnas_imagenet": (48, 5463616, 595.984),
    "shapley_c10": (48, 5138848, 565.511),
    "shapley_imagenet": (48, 5423872, 598.035),
    "fairdarts_b_c10": (48, 4865248, 541.201),
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


def test_counts_of_fairdarts_are_its_authors():
    # README of FairDARTS, on CIFAR-10 with 36 channels and 20 cells: 536 M, and 3.88 M with the auxiliary head.
    with torch.device("meta"):
        network = CellNetwork(ZOO["fairdarts_b_c10"].genotype, 36, 20, 10, stem="cifar", auxiliary=True)
    assert (round(count_parameters(network) / 1e6, 2), int(count_macs(network, 32) / 1e6)) == (3.88, 536)


def test_fairdarts_has_the_edges_that_its_authors_print():
    genotype = ZOO["fairdarts_b_c10"].genotype
    for cell, text in ((genotype.normal, FAIR_NORMAL), (genotype.reduce, FAIR_REDUCE)):
        assert [f"{name} {node} {source}" for node, name, source in cell_edges(cell)] == text.split(", ")
    # Nodes 3 and 5 of the normal cell have one input.
    assert [place for place, (name, _) in enumerate(genotype.normal) if name == "none"] == [3, 7]


@pytest.mark.parametrize("name", OFFICIAL_CODES)
def test_codes_are_the_official_ones(name):
    assert ZOO[name].genotype.code == tuple(map(int, OFFICIAL_CODES[name].split()))


def test_pairs_keep_the_published_order():
    # DARTS (second order) and PC-DARTS as their authors print them: not sorted by input.
    assert ZOO["darts_v2_c10"].genotype.normal[4:6] == (("sep_conv_3x3", 1), ("skip_connect", 0))
    assert ZOO["pcdarts_c100"].genotype.normal[:2] == (("dil_conv_5x5", 1), ("dil_conv_3x3", 0))
    # Shapley-NAS (shapley_nas_cifar10, shapley_nas_imagenet).
    assert ZOO["shapley_c10"].genotype.normal[4:6] == (("dil_conv_3x3", 2), ("skip_connect", 3))
    assert ZOO["shapley_imagenet"].genotype.reduce[4:6] == (("sep_conv_3x3", 3), ("skip_connect", 1))


def test_paper_figures():
    assert ZOO["genas_flatness_c100"].paper["top1"] == 76.05
    assert ZOO["darts_v2_c10"].paper == {"top1": 73.3, "top5": 91.3}
    assert "RLNAS" in ZOO["genas_angle_c100"].note
    assert ZOO["pdarts_c10"].note is None
    # Table 3; of what was searched on ImageNet it has none.
    assert ZOO["rlnas_c10"].paper == {"params_million": 5.3, "macs_giga": 0.59, "top1": 75.7, "top5": 92.5}
    assert ZOO["shapley_c10"].paper == {"params_million": 5.1, "macs_giga": 0.57, "top1": 75.7}
    assert ZOO["fairdarts_b_c10"].paper == {"params_million": 4.8, "macs_giga": 0.54, "top1": 75.1, "top5": 92.5}
    assert ZOO["rlnas_imagenet"].paper == ZOO["shapley_imagenet"].paper == {}
    sources = [entry.source.partition("@")[0] for entry in ZOO.values()]
    others = ["megvii-model/RLNAS"] * 2 + ["Euphoria16/Shapley-NAS"] * 2 + ["xiaomi-automl/FairDARTS"]
    assert sources == ["clovaai/GeNAS"] * 11 + others


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
    assert len(set(ZOO.values())) == 16


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
        ("0 0 " + OFFICIAL_CODES["genas_flatness_c10"][4:], "Node 2 of the normal cell has 0"),
    ],
)
def test_wrong_codes(text, message):
    with pytest.raises(ValueError, match=message):
        find_genotype(text)


def test_file_named_like_a_zoo_entry_does_not_shadow_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Genotype.from_code(ZOO["pdarts_c10"].genotype.code).save(tmp_path / "darts_v2_c10")
    assert find_genotype("darts_v2_c10") == ZOO["darts_v2_c10"].genotype
