"""Imports optional dependencies; a missing one is reported in one sentence that names the extra to install."""

from __future__ import annotations

import importlib
import platform
from types import ModuleType

from genas_plugins._compatibility import RETAGGED, import_typeguard, nni_has_a_wheel

__all__ = ["MissingPackageError", "require"]


class MissingPackageError(ImportError):
    """An optional package is not installed; the message is a sentence with the command that installs it."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name, for instance ``"matplotlib.pyplot"``.
        extra: The extra of ``genas-plugins`` that installs it.
        purpose: What needs it; completes the message "is needed for ...".

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
        install = f"pip install 'genas-plugins[{extra}]'"
        if package == "nni" and not nni_has_a_wheel():
            missing += f", and has no wheel for {platform.machine()}, which docs/nni.md explains"
            install = f"{RETAGGED} && {install}"
        raise MissingPackageError(f"{missing}: {install}.", name=package) from error
