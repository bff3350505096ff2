"""The statistics of :mod:`genas_plugins.correlation.statistics`, under the name that they had first."""

from genas_plugins.correlation.statistics import (
    Estimate,
    Ranking,
    compare,
    correlation_matrix,
    fewest_resamples,
    kendall,
    ndcg,
    partial_kendall,
    precision_at,
    rank_correlation,
)

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
