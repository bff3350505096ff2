"""Real experiments of NNI: its manager, its training services, our trials and workers, as processes."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from nni.experiment.config import ExperimentConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "nni" / "cluster"
TRIAL = f"{sys.executable} -m genas_plugins.cluster.trial"
slow = pytest.mark.slow  # each starts NNI's manager, its tuner and two workers, which takes half a minute


@pytest.fixture
def environment(tmp_path):
    """Of commands that write nothing into anybody's home."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    own = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    own |= {"NNI_CONFIG_DIR": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield {**os.environ, **own, "PATH": path}
    for process in _processes(tmp_path):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _processes(folder):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and str(folder) in " ".join(process.cmdline()):
                found.append(process)
    return found


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def written(name, run, folder, changes=()):
    """A shipped file of NNI for a run, as its user would change it."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    text = text.replace("/data/genas/run", str(run)).replace("/data/genas/nni", str(folder / "nni"))
    settings = yaml.safe_load(text.replace("genas trial", TRIAL))
    settings |= dict(changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def asked(port, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/api/v1/nni{path}", timeout=10) as answer:
        return json.loads(answer.read())


def genas(*arguments, environment):
    command = [sys.executable, "-m", "genas_plugins", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=environment["HOME"]
    )


def wait_until_done(port, seconds=150):
    end = time.monotonic() + seconds
    while (status := asked(port, "/check-status"))["status"] != "DONE":
        assert status["status"] != "ERROR" and time.monotonic() < end, status
        time.sleep(0.5)


@slow
def test_nnictl_create_searches_as_one_process(trained, finished, folder_at, environment, tmp_path):
    port = _free_port()
    path = written("flatness_local", trained, tmp_path)
    done = genas("nnictl", "create", "--config", path, "--port", port, environment=environment)
    assert done.returncode == 0, done.stderr
    try:
        wait_until_done(port)
        folder_at(trained).assert_same(finished)
        # As the web page shows them: a trial a candidate, the losses at the sigmas before the score.
        jobs, metrics = asked(port, "/trial-jobs"), asked(port, "/metric-data")
        assert [job["status"] for job in jobs] == ["SUCCEEDED"] * 10
        values = {"FINAL": [], "PERIODICAL": []}
        for metric in metrics:
            values[metric["type"]].append(json.loads(json.loads(metric["data"]))["default"])
        records = folder_at(trained).records
        assert sorted(values["FINAL"]) == sorted(record["score"] for record in records)
        assert sorted(values["PERIODICAL"]) == sorted(loss for record in records for loss in record["losses"])
        # The server is on the loopback address alone.
        addresses = {connection.laddr.ip for connection in psutil.net_connections() if connection.laddr.port == port}
        assert addresses == {"127.0.0.1"}
    finally:
        stopped = genas("nnictl", "stop", "--all", environment=environment)
    assert stopped.returncode == 0, stopped.stderr


@slow
def test_nnictl_resume_goes_on_after_its_processes_were_killed(trained, finished, folder_at, environment, tmp_path):
    port = _free_port()
    path = written("flatness_local", trained, tmp_path)
    assert genas("nnictl", "create", "--config", path, "--port", port, environment=environment).returncode == 0
    end = time.monotonic() + 100
    while not folder_at(trained).records and time.monotonic() < end:
        time.sleep(0.05)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(tmp_path) in line and "nni_node" in line:
                process.kill()
    time.sleep(2)
    identifier = (tmp_path / "nni" / "_latest").resolve().name
    again = ("nnictl", "resume", identifier, "--port", port, "--experiment_dir", tmp_path / "nni")
    done = genas(*again, environment=environment)
    assert done.returncode == 0, done.stderr
    try:
        wait_until_done(port)
        folder_at(trained).assert_same(finished)
    finally:
        genas("nnictl", "stop", "--all", environment=environment)


@slow
def test_a_search_by_our_own_file_on_two_workers(finished, folder_at, environment, genas, tmp_path):
    command = ("search", "--config", genas.config, "--quiet", "--output", tmp_path / "run")
    command += ("--set", "search.service=local", "--set", "search.workers=2")
    done = globals()["genas"](*command, environment=environment)
    assert done.returncode == 0, done.stderr
    folder_at(tmp_path / "run").assert_same(finished)
    time.sleep(2)
    assert _processes(tmp_path) == []


@slow
def test_two_processes_train_and_the_first_has_the_candidates_measured(folder_at, environment, genas, tmp_path):
    for name, service in (("shared", "null"), ("spread", "local")):
        command = ("search", "--config", genas.config, "--quiet", "--output", tmp_path / name)
        command += ("--set", "training.devices=2", "--set", f"search.service={service}")
        done = globals()["genas"](*command, environment=environment)
        assert done.returncode == 0, done.stderr
    folder_at(tmp_path / "spread").assert_same(folder_at(tmp_path / "shared"))


PYTHON = """
import sys
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni_strategy import ClusterGeNAS, FlatnessEvaluator, NasBench201Space

run, folder = sys.argv[1:]
settings = NasExperimentConfig("sequential", "simplified", experiment_working_directory=folder)
experiment = NasExperiment(NasBench201Space(), FlatnessEvaluator(run), ClusterGeNAS(workers=2), settings)
experiment.run()
print("best", [model.metrics.final for model in experiment.strategy.list_models(limit=5)])
"""


@slow
def test_nnis_python_searches_as_one_process(trained, finished, folder_at, environment, tmp_path):
    command = [sys.executable, "-c", PYTHON, trained, tmp_path / "nas"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder_at(trained).assert_same(finished)
    (best,) = (line.removeprefix("best ") for line in done.stdout.splitlines() if line.startswith("best "))
    assert json.loads(best) == [found["score"] for found in finished.winner["top"]]


@slow
def test_a_tuner_of_nnis_own(trained, environment, tmp_path):
    port = _free_port()
    space = genas("trial", "--run", trained, "--search-space", environment=environment)
    assert space.returncode == 0, space.stderr
    changes = {"searchSpace": json.loads(space.stdout), "maxTrialNumber": 4}
    changes["tuner"] = {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}
    path = written("flatness_local", trained, tmp_path, changes.items())
    assert genas("nnictl", "create", "--config", path, "--port", port, environment=environment).returncode == 0
    try:
        wait_until_done(port)
        assert [job["status"] for job in asked(port, "/trial-jobs")] == ["SUCCEEDED"] * 4
        assert (trained / "history.jsonl").read_text() == ""
    finally:
        genas("nnictl", "stop", "--all", environment=environment)


@pytest.fixture
def ssh(environment, tmp_path):
    """A server on this machine, with a key of its own: host, port, user and key of the other machine."""
    server, keygen = (shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in ("sshd", "ssh-keygen"))
    if server is None or keygen is None:
        pytest.skip("there is no sshd, or no ssh-keygen, on this machine")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    port = _free_port()
    # NNI upgrades itself on the other machine, unless pip has no index.
    names = ("HOME", "TMPDIR", "PYTHONPATH", "OMP_NUM_THREADS")
    told = " ".join(f"{name}={environment[name]}" for name in names) + " PIP_NO_INDEX=1"
    lines = [f"ListenAddress 127.0.0.1:{port}", f"HostKey {tmp_path / 'host'}", "PidFile none", "StrictModes no"]
    lines += [f"AuthorizedKeysFile {tmp_path / 'authorized'}", "PasswordAuthentication no", "UsePAM no"]
    lines += ["PermitRootLogin prohibit-password", "Subsystem sftp internal-sftp", f"SetEnv {told}"]
    (tmp_path / "sshd.conf").write_text("\n".join(lines) + "\n")
    log = (tmp_path / "sshd.log").open("wb")
    process = subprocess.Popen([server, "-D", "-e", "-f", tmp_path / "sshd.conf"], stderr=log)
    yield {"host": "127.0.0.1", "port": port, "user": getpass.getuser(), "sshKeyFile": str(tmp_path / "user")}
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    log.close()


@slow
def test_a_search_over_ssh(trained, finished, folder_at, environment, ssh, tmp_path):
    machine = {**ssh, "pythonPath": str(Path(sys.executable).parent)}
    changes = {"trainingService": {"platform": "remote", "machineList": [machine]}, "trialConcurrency": 2}
    changes["trialCommand"] = f"{TRIAL} --run {trained} --idle 5"
    (tmp_path / "code").mkdir()
    # An empty folder NNI refuses.
    (tmp_path / "code" / "readme.txt").write_text("nothing")
    changes["trialCodeDirectory"] = str(tmp_path / "code")
    path = written("flatness_remote", trained, tmp_path, changes.items())
    command = ("search", "--resume", "--quiet", "--output", trained, "--config", trained / "config.yaml")
    done = genas(*command, "--set", f"search.service={path}", environment=environment)
    assert done.returncode == 0, done.stderr + (tmp_path / "sshd.log").read_text()
    folder_at(trained).assert_same(finished)
    assert "Accepted publickey" in (tmp_path / "sshd.log").read_text()


@slow
def test_whoever_is_killed_the_search_is_the_same(environment, tmp_path):
    script = ROOT / "benchmarks" / "cluster_faults.py"
    command = [sys.executable, script, "--rounds", "4", "--output", tmp_path / "faults"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 rounds the same; processes left: []" in done.stdout


def test_the_web_server_listens_on_the_loopback_address(tmp_path):
    nni_node = pytest.importorskip("nni_node")
    from nni_strategy.nnictl import keep_to_loopback

    script = (
        "const s = require('http').createServer(); s.listen(0, () => { console.log(s.address().address); s.close() })"
    )
    node = Path(nni_node.__path__[0]) / "node"
    plain = {key: value for key, value in os.environ.items() if key not in ("NODE_OPTIONS", "GENAS_NNI_HOST")}
    kept = dict(plain)
    keep_to_loopback(kept)
    keep_to_loopback(kept)
    found = [
        subprocess.run([node, "-e", script], env=given, capture_output=True, text=True, check=True).stdout.strip()
        for given in (plain, kept, {**kept, "GENAS_NNI_HOST": "127.0.0.2"})
    ]
    assert found[0] in ("::", "0.0.0.0") and found[1:] == ["127.0.0.1", "127.0.0.2"]


@pytest.mark.parametrize("name", ["flatness_local", "flatness_remote", "flatness_kubernetes"])
def test_a_shipped_file_is_one_that_nni_accepts(name, tmp_path, monkeypatch):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_text("a key")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ExperimentConfig.load(CONFIGS / f"{name}.yaml")
    settings.validate()
    assert settings.tuner.class_name == "nni_strategy.tuner.GenasTuner"
    run = settings.tuner.class_args["run"]
    # In its pods NNI mounts the volume elsewhere.
    there = "/tmp/mount/run" if name == "flatness_kubernetes" else run
    assert f"--run {there}" in settings.trial_command and Path(run).is_absolute()
    assert not str(settings.experiment_working_directory).startswith(str(Path.home()))


def test_the_registered_name_is_that_of_the_tuner():
    from nni.tools.package_utils import AlgoMeta

    meta = AlgoMeta.load(yaml.safe_load((CONFIGS / "algorithm.yaml").read_text()) | {"nniVersion": "3.0"})
    assert (meta.name, meta.algo_type, meta.class_name) == ("GeNAS", "tuner", "nni_strategy.tuner.GenasTuner")


def test_the_manifests_follow_the_schema_of_kubernetes():
    validate = pytest.importorskip("kubernetes_validate", reason="it brings the published schemas: pip install it")
    manifests = list(yaml.safe_load_all((CONFIGS / "kubernetes_manager.yaml").read_text()))
    assert [manifest["kind"] for manifest in manifests][-1] == "Job" and len(manifests) == 6
    for manifest in manifests:
        validate.validate(manifest, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**manifests[-1], "spec": {"templates": {}}}, validate.latest_version(), strict=True)
    # The pieces name one another.
    experiment = yaml.safe_load((CONFIGS / "flatness_kubernetes.yaml").read_text())
    service = next(manifest for manifest in manifests if manifest["kind"] == "Service")
    assert experiment["nniManagerIp"] == service["metadata"]["name"]
    container = manifests[-1]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == experiment["trainingService"]["taskRoles"][0]["dockerImage"]


@slow
def test_the_commands_of_the_image_in_a_fresh_environment(tmp_path):
    """Takes minutes and gigabytes: an installation from the package index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "runs")
    shutil.copytree(ROOT, tmp_path / "genas", ignore=ignored)
    lines = (CONFIGS / "Dockerfile").read_text().splitlines()
    commands = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ") and "apt-get" not in line]
    assert len(commands) == 3 and commands[0].startswith("pip install")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    for command in commands:
        subprocess.run(["sh", "-c", command], cwd=tmp_path / "genas", env=environment, check=True)
    asked_there = subprocess.run(
        ["genas", "trial", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "--workers N" in asked_there.stdout
