"""How well scores rank architectures: rank correlations with bootstrap intervals, and the quality of the top.

Intervals are those of :mod:`genas_plugins.correlation.bootstrap`. Kendall's tau is SciPy's, O(n log n); on resamples of
up to :data:`FEW` architectures it is computed from the signs of all pairs, O(n^2) but for all resamples in one product
of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from genas_plugins.correlation.bootstrap import Array, Estimate, bootstrap, drawn, fewest_resamples

__all__ = [
    "Estimate",
    "Ranking",
    "compare",
    "correlation_matrix",
    "fewest_resamples",
    "kendall",
    "ndcg",
    "partial_kendall",
    "precision_at",
    "rank_correlation",
]

FEW = 2000
"""Most architectures for which resamples share a matrix of the signs of pairs; it grows with their square."""

_FEWEST = 3


@dataclass(frozen=True)
class Ranking:
    """How well a score ranks architectures.

    Where architectures share a score, precision, nDCG and the best pick are what breaking ties at random gives in
    the mean.

    Attributes:
        count: Number of architectures.
        tau: Kendall's tau-b with the accuracy.
        rho: Spearman's rho.
        tau_better_half: Tau-b among the architectures whose accuracy is at least the median; NaN where they are
            fewer than 3 or all have one score or one accuracy.
        k: Size of the top that ``precision`` and ``ndcg`` look at.
        precision: See :func:`precision_at`.
        ndcg: See :func:`ndcg`.
        best_accuracy: Accuracy in percent of the architecture with the highest score.
        gap: Difference of ``best_accuracy`` to the highest accuracy, in percentage points.
    """

    count: int
    tau: Estimate
    rho: Estimate
    tau_better_half: Estimate
    k: int
    precision: float
    ndcg: float
    best_accuracy: float
    gap: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with None for what is not defined."""
        return {
            name: {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else _plain(value)
            for name, value in asdict(self).items()
        }


def rank_correlation(
    scores: ArrayLike,
    truth: ArrayLike,
    *,
    seed: int,
    top: float = 0.1,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Ranking:
    """Measure how well scores rank architectures.

    Args:
        scores: Scores of the architectures ``(n,)``, higher is better.
        truth: Their test accuracies ``(n,)`` in percent.
        seed: Seed of the bootstrap.
        top: Size of the top: a number of architectures as an integer, or a fraction of them as a float.
        resamples: Number of bootstrap resamples; each costs two tau and one rho.
        confidence: Confidence level of the intervals.

    Raises:
        ValueError: The lengths differ, there are fewer than 3 architectures, a score is not finite (architectures
            that failed are for the caller to leave out and report), all scores or all accuracies are the same, an
            accuracy is not in 0..100, or an option is out of its range.
        TypeError: A column is not numeric.

    Example:
        >>> from genas_plugins.ranking import rank_correlation
        >>> scores, accuracies = [0.1, 0.2, 0.4, 0.3, 0.5], [60.0, 70.0, 80.0, 90.0, 91.0]
        >>> ranking = rank_correlation(scores, accuracies, seed=0, top=2)
        >>> ranking.tau.value, ranking.precision, ranking.gap
        (0.8, 0.5, 0.0)
    """
    columns = _columns(scores=scores, truth=truth)
    values, accuracies = columns["scores"], columns["truth"]
    _check_percent(accuracies)
    k = _top_size(top, len(values))
    tau, rho, half = (
        bootstrap(statistic, len(values), seed, resamples, confidence)
        for statistic in (
            lambda counts: _taus(values, accuracies, counts),
            lambda counts: np.array([_rho(values[chosen], accuracies[chosen]) for chosen in map(drawn, counts)]),
            lambda counts: _taus_better_half(values, accuracies, counts),
        )
    )
    best_accuracy = float(accuracies[values == values.max()].mean())
    return Ranking(
        count=len(values),
        tau=tau,
        rho=rho,
        tau_better_half=half,
        k=k,
        precision=precision_at(values, accuracies, k),
        ndcg=ndcg(values, accuracies, k),
        best_accuracy=best_accuracy,
        gap=float(accuracies.max()) - best_accuracy,
    )


def precision_at(scores: ArrayLike, truth: ArrayLike, top: float) -> float:
    """Fraction of the k best by the score that are among the k best by the truth.

    Architectures that share the k-th best accuracy all count as among the best. Where the k-th best score is
    shared, the share is the mean over all ways to break the tie.

    Args:
        scores: Scores ``(n,)``, higher is better.
        truth: True accuracies ``(n,)``.
        top: k as an integer, or as a float for a fraction of n.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`.

    Example:
        >>> from genas_plugins.ranking import precision_at
        >>> precision_at(scores=[1, 2, 3, 4], truth=[60, 90, 80, 70], top=2)
        0.5
    """
    values, accuracies = _columns(scores=scores, truth=truth).values()
    k = _top_size(top, len(values))
    threshold = np.sort(values)[-k]
    above, tied = values > threshold, values == threshold
    picked = above + tied * ((k - above.sum()) / tied.sum())
    return float((picked * (accuracies >= np.sort(accuracies)[-k])).sum() / k)


def ndcg(scores: ArrayLike, truth: ArrayLike, top: float) -> float:
    r"""Normalised discounted cumulative gain, as VKDNW defines it (Tybl and Neumann, CVPR 2025, Eq. 14).

    .. math:: \frac1Z \sum_{j=1}^{k} \frac{2^{a_j} - 1}{\log_2(1 + j)}

    where :math:`a_j` is the accuracy in percent of the architecture with the j-th highest score and Z is the sum
    for the ideal order. In percent the gain doubles with each percentage point, so that only the very best
    count; with accuracies as fractions nearly every ranking has 0.98. The paper takes k = 1000. Architectures that
    share a score get the mean of their gains (McSherry and Najork, ECIR 2008), as in scikit-learn.

    Args:
        scores: Scores ``(n,)``, higher is better.
        truth: Test accuracies ``(n,)`` in percent.
        top: k as an integer, or as a float for a fraction of n.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`.
    """
    values, accuracies = _columns(scores=scores, truth=truth).values()
    _check_percent(accuracies)
    k = _top_size(top, len(values))
    gains = 2.0**accuracies - 1
    _, group = np.unique(-values, return_inverse=True)
    expected = (np.bincount(group, gains) / np.bincount(group))[np.sort(group)]
    discount = 1 / np.log2(np.arange(2, k + 2))
    return float((expected[:k] @ discount) / (-np.sort(-gains)[:k] @ discount))


def kendall(x: ArrayLike, y: ArrayLike, *, seed: int, resamples: int = 1000, confidence: float = 0.95) -> Estimate:
    """Estimate Kendall's tau-b of two columns, for instance of two scores.

    Args:
        x: First column ``(n,)``.
        y: Second column ``(n,)``.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level of the interval.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`; any range of values is accepted.
    """
    a, b = _columns(x=x, y=y).values()
    return bootstrap(lambda counts: _taus(a, b, counts), len(a), seed, resamples, confidence)


def compare(
    first: ArrayLike,
    second: ArrayLike,
    truth: ArrayLike,
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate by how much the first score's tau-b with the truth exceeds the second's.

    Both are computed on the same resamples. Their errors have much in common, so that the interval is narrower than
    those of the two taus suggest. ``sign`` of the result says which score wins by more than the interval.

    Args:
        first: Scores, shape ``(n,)``.
        second: Scores of the same architectures, shape ``(n,)``.
        truth: Accuracies, shape ``(n,)``.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level of the interval.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`.
    """
    a, b, y = _columns(first=first, second=second, truth=truth).values()
    return bootstrap(lambda counts: _taus(a, y, counts) - _taus(b, y, counts), len(y), seed, resamples, confidence)


def partial_kendall(
    x: ArrayLike,
    y: ArrayLike,
    given: ArrayLike,
    *,
    seed: int,
    normal: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    r"""Estimate Kendall's partial tau of ``x`` and ``y`` given a third column (Kendall, Biometrika 32, 1942).

    .. math:: \frac{\tau_{xy} - \tau_{xz}\tau_{yz}}{\sqrt{(1 - \tau_{xz}^2)(1 - \tau_{yz}^2)}}

    It is **not** zero in general where x and y are independent given z (Korn, The American Statistician 38, 1984):
    two normal variables that correlate with z at 0.9 and have nothing else in common have a partial tau of 0.19.
    ``normal=True`` removes this where the columns are monotone functions of normal ones: the same formula on
    the correlations :math:`\sin(\pi\tau/2)`, turned back into a tau, is zero there.

    Args:
        x: First column ``(n,)``, for instance a score.
        y: Second column ``(n,)``, for instance the accuracies.
        given: Third column ``(n,)``, whose influence on the agreement of x and y is removed.
        seed: Seed of the bootstrap.
        normal: Compute it through the correlations of normal variables with these taus.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level of the interval.

    Returns:
        The estimate. NaN where ``given`` orders as ``x`` or ``y`` does: nothing is left to correlate.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`.

    Example:
        >>> from genas_plugins.ranking import kendall, partial_kendall
        >>> x, y, size = [2, 1, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [1, 2, 3, 4, 5, 6]
        >>> found = kendall(x, y, seed=0), partial_kendall(x, y, size, seed=0)
        >>> [round(each.value, 3) for each in found]
        [0.733, -0.071]
    """
    a, b, c = _columns(x=x, y=y, given=given).values()

    def partial(counts: Array) -> Array:
        taus = [_taus(*pair, counts) for pair in ((a, b), (a, c), (b, c))]
        if normal:
            return 2 / math.pi * np.arcsin(_partial(*(np.sin(math.pi / 2 * tau) for tau in taus)))
        return _partial(*taus)

    return bootstrap(partial, len(a), seed, resamples, confidence)


def correlation_matrix(columns: Mapping[str, ArrayLike]) -> Array:
    """Compute tau-b between all pairs of columns.

    Args:
        columns: Scores by name, each of shape ``(n,)``.

    Returns:
        Shape ``(m, m)``, in the order of the columns; symmetric with ones on the diagonal.

    Raises:
        ValueError, TypeError: As :func:`rank_correlation`; the message names the column.
    """
    arrays = list(_columns(**columns).values())
    matrix = np.eye(len(arrays))
    for row, first in enumerate(arrays):
        for column, second in enumerate(arrays[:row]):
            matrix[row, column] = matrix[column, row] = _tau(first, second)
    return matrix


def _columns(**given: ArrayLike) -> dict[str, Array]:
    columns: dict[str, Array] = {}
    for name, values in given.items():
        try:
            column = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a list of numbers: {error}.") from error
        if column.ndim != 1 or len(column) < _FEWEST:
            raise ValueError(f"{name} must be a list of {_FEWEST} or more numbers, got shape {column.shape}.")
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(column)} values of {name} are not finite, the first at position {bad[0]}: "
                f"{column[bad[0]]}; leave these architectures out of all columns and report how many they are."
            )
        if np.ptp(column) == 0:
            raise ValueError(f"All {len(column)} values of {name} are {column[0]}: they rank nothing.")
        columns[name] = column
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns must be of one length, one value for each architecture; got {lengths}.")
    return columns


def _check_percent(accuracies: Array) -> None:
    if accuracies.min() < 0 or accuracies.max() > 100:
        worst = accuracies.min() if accuracies.min() < 0 else accuracies.max()
        raise ValueError(f"truth must be accuracies in percent, from 0 to 100, got {worst}.")


def _top_size(top: float, count: int) -> int:
    if isinstance(top, float) and 0 < top <= 1:
        return max(1, round(top * count))
    if not isinstance(top, float) and 1 <= top <= count:
        return int(top)
    raise ValueError(
        f"top must be a number of architectures, an integer from 1 to {count}, or a fraction of them, a float "
        f"above 0 and up to 1.0; got {top!r}."
    )


def _taus(x: Array, y: Array, counts: Array) -> Array:
    """Tau-b of each resample, NaN where a column is constant.

    Args:
        x: First column ``(n,)``.
        y: Second column ``(n,)``.
        counts: How often each is drawn, ``(resamples, n)``.
    """
    if len(x) > FEW:
        return np.array([_tau(x[chosen], y[chosen]) for chosen in map(drawn, counts)])
    # Over all ordered pairs of a resample: concordant minus discordant ones, and those not tied in x, or in y. All are
    # exact integers.
    signs = [np.sign(column[:, None] - column) for column in (x, y)]
    agreeing, in_x, in_y = (
        ((counts @ pairs) * counts).sum(1) for pairs in (signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1]))
    )
    scale = np.sqrt(in_x * in_y)
    return np.round(np.divide(agreeing, scale, out=np.full(len(counts), math.nan), where=scale > 0), 12)


def _tau(x: Array, y: Array) -> float:
    # The method only affects the p-value; the exact one would cost O(n^2). Rounding makes a perfect order exactly 1, as
    # the partial tau needs it; one pair of a million differs by 4e-12.
    return round(float(stats.kendalltau(x, y, method="asymptotic").statistic), 12)


def _rho(x: Array, y: Array) -> float:
    first, second = (ranks - ranks.mean() for ranks in (stats.rankdata(x), stats.rankdata(y)))
    scale = math.sqrt((first @ first) * (second @ second))
    return float(first @ second) / scale if scale else math.nan


def _taus_better_half(scores: Array, truth: Array, counts: Array) -> Array:
    """Tau-b of each resample among those whose accuracy is at least the resample's median."""
    medians = np.array([np.median(truth[chosen]) for chosen in map(drawn, counts)])
    better = counts * (truth >= medians[:, None])
    return np.where(better.sum(1) >= _FEWEST, _taus(scores, truth, better), math.nan)


def _partial(xy: Array, xz: Array, yz: Array) -> Array:
    scale = np.sqrt(np.maximum(0.0, (1 - xz**2) * (1 - yz**2)))
    found = np.divide(xy - xz * yz, scale, out=np.full(len(scale), math.nan), where=scale > 0)
    # Rounding errors may carry it past 1, where arcsine is not defined.
    return np.clip(found, -1.0, 1.0)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
