"""One picture from a file: what is refused, how it becomes RGB, and how it is cropped."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from genas_plugins._messages import one_line
from genas_plugins._optional import require

__all__ = ["ImageReader", "bounded_aspect", "check_headers", "converted", "open_image"]

_MAX_ASPECT = 16
"""Largest aspect ratio of a picture to resize; longer ones are cropped to their middle."""

_CHECKED_FILES = 20_000
_THREADS = 16
_SHOWN = 5
# Errors of Pillow on damaged files, besides OSError: found by truncating files and changing their bytes.
_DAMAGE = (SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, AssertionError)
_DAMAGE += (NotImplementedError, MemoryError, struct.error, zlib.error)


def _pillow() -> Any:
    return require("PIL.Image", extra="nni", purpose="reading image files")


def open_image(path: Any, mode: str = "RGB", *, name: str | None = None) -> Any:
    """Decode one file to a Pillow image.

    Args:
        path: Path of the file, or an open file.
        mode: ``"RGB"`` or, for grey pictures, ``"L"``.
        name: Name of the picture in messages; None: the path.

    Raises:
        ValueError: The file cannot be read, has more than 8 bits a channel, or more than 179 million pixels.
    """
    pillow, name = _pillow(), name or str(path)
    try:
        with pillow.open(path) as image:
            return converted(image, mode, name)
    except _DeepImageError:
        raise
    except (OSError, pillow.DecompressionBombError, *_DAMAGE) as error:
        raise ValueError(f"Cannot read the image {_reason(name, error)}: repair it or remove it.") from error


class _DeepImageError(ValueError):
    """More than 8 bits a channel."""


def converted(image: Any, mode: str = "RGB", name: str = "of this data set") -> Any:
    """Convert a Pillow image to another mode.

    Raises:
        ValueError: It has more than 8 bits a channel.
    """
    # Pillow would clip these to 255, which silently turns most 16-bit images white.
    if image.mode.startswith(("I", "F")):
        raise _DeepImageError(
            f"The image {name} has Pillow mode {image.mode!r} (more than 8 bits a channel): convert it to 8 bits."
        )
    return image.convert(mode)


def bounded_aspect(image: Any) -> Any:
    """Crop a Pillow image that is more than 16 times as long as wide to its middle.

    A picture of 1 x 20,000 pixels, resized to a shorter side of 224, would have 1,003,520,000 pixels.
    """
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def check_headers(paths: Sequence[str]) -> None:
    """Open up to 20,000 evenly spread files without decoding them, to report all unreadable ones at once.

    Raises:
        ValueError: Files cannot be read, or have more than 8 bits a channel; the message counts them.
    """
    chosen = np.unique(np.linspace(0, len(paths) - 1, _CHECKED_FILES).astype(int)) if paths else []
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_problem, [paths[index] for index in chosen]))
    problems = [(paths[index], problem) for index, problem in zip(chosen, found, strict=True) if problem]
    if not problems:
        return
    others = [os.path.basename(path) for path, _ in problems[1:]]
    rest = f" So are {len(others)} more of {len(found)} ({', '.join(others[:_SHOWN])}" if others else ""
    raise ValueError(problems[0][1] + rest + (", ...)." if len(others) > _SHOWN else ")." if others else ""))


def _problem(path: str) -> str:
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            deep = image.mode.startswith(("I", "F"))
    except (OSError, pillow.DecompressionBombError, *_DAMAGE) as error:
        return f"Cannot read the image {_reason(path, error)}: repair it or remove it."
    return f"The image {path} has more than 8 bits a channel: convert it to 8 bits." if deep else ""


def _reason(name: str, error: BaseException) -> str:
    return f"{one_line(name, 200)} ({one_line(error, 200) or type(error).__name__})"


@dataclass(frozen=True)
class ImageReader:
    """Reads a file as a square image of one size.

    Args:
        size: Height and width of the result, in pixels.
        resize: Bring other sizes to ``size`` (shorter side, then centre crop); otherwise they are refused.
    """

    size: int
    resize: bool

    @classmethod
    def for_size(cls, image_size: int | None, path: str) -> ImageReader:
        """Read everything at ``image_size``, or at the size of the file ``path`` when that is None.

        Raises:
            ValueError: The file cannot be read, or sets the size and is not square.
        """
        if image_size is not None:
            return cls(image_size, resize=True)
        width, height = open_image(path).size
        if width != height:
            raise ValueError(f"{path} is {width}x{height} pixels, not square: set data.image_size to resize and crop.")
        return cls(width, resize=False)

    def read(self, path: str) -> np.ndarray:
        """Return the file as ``uint8`` RGB of shape (3, size, size).

        Raises:
            ValueError: The file cannot be read, or has another size and ``resize`` is False.
        """
        image = open_image(path)
        width, height = image.size
        if (width, height) != (self.size, self.size):
            if not self.resize:
                raise ValueError(
                    f"{path} is {width}x{height} pixels, but the images before it are "
                    f"{self.size}x{self.size}: set data.image_size to resize all of them to one size."
                )
            image = bounded_aspect(image)
            width, height = image.size
            short = min(width, height)
            width, height = self.size * width // short, self.size * height // short
            # Pillow's bilinear filter widens with the reduction, which is the antialiasing.
            image = image.resize((width, height), _pillow().Resampling.BILINEAR)
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).transpose(2, 0, 1)
