"""Rank statistics against brute force, SciPy, hand computation, and distributions whose tau is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from genas_plugins.correlation import statistics as ranking
from genas_plugins.correlation.statistics import (
    Estimate,
    compare,
    correlation_matrix,
    kendall,
    ndcg,
    partial_kendall,
    precision_at,
    rank_correlation,
)


def accuracies(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(10, 94, count)


def brute_force_tau(x, y) -> float:
    # Kendall's definition, pair by pair; tied pairs leave the denominator of their column.
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    numerator = sum(a * b for a, b in signs)
    return numerator / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def normals(correlation: list[list[float]], count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multivariate_normal(np.zeros(len(correlation)), correlation, size=count).T


def test_truth_ranks_itself_perfectly():
    truth = accuracies(300)
    found = rank_correlation(truth, truth, seed=0, resamples=100)
    assert found.tau == found.rho == found.tau_better_half == Estimate(1, 1, 1)
    assert (found.count, found.k, found.precision, found.ndcg, found.gap) == (300, 30, 1, 1, 0)
    assert found.best_accuracy == truth.max()


def test_the_reverse_of_the_truth_picks_the_worst():
    truth = accuracies(300)
    found = rank_correlation(-truth, truth, seed=0, resamples=100)
    assert found.tau == found.rho == Estimate(-1, -1, -1)
    assert found.precision == 0
    assert found.best_accuracy == truth.min()
    assert found.gap == truth.max() - truth.min()


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffled_truth_ranks_nothing(seed):
    truth = accuracies(500)
    found = rank_correlation(np.random.default_rng(seed).permutation(truth), truth, seed=seed, resamples=200)
    assert abs(found.tau.value) < 0.1
    assert found.tau.low < 0 < found.tau.high
    assert found.rho.low < 0 < found.rho.high
    assert found.tau.sign == 0


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_correlations_with_ties(levels):
    rng = np.random.default_rng(levels)
    truth = rng.integers(0, 20, 60).astype(float)
    scores = rng.integers(0, levels, 60) + truth / 100 * levels
    scores = np.floor(scores)
    found = rank_correlation(scores, truth, seed=0, resamples=40)
    assert found.tau.value == pytest.approx(brute_force_tau(scores, truth), abs=1e-11)
    assert found.rho.value == pytest.approx(stats.spearmanr(scores, truth).statistic, abs=1e-11)
    better = truth >= np.median(truth)
    assert found.tau_better_half.value == pytest.approx(brute_force_tau(scores[better], truth[better]), abs=1e-11)


def test_interval_covers_the_known_tau_of_normal_variables():
    rng = np.random.default_rng(0)
    correlation, repeats = 0.6, 80
    tau = 2 / math.pi * math.asin(correlation)
    estimates = []
    for repeat in range(repeats):
        x, y = normals([[1, correlation], [correlation, 1]], 60, rng)
        # An accuracy is between 0 and 100; the order, and so tau, stays.
        estimates.append(rank_correlation(x, 100 * stats.norm.cdf(y), seed=repeat, resamples=100).tau)
    covered = sum(estimate.low <= tau <= estimate.high for estimate in estimates)
    # 76 expected; 70 is three standard deviations below.
    assert covered >= 70
    # Too wide an interval would cover as well: compare its width with the scatter of tau over fresh samples.
    taus = [stats.kendalltau(*normals([[1, correlation], [correlation, 1]], 60, rng)).statistic for _ in range(1000)]
    width = np.mean([estimate.high - estimate.low for estimate in estimates])
    assert width == pytest.approx(np.diff(np.quantile(taus, [0.025, 0.975]))[0], rel=0.15)


@pytest.mark.parametrize("levels", [3, 1000])
def test_resamples_are_those_of_scipy(levels, monkeypatch):
    """From the signs of pairs, and one by one with SciPy as for many architectures."""
    rng = np.random.default_rng(4)
    truth = rng.uniform(10, 90, 60)
    scores, others = (np.round(truth + rng.normal(0, 20, 60)) % levels for _ in range(2))

    def estimates():
        whole = rank_correlation(scores, truth, seed=2, resamples=80)
        partial = partial_kendall(scores, truth, others, seed=2, normal=True, resamples=80)
        return [whole.tau, whole.rho, whole.tau_better_half, compare(scores, others, truth, seed=2), partial]

    found = estimates()
    monkeypatch.setattr(ranking, "FEW", 0)
    assert estimates() == found
    draws = np.random.default_rng(2)
    taus = [brute_force_tau(scores[drawn], truth[drawn]) for drawn in (draws.integers(60, size=60) for _ in range(80))]
    assert [found[0].low, found[0].high] == pytest.approx(np.quantile(taus, [0.025, 0.975]), abs=1e-11)


def test_confidence_and_seed():
    truth = accuracies(100)
    scores = truth + np.random.default_rng(1).normal(0, 30, 100)
    found = [rank_correlation(scores, truth, seed=0, resamples=400, confidence=c).tau for c in (0.5, 0.9, 0.99)]
    widths = [estimate.high - estimate.low for estimate in found]
    # Of a normal distribution these are 0.67, 1.64 and 2.58 standard deviations to either side.
    assert widths[1] / widths[0] == pytest.approx(1.645 / 0.674, rel=0.25)
    assert widths[2] / widths[1] == pytest.approx(2.576 / 1.645, rel=0.25)
    again = [rank_correlation(scores, truth, seed=s, resamples=400, confidence=0.9).tau for s in (0, 1)]
    assert again[0] == found[1] != again[1]


def test_precision_by_hand():
    truth = [90, 80, 70, 60, 50]
    # By the score the best are 70, 90 and 50.
    scores = [4, 1, 5, 2, 3]
    assert precision_at(scores, truth, 1) == 0
    assert precision_at(scores, truth, 2) == 1 / 2
    assert precision_at(scores, truth, 3) == 2 / 3
    assert precision_at(scores, truth, 0.4) == 1 / 2
    assert precision_at(scores, truth, 5) == precision_at(scores, truth, 1.0) == 1


def test_precision_with_ties():
    # Two places for the best three by the score: 90 and 70 are in the truth's three best, 50 is not.
    assert precision_at([9, 1, 9, 2, 9], [90, 80, 70, 60, 50], 2) == pytest.approx(2 * 1 / 3 / 2)
    # 80 is as good as the second best.
    assert precision_at([1, 5, 9, 2, 3], [90, 80, 80, 60, 50], 2) == 1


def test_ndcg_by_hand():
    truth = [3, 1, 2]
    # Gains 7, 1, 3; in the order of the score 3, 7, 1.
    discounts = [1, 1 / math.log2(3), 1 / 2]
    ideal = 7 + 3 * discounts[1] + 1 * discounts[2]
    assert ndcg([5, 1, 9], truth, 3) == pytest.approx((3 + 7 * discounts[1] + 1 * discounts[2]) / ideal)
    assert ndcg([5, 1, 9], truth, 1) == pytest.approx(3 / 7)
    # Tied first two: either order in the mean.
    assert ndcg([9, 1, 9], truth, 1) == pytest.approx((3 + 7) / 2 / 7)


def test_ndcg_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    truth = accuracies(400)
    scores = np.round(truth / 20 + np.random.default_rng(1).normal(0, 1, 400))
    # A common factor cancels out; without it scikit-learn casts the gains to integers, which cannot hold them.
    gains = (2**truth - 1) / 2**94
    for k in (1, 37, 400):
        expected = metrics.ndcg_score([gains], [scores], k=k)
        assert ndcg(scores, truth, k) == pytest.approx(expected, rel=1e-9)


def test_best_pick():
    found = rank_correlation([1, 7, 3, 7], [90, 80, 70, 60], seed=0, resamples=40, top=1)
    assert (found.best_accuracy, found.gap, found.precision) == (70, 20, 0)


def test_better_half_sees_what_the_whole_hides():
    # Right about which half is better, wrong within the better half.
    truth = np.arange(100.0)
    scores = np.where(truth < 50, truth, 150 - truth)
    found = rank_correlation(scores, truth, seed=0, resamples=40)
    assert found.tau_better_half.value == -1
    assert found.tau.value == pytest.approx(1 - 4 * (50 * 49 / 2) / (100 * 99))


def test_one_score_for_the_better_half_has_no_tau_there():
    truth = np.arange(20.0)
    found = rank_correlation(np.minimum(truth, 5), truth, seed=0, resamples=40)
    assert math.isnan(found.tau_better_half.value)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["tau_better_half"]["value"] is None
    assert data["tau"]["value"] == found.tau.value
    assert data["count"] == 20


def test_compare_is_paired():
    rng = np.random.default_rng(0)
    truth = accuracies(300)
    good = truth + rng.normal(0, 30, 300)
    # Nearly the same scores, a little worse: their own intervals overlap, that of the difference excludes 0.
    worse = good + rng.normal(0, 12, 300)
    taus = [rank_correlation(scores, truth, seed=0, resamples=200).tau for scores in (good, worse)]
    assert taus[1].high > taus[0].low
    difference = compare(good, worse, truth, seed=0, resamples=200)
    assert difference.value == pytest.approx(taus[0].value - taus[1].value)
    assert difference.sign == 1
    assert compare(worse, good, truth, seed=0, resamples=200).sign == -1
    assert compare(good, good, truth, seed=0, resamples=200) == Estimate(0, 0, 0)


def test_kendall_of_two_scores_is_that_of_scipy_in_its_interval():
    rng = np.random.default_rng(3)
    x = rng.integers(-4, 5, 60).astype(float)
    y = x + rng.normal(0, 400, 60)
    found = kendall(x, y, seed=0, resamples=200)
    assert found.value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.low < found.value < found.high
    # The same resamples as in a ranking.
    percent = stats.rankdata(y)
    assert found == rank_correlation(x, percent, seed=0, resamples=200).tau


def test_partial_kendall_is_the_published_formula():
    rng = np.random.default_rng(0)
    x, y, given = normals([[1, 0.5, 0.6], [0.5, 1, 0.7], [0.6, 0.7, 1]], 50, rng)
    xy, xz, yz = brute_force_tau(x, y), brute_force_tau(x, given), brute_force_tau(y, given)
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    found = partial_kendall(x, y, given, seed=0, resamples=100)
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.low < expected < found.high


def test_partial_kendall_of_columns_that_share_the_third_only():
    # Independent given the third, all three normal: Kendall's formula has a limit above 0, the other has 0.
    x, y, given = normals([[1, 0.81, 0.9], [0.81, 1, 0.9], [0.9, 0.9, 1]], 3000, np.random.default_rng(0))
    xy, xz = (2 / math.pi * math.asin(r) for r in (0.81, 0.9))
    plain = partial_kendall(x, y, given, seed=0, resamples=60)
    assert plain.value == pytest.approx((xy - xz**2) / (1 - xz**2), abs=0.03)
    assert plain.low > 0.1
    normal = partial_kendall(np.exp(x), y**3, given, seed=0, resamples=60, normal=True)
    assert normal.low < 0 < normal.high
    assert abs(normal.value) < 0.03


@pytest.mark.parametrize("normal", [False, True])
def test_partial_kendall_where_nothing_is_left(normal):
    x, y = accuracies(50), accuracies(50, seed=1)
    assert math.isnan(partial_kendall(x, y, 2 * x, seed=0, normal=normal, resamples=40).value)
    assert partial_kendall(x, x, y, seed=0, normal=normal, resamples=40).value == pytest.approx(1)


def test_correlation_matrix():
    rng = np.random.default_rng(0)
    columns = {"flatness": rng.integers(0, 9, 40), "angle": rng.normal(size=40), "accuracy": rng.random(40)}
    matrix = correlation_matrix(columns)
    values = list(columns.values())
    expected = [[brute_force_tau(a, b) for b in values] for a in values]
    np.testing.assert_allclose(matrix, expected, atol=1e-11)


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([1, 2], [1, 2], "scores must be a list of 3 or more numbers"),
        ([1, 2, 3], [[1, 2, 3]], "truth must be a list of 3 or more numbers, got shape"),
        ([1, 2, 3], [1, 2, 3, 4], "one length.*'scores': 3, 'truth': 4"),
        ([1, math.nan, math.inf, 4], [1, 2, 3, 4], "2 of 4 values of scores are not finite.*position 1: nan"),
        ([1, 2, 3, 4], [1, 2, 3, -math.inf], "1 of 4 values of truth are not finite.*position 3: -inf"),
        ([7, 7, 7], [1, 2, 3], r"All 3 values of scores are 7\.0"),
        ([1, 2, 3], [7, 7, 7], r"All 3 values of truth are 7\.0"),
        ([1, 2, 3], [1, 2, 101], r"percent, from 0 to 100, got 101\.0"),
        ([1, 2, 3], [-1, 2, 3], r"percent, from 0 to 100, got -1\.0"),
    ],
)
def test_columns_that_are_refused(scores, truth, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(scores, truth, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "integer from 1 to 3.*got 0"),
        ({"top": 4}, "integer from 1 to 3.*got 4"),
        ({"top": 1.5}, "above 0 and up to 1.0.*got 1.5"),
        ({"top": math.nan}, "got nan"),
        ({"confidence": 1.0}, "between 0 and 1, got 1.0"),
        ({"confidence": 0.0}, "between 0 and 1, got 0.0"),
        ({"resamples": 39}, "needs 40 resamples or more, got 39"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation([1, 2, 3], [1, 2, 3], seed=0, **options)


def test_words_are_no_scores():
    with pytest.raises(TypeError, match="scores must be a list of numbers"):
        rank_correlation(["good", "bad", "worse"], [1, 2, 3], seed=0)
    with pytest.raises(ValueError, match="2 of 3 values of angle"):
        correlation_matrix({"flatness": [1, 2, 3], "angle": [math.nan, math.nan, 3]})


def test_three_architectures_are_enough():
    # Resamples that draw one architecture three times have no tau and are left out.
    found = rank_correlation([1, 3, 2], [10, 30, 20], seed=0, resamples=200)
    assert found.tau == Estimate(1, 1, 1)


def test_text_of_an_estimate():
    assert str(Estimate(0.60472, 0.5897, 0.6199)) == "0.605 [0.590, 0.620]"
