"""Who distributes the installed ``mmcv``, ``mmengine`` and ``mmseg``: OpenMMLab, or OneDL, which maintains a fork."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["DISTRIBUTIONS", "OPERATIONS", "check_families", "fork_is_installed", "has_metadata"]

DISTRIBUTIONS = {
    "mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv"),
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}
"""Distributions by the package that each of them installs."""

# What docs/mmseg.md explains. tar, sed and pip run as they stand, on Linux and macOS.
_BUILD = (
    "pip install 'setuptools<82' wheel ninja && pip download {pin} --no-binary :all: --no-deps --no-build-isolation "
    "&& tar xzf {folder}.tar.gz && sed -i.bak 's/std=c++1[47]/std=c++20/g' {folder}/setup.py "
    "&& pip uninstall -y {others} && {variables}pip install --no-build-isolation --no-deps ./{folder}"
)
OPERATIONS = {
    "mmcv": _BUILD.format(
        pin="mmcv==2.1.0", folder="mmcv-2.1.0", others="mmcv mmcv-lite", variables="MMCV_WITH_OPS=1 "
    ),
    "onedl-mmcv": _BUILD.format(pin="onedl-mmcv==2.3.6", folder="onedl_mmcv-2.3.6", others="onedl-mmcv", variables=""),
}
"""Commands that compile mmcv with its operations, by the distribution that they install."""


def fork_is_installed() -> bool:
    """Whether any package of the fork is."""
    return any(has_metadata(name) for names in DISTRIBUTIONS.values() for name in names if name.startswith("onedl-"))


def has_metadata(name: str) -> bool:
    """Whether a distribution of this name is installed."""
    return _found(name) is not None


def check_families() -> None:
    """Refuse two distributions that were installed over one another.

    Raises:
        ImportError: They lie in the same folder and differ in version, so that the package is a mixture of both.
    """
    for module, names in DISTRIBUTIONS.items():
        places: dict[Path, dict[str, str]] = {}
        for found in filter(None, map(_found, names)):
            places.setdefault(Path(str(found.locate_file(""))), {})[found.metadata["Name"]] = found.version
        for versions in places.values():
            # mmcv over mmcv-lite of its version is mmcv.
            if len(set(versions.values())) > 1:
                both = " and ".join(f"{name} {version}" for name, version in versions.items())
                raise ImportError(
                    f"{both} are both installed as {module}, and each has overwritten files of the other: "
                    f"pip uninstall -y {' '.join(_installed())}, and then install one family again, with "
                    "pip install 'genas-plugins[mmseg]' (OpenMMLab) or 'genas-plugins[onedl]' (OneDL's fork)."
                )


def _installed() -> list[str]:
    return [name for names in DISTRIBUTIONS.values() for name in names if has_metadata(name)]


def _found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
