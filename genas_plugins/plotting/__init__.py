"""Figures: the two cells of a genotype, loss-against-sigma curves, the progress of a search and its front.

Every function draws with the object-oriented interface of matplotlib (extra ``plots``) in a temporary style:
the caller's pyplot state, backend and rcParams are left alone, and the same input gives the same bytes.
"""

from genas_plugins.plotting.cells import plot_cells
from genas_plugins.plotting.curves import LossCurve, plot_loss_curves
from genas_plugins.plotting.neighbourhood import Neighbour, plot_neighbourhood
from genas_plugins.plotting.pareto import plot_front
from genas_plugins.plotting.scatter import plot_scatter
from genas_plugins.plotting.search import plot_search

__all__ = [
    "LossCurve",
    "Neighbour",
    "plot_cells",
    "plot_front",
    "plot_loss_curves",
    "plot_neighbourhood",
    "plot_scatter",
    "plot_search",
]
