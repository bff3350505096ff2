"""The model of how a search grows with its workers, against a simulated service."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

MODEL = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "cluster_scaling.py"))


@pytest.mark.parametrize("workers", [1, 30, 1000])
def test_the_model_says_what_a_simulated_service_does(workers):
    simulated, message = MODEL["simulate"](workers, 1000, 2, 5.0, 0.1, on_disk=False)
    predicted = MODEL["predict"](workers, 1000, 5.0, 0.1, message)
    assert predicted == pytest.approx(simulated, rel=0.2)
    # No search is faster than its workers.
    assert simulated <= workers / 5 * 1.05
