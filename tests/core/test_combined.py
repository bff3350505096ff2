"""Combined scores: Eq. 5 and the shares of its terms by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins import SuperNet
from genas_plugins.scoring import (
    METRICS,
    Accuracy,
    CombinedScore,
    CommonNoise,
    MeasurementError,
    accuracy,
    flatness,
    flatness_from_losses,
    recalibrate_batchnorm,
)
from genas_plugins.spaces import DartsSearchSpace

SIGMAS = (1e-3, 3e-3, 6e-3)
# Slope 0.02 / 0.002 + 0.09 / 0.003 = 40, depth 960 at alpha 1: F = 1 / 1000.00001.
FLAT = flatness_from_losses([0.96, 0.98, 1.07], SIGMAS)
TOP = Accuracy(0.4, 0.8)
EQ5 = 1e3 / 1000.00001


@pytest.mark.parametrize(
    ("settings", "parts", "terms"),
    [
        ({"metric": "flatness"}, {"flat": FLAT}, {"flatness": 1 / 1000.00001}),
        ({"metric": "angle"}, {"angle": 0.3}, {"angle": 0.3}),
        ({"metric": "accuracy"}, {"top": TOP}, {"accuracy": 0.4}),
        ({"metric": "angle+flatness"}, {"angle": 0.3, "flat": FLAT}, {"angle": 0.3, "flatness": 16 * EQ5}),
        (
            {"metric": "accuracy+flatness", "gamma": 32.0},
            {"top": TOP, "flat": FLAT},
            {"accuracy": 0.4, "flatness": 32 * EQ5},
        ),
        ({"metric": "angle+accuracy"}, {"angle": 0.3, "top": TOP}, {"angle": 0.3, "accuracy": 0.04}),
        (
            {"metric": "angle+accuracy", "gamma_accuracy": 2.0},
            {"angle": 0.3, "top": TOP},
            {"angle": 0.3, "accuracy": 0.8},
        ),
    ],
)
def test_scores_and_shares_by_hand(settings, parts, terms):
    result = CombinedScore(sigmas=SIGMAS, **settings).combine(**parts)
    score = sum(terms.values())
    assert result.score == pytest.approx(score, rel=1e-12)
    expected = {name: term / score for name, term in terms.items()}
    if "flat" in parts:
        expected["slope"] = 40 / 1000.00001
    assert result.shares == pytest.approx(expected, rel=1e-9)
    assert CombinedScore(sigmas=SIGMAS, **settings).metrics == frozenset(terms)


def test_plain_data_leaves_out_what_was_not_measured():
    data = CombinedScore(metric="angle+flatness", sigmas=SIGMAS).combine(FLAT, angle=0.3).to_dict()
    assert data["losses"] == [0.96, 0.98, 1.07] and data["sigmas"] == list(SIGMAS) and data["angle"] == 0.3
    assert data["slope"] == pytest.approx(40) and data["depth"] == pytest.approx(960)
    assert "top1" not in data
    assert CombinedScore(metric="accuracy").combine(top=TOP).to_dict() == {
        "score": 0.4,
        "shares": {"accuracy": 1.0},
        "top1": 0.4,
        "top5": 0.8,
    }


@pytest.fixture(scope="module")
def parts():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SuperNet(4, init_channels=4, num_cells=3)
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)) for _ in range(2)
    ]
    return net, DartsSearchSpace().sample(np.random.default_rng(0)), data[:1], data[1:]


@pytest.mark.parametrize("metric", METRICS)
def test_a_call_measures_what_the_metric_names(parts, metric):
    net, genotype, train, valid = parts
    before = {name: value.clone() for name, value in net.state_dict().items()}
    score = CombinedScore(
        metric=metric, sigmas=SIGMAS, alpha=0.5, noise="shared", where="cells", momentum=0.1, relative=True, draws=2
    )
    result = score(
        net.subnet(genotype),
        valid,
        recalibration=train,
        angle=lambda: 0.25,
        generator=torch.Generator().manual_seed(3),
    )
    subnet = net.subnet(genotype)
    recalibrate_batchnorm(subnet, train, 0.1)
    generator = torch.Generator().manual_seed(3)
    flat = flatness(subnet, valid, SIGMAS, 0.5, "shared", "cells", generator, relative=True, draws=2)
    assert result.flatness == (flat if "flatness" in metric else None)
    assert result.accuracy == (accuracy(subnet, valid) if "accuracy" in metric else None)
    assert result.angle == (0.25 if "angle" in metric else None)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_recalibration_is_optional_and_the_angle_needs_none(parts):
    net, genotype, train, valid = parts
    subnet = net.subnet(genotype)
    before = {name: value.clone() for name, value in subnet.state_dict().items()}
    CombinedScore(sigmas=SIGMAS)(subnet, valid)
    CombinedScore(metric="angle")(subnet, valid, recalibration=train, angle=lambda: 0.5)
    assert all(torch.equal(value, before[name]) for name, value in subnet.state_dict().items())


def test_named_parameters_are_passed_on(parts):
    net, genotype, _, valid = parts
    subnet = net.subnet(genotype)
    result = CombinedScore(sigmas=SIGMAS)(subnet, valid, parameters=["classifier.bias"])
    assert result.flatness == flatness(subnet, valid, SIGMAS, parameters=["classifier.bias"])


def test_common_noise_is_that_of_the_supernet_and_not_of_the_generator(parts):
    net, genotype, _, valid = parts
    subnet = net.subnet(genotype)
    common = CommonNoise(net, 6)
    score = CombinedScore(sigmas=SIGMAS, common=True)
    results = [score(subnet, valid, common=common, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert results[0] == results[1]
    assert results[0].flatness == flatness(subnet, valid, SIGMAS, common=common)
    # Handed in, but not asked for.
    assert CombinedScore(sigmas=SIGMAS)(subnet, valid, common=common).flatness == flatness(subnet, valid, SIGMAS)
    with pytest.raises(ValueError, match="pass common="):
        score(subnet, valid)


def test_noise_along_eigenvectors_is_that_of_the_generator(parts):
    _, _, _, valid = parts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2))
        subnet = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))
    score = CombinedScore(sigmas=SIGMAS, noise="hessian", hessian_directions=2, draws=2)
    result = score(subnet, valid, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert result.flatness == flatness(
        subnet, valid, SIGMAS, noise="hessian", generator=generator, draws=2, hessian_directions=2
    )
    assert result.flatness != flatness(subnet, valid, SIGMAS, noise="hessian", generator=generator, draws=2)


def test_a_score_that_is_not_finite_is_a_measurement_error():
    with pytest.raises(MeasurementError, match="angle nan"):
        CombinedScore(metric="angle").combine(angle=math.nan)


def test_a_missing_angle_is_refused(parts):
    with pytest.raises(ValueError, match="pass angle="):
        CombinedScore(metric="angle+flatness")(parts[0], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "flat"}, "valid metrics: flatness, angle, accuracy"),
        ({"sigmas": (2e-3,)}, "at least two positive"),
        ({"noise": "gauss"}, "Unknown noise 'gauss'; valid choices: cumulative"),
        ({"where": "stem"}, "Unknown where 'stem'; valid choices: all, cells"),
        ({"noise": "hessian", "common": True}, "'hessian' cannot be common"),
        ({"hessian_directions": 0}, "hessian_directions must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"gamma": math.nan}, "gamma must be at least 0"),
        ({"gamma_accuracy": -0.1}, "gamma_accuracy must be at least 0"),
        ({"momentum": 0.0}, r"in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CombinedScore(**settings)
