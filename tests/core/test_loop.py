"""The search loop: a killed search continues to the same records, a failed candidate does not end it."""

from __future__ import annotations

import hashlib
import json
import logging
import math

import numpy as np
import pytest
import torch

from genas_plugins import SuperNet
from genas_plugins.scoring import CombinedScore, Measurement, MeasurementError
from genas_plugins.search import Evolution, History, HistoryError, candidate_seed, run_search
from genas_plugins.spaces import DartsSearchSpace

SPACE = DartsSearchSpace()


def evolution(seed: int = 0, **settings) -> Evolution:
    defaults = {"population": 8, "generations": 4, "parents": 3, "mutants": 3, "crossovers": 3}
    return Evolution(SPACE, seed=seed, **{**defaults, **settings})


class Measure:
    """Counts separable convolutions; can be killed or fail at a call."""

    def __init__(self, *, kill: int | None = None, fail: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.kill, self.fail = kill, fail

    def __call__(self, genotype) -> Measurement:
        if self.kill == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(genotype.code)
        if len(self.calls) - 1 in self.fail:
            raise MeasurementError("The validation loss at sigma 0.001 is nan.")
        return Measurement(genotype.code.count(4) / 3, {"separable": 1.0})


def timeless(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.jsonl"


def test_records_say_what_was_measured(path):
    measure, seen = Measure(), []
    records = run_search(evolution(), measure, history=History(path), on_record=seen.append)
    assert seen == records == [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(32))
    assert [record["generation"] for record in records] == [i // 8 for i in range(32)]
    assert [tuple(record["candidate"]) for record in records] == measure.calls
    assert all(record["score"] == record["candidate"].count(4) / 3 for record in records)
    assert all(record["status"] == "ok" and record["seconds"] >= 0 for record in records)
    assert [r["origin"] for r in records[8:16]] == ["mutation"] * 3 + ["crossover"] * 3 + ["random"] * 2
    assert len({str(record["candidate"]) for record in records}) == 32


@pytest.mark.parametrize("killed_at", [0, 1, 7, 8, 9, 20, 31])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_killed_search_ends_as_if_it_had_not_been(path, killed_at, cut):
    fail = (2, 12)
    expected = timeless(run_search(evolution(), Measure(fail=fail)))
    with pytest.raises(KeyboardInterrupt):
        run_search(evolution(), Measure(kill=killed_at, fail=fail), history=History(path))
    if cut and killed_at:
        path.write_bytes(path.read_bytes()[:-cut])
    history, measure, search = History(path), Measure(), evolution()
    known = len(history.records)
    assert known == max(0, killed_at - bool(cut))
    measure.fail = tuple(index - known for index in fail)
    records = run_search(search, measure, history=history)
    assert timeless(records) == expected == timeless(History(path).records)
    # Replayed records are not measured again.
    assert len(measure.calls) == 32 - known
    uninterrupted = evolution()
    run_search(uninterrupted, Measure(fail=fail))
    assert search.best() == uninterrupted.best()


def test_a_complete_history_is_replayed_without_measuring(path):
    records = run_search(evolution(), Measure(), history=History(path))
    before = path.read_bytes()
    assert run_search(evolution(), Measure(kill=0), history=History(path)) == records
    assert path.read_bytes() == before


def test_a_longer_search_continues_a_shorter_one(path):
    short = run_search(evolution(generations=2), Measure(), history=History(path))
    measure = Measure()
    records = run_search(evolution(), measure, history=History(path))
    assert records[:16] == short and len(measure.calls) == 16
    assert timeless(records) == timeless(run_search(evolution(), Measure()))


@pytest.mark.parametrize("replay", [{"seed": 1}, {"mutants": 2}, {"parents": 1}])
def test_a_history_of_another_search_is_refused(path, replay):
    run_search(evolution(), Measure(), history=History(path))
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=r"Record \d+ of .*history.jsonl.*other settings or another seed"):
        run_search(evolution(**replay), Measure(kill=0), history=History(path))
    assert path.read_bytes() == before


def test_a_history_out_of_order_is_refused(path):
    run_search(evolution(), Measure(), history=History(path))
    path.write_text(path.read_text().replace('"index": 7,', '"index": 8,'))
    with pytest.raises(HistoryError, match=r"Line 8 of .* has the index 8 where 7 belongs: remove it"):
        run_search(evolution(), Measure(), history=History(path))


def test_a_restored_evolution_goes_on(path):
    expected = timeless(run_search(evolution(), Measure()))
    search = evolution()
    for start in (0, 8):
        search.ask()
        search.tell([record["score"] for record in expected[start : start + 8]])
    restored = evolution(seed=9)
    restored.load_state_dict(json.loads(json.dumps(search.state_dict())))
    assert timeless(run_search(restored, Measure())) == expected[16:]


def test_a_failed_candidate_is_recorded_and_the_search_goes_on(path, caplog):
    search = evolution()
    with caplog.at_level(logging.WARNING, "genas_plugins"):
        records = run_search(search, Measure(fail=(3,)), history=History(path))
    assert "Candidate 3 failed" in caplog.text
    failed = [record for record in records if record["status"] == "failed"]
    assert [record["index"] for record in failed] == [3] and len(records) == 32
    assert failed[0]["score"] is None and failed[0]["reason"] == "The validation loss at sigma 0.001 is nan."
    assert failed[0]["candidate"] not in [list(candidate.code) for candidate, _ in search.best()]


def test_other_errors_end_the_search_with_the_records_kept(path):
    def measure(genotype):
        if History(path).records[2:]:
            raise RuntimeError("out of memory")
        return Measurement(1.0)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_search(evolution(), measure, history=History(path))
    assert len(History(path).records) == 3


def test_candidate_seeds_are_published_digests():
    digest = hashlib.sha256(b"[3, [1, 2]]").hexdigest()
    assert candidate_seed(3, [1, 2]) == int(digest[:14], 16)
    seeds = {candidate_seed(seed, [a, b]) for seed in range(3) for a in range(5) for b in range(5)}
    assert len(seeds) == 75 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_real_search_with_a_diverged_operation(path):
    """Flatness on a supernet of which one operation is broken: its paths fail, the others are ranked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SuperNet(4, init_channels=4, num_cells=3)
    with torch.no_grad():
        net.cells[0]._ops[0]._ops["4"].op[1].weight.fill_(math.nan)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4)]
    score = CombinedScore(sigmas=(1e-3, 3e-3))
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def measure(genotype):
        noise = torch.Generator().manual_seed(candidate_seed(0, list(genotype.code)))
        return score(net.subnet(genotype), data, recalibration=data, generator=noise)

    def search():
        return evolution(population=10, generations=2, mutants=5)

    with pytest.raises(KeyboardInterrupt):
        run_search(
            search(),
            lambda g: measure(g) if len(History(path).records) < 13 else Measure(kill=0)(g),
            history=History(path),
        )
    resumed = run_search(search(), measure, history=History(path))
    assert timeless(resumed) == timeless(run_search(search(), measure))
    # The broken operation is on edge 0 of the normal cell, which is the first of three.
    assert [r["status"] == "failed" for r in resumed] == [r["candidate"][0] == 4 for r in resumed]
    assert 0 < sum(r["status"] == "failed" for r in resumed) < 10
    for name, value in net.state_dict().items():
        assert np.array_equal(value.numpy(), before[name].numpy(), equal_nan=True)
