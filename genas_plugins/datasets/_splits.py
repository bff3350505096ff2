"""Seeded choices: which image goes where, and random labels.

Each purpose draws from a stream of its own, so that one seed does not tie, say, the random labels to the
split, and none of them touches a global generator.
"""

from __future__ import annotations

import numpy as np

__all__ = ["check_count", "halves", "pick_test_images", "stratified_holdout", "uniform_labels"]

_HOLDOUT, _HALVES, _TEST, _LABELS = range(4)


def _stream(seed: int, purpose: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, but got {type(seed).__name__}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, but got {seed}.")
    # NumPy hashes the pair, so neighbouring seeds and purposes give unrelated streams.
    return np.random.default_rng((int(seed), purpose))


def uniform_labels(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Draw ``count`` labels uniformly from ``0..num_classes - 1``, as ``int64``."""
    return _stream(seed, _LABELS).integers(num_classes, size=count, dtype=np.int64)


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out ``fraction`` of every class.

    A class gives at least one image if it has two; a class of one image stays out of the holdout.

    Returns:
        Sorted indices of the rest and of the holdout.
    """
    generator = _stream(seed, _HOLDOUT)
    held = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held.append(members[: max(round(fraction * len(members)), min(1, len(members) - 1))])
    holdout = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), holdout), holdout


def halves(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a permutation of ``0..count - 1`` into ``fraction`` of it (rounded) and the remainder.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"train_fraction must be larger than 0 and smaller than 1, but got {fraction}.")
    # Rounded rather than cut: 0.29 * 100 is 28.999999999999996 in floating point.
    first = round(count * fraction)
    if not 0 < first < count:
        raise ValueError(
            f"train_fraction={fraction} of {count} training images leaves one part empty: use more images or "
            "a fraction nearer to 0.5."
        )
    order = _stream(seed, _HALVES).permutation(count)
    return order[:first], order[first:]


def pick_test_images(count: int, seed: int) -> np.ndarray:
    """Return the order in which test images are taken; test sets are often sorted by class."""
    return _stream(seed, _TEST).permutation(count)


def check_count(option: str, wanted: int, available: int, part: str) -> None:
    """Raise if a number of images is below 1 or above what a part of the data has.

    Raises:
        ValueError: ``wanted`` does not lie in ``1..available``; the message has both numbers.
    """
    if wanted < 1:
        raise ValueError(f"{option} must be at least 1, but got {wanted}.")
    if wanted > available:
        raise ValueError(
            f"{option}={wanted} asks for more images than {part} has ({available}): lower it to {available} or less."
        )
