"""How the generations of a search went, in a few numbers each: what a logger of experiments is told."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, quantiles

from genas_plugins.search import Record

__all__ = ["generation_figures"]


def generation_figures(records: Sequence[Record], best: float | None) -> dict[str, float]:
    """Figures of one generation, by their names in a log.

    Of scores count those on all images: what failed, or was dropped by a race, has none. Where a generation has no
    score at all, the figures of scores are left out.

    Args:
        records: Of all candidates of the generation; at least one.
        best: The best score so far, of all generations; ``None`` if nothing was scored yet.

    Returns:
        ``search/generation`` from 0; ``search/best`` so far; of the generation's scores ``search/generation_best``,
        ``search/mean`` and the quartiles ``search/first_quartile``, ``search/median`` and ``search/third_quartile``;
        ``search/slope_share``, the mean share of the slope term in Eq. 4, where flatness was measured; and numbers of
        candidates, ``search/scored``, ``search/failed`` and ``search/dropped``.
    """
    scores = [record.score for record in records if record.score is not None]
    shares = [record.shares["slope"] for record in records if record.shares is not None and "slope" in record.shares]
    figures: dict[str, float] = {"generation": records[0].generation}
    if best is not None:
        figures["best"] = best
    if scores:
        # As in the picture of the search.
        low, middle, high = quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else scores * 3
        figures |= {"generation_best": max(scores), "mean": fmean(scores)}
        figures |= {"first_quartile": low, "median": middle, "third_quartile": high}
    if shares:
        figures["slope_share"] = fmean(shares)
    figures["scored"] = len(scores)
    for status in ("failed", "dropped"):
        figures[status] = sum(record.status == status for record in records)
    return {f"search/{name}": value for name, value in figures.items()}
