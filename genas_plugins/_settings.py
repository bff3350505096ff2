"""Files of settings: dataclasses that pydantic checks, and one sentence about what it refuses.

Nothing is converted but what YAML leaves open: keys and values make a section, a list makes a tuple, a whole number is
a number, and so is ``1e-3``, which YAML reads as text for want of a dot.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from genas_plugins._messages import escaped, shown, suggestion
from genas_plugins._reading import ReadingError, read_yaml, user_path
from genas_plugins.checks import MOST_IMAGES
from genas_plugins.files import packaged_configs

__all__ = [
    *("Dotless", "ImageCount", "Listed", "Real", "Reals"),
    *("checked", "find_file", "meanings", "read_file", "schema_of", "settings"),
]

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
# 0.1 is text only where somebody has quoted it.
_DOTLESS = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+", re.ASCII)
_BOUNDS = {"gt": "be larger than", "ge": "be at least", "lt": "be smaller than", "le": "be at most"}
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "string": "text",
}
T = TypeVar("T")

Dotless = BeforeValidator(lambda value: float(value) if isinstance(value, str) and _DOTLESS.fullmatch(value) else value)
"""On a type of numbers, behind their bounds: takes those that YAML reads as text as well."""
Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""On a type of tuples: takes lists as well."""
ImageCount = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Real = Annotated[float, Dotless]
Reals = Annotated[tuple[Real, ...], FailFast(), Listed]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(error: type[ValueError]) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass that raises ``error`` where its values are not of their types, or not in their bounds."""

    def decorate(kind: type[T]) -> type[T]:
        kind.__get_pydantic_core_schema__ = classmethod(_taking_plain_data)  # type: ignore[attr-defined]
        kind.__get_pydantic_json_schema__ = classmethod(_with_meanings)  # type: ignore[attr-defined]
        kind = dataclass(kind, frozen=True, kw_only=True, config=_CONFIG)
        make = kind.__init__

        def construct(self: T, /, **values: Any) -> None:
            try:
                make(self, **values)
            except ValidationError as found:
                raise error(_sentence(found, kind, values, kind.__name__)) from None

        kind.__init__ = construct  # type: ignore[method-assign]
        return kind

    return decorate


def _taking_plain_data(kind: type, source: Any, handler: Any) -> Any:
    """The schema of a section, for which pydantic wants an instance where it converts nothing else."""
    schema = handler(source)
    handler.resolve_ref_schema(schema)["strict"] = False
    return schema


def _with_meanings(kind: type, schema: Any, handler: Any) -> Any:
    """The JSON schema of a section, in which each setting has its meaning."""
    made = handler(schema)
    told, section = meanings(kind), handler.resolve_ref_schema(made)
    section["description"] = section.get("description", "").partition("\n\nAttributes:")[0]
    for name, entry in section["properties"].items():
        if name in told:
            entry.setdefault("description", told[name])
    return made


def meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a type of settings, and of those that it is derived from, say of each setting."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        # Not what a class without a docstring inherits.
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        for part in re.findall(r"^(?:Attributes|Args):\n((?:    .*\n?|\n)+)", text, re.MULTILINE):
            for name, meaning in re.findall(r"^    (\w+): ((?:.|\n {5,})+)", part, re.MULTILINE):
                found.setdefault(name, " ".join(meaning.split()))
    return found


def checked(kind: type[T], data: Any, error: type[ValueError], whole: str) -> T:
    """Settings from the plain data of a file, which messages call ``whole``; raises ``error`` where they do not fit."""
    try:
        return TypeAdapter(kind).validate_python(dict(data) if isinstance(data, Mapping) else data)
    except ValidationError as found:
        raise error(_sentence(found, kind, data, whole)) from None


def find_file(name_or_path: str | Path, host: str, what: str, error: type[Exception]) -> Path:
    """A file by its path, or one of those that come with the package for ``host`` by its name."""
    path, known = user_path(name_or_path), packaged_configs(host)
    if not path.is_file() and str(name_or_path) not in known:
        near = suggestion(name_or_path, known)
        raise error(f"There is no {what} {shown(str(name_or_path))}{near}; the package has: {', '.join(known)}.")
    return path if path.is_file() else known[str(name_or_path)]


def read_file(path: Path, error: type[ValueError], form: type[T]) -> T:
    """What a YAML file holds, a ``dict`` or a ``list``; an empty one holds nothing."""
    try:
        data = read_yaml(path)
    except ReadingError as found:
        raise error(f"{path} is not a YAML file: {found}.") from found
    if not isinstance(data, form) or not data:
        expected = "keys and values" if form is dict else "a list of settings"
        raise error(f"{path} must hold {expected}, got {shown(data)}.")
    return data


def _sentence(found: ValidationError, kind: type, data: Any, whole: str) -> str:
    """The first thing that is wrong, an unknown key before what is missing for it."""
    first = min(found.errors(include_url=False), key=lambda problem: problem["type"] not in _UNKNOWN)
    problem, place, context = first["type"], first["loc"], first.get("ctx", {})
    *parents, last = place or [""]
    absent = problem in (*_UNKNOWN, "missing")
    path, node, data = _find(parents if absent else place, schema_of(kind), data)
    section, _, name = path.rpartition(".")
    if problem in _UNKNOWN:
        named = f"{path}." * bool(path) + escaped(last) + suggestion(last, node["properties"])
        return f"unknown key {named}; valid keys of {path or whole}: {', '.join(node['properties'])}."
    if problem == "value_error":
        return f"{path}: " * bool(path) + str(context["error"])
    bounds = [f"{_BOUNDS[end]} {value:,}" for end, value in context.items() if end in _BOUNDS]
    if bounds or problem == "finite_number":
        must = "not be negative" if bounds == ["be at least 0"] else "".join(bounds) or "be finite"
        return f"{section}: " * bool(section) + f"{name} must {must}, got {shown(data)}."
    if "properties" not in node:
        return f"{path} must be {_described(node)}, got {shown(data)}."
    return f"{path or whole} must hold keys and values{f', among them {last}' * absent}, got {shown(data)}."


@cache
def schema_of(kind: type) -> dict[str, Any]:
    """The JSON schema of a type of settings, built once; for reading only."""
    return TypeAdapter(kind).json_schema()


def _find(place: Iterable[str | int], schema: dict[str, Any], data: Any) -> tuple[str, dict[str, Any], Any]:
    """The path of a setting, its schema and its value: of the last part of a place that a user has written."""
    path, node = "", schema
    for part in place:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if inner is None:
            # Of several types that a setting may have, pydantic names the one that it tried.
            break
        # A section that may be written in another way as well.
        inner = next((form for form in inner.get("anyOf", []) if "$ref" in form), inner)
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        node, data = schema["$defs"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner, data[part]
    return path, node, data


def _described(node: Mapping[str, Any]) -> str:
    """What a schema takes, in words."""
    if "anyOf" in node:
        return " or ".join(map(_described, node["anyOf"]))
    if "const" in node or "enum" in node:
        return "one of " + ", ".join(choice or "empty" for choice in node.get("enum", [node.get("const")]))
    if node["type"] != "array":
        return _WORDS.get(node["type"], "keys with values")
    least, items = node.get("minItems"), "texts" if node.get("items", {}).get("type") == "string" else "numbers"
    if "maxItems" in node:
        return "a list of one number" if least == 1 else f"a list of {least} {items}"
    return f"a list of {items if least is None else f'{least} or more {items}'}"
