"""The settings of the backbone in a yacs configuration."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.config import CfgNode

from genas_plugins._reading import ReadingError, read_yaml

__all__ = ["add_genas_config", "check_yaml"]

_BASE = "_BASE_"
_MOST_BASES = 100


def check_yaml(path: str | Path) -> None:
    """Check a yacs file and those it is based on, before Detectron2 reads them.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not YAML of plain data in bounded size or is based on itself, or there are too many.
    """
    # Each file with the files that lead to it.
    left: list[tuple[Path, tuple[Path, ...]]] = [(Path(path), ())]
    count = 0
    while left:
        file, before = left.pop()
        count += 1
        if file.resolve() in before or count > _MOST_BASES:
            raise ValueError(f"{path}: {_BASE} leads from file to file without end, by {file}.")
        try:
            content = read_yaml(file)
        except ReadingError as error:
            raise ValueError(
                f"{file} is not a YAML file of plain data: {error}. Tags that compute values, such as "
                "!!python/object/apply:eval, are not run: write the values out."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold keys and values, got {type(content).__name__}.")
        bases = content.get(_BASE, [])
        for base in bases if isinstance(bases, list) else [bases]:
            # Found as by Detectron2, which downloads those at an address itself.
            if "://" not in str(base):
                left.append((file.parent / os.path.expanduser(str(base)), (*before, file.resolve())))


def add_genas_config(cfg: CfgNode) -> None:
    """Add ``MODEL.GENAS``, with its default values, to Detectron2's configuration.

    What is frozen is Detectron2's own ``MODEL.BACKBONE.FREEZE_AT`` (2 by default: the stem and the cells up to
    ``res3``); pixel order and statistics are its ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``,
    which must be ``RGB``, 0 and 255 for the official ImageNet weights.
    """
    node = CfgNode()
    # A name of the zoo, the JSON file of a search, or 28 integers in one string, separated by spaces.
    node.ARCH = "genas_flatness_c100"
    # C, channels of the first cells. 0: the zoo's, or for other genotypes the largest within 600 M multiply-adds.
    node.INIT_CHANNELS = 0
    # Some of stem, res3, res4, res5 (strides 4, 8, 16, 32).
    node.OUT_FEATURES = ["res3", "res4", "res5"]
    # BN, SyncBN, FrozenBN (only with weights) or GN.
    node.NORM = "BN"
    # Probability to drop an operation for an image in training.
    node.DROP_PATH_RATE = 0.0
    # Recompute activations in the backward pass: less memory, more time.
    node.CHECKPOINTING = False
    # Weights that do not fit the backbone are an error; False: what fits is loaded, the rest is logged. Only the
    # launcher and the checkpointer of this package read it, not Detectron2's own.
    node.STRICT_WEIGHTS = True
    cfg.MODEL.GENAS = node
