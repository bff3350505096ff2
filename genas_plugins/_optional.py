"""Imports optional dependencies; a missing one is reported in one sentence that names the extra to install."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType

from genas_plugins._compatibility import RETAGGED, import_typeguard, nni_has_a_wheel

__all__ = ["MissingPackageError", "require"]


class MissingPackageError(ImportError):
    """An optional package is not installed; the message is a sentence with the command that installs it."""


def require(module: str, *, purpose: str, extra: str | None = None, install: str | None = None) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name, for instance ``"matplotlib.pyplot"``.
        purpose: What needs it; completes the message "is needed for ...".
        extra: The extra of ``genas-plugins`` that installs it.
        install: Where there is no such extra: what to install instead.

    Returns:
        The imported module.

    Raises:
        MissingPackageError: The top-level package of ``module`` is not installed. The message is one sentence with
            the command that installs it, on this machine.
        ImportError: Something inside an installed package cannot be imported, which has another cause; unchanged.
    """
    package = module.partition(".")[0]
    try:
        if package == "nni":
            import_typeguard()
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        missing = f"{package} is needed for {purpose} but is not installed"
        install = install or f"'genas-plugins[{extra}]'"
        command = f"pip install {install}"
        if package == "nni" and not nni_has_a_wheel():
            missing += f", and has no wheel for {platform.machine()}, which docs/nni.md explains"
            command = f"{RETAGGED} && {command}"
        raise MissingPackageError(f"{missing}: {command}.", name=package) from error
