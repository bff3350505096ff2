"""The reference has every key, command and option, and the pages stay as short as they promise."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from genas_plugins.correlation.settings import Column, LogarithmicSum, Sum
from genas_plugins.experiment.config import Experiment

ROOT = Path(__file__).parents[2]
PAGES = [path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.name != "CHANGELOG.md"]
MOST_WORDS = 1_500
# Only where Detectron2 is, or in the documents of the host, are these typed.
OWN_COMMANDS = ("convert", "correlate", "fit", "plot", "score", "zoo")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "site" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def keys(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all settings, sections included."""
    for name, value in data.items():
        yield f"{prefix}{name}"
        # Arguments of other packages are theirs.
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{name}.")


def rows(page: str) -> dict[str, list[str]]:
    """Type, default and meaning of each key."""
    lines = [line[2:-2] for line in page.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in (re.split(r"(?<!\\) \| ", line) for line in lines)}


def test_every_key_of_an_experiment_has_type_default_and_meaning(reference: ModuleType) -> None:
    found = rows(reference.settings_page("experiment"))
    assert set(keys(dataclasses.asdict(Experiment()))) <= set(found)
    assert {"score.neighbourhood.distance", "search.constraints.macs.max"} <= set(found)
    for key, (kind, _, meaning) in found.items():
        assert kind and len(meaning) > 3, key
    assert found["training.momentum"][:2] == ["a number (at least 0, below 1)", "`0.9`"]
    assert found["training.devices"][:2] == ["a whole number (at least 1, at most 1,024) or one of auto", "`1`"]
    assert found["score.recalibration_images"][1] == "`null`"


def test_every_key_of_a_correlation_has_type_default_and_meaning(reference: ModuleType) -> None:
    page = reference.settings_page("correlate")
    found = rows(page)
    for kind in (Column, Sum, LogarithmicSum):
        assert {field.name for field in dataclasses.fields(kind)} <= set(found)
    assert all(kind and len(meaning) > 3 for kind, _, meaning in found.values())
    assert found["rank_sum"][1] == "required" and page.count("\n## A column") == 3


def test_every_key_of_a_training_has_type_default_and_meaning(reference: ModuleType) -> None:
    pytest.importorskip("timm")
    found = rows(reference.settings_page("timm"))
    fields = importlib.import_module("timm_models.settings").Settings.__dataclass_fields__
    assert set(fields) == set(found)
    assert all(kind and len(meaning) > 3 for kind, _, meaning in found.values())


def test_a_key_without_a_meaning_would_be_found(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {"properties": {"key": {"type": "integer", "default": 3}}}
    monkeypatch.setattr(reference, "schema_of", lambda kind: bare)
    assert rows(reference.settings_page("experiment")) == {"key": ["a whole number", "`3`", ""]}


def test_every_command_and_option_is_there_with_an_example(reference: ModuleType) -> None:
    entries = ConfigParser()
    entries.read(ROOT / "setup.cfg")
    lines = entries["options.entry_points"]["genas_plugins.commands"].split("\n")
    hosts = {name.split(" =")[0] for name in lines if name}
    commands = reference.commands()
    assert {f"genas {name}" for name in (*OWN_COMMANDS, *hosts)} <= set(commands)
    for typed in commands.values():
        assert reference._examples(typed), f"no document has an example of {typed}"
    for name in OWN_COMMANDS:
        path = ROOT / "genas_plugins" / "cli" / f"{name}.py"
        told = reference._help(f"genas {name}")
        options = [
            node.args[0].value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("add_argument", "add_option"))
        ]
        assert [option for option in options if option.startswith("-") and option not in told] == [], name
        assert "usage: genas" in told and len(told.splitlines()) > 5, name


def test_every_package_has_a_page_with_all_that_it_exports(reference: ModuleType) -> None:
    made = reference.api_pages()
    for package in reference.PACKAGES:
        page = made[f"reference/api/{package}.md"]
        names = reference.exported(ROOT / package / "__init__.py")
        assert names and [name for name in names if name not in page] == []
    assert "::: genas_plugins.scoring.flatness" in made["reference/api/genas_plugins.scoring.md"]


def test_references_and_examples_of_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("roles", ROOT / "docs" / "site" / "roles.py")
    roles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(roles)
    assert roles.as_markdown("See :func:`~a.b`.") == (
        'See <autoref identifier="a.b" optional><code>b</code></autoref>.'
    )
    assert 'identifier="here.f"' in roles.as_markdown(":func:`f`", "here")
    assert roles.as_markdown("One.\n\n>>> 1 + 1\n2\n\nTwo.") == "One.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nTwo."


def test_the_navigation_has_every_page() -> None:
    # MkDocs says so as well, where it is installed.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in text] == []
    assert yaml.safe_load(text)["validation"].values() and "strict" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in PAGES])
def test_a_page_is_read_in_minutes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    if path == ROOT / "README.md":
        assert text.count("\n") < 120
