"""The evolution on a lattice whose optimum is known: it finds it, never repeats, ends and resumes."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest

from genas_plugins.search import Evolution
from genas_plugins.spaces import DartsSearchSpace

TARGET = (3, 1, 4, 1, 5, 2)


class Lattice:
    """Tuples of ``dimension`` integers below ``values``."""

    def __init__(self, dimension: int = len(TARGET), values: int = 6) -> None:
        self.dimension, self.values = dimension, values

    def sample(self, rng):
        return tuple(int(v) for v in rng.integers(self.values, size=self.dimension))

    def mutate(self, candidate, probability, rng):
        return tuple(int(rng.integers(self.values)) if rng.random() < probability else v for v in candidate)

    def crossover(self, first, second, rng):
        return tuple(a if rng.random() < 0.5 else b for a, b in zip(first, second, strict=True))

    def to_json(self, candidate):
        return list(candidate)

    def from_json(self, data):
        if len(data) != self.dimension:
            raise ValueError(f"expected {self.dimension} numbers, got {data}")
        return tuple(data)


def score(candidate) -> float:
    return -float(sum(abs(a - b) for a, b in zip(candidate, TARGET, strict=False)))


def evolution(space=None, **settings) -> Evolution:
    defaults = {"population": 20, "generations": 20, "parents": 5, "mutants": 10, "crossovers": 5}
    return Evolution(space or Lattice(), **{**defaults, "mutation_probability": 0.3, **settings})


def run(search: Evolution, generations: int = 10**6) -> list:
    proposals = []
    while not search.finished and generations:
        asked = search.ask()
        proposals += asked
        search.tell([score(proposal.candidate) for proposal in asked])
        generations -= 1
    return proposals


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_found_where_random_search_misses_it(seed):
    # 400 of 46,656 candidates: random search finds the one optimum with chance 0.9 %.
    search, random = evolution(seed=seed), evolution(seed=seed, mutants=0, crossovers=0)
    proposals, drawn = run(search), run(random)
    assert search.best(1) == [(TARGET, 0.0)]
    assert random.best(1)[0][1] < 0.0
    assert len(proposals) == len({p.candidate for p in proposals}) == len(drawn) == 400
    assert {p.origin for p in drawn} == {"random"}


def test_generations_have_the_declared_mix():
    search = evolution()
    assert Counter(p.origin for p in search.ask()) == {"random": 20}
    search.tell([score(p.candidate) for p in search.ask()])
    assert Counter(p.origin for p in search.ask()) == {"mutation": 10, "crossover": 5, "random": 5}


def test_mutants_and_crossovers_come_from_the_best():
    class Traced(Lattice):
        def mutate(self, candidate, probability, rng):
            used.add(candidate)
            assert probability == 0.3
            return super().mutate(candidate, probability, rng)

        def crossover(self, first, second, rng):
            used.update((first, second))
            return super().crossover(first, second, rng)

    used: set = set()
    search, scored = evolution(Traced(), seed=1), {}
    for _ in range(6):
        used.clear()
        asked = search.ask()
        # Scores with ties: of equals, the earlier is better.
        ranked = sorted(scored, key=lambda candidate: -scored[candidate])
        assert used <= set(ranked[:5])
        scored |= {p.candidate: score(p.candidate) for p in asked}
        search.tell([scored[p.candidate] for p in asked])
        assert search.best() == sorted(scored.items(), key=lambda pair: -pair[1])
        assert search.best(3) == search.best()[:3]


def test_asking_again_gives_the_same_and_draws_nothing():
    once, twice = evolution(seed=2), evolution(seed=2)
    first = twice.ask()
    first.clear()
    assert twice.ask() == twice.ask() == once.ask()
    assert run(once) == run(twice)


def test_seeds_decide():
    assert run(evolution(seed=3)) == run(evolution(seed=3)) != run(evolution(seed=4))


def test_a_tiny_space_is_exhausted_and_the_search_ends():
    search = evolution(Lattice(2, 3), generations=1000)
    proposals = run(search)
    assert {p.candidate for p in proposals} == set(itertools.product(range(3), repeat=2))
    assert len(proposals) == 9 and search.finished and search.ask() == [] and search.generation < 1000


def test_a_finished_search_stays_finished():
    search = evolution(generations=2)
    run(search)
    assert search.finished and search.ask() == [] and search.generation == 2 and len(search.best()) == 40


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("space", [Lattice(), DartsSearchSpace()], ids=["lattice", "darts"])
def test_a_restored_search_continues_identically(pending, space):
    def told(search, asked):
        search.tell(
            [
                None
                if i == 3
                else score(p.candidate)
                if isinstance(space, Lattice)
                else float(p.candidate.code.count(4))
                for i, p in enumerate(asked)
            ]
        )

    search = evolution(space, seed=5, generations=6)
    for _ in range(3):
        told(search, search.ask())
    if pending:
        search.ask()
    state = json.loads(json.dumps(search.state_dict(), allow_nan=False))
    # Another seed and a generation of its own: the state replaces both.
    restored = evolution(space, seed=99, generations=6)
    restored.ask()
    restored.load_state_dict(state)
    for _ in range(3):
        assert restored.generation == search.generation
        asked = search.ask()
        assert restored.ask() == asked
        told(search, asked)
        told(restored, asked)
    assert restored.finished and restored.best() == search.best()
    assert restored.state_dict() == search.state_dict()


def test_a_foreign_state_is_refused():
    state = evolution().state_dict()
    with pytest.raises(KeyError):
        evolution().load_state_dict({key: value for key, value in state.items() if key != "scored"})
    other = evolution(Lattice(3))
    run(other, 1)
    with pytest.raises(ValueError, match="expected 6 numbers"):
        evolution().load_state_dict(other.state_dict())


def test_failed_candidates_are_never_parents_nor_best_nor_repeated():
    search, failed, seen = evolution(seed=6, generations=8), set(), set()
    while not search.finished:
        asked = search.ask()
        assert not seen & {p.candidate for p in asked}
        seen |= {p.candidate for p in asked}
        # What would be best fails.
        bad = {p.candidate for p in asked if score(p.candidate) > -5}
        failed |= bad
        search.tell([None if p.candidate in bad else score(p.candidate) for p in asked])
    assert failed and not failed & {candidate for candidate, _ in search.best()}
    assert len(search.best()) == 160 - len(failed) and search.best(1)[0][1] == -5.0


def test_a_generation_that_fails_altogether_is_followed_by_a_random_one():
    search = evolution()
    search.tell([None] * len(search.ask()))
    assert search.best() == [] and Counter(p.origin for p in search.ask()) == {"random": 20}


def test_a_score_that_is_not_a_number_never_leads():
    search = evolution(population=3, mutants=0, crossovers=0)
    asked = search.ask()
    try:
        search.tell([1.0, math.nan, 2.0])
    except ValueError:
        return
    assert search.best(1) == [(asked[2].candidate, 2.0)]


def test_scores_must_answer_the_question():
    search = evolution()
    with pytest.raises(ValueError, match="no generation was asked for"):
        search.tell([1.0])
    search.ask()
    with pytest.raises(ValueError, match="got 3 scores, expected 20"):
        search.tell([1.0] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0, "mutants": 0, "crossovers": 0}, "population must be at least 1, got 0"),
        ({"generations": 0}, "generations must be at least 1"),
        ({"parents": 0}, "parents must be at least 1"),
        ({"max_tries": 0}, "max_tries must be at least 1"),
        ({"mutants": 16, "crossovers": 5}, "exceed the population of 20"),
        ({"mutants": -1}, "must not be negative"),
        ({"mutation_probability": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"mutation_probability": 1.1}, r"in \(0, 1\], got 1.1"),
        ({"mutation_probability": math.nan}, r"in \(0, 1\], got nan"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evolution(**settings)


def test_settings_must_be_named():
    with pytest.raises(TypeError):
        Evolution(Lattice(), 20)
