"""Figures of the documents are those of the data files: tables and pictures by the script, the text by search."""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "docs" / "results"
# Pages whose running text has no figure but those of data files.
MEASURED = [
    *("reproduction.md", "reproduction-nasbench201.md", "performance.md", "performance-networks.md"),
    "howto/which-metric.md",
]
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\.\w)")
# Dates and settings of the paper or of a command, which nobody measures.
_OTHERS = re.compile(
    r"https?://\S+|\b20\d\d-\d\d-\d\d\b|Tables? [\d, and]+|\d+x\d+|15,625|S = 0 and 1|\b0\.6 G|IJCAI 2023"
)
_UNWRITTEN = re.compile("script|loop|arithmetic|not measured|a batch|nine runs|replayed")


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_results", RESULTS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_results"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def told(draw: ModuleType) -> dict[str, Any]:
    return draw.index()


def test_tables_and_pictures_are_those_of_the_figures(draw: ModuleType) -> None:
    assert list(draw.differences()) == []


def test_a_figure_that_was_changed_is_found(draw: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "timm_cifar10.csv"
    path.write_text(path.read_text().replace("65.70", "75.70"))
    path = tmp_path / "results" / "scoring.csv"
    path.write_text(path.read_text().replace("0.631", "0.531"))
    assert list(draw.differences(tmp_path / "results")) == [
        "performance.md has a table that is not that of the figures.",
        "timm_cifar10.svg is not drawn from the figures.",
    ]


def test_every_file_says_how_it_was_measured(told: dict[str, Any]) -> None:
    assert set(told["files"]) == {path.stem for path in RESULTS.glob("*.csv")}
    for name, entry in told["files"].items():
        assert list(entry) == ["question", "command", "date", "machine", "settings"], name
        assert entry["question"].endswith("?") and re.fullmatch(r"\d{4}-\d\d-\d\d", str(entry["date"])), name
        assert entry["command"] or _UNWRITTEN.search(entry["settings"]), name
        assert entry["machine"] in told["machines"] or " " in entry["machine"], name
        with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        assert lines and all(re.fullmatch("[0-9a-f]{7,}|", line["commit"]) for line in lines), name


def test_what_is_drawn_is_shown(told: dict[str, Any]) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md")))
    assert [name for name in told["tables"] if f"<!-- table: {name} -->" not in text] == []
    assert [name for name in told["pictures"] if f"images/results/{name}.svg" not in text] == []


def numbers(text: str) -> set[str]:
    """The numbers of a text, without commas between thousands."""
    return {found.replace(",", "") for found in _NUMBER.findall(_OTHERS.sub(" ", text))}


def prose(text: str) -> str:
    """A page without its blocks, tables, code and places of links."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|.*$|^\d+\. ", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)


def measured(told: dict[str, Any]) -> set[str]:
    """All numbers of the files and of what is said about them."""
    known = numbers(str(told["files"]))
    for path in RESULTS.glob("*.csv"):
        known |= numbers(path.read_text(encoding="utf-8").replace(",", " ").replace('"', " "))
        known |= {number.lstrip("-") for number in known}
    return known


@pytest.mark.parametrize("page", MEASURED)
def test_numbers_of_the_running_text_are_those_of_the_figures(page: str, told: dict[str, Any]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = numbers(prose(text))
    assert found
    # Small whole numbers count things.
    assert sorted(number for number in found - measured(told) if "." in number or abs(float(number)) > 30) == []


def test_a_number_that_nobody_measured_is_found(told: dict[str, Any]) -> None:
    assert numbers(prose("It takes 4.321 s, `python x.py 9.99`, and 12,345 images.")) == {"4.321", "12345"}
    assert not {"4.321", "12345"} & measured(told)
