"""Neighbourhoods inside NNI and from the command: searches, random search, scores and evaluators."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import RawFormatModelSpace
from torch import nn

from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201 import NasBench201Architecture
from genas_plugins.neighbourhood import Neighbourhood, distance
from genas_plugins.scoring import CombinedScore, NeighbourhoodScore
from nni_strategy import CombinedEvaluator, GeNAS, NARandomSearch, NasBench201Space
from nni_strategy.samples import SampleSpace

NEAR = ("score.neighbourhood={aggregate: median, size: 3}", "score.metric=flatness")


@pytest.fixture(scope="module")
def searched(genas: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("near") / "run"
    done = genas.search(folder, *NEAR).wait()
    assert done.status == 0, done.stderr
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_search_goes_by_neighbourhoods(searched: Path) -> None:
    records, single = lines(searched / "history.jsonl"), lines(searched / "neighbours.jsonl")
    own = {line["candidate"]: line["score"] for line in single}
    assert len(own) == len(single) == sum(record["neighbourhood"]["new"] for record in records)
    # What scores one architecture scores the same in a search.
    scorer = Scorer.from_run(searched, device="cpu")
    wanted = NeighbourhoodScore(scorer.score, "median", size=3)
    space, near = scorer.paths.search_space, scorer.neighbours(wanted)
    for record in records:
        middle = NasBench201Architecture.from_string(record["candidate"])
        around = near.around(middle)
        assert [distance(space, middle, one) for one in around] == [1, 1, 1]
        assert record["neighbourhood"]["own"] == own[record["candidate"]] == record["flatness"]
        assert record["score"] == np.median([own[str(one)] for one in (middle, *around)])
    for line in single[:2]:
        assert scorer.measure(NasBench201Architecture.from_string(line["candidate"])).score == line["score"]
    first = NasBench201Architecture.from_string(records[0]["candidate"])
    assert scorer.measure(first, wanted).score == records[0]["score"]


def test_a_search_that_was_cut_off_goes_on_with_what_was_measured(genas: Any, searched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(searched, folder)
    before = lines(folder / "history.jsonl")
    measured = (folder / "neighbours.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[:3]))
    (folder / "neighbours.jsonl").write_text("".join(measured[:14]))
    assert genas.search(folder, resume=True).wait().status == 0
    after = lines(folder / "history.jsonl")
    for one, other in zip(before, after, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [json.loads(line)["candidate"] for line in measured] == [
        line["candidate"] for line in lines(folder / "neighbours.jsonl")
    ]
    # Other weights are none that these were measured with.
    (folder / "history.jsonl").write_text("")
    stored = json.loads((folder / "run.json").read_text())
    stored["weights"]["supernet.ckpt"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(stored))
    (folder / "neighbours.jsonl").write_text("".join(measured[:3]))
    done = genas.search(folder, resume=True).wait()
    assert done.status == 1 and "is not the one that the candidates of this run were scored with" in done.stderr


def test_the_command_prints_and_draws_neighbours(genas: Any, searched: Path, tmp_path: Path) -> None:
    name = lines(searched / "history.jsonl")[0]["candidate"]
    done = genas("score", name, "--run", searched, "--neighbours")
    assert done.status == 0, done.stderr
    head, _, rest = done.stdout.partition("24 neighbours, 0 without a score, ")
    table = [line.split(None, 1) for line in rest.splitlines() if "~" in line]
    scores = [float(score) for score, _ in table]
    assert len(table) == 24 and scores == sorted(scores, reverse=True)
    own = float(next(line.split()[-1] for line in head.splitlines() if line.startswith("score")))
    told = {
        line.rsplit(None, 1)[0]: float(line.rsplit(None, 1)[1]) for line in rest.splitlines() if " with its own" in line
    }
    assert told["mean with its own"] == pytest.approx(np.mean([own, *scores]), rel=1e-4)
    assert told["min with its own"] == pytest.approx(min(own, *scores), rel=1e-4)
    done = genas("score", name, "--run", searched, "--neighbours", "5")
    assert "5 neighbours" in done.stdout
    picture = tmp_path / "near.png"
    done = genas("plot", "neighbourhood", name, picture, "--run", searched)
    assert (done.status, done.stdout.strip()) == (0, str(picture)), done.stderr
    done = genas("plot", "neighbourhood", name, picture)
    assert done.status == 1 and "--run is missing" in done.stderr


def test_an_evaluator_reports_the_neighbourhood(searched: Path) -> None:
    record = lines(searched / "history.jsonl")[0]
    first = NasBench201Architecture.from_string(record["candidate"])
    evaluator = CombinedEvaluator(searched, "flatness", neighbourhood={"aggregate": "median", "size": 3}, device="cpu")
    assert evaluator.evaluate(first) == record["score"]
    assert CombinedEvaluator(searched, "flatness", device="cpu").evaluate(first) == record["flatness"]
    with pytest.raises(ValueError, match="Unknown aggregate 'most'"):
        CombinedEvaluator(searched, "flatness", neighbourhood={"aggregate": "most"})


@pytest.mark.parametrize("hub", [False, True])
def test_random_search_spends_its_evaluations_on_neighbourhoods(hub: bool, digits_evaluator: Any) -> None:
    strategy = NARandomSearch(
        evaluations=40, size=4, aggregate="min", metric="accuracy", recalibration_images=32, device="cpu", batch=3
    )
    space = NasBench201(4, 1, 10) if hub else NasBench201Space(10, 4, 1)
    strategy.initialize(RawFormatModelSpace(space, digits_evaluator), SequentialExecutionEngine())
    strategy.run()
    assert {record.origin for record in strategy.records} == {"random"}
    spent = sum(record.neighbourhood["new"] for record in strategy.records)
    assert 40 - 5 < spent <= 40 and strategy.evolution.spent == spent
    assert len(strategy.records) >= 8
    best = max(strategy.records, key=lambda record: record.score)
    (model,) = strategy.list_models(limit=1)
    assert model.metric == best.score <= best.neighbourhood["own"]
    # A state that is read again knows what was measured.
    other = NARandomSearch(evaluations=40, size=4, aggregate="min", metric="accuracy", recalibration_images=32)
    again = NasBench201(4, 1, 10) if hub else NasBench201Space(10, 4, 1)
    other.initialize(RawFormatModelSpace(again, digits_evaluator), SequentialExecutionEngine())
    other.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
    assert other._alone.keys() == strategy._alone.keys() and len(other._alone) == spent


def test_neighbours_of_a_space_of_ones_own_change_one_label() -> None:
    class Own(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.first = LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Identity()], label="first")
            self.second = LayerChoice([nn.Identity(), nn.Conv2d(3, 3, 1)], label="second")

    space = SampleSpace(Own())
    middle = space.from_json({"first": 0, "second": 1})
    near = [space.to_json(one) for one in Neighbourhood(space, middle)]
    assert sorted(map(str, near)) == [
        "{'first': 0, 'second': 0}",
        "{'first': 1, 'second': 1}",
        "{'first': 2, 'second': 1}",
    ]
    assert Neighbourhood(space, middle, 2).size == 3 * 2 - 1
    assert distance(space, middle, space.from_json({"first": 2, "second": 0})) == 2
    # NNI's own names of the benchmark's edges: six with four other operations.
    hub = SampleSpace(NasBench201(4, 1, 10))
    assert Neighbourhood(hub, hub.sample(np.random.default_rng(0))).size == 24


def test_a_race_of_neighbourhoods_is_refused() -> None:
    near = NeighbourhoodScore(CombinedScore())
    with pytest.raises(ValueError, match="leave out racing, or the neighbourhood"):
        GeNAS(score=near, racing=0.999)
