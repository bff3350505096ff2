"""``python -m mmseg_backbones.synthetic DIR``: small scenes of real textures with exact masks, to try a training on.

Scenes are put together from pictures that come with scikit-image: sky, lawn, a gravel road, a brick house, a moon. The
training scenes take their textures from the left halves of the pictures, the validation scenes from the right halves,
so that no pixel is in both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genas_plugins._optional import require
from genas_plugins.datasets._scenes import Image, crop, half_of, run_command, scene_rng, texture

__all__ = ["CLASSES", "PALETTE", "draw_scene", "main", "write_scenes"]

CLASSES = ("sky", "lawn", "road", "house", "moon")
PALETTE = ((70, 130, 180), (107, 142, 35), (128, 64, 128), (178, 34, 34), (255, 255, 160))
_PICTURES = ("hubble_deep_field", "grass", "gravel", "brick", "moon")
_TINTS = ((0.5, 0.7, 1.0), (0.6, 1.0, 0.4), (0.8, 0.8, 0.8), (1.0, 0.55, 0.4), (1.0, 1.0, 0.8))


def draw_scene(rng: np.random.Generator, size: int, held_out: bool) -> tuple[Image, Image]:
    """Draw one scene.

    Args:
        rng: What is random.
        size: Pixels, square; at least 32.
        held_out: Take the textures of validation.

    Returns:
        The picture ``(size, size, 3)`` and the number of each pixel's class ``(size, size)``.
    """
    draw = require("skimage.draw", extra="mmseg", purpose="drawing scenes")
    mask = np.zeros((size, size), dtype=np.uint8)
    horizon = int(size * rng.uniform(0.4, 0.6))
    mask[horizon:] = 1
    # The road narrows to a point on the horizon.
    vanishing, left, width = rng.uniform(0.2, 0.8), rng.uniform(0.0, 0.5), rng.uniform(0.25, 0.5)
    columns = size * np.array([vanishing, left, left + width])
    mask[draw.polygon([horizon, size, size], columns, shape=mask.shape)] = 2
    radius = rng.uniform(0.09, 0.16) * size
    center = rng.uniform(radius, horizon - radius), rng.uniform(radius, size - radius)
    mask[draw.disk(center, radius, shape=mask.shape)] = 4
    wide, high = (rng.uniform(0.2, 0.4, 2) * size).astype(int)
    corner = int(rng.uniform(0, size - wide))
    mask[horizon - high // 2 : horizon + high // 4, corner : corner + wide] = 3
    image = np.zeros((size, size, 3))
    for number, tint in enumerate(_TINTS):
        pixels = crop(rng, half_of(texture(_PICTURES[number], "mmseg"), held_out), size)
        # The light differs from scene to scene, so colour alone does not tell the classes apart.
        shade = np.array(tint) * rng.uniform(0.6, 1.1) * rng.uniform(0.85, 1.15, 3)
        image[mask == number] = (pixels * shade)[mask == number]
    return image.clip(0, 255).astype(np.uint8), mask


def write_scenes(folder: str | Path, training: int = 160, validation: int = 40, size: int = 128, seed: int = 0) -> Path:
    """Write ``images/`` and ``masks/``, each with ``train/`` and ``val/``, as PNG files.

    Raises:
        ValueError: A number that cannot be.
        FileExistsError: The folder has scenes already.
    """
    pillow = require("PIL.Image", extra="mmseg", purpose="writing scenes")
    folder = Path(folder)
    if min(training, validation) < 1 or size < 32:
        raise ValueError(f"Scenes need at least 1 of each set and 32 pixels, got {training}, {validation}, {size}.")
    if (folder / "images").exists():
        raise FileExistsError(f"{folder} has scenes already: name another folder.")
    for split, count in (("train", training), ("val", validation)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image, mask = draw_scene(scene_rng(seed, split, number), size, split == "val")
            pillow.fromarray(image).save(folder / "images" / split / f"{number:04d}.png")
            pillow.fromarray(mask).save(folder / "masks" / split / f"{number:04d}.png")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, or 1 with one line on standard error."""
    return run_command(
        "mmseg_backbones.synthetic",
        __doc__,
        write_scenes,
        arguments,
        noun="scenes",
        where="where to write",
        training=160,
        validation=40,
    )


if __name__ == "__main__":
    sys.exit(main())
