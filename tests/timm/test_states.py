"""State dictionaries of our own networks: whole, pruned, features, frozen, part of something larger, not strict."""

from __future__ import annotations

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import Tensor, nn

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_holds(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture
def drawn(small, randomize):
    """Builds a network whose tensors are all random, and other ones for another seed."""

    def build(seed: int, **changes: object) -> nn.Module:
        model = randomize(small(**changes), seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(torch.rand(parameter.shape, generator=generator))
        return model

    return build


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("changes", [{}, {"auxiliary": True}, {"num_classes": 0}, {"norm_layer": "layernorm2d"}])
def test_a_network_takes_its_own_state(drawn, changes, prefix):
    source, target = drawn(1, **changes), drawn(2, **changes)
    state = state_of(source)
    result = target.load_state_dict({prefix + name: value for name, value in state.items()})
    assert result.missing_keys == result.unexpected_keys == []
    assert_holds(target, state)


@pytest.mark.parametrize("indices", [[0, 1], [2], [0]])
def test_a_pruned_network_takes_its_own_state_and_a_whole_one(drawn, indices):
    whole, source, target = (drawn(seed) for seed in (1, 2, 3))
    for model in (source, target):
        model.prune_intermediate_layers(indices)
    target.load_state_dict(source.state_dict())
    assert_holds(target, state_of(source))
    state = state_of(whole)
    target.load_state_dict(state)
    assert_holds(target, {name: state[name] for name in source.state_dict()})


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (1,), (0,)])
@pytest.mark.parametrize("strict", [True, False])
def test_features_take_their_own_state(drawn, indices, strict):
    source, target = (drawn(seed, features_only=True, out_indices=indices) for seed in (1, 2))
    state = state_of(source)
    result = target.load_state_dict(state, strict=strict)
    assert result.missing_keys == result.unexpected_keys == []
    assert_holds(target, state)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1,), (0,)])
def test_features_within_a_larger_network_take_their_own_state(drawn, indices):
    source, target = (nn.Sequential(drawn(seed, features_only=True, out_indices=indices)) for seed in (1, 2))
    state = state_of(source)
    target.load_state_dict(state)
    assert_holds(target, state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_not_strict_takes_what_there_is(drawn, prefix):
    state, model = state_of(drawn(1)), drawn(2)
    before = state_of(model)
    given = {prefix + name: value for name, value in state.items() if name != "stem1.1.weight"}
    result = model.load_state_dict(given, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["stem1.1.weight"], [])
    assert_holds(model, {**state, "stem1.1.weight": before["stem1.1.weight"]})


def test_frozen_statistics_take_a_state_with_counters_and_give_one_without(drawn):
    # timm's frozen layers, like Detectron2's, count no batches; PyTorch's own take a state without counters.
    source, frozen, target = drawn(1), freeze_batch_norm_2d(drawn(2)), drawn(3)
    state = state_of(source)
    frozen.load_state_dict(state)
    without_counters = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert_holds(frozen, without_counters)
    target.load_state_dict(frozen.state_dict())
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in without_counters.items())


def test_averaging_copies_the_network(drawn):
    model, other = drawn(1), drawn(2)
    average = ModelEmaV3(model, decay=0.25)
    average.update(other)
    pairs = zip(model.parameters(), other.parameters(), average.module.parameters(), strict=True)
    for before, after, mean in pairs:
        torch.testing.assert_close(mean, 0.25 * before + 0.75 * after)
