"""Runs the scripts that come inside MMSegmentation's wheel, passing on every option."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genas_plugins.files import write_text
from genas_plugins.interrupts import exit_status, interruptible
from genas_plugins.locking import FolderInUseError, lock_folder
from mmseg_backbones._data import known_class, leaves, remember_images

__all__ = ["check_classes", "find_lost_checkpoint", "find_tool", "run_tool", "work_folder"]

_logger = logging.getLogger(__name__)


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
        name: Name of the script.
        trains: The script writes checkpoints: its folder is locked, and it ends with one line on standard error if
            another process writes there, if it would be resumed on other images, and after Ctrl-C and SIGTERM.
    """
    path = find_tool(name)
    arguments = sys.argv[1:]
    options = _options(arguments)
    cfg = None
    try:
        if options is not None:
            cfg = _configuration(options)
            check_classes(cfg, "train" if trains else "test")
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    folder = work_folder(arguments) if trains else None
    sys.argv[0] = str(path)
    # A script's own folder comes first, as when Python runs it.
    sys.path.insert(0, str(path.parent))
    try:
        with interruptible(), contextlib.nullcontext() if folder is None else lock_folder(folder):
            if folder is not None:
                _remember(name, folder, cfg, options)
            runpy.run_path(str(path), run_name="__main__")
    except FolderInUseError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        if folder is not None:
            resume = ["--resume"] * ("--resume" not in arguments)
            again = shlex.join(["python", "-m", "mmseg_backbones.train", *arguments, *resume])
            print(f"Interrupted. Continue with: {again}", file=sys.stderr)
        sys.exit(exit_status())


def find_lost_checkpoint(folder: Path) -> None:
    """Name the newest checkpoint where a killed run has named none.

    mmengine empties ``last_checkpoint`` before it writes it, and would not resume from a file without a name.

    Args:
        folder: Folder of the training.
    """
    told = folder / "last_checkpoint"
    if not told.is_file() or told.read_text(encoding="utf-8").strip():
        return
    saved = sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime)
    if saved:
        write_text(told, str(saved[-1]))
        _logger.warning("%s was empty, as a kill may leave it: going on with %s.", told, saved[-1])
    else:
        told.unlink()


def _remember(name: str, folder: Path, cfg: Any, options: Any) -> None:
    try:
        if options.resume:
            find_lost_checkpoint(folder)
        remember_images(folder, cfg, resume=options.resume)
    except (OSError, ValueError) as error:
        sys.exit(f"{name}: {error}")


def work_folder(arguments: Sequence[str]) -> Path | None:
    """The folder that MMSegmentation's ``train.py`` writes to, by its own rules.

    Args:
        arguments: Command line of the script, without its name.

    Returns:
        The folder; None if this process does not write, or the script will refuse the command line.
    """
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    if next((rank for rank in ranks if rank is not None), "0") != "0":
        return None
    options = _options(arguments)
    if options is None:
        return None
    folder = options.work_dir or _configuration(options).get("work_dir")
    return Path(folder or Path("work_dirs", Path(options.config).stem))


def check_classes(cfg: Any, part: str) -> None:
    """Compare the classes of the decode head with those of the images.

    An auxiliary head may predict something else, such as boundaries.

    Args:
        cfg: A configuration of MMSegmentation.
        part: ``"train"`` compares the sets for training and validation; ``"test"`` the one for testing, where a head of
            more classes is refused too.

    Raises:
        ValueError: The images have classes that a head does not know; the message has both numbers.
    """
    heads = _listed((cfg.get("model") or {}).get("decode_head"))
    counts = [head["num_classes"] for head in heads if isinstance(head.get("num_classes"), int)]
    loaders = ("train_dataloader", "val_dataloader") if part == "train" else ("test_dataloader",)
    for loader in loaders:
        for kind, classes in _classes((cfg.get(loader) or {}).get("dataset")):
            for count in counts:
                if count == classes:
                    continue
                message = f"decode_head has num_classes={count}, and {kind} of {loader} has {classes}: make them equal."
                if classes > count or part == "test":
                    raise ValueError(message)
                _logger.warning("%s Those that have no images are not learned.", message)


def _options(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Parse the options that matter here; None if the script will refuse its command line or show its help."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--work-dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    try:
        options, rest = parser.parse_known_args(arguments)
    # ValueError: of DictAction, for an option without a value.
    except (argparse.ArgumentError, ValueError):
        return None
    if options.config is None or not Path(options.config).is_file() or {"-h", "--help"}.intersection(rest):
        return None
    return options


def _configuration(options: argparse.Namespace) -> Any:
    from mmengine.config import Config

    cfg = Config.fromfile(options.config)
    if options.cfg_options:
        cfg.merge_from_dict(options.cfg_options)
    return cfg


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _classes(dataset: Any) -> Iterator[tuple[str, int]]:
    """Type and number of classes of a data set and those it wraps, as far as known without opening them."""
    for one in leaves(dataset):
        found = known_class(one)
        names = (one.get("metainfo") or {}).get("classes") or getattr(found, "METAINFO", {}).get("classes")
        # A string is the path of a file with their names.
        if names and not isinstance(names, str):
            yield getattr(found, "__name__", str(one.get("type"))), len(names)
