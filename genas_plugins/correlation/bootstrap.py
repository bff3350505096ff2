"""Percentile bootstrap intervals (Efron 1979) of statistics over architectures.

The architectures are drawn with replacement, and the statistic is computed anew on each resample. An architecture that
is drawn twice is tied with itself in every column, and tau-b leaves such pairs out. One seed draws the same resamples
for all columns of one length, which makes their statistics comparable in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Estimate", "bootstrap", "drawn", "fewest_resamples"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its confidence interval.

    Attributes:
        value: The statistic of the given architectures; NaN where it is not defined.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def fewest_resamples(confidence: float = 0.95) -> int:
    """Least number of resamples: with less than one beyond either end, an interval is just the range of the draws.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    return math.ceil(round(2 / (1 - confidence), 6))


def bootstrap(
    statistic: Callable[[Array], Array], count: int, seed: int, resamples: int, confidence: float
) -> Estimate:
    """Estimate what ``statistic`` computes; resamples where it is not defined (NaN) are left out.

    Args:
        statistic: Maps counts ``(rows, count)``, how often each architecture is drawn, to one value for each row.
        count: Number of architectures.
        seed: Seed of the draws.
        resamples: Number of resamples.
        confidence: Confidence level of the interval.
    """
    fewest = fewest_resamples(confidence)
    if resamples < fewest:
        raise ValueError(f"An interval of confidence {confidence} needs {fewest} resamples or more, got {resamples}.")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(count, size=count) for _ in range(resamples))
    # The first row is the architectures as given.
    counts = np.stack([np.ones(count), *(np.bincount(each, minlength=count) for each in draws)])
    value, *drawn_values = statistic(counts)
    defined = np.array(drawn_values)[~np.isnan(drawn_values)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]) if len(defined) else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high))


def drawn(counts: Array) -> NDArray[np.intp]:
    """Indices of the drawn architectures, each as often as a row of counts says."""
    return np.repeat(np.arange(len(counts)), counts.astype(np.intp))
