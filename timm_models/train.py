"""``python -m timm_models.train``: train a GeNAS network, or any of timm's, with the paper's recipe."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.utils import setup_default_logging

import timm_models  # noqa: F401  (registers the networks)
from genas_plugins._messages import message_of
from genas_plugins._reading import expand_home
from genas_plugins._settings import find_file
from genas_plugins.files import disk_is_full
from genas_plugins.interrupts import exit_status, interruptible
from genas_plugins.training import workers
from timm_models.runs import CONFIG, MAY_CHANGE
from timm_models.settings import Settings, SettingsError, add_options, from_options, read_config
from timm_models.training import train

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m timm_models.train --config genas_flatness_c100_imagenet --data-dir /data/imagenet
  torchrun --nproc-per-node 8 -m timm_models.train --config genas_flatness_c100_imagenet --data-dir /data/imagenet
  python -m timm_models.train --resume output/train/my-run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; None: the process's own.

    Returns:
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = _parser()
    try:
        options = vars(expand_home(parser.parse_args(arguments)))
    except ValueError:  # of timm's ParseKwargs
        parser.error("--model-kwargs and --opt-kwargs take NAME=VALUE")
    debug, config, resume = (options.pop(name) for name in ("debug", "config", "resume"))
    primary = int(os.environ.get("RANK", "0")) == 0
    setup_default_logging(default_level=logging.INFO if primary else logging.WARNING)
    # It would list the checkpoints in every epoch.
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)
    workers.preload("timm_models.training")
    try:
        with interruptible():
            folder = train(_settings(options, config, resume), resume)
    except KeyboardInterrupt as error:
        if primary:
            print(_how_to_go_on(getattr(error, "folder", None)), file=sys.stderr)
        return exit_status()
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        if debug:
            raise
        print(f"timm_models.train: {message_of(error)}{_advice(error)}", file=sys.stderr)
        return 1
    if primary:
        print(f"Checkpoints and figures are in {folder}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m timm_models.train",
        description="Train an image classifier. Options are named as in timm's train.py.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", "-c", metavar="FILE", help="a YAML file, or the name of one of the package's")
    parser.add_argument("--resume", metavar="RUN", help="continue a run: its folder, or a checkpoint")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_options(parser)
    return parser


def _settings(options: dict[str, object], config: str | None, resume: str | None) -> Settings:
    if resume is None:
        return from_options(
            options,
            None if config is None else read_config(find_file(config, "timm", "configuration", FileNotFoundError)),
        )
    if config is not None:
        raise SettingsError("A run is resumed with its own settings: leave --config out.")
    place = Path(resume)
    folder = place if place.is_dir() else place.parent
    if not place.exists() or not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{place} is not the folder of a run, nor a checkpoint in it ({CONFIG} is missing).")
    saved = read_config(folder / CONFIG)
    changed = [
        name
        for name, value in options.items()
        if name not in MAY_CHANGE and from_options({name: value}, saved) != from_options({}, saved)
    ]
    if changed:
        raise SettingsError(
            f"A resumed run keeps its {', '.join(changed)}: start another run to change that. It may change "
            f"{', '.join(MAY_CHANGE)}."
        )
    return from_options(options, saved)


def _advice(error: Exception) -> str:
    if not disk_is_full(error):
        return ""
    folder = Path(error.filename).parent if isinstance(error.filename, str) else None
    command = "--resume and the folder of the run"
    if folder is not None and (folder / CONFIG).exists():
        command = _command(folder)
    return f". The last checkpoint is untouched: make room, then continue with: {command}"


def _command(folder: Path) -> str:
    return f"python -m timm_models.train --resume {shlex.quote(str(folder))}"


def _how_to_go_on(folder: Path | None) -> str:
    if folder is None or not (folder / CONFIG).exists():
        return "Interrupted before the run began: start it again."
    return f"Interrupted. Continue with: {_command(folder)}"


if __name__ == "__main__":
    sys.exit(main())
