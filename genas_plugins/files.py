"""Atomic writing of files: after a crash or on a full disk the previous content is still readable."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import genas_plugins
from genas_plugins._messages import listed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    *("atomic_folder", "atomic_path", "check_new_folder", "disk_is_full", "packaged_configs", "remove_leftovers"),
    "write_text",
]

_LEFTOVER = re.compile(r"\..+-[a-z0-9_]{8}\.partial(\.[^.]*)?")


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means a full disk, an exceeded quota, or a file too large for the file system."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; move it there when the block succeeds.

    The temporary file keeps the suffix of ``path``, so that writers that go by the suffix work.

    Raises:
        OSError: The file cannot be written. The temporary file is removed and ``path`` is left as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".partial{path.suffix}", dir=path.parent)
    temporary = Path(name)
    try:
        _mark(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files.
        _open_to_others(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def check_new_folder(folder: str | Path) -> None:
    """Raise if a folder to write holds anything, or cannot be one.

    Raises:
        FileExistsError: There is a file of that name, or the folder is not empty.
    """
    folder = Path(folder)
    if folder.is_dir():
        inside = sorted(os.listdir(folder))
        if inside:
            raise FileExistsError(f"{folder} is not empty ({listed(inside)}): name another folder, or empty it.")
    elif os.path.lexists(folder):
        raise FileExistsError(f"{folder} is a file, expected the name of a new folder.")


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; move it there when the block succeeds.

    Raises:
        FileExistsError: ``folder`` holds something, at the start or by the end.
        OSError: It cannot be written. The temporary folder is removed, and ``folder`` is left as it was.
    """
    check_new_folder(folder)
    # Not the path as given: "." has no name.
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent))
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            # Some writers create private files too, safetensors among them.
            _open_to_others(path)
        check_new_folder(folder)
        # Onto an empty folder too.
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_others(path: Path) -> None:
    """Give a result the permissions of the user's umask."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed writers, but not those still being written.

    Without ``flock`` the two cannot be told apart, and all are left.
    """
    for path in Path(folder).iterdir():
        if _LEFTOVER.fullmatch(path.name) is None or not path.is_file():
            continue
        # The file belongs to another user, or is already gone.
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                if _mark(handle):
                    path.unlink()
            finally:
                os.close(handle)


def _mark(handle: int) -> bool:
    """Lock a file until this process ends; False if another process holds it or there is no ``flock``."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8, whole or not at all, and return the path.

    Raises:
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def packaged_configs(host: str, suffix: str = ".yaml") -> dict[str, Path]:
    """The configurations for one host that come with the package, by name.

    Args:
        host: Folder of ``configs``, for instance ``"nni"``.
        suffix: Suffix of the files.
    """
    package = Path(genas_plugins.__file__).parent
    # Installed, the configs lie inside the package; in a checkout, beside it.
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted((folder / host).glob(f"*{suffix}"))}
    return {}
