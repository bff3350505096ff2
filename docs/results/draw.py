"""``python docs/results/draw.py``: the tables and pictures of the pages, drawn from the figures in this folder.

``results.yaml`` says of each file of figures how it was measured, and which of its lines and columns a page shows. A
page has a table between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. With ``--check`` nothing is written,
and the command ends with 1 where a table or a picture is not that of the figures, and names it. A picture ends with a
digest of what it shows; its bytes are compared as well where matplotlib has the version that drew it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from genas_plugins.plotting._style import GREY, PALETTE, figure_file

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent
PICTURES = PAGES / "images" / "results"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FIELD = re.compile(r"\{(\w+)\}")
Rows = list[dict[str, str]]


def index(folder: Path = HERE) -> dict[str, Any]:
    """What ``results.yaml`` says."""
    return yaml.safe_load((folder / "results.yaml").read_text(encoding="utf-8"))


def rows_of(name: str, spec: Mapping[str, Any], folder: Path = HERE) -> Rows:
    """The lines of a file that a table or a picture shows, in the order in which it names them.

    Raises:
        ValueError: There is no such line.
    """
    with (folder / f"{spec.get('file', name)}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if "rows" not in spec:
        return rows
    shown = []
    for start in spec["rows"]:
        # A name, or how it begins; with $ at its end it is the whole.
        found = [row for row in rows if f"{next(iter(row.values()))}$".startswith(start)]
        if not found:
            raise ValueError(f"{name}: no line of the file begins with {start!r}.")
        shown += found
    return shown


def filled(template: str, row: Mapping[str, str]) -> str:
    """A cell: the template with its columns, empty where they are; a unit or an interval that is empty is left out."""
    names = _FIELD.findall(template)
    if not any(row[name] for name in names):
        return ""
    text = _FIELD.sub(lambda match: row[match[1]], template)
    return re.sub(r" ?[(\[](, | - )?[)\]]", "", text).strip(" ,/-" if not all(row[name] for name in names) else " ")


def table(name: str, spec: Mapping[str, Any], folder: Path = HERE) -> str:
    """The lines of a table in Markdown, each with its end."""
    lines = [list(spec["columns"]), ["---"] * len(spec["columns"])]
    lines += [[filled(text, row) for text in spec["columns"].values()] for row in rows_of(name, spec, folder)]
    # A star is a star, and begins no italics.
    return "".join(re.sub(r" +", " ", f"| {' | '.join(cells)} |\n").replace("*", "\\*") for cells in lines)


def page_with_tables(text: str, tables: Mapping[str, Any], folder: Path = HERE) -> str:
    """A page with each of its tables as the figures have it."""
    return _TABLE.sub(lambda match: f"{match[1]}{table(match[2], tables[match[2]], folder)}{match[3]}", text)


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _intervals(axes: Any, spec: Mapping[str, Any], rows: Rows) -> None:
    """A line for each row, a dot for each series of it, from the low to the high end of its interval."""
    series = spec["series"]
    for number, (name, column) in enumerate(series.items()):
        place = [line + (number - (len(series) - 1) / 2) * 0.8 / len(series) for line in range(len(rows))]
        ends = [[_number(row[column + end]) for end in ("", "_low", "_high")] for row in rows]
        middle = [value for value, _, _ in ends]
        spans = list(zip(*[(value - low, high - value) for value, low, high in ends], strict=True))
        axes.errorbar(middle, place, xerr=spans, fmt="o", ms=3.5, lw=1.1, color=PALETTE[number], label=name)
    axes.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(row[spec["label"]], 36)) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel(spec["x"])
    if "line" in spec:
        axes.axvline(spec["line"][0], color=GREY, lw=1, ls="--", label=spec["line"][1])


def _lines(axes: Any, spec: Mapping[str, Any], rows: Rows) -> None:
    """A line for each series over the column ``over``."""
    for number, (name, column) in enumerate(spec["series"].items()):
        points = [(_number(row[spec["over"]]), _number(row[column])) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3.5, color=PALETTE[number], label=name)
    if "floor" in spec:
        axes.axhline(spec["floor"][0], color=GREY, lw=1, ls="--", label=spec["floor"][1])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_xlabel(spec["over"])
    axes.set_ylabel(spec["y"])


def _bars(axes: Any, spec: Mapping[str, Any], rows: Rows) -> None:
    """A bar for each row."""
    ((name, column),) = spec["series"].items()
    axes.barh(range(len(rows)), [_number(row[column]) for row in rows], color=PALETTE[0], height=0.6, label=name)
    axes.set_yticks(range(len(rows)), [", ".join(row[part] for part in spec["label"]) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel(spec["x"])


_Kind = Callable[[Any, Mapping[str, Any], Rows], None]
_KINDS: dict[str, _Kind] = {
    "intervals": _intervals,
    "lines": _lines,
    "bars": _bars,
}


def digest(spec: Mapping[str, Any], rows: Rows) -> str:
    """What a picture shows, as a number."""
    return hashlib.sha256(json.dumps([spec, rows], sort_keys=True).encode()).hexdigest()


def draw(name: str, spec: Mapping[str, Any], path: Path, folder: Path = HERE) -> None:
    """Write a picture as SVG."""
    rows = rows_of(name, spec, folder)
    across = spec["kind"] != "lines"
    count = len(rows) * len(spec["series"])
    with figure_file(path, 7.4 if across else 5.2, 0.9 + 0.1 * count + 0.1 * len(rows) if across else 2.7) as figure:
        axes = figure.subplots()
        _KINDS[spec["kind"]](axes, spec, rows)
        if len(spec["series"]) > 1 or "line" in spec or "floor" in spec:
            # Above, where it covers nothing.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, borderaxespad=0.2)
        figure.tight_layout(pad=0.5)
    text = re.sub(r"[ \t]+$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    path.write_text(f"{text.rstrip()}\n<!-- {digest(spec, rows)} -->\n", encoding="utf-8")


def differences(folder: Path = HERE, pages: Path = PAGES, pictures: Path = PICTURES) -> Iterator[str]:
    """Each table and picture that is not that of the figures, in a sentence."""
    told = index(folder)
    for path in sorted(pages.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if page_with_tables(text, told["tables"], folder) != text:
            yield f"{path.relative_to(pages)} has a table that is not that of the figures."
    version = f"Matplotlib v{importlib.metadata.version('matplotlib')}"
    with tempfile.TemporaryDirectory() as scratch:
        for name, spec in told["pictures"].items():
            path = pictures / f"{name}.svg"
            kept = path.read_text(encoding="utf-8") if path.is_file() else ""
            if f"<!-- {digest(spec, rows_of(name, spec, folder))} -->" not in kept:
                yield f"{path.name} is not drawn from the figures."
            elif version in kept:
                draw(name, spec, Path(scratch) / path.name, folder)
                if (Path(scratch) / path.name).read_text(encoding="utf-8") != kept:
                    yield f"{path.name} is not what this script draws."
    for path in sorted(pictures.glob("*.svg")):
        if path.stem not in told["pictures"]:
            yield f"{path.name} is no picture of results.yaml."


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all, or check all; 1 where something differs."""
    parser = argparse.ArgumentParser(description="Tables and pictures of the pages, drawn from the figures.")
    parser.add_argument("--check", action="store_true", help="write nothing, and end with 1 where something differs")
    if parser.parse_args(arguments).check:
        found = list(differences())
        for sentence in found:
            print(f"{sentence} Run: python docs/results/draw.py", file=sys.stderr)
        return int(bool(found))
    told = index()
    for path in sorted(PAGES.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (drawn := page_with_tables(text, told["tables"])) != text:
            path.write_text(drawn, encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, spec in told["pictures"].items():
        draw(name, spec, PICTURES / f"{name}.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
