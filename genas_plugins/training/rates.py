"""Learning rates of the supernet recipe."""

from __future__ import annotations

__all__ = ["final_rate"]

_OFFICIAL = 0.001


def final_rate(learning_rate: float) -> float:
    """Where a learning rate ends if nobody says so: the official code's 0.001, and never above where it starts.

    >>> final_rate(0.025), final_rate(0.0005)
    (0.001, 0.0005)
    """
    return min(_OFFICIAL, learning_rate)
