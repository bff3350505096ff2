"""One writer a folder: who is refused, what frees a lock, and what a killed writer leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genas_plugins import locking
from genas_plugins.files import atomic_path, write_text
from genas_plugins.locking import FolderInUseError, lock_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")


class Child:
    """A forked process that has got as far as ``wait`` in the function that it runs."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        said, say = os.pipe()
        self._go, go = os.pipe()[::-1]
        self.pid = os.fork()
        if not self.pid:
            # Not those of this end: the other process must see when it is closed.
            os.close(said)
            os.close(self._go)

            def wait() -> None:
                os.write(say, b"x")
                os.read(go, 1)

            try:
                function(wait, *arguments)
                os._exit(0)
            except FolderInUseError:
                os._exit(1)
            finally:
                os._exit(2)
        os.close(say)
        os.close(go)
        self._said = said

    def ready(self) -> Child:
        assert os.read(self._said, 1) == b"x"
        return self

    def go_on(self) -> Child:
        os.write(self._go, b"x")
        return self

    def end(self) -> int:
        """Exit status; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.end()


def hold(wait: Callable[[], None], folder: Path) -> None:
    with lock_folder(folder):
        wait()


def hold_with_a_worker(wait: Callable[[], None], folder: Path) -> None:
    with lock_folder(folder):
        if not os.fork():
            time.sleep(5)
            os._exit(0)
        wait()


def write_half(wait: Callable[[], None], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        wait()


def start_together(wait: Callable[[], None], folder: Path) -> None:
    wait()
    with lock_folder(folder):
        wait()


def test_the_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Child(hold, folder).ready()
    with pytest.raises(FolderInUseError) as refused, lock_folder(folder):
        pass
    assert f"{folder} is in use by process {first.pid} on {socket.gethostname()!r}" in str(refused.value)
    assert "name another folder" in str(refused.value)
    assert first.go_on().end() == 0
    with lock_folder(folder):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("function", [hold, hold_with_a_worker], ids=["alone", "with a worker that lives on"])
def test_a_killed_process_holds_nothing(function: Callable[..., None], tmp_path: Path) -> None:
    Child(function, tmp_path).ready().kill()
    with lock_folder(tmp_path):
        pass


def test_a_worker_that_is_forked_is_kept_out(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        assert Child(hold, tmp_path).end() == 1
        # The end of the child has not freed the lock.
        with ThreadResult(tmp_path) as found:
            assert found == "refused"


class ThreadResult:
    """What another thread of this process finds."""

    def __init__(self, folder: Path) -> None:
        self.found = ""
        thread = threading.Thread(target=self._try, args=(folder,))
        thread.start()
        thread.join()

    def _try(self, folder: Path) -> None:
        try:
            with lock_folder(folder):
                self.found = "taken"
        except FolderInUseError:
            self.found = "refused"

    def __enter__(self) -> str:
        return self.found

    def __exit__(self, *_: object) -> None: ...


def test_the_thread_that_holds_it_may_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with lock_folder(tmp_path / "run"):
        with lock_folder("run"):
            pass
        # The inner block has not freed what the outer one holds.
        with ThreadResult(tmp_path / "run") as found:
            assert found == "refused"
    with ThreadResult(tmp_path / "run") as found:
        assert found == "taken"


def test_what_fails_before_it_writes_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError), lock_folder(tmp_path / "a" / "b"):
        raise ValueError
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError), lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").write_text("x")
        raise ValueError
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_one_of_two_that_start_at_once_is_refused(tmp_path: Path) -> None:
    both = [Child(start_together, tmp_path).ready() for _ in range(2)]
    for child in both:
        child.go_on()
    pid, status = os.waitpid(-1, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    (other,) = (child for child in both if child.pid != pid)
    assert other.go_on().end() == 0


# What killed writers leave


def test_half_written_files_of_killed_writers_are_removed_when_the_folder_is_opened(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", "whole")
    (tmp_path / ".notes-saturday.txt").write_text("the user's")
    killed, writing = (Child(write_half, tmp_path / name).ready() for name in ("config.yaml", "cells.svg"))
    killed.kill()
    assert len(list(tmp_path.iterdir())) == 4
    with lock_folder(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    # The one that is still being written is not taken from its writer.
    assert left - {".lock"} > {"config.yaml", ".notes-saturday.txt"} and len(left) == 4
    assert writing.go_on().end() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes-saturday.txt", "cells.svg", "config.yaml"]
    assert (tmp_path / "cells.svg").read_text() == "half" and (tmp_path / "config.yaml").read_text() == "whole"


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.json") as path:
        path.write_text("x")
        with lock_folder(tmp_path):
            assert path.exists()
    assert (tmp_path / "a.json").read_text() == "x"


# Other machines, and file systems without such locks


def holder(pid: int, host: str) -> str:
    return json.dumps({"pid": pid, "host": host, "since": "2026-01-01 12:00:00+00:00"})


def dead() -> int:
    """The number of a process that is no more."""
    child = Child(lambda _: None)
    child.end()
    return child.pid


def test_what_another_machine_left_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".lock").write_text(holder(12, "elsewhere"))
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path):
        pass
    assert "process 12 on 'elsewhere'" in caplog.text
    caplog.clear()
    # Of this machine, it is what a kill leaves.
    (tmp_path / ".lock").write_text(holder(dead(), socket.gethostname()))
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path):
        pass
    assert caplog.text == ""


@pytest.mark.parametrize("content", ["", "\0" * 5000, "[" * 100_000, "[1]", '{"host": 3, "pid": "x" }'])
def test_what_the_file_holds_harms_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    with lock_folder(tmp_path), ThreadResult(tmp_path) as found:
        assert found == "refused"


@pytest.fixture(params=[errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, None])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system, or a platform, without ``flock``."""

    def flock(*_: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param is None:
        monkeypatch.setattr(locking, "fcntl", None)
    else:
        monkeypatch.setattr(locking.fcntl, "flock", flock)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_there_is_a_lock_too(tmp_path: Path) -> None:
    with lock_folder(tmp_path), ThreadResult(tmp_path) as found:
        assert found == "refused"
    assert list(tmp_path.iterdir()) == []
    # Of a process that was killed.
    (tmp_path / ".lock-exclusive").write_text(holder(dead(), socket.gethostname()))
    with lock_folder(tmp_path):
        pass
    for pid, host in ((os.getppid(), socket.gethostname()), (dead(), "elsewhere")):
        (tmp_path / ".lock-exclusive").write_text(holder(pid, host))
        with (
            pytest.raises(FolderInUseError, match=r"process \d+ on .*remove .*\.lock-exclusive"),
            lock_folder(tmp_path),
        ):
            pass
