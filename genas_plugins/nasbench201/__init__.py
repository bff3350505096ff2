"""NAS-Bench-201 (Dong and Yang, ICLR 2020): its architectures, networks, costs and search space.

The accuracies of training each architecture are read by :mod:`genas_plugins.nasbench201.truth`.
"""

from genas_plugins.nasbench201.architecture import EDGES, NODES, OPERATIONS, NasBench201Architecture
from genas_plugins.nasbench201.cells import SuperCell, reaching_edges
from genas_plugins.nasbench201.costs import NasBench201Costs, nasbench201_costs
from genas_plugins.nasbench201.networks import (
    NasBench201Network,
    NasBench201SubNet,
    NasBench201SuperNet,
    check_sizes,
)
from genas_plugins.nasbench201.space import NasBench201SearchSpace

__all__ = [
    "EDGES",
    "NODES",
    "OPERATIONS",
    "NasBench201Architecture",
    "NasBench201Costs",
    "NasBench201Network",
    "NasBench201SearchSpace",
    "NasBench201SubNet",
    "NasBench201SuperNet",
    "SuperCell",
    "check_sizes",
    "nasbench201_costs",
    "reaching_edges",
]
