"""The DARTS space of the paper: genotypes, operations, networks, the supernet and the published architectures."""

from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.space import DartsSearchSpace
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO

__all__ = ["ZOO", "CellNetwork", "DartsSearchSpace", "Genotype", "SuperNet"]
