"""``python docs/site/notebook.py``: ``docs/tutorial.ipynb`` out of ``docs/tutorial.md``, with the same commands.

A test holds the one against the other. Cells that install are marked so that they are skipped where all is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["notebook"]

DOCS = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_START = "# The commands are typed in the folder of the clone.\nimport os\n\nos.chdir('..')"


def _cells(text: str) -> Iterator[dict[str, Any]]:
    place = 0
    yield {"cell_type": "code", "source": _START}
    for match in _BLOCK.finditer(text):
        yield {"cell_type": "markdown", "source": text[place : match.start()].strip()}
        place = match.end()
        code = match[2].rstrip()
        # A shell of its own, which ends with an error where a command does.
        cell = {"cell_type": "code", "source": f"%%bash -e\n{code}" if match[1] == "bash" else code}
        yield cell | ({"metadata": {"tags": ["skip-execution"]}} if code.startswith("pip install") else {})
    yield {"cell_type": "markdown", "source": text[place:].strip()}


def notebook(text: str) -> str:
    """The notebook of a page, as the text of its file."""
    cells = []
    for number, cell in enumerate(cell for cell in _cells(text) if cell["source"]):
        empty = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        source = cell["source"].splitlines(keepends=True)
        cells.append({"id": f"cell-{number}", "metadata": {}, **cell, **empty, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    made = notebook((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    (DOCS / "tutorial.ipynb").write_text(made, encoding="utf-8")
