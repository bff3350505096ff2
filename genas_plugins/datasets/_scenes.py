"""What scenes put together from pictures have in common: textures of two halves, and the command that writes them."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genas_plugins._messages import message_of
from genas_plugins._optional import require
from genas_plugins._reading import expand_home

__all__ = ["Image", "crop", "half_of", "run_command", "scene_rng", "texture"]

Image = NDArray[np.uint8]


@functools.cache
def texture(name: str, extra: str) -> Image:
    """One of scikit-image's pictures, ``(H, W, 3)``; ``extra`` is the installation that brings scikit-image."""
    data = require("skimage.data", extra=extra, purpose="drawing scenes")
    picture = np.asarray(getattr(data, name)())
    return picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)


def half_of(picture: Image, held_out: bool) -> Image:
    """The left half for training, or the right one for validation, so that no pixel is in both."""
    middle = picture.shape[1] // 2
    return picture[:, middle:] if held_out else picture[:, :middle]


def crop(rng: np.random.Generator, picture: Image, size: int) -> Image:
    """A square of a picture, anywhere.

    Raises:
        ValueError: The picture is smaller.
    """
    if min(picture.shape[:2]) < size:
        raise ValueError(f"Scenes of {size} pixels are larger than the textures: at most {min(picture.shape[:2])}.")
    top, left = (int(rng.integers(0, length - size + 1)) for length in picture.shape[:2])
    return picture[top : top + size, left : left + size]


def scene_rng(seed: int, split: str, number: int) -> np.random.Generator:
    """What one scene of a split (``"train"`` or ``"val"``) draws from, whatever the others draw."""
    return np.random.default_rng((seed, split == "val", number))


def run_command(
    name: str,
    description: str | None,
    write: Callable[[str, int, int, int, int], Path],
    arguments: Sequence[str] | None,
    *,
    noun: str,
    where: str,
    training: int,
    validation: int,
) -> int:
    """Write a set: the command line of a host's package.

    Args:
        name: The module.
        description: What the command does.
        write: Takes the folder, the numbers of training and validation scenes, their pixels and the seed.
        arguments: The command line; ``None`` for that of the process.
        noun: What the scenes are called.
        where: What is said of the folder.
        training: How many by default.
        validation: Likewise.

    Returns:
        Exit status: 0, or 1 with one line on standard error.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("folder", metavar="DIR", help=where)
    parser.add_argument("--train", type=int, default=training, metavar="N", help=f"training {noun} (%(default)s)")
    parser.add_argument("--val", type=int, default=validation, metavar="N", help=f"validation {noun} (%(default)s)")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="height and width (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (%(default)s)")
    options = expand_home(parser.parse_args(arguments))
    try:
        print(write(options.folder, options.train, options.val, options.size, options.seed))
    except (ImportError, OSError, ValueError) as error:
        print(f"{name}: {message_of(error)}", file=sys.stderr)
        return 1
    return 0
