"""Alias of :mod:`genas_plugins.correlation.statistics` under its earlier name."""

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
