"""Shared by both launchers: options, configuration files, this package's data sets, and errors in one line."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from detectron2_backbones.backbone import GeNASBackbone
from genas_plugins._messages import message_of, shown
from genas_plugins._reading import expand_home, user_path
from genas_plugins.files import packaged_configs
from genas_plugins.interrupts import exit_status, interruptible
from genas_plugins.locking import lock_folder

__all__ = [
    "available_device",
    "check_backbones",
    "check_classes",
    "config_path",
    "only_writer",
    "register_datasets",
    "run_launcher",
    "start_logging",
]

_logger = logging.getLogger(__name__)

_SYNTHETIC = ("genas_synthetic_train", "genas_synthetic_val")


def run_launcher(
    name: str, suffix: str, work: Callable[[argparse.Namespace], object], arguments: Sequence[str] | None
) -> int:
    """Parse the command line and run ``work`` on every process.

    Args:
        name: Name of the command's module.
        suffix: Suffix of its configurations, ``.yaml`` or ``.py``.
        work: Function of the options that each process runs; picklable.
        arguments: Command line without the program's name; None: the process's own.

    Returns:
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = default_argument_parser()
    parser.prog = f"python -m {name}"
    parser.epilog = (
        f"--config-file takes a file or a name: {', '.join(packaged_configs('detectron2', suffix))}. "
        "An override that needs spaces is put in quotes."
    )
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = expand_home(parser.parse_args(arguments))
    try:
        options.config_file = str(config_path(options.config_file, suffix))
        gpus = torch.cuda.device_count()
        if not 1 <= options.num_gpus <= max(gpus, 1):
            raise ValueError(f"--num-gpus {options.num_gpus} does not fit this machine, which has {gpus}.")
        # Several processes receive the signals of their group.
        with interruptible() if options.num_gpus == 1 else nullcontext():
            launch(
                work,
                options.num_gpus,
                num_machines=options.num_machines,
                machine_rank=options.machine_rank,
                dist_url=options.dist_url,
                args=(options,),
            )
    except KeyboardInterrupt:
        line = list(sys.argv[1:] if arguments is None else arguments)
        again = shlex.join(["python", "-m", name, *["--resume"] * (not options.resume), *line])
        print(f"Interrupted. Continue with: {again}", file=sys.stderr)
        return exit_status()
    # Detectron2 and its configurations raise whatever a wrong setting leads to.
    except Exception as error:
        if options.debug:
            raise
        print(f"{name}: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


def config_path(name: str, suffix: str) -> Path:
    """Find the file that ``--config-file`` names: a path, or one of the package's configurations.

    Raises:
        FileNotFoundError: It is neither; the message lists the names.
    """
    known = packaged_configs("detectron2", suffix)
    if user_path(name).is_file():
        return user_path(name)
    if name not in known:
        raise FileNotFoundError(f"There is no configuration {shown(name)}; the package has: {', '.join(known)}.")
    return known[name]


def start_logging() -> None:
    """Log this package's messages as Detectron2 logs its own."""
    setup_logger(distributed_rank=comm.get_rank(), name="detectron2_backbones", abbrev_name="genas")


def only_writer(folder: str, options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Lock the folder of a training; an evaluation may write its results beside a training.

    Raises:
        FolderInUseError: On entering; another process trains there.
    """
    # Detectron2 also writes to remote addresses, which cannot be locked.
    if options.eval_only or not comm.is_main_process() or "://" in folder:
        return nullcontext()
    return lock_folder(folder)


def available_device(device: str) -> str:
    """Return ``device``, or the CPU if it is CUDA and there is none."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    _logger.warning("There is no CUDA device: the run is on the CPU, in single precision.")
    return "cpu"


def check_backbones(model: nn.Module) -> None:
    """Raise if frozen normalisation is to be trained without weights, before the first images are loaded.

    Raises:
        ValueError: See :meth:`GeNASBackbone.check_weights`.
    """
    for module in model.modules():
        if isinstance(module, GeNASBackbone):
            module.check_weights()


def check_classes(model: nn.Module, names: Iterable[str], *, evaluation: bool = False) -> None:
    """Compare the classes of the detector with those of the images.

    Args:
        model: The detector.
        names: Names of the data sets.
        evaluation: Refuse a detector of more classes too, since its classes are not those of the images.

    Raises:
        ValueError: The images have classes that the detector does not know; the message has both numbers.
    """
    whole = getattr(model, "module", model)
    found = [getattr(part, "num_classes", None) for part in (whole, getattr(whole, "roi_heads", None))]
    outputs = next((count for count in found if isinstance(count, int)), None)
    for name in names if outputs is not None else ():
        if not hasattr(MetadataCatalog.get(name), "thing_classes"):
            # Data sets in COCO's format have names of classes only after they are read.
            DatasetCatalog.get(name)
        classes = len(getattr(MetadataCatalog.get(name), "thing_classes", ()))
        if not classes or classes == outputs:
            continue
        message = f"The detector has {outputs} classes, and {name} has {classes}: set its number of classes to that."
        if classes > outputs or evaluation:
            raise ValueError(message)
        _logger.warning("%s Those that have no images are not learned.", message)


def register_datasets(names: Iterable[str]) -> None:
    """Register the quickstart's generated sets, if one of them is asked for.

    They are in ``genas_synthetic`` under ``$DETECTRON2_DATASETS``, by default ``datasets``, as in Detectron2.
    """
    if not set(names).isdisjoint(_SYNTHETIC):
        from detectron2_backbones.synthetic import register

        register(user_path(os.environ.get("DETECTRON2_DATASETS", "datasets")))
