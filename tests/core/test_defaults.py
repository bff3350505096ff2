"""A setting whose default depends on another follows it, so that one that is given alone is enough."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from genas_plugins.experiment.config import ConfigError, dump, load, parse
from genas_plugins.search import Evolution
from genas_plugins.search.evolution import mixture
from genas_plugins.spaces import NasBench201SearchSpace


@pytest.mark.parametrize("population", range(1, 61))
def test_every_population_has_a_mixture(population: int) -> None:
    evolution = Evolution(NasBench201SearchSpace(), population=population, generations=2, parents=1)
    assert evolution.mutants == evolution.crossovers == population // 2
    for given in range(population + 1):
        mutants, crossovers = mixture(population, mutants=given)
        assert mutants == given and crossovers == min(population // 2, population - given)
        assert mixture(population, crossovers=given) == (crossovers, mutants)


def test_the_paper_s_is_25_and_25_of_50() -> None:
    evolution = Evolution(NasBench201SearchSpace())
    assert (evolution.population, evolution.mutants, evolution.crossovers) == (50, 25, 25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"population": 4, "mutants": 5}, r"the population of 4 together, got 5 and 0\."),
        ({"population": 4, "crossovers": 9}, r"the population of 4 together, got 0 and 9\."),
        ({"population": 4, "mutants": 3, "crossovers": 2}, r"the population of 4 together, got 3 and 2\."),
        ({"population": 4, "mutants": -1}, r"mutants must not be negative, got -1\."),
        ({"population": 0}, r"population must be at least 1, got 0\."),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evolution(NasBench201SearchSpace(), **given)
    with pytest.raises(ConfigError, match=f"^search: .*{message}"):
        parse({"search": given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"search": {"population": 4}}, {"search": {"mutants": 2, "crossovers": 2}}),
        ({"search": {"population": 5, "crossovers": 4}}, {"search": {"mutants": 1, "crossovers": 4}}),
        ({"search": {"population": 80}}, {"search": {"mutants": 40, "crossovers": 40}}),
        ({"search": {"population": 7, "mutants": None}}, {"search": {"mutants": 3, "crossovers": 3}}),
        ({"training": {"learning_rate": 5e-4}}, {"training": {"final_learning_rate": 5e-4}}),
        ({"training": {"learning_rate": 0.1}}, {"training": {"final_learning_rate": 0.001}}),
        ({"training": {"learning_rate": 1.0, "final_learning_rate": 0.5}}, {"training": {"final_learning_rate": 0.5}}),
    ],
)
def test_an_experiment_is_written_with_what_followed(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Any
) -> None:
    experiment = parse(given)
    written = yaml.safe_load(dump(experiment))
    for section, values in expected.items():
        assert {name: written[section][name] for name in values} == values
    path = tmp_path / "config.yaml"
    path.write_text(dump(experiment))
    assert load(path) == experiment
