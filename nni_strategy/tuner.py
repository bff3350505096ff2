"""GeNAS as a tuner of NNI: its engine spreads the candidates of a run over processes and machines."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni.runtime.command_channel.websocket.connection import WsConnection
from nni.runtime.env_vars import dispatcher_env_vars
from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.runtime.tuner_command_channel import CommandType

from genas_plugins._messages import message_of, shown
from genas_plugins.cluster.trial import CANDIDATE

# What takes time is imported when the connection is there, for which NNI waits ten seconds.
if TYPE_CHECKING:
    from genas_plugins.search import Dispatch

__all__ = ["Advisor", "GenasTuner"]

_logger = logging.getLogger(__name__)


class Advisor(MsgDispatcherBase):
    """Hands the candidates of a dispatch to NNI's manager, and takes what its trials report.

    It is an advisor, NNI's name of a tuner that speaks to the manager itself: so what trials send is read as plain JSON
    (NNI's own dispatcher unpickles it), and what a trial reports counts for the candidate that it was given, which is
    not always the one that NNI says.

    Args:
        dispatch: The candidates.
        space: Of the candidates.
        identity: What workers must have in common with the search, see :mod:`genas_plugins.cluster.identity`.
        url: Of the manager's channel; ``None`` for that of the process that NNI has started.
        on_finished: Called when all candidates are answered.
    """

    patience = 5.0
    """Seconds after the end of a trial in which its last report may come."""

    def __init__(
        self,
        dispatch: Dispatch[Any] | None,
        space: Any,
        identity: Mapping[str, Any],
        url: str | None = None,
        on_finished: Callable[[], None] | None = None,
    ) -> None:
        self.dispatch = dispatch
        self.space = space
        self.identity = identity
        self.on_finished = on_finished
        self._asked_for = 0
        self._next = 0
        # What was proposed, by NNI's number; which of it no trial has answered or lost; and which trial has which.
        self._indices: dict[int, int] = {}
        self._open: set[int] = set()
        self._held: dict[str, int] = {}
        self._ended: deque[tuple[float, Any, str]] = deque()
        self._running = 0
        self._finished = False
        self._url = url or dispatcher_env_vars.NNI_TUNER_COMMAND_CHANNEL
        super().__init__(url)
        # NNI's client would connect again, also to the manager of another experiment that has the port by then.
        client = self._channel._channel
        if client._conn is not None:
            client._receive_command = client._conn.receive

    def run(self) -> None:
        """Take part in the experiment until NNI, or :meth:`leave`, ends it.

        Raises:
            StrangeWorkerError: A worker is not this search's.
            OSError: The history cannot be written to.
            ConnectionError: The manager does not answer any more.
        """
        try:
            while not self.stopping:
                command, data = self._received()
                if command in (None, CommandType.Terminate):
                    break
                # In one thread, in the order in which they came; and never by NNI's own reader, which unpickles.
                self.process_command(command, json.loads(data) if data else None)
        except Exception as error:
            self.report_error(message_of(error))
            raise
        finally:
            self.stopping = True

    def leave(self) -> None:
        """End :meth:`run` after the command that is being worked on, and the connection."""
        self.stopping = True
        self._channel.disconnect()

    def handle_initialize(self, data: Any) -> None:
        """Ready; the search space of the experiment is that of the run, whatever the file says."""
        self.send(CommandType.Initialized, "")
        self._end_if_finished()

    def handle_update_search_space(self, data: Any) -> None:
        """As :meth:`handle_initialize`."""

    def handle_import_data(self, data: Any) -> None:
        """Nothing: what was measured is in the history."""

    def handle_request_trial_jobs(self, data: int) -> None:
        """Propose to as many trials; those for which nothing is left of the generation get theirs later."""
        self._asked_for += data
        self._propose()

    def handle_add_customized_trial(self, data: Any) -> None:
        """Take note of trials of a killed experiment, which NNI starts again."""
        for parameter in data if isinstance(data, list) else ():
            self._running += 1
            identifier = int(parameter["parameter_id"])
            self._next = max(self._next, identifier + 1)
            with contextlib.suppress(KeyError, TypeError, ValueError):
                index = self.dispatch.find(self._candidate(parameter["parameters"]))
                if index is not None:
                    self._indices[identifier] = index
                    self._open.add(identifier)

    def handle_report_metric_data(self, data: dict[str, Any]) -> None:
        """Take what a trial has measured, or why it could not."""
        identifier = data.get("parameter_id")
        self._held[str(data.get("trial_job_id"))] = identifier
        index = self._indices.get(identifier)
        told = _told(data.get("value"))
        if index is None or told is None:
            return
        if "refused" in told:
            raise RuntimeError(f"The worker on {shown((told.get('by') or {}).get('host'), 80)}: {told['refused']}")
        if "lost" in told:
            self._lose(identifier, str(told["lost"]))
            self._propose()
            return
        self._open.discard(identifier)
        from genas_plugins.cluster.identity import check_identity

        by = told.get("by") or {}
        check_identity(self.identity, by, str(by.get("host")))
        answer = told.get("answer")
        self.dispatch.answer(index, answer if isinstance(answer, dict) else {})
        self._propose()
        self._end_if_finished()

    def handle_trial_end(self, data: dict[str, Any]) -> None:
        """Have measured again what a trial did not answer."""
        self._running -= 1
        job = str(data.get("trial_job_id"))
        # NNI starts trials with what was proposed next, not with what it says that it was proposed for them.
        form = json.loads(data["hyper_params"]).get("parameter_id")
        identifier = self._held.pop(job, form)
        if identifier in self._open:
            # The manager may send its last report behind its end.
            reason = f"its trial {job} ended as {data.get('event')} without an answer"
            self._ended.append((time.monotonic() + self.patience, identifier, reason))

    def handle_ping(self, data: Any) -> None:
        """Every now and then: have measured again what trials that have ended did not answer."""
        while self._ended and self._ended[0][0] <= time.monotonic():
            _, identifier, reason = self._ended.popleft()
            self._lose(identifier, reason)
        if self._running <= 0 and not self._ended:
            # So one whose end was taken for that of another is not waited for.
            self._open.clear()
            for index in self.dispatch.out:
                self.dispatch.lost(index, "its trial ended without an answer")
        self._propose()
        self._end_if_finished()

    def _received(self) -> tuple[CommandType | None, Any]:
        try:
            return self._channel._receive()
        except WsConnection.ConnectionClosed as error:
            self._channel._channel._closing = True
            raise ConnectionError("NNI's manager has ended; its log is in the experiment's folder.") from error

    def _lose(self, identifier: Any, reason: str) -> None:
        if identifier in self._open:
            self._open.discard(identifier)
            self.dispatch.lost(self._indices[identifier], reason)

    def _propose(self) -> None:
        while self._asked_for and (task := self.dispatch.take()) is not None:
            self._asked_for -= 1
            self._running += 1
            identifier, self._next = self._next, self._next + 1
            self._indices[identifier] = task.index
            self._open.add(identifier)
            record = {
                "parameter_id": identifier,
                "parameter_source": "algorithm",
                "parameters": self._parameters(task.candidate),
                "parameter_index": 0,
            }
            self.send(CommandType.NewTrialJob, json.dumps(record))

    def _parameters(self, candidate: Any) -> dict[str, Any]:
        """NNI's choices by label, which its web page shows, where these say it all."""
        with contextlib.suppress(ValueError):
            sample = self.space.to_sample(self.space.from_json(candidate))
            if self.space.to_json(self.space.from_sample(json.loads(json.dumps(sample)))) == candidate:
                return sample
        return {CANDIDATE: candidate}

    def _candidate(self, parameters: Mapping[str, Any]) -> Any:
        if CANDIDATE in parameters:
            return parameters[CANDIDATE]
        return self.space.to_json(self.space.from_sample(parameters))

    def _end_if_finished(self) -> None:
        if self._finished or not self.dispatch.finished:
            return
        self._finished = True
        if self.on_finished is not None:
            self.on_finished()
        self._tell_manager()

    def _tell_manager(self) -> None:
        """Let NNI count the experiment as done: no tuner can say so but by the number of trials."""
        base = self._url.replace("ws://", "http://", 1).removesuffix("/tuner") + "/api/v1/nni/experiment"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(base, timeout=30) as answer:
                profile = json.loads(answer.read())
            profile["params"]["maxTrialNumber"] = 1
            body, headers = json.dumps(profile).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{base}?update_type=MAX_TRIAL_NUM", body, headers, method="PUT")
            opener.open(request, timeout=30).close()
        except (OSError, ValueError, KeyError) as error:
            _logger.warning("NNI's manager does not hear that the search has ended: %s", error)


class GenasTuner(Advisor):
    """The search of a run folder, whose supernet is trained, as a tuner of an NNI experiment.

    It writes ``history.jsonl`` and, at the end, all that a search in one process leaves in the folder, with the same
    candidates and scores. A stopped or killed experiment goes on where it was, by ``nnictl resume`` or as a new one.

    Args:
        run: The folder, as an absolute path: NNI starts tuners in a folder of its own.
        tries: How often a candidate is given to a trial before it has failed.
        data_root: Where the run's images are, if not where they were; a relative path of the run is seen from NNI's
            folder.

    Raises:
        ValueError: ``run`` is relative.
        FileNotFoundError: There is no trained supernet, or there are no images.
        FolderInUseError: Another search writes to the folder.
        ConfigError: The folder's settings or weights are not those of its history.
    """

    def __init__(self, run: str, tries: int = 3, data_root: str | None = None) -> None:
        super().__init__(None, None, {})
        try:
            if not Path(run).is_absolute():
                raise ValueError(
                    f"run must be an absolute path, got {shown(run)}: NNI starts tuners in its own folder."
                )
            from genas_plugins.cluster.search import ClusterRun

            self._run = ClusterRun(Path(run), tries, patience=60.0, data_root=data_root)
        except Exception as error:
            self.report_error(message_of(error))
            # The manager writes it down before the connection breaks.
            time.sleep(1)
            raise
        self.dispatch, self.space, self.identity = self._run.dispatch, self._run.space, self._run.identity
        self.on_finished = self._run.finish

    def run(self) -> None:
        """See :meth:`Advisor.run`."""
        try:
            super().run()
        finally:
            self._run.close()


def _told(value: Any) -> dict[str, Any] | None:
    """What a trial of ours says beside the figures for NNI's page; ``None`` for an intermediate result."""
    try:
        told = json.loads(value) if isinstance(value, str) else value
        told = json.loads(told["told"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None
