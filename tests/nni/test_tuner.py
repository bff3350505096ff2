"""GeNAS as a tuner, against a manager that behaves as NNI 3.0's does, its bad habits included."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path

import cloudpickle
import nni
import pytest
import torch
from nni.runtime.tuner_command_channel import CommandType

from genas_plugins.cluster.identity import StrangeWorkerError
from genas_plugins.experiment.config import ConfigError, parse
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import Measurement
from genas_plugins.search import Dispatch, Evolution, run_search
from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace
from nni_strategy import ClusterGeNAS, DartsSpace, FlatnessEvaluator, NasBench201Space
from nni_strategy import tuner as tuner_module
from nni_strategy.service import NniService
from nni_strategy.tuner import Advisor, GenasTuner

SETTINGS = {"population": 10, "generations": 4, "parents": 3, "mutants": 4, "crossovers": 4, "seed": 3}
IDENTITY = {"version": "1", "weights": "a"}
URL = "ws://_unittest_/tuner"


def score(candidate):
    return sum(2.0**-number for number, name in enumerate(candidate.operations) if name == "nor_conv_3x3")


class Manager:
    """Requests as many trials as may run, and hands what was proposed to whichever trial asks first."""

    def __init__(self, advisor, concurrency, rng, measure, death=0.0, silence=0.0):
        self.advisor, self.rng, self.measure = advisor, rng, measure
        self.concurrency, self.death, self.silence = concurrency, death, silence
        self.parameters, self.waiting = deque(), deque()
        self.trials, self.count, self.errors = {}, 0, []
        self.messages = deque([(CommandType.Initialize, {}), (CommandType.RequestTrialJobs, concurrency)])
        advisor._channel = self

    # The channel of the tuner.

    def _send(self, kind, content):
        if kind is CommandType.NewTrialJob:
            self.waiting.append(json.loads(content))
        elif kind is CommandType.Error:
            self.errors.append(content)

    def _receive(self):
        for _ in range(1000):
            if self.messages:
                kind, data = self.messages.popleft()
                return kind, json.dumps(data)
            if self.advisor.dispatch.finished:
                return CommandType.Terminate, ""
            self.step()
        raise AssertionError("nothing happens any more: a dead-lock")

    def disconnect(self):
        pass

    # Its trials.

    def step(self):
        while self.waiting and len(self.trials) < self.concurrency:
            form = self.waiting.popleft()
            self.parameters.append(form)
            self.count += 1
            self.trials[f"trial{self.count}"] = form
        if not self.trials:
            self.messages.append((CommandType.Ping, None))
            return
        job = self.rng.choice(sorted(self.trials))
        form = self.trials.pop(job)
        event, reported = "SUCCEEDED", len(self.messages)
        # A trial that dies before it asks leaves its parameters to the next.
        if self.rng.random() < self.death / 2:
            event = "FAILED"
        else:
            record = self.parameters.popleft()
            if self.rng.random() < self.death:
                event = "USER_CANCELED"
            elif self.rng.random() >= self.silence:
                self.report(job, record["parameter_id"], self.measure(record["parameters"]))
        end = {"trial_job_id": job, "event": event, "hyper_params": json.dumps(form)}
        # What a trial reports is written down before it is passed on, and may come behind its end.
        place = self.rng.randrange(reported, len(self.messages) + 1)
        self.messages.insert(place, (CommandType.TrialEnd, end))
        self.messages.append((CommandType.RequestTrialJobs, 1))

    def report(self, job, identifier, told, kind="FINAL"):
        for number in range(2):
            value = json.dumps({"default": 1.0, "sigma": 0.1})
            self.messages.append((CommandType.ReportMetricData, metric(job, identifier, "PERIODICAL", value, number)))
        value = json.dumps({"default": 1.0, "told": json.dumps(told)})
        self.messages.append((CommandType.ReportMetricData, metric(job, identifier, kind, value)))


def metric(job, identifier, kind, value, sequence=0):
    return {"trial_job_id": job, "parameter_id": identifier, "type": kind, "sequence": sequence, "value": value}


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    monkeypatch.setattr(Advisor, "_tell_manager", lambda self: None)
    # This manager has no clock.
    monkeypatch.setattr(Advisor, "patience", 0.0)


def answer(parameters):
    candidate = NasBench201SearchSpace().from_sample(parameters)
    return {"answer": {"status": "ok", "score": score(candidate), "shares": {}}, "by": {**IDENTITY, "host": "worker-1"}}


def searched(concurrency, seed, measure=answer, tries=3, **faults):
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS), tries=tries)
    advisor = Advisor(dispatch, NasBench201SearchSpace(), IDENTITY, URL)
    manager = Manager(advisor, concurrency, random.Random(seed), measure, **faults)
    advisor.run()
    return dispatch.records, manager


@pytest.fixture(scope="module")
def in_process():
    evolution = Evolution(NasBench201SearchSpace(), **SETTINGS)
    records = run_search(evolution, lambda candidate: Measurement(score(candidate)))
    return [(record.index, record.generation, record.candidate, record.score) for record in records]


def told(records):
    return [(record.index, record.generation, record.candidate, record.score) for record in records]


@pytest.mark.parametrize("concurrency", [1, 2, 7, 25])
def test_the_search_is_that_of_one_process_whatever_the_trials(concurrency, in_process):
    records, manager = searched(concurrency, seed=concurrency)
    assert told(records) == in_process
    assert manager.count == len(in_process) == 40


@pytest.mark.parametrize("seed", range(8))
def test_trials_that_die_before_or_after_they_ask_lose_nothing(seed, in_process):
    records, manager = searched(5, seed, tries=50, death=0.4)
    assert told(records) == in_process
    assert manager.count > 40


@pytest.mark.parametrize("seed", range(3))
def test_trials_that_end_well_without_a_word_lose_nothing(seed, in_process):
    records, _ = searched(3, seed, tries=50, silence=0.4)
    assert told(records) == in_process


def test_a_candidate_that_kills_its_trials_has_failed_with_the_reason():
    def measure(parameters):
        if parameters["cell/0_1"] == "none":
            return {"lost": "the worker ended while it scored", "by": {"host": "worker-1"}}
        return answer(parameters)

    records, _ = searched(4, 0, measure)
    failed = [record for record in records if record.status == "failed"]
    assert [record.candidate.startswith("|none~0|") for record in records] == [record in failed for record in records]
    assert {record.reason for record in failed} == {
        "It was lost 3 times, at last because the worker ended while it scored."
    }


def test_a_worker_of_another_search_ends_it_in_a_sentence():
    def measure(parameters):
        return {**answer(parameters), "by": {"version": "0", "weights": "a", "host": "worker-2"}}

    with pytest.raises(StrangeWorkerError, match=r"worker-2.* has genas-plugins '0', this search has '1'"):
        searched(2, 0, measure)


def test_a_worker_that_cannot_open_the_run_ends_the_search_in_a_sentence():
    def measure(parameters):
        return {"refused": "There are no images in data/cifar10.", "by": {"host": "worker-2"}}

    with pytest.raises(RuntimeError, match=r"worker on 'worker-2': There are no images in data/cifar10\."):
        searched(2, 0, measure)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("where", ["value", "told", "metric"])
def test_nothing_that_a_trial_sends_is_unpickled(where, tmp_path):
    mark = tmp_path / "executed"
    bomb = {"__nni_obj__": base64.b64encode(cloudpickle.dumps(Bomb(mark))).decode()}
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS))
    advisor = Advisor(dispatch, NasBench201SearchSpace(), IDENTITY, URL)
    manager = Manager(advisor, 1, random.Random(0), answer)
    value = {"value": bomb, "told": {"told": json.dumps({"answer": bomb, "by": IDENTITY})}, "metric": {}}[where]
    told = metric("trial1", 0, "FINAL", json.dumps(value))
    manager.messages.append((CommandType.ReportMetricData, {**told, **(bomb if where == "metric" else {})}))
    advisor.run()
    assert dispatch.finished and not mark.exists()
    # NNI's own reader, which its own dispatcher uses, does it.
    nni.load(json.dumps(bomb))
    assert mark.exists()


def test_trials_of_a_killed_experiment_that_nni_starts_again_are_taken_up(in_process):
    dispatch = Dispatch(Evolution(NasBench201SearchSpace(), **SETTINGS))
    advisor = Advisor(dispatch, NasBench201SearchSpace(), IDENTITY, URL)
    manager = Manager(advisor, 3, random.Random(0), answer)
    sample = NasBench201SearchSpace().to_sample
    first = Evolution(NasBench201SearchSpace(), **SETTINGS).ask()
    # Of the first generation the third and fifth, and one of another search.
    stranger = dict.fromkeys(sample(first[0].candidate), "none")
    resumed = [
        {"parameter_id": number, "parameters": parameters}
        for number, parameters in ((2, sample(first[2].candidate)), (4, sample(first[4].candidate)), (9, stranger))
    ]
    manager.messages.insert(1, (CommandType.AddCustomizedTrialJob, resumed))
    manager.messages.insert(1, (CommandType.ImportData, [{"parameter": {}, "value": "1"}]))
    manager.waiting.extend(resumed)
    advisor.run()
    assert told(dispatch.records) == in_process
    # Those two were not proposed once more.
    assert manager.count == 40 + 1


def test_choices_by_label_where_these_say_it_all():
    space = DartsSearchSpace()
    advisor = Advisor(Dispatch(Evolution(space, population=30, generations=1)), space, IDENTITY, URL)
    while (task := advisor.dispatch.take()) is not None:
        parameters = json.loads(json.dumps(advisor._parameters(task.candidate)))
        assert advisor._candidate(parameters) == task.candidate
        assert parameters.keys() == space.choices.keys() or parameters == {"architecture": task.candidate}


@pytest.fixture
def tuner_of(monkeypatch):
    """A tuner as NNI's process builds it, without its connection."""
    monkeypatch.setattr(tuner_module, "dispatcher_env_vars", type("Variables", (), {"NNI_TUNER_COMMAND_CHANNEL": URL}))
    init = tuner_module.MsgDispatcherBase.__init__
    monkeypatch.setattr(tuner_module.MsgDispatcherBase, "__init__", lambda self, url: init(self, URL))
    monkeypatch.setattr(tuner_module.time, "sleep", lambda seconds: None)
    return GenasTuner


def test_a_run_searched_by_trials_ends_as_one_searched_in_one_process(trained, finished, folder_at, tuner_of, genas):
    tuner = tuner_of(str(trained))
    scorer = Scorer.from_run(trained)

    def measure(parameters):
        candidate = scorer.paths.search_space.from_sample(parameters)
        told = {"status": "ok", **scorer.measure(candidate).to_dict()}
        return json.loads(json.dumps({"answer": told, "by": {**tuner.identity, "host": "worker-1"}}))

    manager = Manager(tuner, 4, random.Random(1), measure, death=0.2)
    tuner.run()
    folder_at(trained).assert_same(finished)
    assert not (trained / "answers.jsonl").exists() and manager.errors == []
    # The folder is free, and a new experiment finds nothing left to do.
    again = tuner_of(str(trained))
    manager = Manager(again, 4, random.Random(1), measure)
    again.run()
    assert manager.count == 0


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: None, ValueError, "run must be an absolute path"),
        (lambda folder: (folder / "supernet.ckpt").unlink(), FileNotFoundError, r"no supernet\.ckpt"),
        (lambda folder: (folder / "config.yaml").write_text("seed: 9"), ConfigError, "is not what the run began with"),
        # What is written there meets a full disk.
        (lambda folder: (folder / ".writable").symlink_to("/dev/full"), OSError, r"\(No space left.*\): make room"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(trained, tuner_of, monkeypatch, spoil, error, message):
    spoil(trained)
    told = []
    monkeypatch.setattr(Advisor, "report_error", lambda self, sentence: told.append(sentence))
    with pytest.raises(error, match=message):
        tuner_of("run" if error is ValueError else str(trained))
    assert len(told) == 1


def experiment_on(folder, space, tmp_path, strategy):
    from nni.nas.experiment import NasExperiment
    from nni.nas.experiment.config import NasExperimentConfig

    settings = NasExperimentConfig("sequential", "simplified", experiment_working_directory=str(tmp_path / "nni"))
    return NasExperiment(space, FlatnessEvaluator(str(folder)), strategy, settings)


def test_a_multi_trial_strategy_searches_a_trained_supernet(
    trained, finished, folder_at, tmp_path, monkeypatch, nothing_in_the_home_folder
):
    def spread(self, dispatch, space, identity):
        # Without NNI's manager, which the slow tests start.
        scorer = Scorer.from_run(self.folder)
        while (task := dispatch.take()) is not None:
            dispatch.answer(task.index, {"status": "ok", **scorer.measure(space.from_json(task.candidate)).to_dict()})

    monkeypatch.setattr(NniService, "spread", spread)
    strategy = ClusterGeNAS(workers=2)
    experiment = experiment_on(trained, NasBench201Space(), tmp_path, strategy)
    experiment.start()
    experiment.stop()
    folder_at(trained).assert_same(finished)
    best = list(strategy.list_models(limit=5))
    assert [model.metrics.final for model in best] == [found["score"] for found in finished.winner["top"]]
    # The best one's network with the supernet's weights.
    network = best[0].executable_model()
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    experiment = experiment_on(trained, DartsSpace(), tmp_path, ClusterGeNAS())
    with pytest.raises(ValueError, match="is one of NasBench201Space"):
        experiment.start()
    experiment.stop()


def test_a_history_of_other_weights_is_refused(trained, finished, tuner_of, monkeypatch):
    (trained / "history.jsonl").write_text((finished.path / "history.jsonl").read_text())
    stored = json.loads((finished.path / "run.json").read_text())
    stored["weights"]["supernet.ckpt"] = "0" * 64
    (trained / "run.json").write_text(json.dumps(stored))
    monkeypatch.setattr(Advisor, "report_error", lambda self, sentence: None)
    with pytest.raises(ConfigError, match="is not the one that the candidates of this run were scored with"):
        tuner_of(str(trained))


def test_a_tuner_connects_before_it_imports_what_takes_time(tmp_path):
    # NNI waits ten seconds for it.
    code = "import sys, nni_strategy.tuner; print({'torch', 'pytorch_lightning'} & set(sys.modules))"
    environment = {**os.environ, "SDK_PROCESS": "dispatcher", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    # It writes a log where it is.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "set()"


def test_a_race_on_a_service_is_refused():
    settings = {"search": {"racing": 0.999, "service": "local"}}
    with pytest.raises(ConfigError, match=r"racing compares candidates slice by slice.* 0\.999 and 'local'"):
        parse(settings)
    with pytest.raises(
        ConfigError, match=r"service must be local, or a YAML file of an experiment of NNI, got 'slurm'"
    ):
        parse({"search": {"service": "slurm"}})
    with pytest.raises(ConfigError, match="neighbourhood measures what candidates have in common once"):
        parse({"score": {"neighbourhood": {}}, "search": {"service": "local"}})
