"""Finds the tools that come inside MMSegmentation's wheel and runs them, every option passed on."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from genas_plugins.interrupts import exit_status, interruptible
from genas_plugins.locking import FolderInUseError, lock_folder

__all__ = ["find_tool", "run_tool", "work_folder"]


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


def run_tool(name: str, *, trains: bool = False) -> None:
    """Run the script in this process, with this process's arguments.

    Args:
        name: Of the script.
        trains: It writes checkpoints; where another process writes to the same folder, it ends with one line on
            standard error, as it does after Ctrl-C and SIGTERM.
    """
    path = find_tool(name)
    arguments = sys.argv[1:]
    folder = work_folder(arguments) if trains else None
    sys.argv[0] = str(path)
    # A script's own folder comes first, as when Python runs it.
    sys.path.insert(0, str(path.parent))
    try:
        with interruptible(), contextlib.nullcontext() if folder is None else lock_folder(folder):
            runpy.run_path(str(path), run_name="__main__")
    except FolderInUseError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        if folder is not None:
            resume = ["--resume"] * ("--resume" not in arguments)
            again = shlex.join(["python", "-m", "mmseg_backbones.train", *arguments, *resume])
            print(f"Interrupted. Continue with: {again}", file=sys.stderr)
        sys.exit(exit_status())


def work_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that MMSegmentation's ``train.py`` writes to, by its own rules.

    Args:
        arguments: Its command line, without the script's name.

    Returns:
        None where this process does not write, or where the script will refuse the command line.
    """
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    if next((rank for rank in ranks if rank is not None), "0") != "0":
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--work-dir")
    parser.add_argument("--cfg-options", nargs="+", default=[])
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None
    if options.config is None or not Path(options.config).is_file() or {"-h", "--help"}.intersection(rest):
        return None
    if options.work_dir is not None:
        return Path(options.work_dir)
    from mmengine.config import Config

    said = [item.partition("=")[2] for item in options.cfg_options if item.startswith("work_dir=")]
    folder = said[-1] if said else Config.fromfile(options.config).get("work_dir")
    return Path(folder or Path("work_dirs", Path(options.config).stem))
