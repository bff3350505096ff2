"""How well scores rank architectures whose accuracies are known."""

from genas_plugins.correlation.measure import Setting, columns, evaluate, measure_raw, slope_shares, with_neighbours

__all__ = ["Setting", "columns", "evaluate", "measure_raw", "slope_shares", "with_neighbours"]
