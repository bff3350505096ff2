"""The kit for a machine without a network: packages that it lacks and data, sealed for one state of the checkout.

A folder, ``.gpu`` by default, with ``site.tgz`` (packages, as ``pip install --target`` leaves them) and ``data/``, each
where it is needed. ``seal`` writes ``kit.json``: hashes of these files and of the checkout, so that on the day that
counts nothing is run with a kit that was rehearsed with something else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genas_plugins.files import write_text

__all__ = ["Kit", "KitError", "checkout_hash", "seal"]

SITE_FILE = "site.tgz"
SEAL_FILE = "kit.json"
_CODE = ("genas_plugins", "nni_strategy", "timm_models", "mmseg_backbones", "detectron2_backbones")
_CODE += ("configs", "benchmarks")


class KitError(ValueError):
    """A kit that is missing, incomplete, or of another state of the checkout."""


@dataclass(frozen=True)
class Kit:
    """A kit that was checked.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, root: Path) -> Kit:
        """Check a kit against its seal, and its seal against the checkout.

        Args:
            folder: Of the kit.
            root: Of the checkout.

        Raises:
            KitError: There is none, a file of it is missing or other than it was, or the checkout is.
        """
        path = folder / SEAL_FILE
        if not path.is_file():
            raise KitError(
                f"There is no sealed kit in {folder} (no {SEAL_FILE}): pack it and seal it, see docs/gpu.md."
            )
        try:
            sealed = json.loads(path.read_text(encoding="utf-8"))
            files, checkout, told = sealed["files"], sealed["checkout"], sealed["told"]
        except (ValueError, KeyError, TypeError) as error:
            raise KitError(f"{path} is damaged ({error}): seal the kit again.") from error
        now = _hashes(folder)
        for name, digest in files.items():
            if now.get(name) != digest:
                state = "missing" if name not in now else "other than it was"
                raise KitError(f"{folder / name} is {state} since the kit was sealed: pack and seal it again.")
        if checkout_hash(root) != checkout:
            raise KitError(
                f"The kit in {folder} was sealed for another state of this checkout ({told}): rehearse with this one, "
                "and seal the kit again."
            )
        return cls(folder)

    @property
    def data(self) -> Path:
        """Where its data is."""
        return self.folder / "data"

    def site(self, folder: Path) -> list[str]:
        """Unpack its packages into ``folder``, once; return what is to be on the path.

        Raises:
            KitError: The archive is damaged.
        """
        archive = self.folder / SITE_FILE
        if not archive.is_file():
            return []
        # Kits of several kinds may be used one after another.
        target = folder / f"site-{_digest(archive)[:12]}"
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=".site-", dir=folder))
            try:
                with tarfile.open(archive) as packed:
                    packed.extractall(partial, filter="data")
                partial.rename(target)
            except (tarfile.TarError, EOFError, zlib.error) as error:
                raise KitError(f"{archive} is damaged ({error}): pack it again.") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return [str(target)]


def seal(folder: Path, root: Path, told: str) -> Path:
    """Write down which files a kit has, and for which state of the checkout.

    Args:
        folder: Of the kit.
        root: Of the checkout.
        told: What people call that state, such as a commit.

    Raises:
        KitError: There is nothing in the folder.
    """
    files = _hashes(folder) if folder.is_dir() else {}
    if not files:
        raise KitError(f"There is nothing to seal in {folder}: it should have {SITE_FILE} or data/, see docs/gpu.md.")
    content = {"told": told, "checkout": checkout_hash(root), "files": files}
    return write_text(folder / SEAL_FILE, json.dumps(content, indent=1) + "\n")


def checkout_hash(root: Path) -> str:
    """A hash of the code and the configurations; the machine that runs them may have no git."""
    digest = hashlib.sha256()
    for name, content in _hashes_of(root, sorted(_files(root))):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for name in _CODE:
        for path in (root / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                yield path


def _hashes(folder: Path) -> dict[str, str]:
    return dict(_hashes_of(folder, sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL_FILE)))


def _hashes_of(root: Path, paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        yield path.relative_to(root).as_posix(), _digest(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
