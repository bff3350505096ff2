"""Workers of a machine and the trials that ask them, with a manager of NNI that this test plays."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from genas_plugins._version import __version__
from genas_plugins.cluster import trial
from genas_plugins.cluster.channel import ChannelError, trial_channel
from genas_plugins.cluster.choices import nni_search_space
from genas_plugins.cluster.identity import StrangeWorkerError, check_identity
from genas_plugins.cluster.slots import LostWorkerError, RefusedError, Slot, slots_folder, take_slot
from genas_plugins.cluster.worker import serve
from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace

CANDIDATE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


class Counting:
    """Scores by the number of requests; what it does on the way is in the request."""

    def __init__(self):
        self.identity, self.count = {"version": __version__}, 0

    def __call__(self, request):
        self.count += 1
        time.sleep(request.get("seconds", 0))
        if request.get("raises"):
            raise ValueError(request["raises"])
        return {"status": "ok", "score": float(self.count), "shares": {}}


@pytest.fixture
def slot(tmp_path):
    return Slot(tmp_path, 0)


def serving(slot, load=Counting, idle=20.0):
    thread = threading.Thread(target=serve, args=(slot.socket, load, idle), daemon=True)
    thread.start()
    while not slot.socket.exists():
        time.sleep(0.01)
    time.sleep(0.05)
    return thread


def test_a_worker_answers_trial_after_trial_and_ends_when_told(slot):
    thread = serving(slot)
    answers = [slot.ask({}, (), 10)[0]["score"] for _ in range(3)]
    assert answers == [1.0, 2.0, 3.0]
    slot.end()
    thread.join(5)
    assert not thread.is_alive() and not slot.socket.exists()


def test_a_worker_ends_when_nobody_asks(slot):
    thread = serving(slot, idle=0.2)
    thread.join(5)
    assert not thread.is_alive() and not slot.socket.exists()


def test_a_worker_that_cannot_load_says_why_and_ends(slot):
    def load():
        raise FileNotFoundError("There are no images in /data/images.")

    thread = serving(slot, load)
    with pytest.raises(RefusedError, match="no images in /data/images"):
        slot.ask({}, (), 10)
    thread.join(5)
    assert not thread.is_alive()


def test_a_worker_that_fails_is_lost_with_its_reason(slot):
    thread = serving(slot)
    with pytest.raises(LostWorkerError, match="CUDA out of memory"):
        slot.ask({"raises": "CUDA out of memory"}, (), 10)
    thread.join(5)
    assert not thread.is_alive()


def test_a_trial_that_dies_while_it_waits_harms_nobody(slot):
    serving(slot)
    with socket.socket(socket.AF_UNIX) as dying:
        dying.connect(str(slot.socket))
    with socket.socket(socket.AF_UNIX) as dying:
        dying.connect(str(slot.socket))
        dying.sendall(b'{"seconds": 0.1}\n')
    assert slot.ask({}, (), 10)[0]["score"] == 2.0
    slot.end()


WORKER = """
import sys, time
from genas_plugins.cluster.worker import serve
class Slow:
    identity = {}
    def __call__(self, request):
        time.sleep(60)
path = sys.argv[sys.argv.index("--socket") + 1]
from pathlib import Path
serve(Path(path), Slow, 30)
"""


@pytest.fixture
def slow_worker(slot, monkeypatch):
    """Workers that never answer, as processes."""
    started = []
    begin = subprocess.Popen

    def popen(command, **named):
        started.append(begin([sys.executable, "-c", WORKER, *command[3:]], **named))
        return started[-1]

    monkeypatch.setattr("genas_plugins.cluster.slots.subprocess.Popen", popen)
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_worker_that_hangs_is_ended_after_the_time_that_was_said(slot, slow_worker):
    with pytest.raises(LostWorkerError, match=r"scoring took longer than 0\.5 s, so the worker was ended"):
        slot.ask({}, (), 0.5)
    assert slow_worker[0].wait(5) == -signal.SIGKILL


def test_a_worker_that_is_killed_is_lost_and_the_next_trial_starts_another(slot, slow_worker):
    def kill():
        while not slow_worker:
            time.sleep(0.01)
        time.sleep(0.5)
        slow_worker[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(LostWorkerError, match="the worker ended"):
        slot.ask({}, (), 20)
    killer.join()
    with pytest.raises(LostWorkerError, match="took longer"):
        slot.ask({}, (), 0.5)
    assert len(slow_worker) == 2


def test_as_many_trials_score_as_there_are_places(tmp_path):
    inside, most, lock = [], [], threading.Lock()

    def one():
        with take_slot(tmp_path, 2) as slot:
            with lock:
                inside.append(slot.number)
                most.append(sorted(inside))
            time.sleep(0.05)
            with lock:
                inside.remove(slot.number)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(map(len, most)) == 2 and all(len(set(taken)) == len(taken) for taken in most)


@pytest.fixture
def short(monkeypatch):
    """A folder of temporary files whose name leaves room for a socket's, as that of pytest may not."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield folder


def test_the_folder_of_workers_is_for_its_user_alone(tmp_path, short):
    run = tmp_path / "run"
    run.mkdir()
    (run / "supernet.ckpt").write_bytes(b"weights")
    folder = slots_folder(run)
    assert str(folder.parent.parent) == short
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert slots_folder(run) == folder != slots_folder(run, "1")
    (run / "supernet.ckpt").write_bytes(b"other weights")
    assert slots_folder(run) != folder
    folder.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="must be a folder that only you can open"):
        slots_folder(run)
    with pytest.raises(FileNotFoundError, match="no supernet"):
        slots_folder(tmp_path / "nothing")


class Manager(ThreadingHTTPServer):
    """NNI's side of the channel, as its trial keeper has it."""

    def __init__(self, parameter):
        self.metrics, self.commands, self.parameter = [], [], parameter
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/channel"


class Handler(BaseHTTPRequestHandler):
    slow = True

    def do_GET(self):
        if self.server.parameter is None:
            return self.send_error(410)
        if Handler.slow:
            # NNI has no command within its minute: the trial asks again.
            Handler.slow = False
            return self.send_error(408)
        body = json.dumps({"type": "parameter", "parameter": json.dumps(self.server.parameter)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        command = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.commands.append(command["type"])
        if command["type"] == "metric":
            metric = json.loads(command["metric"])
            self.server.metrics.append({**metric, "value": json.loads(metric["value"])})
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def options(tmp_path, short):
    (tmp_path / "supernet.ckpt").write_bytes(b"weights")
    parser = argparse.ArgumentParser()
    trial.add(parser)
    return parser.parse_args(["--run", str(tmp_path)])


@pytest.fixture
def asked(monkeypatch):
    """What workers are asked, who answer what this test says."""
    asked = []

    def ask(self, request, options, timeout):
        asked.append(request)
        if isinstance(asked[0], Exception):
            raise asked[0]
        sigmas, losses = [0.001, 0.002], [1.25, 2.5]
        answer = {"status": "ok", "score": 0.1, "shares": {}, "sigmas": sigmas, "losses": losses, "flatness": 0.1}
        return answer, {"version": "9"}

    monkeypatch.setattr(Slot, "ask", ask)
    return asked


def channel_of(manager):
    return trial_channel({"NNI_TRIAL_COMMAND_CHANNEL": manager.url, "NNI_TRIAL_JOB_ID": "aBcDe"})


def test_a_trial_reports_the_losses_at_the_sigmas_and_the_score(options, asked):
    manager = Manager({"parameter_id": 4, "parameters": {"architecture": CANDIDATE}})
    assert trial.measure(options, channel_of(manager)) == 0
    assert asked == [{"candidate": CANDIDATE}]
    assert manager.commands[0] == "request_parameter"
    kinds = [(metric["type"], metric["sequence"], metric["value"]["default"]) for metric in manager.metrics]
    assert kinds == [("PERIODICAL", 0, 1.25), ("PERIODICAL", 1, 2.5), ("FINAL", 0, 0.1)]
    assert {(metric["parameter_id"], metric["trial_job_id"]) for metric in manager.metrics} == {(4, "aBcDe")}
    told = json.loads(manager.metrics[-1]["value"]["told"])
    assert told["answer"]["losses"] == [1.25, 2.5]
    assert told["by"] == {"version": "9", "host": socket.gethostname()}


def test_a_tuner_of_nnis_own_proposes_choices_by_label(options, asked):
    sample = {"cell/0_1": "none", "cell/0_2": "skip_connect"}
    manager = Manager({"parameter_id": 0, "parameters": sample})
    trial.measure(options, channel_of(manager))
    assert asked == [{"sample": sample}]


@pytest.mark.parametrize(("error", "kind"), [(LostWorkerError, "lost"), (RefusedError, "refused")])
def test_a_trial_without_a_score_says_why_and_fails(options, asked, capsys, error, kind):
    asked.append(error("the worker ended (signal 9)"))
    manager = Manager({"parameter_id": 0, "parameters": {"architecture": CANDIDATE}})
    assert trial.measure(options, channel_of(manager)) == 1
    assert [metric["type"] for metric in manager.metrics] == ["PERIODICAL"]
    assert json.loads(manager.metrics[0]["value"]["told"])[kind] == "the worker ended (signal 9)"
    assert "no score: the worker ended (signal 9)" in capsys.readouterr().err


def test_an_experiment_that_has_ended_and_one_that_is_none(options):
    with pytest.raises(ChannelError, match="The experiment has ended"):
        channel_of(Manager(None)).parameters()
    with pytest.raises(ChannelError, match=r"which starts it: see docs/cluster\.md"):
        trial_channel({})
    with pytest.raises(ChannelError, match="are no choices by label"):
        channel_of(Manager({"parameter_id": 0, "parameters": [1]})).parameters()


def test_older_services_read_a_file_and_containers_print(tmp_path, capsys):
    (tmp_path / "parameter.cfg").write_text('{"parameter_id": 3, "parameters": {"a": 1}}')
    environment = {"NNI_PLATFORM": "local", "NNI_SYS_DIR": str(tmp_path), "NNI_TRIAL_JOB_ID": "x"}
    channel = trial_channel(environment)
    assert channel.parameters() == {"a": 1}
    channel.report("FINAL", {"default": 0.5})
    content = (tmp_path / ".nni" / "metrics").read_bytes()
    # NNI's reader: two letters, six digits that count the bytes behind them.
    assert content[:2] == b"ME" and int(content[2:8]) == len(content[8:])
    metric = json.loads(content[8:])
    assert metric["parameter_id"] == 3 and json.loads(metric["value"]) == {"default": 0.5}
    channel = trial_channel({**environment, "NNI_PLATFORM": "frameworkcontroller"})
    channel.parameters()
    channel.report("FINAL", {"default": 0.5})
    printed = capsys.readouterr().out
    assert printed.startswith("NNISDK_MEb'") and json.loads(printed[11:-2])["type"] == "FINAL"


@pytest.mark.parametrize("space", [DartsSearchSpace(), NasBench201SearchSpace()], ids=["darts", "nasbench201"])
def test_nnis_search_space_is_the_space(space):
    choices = nni_search_space(space)
    size = np.prod([float(len(choice["_value"])) for choice in choices.values()])
    # Counted by the space itself, which knows nothing of the choices.
    assert size == pytest.approx(space.size)
    rng = np.random.default_rng(0)
    sample = {label: choice["_value"][rng.integers(len(choice["_value"]))] for label, choice in choices.items()}
    assert space.to_sample(space.from_sample(json.loads(json.dumps(sample)))) == sample


def test_a_worker_with_another_version_or_weights_is_refused():
    own = {"version": "1.0", "weights": "a" * 64}
    check_identity(own, {**own, "host": "here"}, "worker-1")
    with pytest.raises(StrangeWorkerError, match=r"worker-1.* has genas-plugins '0.9', this search has '1.0': install"):
        check_identity(own, {**own, "version": "0.9"}, "worker-1")
    with pytest.raises(StrangeWorkerError, match=r"has a supernet .*: copy the run folder there anew"):
        check_identity(own, {**own, "weights": "b" * 64}, "worker-1")
    with pytest.raises(StrangeWorkerError, match="None"):
        check_identity(own, "no mapping", "worker-1")


def test_a_trial_starts_without_what_takes_time():
    code = (
        "import sys, genas_plugins.cluster.trial; print(sorted({'torch', 'numpy', 'nni', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
