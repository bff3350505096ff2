"""Readers of text, JSON and YAML from users: bounded in size, aware of byte order marks, and running no code."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from genas_plugins._messages import one_line, shown

__all__ = [
    "ReadingError",
    "expand_home",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_text",
    "read_yaml",
    "user_path",
]

TEXT_LIMIT = 2**20
"""Bytes of a configuration, a genotype or settings: more than a hundred times what any of ours has."""

_YAML_LIMIT = 4 * TEXT_LIMIT
"""Most characters of a YAML document once its aliases are expanded."""

_MERGE = "tag:yaml.org,2002:merge"
_NUMBER_LIMIT = 100
"""Most characters of a number in YAML: PyYAML's time grows with their square."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark is a prefix of the mark of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class ReadingError(ValueError):
    """A text cannot be read; the message is the reason, without the file's name."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path, with a leading ``~`` expanded to the user's home."""
    return Path(os.path.expanduser(path))


def expand_home(options: argparse.Namespace) -> argparse.Namespace:
    """Expand a leading ``~`` in all options; the shell does not expand the one in ``--output=~/runs``."""
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(options, name, [os.path.expanduser(item) if isinstance(item, str) else item for item in value])
    return options


def read_text(path: str | os.PathLike[str], *, limit: int = TEXT_LIMIT) -> str:
    """Read UTF-8, with or without a byte order mark, or UTF-16 and UTF-32 with one; lines end with ``\\n``.

    Args:
        path: The file; ``~`` is the user's home.
        limit: Most bytes to accept.

    Raises:
        OSError: The file cannot be read.
        ReadingError: The file is longer, or is not such text.
    """
    with user_path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ReadingError(f"it has more than {limit:,} bytes")
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return io.StringIO(data.decode(encoding), newline=None).read()
    except UnicodeDecodeError as error:
        raise ReadingError(f"it is not text in UTF-8 ({error})") from error


def read_json(path: str | os.PathLike[str], *, limit: int = TEXT_LIMIT) -> Any:
    """Read a JSON file; arguments and errors are those of :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit=limit))


def parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ReadingError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReadingError(one_line(error, 300)) from error
    except RecursionError:
        raise ReadingError("it is nested too deeply") from None


def read_yaml(path: str | os.PathLike[str], *, limit: int = TEXT_LIMIT) -> Any:
    """Read a YAML file; arguments and errors are those of :func:`read_text` and :func:`parse_yaml`."""
    return parse_yaml(read_text(path, limit=limit))


def parse_yaml(text: str) -> Any:
    """Read one YAML document of plain data.

    Raises:
        ReadingError: The text is not YAML, has tags other than of plain data, repeats a key, is nested too deeply, or
            is too large once its aliases are expanded.
    """
    import yaml  # what the core needs for it is not loaded with the core

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Checked before construction, because merge keys copy what their aliases refer to.
        if _written_out(node, {}) > _YAML_LIMIT:
            raise ReadingError(f"its aliases stand for more than {_YAML_LIMIT:,} characters")
        return loader.construct_document(node)
    except ReadingError:
        raise
    # ValueError: malformed dates and numbers.
    except (yaml.YAMLError, ValueError) as error:
        raise ReadingError(one_line(error, 300)) from error
    except RecursionError:
        raise ReadingError("it is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _written_out(node: Any, known: dict[int, int | None]) -> int:
    """The number of characters of a node with its aliases expanded."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ReadingError("one of its aliases refers to itself")
        return size
    known[id(node)] = None
    if isinstance(node.value, str):
        if node.tag.endswith((":int", ":float")) and len(node.value) > _NUMBER_LIMIT:
            raise ReadingError(f"it has a number of {len(node.value):,} characters")
        size = 1 + len(node.value)
    else:
        # A mapping's entries are pairs of nodes. Of a repeated key PyYAML would silently keep the last value.
        names = Counter(entry[0].value for entry in node.value if _is_name(entry))
        if names and (first := names.most_common(1)[0])[1] > 1:
            raise ReadingError(f"the key {shown(first[0])} stands twice (line {node.start_mark.line + 1} and below)")
        children = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        size = 1 + sum(_written_out(child, known) for child in children)
    known[id(node)] = size
    return size


def _is_name(entry: Any) -> bool:
    """Whether a node's entry is a pair of a mapping whose key is a scalar and not a merge key."""
    return isinstance(entry, tuple) and isinstance(entry[0].value, str) and entry[0].tag != _MERGE
