"""A search whose candidates NNI's engine spreads over processes and machines, driven by this process."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from nni.experiment import RunMode, launcher, rest
from nni.experiment.config import CustomAlgorithmConfig, ExperimentConfig, LocalConfig

from genas_plugins._messages import one_line
from genas_plugins.cluster.choices import nni_search_space
from genas_plugins.cluster.identity import identity
from genas_plugins.cluster.slots import end_workers, slots_folder
from genas_plugins.experiment import config
from genas_plugins.experiment.run_folder import HISTORY_FILE, TrainedRun
from genas_plugins.files import write_text
from genas_plugins.search import Dispatch, Evolution, History, JsonLines, Record
from genas_plugins.search.dispatch import ANSWERS_FILE
from nni_strategy.nnictl import keep_to_loopback
from nni_strategy.tuner import Advisor

__all__ = ["NniService", "experiment_of"]

FOLDER = "nni"
"""In a run folder: what NNI writes."""
_MANAGER_FILE = "manager.json"
_FIRST_PORT, _PORTS = 8080, 200
# A trial that waits for a worker costs nothing, and NNI looks twice a second who has ended.
_TRIALS_A_WORKER = 2
_PATIENCE = 30.0


class NniService:
    """Runs a search as :func:`genas_plugins.search.run_search` does, with its arguments, on NNI's engine.

    Args:
        folder: The run folder, whose supernet is trained.
        service: ``"local"``, or an experiment file of NNI, of which training service, trial command and concurrency
            are used.
        workers: Processes that score, of the local service.
        tries: See :class:`genas_plugins.search.Dispatch`.
    """

    def __init__(self, folder: Path, service: str, workers: int, tries: int = 3) -> None:
        self.folder = folder.resolve()
        self.service = service
        self.workers = workers
        self.tries = tries

    def __call__(
        self,
        evolution: Evolution[Any],
        measure: Any,
        *,
        history: History,
        on_record: Callable[[Record], None] | None = None,
        race: Any = None,
        shared: Any = None,
        in_flight: Any = None,
        on_generation: Callable[[list[Record]], None] | None = None,
    ) -> list[Record]:
        """Search; ``measure``, ``race``, ``shared`` and ``in_flight`` are not used.

        Raises:
            ConfigError: NNI refuses the experiment file.
            RuntimeError: NNI's manager has ended, or a worker is not this search's.
            HistoryError: See :class:`genas_plugins.search.Dispatch`.
        """
        # It begins when training has ended.
        (self.folder / HISTORY_FILE).touch()
        run = TrainedRun.open(self.folder)
        answers: JsonLines[Any] = JsonLines(self.folder / ANSWERS_FILE)
        dispatch = Dispatch(
            evolution,
            history=history,
            answers=answers,
            tries=self.tries,
            on_record=on_record,
            on_generation=on_generation,
        )
        self.spread(dispatch, run.supernet.search_space, identity(run))
        (self.folder / ANSWERS_FILE).unlink(missing_ok=True)
        return dispatch.records

    def spread(self, dispatch: Dispatch[Any], space: Any, identity: Mapping[str, Any]) -> None:
        """Have all candidates of a dispatch measured.

        Args:
            dispatch: The candidates.
            space: Of the candidates.
            identity: What workers must have in common with the search.

        Raises:
            ConfigError: NNI refuses the experiment file.
            RuntimeError: NNI's manager has ended, or a worker is not this search's.
            OSError: The history cannot be written to.
        """
        if dispatch.finished:
            return
        settings = experiment_of(self.folder, self.service, self.workers, nni_search_space(space))
        with _manager(self.folder / FOLDER, settings) as url:
            advisor = Advisor(dispatch, space, identity, url)
            advisor.on_finished = advisor.leave
            try:
                advisor.run()
                if not dispatch.finished:
                    raise ConnectionAbortedError("NNI has ended the experiment")
            finally:
                advisor.leave()
                with contextlib.suppress(OSError):
                    end_workers(slots_folder(self.folder, os.environ.get("CUDA_VISIBLE_DEVICES")))


def experiment_of(folder: Path, service: str, workers: int, search_space: Any) -> ExperimentConfig:
    """The experiment of NNI for a run.

    Args:
        folder: Run folder.
        service: See :class:`NniService`.
        workers: See :class:`NniService`.
        search_space: What NNI's page shows.

    Raises:
        ConfigError: NNI refuses the file.
    """
    if service == "local":
        gpus = torch.cuda.device_count()
        here = -(-workers // gpus) if gpus else workers
        command = [sys.executable, "-m", "genas_plugins.cluster.trial", "--run", str(folder), "--workers", str(here)]
        settings = ExperimentConfig(
            trial_command=shlex.join(command),
            # Where a relative data.root is seen from.
            trial_code_directory=str(Path.cwd()),
            trial_concurrency=_TRIALS_A_WORKER * workers,
            training_service=LocalConfig(),
        )
        if gpus:
            settings.trial_gpu_number = 1
            settings.training_service.use_active_gpu = True
            settings.training_service.max_trial_number_per_gpu = _TRIALS_A_WORKER * here
    else:
        try:
            settings = ExperimentConfig.load(service)
        except (OSError, AttributeError, TypeError, ValueError, AssertionError) as error:
            raise config.ConfigError(f"search.service: {service} is no experiment file of NNI: {error}.") from error
    settings.experiment_name = folder.name
    settings.search_space, settings.search_space_file = search_space, None
    settings.experiment_working_directory = str(folder / FOLDER)
    # NNI wants one, and does not start it: this process is the tuner.
    settings.tuner = CustomAlgorithmConfig(class_name="nni_strategy.tuner.GenasTuner", code_directory=str(folder))
    try:
        return settings.canonical_copy()
    except (AssertionError, TypeError, ValueError) as error:
        raise config.ConfigError(f"search.service: NNI refuses {service}: {error}.") from error


@contextlib.contextmanager
def _manager(folder: Path, settings: ExperimentConfig) -> Iterator[str]:
    """Run NNI's manager; yields the address of the tuner's channel."""
    _end_left_over(folder)
    identifier, port = f"genas{secrets.token_hex(3)}", _free_port()
    (folder / identifier / "log").mkdir(parents=True)
    url = f"ws://localhost:{port}/tuner"
    arguments = launcher.NniManagerArgs("create", identifier, settings, port, False, False, None, url)
    before = os.environ.get("NODE_OPTIONS")
    keep_to_loopback(os.environ)
    try:
        process = launcher._start_rest_server(arguments, RunMode.Detach)
    finally:
        if before is None:
            del os.environ["NODE_OPTIONS"]
        else:
            os.environ["NODE_OPTIONS"] = before
    try:
        write_text(folder / _MANAGER_FILE, json.dumps({"pid": process.pid, "port": port, "experiment": identifier}))
        _wait_for(process, port, folder / identifier / "log")
        rest.post(port, "/experiment", settings.json(), None)
        yield url
    except (ConnectionError, OSError) as error:
        # It ends when a training service cannot begin.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE if isinstance(error, ConnectionError) else 0.1)
        if process.poll() is None and not isinstance(error, ConnectionError):
            raise
        log = folder / identifier / "log" / "nnimanager.log"
        raise RuntimeError(
            f"NNI's manager has ended{_first_error(log)}; its log is {log}. Go on with --resume."
        ) from error
    finally:
        _end(process, port)
        (folder / _MANAGER_FILE).unlink(missing_ok=True)


def _first_error(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "] ERROR (" in line]
        # About a list of experiments in the user's home, which nothing needs.
        lines = [line for line in lines if "(experiments_manager)" not in line]
    except OSError:
        return ""
    return f" ({one_line(lines[0].partition('] ERROR ')[2], 300)})" if lines else ""


def _wait_for(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            rest.get(port, "/check-status", None)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.2)


def _end(process: subprocess.Popen[Any], port: int) -> None:
    with contextlib.suppress(OSError):
        rest.delete(port, "/experiment", None)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_left_over(folder: Path) -> None:
    """End the manager of a search that was killed."""
    try:
        left = json.loads((folder / _MANAGER_FILE).read_text(encoding="utf-8"))
        pid, experiment = int(left["pid"]), str(left["experiment"])
        # A number may have got to another process meanwhile.
        if experiment not in Path(f"/proc/{pid}/cmdline").read_text():
            return
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError, KeyError, TypeError):
        return


def _free_port() -> int:
    for port in range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError(f"No port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} is free for NNI's web page.")
