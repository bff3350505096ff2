"""Files appear whole or not at all, on a full disk too."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from genas_plugins._messages import message_of
from genas_plugins.files import atomic_folder, atomic_path, write_text


def test_text_is_written_as_utf8_and_replaced(tmp_path):
    path = tmp_path / "result.json"
    assert write_text(str(path), "alt\n") == path
    assert write_text(path, "größer\n") == path
    assert path.read_bytes() == b"gr\xc3\xb6\xc3\x9fer\n" and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        path = write_text(tmp_path / "result.txt", "x")
        with atomic_folder(tmp_path / "folder") as folder:
            # As safetensors writes.
            os.close(os.open(folder / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    for file in (path, tmp_path / "folder" / "weights"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = write_text(tmp_path / "cells.svg", "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        assert temporary.suffix == ".svg" and temporary.parent == tmp_path
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["cells.svg"]


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "result.txt", "x")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "result.txt", "\ud800")
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from genas_plugins.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_text(sys.argv[1], "new" * 10_000)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_full_disk_leaves_the_old_file(tmp_path, warm):
    path = write_text(tmp_path / "result.txt", "old")
    result = warm("torch")(FULL_DISK, path, folder=tmp_path)
    # 27 is EFBIG.
    assert result.stdout == "27\n" and path.read_text() == "old" and os.listdir(tmp_path) == ["result.txt"]


class Broken(torch.utils.data.Dataset):
    """A data set whose images cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Cannot read a.jpg: repair it."), "Cannot read a.jpg: repair it."),
        (OSError(5, "Input/output error", "b.png"), "[Errno 5] Input/output error: 'b.png'"),
        (RuntimeError("first line:\nsecond line"), "first line: second line"),
    ],
)
def test_an_error_of_a_loaders_worker_is_the_line_that_it_met(error, told):
    with pytest.raises(type(error)) as met:
        # fork, because a worker cannot import what is in a file of tests.
        next(iter(torch.utils.data.DataLoader(Broken(error), num_workers=1, multiprocessing_context="fork")))
    assert "Traceback" in str(met.value) and message_of(met.value) == told
    assert message_of(error) == told
