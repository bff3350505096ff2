"""What a logger is told of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from genas_plugins.experiment.generations import generation_figures
from genas_plugins.scoring import Flatness, Measurement, MeasurementError
from genas_plugins.search import Evolution, History, InFlight, Race, Record, run_search
from genas_plugins.search.racing import Finish
from genas_plugins.spaces import NasBench201SearchSpace


def record(index: int, score: float | None = None, generation: int = 3, **more: Any) -> Record:
    status = "failed" if score is None else "ok"
    return Record(
        **{"index": index, "generation": generation, "origin": "random", "status": status, "score": score} | more
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 50])
def test_figures_are_those_of_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    scores, shares = rng.random(count), rng.random(count)
    records = [
        record(number, float(score), shares={"slope": float(share)})
        for number, (score, share) in enumerate(zip(scores, shares, strict=True))
    ]
    figures = generation_figures(records, best=2.0)
    expected = {
        f"search/{name}": value
        for name, value in zip(
            ("first_quartile", "median", "third_quartile"), np.percentile(scores, (25, 50, 75)), strict=True
        )
    }
    expected |= {"search/mean": scores.mean(), "search/generation_best": scores.max(), "search/best": 2.0}
    expected |= {"search/slope_share": shares.mean(), "search/generation": 3}
    expected |= {"search/scored": count, "search/failed": 0, "search/dropped": 0}
    assert figures == pytest.approx(expected, rel=1e-12)


def test_what_has_no_score_on_all_images_does_not_count() -> None:
    dropped = {"status": "dropped", "estimate": 99.0, "standard_error": 0.1, "images": 100}
    records = [record(0, 1.0, shares={"angle": 1.0}), record(1, None, **dropped), record(2), record(3, 3.0)]
    figures = generation_figures(records, best=5.0)
    assert (figures["search/mean"], figures["search/generation_best"]) == (2.0, 3.0)
    assert [figures[f"search/{name}"] for name in ("scored", "failed", "dropped")] == [2, 1, 1]
    # The angle has no slope term.
    assert "search/slope_share" not in figures


@pytest.mark.parametrize("best", [None, 0.5])
def test_a_generation_without_any_score(best: float | None) -> None:
    figures = generation_figures([record(0), record(1)], best)
    assert figures.get("search/best") == best
    assert figures["search/failed"] == 2 and "search/mean" not in figures and "search/median" not in figures


SPACE = NasBench201SearchSpace()


def evolution() -> Evolution[Any]:
    return Evolution(SPACE, population=6, generations=3, parents=2, seed=1)


def measured(candidate: Any) -> Measurement:
    if candidate.operations.count("none") == 2:
        raise MeasurementError("two edges are missing")
    value = 1.0 + candidate.operations.count("nor_conv_3x3")
    return Measurement(value, {"flatness": 1.0, "slope": 0.25}, Flatness(value, (1.0, 1.0), (0.1, 0.2), 0.25, 0.5, 1.0))


class Dropping(Race[Any]):
    """A race in which every third candidate is dropped."""

    def __init__(self) -> None:
        super().__init__(lambda candidate: None, [100], 0.9, 2)

    def run(self, candidates: Sequence[Any], best: Sequence[Any], shared: Any = None) -> list[Finish]:
        finishes = []
        for number, candidate in enumerate(candidates):
            try:
                finish = Finish(measured(candidate), count=100)
            except MeasurementError as error:
                finish = Finish(reason=str(error), count=100)
            finish.error = 0.1 if number % 3 == 2 and finish.measurement is not None else None
            finishes.append(finish)
        return finishes


@pytest.mark.parametrize("ways", [{}, {"in_flight": InFlight(3)}, {"race": Dropping()}])
def test_a_search_tells_each_generation_once_when_it_is_scored(ways: dict[str, Any], tmp_path: Any) -> None:
    told: list[list[Record]] = []
    search = evolution()

    def generation(records: list[Record]) -> None:
        assert search.generation == len(told) + 1
        told.append(records)

    path = tmp_path / "history.jsonl"
    records = run_search(search, measured, history=History(path), on_generation=generation, **ways)
    assert [each.index for group in told for each in group] == [each.index for each in records] == list(range(18))
    assert [{each.generation for each in group} for group in told] == [{0}, {1}, {2}]
    figures = [generation_figures(group, 1.0) for group in told]
    assert all(sum(each[f"search/{name}"] for name in ("scored", "failed", "dropped")) == 6 for each in figures)
    # A search that is resumed in the middle of a generation tells those before it once more, as they were.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]))
    again: list[list[Record]] = []
    run_search(evolution(), measured, history=History(path), on_generation=again.append, **ways)
    for one, other in zip(again, told, strict=True):
        assert generation_figures(one, 1.0) == generation_figures(other, 1.0)
