"""``python -m timm_models.train``: train a GeNAS network, or any of timm's, with the paper's recipe."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.utils import setup_default_logging

import timm_models  # noqa: F401  (registers the networks)
from genas_plugins.files import packaged_configs
from timm_models.runs import CONFIG
from timm_models.settings import Settings, SettingsError, add_options, from_options, read_config
from timm_models.training import train

__all__ = ["main"]

_INTERRUPTED = 130
_FIXED = ("model", "model_kwargs", "num_classes", "auxiliary_weight", "sched", "epochs", "tail_epochs", "opt")
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
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C.
    """
    options = vars(_parser().parse_args(arguments))
    debug, config, resume = (options.pop(name) for name in ("debug", "config", "resume"))
    primary = int(os.environ.get("RANK", "0")) == 0
    setup_default_logging(default_level=logging.INFO if primary else logging.WARNING)
    # It would list the checkpoints in every epoch.
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)
    try:
        folder = train(_settings(options, config, resume), resume)
    except KeyboardInterrupt:
        print("Interrupted. Continue with --resume and the folder of the run.", file=sys.stderr)
        return _INTERRUPTED
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        if debug:
            raise
        print(f"timm_models.train: {' '.join(str(error).split())}", file=sys.stderr)
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
        return from_options(options, read_config(_config_path(config)) if config else None)
    if config is not None:
        raise SettingsError("A run is resumed with its own settings: leave --config out.")
    folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {CONFIG}.")
    saved = read_config(folder / CONFIG)
    changed = [name for name in _FIXED if name in options and options[name] != saved.get(name)]
    if changed:
        raise SettingsError(f"A resumed run keeps its {', '.join(changed)}: start another run to change that.")
    return from_options(options, saved)


def _config_path(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = packaged_configs("timm")
    if name not in known:
        raise FileNotFoundError(f"There is no configuration {name}; the package has: {', '.join(known)}.")
    return known[name]


if __name__ == "__main__":
    sys.exit(main())
