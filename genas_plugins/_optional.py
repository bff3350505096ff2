"""Imports optional dependencies; a missing one is reported in one sentence that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

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
            the command that installs it.
        ImportError: Something inside an installed package cannot be imported, which has another cause; unchanged.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{package} is needed for {purpose} but is not installed: pip install "
            + (f"'genas-plugins[{extra}]'." if install is None else f"{install}."),
            name=package,
        ) from error
