"""Pages of the reference, made from the code: settings from their types, commands from their parsers, packages from
their files. ``hooks.py`` hands them to MkDocs; ``tests/core/test_reference.py`` holds them against the code.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from genas_plugins._settings import _described, schema_of

__all__ = ["SETTINGS", "api_pages", "command_pages", "commands", "pages", "settings_page", "summary"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("genas_plugins", "nni_strategy", "timm_models", "mmseg_backbones", "detectron2_backbones")
SETTINGS = {
    "experiment": ("genas_plugins.experiment.config:Experiment", "Settings of a search", "nni"),
    "correlate": ("genas_plugins.correlation.settings:File", "Settings of a correlation", "correlate"),
    "timm": ("timm_models.settings:Settings", "Settings of a training", "timm"),
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def pages() -> dict[str, str]:
    """All pages by their paths under ``docs``."""
    made = {f"reference/settings-{name}.md": settings_page(name) for name in SETTINGS}
    return made | command_pages() | api_pages()


# Settings.


def _plain(text: str) -> str:
    """A meaning for the cell of a table."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return f"{text[:1].upper()}{text[1:]}".rstrip(".").replace("|", "\\|")


def _type(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a setting takes, in words, with its bounds."""
    forms = node.get("anyOf", [node])
    told = []
    for form in forms:
        if "$ref" in form:
            told.append("keys and values")
            continue
        # What no number of a file comes near is no bound to tell.
        bounds = [f"{words} {form[name]:,}" for name, words in _BOUNDS.items() if abs(form.get(name, 2**63)) < 2**62]
        told.append(_described(form) + f" ({', '.join(bounds)})" * bool(bounds))
    return " or ".join(told)


def _rows(node: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, schema and section of each setting; a section comes before its settings."""
    for name, entry in node["properties"].items():
        inner = next((form for form in entry.get("anyOf", [entry]) if "$ref" in form), None)
        section = definitions[inner["$ref"].rpartition("/")[2]] if inner else None
        yield f"{prefix}{name}", entry, section
        if section is not None:
            yield from _rows(section, definitions, f"{prefix}{name}.")


def _default(entry: Mapping[str, Any]) -> str:
    if "default" not in entry:
        return "" if "anyOf" in entry or "$ref" in entry else "empty"
    return f"`{json.dumps(entry['default'])}`"


def _table(node: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, required: bool) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, entry in node["properties"].items():
        default = "required" if required and name in node.get("required", ()) else _default(entry)
        kind, meaning = _type(entry, definitions), _plain(entry.get("description", ""))
        yield f"| `{prefix}{name}` | {kind} | {default} | {meaning} |\n"


def _sections(node: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A heading and a table for each section, those within it behind it."""
    inner = [(path, section) for path, _, section in _rows(node, definitions, prefix) if section is not None]
    own = {"properties": {name: node["properties"][name] for name in node["properties"]}}
    yield "".join(_table(own | {"required": node.get("required", ())}, definitions, prefix, True))
    for path, section in inner:
        if "." in path.removeprefix(prefix):
            continue
        yield f"\n## {path}\n\n{_plain(section.get('description', '').partition(chr(10) * 2)[0])}.\n\n"
        yield from _sections(section, definitions, f"{path}.")


def settings_page(name: str) -> str:
    """The page of a kind of files of settings: every key with its type, its default and its meaning."""
    place, title, folder = SETTINGS[name]
    module, _, kind = place.partition(":")
    schema = schema_of(getattr(importlib.import_module(module), kind))
    definitions = schema.get("$defs", {})
    lines = [f"# {title}\n\nMade from `{place.replace(':', '.')}`. Files that come with the package are in ", ""]
    lines[1] = f"`configs/{folder}`; editors read the same as `configs/schemas/{folder}.json`.\n\n"
    if "properties" in schema:
        return "".join([*lines, *_sections(schema, definitions, "")])
    # A list of items of several kinds.
    for form in schema["items"]["anyOf"]:
        node = definitions[form["$ref"].rpartition("/")[2]]
        lines.append(f"\n## {_plain(node['description'].partition(chr(10) * 2)[0])}\n\n")
        lines += _sections(node, definitions, "")
    return "".join(lines)


# Commands.


def commands() -> dict[str, str]:
    """What is typed, by the name of each command: subcommands of ``genas``, and modules that are programs."""
    subcommands = importlib.import_module("genas_plugins.cli").subcommands()
    found = {f"genas {name}": f"genas {name}" for name in subcommands}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.stem == "__main__" or '__name__ == "__main__"' not in path.read_text(encoding="utf-8"):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if name.startswith("genas_plugins.cluster."):
                # Started by the package itself; what people type is genas trial.
                continue
            found[name] = f"python -m {name}"
    return found


def _help(name: str) -> str:
    """What a command prints when it is asked for help."""
    program, *rest = name.split()
    told, stderr = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ, {"COLUMNS": "84", "NO_COLOR": "1"})
    line = mock.patch.object(sys, "argv", [program, *rest, "--help"])
    with (
        warnings.catch_warnings(),
        environment,
        line,
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            # A program whose package has imported it already is run anew, of which runpy warns.
            warnings.simplefilter("ignore", RuntimeWarning)
            if program == "genas":
                importlib.import_module("genas_plugins.cli").main([*rest, "--help"])
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit:
            pass
        except ImportError as error:
            return f"{error}\n"
    # Where our launchers hand over to the host's script, the name is that script's.
    return re.sub(r"^usage: \S+\.py", f"usage: python -m {program}", told.getvalue())


def _lines() -> Iterator[str]:
    """Commands that documents type, and those in configurations."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield from re.sub(r"\s+#.*", "", line).split(" && ")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        yield from re.findall(r"^ *trialCommand: (.+?)(?: +#.*)?$", path.read_text(encoding="utf-8"), re.MULTILINE)


def _examples(typed: str) -> list[str]:
    """The first three different lines that use a command."""
    command = re.compile(rf"(?<![\w.]){re.escape(typed.removeprefix('python '))}(?=\s|$)")
    found = dict.fromkeys(re.sub(r" +", " ", line).strip() for line in _lines() if command.search(line))
    return list(found)[:3]


def command_pages() -> dict[str, str]:
    """A page for ``genas`` and one for the programs of the hosts: help and examples of each."""
    texts = {"genas": "# The genas command\n", "programs": "# Programs\n"}
    for name, typed in commands().items():
        page = "genas" if name.startswith("genas ") else "programs"
        texts[page] += f"\n## {typed}\n\n"
        if examples := _examples(typed):
            texts[page] += "```bash\n" + "\n".join(examples) + "\n```\n\n"
        texts[page] += f"```text\n{_help(name).rstrip()}\n```\n"
    return {f"reference/commands-{name}.md": text for name, text in texts.items()}


# Packages.


def exported(path: Path) -> list[str]:
    """The names in ``__all__`` of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)]
    return []


def _defined(path: Path) -> dict[str, str]:
    """Where names of a file come from: the module of each that it imports."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0].split())


def _package_page(folder: Path) -> str:
    """A package: the names that it exports, then each of its public modules."""
    name = ".".join(folder.relative_to(ROOT).parts)
    init = folder / "__init__.py"
    imported, names = _defined(init), exported(init)
    text = f"# {name}\n\n{_plain(summary(init))}.\n"
    if names:
        links = [
            f'<autoref identifier="{imported.get(one, f"{name}.{one}")}" optional><code>{one}</code></autoref>'
            for one in names
        ]
        text += f"\n`from {name} import` " + ", ".join(links) + "\n"
    for path in sorted(folder.glob("*.py")):
        own = [one for one in exported(path) if path.name != "__init__.py" or one not in imported]
        if path.stem.startswith("_") and path.name != "__init__.py" and not set(own) & set(names):
            continue
        own = [one for one in own if not one.startswith("__")]
        if own:
            module = name if path.name == "__init__.py" else f"{name}.{path.stem}"
            members = "".join(f"        - {one}\n" for one in own)
            text += f"\n## {module}\n\n::: {module}\n    options:\n      members:\n{members}      heading_level: 3\n"
    return text


def api_pages() -> dict[str, str]:
    """A page for each package and each package within one."""
    made = {}
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            if init.parent.name.startswith("_") or init.parent.name == "cli":
                continue
            name = ".".join(init.parent.relative_to(ROOT).parts)
            if "\n:::" in (text := _package_page(init.parent)):
                made[f"reference/api/{name}.md"] = text
    return made
