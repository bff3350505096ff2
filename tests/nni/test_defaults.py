"""A setting whose default depends on another follows it."""

from __future__ import annotations

import pytest

from nni_strategy import GeNAS, SupernetModule


@pytest.mark.parametrize(("population", "each"), [(4, 2), (1, 0), (9, 4), (50, 25), (100, 50)])
def test_a_population_alone_is_enough(population: int, each: int) -> None:
    evolution = GeNAS(population=population).evolution
    assert (evolution.mutants, evolution.crossovers) == (each, each)


@pytest.mark.parametrize(("rate", "final"), [(0.025, 0.001), (2e-4, 2e-4)])
def test_a_learning_rate_does_not_rise(rate: float, final: float) -> None:
    assert SupernetModule(epochs=3, learning_rate=rate).final_learning_rate == final
