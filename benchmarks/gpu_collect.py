"""What comes back from a machine with a GPU: a few small files of all that a plan wrote."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from genas_plugins.files import atomic_path

__all__ = ["MOST_BYTES", "MOST_FILES", "RESULTS_FILE", "collect"]

MOST_FILES = 8
MOST_BYTES = 16 * 2**20
RESULTS_FILE = "results.tar.gz"
_PATTERNS = ("*.json", "*.txt", "*.md", "*/config.yaml", "*/*.jsonl", "*/*.json", "*/*.csv", "*/*.png")


def collect(folder: Path, target: Path, networks: str = "") -> list[str]:
    """Copy the report and trained networks, and pack what the steps printed and measured.

    Args:
        folder: Of the plan.
        target: Where to; made if it is missing.
        networks: Pattern of the trained networks.

    Returns:
        What was left out because there would be more than :data:`MOST_FILES` files, or one of more than
        :data:`MOST_BYTES` bytes, each with the reason.

    Raises:
        OSError: The target cannot be written to.
    """
    target.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    found = [folder / "report.md", *(sorted(folder.glob(networks)) if networks else [])]
    for number, path in enumerate(found):
        if number >= MOST_FILES - 1:
            left_out.append(f"{path.name}, because at most {MOST_FILES} files come back")
        elif path.stat().st_size > MOST_BYTES:
            left_out.append(
                f"{path.name}, because it has {_mib(path.stat().st_size)} and at most {_mib(MOST_BYTES)} do"
            )
        elif not _same(path, target / path.name):
            with atomic_path(target / path.name) as temporary:
                shutil.copyfile(path, temporary)
    packed = _packed(folder, left_out)
    with atomic_path(target / RESULTS_FILE) as temporary:
        temporary.write_bytes(packed)
    return left_out


def _packed(folder: Path, left_out: list[str]) -> bytes:
    """An archive of the small files; the largest are left out while it is too large."""
    files = sorted(_small_files(folder), key=lambda path: path.stat().st_size)
    while True:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for path in files:
                archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
        if buffer.tell() <= MOST_BYTES or not files:
            return buffer.getvalue()
        left_out.append(f"{files.pop().relative_to(folder)}, because {RESULTS_FILE} would have {_mib(buffer.tell())}")


def _small_files(folder: Path) -> Iterator[Path]:
    yield from {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}


def _same(path: Path, copy: Path) -> bool:
    """A trained network is written once; reports change."""
    if not copy.is_file():
        return False
    first, second = path.stat(), copy.stat()
    return first.st_size == second.st_size and first.st_mtime <= second.st_mtime and path.suffix == ".safetensors"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
