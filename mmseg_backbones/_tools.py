"""Finds the tools that come inside MMSegmentation's wheel and runs them, every option passed on."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

__all__ = ["find_tool", "run_tool"]


def find_tool(name: str) -> Path:
    """Path of one of MMSegmentation's own scripts, such as ``train.py``.

    Raises:
        FileNotFoundError: The installed MMSegmentation does not have it.
    """
    import mmseg

    folder = Path(mmseg.__file__).parent
    # In the wheel, and in a checkout that was installed in place.
    for tools in (folder / ".mim" / "tools", folder.parent / "tools"):
        if (tools / name).is_file():
            return tools / name
    raise FileNotFoundError(f"The installed MMSegmentation ({folder}) has no tools/{name}: install mmsegmentation 1.2.")


def run_tool(name: str) -> None:
    """Run the script in this process, with this process's arguments."""
    path = find_tool(name)
    sys.argv[0] = str(path)
    # A script's own folder comes first, as when Python runs it.
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
