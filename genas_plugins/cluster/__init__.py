"""Candidates measured on other processes and machines: trials of a cluster's engine, and the workers behind them."""
