"""Search spaces: what can be drawn, mutated and crossed."""

from genas_plugins.darts.space import DartsSearchSpace
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SearchSpace

__all__ = ["DartsSearchSpace", "NasBench201Architecture", "NasBench201SearchSpace"]
