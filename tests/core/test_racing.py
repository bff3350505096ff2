"""Racing: the statistics against closed forms and simulation, the race against measuring everything."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed
from scipy import stats

from genas_plugins import SuperNet
from genas_plugins.datasets import ImageTensors
from genas_plugins.scoring import CombinedScore, CommonNoise, Measurement, MeasurementError
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.partial import Linearised, PartialScore, linearise
from genas_plugins.search import Evolution, History, Race, Record, run_search
from genas_plugins.search.racing import Entrant, beaten, check_order, round_ends, spared_images
from genas_plugins.spaces import DartsSearchSpace

SIGMAS = (0.1, 0.3, 0.7)
RACED = ("flatness", "accuracy", "angle+flatness", "accuracy+flatness", "angle+accuracy")
SPACE = DartsSearchSpace()


def formula(metric: str, means: np.ndarray, top1: float, angle: float) -> float:
    """Eq. 4 and 5 of the paper with alpha 0.5, gamma 3 and gamma_accuracy 0.2, written out."""
    slope = abs(means[1] - means[0]) / 0.2 + abs(means[2] - means[1]) / 0.4
    flat = 1 / (slope + 0.5 * means[0] / 0.1 + 1e-5)
    return {
        "flatness": flat,
        "accuracy": top1,
        "angle+flatness": angle + 3 * flat / 0.1,
        "accuracy+flatness": top1 + 3 * flat / 0.1,
        "angle+accuracy": angle + 0.2 * top1,
    }[metric]


def settings(metric: str) -> CombinedScore:
    return CombinedScore(metric=metric, sigmas=SIGMAS, alpha=0.5, gamma=3.0, gamma_accuracy=0.2)


def population(images: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Losses of one candidate with a tail, ``(images, 3)``, and its hits."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, spread, images)
    losses = np.stack([base, base * rng.lognormal(0.05, 0.1, images), base * rng.lognormal(0.2, 0.2, images)], axis=1)
    return losses, (base < 1.0).astype(float)


@pytest.mark.parametrize("metric", RACED)
def test_influence_is_the_derivative_by_an_image_s_weight(metric: str) -> None:
    losses, hits = population(40)
    linear = linearise(settings(metric), losses, hits, 0.3)

    def score(weights: np.ndarray) -> float:
        return formula(metric, weights @ losses, weights @ hits, 0.3)

    even = np.full(40, 1 / 40)
    if metric == "flatness":
        assert linear.value == pytest.approx(-1 / score(even), rel=1e-12)
    else:
        assert linear.value == pytest.approx(score(even), rel=1e-12)
    for image in range(40):
        step = 1e-6 * (np.eye(40)[image] - even)
        slope = (score(even + step) - score(even - step)) / 2e-6
        assert linear.rate * linear.influence[image] == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert linear.influence.mean() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("metric", RACED)
def test_the_standard_error_is_the_spread_of_samples_without_replacement(metric: str) -> None:
    rng = np.random.default_rng(1)
    losses, hits = population(600, spread=0.5)
    scores, errors = [], []
    for _ in range(1500):
        chosen = rng.choice(600, 300, replace=False)
        scores.append(formula(metric, losses[chosen].mean(0), hits[chosen].mean(), 0.3))
        linear = linearise(settings(metric), losses[chosen], hits[chosen], 0.3)
        errors.append(linear.rate * math.sqrt(linear.influence.var(ddof=1) / 300 * (1 - 300 / 600)))
    # 1,500 draws tell a standard deviation to 2 %.
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.07)


def test_kinks_hide_at_most_what_is_allowed_for() -> None:
    """The true value for every difference of losses within reach, by brute force."""
    rng = np.random.default_rng(2)
    tight = 0.0
    for _ in range(50):
        losses = rng.normal(2.0, 0.1, (30, 3))
        linear = linearise(settings("flatness"), losses, np.zeros(30))
        means, deviations = losses.mean(0), np.diff(losses, axis=1).std(0, ddof=1)
        steps = np.diff(means)
        reach = 0.4
        worst = 0.0
        for shifts in itertools.product(np.linspace(-reach, reach, 41), repeat=2):
            moved = steps + shifts * deviations
            true = -(np.abs(moved) / (0.2, 0.4)).sum() - 0.5 * means[0] / 0.1 - 1e-5
            tangent = -(np.sign(steps) * moved / (0.2, 0.4)).sum() - 0.5 * means[0] / 0.1 - 1e-5
            worst = max(worst, tangent - true)
        assert worst <= linear.overestimate(reach) + 1e-12
        tight = max(tight, linear.overestimate(reach))
        assert worst == pytest.approx(linear.overestimate(reach), abs=1e-9)
    assert tight > 0.1


def explicit(entrants: list[Linearised], total: int, keep: int, confidence: float, rounds: int) -> list[bool]:
    """The test as the module describes it, pair by pair."""
    count = len(entrants[0].influence)
    level = (1 - confidence) / (rounds * (len(entrants) - keep))
    quantile = stats.t.ppf(1 - level, count - 1)
    unit = math.sqrt((1 / count) * (1 - count / total))
    result = []
    for candidate in entrants:
        wins = 0
        for other in entrants:
            error = np.std(other.influence - candidate.influence, ddof=1) * unit
            hidden = sum(2 * w * max(0.0, quantile * unit * s - d) for d, s, w in other.bends)
            wins += bool(other is not candidate and other.value - hidden - candidate.value > quantile * error)
        result.append(wins >= keep)
    return result


def generation(count: int, images: int, seed: int, gap: float, spread: float = 1.0) -> list[np.ndarray]:
    """Losses of candidates on the same images: what an image is worth is common, and each is worse by ``gap``."""
    rng = np.random.default_rng(seed)
    common = rng.lognormal(0.0, spread, (images, 1))
    return [
        common
        * np.exp(gap * i + 0.3 * rng.normal(size=(images, 1)) + (0.0, 0.05, 0.2))
        * rng.lognormal(0, 0.1, (images, 3))
        for i in range(count)
    ]


@pytest.mark.parametrize(("keep", "confidence", "rounds"), [(1, 0.9, 1), (3, 0.99, 3), (11, 0.6, 2), (12, 0.6, 2)])
def test_beaten_is_the_test_pair_by_pair(keep: int, confidence: float, rounds: int) -> None:
    score = settings("flatness")
    entrants = [linearise(score, losses[:150], np.zeros(150)) for losses in generation(12, 600, 3, 0.05)]
    expected = [False] * 12 if keep == 12 else explicit(entrants, 600, keep, confidence, rounds)
    assert beaten(entrants, 600, keep=keep, confidence=confidence, rounds=rounds) == expected
    assert any(expected) == (keep < 12)


def test_pairs_beat_what_single_standard_errors_cannot() -> None:
    """Images differ far more than candidates: only on the same images are these told apart."""
    score = settings("flatness")
    losses = generation(2, 4000, 4, 0.25, spread=1.0)
    first, second = (linearise(score, one[:250], np.zeros(250)) for one in losses)
    single = math.sqrt((first.influence.var() + second.influence.var()) / 250)
    assert first.value - second.value < 2.2 * single
    assert beaten([first, second], 4000, keep=1, confidence=0.999) == [False, True]


@pytest.mark.parametrize(("metric", "gap", "spread"), [("flatness", 0.0, 1.0), ("flatness", 0.03, 1.5)])
def test_a_candidate_of_the_best_stays_with_the_confidence(metric: str, gap: float, spread: float) -> None:
    """Ties and near ties with the tails of losses: how often one of the true best would be dropped."""
    confidence, keep, lost, trials, gone = 0.9, 3, 0, 150, 0
    losses = np.stack(generation(10, 1200, 5, gap, spread))
    truth = [formula(metric, one.mean(0), 0.0, 0.0) for one in losses]
    best = set(np.argsort(truth)[-keep:].tolist())
    rng = np.random.default_rng(6)
    for _ in range(trials):
        order = rng.permutation(1200)
        out: set[int] = set()
        for count in (150, 300, 600):
            left = [i for i in range(10) if i not in out]
            entrants = [linearise(settings(metric), losses[i][order[:count]], np.zeros(count)) for i in left]
            calls = beaten(entrants, 1200, keep=keep, confidence=confidence, rounds=3)
            out |= {i for i, call in zip(left, calls, strict=True) if call}
        lost += len(out & best)
        gone += len(out - best)
    # Of each of the best, at most one search in ten; the bound is far from what happens.
    assert lost / (trials * keep) <= 1 - confidence
    assert (gone > trials) == (gap > 0)


def test_rounds_end_at_whole_batches() -> None:
    assert round_ends([64] * 16) == [2, 4, 8, 16]
    assert round_ends([512] * 48 + [424]) == [7, 13, 25, 49]
    # Below 100 images nothing is compared.
    assert round_ends([32] * 22) == [6, 11, 22]
    assert round_ends([50, 50]) == [2]
    assert round_ends([1000]) == [1]


def test_images_in_the_order_of_their_classes_are_refused() -> None:
    labels = np.repeat(np.arange(10), 100)
    with pytest.raises(ValueError, match="random order, but the first 125 of 1000 have other classes"):
        check_order(labels, 125)
    for seed in range(50):
        check_order(np.random.default_rng(seed).permutation(labels), 125)
    check_order(labels, 1000)
    check_order(np.zeros(1000, int), 125)


@pytest.mark.parametrize("confidence", [0.5, 1.0, -1.0, math.nan])
def test_a_confidence_is_between_a_half_and_one(confidence: float) -> None:
    with pytest.raises(ValueError, match=f"larger than 0.5 and smaller than 1, .* got {confidence}"):
        Race(lambda candidate: None, [1], confidence, 1)


def test_what_cannot_be_raced() -> None:
    with pytest.raises(ValueError, match="'angle' reads no images"):
        PartialScore(CombinedScore(metric="angle"))
    with pytest.raises(ValueError, match="'hessian' depends on the images"):
        PartialScore(CombinedScore(noise="hessian"))


def test_spared_images() -> None:
    named = {"index": 0, "generation": 0, "origin": "random"}
    seen = [("ok", None), ("dropped", 25), ("failed", None), ("dropped", 50)]
    records = [Record(**named, status=status, images=images) for status, images in seen]
    assert spared_images(records, 100) == (75 + 50) / 400


@pytest.fixture(scope="module")
def net() -> SuperNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SuperNet(4, init_channels=4, num_cells=3)


def images(count: int, batch: int) -> TensorBatches:
    rng = np.random.default_rng(7)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
    data = ImageTensors(pixels, torch.from_numpy(rng.integers(0, 4, count)), tuple("abcd"))
    return TensorBatches(data, batch, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("metric", RACED)
@pytest.mark.parametrize("options", [{}, {"draws": 2, "noise": "shared", "relative": True}, {"common": True}])
def test_slice_by_slice_a_score_is_the_same_to_the_last_bit(
    metric: str, options: dict[str, Any], net: SuperNet
) -> None:
    score = CombinedScore(metric=metric, sigmas=(0.01, 0.05, 0.1), **options)
    genotype = SPACE.sample(np.random.default_rng(0))
    batches, recalibration = images(26, 4), images(8, 4)

    def sources() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        return {
            "angle": lambda: 0.25,
            "generator": generator,
            "common": CommonNoise(net, 1),
            "recalibration": recalibration,
        }

    whole = score(net.subnet(genotype), batches, **sources())
    partial = PartialScore(score)
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        partial.extend(net.subnet(genotype), batches.section(start, stop), **sources())
        assert partial.count == min(4 * stop, 26)
        # On the way it is the score on the images so far.
        assert partial.measurement() == score(net.subnet(genotype), batches.limit(partial.count), **sources())
    assert partial.measurement() == whole
    assert partial.standard_error(26) == 0.0 < partial.standard_error(52)


@pytest.mark.parametrize("metric", ["angle+flatness", "angle+accuracy"])
def test_another_process_goes_on_to_the_same_last_bit(metric: str, net: SuperNet) -> None:
    score = CombinedScore(metric=metric, sigmas=(0.01, 0.05, 0.1), draws=2)
    genotype = SPACE.sample(np.random.default_rng(0))
    batches, recalibration = images(26, 4), images(8, 4)

    def sources() -> dict[str, Any]:
        return {"angle": lambda: 0.25, "generator": torch.Generator().manual_seed(5), "recalibration": recalibration}

    whole = score(net.subnet(genotype), batches, **sources())
    # Each slice by another one, which knows of the ones before it what a pickle holds.
    partial = PartialScore(score)
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        fresh = PartialScore(score)
        fresh.load_state_dict(pickle.loads(pickle.dumps(partial.state_dict())))
        partial = fresh
        partial.extend(net.subnet(genotype), batches.section(start, stop), **sources())
    assert partial.measurement() == whole
    assert partial.linearise(13).influence.shape == (13,)


@pytest.mark.parametrize(
    ("metric", "common", "message"),
    [("angle+flatness", False, "needs the angle"), ("flatness", True, "their supernet")],
)
def test_a_slice_needs_what_the_score_needs(metric: str, common: bool, message: str, net: SuperNet) -> None:
    partial = PartialScore(CombinedScore(metric=metric, common=common))
    with pytest.raises(ValueError, match=message):
        partial.extend(net.subnet(SPACE.sample(np.random.default_rng(0))), images(8, 8))


def test_sections_are_the_batches_themselves() -> None:
    batches = images(52, 8)
    for (ours, labels), (theirs, expected) in zip(batches.section(2, 7), list(batches)[2:7], strict=True):
        assert torch.equal(ours, theirs) and torch.equal(labels, expected)
    for start, stop in ((0, 8), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match=f"<= 7 batches, but got {start} and {stop}"):
            batches.section(start, stop)


class Runner:
    """An entrant whose losses are known: worse by the number of separable convolutions."""

    ends = (100, 200, 400, 800)
    common = np.random.default_rng(8).lognormal(0.0, 1.0, 800)

    def __init__(self, genotype: Any, fails: int | None = None) -> None:
        rng = np.random.default_rng(abs(hash(genotype.code)) % 2**32)
        worse = math.exp(0.2 * genotype.code.count(4) + 0.01 * rng.normal())
        own = self.common * worse * rng.lognormal(0.0, 0.1, 800)
        self.losses = np.stack([own, own * 1.1, own * 1.3], axis=1)
        self.score = CombinedScore(sigmas=SIGMAS)
        self.fails = fails
        self.count = 0

    def advance(self) -> None:
        self.count = next(end for end in self.ends if end > self.count)
        if self.fails is not None and self.count > self.fails:
            raise MeasurementError("The validation loss at sigma 0.1 is nan.")

    def linearise(self, count: int) -> Linearised:
        assert count <= self.count
        return linearise(self.score, self.losses[:count], np.zeros(count))

    def measurement(self) -> Measurement:
        return Measurement(1 / -self.linearise(self.count).value)

    def standard_error(self, total: int) -> float:
        return 1.0 - self.count / total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def evolution() -> Evolution:
    return Evolution(SPACE, population=16, generations=3, parents=4, mutants=6, crossovers=6, seed=1)


def unraced(genotype: Any) -> Measurement:
    runner = Runner(genotype)
    while runner.count < 800:
        runner.advance()
    return runner.measurement()


def race(enter: Any = Runner) -> Race:
    return Race(enter, Runner.ends, 0.99, 4)


def timeless(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_raced_search_finds_the_best_with_their_scores() -> None:
    whole, raced = evolution(), evolution()
    everything = run_search(whole, unraced)
    records = run_search(raced, unraced, race=race())
    assert raced.best(4) == whole.best(4)
    dropped = [record for record in records if record["status"] == "dropped"]
    assert 10 < len(dropped) < 44
    for record, full in zip(timeless(records), timeless(everything), strict=True):
        if record["status"] == "ok":
            assert record == full
        else:
            assert record["candidate"] == full["candidate"] and record["score"] is None
            assert record["images"] in (100, 200, 400)
            assert record["standard_error"] == 1 - record["images"] / 800
            assert record["estimate"] > 0
    assert not {tuple(record["candidate"]) for record in dropped} & {c.code for c, _ in raced.best()}


@pytest.mark.parametrize("killed_at", [1, 7, 16, 21, 40, 47])
def test_a_raced_search_goes_on_in_the_middle_of_a_generation(killed_at: int, tmp_path: Any) -> None:
    expected = timeless(run_search(evolution(), unraced, race=race()))

    def kill(record: dict[str, Any]) -> None:
        if record["index"] == killed_at:
            raise KeyboardInterrupt

    path = tmp_path / "history.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_search(evolution(), unraced, history=History(path), on_record=kill, race=race())
    assert len(History(path).records) == killed_at + 1
    assert timeless(run_search(evolution(), unraced, history=History(path), race=race())) == expected
    assert timeless(History(path).records) == expected
    # All is known now.
    assert timeless(run_search(evolution(), unraced, history=History(path), race=race(None))) == expected


def test_what_a_candidate_beat_that_fails_later_goes_on() -> None:
    """The best fail on the last slice: those that they had beaten are measured on all images after all."""
    proposals = [SPACE.sample(np.random.default_rng(seed)) for seed in range(12)]
    ranked = sorted(proposals, key=lambda g: -unraced(g).score)
    broken = set(ranked[:3])
    plain = Race(Runner, Runner.ends, 0.99, 3).run(proposals, [])
    assert any(finish.error is not None for finish in plain)
    made: dict[Any, Entrant] = {}

    def enter(genotype: Any) -> Runner:
        made[genotype] = Runner(genotype, fails=400 if genotype in broken else None)
        return made[genotype]

    finishes = Race(enter, Runner.ends, 0.99, 3).run(proposals, [])
    for genotype, finish in zip(proposals, finishes, strict=True):
        assert finish.error is None
        assert (finish.measurement is None) == (finish.reason is not None) == (genotype in broken)
        assert made[genotype].count == 800
    # Who fails on the first slice has beaten nobody.
    early = Race(lambda g: Runner(g, fails=0 if g in broken else None), Runner.ends, 0.99, 3).run(proposals, [])
    assert sum(finish.reason is not None for finish in early) == 3
    assert any(finish.error is not None for finish in early)


# Races in both processes, one after another in the same group.
PROCESS = """
import json
import sys
from datetime import timedelta

import torch

from genas_plugins.search import History, SharedSearch, run_search

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, TESTS)
import test_racing

store = torch.distributed.FileStore(f"{folder}/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
report = {}


def search(name, error=None, file=None, generations=3, rounds_otherwise=False):
    class Runner(test_racing.Counted):
        calls = []

        def advance(self):
            if error is not None and rank == 1 and len(self.calls) == 20:
                raise error
            super().advance()

        def linearise(self, count):
            found = super().linearise(count)
            if rounds_otherwise and rank == 1:
                return type(found)(-found.value, found.influence, found.rate, found.bends)
            return found

    evolution = test_racing.evolution()
    evolution.generations = generations
    history = None if file is None else History(f"{folder}/{file}", read_only=rank > 0)
    try:
        shared = SharedSearch.current()
        records = run_search(evolution, None, history=history, race=test_racing.race(Runner), shared=shared)
        report[name] = {"records": [record.to_dict() for record in records], "calls": len(Runner.calls)}
    except BaseException as error:
        report[name] = {"error": type(error).__name__, "text": str(error)}


search("whole")
search("short", file="resumed.jsonl", generations=2)
search("resumed", file="resumed.jsonl" if rank == 0 else "nothing.jsonl")
search("otherwise", rounds_otherwise=True)
search("error", RuntimeError("out of memory"))
with open(f"{folder}/report{rank}.json", "w") as file:
    json.dump(report, file)
torch.distributed.destroy_process_group()
"""


class Counted(Runner):
    """One that counts the slices that are measured, and fails now and then."""

    calls: ClassVar[list[int]] = []

    def __init__(self, genotype: Any) -> None:
        super().__init__(genotype, fails=200 if genotype.code[0] < 3 else None)

    def advance(self) -> None:
        self.calls.append(self.count)
        super().advance()


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None], warm: Any
) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without the gloo backend")
    folder = tmp_path_factory.mktemp("racing")
    two_processes(warm("torch"), folder, PROCESS.replace("TESTS", repr(str(Path(__file__).parent))))
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["whole", "resumed", "otherwise"])
def test_a_shared_race_is_that_of_one_process(
    name: str, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "calls", [])
    expected = timeless(run_search(evolution(), unraced, race=race(Counted)))
    assert {record["status"] for record in expected} == {"ok", "failed", "dropped"}
    first, second = (report[name] for report in reports)
    assert first["records"] == second["records"]
    assert timeless(first["records"]) == expected
    if name == "whole":
        # All slices once, and half of them each: in a round, one has at most one candidate more.
        assert first["calls"] + second["calls"] == len(Counted.calls)
        assert abs(first["calls"] - second["calls"]) < 0.2 * len(Counted.calls)


def test_an_error_in_one_process_ends_a_race_in_both(reports: list[dict[str, Any]]) -> None:
    first, second = (report["error"] for report in reports)
    assert second == {"error": "RuntimeError", "text": "out of memory"}
    assert first["error"] == "SharedSearchError" and first["text"].endswith("RuntimeError: out of memory")
