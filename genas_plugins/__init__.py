"""Flatness-based neural architecture search: the core of the GeNAS plugins.

Needs PyTorch, NumPy and SciPy, and pydantic for files of settings. The host packages (``nni_strategy`` and others)
build on it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from genas_plugins import _moved
from genas_plugins._version import __version__

if TYPE_CHECKING:
    from genas_plugins.darts.genotype import Genotype
    from genas_plugins.darts.network import CellNetwork
    from genas_plugins.darts.supernet import SuperNet
    from genas_plugins.darts.zoo import ZOO

__all__ = ["ZOO", "CellNetwork", "Genotype", "SuperNet", "__version__"]

# Imported when they are asked for: a trial on a cluster starts for each candidate, and has no use for PyTorch.
_PLACES = {
    "ZOO": "genas_plugins.darts.zoo",
    "CellNetwork": "genas_plugins.darts.network",
    "Genotype": "genas_plugins.darts.genotype",
    "SuperNet": "genas_plugins.darts.supernet",
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return globals().setdefault(name, getattr(importlib.import_module(_PLACES[name]), name))
    # Those came with the package as long as it imported all of the above.
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
