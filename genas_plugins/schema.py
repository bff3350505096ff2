"""``python -m genas_plugins.schema MODULE``: the JSON schema of the YAML files that a module reads, for editors.

Those of the files that come with the package are in ``configs/schemas``, and the files name them in their first lines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main", "schema_text"]


def schema_text(module: str) -> str:
    """The schema of a module, whose ``json_schema`` gives it, as the text of a file."""
    text = _text(importlib.import_module(module).json_schema(), expand=True)
    # Docstrings as editors show them: without the errors of Python, and with names instead of references.
    return re.sub(r":\w+:`([^`]+)`", r"``\1``", re.sub(r'\\n\\nRaises:[^"]*', "", text)) + "\n"


def _text(value: Any, indent: str = "", *, expand: bool = False) -> str:
    """JSON with a setting on each line."""
    if not isinstance(value, dict) or not (expand or "properties" in value):
        return json.dumps(value)
    parts = ((key, _text(part, indent + " ", expand=key in ("$defs", "properties"))) for key, part in value.items())
    return "{\n" + ",\n".join(f"{indent} {json.dumps(key)}: {part}" for key, part in parts) + f"\n{indent}}}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; None: the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m genas_plugins.schema", description="Print a JSON schema.")
    parser.add_argument(
        "module", metavar="MODULE", help="for instance genas_plugins.experiment.config, or timm_models.settings"
    )
    sys.stdout.write(schema_text(parser.parse_args(arguments).module))
    return 0


if __name__ == "__main__":
    sys.exit(main())
