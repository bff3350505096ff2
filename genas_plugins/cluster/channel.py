"""What a trial says to NNI 3.0, and hears from it, in the standard library alone.

A trial starts for each candidate, and importing NNI takes a second of a core. What is done here is what
``nni.runtime.trial_command_channel`` does: HTTP between processes of NNI's manager or its trial keeper and trials of
the training services ``local`` and ``remote``; a file where these are older; lines on standard output in the
containers of the others. All of it is JSON.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from genas_plugins._messages import shown

__all__ = ["Channel", "ChannelError", "trial_channel"]

_TIMEOUT, _GONE = 408, 410


class ChannelError(RuntimeError):
    """NNI does not answer, or has ended the experiment."""


class Channel(Protocol):
    """One trial's connection."""

    def parameters(self) -> dict[str, Any]:
        """What the tuner proposes to this trial."""

    def report(self, kind: Literal["PERIODICAL", "FINAL"], value: Mapping[str, Any], sequence: int = 0) -> None:
        """Report an intermediate or the final result; its ``default`` is what NNI draws and its tuners go by."""


def trial_channel(environment: Mapping[str, str]) -> Channel:
    """The channel of the trial that a process is.

    Args:
        environment: Variables that NNI has set.

    Raises:
        ChannelError: It has set none.
    """
    if url := environment.get("NNI_TRIAL_COMMAND_CHANNEL"):
        return _Http(url, environment.get("NNI_TRIAL_JOB_ID", ""))
    if "NNI_PLATFORM" in environment and "NNI_SYS_DIR" in environment:
        return _Files(environment)
    raise ChannelError(
        "genas trial is the trial command of an experiment of NNI, which starts it: see docs/cluster.md. To score one "
        "architecture, use genas score."
    )


class _Trial:
    def __init__(self, job: str) -> None:
        self._job = job
        self._parameter: Any = None

    def _read(self, text: str) -> dict[str, Any]:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"NNI's parameters are not JSON: {shown(text, 200)}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("parameters"), dict):
            raise ChannelError(f"NNI's parameters are no choices by label: {shown(record, 200)}.")
        self._parameter = record.get("parameter_id")
        return record["parameters"]

    def _metric(self, kind: str, value: Mapping[str, Any], sequence: int) -> str:
        metric = {"parameter_id": self._parameter, "trial_job_id": self._job, "type": kind, "sequence": sequence}
        return json.dumps({**metric, "value": json.dumps(dict(value), allow_nan=False)})


class _Http(_Trial):
    def __init__(self, url: str, job: str) -> None:
        super().__init__(job)
        self._url = url
        # A proxy of the machine has no business between processes of an experiment.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def parameters(self) -> dict[str, Any]:
        self._put({"type": "request_parameter"})
        while True:
            try:
                with self._opener.open(self._url, timeout=600) as answer:
                    command = json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code == _TIMEOUT:
                    continue
                if error.code == _GONE:
                    raise ChannelError("The experiment has ended.") from error
                raise ChannelError(f"NNI answers {error.code} at {self._url}.") from error
            except (OSError, ValueError) as error:
                raise ChannelError(f"NNI does not answer at {self._url}: {error}.") from error
            return self._read(command.get("parameter", "") if isinstance(command, dict) else "")

    def report(self, kind: Literal["PERIODICAL", "FINAL"], value: Mapping[str, Any], sequence: int = 0) -> None:
        self._put({"type": "metric", "metric": self._metric(kind, value, sequence)})

    def _put(self, command: Mapping[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, json.dumps(command).encode(), headers, method="PUT")
        try:
            self._opener.open(request, timeout=60).close()
        except OSError as error:
            raise ChannelError(f"NNI does not answer at {self._url}: {error}.") from error


class _Files(_Trial):
    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(environment.get("NNI_TRIAL_JOB_ID", ""))
        self._folder = Path(environment["NNI_SYS_DIR"])
        reused = environment.get("REUSE_MODE") in ("true", "True")
        self._prints = environment["NNI_PLATFORM"] != "local" or reused

    def parameters(self) -> dict[str, Any]:
        path = self._folder / "parameter.cfg"
        while not (path.is_file() and path.stat().st_size):
            time.sleep(0.5)
        return self._read(path.read_text(encoding="utf-8"))

    def report(self, kind: Literal["PERIODICAL", "FINAL"], value: Mapping[str, Any], sequence: int = 0) -> None:
        metric = self._metric(kind, value, sequence)
        if self._prints:
            # Read by NNI's trial runner.
            print(f"NNISDK_MEb'{metric}'", flush=True, file=sys.stdout)
            return
        line = metric.encode() + b"\n"
        folder = self._folder / ".nni"
        folder.mkdir(exist_ok=True)
        with (folder / "metrics").open("ab") as file:
            file.write(b"ME%06d" % len(line) + line)
