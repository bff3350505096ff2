"""Genotypes: the 28-integer code of published architectures, equality by code, JSON, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from genas_plugins import Genotype
from genas_plugins.darts.genotype import EDGES, OPERATIONS, edge_index, node_edges

# Code and cells of two architectures as the official GeNAS repository publishes them.
FLATNESS_C100 = (
    [3, 5, 0, 4, 4, 0, 0, 4, 5, 0, 4, 0, 0, 7, 6, 3, 2, 0, 5, 0, 5, 0, 7, 0, 1, 1, 0, 0],
    "skip_connect 0, sep_conv_5x5 1, sep_conv_3x3 1, sep_conv_3x3 2, "
    "sep_conv_3x3 2, sep_conv_5x5 3, sep_conv_3x3 1, dil_conv_5x5 4",
    "dil_conv_3x3 0, skip_connect 1, avg_pool_3x3 0, sep_conv_5x5 2, "
    "sep_conv_5x5 1, dil_conv_5x5 3, max_pool_3x3 1, max_pool_3x3 2",
)
ANGLE_FLATNESS_C10 = (
    [5, 4, 4, 4, 0, 4, 5, 0, 0, 4, 0, 0, 0, 4, 7, 7, 2, 3, 0, 4, 1, 0, 0, 0, 0, 0, 5, 6],
    "sep_conv_5x5 0, sep_conv_3x3 1, sep_conv_3x3 0, sep_conv_3x3 1, "
    "sep_conv_3x3 0, sep_conv_5x5 1, sep_conv_3x3 0, sep_conv_3x3 4",
    "dil_conv_5x5 0, dil_conv_5x5 1, avg_pool_3x3 0, skip_connect 1, "
    "sep_conv_3x3 0, max_pool_3x3 1, sep_conv_5x5 3, dil_conv_3x3 4",
)
CODE = FLATNESS_C100[0]


def cell(text: str) -> list[list[str | int]]:
    return [[pair.split()[0], int(pair.split()[1])] for pair in text.split(", ")]


def changed(position: int, value: object) -> list[object]:
    return [value if index == position else number for index, number in enumerate(CODE)]


@pytest.mark.parametrize(("code", "normal", "reduce"), [FLATNESS_C100, ANGLE_FLATNESS_C10])
def test_code_and_cells_of_published_architectures(code, normal, reduce):
    from_code, from_cells = Genotype.from_code(code), Genotype(cell(normal), cell(reduce))
    assert from_cells.code == tuple(code) and from_code == from_cells
    assert [list(pair) for pair in from_code.normal] == cell(normal)
    assert [list(pair) for pair in from_code.reduce] == cell(reduce)
    assert str(from_code) == " ".join(map(str, code))


def test_edges_are_numbered_by_the_published_offsets():
    for node, offset in ((2, 0), (3, 2), (4, 5), (5, 9)):
        assert [edge_index(source, node) for source in range(node)] == list(range(offset, offset + node))
        assert list(node_edges(node)) == list(range(offset, offset + node))
    assert len(EDGES) == 14
    names = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5"
    assert " ".join(OPERATIONS) == names


def test_published_order_is_kept_but_does_not_matter_for_equality():
    # PC-DARTS lists the larger input first.
    normal, reduce = cell(FLATNESS_C100[1]), cell(FLATNESS_C100[2])
    swapped = [normal[i ^ 1] for i in range(8)]
    ordered, other = Genotype(normal, reduce), Genotype(swapped, reduce)
    assert other.normal[0] == ("sep_conv_5x5", 1) and other.normal != ordered.normal
    assert other == ordered and hash(other) == hash(ordered) and len({other, ordered}) == 1
    assert ordered != Genotype(reduce, normal) and ordered != str(ordered)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, lambda number: torch.tensor(number)])
def test_integers_of_any_kind_make_a_code(kind):
    genotype = Genotype.from_code([kind(number) for number in CODE])
    assert genotype.code == tuple(CODE) and all(type(number) is int for number in genotype.code)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (CODE[:27], "28 operation numbers.*got 27"),
        ([*CODE, 0], "28 operation numbers.*got 29"),
        ([0, 0, *CODE[2:]], "Node 2 of the normal cell has 0 incoming"),
        (changed(2, 4), "Node 3 of the normal cell has 3 incoming"),
        (changed(27, 1), "Node 5 of the reduce cell has 3 incoming"),
        (changed(0, 8), "from 0 to 7, got 8"),
        (changed(0, -1), "from 0 to 7, got -1"),
        (changed(0, 3.0), "integer from 0 to 7, got 3.0"),
        (changed(0, True), "integer from 0 to 7, got True"),
        (changed(0, "3"), "integer from 0 to 7, got '3'"),
        (changed(0, torch.tensor(3.7)), "integer from 0 to 7"),
    ],
)
def test_a_wrong_code_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_code(code)


@pytest.mark.parametrize(
    ("position", "pair", "error", "message"),
    [
        (0, ("conv_7x7", 0), ValueError, "conv_7x7.*valid operations: max_pool_3x3"),
        (0, ("None", 0), ValueError, "'None'.*valid operations: .*dil_conv_5x5; none for an edge that is missing"),
        (0, ("none", 1), ValueError, "Node 2.*input 1 twice"),
        (0, ("none", 2), ValueError, "Node 2.*valid inputs: 0 to 1"),
        (0, ("skip_connect", 2), ValueError, "Node 2.*valid inputs: 0 to 1"),
        (0, ("skip_connect", -1), ValueError, "Node 2.*valid inputs: 0 to 1"),
        (0, ("skip_connect", 0.0), ValueError, "Node 2.*valid inputs: 0 to 1"),
        (1, ("skip_connect", 0), ValueError, "Node 2.*input 0 twice"),
        (0, ("skip_connect",), TypeError, "8 pairs"),
        (0, "skip_connect", TypeError, "8 pairs"),
    ],
)
def test_a_wrong_cell_is_refused(position, pair, error, message):
    normal = cell(FLATNESS_C100[1])
    normal[position] = pair
    with pytest.raises(error, match=message):
        Genotype(normal, cell(FLATNESS_C100[2]))
    with pytest.raises(TypeError, match="8 pairs"):
        Genotype(cell(FLATNESS_C100[1]), cell(FLATNESS_C100[2])[:7])


def test_a_node_without_input_is_refused():
    normal = [["none", 0], ["none", 1], *cell(FLATNESS_C100[1])[2:]]
    with pytest.raises(ValueError, match=r"Node 2 of the normal cell has no input: at most one .* may be none"):
        Genotype(normal, cell(FLATNESS_C100[2]))


@pytest.mark.parametrize("position", range(8))
def test_any_edge_may_be_missing(position, tmp_path):
    normal = cell(FLATNESS_C100[1])
    node, source = 2 + position // 2, normal[position][1]
    normal[position][0] = "none"
    genotype = Genotype(normal, cell(FLATNESS_C100[2]))
    # Zero in the code, where the edge was, and the pair keeps its place.
    assert list(genotype.code) == changed({2: 0, 3: 2, 4: 5, 5: 9}[node] + source, 0)
    loaded = Genotype.load(genotype.save(tmp_path / "genotype.json"))
    assert loaded.normal == genotype.normal == tuple(map(tuple, normal)) and loaded == genotype
    # From its code the same architecture, the edge that is there first.
    other = Genotype.from_code(genotype.code)
    first, second = other.normal[2 * node - 4 : 2 * node - 2]
    assert other == genotype and hash(other) == hash(genotype)
    assert first == tuple(normal[position ^ 1]) and second[0] == "none" and second[1] in range(node)
    assert other != Genotype.from_code(CODE)


def test_json_round_trip_keeps_cells_and_ignores_provenance(tmp_path):
    genotype = Genotype(cell(FLATNESS_C100[1])[::-1][-2:] + cell(FLATNESS_C100[1])[2:], cell(FLATNESS_C100[2]))
    path = genotype.save(tmp_path / "genotype.json", score=0.5, seed=3)
    written = json.loads(path.read_text())
    assert (written["score"], written["seed"], written["code"]) == (0.5, 3, list(genotype.code))
    loaded = Genotype.load(str(path))
    assert loaded == genotype and loaded.normal == genotype.normal and loaded.reduce == genotype.reduce
    assert Genotype.from_dict(genotype.to_dict()) == genotype


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1, 2]", "Expected a genotype.*got 'list'"),
        ('{"normal": []}', "Expected a genotype.*got None"),
        ('{"format": "nni"}', "Expected a genotype.*got 'nni'"),
        ('{"format": "genas-genotype", "normal": "skip"}', 'no list "normal"'),
        ('{"format": "genas-genotype", "normal": [], "reduce": []}', "8 pairs"),
        (b"\xff\xfe\x00", "not a JSON file"),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "foreign.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Genotype.load(path)
    assert "foreign.json" in str(caught.value)


def test_a_code_that_contradicts_the_cells_and_a_missing_file_are_refused(tmp_path):
    data = Genotype.from_code(CODE).to_dict() | {"code": ANGLE_FLATNESS_C10[0]}
    with pytest.raises(ValueError, match="does not describe its cells"):
        Genotype.from_dict(data)
    with pytest.raises(FileNotFoundError):
        Genotype.load(tmp_path / "missing.json")


def test_a_dictionary_of_the_wrong_shape_is_a_value_error():
    data = Genotype.from_code(CODE).to_dict()
    with pytest.raises(ValueError, match="8 pairs"):
        Genotype.from_dict(data | {"normal": data["normal"][:7]})
