"""The DARTS space by enumeration: size, uniformity, mutation, crossover, repair, neighbours."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from genas_plugins import Genotype
from genas_plugins.spaces import DartsSearchSpace

OFFSETS = {2: 0, 3: 2, 4: 5, 5: 9}
SPACE = DartsSearchSpace()


def slices(code):
    """The operation numbers of the eight nodes, normal cell first."""
    return [tuple(code[c + o : c + o + n]) for c in (0, 14) for n, o in OFFSETS.items()]


def node_choices(node: int) -> list[tuple[int, ...]]:
    return [ops for ops in itertools.product(range(8), repeat=node) if sum(op > 0 for op in ops) == 2]


def is_valid(genotype: Genotype) -> bool:
    return all(sum(op > 0 for op in ops) == 2 for ops in slices(genotype.code))


def samples(count: int, seed: int = 0) -> list[Genotype]:
    rng = np.random.default_rng(seed)
    return [SPACE.sample(rng) for _ in range(count)]


class Unrepaired(DartsSearchSpace):
    """Keeps the code that would be repaired."""

    def repair(self, code, rng):
        self.raw = list(code)
        return super().repair(code, rng)


def uniform(counts: Counter, cells: int) -> float:
    """The p-value of a uniform distribution over ``cells``, those never seen included."""
    assert len(counts) <= cells
    return chisquare([*counts.values(), *[0] * (cells - len(counts))]).pvalue


def test_size_by_enumeration():
    counts = {node: len(node_choices(node)) for node in OFFSETS}
    assert counts == {node: math.comb(node, 2) * 49 for node in OFFSETS} == {2: 49, 3: 147, 4: 294, 5: 490}
    assert SPACE.size == (49 * 147 * 294 * 490) ** 2 == 1_076_746_950_455_072_400


def test_sampling_is_uniform_and_independent():
    drawn = [slices(genotype.code) for genotype in samples(3000)]
    for node, cells in ((0, 49), (1, 147), (4, 49), (5, 147)):
        counts = Counter(nodes[node] for nodes in drawn)
        assert set(counts) <= set(node_choices(2 + node % 4)) and uniform(counts, cells) > 1e-3
    inputs = [[tuple(i for i, op in enumerate(ops) if op) for ops in nodes] for nodes in drawn]
    assert uniform(Counter(pairs[3] for pairs in inputs), 10) > 1e-3
    assert uniform(Counter((pairs[3], pairs[7]) for pairs in inputs), 100) > 1e-3
    assert uniform(Counter((pairs[2], pairs[3]) for pairs in inputs), 60) > 1e-3
    operations = Counter(op for nodes in drawn for ops in nodes for op in ops if op)
    assert uniform(operations, 7) > 1e-3


def test_the_generator_alone_decides():
    state = np.random.get_state()[1].copy()
    assert samples(5) == samples(5) != samples(5, seed=1)
    first = samples(2)
    for call in (lambda rng: SPACE.mutate(first[0], 0.3, rng), lambda rng: SPACE.crossover(*first, rng)):
        assert call(np.random.default_rng(4)) == call(np.random.default_rng(4))
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_mutants_are_valid_and_both_cells_change(probability):
    rng, space = np.random.default_rng(0), Unrepaired()
    redrawn, changed = [], [0, 0]
    for parent in samples(400):
        mutant = space.mutate(parent, probability, rng)
        assert is_valid(mutant)
        redrawn.append([a != b for a, b in zip(parent.code, space.raw, strict=True)])
        for half in (0, 1):
            changed[half] += mutant.code[14 * half : 14 * half + 14] != parent.code[14 * half : 14 * half + 14]
    # A redrawn edge keeps its operation with chance 1/8; four standard errors over 400 x 28 edges.
    chance = probability * 7 / 8
    assert abs(np.mean(redrawn) - chance) < 4 * math.sqrt(chance * (1 - chance) / (400 * 28))
    # Each of the 28 edges, and so both cells, has that chance.
    assert np.abs(np.mean(redrawn, 0) - chance).max() < 4 * math.sqrt(chance * (1 - chance) / 400)
    assert min(changed) > 200


def test_crossover_takes_every_edge_from_a_parent():
    rng, space = np.random.default_rng(0), Unrepaired()
    parents = samples(600)
    from_first = from_second = 0
    for first, second in zip(parents[::2], parents[1::2], strict=True):
        child = space.crossover(first, second, rng)
        assert is_valid(child)
        for a, b, raw in zip(first.code, second.code, space.raw, strict=True):
            assert raw in (a, b)
            if a != b:
                from_first, from_second = from_first + (raw == a), from_second + (raw == b)
    assert chisquare([from_first, from_second]).pvalue > 1e-3
    assert all(SPACE.crossover(parent, parent, rng) == parent for parent in parents[:20])


def test_nodes_on_which_the_parents_agree_are_inherited():
    rng = np.random.default_rng(0)
    for first, other in zip(samples(50), samples(50, seed=1), strict=True):
        second = Genotype.from_code((*first.code[:5], *other.code[5:19], *first.code[19:]))
        child = SPACE.crossover(first, second, rng)
        assert child.code[:5] == first.code[:5] and child.code[19:] == first.code[19:]


def test_repair_is_uniform_and_changes_no_more_than_needed():
    rng = np.random.default_rng(0)
    rest = list(samples(1)[0].code[:23])
    dropped, added = Counter(), Counter()
    for _ in range(1500):
        code = SPACE.repair([*rest, 1, 2, 3, 4, 5], rng).code
        kept = [op for op in code[23:] if op]
        assert list(code[:23]) == rest and len(kept) == 2 and all(op in (0, i + 1) for i, op in enumerate(code[23:]))
        dropped[tuple(kept)] += 1
        code = SPACE.repair([*rest, 0, 6, 0, 0, 0], rng).code
        assert code[24] == 6 and list(code[:23]) == rest
        added[code[23:]] += 1
    assert uniform(dropped, 10) > 1e-3 and uniform(added, 4 * 7) > 1e-3
    assert is_valid(SPACE.repair([0] * 28, rng)) and is_valid(SPACE.repair([7] * 28, rng))


def test_one_input_is_read_and_repaired_and_none_of_a_search():
    fair = SPACE.read("fairdarts_b_c10")
    assert [sum(op > 0 for op in ops) for ops in slices(fair.code)] == [2, 1, 2, 1, 2, 2, 2, 2]
    rng = np.random.default_rng(0)
    for child in (SPACE.mutate(fair, 0.0, rng), SPACE.crossover(fair, fair, rng)):
        assert is_valid(child)
        assert all(new == old for new, old in zip(child.code, fair.code, strict=True) if old)
    assert SPACE.to_json(fair) == list(fair.code)
    message = "Node 3 of the normal cell has one input, and the nodes of this space have two.*genas score"
    sample = SPACE.to_sample(child) | {f"normal/op_3_{position}": "none" for position in (0,)}
    for call, value in ((SPACE.from_json, fair.code), (SPACE.to_sample, fair), (SPACE.from_sample, sample)):
        with pytest.raises(ValueError, match=message):
            call(value)


def test_neighbours_by_brute_force():
    for genotype in samples(4, seed=2):
        nodes = slices(genotype.code)
        expected = set()
        for position, ops in enumerate(nodes):
            edges = {(source, op) for source, op in enumerate(ops) if op}
            for choice in node_choices(len(ops)):
                other = {(source, op) for source, op in enumerate(choice) if op}
                if len(edges & other) == 1:
                    (gone,), (new,) = edges - other, other - edges
                    if gone[0] == new[0] or gone[1] == new[1]:
                        changed = [*nodes[:position], choice, *nodes[position + 1 :]]
                        expected.add(Genotype.from_code(itertools.chain(*changed)))
        found = list(SPACE.neighbours(genotype))
        # 16 edges with six other operations each; 0, 1, 2 and 3 free inputs for two edges a node and cell.
        assert len(found) == len(set(found)) == 16 * 6 + 2 * 2 * (0 + 1 + 2 + 3)
        assert set(found) == expected and genotype not in expected


def test_json_form_is_the_code():
    genotype = samples(1)[0]
    assert SPACE.to_json(genotype) == list(genotype.code)
    assert SPACE.from_json(SPACE.to_json(genotype)) == genotype
    with pytest.raises(ValueError, match="28 operation numbers"):
        SPACE.from_json([1, 2, 3])
