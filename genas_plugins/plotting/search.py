"""Picture of a search: what every candidate scored, and how the generations went."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from genas_plugins.plotting._style import GREY, INK, PALETTE, figure_file, short_number
from genas_plugins.search.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_search"]

Records = Sequence[Record]

_ORIGINS = {"random": "#8d949e", "mutation": PALETTE[0], "crossover": PALETTE[1]}


def plot_search(
    records: Sequence[Record | Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw the progress of a search: every candidate's score, the best so far, and each generation's scores.

    Args:
        records: One a candidate, as a search gives them, or lines of its history.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: No record, one that is not as described, or an unknown suffix.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.
    """
    history = sorted(_read(records), key=lambda record: record.index)
    scored = [record for record in history if record.status == "ok"]
    with figure_file(path, 11.0, 5.2) as figure:
        low, tall = 0.125, 0.69 if title else 0.745
        main = figure.add_axes((0.075, low, 0.62, tall))
        side = figure.add_axes((0.715, low, 0.27, tall), sharey=main)
        _draw_history(main, history, scored)
        _draw_generations(side, history, scored)
        if scored:
            scores = [record.score for record in scored]
            room = (max(scores) - min(scores)) or abs(scores[0]) or 1.0
            main.set_ylim(min(scores) - 0.13 * room, max(scores) + 0.08 * room)
            main.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
        else:
            main.set_yticks([])
            style = {"transform": main.transAxes, "ha": "center", "color": GREY, "backgroundcolor": "white"}
            main.text(0.5, 0.5, "no candidate was scored", **style)
        if title:
            figure.text(0.075, 0.945, title, fontsize=12.5, fontweight="bold", parse_math=False)
        figure.text(0.075, 0.9 if title else 0.945, _summary(history, scored), color=GREY, parse_math=False)
    return Path(path)


def _read(records: Sequence[Record | Mapping[str, Any]]) -> list[Record]:
    if not records:
        raise ValueError("There is no candidate to draw: pass at least one record of the search history.")
    read = []
    for number, record in enumerate(records):
        try:
            read.append(Record.of(record))
        except ValueError as error:
            raise ValueError(f"Record {number} of the search history {error}: {dict(record)!r}.") from error
        if read[-1].origin not in _ORIGINS:
            raise ValueError(
                f"Candidate {read[-1].index} has origin {read[-1].origin!r}: choose from {', '.join(_ORIGINS)}."
            )
    return read


def _summary(history: Records, scored: Records) -> str:
    count = len(history)
    failed, dropped = (sum(record.status == status for record in history) for status in ("failed", "dropped"))
    spent = _duration(sum(record.seconds for record in history))
    text = f"{count} candidate{'s' * (count > 1)}, {failed} failed, "
    text += f"{dropped} dropped, " * bool(dropped) + f"{spent} of scoring, all candidates added up"
    if scored:
        best = max(scored, key=lambda record: record.score)
        text += f"; best: candidate {best['index']}, score {short_number(best['score'])}"
        for name, share in (best.shares or {}).items():
            # The slope's share is one of Eq. 4, the others are shares of the score.
            text += f", slope {100 * share:.1f} % of Eq. 4" if name == "slope" else f", {100 * share:.0f} % {name}"
    return text


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _draw_history(axes: Axes, history: Records, scored: Records) -> None:
    """The left panel: scores by candidate, generations as bands, the best so far, failures at the bottom."""
    _draw_bands(axes, history)
    for origin, colour in _ORIGINS.items():
        if chosen := [(record.index, record.score) for record in scored if record.origin == origin]:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=16, color=colour, alpha=0.75, linewidths=0, label=origin, zorder=2)
    if scored:
        x, scores = [record.index for record in scored], [record.score for record in scored]
        y = list(itertools.accumulate(scores, max))
        style = {"where": "post", "color": INK, "linewidth": 1.5, "label": "best so far", "zorder": 3}
        axes.step([*x, history[-1]["index"] + 0.5], [*y, y[-1]], **style)
        best = scores.index(y[-1])
        axes.scatter(x[best], y[-1], s=42, color="white", edgecolors=INK, linewidths=1.5, zorder=4)
    for status, marker, colour in (("failed", "x", PALETTE[6]), ("dropped", "|", GREY)):
        if chosen := [record.index for record in history if record.status == status]:
            style = {"marker": marker, "linewidths": 1.2, "color": colour, "label": status, "zorder": 3}
            axes.scatter(chosen, [0.035] * len(chosen), s=22, transform=axes.get_xaxis_transform(), **style)
    pad = 0.5 + 0.005 * len(history)
    axes.set_xlim(history[0]["index"] - pad, history[-1]["index"] + pad)
    axes.set_xlabel("candidate")
    axes.set_ylabel("score")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style = {"handlelength": 1.6, "handletextpad": 0.3, "columnspacing": 1.4, "markerscale": 1.3}
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, **style)


def _draw_bands(axes: Axes, history: Records) -> None:
    """Shade every other generation, and number about twenty of them at the top."""
    spans: dict[int, list[int]] = {}
    for record in history:
        spans.setdefault(record.generation, []).append(record.index)
    every = math.ceil(len(spans) / 20)
    for position, (generation, span) in enumerate(spans.items()):
        if position % 2:
            axes.axvspan(span[0] - 0.5, span[-1] + 0.5, color="#eef1f4", linewidth=0, zorder=0)
        if position % every == 0:
            style = {"ha": "center", "va": "top", "fontsize": 7, "color": GREY}
            middle = (span[0] + span[-1]) / 2
            axes.text(middle, 0.99, str(generation), transform=axes.get_xaxis_transform(), **style)


def _draw_generations(axes: Axes, history: Records, scored: Records) -> None:
    """The right panel: the scores of each generation side by side, with quartiles."""
    by_generation: dict[int, list[float]] = {}
    for record in scored:
        by_generation.setdefault(record.generation, []).append(record.score)
    for generation, scores in by_generation.items():
        # Multiples of the golden ratio spread the points evenly without a random number.
        x = [generation + 0.7 * ((0.5 + 0.6180339887 * i) % 1 - 0.5) for i in range(len(scores))]
        axes.scatter(x, scores, s=7, color="#b3bac3", linewidths=0, zorder=1)
        low, middle, high = quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else scores * 3
        axes.plot((generation, generation), (low, high), color=PALETTE[0], linewidth=2.2, zorder=2)
        axes.plot(generation, middle, "o", color="white", mec=PALETTE[0], mew=1.2, ms=4.2, zorder=3)
    axes.tick_params(labelleft=False, left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
    generations = [record.generation for record in history]
    axes.set_xlim(min(generations) - 0.6, max(generations) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("generation (bar: middle half, ring: median)")
