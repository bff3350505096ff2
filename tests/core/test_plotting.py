"""Figures: a layout in which nothing overlaps, whole and reproducible files, a clear error for bad input."""

from __future__ import annotations

import itertools
import math
import random
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genas_plugins import ZOO, Genotype
from genas_plugins.darts.genotype import OPERATIONS
from genas_plugins.plotting import LossCurve, cells, curves, plot_cells, plot_loss_curves, plot_search, search
from genas_plugins.plotting._layout import LABEL_SIZE, NODE_SIZE, CellLayout, bends, cell_layout
from genas_plugins.plotting._style import short_number

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plots)")

NAMES = OPERATIONS[1:]
CURVES = [
    LossCurve("first", (0.0, 1e-3, 3e-3), (1.0, 1.2, 1.9), 0.004),
    LossCurve("second", (0.0, 1e-3, 3e-3), (1.1, 1.15, 1.3), 0.007),
]


def random_cell(seed: int) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [(rng.choice(NAMES), i) for node in range(2, 6) for i in rng.sample(range(node), 2)]


def chain_cell() -> list[tuple[str, int]]:
    """The deepest cell: every node takes the two before it."""
    return [(NAMES[(2 * node + i) % 7], node - 2 + i) for node in range(2, 6) for i in (0, 1)]


def flat_cell() -> list[tuple[str, int]]:
    """The widest cell: every node takes the two inputs of the cell."""
    return [(NAMES[node + i], i) for node in range(2, 6) for i in (0, 1)]


CELLS = [chain_cell(), flat_cell(), *map(random_cell, range(12))]
# FairDARTS-B; one input a node in a chain; and a cell that reads one input.
FAIR = [list(pair) for pair in ZOO["fairdarts_b_c10"].genotype.normal]
CHAIN = [pair for node in range(2, 6) for pair in (("sep_conv_3x3", node - 1), ("none", 0))]
CELLS += [FAIR, CHAIN, [pair for _ in range(4) for pair in (("none", 1), ("skip_connect", 0))]]
GENOTYPE = Genotype(chain_cell(), flat_cell())


def record(index: int, **changes: Any) -> dict[str, Any]:
    score = 0.1 * (index % 4)
    origin = ("random", "mutation", "crossover")[index % 3]
    base = {"index": index, "generation": index // 5, "origin": origin, "candidate": [index], "status": "ok"}
    return base | {"score": score, "seconds": 1.5, "shares": {"slope": 0.05, "depth": 0.95}} | changes


def failed(index: int) -> dict[str, Any]:
    return record(index, status="failed", score=None, reason="the loss is nan")


def history() -> list[dict[str, Any]]:
    return [*map(record, range(14)), failed(14)]


def draw_all(folder: Path, suffix: str) -> list[Path]:
    return [
        plot_cells(GENOTYPE, folder / f"cells{suffix}", title="Cells & $more"),
        plot_loss_curves(CURVES, folder / f"curves{suffix}", title="Curves < 2"),
        plot_search(history(), folder / f"search{suffix}", title="Search"),
    ]


def svg_texts(path: Path) -> list[str]:
    texts = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in texts]


# Layout


def present(cell: list[tuple[str, int]]) -> list[tuple[int, str, int]]:
    """Node, operation and source of the edges that are not missing."""
    return [(2 + place // 2, name, source) for place, (name, source) in enumerate(cell) if name != "none"]


def longest_paths(cell: list[tuple[str, int]]) -> dict[int, int]:
    """Brute force: the longest of all walks back from a node to an input."""

    def longest(node: int) -> int:
        return 0 if node < 2 else 1 + max(longest(source) for target, _, source in present(cell) if target == node)

    return {node: longest(node) for node in range(6)}


def boxes(layout: CellLayout, pitch: float) -> dict[Any, tuple[float, float, float, float]]:
    sized = [(node, at, NODE_SIZE) for node, at in layout.nodes.items()]
    sized += [(f"label {edge}", at, LABEL_SIZE) for edge, at in enumerate(layout.labels)]
    return {name: (x * pitch - w / 2, x * pitch + w / 2, y - h / 2, y + h / 2) for name, (x, y), (w, h) in sized}


def bezier(control: np.ndarray) -> np.ndarray:
    """Points on the piecewise cubic curve, from the definition of Bernstein polynomials."""
    t = np.linspace(0, 1, 21)[:, None]
    parts = [control[i : i + 4] for i in range(0, len(control) - 1, 3)]
    return np.concatenate(
        [sum(math.comb(3, k) * t**k * (1 - t) ** (3 - k) * part[k] for k in range(4)) for part in parts]
    )


@pytest.mark.parametrize("cell", CELLS)
def test_columns_are_longest_paths_and_edges_go_forward(cell: list[tuple[str, int]]) -> None:
    layout = cell_layout(cell)
    expected = longest_paths(cell)
    assert {node: layout.nodes[node][0] for node in range(6)} == expected
    assert layout.nodes[6][0] > max(expected.values())
    for edge, ((node, _, source), points) in enumerate(zip(present(cell), layout.edges, strict=True)):
        assert (points[0], points[-1]) == (layout.nodes[source], layout.nodes[node])
        assert all(a[0] < b[0] for a, b in itertools.pairwise(points))
        assert layout.labels[edge] in points[1:-1]
    assert [(path[0], path[-1]) for path in layout.concat.values()] == [
        (layout.nodes[node], layout.nodes[6]) for node in (2, 3, 4, 5)
    ]


@pytest.mark.parametrize("cell", CELLS)
def test_boxes_do_not_overlap_and_lines_avoid_them(cell: list[tuple[str, int]]) -> None:
    # The smallest distance of columns that plot_cells uses: five columns over the width of the figure.
    pitch = (cells._WIDTH - 2 * cells._MARGIN - NODE_SIZE[0]) / 4.68
    layout = cell_layout(cell)
    placed = boxes(layout, pitch)
    for (_, a), (_, b) in itertools.combinations(placed.items(), 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
    edges = enumerate(zip(present(cell), layout.edges, strict=True))
    lines = [(points, {source, node, f"label {e}"}) for e, ((node, _, source), points) in edges]
    lines += [(points, {node, 6}) for node, points in layout.concat.items()]
    for points, own in lines:
        x, y = bezier(bends(points, pitch, 0.0)).T
        for name in placed.keys() - own:
            left, right, low, high = placed[name]
            assert not ((x > left) & (x < right) & (y > low) & (y < high)).any(), name


@pytest.mark.parametrize("cell", CELLS)
def test_first_input_is_above_the_second_and_everything_is_within_the_extent(
    cell: list[tuple[str, int]],
) -> None:
    layout = cell_layout(cell)
    assert layout.nodes[0][1] > layout.nodes[1][1]
    low, high = layout.extent
    assert min(box[2] for box in boxes(layout, 1.0).values()) >= low
    assert max(box[3] for box in boxes(layout, 1.0).values()) <= high


def test_planar_cell_is_drawn_without_crossings() -> None:
    """Each node continues the one before and c_{k-1}: a ladder, which can be drawn in the plane."""
    cell = [
        (name, source)
        for node in range(2, 6)
        for name, source in (("sep_conv_3x3", 1), ("skip_connect", 0 if node == 2 else node - 1))
    ]
    layout = cell_layout(cell)
    at = {}
    for points in layout.edges:
        for (x, y), (x_next, y_next) in itertools.pairwise(points):
            at.setdefault((x, x_next), set()).add((y, y_next))
    for segments in at.values():
        assert all((a[0] - b[0]) * (a[1] - b[1]) >= 0 for a, b in itertools.combinations(segments, 2))


def test_spread_keeps_order_clearance_and_range() -> None:
    wanted = [0.5, 0.5, 0.9, 0.02, 0.01]
    places = curves._spread(wanted, 0.1)
    assert sorted(range(5), key=places.__getitem__) == [4, 3, 0, 1, 2]
    # By hand: two equal wishes move apart evenly, the pair at the bottom stops at 0, the lone one stays.
    assert places == pytest.approx([0.45, 0.55, 0.9, 0.1, 0.0])
    assert curves._spread([1.0, 1.0, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])


# Files


@pytest.mark.parametrize("normal", [random_cell(3), FAIR])
def test_svg_is_xml_and_names_every_operation_and_node(tmp_path: Path, normal: list[tuple[str, int]]) -> None:
    drawn = Genotype(normal, chain_cell())
    texts = svg_texts(plot_cells(drawn, tmp_path / "cells.svg", title="Cells & <more> $x"))
    for operation in NAMES:
        count = sum(name == operation for name, _ in (*drawn.normal, *drawn.reduce))
        assert texts.count(operation) == count
    assert "none" not in texts
    assert [texts.count(node) for node in "2345"] == [2, 2, 2, 2]
    assert {"Cells & <more> $x", "Normal cell", "Reduction cell", "pooling", "skip connection"} <= set(texts)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_two_writes_are_equal_and_leave_nothing_else(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = draw_all(tmp_path / "a", suffix), draw_all(tmp_path / "b", suffix)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted((tmp_path / "a").iterdir()) == sorted(first)


def test_files_are_of_their_format_and_size(tmp_path: Path) -> None:
    widths = {}
    for path in draw_all(tmp_path, ".PNG"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        widths[path.stem], height = struct.unpack(">II", data[16:24])
        assert 400 < height < 1600
    assert widths == {"cells": 11 * 160, "curves": 9 * 160, "search": 11 * 160}
    assert all(path.read_bytes().startswith(b"%PDF-") for path in draw_all(tmp_path, ".pdf"))
    for path in draw_all(tmp_path, ".svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_callers_matplotlib_is_left_alone_and_does_not_matter(tmp_path: Path) -> None:
    plain = plot_cells(GENOTYPE, tmp_path / "plain.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "lines.linewidth": 9.0}):
        before = dict(matplotlib.rcParams)
        assert plot_cells(GENOTYPE, tmp_path / "styled.svg").read_bytes() == plain
        assert dict(matplotlib.rcParams) == before


def test_pyplot_and_matplotlib_are_not_imported_early(warm: Callable[..., Any], tmp_path: Path) -> None:
    code = (
        "import sys; from genas_plugins.plotting import LossCurve, plot_loss_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_loss_curves([LossCurve('a', (0.1,), (1.0,))], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = warm("torch")(code, folder=tmp_path)
    assert done.status == 0, done.stderr


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Masked(), *sys.meta_path])
    with pytest.raises(ImportError, match=re.escape("pip install 'genas-plugins[plots]'")):
        plot_cells(GENOTYPE, tmp_path / "cells.svg")
    assert not list(tmp_path.iterdir())


class _Masked:
    """An import finder for which matplotlib is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full_disk(self: Figure, path: Path, **kwargs: Any) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "search.png"
    target.write_text("old")
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_search(history(), target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


# Content


def test_loss_curves_show_labels_scores_and_the_best(tmp_path: Path) -> None:
    texts = svg_texts(plot_loss_curves(CURVES, tmp_path / "curves.svg"))
    assert {"first", "second", "score 0.004", "score 0.007, best"} <= set(texts)
    assert {"0", "0.001", "0.003"} <= set(texts)


def test_loss_curves_without_score_have_no_best(tmp_path: Path) -> None:
    bare = [LossCurve(curve.label, curve.sigmas, curve.losses) for curve in CURVES]
    texts = svg_texts(plot_loss_curves(bare, tmp_path / "curves.svg"))
    assert {"first", "second"} <= set(texts)
    assert not [text for text in texts if "best" in text or "score" in text]


def test_many_loss_curves_name_the_eight_best(tmp_path: Path) -> None:
    many = [LossCurve(f"net {i}", (1e-3, 2e-3), (1.0, 1.0 + i / 10), i / 100) for i in range(11)]
    texts = svg_texts(plot_loss_curves(many, tmp_path / "curves.svg"))
    assert {text for text in texts if text.startswith("net")} == {f"net {i}" for i in range(3, 11)}
    assert "grey: 3 more" in texts


@pytest.mark.parametrize(
    ("sigmas", "scale"),
    [
        ((0.0,), "linear"),
        ((0.0, 1e-3, 2e-2), "linear"),
        ((0.0, 1e-3, 2.1e-2), "symlog"),
        ((1e-5, 5e-5, 1e-4), "log"),
    ],
)
def test_sigma_axis_scale(sigmas: tuple[float, ...], scale: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.plot(sigmas, sigmas)
    curves._scale_sigmas(axes, sigmas)
    assert axes.get_xscale() == scale
    assert set(axes.get_xticks()) <= set(sigmas)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.003, "0.003"), (5e-5, "5e-5"), (-2.5e-4, "-2.5e-4"), (12.3456, "12.35")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_search_tells_the_best_with_its_shares(tmp_path: Path) -> None:
    texts = svg_texts(plot_search(list(reversed(history())), tmp_path / "search.svg", title="Search"))
    # Candidate 3 is the first of those that score 0.3; 15 candidates of 1.5 s.
    assert (
        "15 candidates, 1 failed, 22 s of scoring, all candidates added up; best: candidate 3, score 0.3, "
        "slope 5.0 % of Eq. 4, 95 % depth" in texts
    )
    assert {"Search", "random", "mutation", "crossover", "best so far", "failed"} <= set(texts)


def test_search_shows_what_a_race_dropped(tmp_path: Path) -> None:
    records = [*history(), record(15, status="dropped", score=None, estimate=0.1, standard_error=0.01, images=128)]
    texts = svg_texts(plot_search(records, tmp_path / "search.svg"))
    assert any(
        text.startswith(
            "16 candidates, 1 failed, 1 dropped, 24 s of scoring, all candidates added up; best: candidate 3"
        )
        for text in texts
    )
    assert {"failed", "dropped"} <= set(texts)


@pytest.mark.parametrize(
    "records",
    [[record(0, shares={})], [failed(7)], [record(0), record(1, score=0.0)]],
)
def test_search_draws_the_smallest_histories(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    texts = svg_texts(plot_search(records, tmp_path / "search.svg"))
    assert ("no candidate was scored" in texts) == (records[0]["status"] == "failed")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (9000, "2.5 h"), (216000, "2.5 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert search._duration(seconds) == text


# Guards


@pytest.mark.parametrize("name", ["cells", "cells.jpg", "cells.svg.gz"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf"):
        plot_cells(GENOTYPE, tmp_path / name)
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf"):
        plot_loss_curves(CURVES, tmp_path / name)
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf"):
        plot_search(history(), tmp_path / name)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: create it first"):
        plot_cells(GENOTYPE, tmp_path / "nowhere" / "cells.svg")


@pytest.mark.parametrize("drawn", [next(iter(ZOO.values())), "genas_flatness_c100", None])
def test_what_is_not_a_genotype(tmp_path: Path, drawn: Any) -> None:
    with pytest.raises(TypeError, match=f"Genotype, got {type(drawn).__name__}: .*find_genotype"):
        plot_cells(drawn, tmp_path / "cells.svg")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ([], "no loss curve"),
        ([LossCurve("a", (), ())], "0 sigmas and 0 losses"),
        ([LossCurve("a", (0.1, 0.2), (1.0,))], "2 sigmas and 1 losses"),
        ([LossCurve("a", (0.1,), (math.nan,))], "'a' has a value that is not finite"),
        ([LossCurve("a", (math.inf,), (1.0,))], "not finite"),
        ([LossCurve("a", (0.1,), (1.0,), math.inf)], "not finite"),
        ([LossCurve("a", (-0.1, 0.2), (1.0, 1.0))], "none below 0"),
        ([LossCurve("a", (0.2, 0.2), (1.0, 1.0))], "increasing"),
    ],
)
def test_bad_curves(tmp_path: Path, drawn: list[LossCurve], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_loss_curves(drawn, tmp_path / "curves.svg")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no candidate"),
        (
            [{"index": 0, "generation": 0, "origin": "random", "status": "ok"}],
            "Record 0 of the search history lacks candidate",
        ),
        (
            [record(3, origin="luck")],
            "Candidate 3 has origin 'luck': choose from random, mutation, crossover",
        ),
        ([record(3, status="late")], "has the status 'late', expected one of ok, failed, dropped"),
        ([record(3, score=None)], "has None as score"),
        ([record(3, score=math.nan)], "has nan as score"),
    ],
)
def test_bad_records(tmp_path: Path, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_search(records, tmp_path / "search.svg")


def test_scatter_draws_every_column_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    from genas_plugins.plotting import plot_scatter

    accuracies = [10.0, 90.0, 91.0, 92.0, 94.0]
    scores = {"up": [1.0, 2.0, 3.0, 4.0, 5.0], "tied": [0.0, 0.0, 0.0, 1.0, 1.0]}
    written = plot_scatter(scores, accuracies, tmp_path / "scatter.svg", {"up": 1.0, "tied": 0.745})
    text = written.read_text()
    assert all(word in text for word in ("up", "tied", "τ = 1.000", "τ = 0.745", "91.0", "rank by score"))
    long = "-depth: cumulative, all, 0.002 0.01 0.02, common, 4 draws"
    wide = plot_scatter(
        {long: scores["up"], **scores}, accuracies, tmp_path / "long.svg", dict.fromkeys((long, *scores), 1.0)
    )
    lines = re.findall(r">([^<>]+)</text>", wide.read_text())
    assert "-depth: cumulative, all, 0.002 0.01" in lines and "0.02, common, 4 draws" in lines
    # A marker for each architecture in each panel.
    assert text.count("<use ") >= 2 * len(accuracies)
    with pytest.raises(ValueError, match="There is no column"):
        plot_scatter({}, accuracies, tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="short has 2 scores for 5 accuracies"):
        plot_scatter({"short": [1.0, 2.0]}, accuracies, tmp_path / "x.png", {"short": 0.0})
