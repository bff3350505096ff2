"""What a finished search hands over: the best architectures, files and pictures."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import genas_plugins
from genas_plugins.darts.genotype import Genotype
from genas_plugins.experiment import config
from genas_plugins.experiment.run_folder import ARCHITECTURE_FILE, FRONT_FILE, GENOTYPE_FILE
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.files import write_text
from genas_plugins.plotting import LossCurve, plot_cells, plot_front, plot_loss_curves, plot_search
from genas_plugins.scoring import mean_loss
from genas_plugins.search import Evolution, ParetoEvolution, Record
from genas_plugins.search.pareto import objective
from genas_plugins.search.racing import spared_images

__all__ = ["Found", "Outcome", "SearchFailedError", "hand_over"]

_TOP = 5


@dataclass(frozen=True)
class Found:
    """One of the best architectures of a search.

    Attributes:
        genotype: The architecture.
        record: Its line of the history.
        test_top1: Top-1 accuracy on the test images with the supernet's weights, as a fraction; ``None``
            without test images.
    """

    genotype: Any
    record: Record
    test_top1: float | None


@dataclass(frozen=True)
class Outcome:
    """What a finished search hands over.

    Attributes:
        folder: The run folder.
        best: The best architectures, best first.
        scored: Number of candidates scored.
        failed: Number of candidates without a finite score.
        dropped: Number of candidates that a race did not measure on all images.
        spared: Fraction of the image evaluations of all candidates that racing saved; ``None`` without racing.
        front: Of a search of several objectives, all that no other dominates, the best in the first objective first.
    """

    folder: Path
    best: tuple[Found, ...]
    scored: int
    failed: int
    dropped: int = 0
    spared: float | None = None
    front: tuple[Record, ...] = ()


class SearchFailedError(RuntimeError):
    """Every candidate of a search failed."""


def hand_over(
    folder: Path,
    experiment: config.Experiment,
    evolution: Evolution[Any],
    records: Sequence[Record],
    scorer: Scorer,
    seconds: float,
) -> Outcome:
    """Write what a finished search found: the best, its cells, and the pictures of search and losses.

    Args:
        folder: The run folder.
        experiment: Settings of the run.
        evolution: At its end.
        records: All candidates.
        scorer: What scored them.
        seconds: Time that the run took.

    Raises:
        SearchFailedError: No candidate had a finite score.
        OSError: A file cannot be written.
    """
    plain = scorer.paths.search_space.to_json
    by_candidate = {json.dumps(record.candidate): record for record in records}
    best: list[Found] = []
    curves: list[LossCurve] = []
    # Behind the parents, a race may have dropped what would come next.
    raced = experiment.search.racing is not None
    certain = min(_TOP, evolution.parents) if raced else _TOP
    ranked = [
        (f"#{rank}", genotype, by_candidate[json.dumps(plain(genotype))])
        for rank, (genotype, _) in enumerate(evolution.best(certain), 1)
    ]
    for found, curve in scorer.in_flight.map(lambda item: _looked_at(scorer, *item), ranked):
        best.append(found)
        curves += [curve] if curve is not None else []
    failed, dropped = (sum(record.status == status for record in records) for status in ("failed", "dropped"))
    spared = spared_images(records, len(scorer.data.validation)) if raced else None
    if not best:
        raise SearchFailedError(
            f"None of the {len(records)} candidates has a finite score; the first failed because: {records[0].reason}"
        )
    plot_search(records, folder / "search.png", title=f"Search by {experiment.score.metric}")
    front: tuple[Record, ...] = ()
    if isinstance(evolution, ParetoEvolution):
        front = tuple(by_candidate[json.dumps(plain(candidate))] for candidate, _ in evolution.front())
        _write_front(folder, records, front, evolution.objectives)
    if curves:
        plot_loss_curves(curves, folder / "loss_curves.png", title="Loss around the weights of the best five")
    found = best[0]
    details = {
        "record": found.record.to_dict(),
        "test_top1": found.test_top1,
        "top": [_in_short(found, plain) for found in best],
        "provenance": {
            **_provenance(experiment, scorer),
            "candidates": len(records),
            "failed": failed,
            **({} if spared is None else {"dropped": dropped, "spared": round(spared, 4)}),
            "seconds": round(seconds, 1),
        },
    }
    if isinstance(found.genotype, Genotype):
        for name in ("cells.svg", "cells.png"):
            plot_cells(found.genotype, folder / name, title="Best architecture")
        found.genotype.save(folder / GENOTYPE_FILE, **details)
    else:
        content = {"architecture": plain(found.genotype), **details}
        write_text(folder / ARCHITECTURE_FILE, json.dumps(content, indent=2) + "\n")
    return Outcome(folder, tuple(best), len(records), failed, dropped, spared, front)


def _provenance(experiment: config.Experiment, scorer: Scorer) -> dict[str, Any]:
    return {
        "genas_plugins": genas_plugins.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(scorer.device),
        "data": experiment.data.name,
        "metric": experiment.score.metric,
        "seed": experiment.seed,
    }


def _in_short(found: Found, plain: Callable[[Any], Any]) -> dict[str, Any]:
    costs = {} if found.record.costs is None else {"costs": found.record.costs}
    return {"code": plain(found.genotype), "score": found.record.score, "test_top1": found.test_top1, **costs}


def _write_front(folder: Path, records: Sequence[Record], front: Sequence[Record], objectives: Sequence[str]) -> None:
    """A picture, and ``pareto.csv``: a line for each candidate of the front, its objectives, costs and architecture."""
    plot_front(records, front, objectives, folder / "pareto.png", title=f"Search by {' and '.join(objectives)}")
    costs = [name for name in front[0].costs or {} if name not in objectives]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["candidate", *objectives, *costs, "architecture"])
    for record in front:
        code = record.candidate
        # As the commands take it.
        code = (
            " ".join(map(str, code)) if isinstance(code, list) else code if isinstance(code, str) else json.dumps(code)
        )
        numbers = [objective(record, name) for name in objectives] + [(record.costs or {})[name] for name in costs]
        table.writerow([record.index, *numbers, code])
    write_text(folder / FRONT_FILE, text.getvalue())


def _looked_at(scorer: Scorer, label: str, genotype: Any, record: Record) -> tuple[Found, LossCurve | None]:
    """One of the best, on the test images and, where the noise was measured, without any."""
    accuracy = scorer.test_accuracy(genotype)
    found = Found(genotype, record, None if accuracy is None else accuracy.top1)
    if record.losses is None:
        return found, None
    with scorer.calibrated(genotype) as model:
        unperturbed = mean_loss(model, scorer.validation)
    return found, LossCurve(label, (0.0, *record.sigmas), (unperturbed, *record.losses), record.score)
