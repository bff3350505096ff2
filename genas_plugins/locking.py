"""Locks a folder for one writer; the lock ends with its process, even if that is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from genas_plugins.files import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "FolderInUseError", "lock_folder"]

LOCK_FILE = ".lock"
_EXCLUSIVE_FILE = ".lock-exclusive"

_logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

_descriptors: set[int] = set()
"""File descriptors of the locks that this process holds."""

_thread = threading.local()
"""``folders``: the folders that this thread has locked."""


class _NoFlockError(Exception):
    """The platform or the file system has no flock."""


class FolderInUseError(OSError):
    """Another process writes to the folder."""


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[Path]:
    """Exclude other writers from ``folder``, and remove unfinished files of killed ones.

    The lock is ``flock`` on the hidden file ``.lock``, which says who holds it. It ends with the process, also after a
    kill or power loss; child processes do not inherit it. If the block raises before anything was written, folders
    created for it are removed again.

    It excludes processes of this machine on local file systems, and those of other machines where the network file
    system supports ``flock``: NFS since Linux 2.6.12 unless mounted with ``nolock`` or ``local_lock``, Lustre mounted
    with ``flock`` (not with ``localflock``), CephFS, GPFS and SMB; not sshfs, nor what mounts object stores. Without
    ``flock`` the existence of a file is the lock: it is taken over if its holder ran on this machine and has ended,
    and otherwise has to be removed by hand.

    The lock is reentrant within a thread.

    Args:
        folder: Folder to lock; created if it is missing.

    Yields:
        The folder.

    Raises:
        FolderInUseError: Another process, or another part of this one, holds the lock; the message says which.
        OSError: The folder cannot be made or written to.

    Example:
        >>> from genas_plugins.locking import lock_folder
        >>> with lock_folder("run") as folder:
        ...     sorted(path.name for path in folder.iterdir())
        ['.lock']
    """
    folder = Path(folder)
    held: set[Path] = vars(_thread).setdefault("folders", set())
    if (place := folder.resolve()) in held:
        yield folder
        return
    made = _make(folder)
    try:
        with _lock(folder):
            held.add(place)
            try:
                remove_leftovers(folder)
                yield folder
            finally:
                held.discard(place)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _make(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns those that were missing, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / LOCK_FILE
    try:
        descriptor = _acquire(folder, path)
    except _NoFlockError:
        with _exclusive_file(folder):
            yield
        return
    try:
        before = _holder(os.pread(descriptor, 1000, 0))
        if before.get("host", socket.gethostname()) != socket.gethostname():
            # Its process was killed, or this file system does not share locks between machines.
            _logger.warning("%s was left by %s, which did not end well: see that it has ended.", folder, _said(before))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _own(), 0)
        yield
    finally:
        # In a forked process, _forget has closed it already.
        if descriptor in _descriptors:
            with contextlib.suppress(OSError):
                if _is_at(descriptor, path):
                    path.unlink()
            _descriptors.discard(descriptor)
            os.close(descriptor)


def _acquire(folder: Path, path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _flock(descriptor):
                raise FolderInUseError(
                    f"{folder} is in use by {_said(_holder(os.pread(descriptor, 1000, 0)))}: wait for its end, or name "
                    "another folder."
                )
            # The previous holder removes the file; if it did so between the two calls, this descriptor is of that file.
            if _is_at(descriptor, path):
                _descriptors.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    if fcntl is None:
        raise _NoFlockError
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise _NoFlockError from error
        # Some network file systems report a conflict as missing permission.
        if isinstance(error, BlockingIOError | PermissionError):
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive_file(folder: Path) -> Iterator[None]:
    """The lock without ``flock``: whoever created the file holds it."""
    (folder / LOCK_FILE).unlink(missing_ok=True)
    path = folder / _EXCLUSIVE_FILE
    if path.exists() and _is_gone(_holder(path.read_bytes())):
        path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise FolderInUseError(
            f"{folder} is in use by {_said(_holder(path.read_bytes()))}: wait for its end, or name another folder. If "
            f"it was killed, remove {path}: this file system has no locks that end with their process."
        ) from error
    try:
        os.write(descriptor, _own())
        os.close(descriptor)
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_gone(holder: dict[str, Any]) -> bool:
    # On Windows, signal 0 is Ctrl-C.
    if os.name != "posix" or holder.get("host") != socket.gethostname() or type(holder.get("pid")) is not int:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _own() -> bytes:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _said(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')!r:.20} on {holder.get('host')!r:.80} (since {holder.get('since')!r:.40})"


def _forget() -> None:
    """Release the locks in a forked process: a data-loader worker that outlives a killed search must not keep them."""
    vars(_thread).clear()
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
