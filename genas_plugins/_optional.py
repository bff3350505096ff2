"""Optional dependencies: a missing one is a sentence that names the extra to install, not a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name, for instance ``"matplotlib.pyplot"``.
        extra: The extra of ``genas-plugins`` that installs it.
        purpose: What it is needed for, as it reads after "is needed for".

    Returns:
        The imported module.

    Raises:
        ImportError: The top-level package of ``module`` is not installed. The message is one sentence with
            the command that installs it. An import error *inside* an installed package is raised unchanged:
            it has another cure.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is needed for {purpose} but is not installed: pip install 'genas-plugins[{extra}]'.",
            name=package,
        ) from error
