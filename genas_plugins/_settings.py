"""Files of settings: dataclasses that pydantic checks, and one sentence about what it refuses.

Nothing is converted but what YAML leaves open: keys and values make a section, a list makes a tuple, a whole number is
a number, and so is ``1e-3``, which YAML reads as text for want of a dot.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import dataclass_transform

from genas_plugins._messages import escaped, shown
from genas_plugins.checks import MOST, MOST_IMAGES, MOST_SEED

__all__ = [
    "Count",
    "Dotless",
    "ImageCount",
    "Listed",
    "Real",
    "Reals",
    "Seed",
    "checked",
    "schema_of",
    "settings",
    "suggestion",
]

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
# 0.1 is text only where somebody has quoted it.
_DOTLESS = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+", re.ASCII)
_BOUNDS = {
    "greater_than": "be larger than",
    "greater_than_equal": "be at least",
    "less_than": "be smaller than",
    "less_than_equal": "be at most",
    "finite_number": "be finite",
}
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
_WORDS = {
    "array": "a list of numbers",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "keys with values",
    "string": "text",
}
T = TypeVar("T")

Dotless = BeforeValidator(lambda value: float(value) if isinstance(value, str) and _DOTLESS.fullmatch(value) else value)
"""On a type of numbers, behind their bounds: takes those that YAML reads as text as well."""
Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""On a type of tuples: takes lists as well."""
Count = Annotated[int, Field(ge=1, le=MOST)]
ImageCount = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Real = Annotated[float, Dotless]
Reals = Annotated[tuple[Real, ...], FailFast(), Listed]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(error: type[ValueError]) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass whose fields are checked against their types whenever one is made.

    Args:
        error: What is raised where they do not fit, or where ``__post_init__`` raises ``ValueError``.
    """

    def decorate(kind: type[T]) -> type[T]:
        kind.__get_pydantic_core_schema__ = classmethod(_taking_plain_data)  # type: ignore[attr-defined]
        kind = dataclass(kind, frozen=True, kw_only=True, config=_CONFIG)
        make = kind.__init__

        @functools.wraps(make)
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


def checked(kind: type[T], data: Any, error: type[ValueError], whole: str) -> T:
    """Settings from plain data.

    Args:
        kind: A class of :func:`settings`.
        data: Keys and values, as a file has them.
        error: What is raised if they do not fit.
        whole: What ``data`` are, in messages.

    Raises:
        ValueError: An ``error``, with one sentence: the setting, what came, what is expected or the valid choices.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(data) if isinstance(data, Mapping) else data)
    except ValidationError as found:
        raise error(_sentence(found, kind, data, whole)) from None


def suggestion(name: object, known: Iterable[str]) -> str:
    """The known name that is most like another, as a question in brackets; empty if none is."""
    close = difflib.get_close_matches(str(name)[:100], list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def schema_of(kind: Any, title: str) -> dict[str, Any]:
    """The JSON schema of a type, for editors."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **TypeAdapter(kind).json_schema(schema_generator=_Untitled),
        "title": title,
    }


class _Untitled(GenerateJsonSchema):
    """Without titles that only repeat the names of settings."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _sentence(found: ValidationError, kind: type, data: Any, whole: str) -> str:
    """The first thing that is wrong, an unknown key before what is missing for it."""
    first = min(found.errors(include_url=False), key=lambda problem: problem["type"] not in _UNKNOWN)
    problem, place, last = first["type"], first["loc"], None
    if problem in (*_UNKNOWN, "missing"):
        *place, last = place
    path, node, value = _find(place, TypeAdapter(kind).json_schema(), data)
    if problem in _UNKNOWN:
        known = node["properties"]
        name = f"{path}." * bool(path) + escaped(last)
        return f"unknown key {name}{suggestion(last, known)}; valid keys of {path or whole}: {', '.join(known)}."
    if problem == "value_error":
        return f"{path}: " * bool(path) + str(first["ctx"]["error"])
    if problem in _BOUNDS:
        section, _, name = path.rpartition(".")
        bound = "".join(f" {end:,}" if isinstance(end, int) else f" {end:g}" for end in first.get("ctx", {}).values())
        must = "not be negative" if (problem, bound) == ("greater_than_equal", " 0") else _BOUNDS[problem] + bound
        return f"{section}: " * bool(section) + f"{name} must {must}, got {shown(value)}."
    if "properties" not in node:
        return f"{path} must be {_described(node)}, got {shown(value)}."
    among = f", among them {last}" if problem == "missing" else ""
    return f"{path or whole} must hold keys and values{among}, got {shown(value)}."


def _find(place: Iterable[str | int], schema: dict[str, Any], data: Any) -> tuple[str, dict[str, Any], Any]:
    """The path of a setting, its schema and its value: of the last part of a place that a user has written."""
    path, node = "", schema
    for part in place:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if inner is None:
            # Of several types that a setting may have, pydantic names the one that it tried.
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        node, data = schema["$defs"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner, data[part]
    return path, node, data


def _described(node: Mapping[str, Any]) -> str:
    """What a schema takes, in words."""
    if "anyOf" in node:
        return " or ".join(map(_described, node["anyOf"]))
    if "const" in node or "enum" in node:
        return "one of " + ", ".join(choice or "empty" for choice in node.get("enum", [node.get("const")]))
    if "prefixItems" in node:
        count = len(node["prefixItems"])
        return f"a list of {count} number{'s' * (count > 1)}"
    return _WORDS[node["type"]]
