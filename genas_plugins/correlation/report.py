"""The table of ``genas correlate``: how well each score ranks NAS-Bench-201, and the files that say so."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from genas_plugins.correlation import Setting, columns, slope_shares
from genas_plugins.correlation.statistics import (
    Estimate,
    Ranking,
    correlation_matrix,
    partial_kendall,
    rank_correlation,
)
from genas_plugins.files import write_text
from genas_plugins.nasbench201 import NasBench201Architecture, nasbench201_costs
from genas_plugins.nasbench201.truth import lookup
from genas_plugins.plotting import plot_scatter

__all__ = [
    "LEAST_SLOPE",
    "ON_SUPERNET",
    "TRAINING_FREE",
    "RankSum",
    "Row",
    "references",
    "remarks",
    "score_table",
    "table_of",
    "write_report",
]

LEAST_SLOPE = 0.01
"""Share of Eq. 4 below which the slope term is negligible, and flatness ranks like the loss."""

TRAINING_FREE = ("NASWOT", "SynFlow", "ZiCo")
"""Columns of networks that were never trained."""

ON_SUPERNET = tuple(f"{name}, supernet" for name in TRAINING_FREE)
"""Columns of the training-free scores on the supernet's trained weights."""

GIVEN = ("loss", "accuracy")
"""Columns given which the partial tau of a score is computed."""


@dataclass(frozen=True)
class RankSum:
    """A column that adds the ranks of others, which gives scores of different units equal weight.

    Attributes:
        name: Name of the column.
        of: The columns whose ranks are added.
        logarithm: Add the logarithms of ranks instead, lowest first, so that a bad rank weighs more than a good one
            (the non-linear aggregation of AZ-NAS, Lee and Ham, CVPR 2024).

    Example:
        >>> from genas_plugins.correlation.report import RankSum
        >>> both = RankSum("both", of=("flatness", "angle"))
        >>> both({"flatness": [0.1, 0.3, 0.2], "angle": [5.0, 6.0, 7.0]})
        [2.0, 5.0, 5.0]
    """

    name: str
    of: tuple[str, ...]
    logarithm: bool = False

    def __call__(self, table: Mapping[str, Sequence[float]]) -> list[float]:
        """Compute the column from those of a table."""
        ranks = [rankdata(table[name]) for name in self.of]
        return sum(map(np.log, ranks) if self.logarithm else ranks).tolist()


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: Name of the column of scores.
        ranking: Rank statistics of the column.
        given: Kendall's partial tau with the true accuracy, given the supernet's ``"loss"`` without noise and, if it is
            a column, its ``"accuracy"``; through normal variables, so that it is zero for a score that adds nothing to
            them. Empty for references and terms.
        slope_share: Median share of the slope term in Eq. 4; None if the score has none.
    """

    name: str
    ranking: Ranking
    given: Mapping[str, Estimate]
    slope_share: float | None


def write_report(
    folder: str | Path,
    raws: Sequence[Mapping[str, Any]],
    settings: Sequence[Setting],
    truth: Mapping[str, float],
    *,
    rows_of: Collection[str] | None = None,
    sums: Sequence[RankSum] = (),
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[list[Row], int]:
    """Write ``correlations.csv``, ``scores.csv``, ``taus.csv`` (tau between all columns) and ``scatter.png``.

    An architecture whose score is not defined in any column is left out of all; a column with one value for all of them
    ranks nothing and is left out. A training-free score that is not finite counts as the lowest.

    Args:
        folder: Folder to write to.
        raws: Measurements of :func:`genas_plugins.correlation.run.measure_all`, one for each architecture.
        settings: Settings of the measured columns.
        truth: Test accuracy in percent by architecture.
        rows_of: Architectures that are compared; ``None`` for all that are measured, which may be neighbours alone.
        sums: Further columns, computed from the others.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples; 200 suffice for all 15,625 architectures.

    Returns:
        The table, highest tau first, and how many architectures were left out.
    """
    folder = Path(folder)
    kept, table = score_table(raws, settings, sums, rows_of)
    compared = [raw for raw in raws if rows_of is None or raw["architecture"] in rows_of]
    accuracies = lookup(truth, kept)
    having = set(kept)
    scored = [raw for raw in raws if raw["architecture"] in having]
    shares = {s.name: slope_shares(s, scored) for s in settings if "flatness" in s.score.metrics}
    measured = [setting.name for setting in settings]
    known = {
        "loss": next((name for name in table if name.startswith("-loss")), None),
        "accuracy": next((s.name for s in settings if s.score.metric == "accuracy" and s.name in table), None),
    }
    rows = []
    for name, column in table.items():
        given = {
            what: partial_kendall(column, accuracies, table[other], seed=seed, normal=True, resamples=resamples)
            for what, other in known.items()
            if other is not None and name in measured and name != other
        }
        share = statistics.median(shares[name]) if name in shares else None
        ranking = rank_correlation(column, accuracies, seed=seed, resamples=resamples)
        rows.append(Row(name, ranking, given, share))
    rows.sort(key=lambda row: -row.ranking.tau.value)
    write_text(folder / "correlations.csv", _csv(_lines(rows)))
    lines = [["architecture", "truth", *table]]
    lines += [[name, accuracies[i], *(column[i] for column in table.values())] for i, name in enumerate(kept)]
    write_text(folder / "scores.csv", _csv(lines))
    matrix = correlation_matrix(table)
    write_text(
        folder / "taus.csv", _csv([["", *table], *([name, *row] for name, row in zip(table, matrix, strict=True))])
    )
    shown = {row.name: table[row.name] for row in rows}
    taus = {row.name: row.ranking.tau.value for row in rows}
    plot_scatter(shown, accuracies, folder / "scatter.png", taus)
    return rows, len(compared) - len(kept)


def score_table(
    raws: Sequence[Mapping[str, Any]],
    settings: Sequence[Setting],
    sums: Sequence[RankSum] = (),
    rows_of: Collection[str] | None = None,
) -> tuple[list[str], dict[str, list[float]]]:
    """The columns of all scores, for the architectures whose scores are all defined.

    A column with one value for all of them is left out, and a training-free score that is not finite is the lowest.

    Args:
        raws: Measurements of :func:`genas_plugins.correlation.run.measure_all`, one for each architecture.
        settings: Settings of the measured columns.
        sums: Further columns, computed from the others.
        rows_of: See :func:`write_report`.

    Returns:
        The architectures, and the columns by name in the same order.
    """
    names = [raw["architecture"] for raw in raws]
    table = {**references(names), **_training_free_columns(raws), **columns(settings, raws)}
    wanted = set(names) if rows_of is None else set(rows_of)
    defined = [
        name in wanted and all(math.isfinite(column[i]) for column in table.values()) for i, name in enumerate(names)
    ]
    kept = [name for name, fine in zip(names, defined, strict=True) if fine]
    table = {name: [v for v, fine in zip(column, defined, strict=True) if fine] for name, column in table.items()}
    for one in sums:
        table[one.name] = one(table)
    return kept, {name: column for name, column in table.items() if len(set(column)) > 1}


def table_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text for display, header first."""
    table: list[tuple[str, ...]] = [
        (
            *("score", "tau [95 %]", "rho", "better half", "top k", "nDCG", "best pick", "gap"),
            *(*(f"tau given {what}" for what in GIVEN), "slope"),
        )
    ]
    for row in rows:
        r = row.ranking
        table.append(
            (
                *(row.name, str(r.tau), f"{r.rho.value:.3f}", f"{r.tau_better_half.value:.3f}"),
                *(f"{r.precision:.2f}", f"{r.ndcg:.3f}", f"{r.best_accuracy:.2f}", f"{r.gap:.2f}"),
                *(str(row.given[what]) if what in row.given else "-" for what in GIVEN),
                "-" if row.slope_share is None else f"{row.slope_share:.2%}",
            )
        )
    return table


def remarks(rows: Sequence[Row], left_out: int) -> Iterator[str]:
    """The lines to print below the table."""
    ranking = rows[0].ranking
    yield f"\n{ranking.count} architectures" + (
        f"; {left_out} without a finite score are left out." if left_out else "."
    )
    yield f"top k: share of the best {ranking.k}; slope: median share of the slope term in Eq. 4."
    weak = [row.name for row in rows if row.slope_share is not None and row.slope_share < LEAST_SLOPE]
    if weak:
        yield f"The slope term decides less than {LEAST_SLOPE:.0%} of the score in: {'; '.join(weak)}."


def references(names: Sequence[str]) -> dict[str, list[float]]:
    """Parameters and live FLOPs of architectures, the baselines beside every score."""
    architectures = [NasBench201Architecture.from_string(name) for name in names]
    return {
        "parameters": [float(nasbench201_costs(a).parameters) for a in architectures],
        "live FLOPs": [float(nasbench201_costs(a, live=True).flops) for a in architectures],
    }


def _training_free_columns(raws: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    table = {}
    for name in raws[0].get("training_free", {}):
        scores = [raw["training_free"][name] for raw in raws]
        lowest = min((score for score in scores if score is not None), default=0.0)
        table[name] = [lowest - 1.0 if score is None else score for score in scores]
    return table


def _lines(rows: Sequence[Row]) -> list[list[Any]]:
    lines: list[list[Any]] = [
        [
            *("score", "architectures", "tau", "tau_low", "tau_high", "rho", "rho_low", "rho_high"),
            *("tau_better_half", "k", "precision_at_k", "ndcg_at_k", "best_accuracy", "gap"),
            *(f"tau_given_{what}{end}" for what in GIVEN for end in ("", "_low", "_high")),
            "median_slope_share",
        ]
    ]
    for row in rows:
        r = row.ranking
        given = [row.given.get(what) for what in GIVEN]
        lines.append(
            [
                *(row.name, r.count, r.tau.value, r.tau.low, r.tau.high, r.rho.value, r.rho.low, r.rho.high),
                *(r.tau_better_half.value, r.k, r.precision, r.ndcg, r.best_accuracy, r.gap),
                *(part for g in given for part in (("", "", "") if g is None else (g.value, g.low, g.high))),
                "" if row.slope_share is None else row.slope_share,
            ]
        )
    return lines


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
