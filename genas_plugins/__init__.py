"""Flatness-based neural architecture search: the core of the GeNAS plugins.

Needs only PyTorch, NumPy and SciPy. The host packages (``nni_strategy`` and others) build on it.
"""

from genas_plugins._version import __version__
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO

__all__ = ["ZOO", "CellNetwork", "Genotype", "SuperNet", "__version__"]
