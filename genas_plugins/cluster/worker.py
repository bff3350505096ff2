"""A process that has loaded a supernet and its images, and scores candidates for the trials of its machine.

Trials (:mod:`genas_plugins.cluster.trial`) start it, find it at a Unix socket that only their user can open, and talk
to it in lines of JSON. It ends when for some time nobody has asked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genas_plugins._messages import message_of

__all__ = ["main", "serve"]

_LONGEST = 1_000_000
_REQUEST_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; for :mod:`genas_plugins.cluster.slots`, which knows what to pass."""
    parser = argparse.ArgumentParser(description="Score candidates for the trials of this machine.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--idle", type=float, required=True)
    parser.add_argument("--device")
    parser.add_argument("--data-root")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    measure: Callable[[], Any] = lambda: _Scoring(options)  # noqa: E731
    return serve(Path(options.socket), measure, options.idle)


def serve(path: Path, load: Callable[[], Any], idle: float) -> int:
    """Answer at a socket until nobody has asked for ``idle`` seconds.

    Args:
        path: Of the socket; one that is there already is a dead worker's.
        load: Called once; what it returns has an ``identity`` and is called with each request.
        idle: Seconds.

    Returns:
        Exit status: 0 after idleness or when told to end, 1 if it could not load, or failed.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        # Before what takes long: who has started us waits for the socket.
        server.listen()
        try:
            scoring = load()
            hello = {"hello": scoring.identity, "pid": os.getpid()}
        # Of any kind: who asks is told, and this process ends.
        except Exception as error:
            scoring, hello = None, {"refused": message_of(error)}
        server.settimeout(idle)
        try:
            while True:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    return 0
                with connection:
                    connection.settimeout(_REQUEST_SECONDS)
                    status = _answer(connection, hello, scoring)
                if status is not None:
                    return status
        finally:
            path.unlink(missing_ok=True)


def _answer(connection: socket.socket, hello: dict[str, Any], scoring: Any) -> int | None:
    """Serve one trial; an exit status ends the worker."""
    # A trial may be killed while it waits, which is nothing to us.
    with contextlib.suppress(OSError), connection.makefile("rb") as stream:

        def send(line: dict[str, Any]) -> None:
            connection.sendall(json.dumps(line).encode() + b"\n")

        # Who tells it to end does not listen.
        with contextlib.suppress(OSError):
            send(hello)
        if scoring is None:
            return 1
        line = stream.readline(_LONGEST)
        if not line:
            return None
        request = json.loads(line)
        if request.get("end"):
            return 0
        try:
            answer = scoring(request)
        except Exception as error:
            send({"broken": message_of(error)})
            return 1
        send({"answer": answer})
    return None


class _Scoring:
    """A scorer of a run, and what it has scored: nothing is measured twice for a trial that comes back."""

    def __init__(self, options: argparse.Namespace) -> None:
        from genas_plugins.cluster.identity import identity
        from genas_plugins.experiment.run_folder import TrainedRun
        from genas_plugins.experiment.scorer import Scorer

        run = TrainedRun.open(options.run)
        self.identity = identity(run)
        named = {"device": options.device, "data_root": options.data_root, "threads": options.threads}
        self._scorer = Scorer.from_run(run, **named)
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        from genas_plugins.scoring import MeasurementError

        space = self._scorer.paths.search_space
        try:
            # A tuner that knows nothing of us proposes a sample, by NNI's labels.
            sample = request["sample"]
            candidate = space.from_json(request["candidate"]) if "candidate" in request else space.from_sample(sample)
        except (KeyError, TypeError, ValueError) as error:
            return _failed(f"This is no architecture of the space: {message_of(error)}", 0.0)
        key = json.dumps(space.to_json(candidate))
        if key not in self._known:
            start = time.perf_counter()
            try:
                measured = {"status": "ok", **self._scorer.measure(candidate).to_dict()}
            except MeasurementError as error:
                measured = _failed(str(error), 0.0)
            self._known[key] = {**measured, "seconds": round(time.perf_counter() - start, 4)}
        return self._known[key]


def _failed(reason: str, seconds: float) -> dict[str, Any]:
    return {"status": "failed", "score": None, "reason": reason, "seconds": seconds}


if __name__ == "__main__":
    status = main()
    # At once: what PyTorch does at its exit takes seconds on a busy machine, and there is nothing to save.
    sys.stderr.flush()
    os._exit(status)
