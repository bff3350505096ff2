"""Flatness-based neural architecture search: the core of the GeNAS plugins.

Needs PyTorch, NumPy and SciPy, and pydantic for files of settings. The host packages (``nni_strategy`` and others)
build on it.
"""

from genas_plugins import _moved
from genas_plugins._version import __version__
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO

__all__ = ["ZOO", "CellNetwork", "Genotype", "SuperNet", "__version__"]

_moved.install()
