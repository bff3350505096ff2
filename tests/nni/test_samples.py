"""Any NNI space behind the search: drawing samples, fixing a path, and what a path's measurement equals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection

import nni
import numpy as np
import pytest
import torch
from nni.mutable import ExpressionConstraint
from nni.nas.hub.pytorch import DARTS, NasBench201, ShuffleNetSpace
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableBatchNorm2d, MutableConv2d
from nni.nas.oneshot.pytorch.strategy import RandomOneShot
from scipy.stats import chisquare
from torch import Tensor, nn

from genas_plugins.scoring import flatness, mean_loss, recalibrate_batchnorm
from nni_strategy.samples import SampleSpace, SupernetPaths, active_parameters, fix_path
from nni_strategy.space import DartsSpace

OPERATIONS = ("none", "skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3")
SIGMAS = (2e-3, 1e-2, 2e-2)


def mutated(space: ModelSpace) -> ModelSpace:
    return RandomOneShot().mutate_model(space)


@pytest.fixture
def supernet() -> ModelSpace:
    torch.manual_seed(0)
    return mutated(NasBench201(4, 1, 10))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)) for _ in range(3)]


def nasbench_sample(*operations: str) -> dict[str, str]:
    labels = ("cell/0_1", "cell/0_2", "cell/0_3", "cell/1_2", "cell/1_3", "cell/2_3")
    return dict(zip(sorted(labels), operations, strict=True))


class Constrained(ModelSpace):
    """Three choices out of 1..3 that must add up to at most 5; 10 of the 27 samples do."""

    def __init__(self) -> None:
        super().__init__()
        choices = [nni.choice(name, [1, 2, 3]) for name in "abc"]
        for choice in choices:
            self.add_mutable(choice)
        self.add_mutable(ExpressionConstraint(choices[0] + choices[1] + choices[2] <= 5, label="sum"))


def test_samples_are_uniform() -> None:
    space = SampleSpace(NasBench201(4, 1, 10))
    rng = np.random.default_rng(0)
    samples = [json.loads(space.sample(rng)) for _ in range(1500)]
    for label in samples[0]:
        counts = Counter(sample[label] for sample in samples)
        assert chisquare([counts[name] for name in OPERATIONS]).pvalue > 1e-3
    # Two labels together: independent of each other.
    pairs = Counter((sample["cell/0_1"], sample["cell/1_2"]) for sample in samples)
    assert len(pairs) == 25
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_same_seed_same_samples() -> None:
    space = SampleSpace(NasBench201(4, 1, 10))
    first, second = ([space.sample(rng) for _ in range(5)] for rng in map(np.random.default_rng, (3, 3)))
    assert first == second
    assert len(set(first)) > 1


def test_constraints_hold_everywhere() -> None:
    space = SampleSpace(Constrained())
    rng = np.random.default_rng(0)
    candidates = [space.sample(rng) for _ in range(400)]
    candidates += [space.mutate(candidate, 0.5, rng) for candidate in candidates[:100]]
    candidates += [space.crossover(a, b, rng) for a, b in zip(candidates[:100], candidates[100:200], strict=True)]
    assert all(sum(space.to_sample(candidate).values()) <= 5 for candidate in candidates)
    # Rejection keeps the draw uniform over the ten that are allowed.
    counts = Counter(candidates[:400])
    assert len(counts) == 10
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_constraints_that_no_draw_meets_end_in_a_sentence() -> None:
    class Narrow(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            # One sample in a million million is allowed.
            choices = [nni.choice(f"c{number}", list(range(10))) for number in range(12)]
            for choice in choices:
                self.add_mutable(choice)
            self.add_mutable(ExpressionConstraint(sum(choices[1:], choices[0]) < 1, label="sum"))

    with pytest.raises(ValueError, match="constraints too narrow"):
        SampleSpace(Narrow()).sample(np.random.default_rng(0))


def test_mutation_redraws_each_label_with_its_probability() -> None:
    space = SampleSpace(NasBench201(4, 1, 10))
    rng = np.random.default_rng(0)
    parent = space.from_json(nasbench_sample(*["none"] * 6))
    children = [json.loads(space.mutate(parent, 0.5, rng)) for _ in range(600)]
    # A redrawn label takes its old value again in one of five cases.
    kept = sum(child[label] == "none" for child in children for label in child)
    assert chisquare([kept, 3600 - kept], [3600 * 0.6, 3600 * 0.4]).pvalue > 1e-3
    assert all(space.mutate(parent, 1e-12, rng) == parent for _ in range(20))


def test_crossover_takes_every_label_from_a_parent() -> None:
    space = SampleSpace(NasBench201(4, 1, 10))
    rng = np.random.default_rng(0)
    first = space.from_json(nasbench_sample(*["none"] * 6))
    second = space.from_json(nasbench_sample(*["conv_3x3"] * 6))
    children = [json.loads(space.crossover(first, second, rng)) for _ in range(200)]
    counts = Counter(value for child in children for value in child.values())
    assert set(counts) == {"none", "conv_3x3"}
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert space.crossover(first, first, rng) == first


def test_json_round_trip_restores_values_that_json_does_not_know() -> None:
    class Tuples(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.add_mutable(nni.choice("size", [(1, 2), (3, 4)]))
            self.add_mutable(nni.choice("flag", [True, None, "x"]))

    space = SampleSpace(Tuples())
    rng = np.random.default_rng(0)
    for _ in range(20):
        candidate = space.sample(rng)
        sample = space.to_sample(candidate)
        assert sample["size"] in [(1, 2), (3, 4)]
        assert isinstance(sample["size"], tuple)
        assert Tuples().contains(sample)
        assert space.from_json(json.loads(json.dumps(space.to_json(candidate)))) == candidate


@pytest.mark.parametrize("build", [lambda: DARTS(width=4, num_cells=3), lambda: DartsSpace(10, 4, 2)])
def test_drawn_samples_are_valid_for_nni(build: Callable[[], ModelSpace]) -> None:
    space = mutated(build())
    samples = SampleSpace(space)
    rng = np.random.default_rng(0)
    for _ in range(20):
        candidate = samples.mutate(samples.sample(rng), 0.3, rng)
        assert space.contains(samples.to_sample(candidate))


def test_a_space_without_choices_is_refused() -> None:
    class Empty(ModelSpace):
        pass

    with pytest.raises(ValueError, match="Empty has no choices"):
        SampleSpace(Empty())


def test_path_equals_the_frozen_network(supernet: ModelSpace, batches: list[tuple[Tensor, Tensor]]) -> None:
    paths = SupernetPaths(supernet)
    rng = np.random.default_rng(0)
    for _ in range(3):
        candidate = paths.search_space.sample(rng)
        frozen = supernet.freeze(paths.to_sample(candidate))
        recalibrate_batchnorm(frozen, batches)
        alone = flatness(frozen, batches, SIGMAS, generator=torch.Generator().manual_seed(5))
        with paths.open(candidate, batches[0][0]) as (model, names):
            recalibrate_batchnorm(model, batches)
            assert mean_loss(model, batches) == pytest.approx(mean_loss(frozen, batches), abs=1e-7)
            generator = torch.Generator().manual_seed(5)
            shared = flatness(model, batches, SIGMAS, generator=generator, parameters=names)
        assert shared.losses == pytest.approx(alone.losses, abs=1e-6)
        # The very parameters of the standalone network take part, and no other.
        sizes = Counter(p.shape for p in frozen.parameters())
        assert Counter(p.shape for n, p in supernet.named_parameters() if n in names) == sizes


@pytest.mark.parametrize("own", [False, True])
def test_a_measurement_leaves_no_trace(own: bool, batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    space = mutated(DartsSpace(10, 4, 2) if own else NasBench201(4, 1, 10))
    paths = SupernetPaths(space)
    before = {name: value.clone() for name, value in space.state_dict().items()}
    modes = [module.training for module in space.modules()]
    state = torch.get_rng_state()
    with paths.open(paths.search_space.sample(np.random.default_rng(0)), batches[0][0]) as (model, names):
        recalibrate_batchnorm(model, batches)
        flatness(model, batches, SIGMAS, parameters=names)
    with (
        pytest.raises(KeyboardInterrupt),
        paths.open(paths.search_space.sample(np.random.default_rng(1)), batches[0][0]) as (model, _),
    ):
        recalibrate_batchnorm(model, batches)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in space.state_dict().items())
    assert [module.training for module in space.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in space.parameters())


def moved_by(model: nn.Module, images: Tensor, names: Collection[str] | None = None) -> set[str]:
    """Brute force: the parameters (of ``names``) that change the logits when they change."""
    model.eval()
    found = set()
    with torch.no_grad():
        logits = model(images)
        for name, parameter in model.named_parameters():
            if names is not None and name not in names:
                continue
            kept = parameter.clone()
            generator = torch.Generator().manual_seed(0)
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if not torch.equal(model(images), logits):
                found.add(name)
            parameter.copy_(kept)
    return found


def test_active_parameters_of_nasbench201(supernet: ModelSpace, batches: list[tuple[Tensor, Tensor]]) -> None:
    images = batches[0][0]
    for operations in (["conv_3x3", "skip_connect", "avg_pool_3x3"] * 2, ["conv_1x1", "conv_3x3"] * 3):
        fix_path(supernet.modules(), nasbench_sample(*operations))
        assert active_parameters(supernet, images) == moved_by(supernet, images)


def test_operations_without_effect_count_as_part_of_the_network(
    supernet: ModelSpace, batches: list[tuple[Tensor, Tensor]]
) -> None:
    # Edges 0-1 and 0-3 carry the signal; 1-2 convolves, but 2-3 multiplies with zero.
    sample = nasbench_sample("conv_1x1", "none", "skip_connect", "conv_3x3", "none", "none")
    fix_path(supernet.modules(), sample)
    images = batches[0][0]
    active = active_parameters(supernet, images)
    moving = moved_by(supernet, images)
    assert moving < active
    assert len(active) == len(list(supernet.freeze(sample).parameters()))


def test_active_parameters_of_shufflenet() -> None:
    torch.manual_seed(0)
    # NNI's initial weights are so small that late layers vanish in float32.
    space = mutated(ShuffleNetSpace(num_labels=10)).double()
    for module in space.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    paths = SupernetPaths(space)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    paths.fix(paths.search_space.sample(np.random.default_rng(0)))
    names = [name for name, _ in space.named_parameters()]
    # All 1,003 would take half a minute; every fortieth meets all stages and choices.
    some = names[::40]
    first = next(space.parameters()).requires_grad_(False)
    active = active_parameters(space, images)
    assert moved_by(space, images, some) == active.intersection(some)
    assert names[0] in active
    assert not first.requires_grad


def test_logits_without_parameters_are_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.idle = nn.Parameter(torch.ones(1))
            self.fixed = True

        def forward(self, x: Tensor) -> Tensor:
            # Inputs that need a gradient keep autograd quiet, so that our own sentence has to come.
            return x.clone().requires_grad_() if self.fixed else self.scale * x

    model = Idle()
    with pytest.raises(ValueError, match="Idle depends on none of its parameters"):
        active_parameters(model, torch.zeros(2, 3))
    model.fixed = False
    assert active_parameters(model, torch.zeros(2, 3)) == {"scale"}


class Widths(ModelSpace):
    """A choice of channels, which NNI implements by its own batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        channels = nni.choice("channels", [4, 8])
        self.first = MutableConv2d(3, channels, 1, bias=False)
        self.norm = MutableBatchNorm2d(channels)
        self.second = MutableConv2d(channels, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()).mean((2, 3))


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_recalibration_reaches_normalisation_with_a_choice_of_channels(
    momentum: float | None, batches: list[tuple[Tensor, Tensor]]
) -> None:
    torch.manual_seed(0)
    space = mutated(Widths())
    paths = SupernetPaths(space)
    before = {name: value.clone() for name, value in space.state_dict().items()}
    with paths.open(paths.search_space.from_json({"channels": 4}), batches[0][0]) as (model, _):
        recalibrate_batchnorm(model, batches, momentum)
        with torch.no_grad():
            channels = torch.stack([space.first(images).transpose(0, 1).flatten(1) for images, _ in batches])
        means, variances = channels.mean(2), channels.var(2)
        if momentum is None:
            mean, variance = means.mean(0), variances.mean(0)
        else:
            mean, variance = torch.zeros(4), torch.ones(4)
            for new_mean, new_variance in zip(means, variances, strict=True):
                mean = 0.9 * mean + 0.1 * new_mean
                variance = 0.9 * variance + 0.1 * new_variance
        torch.testing.assert_close(space.norm.running_mean[:4], mean)
        torch.testing.assert_close(space.norm.running_var[:4], variance)
    assert all(torch.equal(value, before[name]) for name, value in space.state_dict().items())
    # Training goes on with the momentum that the space was built with.
    paths.fix(paths.search_space.from_json({"channels": 8}))
    space.train()(batches[0][0])
    seen = space.first(batches[0][0]).mean((0, 2, 3))
    torch.testing.assert_close(space.norm.running_mean, 0.1 * seen.detach())


def test_the_angle_needs_the_initial_weights(supernet: ModelSpace) -> None:
    paths = SupernetPaths(supernet)
    with pytest.raises(ValueError, match="before training"):
        paths.angle(paths.search_space.sample(np.random.default_rng(0)), None)


def test_the_angle_of_a_path_counts_its_parameters_once(
    supernet: ModelSpace, batches: list[tuple[Tensor, Tensor]]
) -> None:
    initial = {name: parameter.detach().clone() for name, parameter in supernet.named_parameters()}
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    paths = SupernetPaths(supernet, initial)
    candidate = paths.search_space.from_json(nasbench_sample(*["conv_1x1", "skip_connect"] * 3))
    with paths.open(candidate, batches[0][0]) as (_, names):
        measured = paths.angle(candidate, names)
    chosen = [name for name, _ in supernet.named_parameters() if name in names]
    now = np.concatenate([dict(supernet.named_parameters())[name].detach().numpy().ravel() for name in chosen])
    then = np.concatenate([initial[name].numpy().ravel() for name in chosen])
    now, then = now.astype(np.float64), then.astype(np.float64)
    cosine = now @ then / np.linalg.norm(now) / np.linalg.norm(then)
    assert measured == pytest.approx(np.arccos(cosine) / np.pi, abs=1e-12)


def test_fixing_a_path_of_layer_choices_runs_the_chosen_layers() -> None:
    class Scales(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.choices = nn.ModuleList(
                LayerChoice({str(k): nn.Conv2d(1, 1, 1, bias=False) for k in (2, 3, 5)}, label=label) for label in "ab"
            )
            for choice in self.choices:
                for name, layer in choice.named_children():
                    nn.init.constant_(layer.weight, float(name))

        def forward(self, x: Tensor) -> Tensor:
            for choice in self.choices:
                x = choice(x)
            return x

    space = mutated(Scales())
    for first in "235":
        for second in "235":
            fix_path(space.modules(), {"a": first, "b": second})
            assert space(torch.ones(1, 1, 1, 1)).item() == int(first) * int(second)
