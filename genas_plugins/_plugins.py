"""What other packages bring: found by its entry point, and imported when somebody asks for it."""

from __future__ import annotations

import ast
import configparser
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import genas_plugins
from genas_plugins._messages import message_of
from genas_plugins._optional import MissingPackageError

__all__ = ["load", "registered", "summary"]


def registered(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name; of two with one name, that of our own packages."""
    # The last of a name stays.
    by_owner = sorted(entry_points(group=group), key=lambda point: point.dist.name == "genas-plugins")
    found = {point.name: point for point in by_owner}
    # A checkout may not be installed, or not since it has them.
    declared = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    declared.read(Path(genas_plugins.__file__).parents[1] / "setup.cfg", encoding="utf-8")
    lines = declared.get("options.entry_points", group, fallback="").split("\n")
    pairs = ([part.strip() for part in line.split("=", 1)] for line in lines if line)
    own = {name: EntryPoint(name, value, group) for name, value in pairs}
    return own | found | own


def load(point: EntryPoint, *names: str) -> Any:
    """Import what an entry point stands for.

    Args:
        point: The entry point.
        *names: Attributes that it must have.

    Raises:
        MissingPackageError: It needs a package that is not installed, and says how to install it.
        ImportError: It cannot be imported for another reason, or lacks a name; the message says whose it is.
    """
    try:
        found = point.load()
        for name in names:
            getattr(found, name)
    except MissingPackageError:
        raise
    # Of any kind: the code is not ours.
    except Exception as error:
        raise ImportError(f"{point.name} ({point.value}) cannot be loaded: {message_of(error)}") from error
    return found


def summary(point: EntryPoint) -> str:
    """The first line of the docstring of an entry point's module, or else the module's name.

    It is read from the source, because the import of a host takes seconds, or fails where the host is missing.
    """
    package, *inner = point.module.split(".")
    try:
        spec = find_spec(package)
        origin = Path(spec.origin) if spec is not None and spec.origin is not None else Path()
        source = origin.parent.joinpath(*inner).with_suffix(".py") if inner else origin
        text = ast.get_docstring(ast.parse(source.read_bytes()))
    except (ImportError, OSError, SyntaxError, ValueError):
        text = None
    return text.splitlines()[0] if text else point.module
