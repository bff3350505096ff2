"""Hooks of MkDocs: the pages that are made from the code, and those of the repository's top folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation

ROOT = Path(__file__).resolve().parents[2]
# The checkout before what is installed, and the module beside this file.
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402

__all__ = ["on_config", "on_files", "on_nav", "on_page_markdown"]

_TOP = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
_PAGES: dict[str, str] = {}


def on_config(config: Any) -> Any:
    """Make the pages, and put them into the navigation where it says ``packages``."""
    _PAGES.clear()
    _PAGES.update(reference.pages())
    for name, page in _TOP.items():
        _PAGES[page] = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    api = [path for path in _PAGES if path.startswith("reference/api/")]
    for section in config.nav:
        for entries in section.values():
            if isinstance(entries, list):
                entries[:] = [{"Packages": api} if entry == "packages" else entry for entry in entries]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files."""
    for path, text in _PAGES.items():
        files.append(File.generated(config, path, content=text))
    # Configurations that pages link to.
    for path in sorted((ROOT / "configs").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_nav(nav: Navigation, **_: Any) -> Navigation:
    """Call a package's page by the package."""
    for page in nav.pages:
        if page.file.src_uri.startswith("reference/api/"):
            page.title = Path(page.file.src_uri).stem
    return nav


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links to files of the top folder, and to configurations, lead to where the site has them."""
    up = "../" * page.file.src_uri.count("/")
    for name, target in _TOP.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{name}", f"]({up}{target}", markdown)
    return re.sub(r"\]\((?:\.\./)+configs/", f"]({up}configs/", markdown)
