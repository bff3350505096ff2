"""Lists the images in class folders, by the same rules for search, training and validation.

Only ``folder/<class>/<image>`` is read. Files elsewhere, and files of other types, are counted and reported.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genas_plugins._messages import escaped, listed

__all__ = ["IMAGE_EXTENSIONS", "Listing", "class_folders", "image_files", "images_below", "list_images"]

_logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_REASONS = {
    "other": "of other kinds",
    "dangling": "links that lead nowhere",
    "nested": "images in folders inside class folders",
    "loose": "images beside the class folders",
    "unlisted": "images of classes that are not asked for",
}


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        root: The folder.
        class_names: One name per class.
        samples: (path, label) pairs, class by class.
        left_out: Paths that are not read, by reason (a key of ``_REASONS``).
    """

    root: Path
    class_names: tuple[str, ...]
    samples: tuple[tuple[str, int], ...]
    left_out: Mapping[str, Sequence[str]]

    def describe(self) -> str:
        """Count the files found, used and left out, by type and with the first names."""
        surplus = sum(map(len, self.left_out.values()))
        text = (
            f"{escaped(self.root)}: {len(self.samples) + surplus} files, {len(self.samples)} used as images of "
            f"{len(self.class_names)} classes ({_kinds(path for path, _ in self.samples)})"
        )
        if not surplus:
            return f"{text}, none left out"
        return f"{text}, {surplus} left out: {_describe_rest(self.root, self.left_out)}"

    def log(self) -> None:
        """Log what is used, as a warning if something is left out."""
        _logger.log(logging.WARNING if any(self.left_out.values()) else logging.INFO, "%s", self.describe())


def class_folders(root: Path) -> dict[str, Path]:
    """The folders in ``root`` by name, sorted; hidden ones, such as caches, are ignored."""
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def image_files(folder: Path) -> list[str]:
    """The paths of the images in one folder, sorted as text."""
    return sorted(_scan(folder, nested=False)[0])


def images_below(root: str | Path) -> list[str]:
    """The paths of the images in a folder and in all folders inside it, sorted as text; hidden ones are left out.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no images.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of images {escaped(root)}.")
    found: list[str] = []
    for parent, folders, _ in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += image_files(Path(parent))
    if not found:
        raise ValueError(
            f"{escaped(root)} holds no images ({', '.join(IMAGE_EXTENSIONS)}), but "
            f"{listed(sorted(os.listdir(root))) or 'nothing'}: name a folder with images like those of the training."
        )
    return sorted(found)


def list_images(
    root: str | Path,
    folders: Mapping[str, Path],
    names: Sequence[str],
    *,
    key: Callable[[str], Any] | None = None,
    advice: str = "",
) -> Listing:
    """List the images of classes, sorted by path within each class.

    Args:
        root: The folder of the class folders.
        folders: The class folders by name.
        names: The classes in the order of their labels, each the name of a folder.
        key: Key to sort the paths of a class by; None: as text.
        advice: Text at the end of error messages.

    Raises:
        ValueError: There are fewer than two classes, or one has no images.
    """
    if len(names) < 2:
        raise ValueError(
            f"{escaped(root)} has {len(names)} class folder{'s' * (len(names) != 1)} ({listed(names)}), expected at "
            f"least two, {escaped(root)}/<class>/<image>: every loss of a single class is 0. Is it one level too "
            f"high or too low?{advice}"
        )
    left_out: dict[str, list[str]] = {reason: [] for reason in _REASONS}
    samples: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        found, rest = _scan(folders[name])
        if not found:
            inside = _describe_rest(folders[name], rest) or listed(sorted(os.listdir(folders[name]))) or "nothing"
            raise ValueError(
                f"The class folder {escaped(folders[name])} holds {inside}, expected images "
                f"({', '.join(IMAGE_EXTENSIONS)}): with no images as {escaped(root)}/<class>/<image> it is no "
                f"class. Put them there, or remove the folder.{advice}"
            )
        samples.extend((path, label) for path in sorted(found, key=key))
        for reason, paths in rest.items():
            left_out[reason].extend(paths)
    for name in folders.keys() - set(names):
        left_out["unlisted"].extend(_scan(folders[name])[0])
    beside, rest = _scan(Path(root), nested=False)
    left_out["loose"].extend(beside)
    left_out["dangling"].extend(rest["dangling"])
    return Listing(Path(root), tuple(names), tuple(samples), left_out)


def _is_image(name: str) -> bool:
    # Names with a leading dot are leftovers such as the "._" files of macOS archives.
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _scan(folder: Path, nested: bool = True) -> tuple[list[str], dict[str, list[str]]]:
    """The images in a folder, and what else is in it, by reason."""
    images: list[str] = []
    rest: dict[str, list[str]] = {"other": [], "dangling": [], "nested": []}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                for parent, _, names in os.walk(entry.path) if nested else ():
                    rest["nested"].extend(os.path.join(parent, name) for name in names if _is_image(name))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                rest["dangling"].append(entry.path)
            # is_file: reading a pipe or a device would block.
            elif _is_image(entry.name) and entry.is_file():
                images.append(entry.path)
            else:
                rest["other"].append(entry.path)
    return images, rest


def _describe_rest(root: str | Path, rest: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for reason, paths in rest.items():
        if paths:
            kinds = f" ({_kinds(paths)})" if reason == "other" else ""
            shown = listed(os.path.relpath(path, root) for path in sorted(paths))
            parts.append(f"{len(paths)} {_REASONS[reason]}{kinds}: {shown}")
    return "; ".join(parts)


def _kinds(paths: Iterable[str]) -> str:
    counts = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in paths)
    return listed((f"{kind} {count}" for kind, count in counts.most_common()), 8)
