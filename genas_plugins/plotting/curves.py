"""Picture of flatness: the loss of architectures against the size of the perturbation."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from genas_plugins.plotting._style import FAINT, GREY, PALETTE, figure_file, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LossCurve", "plot_loss_curves"]


@dataclass(frozen=True)
class LossCurve:
    """The loss of one architecture under growing noise on its weights, as flatness (Eq. 4) measures it.

    Attributes:
        label: Name of the architecture.
        sigmas: Standard deviations of the noise, not negative, strictly increasing; 0 is without noise.
        losses: Mean validation cross-entropy in nats at each sigma.
        score: Flatness score (higher is flatter and deeper), or ``None``.
    """

    label: str
    sigmas: tuple[float, ...]
    losses: tuple[float, ...]
    score: float | None = None


def plot_loss_curves(curves: Sequence[LossCurve], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw the validation loss of architectures against the size of the weight perturbation.

    Each line ends in its label and score; the highest score is emphasised. With more than 8 curves only the
    8 best (without scores: the first 8) have a colour and a label.

    Args:
        curves: One curve for each architecture.
        path: File to write; its suffix (.svg, .png or .pdf) is the format, its folder must exist.
        title: Headline.

    Returns:
        The path written.

    Raises:
        ValueError: No curve, one with unequal lengths or a value that is not finite, sigmas that are negative
            or do not increase, or an unknown suffix.
        FileNotFoundError: The folder does not exist.
        ImportError: matplotlib is not installed.

    Example:
        >>> from genas_plugins.plotting import LossCurve, plot_loss_curves
        >>> flat, sharp = LossCurve("flat", (0.0, 0.02), (1.0, 1.1)), LossCurve("sharp", (0.0, 0.02), (0.9, 1.7))
        >>> plot_loss_curves([flat, sharp], "curves.svg")
        PosixPath('curves.svg')
    """
    _check_curves(curves)
    ranking = sorted(range(len(curves)), key=lambda i: math.inf if (score := curves[i].score) is None else -score)
    colours = dict(zip(sorted(ranking[: len(PALETTE)]), PALETTE, strict=False))
    best = None if curves[ranking[0]].score is None else ranking[0]
    with figure_file(path, 9.0, 5.0) as figure:
        axes = figure.add_axes((0.085, 0.13, 0.65, 0.75 if title else 0.82))
        for i, curve in enumerate(curves):
            width = 2.6 if i == best else 1.5 if i in colours else 0.9
            style = {"linewidth": width, "markersize": 1.5 + 1.6 * width, "zorder": 2 + width}
            style |= {"color": colours.get(i, FAINT), "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(curve.sigmas, curve.losses, "o-", **style)
        axes.margins(x=0.03, y=0.07)
        axes.grid(axis="y")
        axes.set_xlabel(r"perturbation of the weights, $\sigma$")
        axes.set_ylabel("validation loss (cross-entropy, nats)")
        _scale_sigmas(axes, sorted({sigma for curve in curves for sigma in curve.sigmas}))
        if title:
            figure.text(0.085, 0.94, title, fontsize=12, fontweight="bold", parse_math=False)
        _label_ends(axes, curves, colours, best)
    return Path(path)


def _check_curves(curves: Sequence[LossCurve]) -> None:
    if not curves:
        raise ValueError("There is no loss curve to draw: pass at least one LossCurve.")
    for curve in curves:
        if not curve.sigmas or len(curve.sigmas) != len(curve.losses):
            raise ValueError(
                f"Curve {curve.label!r} has {len(curve.sigmas)} sigmas and {len(curve.losses)} losses: "
                "expected the same number of both, at least one."
            )
        if not all(map(math.isfinite, (*curve.sigmas, *curve.losses, curve.score or 0.0))):
            raise ValueError(f"Curve {curve.label!r} has a value that is not finite: leave that architecture out.")
        if curve.sigmas[0] < 0 or any(b <= a for a, b in itertools.pairwise(curve.sigmas)):
            raise ValueError(
                f"Curve {curve.label!r} has sigmas {curve.sigmas}: expected increasing values, none below 0."
            )


def _scale_sigmas(axes: Axes, sigmas: Sequence[float]) -> None:
    """Scale and ticks of the sigma axis: the measured sigmas themselves as far as they find room."""
    if sigmas[0] > 0:
        axes.set_xscale("log")
    elif len(sigmas) > 1 and sigmas[-1] > 20 * sigmas[1]:
        axes.set_xscale("symlog", linthresh=sigmas[1], linscale=0.5)
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    place = {sigma: float(to_axes.transform((sigma, 1.0))[0]) for sigma in sigmas}
    ticks: list[float] = []
    for sigma in sigmas:
        if not ticks or place[sigma] - place[ticks[-1]] > 0.075:
            ticks.append(sigma)
    axes.set_xticks(ticks, map(short_number, ticks))
    axes.minorticks_off()


def _label_ends(axes: Axes, curves: Sequence[LossCurve], colours: Mapping[int, str], best: int | None) -> None:
    """Name each coloured line beside its end, moved apart where ends are close, with a thin leader."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((curves[i].sigmas[-1], curves[i].losses[-1])) for i in colours]
    for i, (x, y), place in zip(colours, ends, _spread([y for _, y in ends], 0.092), strict=True):
        curve, style = curves[i], {"transform": axes.transAxes, "color": colours[i], "clip_on": False}
        axes.plot((x, 1.025, 1.04), (y, place, place), linewidth=0.7, alpha=0.6, **style)
        label = curve.label if len(curve.label) <= 28 else curve.label[:27] + "…"
        style |= {"parse_math": False, "fontweight": "bold" if i == best else "normal"}
        axes.text(1.05, place, label, va="center" if curve.score is None else "bottom", **style)
        if curve.score is not None:
            text = f"score {short_number(curve.score)}{', best' if i == best else ''}"
            axes.text(1.05, place - 0.004, text, va="top", fontsize=7.5, **(style | {"fontweight": "normal"}))
    if len(curves) > len(colours):
        style = {"transform": axes.transAxes, "va": "top", "color": GREY, "fontsize": 7.5}
        axes.text(1.05, -0.06, f"grey: {len(curves) - len(colours)} more", **style)


def _spread(wanted: Sequence[float], clearance: float) -> list[float]:
    """The places in [0, 1] nearest to ``wanted``, in its order, that lie at least ``clearance`` apart."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    rise = clearance * np.arange(len(order))
    # Without the clearances this is monotone regression, which stays one when both ends are cut off.
    free = isotonic_regression(np.array(wanted)[order] - rise).x
    places = np.clip(free, 0.0, max(0.0, 1.0 - rise[-1])) + rise
    return [float(places[order.index(i)]) for i in range(len(wanted))]
