"""Scores of NAS-Bench-201 architectures with a trained supernet, against the accuracy that training each gives."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import rankdata

from genas_plugins.correlation import Setting, columns, measure_raw, slope_shares
from genas_plugins.files import packaged_configs, write_text
from genas_plugins.nasbench201 import NasBench201Network, nasbench201_costs
from genas_plugins.plotting import plot_scatter
from genas_plugins.ranking import Estimate, Ranking, correlation_matrix, partial_kendall, rank_correlation
from genas_plugins.scoring import CombinedScore, CommonNoise
from genas_plugins.scoring.training_free import naswot, synflow, zico
from genas_plugins.search import History, HistoryError, candidate_seed
from genas_plugins.spaces.nasbench201 import NasBench201Architecture, NasBench201SearchSpace
from genas_plugins.truth import lookup
from nni_strategy import config
from nni_strategy.space import NasBench201Space
from nni_strategy.trained import TrainedSupernet

__all__ = [
    "RankSum",
    "Row",
    "check_sums",
    "choose",
    "load_settings",
    "measure_all",
    "remarks",
    "table_of",
    "write_report",
]

SETTINGS_FILE = "settings.json"
MEASUREMENTS_FILE = "measurements.jsonl"

LEAST_SLOPE = 0.01
"""Below this share of Eq. 4 the slope term decides next to nothing, and flatness ranks as the loss does."""

_TRAINING_FREE = ("NASWOT", "SynFlow", "ZiCo")
_RESERVED = {"architecture", "truth", "parameters", "live FLOPs", *_TRAINING_FREE}


@dataclass(frozen=True)
class RankSum:
    """A column that adds the ranks of others: scores of different units, with equal say and without labels.

    Attributes:
        name: Of the column.
        of: The columns whose ranks are added.
        logarithm: Add the logarithms of ranks instead, lowest first, so that a bad rank weighs more than a good one
            (the non-linear aggregation of AZ-NAS, Lee and Ham, CVPR 2024).
    """

    name: str
    of: tuple[str, ...]
    logarithm: bool = False

    def __call__(self, table: Mapping[str, Sequence[float]]) -> list[float]:
        """The column, from those of a table."""
        ranks = [rankdata(table[name]) for name in self.of]
        return sum(map(np.log, ranks) if self.logarithm else ranks).tolist()


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: The column of scores.
        ranking: How it ranks.
        given_loss: Kendall's partial tau with the accuracy given the loss without noise, through normal variables, so
            that it is zero where a score owes all to the loss; None for references and terms.
        slope_share: Median share of the slope term; None where there is none.
    """

    name: str
    ranking: Ranking
    given_loss: Estimate | None
    slope_share: float | None


def load_settings(name_or_path: str | Path) -> tuple[list[Setting], list[RankSum]]:
    """Read settings from a YAML file: a list, each with a ``name`` and the fields of ``CombinedScore``.

    One with ``rank_sum``, a list of columns, adds their ranks instead, and one with ``log_rank_sum`` their logarithms.

    Raises:
        ConfigError: There is no such file, or it says something that cannot be measured.
    """
    known = packaged_configs("correlate")
    path = Path(name_or_path) if Path(name_or_path).is_file() else known.get(str(name_or_path))
    if path is None:
        raise config.ConfigError(f"There are no settings {str(name_or_path)!r}; the package has: {', '.join(known)}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise config.ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from error
    if not isinstance(data, list) or not data:
        raise config.ConfigError(f"{path.name} must hold a list of settings, got {type(data).__name__}.")
    items = [_setting(item, f"{path.name}, number {number}") for number, item in enumerate(data, 1)]
    names = [item.name for item in items]
    if taken := sorted(_RESERVED.intersection(names)):
        raise config.ConfigError(f"{path.name}: the table itself has columns of the name {', '.join(taken)}.")
    if twice := {name for name in names if names.count(name) > 1}:
        raise config.ConfigError(f"{path.name} has several settings of the name {', '.join(sorted(twice))}.")
    settings = [item for item in items if isinstance(item, Setting)]
    if not settings:
        raise config.ConfigError(f"{path.name} has nothing to measure: only sums of ranks.")
    return settings, [item for item in items if isinstance(item, RankSum)]


def check_sums(sums: Sequence[RankSum], settings: Sequence[Setting], training_free: bool) -> None:
    """Refuse sums of columns that there will not be.

    Raises:
        ConfigError: The message has the column and those that there are.
    """
    there = [*_references([]), *columns(settings, []), *(_TRAINING_FREE if training_free else ())]
    for one in sums:
        if missing := [name for name in one.of if name not in there]:
            raise config.ConfigError(f"{one.name}: there is no column {missing[0]!r}; there are: {', '.join(there)}.")


def _setting(data: Any, where: str) -> Setting | RankSum:
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise config.ConfigError(f"{where}: a setting holds keys and values, among them a name; got {data!r}.")
    for kind in ("rank_sum", "log_rank_sum"):
        if kind not in data:
            continue
        of = data[kind]
        if set(data) != {"name", kind} or not isinstance(of, list) or len(of) < 2:
            raise config.ConfigError(f"{where}: a sum has a name and, as {kind}, a list of two or more columns.")
        return RankSum(data["name"], tuple(map(str, of)), logarithm=kind == "log_rank_sum")
    own = {key: data[key] for key in ("images", "recalibration_images") if data.get(key) is not None}
    rest = {key: value for key, value in data.items() if key not in ("name", "images", "recalibration_images")}
    try:
        if any(type(count) is not int for count in own.values()):
            raise ValueError(f"images and recalibration_images must be integers, got {own}.")
        return Setting(name=data["name"], score=config.build(CombinedScore, rest), **own)
    except ValueError as error:
        raise config.ConfigError(f"{where}: {error}") from error


def choose(truth: Mapping[str, float], sample: int | None, seed: int) -> list[NasBench201Architecture]:
    """The architectures to measure: all, or a seeded sample without repetition, in the order of their index.

    Raises:
        ValueError: ``sample`` is out of range, or the truth lacks one of them.
    """
    space = NasBench201SearchSpace()
    if sample is not None and not 3 <= sample <= space.size:
        raise ValueError(f"The sample must have 3 to {space.size} architectures, got {sample}.")
    numbers = range(space.size)
    if sample is not None:
        numbers = sorted(np.random.default_rng(seed).choice(space.size, sample, replace=False).tolist())
    chosen = [NasBench201Architecture.from_index(number) for number in numbers]
    lookup(truth, map(str, chosen))
    return chosen


def measure_all(
    trained: TrainedSupernet,
    architectures: Sequence[NasBench201Architecture],
    settings: Sequence[Setting],
    folder: str | Path,
    *,
    training_free: bool = False,
    resume: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure architectures one by one; a killed run goes on with ``resume`` behind the last that it measured.

    Args:
        trained: The supernet, of NAS-Bench-201.
        architectures: What to measure.
        settings: The columns.
        folder: Where ``measurements.jsonl`` and ``settings.json`` are written.
        training_free: Also NASWOT, SynFlow and ZiCo, on freshly initialised networks of the benchmark's size.
        resume: Go on with what the folder holds.
        progress: Makes the progress display.

    Returns:
        What :func:`genas_plugins.correlation.measure_raw` gave, with ``architecture``.

    Raises:
        TypeError: The supernet is of another space.
        ConfigError: The folder holds measurements and ``resume`` is not set, or those of other settings.
        OSError: The folder cannot be written to.
    """
    if not isinstance(trained.space, NasBench201Space):
        raise TypeError(f"The supernet is one of {type(trained.space).__name__}, expected NasBench201Space.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps(
        {
            "settings": [_plain(setting) for setting in settings],
            "seed": trained.seed,
            "training_free": training_free,
            "architectures": list(map(str, architectures)),
        },
        indent=1,
    )
    if (folder / SETTINGS_FILE).exists():
        if not resume:
            raise config.ConfigError(
                f"{folder} already holds measurements: go on with --resume, or name another folder."
            )
        if (folder / SETTINGS_FILE).read_text(encoding="utf-8") != told:
            raise config.ConfigError(f"{folder} holds measurements of other settings or architectures: name another.")
    else:
        write_text(folder / SETTINGS_FILE, told)
    history = History(folder / MEASUREMENTS_FILE)
    done = [record.get("architecture") for record in history.records]
    if done != [str(architecture) for architecture in architectures[: len(done)]]:
        raise HistoryError(f"{history.path} holds other architectures than these: name another folder.")
    display = None if progress is None else progress("measuring", len(architectures), len(done))
    example, _ = next(iter(trained.validation))
    common = CommonNoise(trained.space, trained.seed)
    recalibration, own = (
        trained.recalibration,
        None if trained.recalibration is None else len(trained.data.recalibration),
    )
    if wanted := [s.recalibration_images for s in settings if s.recalibration_images is not None]:
        recalibration = trained.recalibration_on(max(*wanted, own or 0))
    for architecture in architectures[len(done) :]:
        with trained.paths.open(architecture, example) as (model, names):
            raw = measure_raw(
                model,
                settings,
                trained.validation,
                recalibration=recalibration,
                recalibration_images=own,
                angle=lambda chosen=architecture, names=names: trained.paths.angle(chosen, names),
                seed=candidate_seed(trained.seed, str(architecture)),
                common=common,
                parameters=names,
            )
        if training_free:
            raw["training_free"] = _training_free(architecture, trained)
        history.append({"architecture": str(architecture), **raw})
        if display is not None:
            display.step({})
    if display is not None:
        display.close()
    return history.records


def _training_free(architecture: NasBench201Architecture, trained: TrainedSupernet) -> dict[str, float | None]:
    """Scores of a network that was never trained; None where one is not finite (NASWOT of a cell cut off)."""
    if trained.recalibration is None:
        raise ValueError("The training-free scores need training images: the run has score.recalibration_images 0.")
    batches = list(itertools.islice(trained.recalibration, 2))
    images = torch.cat([batch for batch, _ in batches])
    # The same draws for each architecture, as far as their layers agree; nothing else draws from this generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trained.seed)
        network = NasBench201Network(architecture, num_classes=trained.data.num_classes).to(images.device)
    scores = naswot(network, images), synflow(network, tuple(images.shape[1:])), zico(network, batches)
    return {name: score if math.isfinite(score) else None for name, score in zip(_TRAINING_FREE, scores, strict=True)}


def write_report(
    folder: str | Path,
    raws: Sequence[Mapping[str, Any]],
    settings: Sequence[Setting],
    truth: Mapping[str, float],
    *,
    sums: Sequence[RankSum] = (),
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[list[Row], int]:
    """Write ``correlations.csv``, ``scores.csv``, ``taus.csv`` (tau between all columns) and ``scatter.png``.

    An architecture whose score is not defined in any column is left out of all; a column with one value for all of them
    ranks nothing and is left out. A training-free score that is not finite counts as the lowest.

    Args:
        folder: Where to.
        raws: Of :func:`measure_all`.
        settings: The columns.
        truth: Accuracy in percent by architecture.
        sums: Further columns, see :func:`check_sums`.
        seed: Of the bootstrap.
        resamples: Of the bootstrap; 200 do for all 15,625 architectures.

    Returns:
        The table, highest tau first, and how many architectures were left out.
    """
    folder = Path(folder)
    names = [raw["architecture"] for raw in raws]
    table = {**_references(names), **_training_free_columns(raws), **columns(settings, raws)}
    defined = [all(math.isfinite(column[i]) for column in table.values()) for i in range(len(names))]
    kept = [name for name, fine in zip(names, defined, strict=True) if fine]
    table = {name: [v for v, fine in zip(column, defined, strict=True) if fine] for name, column in table.items()}
    for one in sums:
        table[one.name] = one(table)
    table = {name: column for name, column in table.items() if len(set(column)) > 1}
    accuracies = lookup(truth, kept)
    shares = {
        setting.name: [s for s, fine in zip(slope_shares(setting, raws), defined, strict=True) if fine]
        for setting in settings
        if "flatness" in setting.score.metrics
    }
    loss = next((column for name, column in table.items() if name.startswith("-loss")), None)
    rows = []
    for name, column in table.items():
        given = None
        if loss is not None and name in {setting.name for setting in settings}:
            given = partial_kendall(column, accuracies, loss, seed=seed, normal=True, resamples=resamples)
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
    return rows, len(names) - len(kept)


def table_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table for the eye, its head first."""
    head = ("score", "tau [95 %]", "rho", "better half", "top k", "nDCG", "best pick", "gap", "tau given loss", "slope")
    table = [head]
    for row in rows:
        r = row.ranking
        table.append(
            (
                *(row.name, str(r.tau), f"{r.rho.value:.3f}", f"{r.tau_better_half.value:.3f}"),
                *(f"{r.precision:.2f}", f"{r.ndcg:.3f}", f"{r.best_accuracy:.2f}", f"{r.gap:.2f}"),
                "-" if row.given_loss is None else str(row.given_loss),
                "-" if row.slope_share is None else f"{row.slope_share:.2%}",
            )
        )
    return table


def remarks(rows: Sequence[Row], left_out: int) -> Iterator[str]:
    """What is to be said under the table."""
    ranking = rows[0].ranking
    yield f"\n{ranking.count} architectures" + (
        f"; {left_out} without a finite score are left out." if left_out else "."
    )
    yield f"top k: share of the best {ranking.k}; slope: median share of the slope term in Eq. 4."
    weak = [row.name for row in rows if row.slope_share is not None and row.slope_share < LEAST_SLOPE]
    if weak:
        yield f"The slope term decides less than {LEAST_SLOPE:.0%} of the score in: {'; '.join(weak)}."


def _references(names: Sequence[str]) -> dict[str, list[float]]:
    """The two that need no training: what every score is shown beside."""
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
            *("tau_given_loss", "tau_given_loss_low", "tau_given_loss_high", "median_slope_share"),
        ]
    ]
    for row in rows:
        r, given = row.ranking, row.given_loss
        lines.append(
            [
                *(row.name, r.count, r.tau.value, r.tau.low, r.tau.high, r.rho.value, r.rho.low, r.rho.high),
                *(r.tau_better_half.value, r.k, r.precision, r.ndcg, r.best_accuracy, r.gap),
                *(("", "", "") if given is None else (given.value, given.low, given.high)),
                "" if row.slope_share is None else row.slope_share,
            ]
        )
    return lines


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _plain(setting: Setting) -> dict[str, Any]:
    score = {item.name: getattr(setting.score, item.name) for item in fields(setting.score)}
    counts = {name: getattr(setting, name) for name in ("images", "recalibration_images")}
    counts = {name: count for name, count in counts.items() if count is not None}
    return {"name": setting.name, **score, "sigmas": list(setting.score.sigmas), **counts}
