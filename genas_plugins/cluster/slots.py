"""Places for workers on a machine: a trial takes one, starts its worker if there is none, and asks it.

A place is a locked file, a lock that ends with the trial that holds it, and a socket. All are in a folder of the
system's temporary files that only the user can open, one for each run, supernet and set of visible GPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genas_plugins._messages import one_line, shown
from genas_plugins._version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LostWorkerError", "RefusedError", "Slot", "end_workers", "slots_folder", "take_slot"]

_POLL = 0.05
_STARTS = 0.1
_LONGEST = 10_000_000
# The address of a Unix socket has 108 bytes at most, 104 on macOS.
_MOST_CHARACTERS = 70


class LostWorkerError(RuntimeError):
    """A worker ended or hung while it scored; another may succeed."""


class RefusedError(RuntimeError):
    """A worker cannot score anything of this run here, whatever is tried."""


def slots_folder(run: str | Path, visible: str | None = None) -> Path:
    """The folder of a run's workers on this machine, made if it is missing.

    Args:
        run: The run folder, or the file of its supernet.
        visible: ``CUDA_VISIBLE_DEVICES``: workers of other GPUs are others.

    Raises:
        FileNotFoundError: There is no such run.
        PermissionError: The folder is somebody else's.
    """
    path = Path(run).resolve()
    weights = path if path.is_file() else path / "supernet.ckpt"
    if not weights.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a search with a trained supernet: no {weights.name}.")
    seen = weights.stat()
    # A supernet that was trained anew has other workers.
    key = json.dumps([str(path), seen.st_size, seen.st_mtime_ns, visible, __version__])
    base = Path(tempfile.gettempdir()) / f"genas-{os.getuid()}"
    if len(str(base)) > _MOST_CHARACTERS:
        base = Path("/tmp") / base.name
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid() or base.stat().st_mode & 0o077:
        raise PermissionError(f"{base} must be a folder that only you can open: remove it, or set TMPDIR.")
    folder = base / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def take_slot(folder: Path, workers: int) -> Iterator[Slot]:
    """Wait for a place, and hold it.

    Args:
        folder: See :func:`slots_folder`.
        workers: Number of places.
    """
    if fcntl is None:
        raise RuntimeError("Workers share a machine by flock, which this platform does not have: use Linux or macOS.")
    slots = [Slot(folder, number) for number in range(workers)]
    # Every trial begins at another, so that they spread without waiting.
    first = os.getpid() % workers
    while True:
        for slot in slots[first:] + slots[:first]:
            descriptor = os.open(folder / f"{slot.number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            try:
                yield slot
            finally:
                os.close(descriptor)
            return
        time.sleep(_POLL)


@dataclass(frozen=True)
class Slot:
    """One place for a worker.

    Attributes:
        folder: See :func:`slots_folder`.
        number: From 0.
    """

    folder: Path
    number: int

    @property
    def socket(self) -> Path:
        """Where its worker is asked."""
        return self.folder / f"{self.number}.sock"

    @property
    def log(self) -> Path:
        """What its worker has said."""
        return self.folder / f"{self.number}.log"

    def ask(self, request: Mapping[str, Any], options: Sequence[str], timeout: float) -> tuple[dict[str, Any], Any]:
        """Have a candidate scored, by a new worker where there is none.

        Args:
            request: See :mod:`genas_plugins.cluster.worker`.
            options: Command line of a new worker, but for the socket.
            timeout: Seconds in which a worker must have loaded, and in which it must have scored.

        Returns:
            The answer, and the worker's identity.

        Raises:
            LostWorkerError: It ended, or took longer.
            RefusedError: It cannot load the run.
        """
        connection = self._connect()
        # One that ends just now, because nobody has asked it, hears nothing.
        if connection is not None and not self._is_there(connection):
            connection.close()
            connection = None
        connection = connection or self._started(options)
        pid = None
        try:
            with connection, connection.makefile("rb") as stream:
                connection.settimeout(timeout)
                hello = _line(stream)
                if hello is None:
                    raise LostWorkerError(f"the worker ended while it loaded the run{self._last_words()}")
                if "refused" in hello:
                    raise RefusedError(str(hello["refused"]))
                pid = hello["pid"]
                connection.sendall(json.dumps(dict(request)).encode() + b"\n")
                answer = _line(stream)
        except TimeoutError as error:
            self.kill(pid)
            what = "loading the run" if pid is None else "scoring"
            raise LostWorkerError(f"{what} took longer than {timeout:g} s, so the worker was ended") from error
        except OSError as error:
            raise LostWorkerError(f"the worker ended ({error}){self._last_words()}") from error
        except BaseException:
            # Who is interrupted takes its worker along, unless that has refused and ends itself.
            if pid is not None:
                self.kill(pid)
            raise
        if answer is None:
            raise LostWorkerError(f"the worker ended while it scored{self._last_words()}")
        if "broken" in answer:
            raise LostWorkerError(str(answer["broken"]))
        return answer["answer"], hello["hello"]

    def end(self) -> None:
        """End its worker, if there is one."""
        if (connection := self._connect()) is None:
            return
        with contextlib.suppress(OSError), connection:
            connection.settimeout(_STARTS)
            connection.sendall(b'{"end": true}\n')

    def kill(self, pid: int | None = None) -> None:
        """Kill its worker, which does not answer.

        Args:
            pid: Its process; ``None`` for the one that was started last.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = pid or int((self.folder / f"{self.number}.pid").read_text())
            # A number may have got to another process meanwhile.
            if str(self.socket) in Path(f"/proc/{pid}/cmdline").read_text() or not Path("/proc/self").exists():
                os.kill(pid, signal.SIGKILL)

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.socket))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        return connection

    def _is_there(self, connection: socket.socket) -> bool:
        """Whether a worker begins to answer; one that loads the run does so later, and is there."""
        connection.settimeout(_STARTS)
        try:
            return bool(connection.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return True
        except OSError:
            return False

    def _started(self, options: Sequence[str]) -> socket.socket:
        self.socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "genas_plugins.cluster.worker", *options, "--socket", str(self.socket)]
        with self.log.open("wb") as log:
            # A session of its own: it outlives the trial that starts it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True
            )
        (self.folder / f"{self.number}.pid").write_text(str(process.pid))
        while (connection := self._connect()) is None:
            if process.poll() is not None:
                raise LostWorkerError(f"the worker ended with status {process.returncode}{self._last_words()}")
            time.sleep(_POLL)
        return connection

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {one_line(lines[-1], 200)}" if lines else ""


def end_workers(folder: Path) -> None:
    """End the workers of a run on this machine, once nobody asks them any more.

    Args:
        folder: See :func:`slots_folder`.
    """
    for path in folder.glob("*.sock"):
        Slot(folder, int(path.stem)).end()


def _line(stream: Any) -> dict[str, Any] | None:
    """A line of JSON; ``None`` at the end of the connection."""
    line = stream.readline(_LONGEST)
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise LostWorkerError(f"the worker said {shown(line, 100)}")
    return data
