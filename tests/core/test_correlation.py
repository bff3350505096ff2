"""One pass for many settings: each number as if measured by itself, and measured once."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genas_plugins.correlation import Setting, columns, evaluate, measure_raw, slope_shares
from genas_plugins.scoring import CombinedScore, CommonNoise, accuracy, flatness, flatness_from_losses, mean_loss
from genas_plugins.scoring.batchnorm import recalibrate_batchnorm

SIGMAS = (0.01, 0.05, 0.1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 7))


def batches(seed: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(7, (16,), generator=generator))
        for _ in range(count)
    ]


def setting(name: str, **score: Any) -> Setting:
    return Setting(name=name, score=CombinedScore(**{"sigmas": SIGMAS, **score}))


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("metric", ["flatness", "accuracy", "angle", "angle+flatness", "accuracy+flatness"])
def test_each_score_is_that_of_a_measurement_of_its_own(model: nn.Module, metric: str, momentum: float | None) -> None:
    chosen = setting("chosen", metric=metric, momentum=momentum, alpha=0.3)
    others = [setting("other", noise="shared"), setting("another", momentum=0.2, metric="accuracy+flatness")]
    raw = measure_raw(model, [*others, chosen], batches(1), recalibration=batches(2), angle=lambda: 0.25, seed=5)
    alone = chosen.score(
        copy.deepcopy(model),
        batches(1),
        recalibration=batches(2),
        angle=lambda: 0.25,
        generator=torch.Generator().manual_seed(5),
    )
    assert evaluate(chosen, raw) == pytest.approx(alone.score, rel=1e-9)


def test_what_settings_share_is_measured_once_and_the_model_is_left_as_it_was(model: nn.Module) -> None:
    passes = 0

    def count(*arguments: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    before = copy.deepcopy(model.state_dict())
    settings = [setting(f"alpha {alpha}", alpha=alpha) for alpha in (0.0, 1.0, 4.0)]
    settings += [setting("three draws", draws=3), setting("accuracy", metric="accuracy"), setting("loss", alpha=0.5)]
    measure_raw(model, settings, batches(1), recalibration=batches(2))
    # Two batches each: a recalibration, one pass without noise, three draws at three sigmas.
    assert passes == 2 * (1 + 1 + 3 * 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_with_the_same_noise_are_measured_once_whichever_setting_asks(model: nn.Module) -> None:
    passes = 0

    def count(*arguments: Any) -> None:
        nonlocal passes
        passes += 1

    settings = [
        *(setting(noise, noise=noise) for noise in ("cumulative", "independent", "shared", "random_walk")),
        # Two of its sigmas are new: noise of one mode is the same as far as the sigmas are.
        setting("later", sigmas=(0.01, 0.05, 0.2)),
        setting("far", sigmas=(0.01, 0.2, 0.3)),
        # Noise of its own from the first sigma on.
        setting("cells", where="cells"),
        setting("relative", relative=True),
        setting("common", common=True),
        setting("slow", momentum=0.1),
        setting("draws", draws=2, noise="shared"),
    ]
    cells = nn.Sequential()
    cells.cells = model
    source = CommonNoise(cells, 2)
    cells.forward = model.forward
    hook = cells.register_forward_hook(count)
    raw = measure_raw(cells, settings, batches(1, 1), recalibration=batches(2, 1), seed=5, common=source)
    hook.remove()
    # The first sigma of the first mode is that of three more modes and of two more settings; "later" has its second.
    own = 3 + 2 + 2 + 2 + 1 + 2 + 4 * 3 + 3
    assert passes == 2 * (1 + 1) + own
    for one in settings:
        alone = measure_raw(cells, [one], batches(1, 1), recalibration=batches(2, 1), seed=5, common=source)
        key = "cumulative" if one.score.momentum is None else "momentum 0.1"
        for name, draws in alone["statistics"][key]["losses"].items():
            assert raw["statistics"][key]["losses"][name][: len(draws)] == draws


def test_draws_differ_and_eq_4_is_of_their_mean_losses(model: nn.Module) -> None:
    several = setting("several", draws=3, alpha=0.5)
    raw = measure_raw(model, [several], batches(1), seed=7)
    draws = [
        flatness(model, batches(1), SIGMAS, generator=torch.Generator().manual_seed(7 + number)).losses
        for number in range(3)
    ]
    assert raw["statistics"]["cumulative"]["losses"] == {"cumulative, all, 0.01 0.05 0.1": [list(d) for d in draws]}
    assert len({draw[0] for draw in draws}) == 3
    means = [sum(losses) / 3 for losses in zip(*draws, strict=True)]
    expected = flatness_from_losses(means, SIGMAS, 0.5)
    assert evaluate(several, raw) == pytest.approx(expected.score, rel=1e-12)
    assert slope_shares(several, [raw]) == [pytest.approx(expected.slope_share)]


def test_settings_with_fewer_draws_share_the_first_of_those_with_more(model: nn.Module) -> None:
    few, many = setting("one"), setting("three", draws=3)
    raw = measure_raw(model, [few, many], batches(1), seed=7)
    assert [len(draws) for draws in raw["statistics"]["cumulative"]["losses"].values()] == [3]
    for one in (few, many):
        alone = one.score(model, batches(1), generator=torch.Generator().manual_seed(7))
        assert evaluate(one, raw) == pytest.approx(alone.score, rel=1e-12)


def test_common_and_relative_noise_are_measured_as_by_themselves(model: nn.Module) -> None:
    chosen = [
        setting(f"{relative} {common}", relative=relative, common=common)
        for relative in (False, True)
        for common in (False, True)
    ]
    # A seventh digit makes another sigma.
    chosen.append(setting("close", sigmas=(0.01, 0.05, 0.1000001)))
    source = CommonNoise(model, 2)
    raw = measure_raw(model, chosen, batches(1), seed=7, common=source)
    assert len(raw["statistics"]["cumulative"]["losses"]) == 5
    for one in chosen:
        alone = one.score(model, batches(1), generator=torch.Generator().manual_seed(7), common=source)
        assert evaluate(one, raw) == pytest.approx(alone.score, rel=1e-12)
    assert len({evaluate(one, raw) for one in chosen}) == 5
    with pytest.raises(ValueError, match="pass common="):
        measure_raw(model, chosen, batches(1))


def test_noise_along_eigenvectors_is_measured_as_by_itself(model: nn.Module) -> None:
    chosen = [
        setting("one", noise="hessian"),
        setting("two", noise="hessian", hessian_directions=2),
        setting("relative", noise="hessian", relative=True),
        setting("draws", noise="hessian", draws=2, alpha=0.5),
    ]
    raw = measure_raw(model, chosen, batches(1), seed=7)
    assert list(raw["statistics"]["cumulative"]["losses"]) == [
        "hessian 1 direction, all, 0.01 0.05 0.1",
        "hessian 2 directions, all, 0.01 0.05 0.1",
        "hessian 1 direction, all, 0.01 0.05 0.1, relative",
    ]
    for one in chosen:
        alone = one.score(model, batches(1), generator=torch.Generator().manual_seed(7))
        assert evaluate(one, raw) == pytest.approx(alone.score, rel=1e-12)
    assert len({evaluate(one, raw) for one in chosen}) == 4


def test_columns_have_the_loss_and_the_terms(model: nn.Module) -> None:
    chosen = [setting("flat"), setting("top", metric="accuracy")]
    raws = []
    for seed in (1, 2):
        raws.append(measure_raw(model, chosen, batches(seed), recalibration=batches(3)))
    table = columns(chosen, raws)
    recalibrate_batchnorm(model, batches(3))
    for position, seed in enumerate((1, 2)):
        flat = flatness(model, batches(seed), SIGMAS)
        assert table["-loss"][position] == pytest.approx(-mean_loss(model, batches(seed)), rel=1e-9)
        assert table["top"][position] == pytest.approx(accuracy(model, batches(seed)).top1)
        assert table["-slope: cumulative, all, 0.01 0.05 0.1"][position] == pytest.approx(-flat.slope)
        assert table["-depth: cumulative, all, 0.01 0.05 0.1"][position] == pytest.approx(-flat.depth)


def test_numbers_of_images_of_a_settings_own(model: nn.Module) -> None:
    usual = setting("usual", metric="accuracy+flatness")
    fewer = dataclasses.replace(usual, name="fewer", images=20)
    more = dataclasses.replace(usual, name="more", recalibration_images=40)
    recalibration = batches(2, 3)
    raw = measure_raw(
        model, [usual, fewer, more], batches(1), recalibration=recalibration, recalibration_images=16, seed=5
    )
    cut = [batches(1)[0], tuple(part[:4] for part in batches(1)[1])]
    for one, images, first in (
        (usual, batches(1), recalibration[:1]),
        (fewer, cut, recalibration[:1]),
        (more, batches(1), [*recalibration[:2], tuple(part[:8] for part in recalibration[2])]),
    ):
        generator = torch.Generator().manual_seed(5)
        alone = one.score(copy.deepcopy(model), images, recalibration=first, generator=generator)
        assert evaluate(one, raw) == pytest.approx(alone.score, rel=1e-9)
    names = columns([usual, fewer, more], [raw])
    assert {"-loss", "-loss (20 images)", "-loss (recalibrated on 40 images)"} <= names.keys()
    with pytest.raises(ValueError, match="asks for 33 images, there are 32"):
        measure_raw(model, [dataclasses.replace(usual, images=33)], batches(1))
    with pytest.raises(ValueError, match="recalibration_images must be at least 1, or None for all there are, got 0"):
        dataclasses.replace(usual, recalibration_images=0)


def test_what_is_not_finite_has_no_score(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.inf
    chosen = [
        setting("flat"),
        setting("both", metric="accuracy+flatness"),
        setting("bent", noise="hessian", draws=2),
    ]
    raw = measure_raw(model, chosen, batches(1))
    assert raw["statistics"]["cumulative"]["loss"] is None
    assert all(math.isnan(evaluate(one, raw)) for one in chosen)
    assert math.isnan(slope_shares(chosen[0], [raw])[0])


def test_what_cannot_be_measured_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        setting("none", draws=0)
    with pytest.raises(ValueError, match="needs the angle"):
        measure_raw(model, [setting("turned", metric="angle")], batches(1))
    with pytest.raises(ValueError, match="at least one batch of images, got none"):
        measure_raw(model, [setting("flat")], [])
