"""Candidates for workers elsewhere: whoever answers when, the search is that of one process."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter

import pytest

from genas_plugins.scoring import Measurement, MeasurementError
from genas_plugins.search import Dispatch, Evolution, History, HistoryError, JsonLines, ParetoEvolution, run_search
from genas_plugins.spaces import NasBench201SearchSpace

SETTINGS = {"population": 12, "generations": 4, "parents": 3, "mutants": 5, "crossovers": 4, "seed": 7}


def convolutions(candidate):
    """A score that is known by counting, with a candidate now and then that has none."""
    score = sum(2.0**-number for number, name in enumerate(candidate.operations) if name == "nor_conv_3x3")
    if candidate.operations[0] == "skip_connect":
        raise MeasurementError("the loss is nan")
    return Measurement(score, {"accuracy": 1.0})


def answer_of(dispatch, task):
    """What a worker reports, through JSON as between machines."""
    try:
        measured = {"status": "ok", **convolutions(dispatch.evolution.space.from_json(task.candidate)).to_dict()}
    except MeasurementError as error:
        measured = {"status": "failed", "score": None, "reason": str(error)}
    return json.loads(json.dumps(measured))


def plain(records):
    return [{key: value for key, value in record.to_dict().items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def in_process():
    return plain(run_search(Evolution(NasBench201SearchSpace(), **SETTINGS), convolutions))


def simulate(dispatch, workers, rng, death=0.0, twice=0.0):
    """Let workers answer after random times, die, and answer again; returns how often each candidate was begun."""
    begun = Counter()
    events, idle, late = [], workers, []
    now = serial = 0
    while not dispatch.finished:
        while idle and (task := dispatch.take()) is not None:
            begun[task.index] += 1
            idle, serial = idle - 1, serial + 1
            heapq.heappush(events, (now + rng.expovariate(1), serial, task))
        # Nobody would ever answer: a dead-lock.
        assert events, "workers wait for a search that waits for them"
        now, _, task = heapq.heappop(events)
        idle += 1
        if rng.random() < death:
            dispatch.lost(task.index, "its machine was switched off")
            continue
        dispatch.answer(task.index, answer_of(dispatch, task))
        if late and rng.random() < twice:
            dispatch.answer(rng.choice(late).index, {"status": "ok", "score": 99.0, "shares": {}})
        late.append(task)
    return begun


@pytest.mark.parametrize("workers", [1, 2, 5, 12, 40])
def test_the_result_is_that_of_one_process_whatever_the_workers_and_their_order(workers, in_process):
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS))
    begun = simulate(dispatch, workers, random.Random(workers), twice=0.3)
    assert plain(dispatch.records) == in_process
    assert set(begun.values()) == {1}
    assert any(record["status"] == "failed" for record in in_process)


def test_candidates_of_dead_workers_are_measured_by_others(in_process):
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS), tries=30)
    begun = simulate(dispatch, 5, random.Random(0), death=0.4)
    assert plain(dispatch.records) == in_process
    assert max(begun.values()) > 2


def test_a_candidate_that_nobody_survives_has_failed_with_the_reason():
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS), tries=3)
    first = dispatch.take()
    for _ in range(3):
        dispatch.lost(first.index, "the worker ended (signal 9)")
        # Before those that nobody has had.
        again = dispatch.take() if dispatch.records == [] else None
        assert again in (first, None)
    assert [record.status for record in dispatch.records] == ["failed"]
    assert dispatch.records[0].reason == "It was lost 3 times, at last because the worker ended (signal 9)."
    # One that is lost when it is answered already changes nothing.
    dispatch.lost(first.index, "late")
    assert len(dispatch.records) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({}, "has the status None"),
        ({"status": "ok", "score": float("inf"), "shares": {}}, "has inf as score"),
        ({"status": "ok", "score": "__import__('os').system('true')", "shares": {}}, "as score"),
        ({"status": "dropped", "score": None}, "lacks estimate"),
        ({"status": "ok", "score": 1.0, "shares": {}, "losses": [1.0], "sigmas": []}, "as many losses as sigmas"),
    ],
)
def test_what_is_no_measurement_is_no_answer(line, told, caplog):
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS))
    task = dispatch.take()
    assert dispatch.answer(task.index, line) is False
    assert told in caplog.text
    assert dispatch.records == []
    assert dispatch.take() == task


def test_an_answer_says_nothing_of_which_candidate_it_is():
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS))
    task = dispatch.take()
    dispatch.answer(task.index, {"status": "ok", "score": 1.0, "shares": {}, "index": 5, "candidate": "another"})
    assert dispatch.records[0].index == 0
    assert dispatch.records[0].candidate == task.candidate


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_search_measures_no_answered_candidate_again(seed, tmp_path, in_process):
    rng = random.Random(seed)
    answered = Counter()
    for _ in range(100):
        # A new process: all that it knows is on disk.
        dispatch = Dispatch(
            Evolution(NasBench201SearchSpace(), **SETTINGS),
            history=History(tmp_path / "history.jsonl"),
            answers=JsonLines(tmp_path / "answers.jsonl"),
        )
        out = []
        for _ in range(rng.randrange(1, 12)):
            while len(out) < 4 and (task := dispatch.take()) is not None:
                assert answered[task.index] == 0
                out.append(task)
            if not out:
                break
            task = out.pop(rng.randrange(len(out)))
            answered[task.index] += 1
            dispatch.answer(task.index, answer_of(dispatch, task))
        if dispatch.finished:
            break
    assert plain(History(tmp_path / "history.jsonl").records) == in_process
    assert set(answered.values()) == {1} and len(answered) == len(in_process)


def test_the_history_of_another_search_is_refused(tmp_path):
    path = tmp_path / "history.jsonl"
    run_search(Evolution(NasBench201SearchSpace(), **SETTINGS), convolutions, history=History(path))
    with pytest.raises(HistoryError, match=r"Record 0 of .*line 1.* is not the candidate that this search proposes"):
        Dispatch(Evolution(NasBench201SearchSpace(), **{**SETTINGS, "seed": 8}), history=History(path))


def test_answers_of_another_search_are_not_used(tmp_path, in_process):
    answers = JsonLines(tmp_path / "answers.jsonl")
    answers.append({**in_process[3], "candidate": "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|", "score": 99.0})
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS), answers=answers)
    simulate(dispatch, 3, random.Random(0))
    assert plain(dispatch.records) == in_process


def test_several_objectives_are_those_of_one_process():
    def build():
        settings = {"population": 8, "generations": 3, "seed": 1}
        return ParetoEvolution(NasBench201SearchSpace(), ("accuracy", "score"), **settings)

    space = NasBench201SearchSpace()
    dispatch = Dispatch(evolution := build())

    def line(task):
        operations = space.from_json(task.candidate).operations
        return {
            "status": "ok",
            "score": float(operations.count("nor_conv_3x3")),
            "shares": {},
            "top1": operations.count("skip_connect") / 6,
        }

    order = random.Random(3)
    while not dispatch.finished:
        tasks = []
        while (task := dispatch.take()) is not None:
            tasks.append(task)
        order.shuffle(tasks)
        for task in tasks:
            dispatch.answer(task.index, line(task))
    front = {json.dumps(space.to_json(candidate)) for candidate, _ in evolution.front()}
    points = {json.dumps(record.candidate): (record.top1, record.score) for record in dispatch.records}
    brute = {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }
    assert front == brute


def test_a_thousand_workers(in_process):
    """One process is enough for them: candidates of five seconds are 200 messages a second."""
    settings = {"population": 3000, "generations": 2, "parents": 10, "mutants": 1000, "crossovers": 1000, "seed": 0}
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **settings))
    begun = simulate(dispatch, 1000, random.Random(0), death=0.01)
    records = dispatch.records
    assert [record.index for record in records] == list(range(6000)) and sum(begun.values()) > 6000
    assert plain(records) == plain(run_search(Evolution(NasBench201SearchSpace(), **settings), convolutions))
