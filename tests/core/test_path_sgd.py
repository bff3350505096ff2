"""PathSGD against torch's own SGD with zeros written into the gradients of what is not sampled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from genas_plugins.training.path_sgd import PathSGD

SHAPES = ((3, 4), (5,), (2, 2, 3, 3), (7,), (1,))
TOLERANCES = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.float32: {"rtol": 2e-6, "atol": 1e-6}}
Step = tuple[float, float, float, list[Tensor | None]]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def steps(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Step]:
    """Settings that change now and then, and gradients for a few: the last parameter has none, ever."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    settings = (0.1, 0.9, 0.05)
    for index in range(count):
        if index % 37 == 36:
            settings = tuple(rng.uniform((0.01, 0.5, 0.0), (0.2, 0.95, 0.1)))
        # The second is rare, the third is always there, as the classifier is.
        sampled = rng.random(len(SHAPES)) < (0.4, 0.02, 1.0, 0.2, 0.0)
        gradients = [
            torch.randn(shape, generator=generator, dtype=dtype) if wanted else None
            for shape, wanted in zip(SHAPES, sampled, strict=True)
        ]
        yield (*settings, gradients)


def set_up(optimizer: SGD, step: Step) -> None:
    (group,) = optimizer.param_groups
    group["lr"], group["momentum"], group["weight_decay"] = step[:3]


def naive(optimizer: SGD, step: Step) -> None:
    """A step of the official run: what had a gradient once has one for ever."""
    set_up(optimizer, step)
    optimizer.zero_grad(set_to_none=False)
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], step[3], strict=True):
        if gradient is not None:
            parameter.grad = gradient.clone()
    optimizer.step()


def lazy(optimizer: PathSGD, step: Step) -> None:
    set_up(optimizer, step)
    optimizer.zero_grad()
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], step[3], strict=True):
        if gradient is not None:
            optimizer.catch_up([parameter])
            parameter.grad = gradient.clone()
    optimizer.step()


def assert_same(ours: SGD, theirs: SGD, dtype: torch.dtype = torch.float64) -> None:
    close = TOLERANCES[dtype]
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, **close)
        assert (own in ours.state) == (other in theirs.state)
        if other in theirs.state:
            buffers = (optimizer.state[p]["momentum_buffer"] for optimizer, p in ((ours, own), (theirs, other)))
            torch.testing.assert_close(*buffers, **close)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_equals_sgd_with_zeros_over_many_steps_and_settings(dtype: torch.dtype) -> None:
    ours, theirs = PathSGD(parameters(dtype), 0.1), SGD(parameters(dtype), 0.1)
    for index, step in enumerate(steps(400, dtype=dtype)):
        lazy(ours, step)
        naive(theirs, step)
        pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], step[3], strict=True)
        for own, other, gradient in pairs:
            if gradient is not None:
                torch.testing.assert_close(own, other, **TOLERANCES[dtype])
        if index % 90 == 89:
            ours.flush()
            assert_same(ours, theirs, dtype)
    never = ours.param_groups[0]["params"][-1]
    assert torch.equal(never, parameters(dtype)[-1])


def test_where_all_is_sampled_it_is_sgd_bit_for_bit() -> None:
    ours, theirs = (kind(parameters(), 0.1, momentum=0.9, weight_decay=0.05) for kind in (PathSGD, SGD))
    for seed in range(5):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            optimizer.step()
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_what_a_forward_pass_reads_is_up_to_date_and_nothing_else_has_moved() -> None:
    first, second = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = PathSGD([first, second], 0.1, momentum=0.5, weight_decay=0.2)
    for parameter in (first, second):
        parameter.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    # v = 0.2, w = 1 - 0.02; without a gradient then v = 0.5 v + 0.2 w = 0.296, w = 0.98 - 0.0296 = 0.9504.
    optimizer.zero_grad()
    optimizer.step()
    assert second.item() == pytest.approx(0.98, rel=1e-15)
    optimizer.catch_up([second])
    assert first.item() == pytest.approx(0.98, rel=1e-15)
    assert second.item() == pytest.approx(0.9504, rel=1e-15)
    assert optimizer.state[second]["momentum_buffer"].item() == pytest.approx(0.296, rel=1e-15)
    optimizer.catch_up([second])
    optimizer.flush()
    assert first.item() == second.item() == pytest.approx(0.9504, rel=1e-15)


def test_a_change_of_the_learning_rate_does_not_reach_back() -> None:
    ours, theirs = PathSGD(parameters(), 0.1, 0.9, 0.05), SGD(parameters(), 0.1, 0.9, weight_decay=0.05)
    everything = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    nothing: list[Tensor | None] = [None] * len(SHAPES)
    rates = (0.1, 0.1, 0.02, 0.02, 0.3)
    for rate, gradients in zip(rates, (everything, nothing, nothing, nothing, nothing), strict=True):
        lazy(ours, (rate, 0.9, 0.05, gradients))
        naive(theirs, (rate, 0.9, 0.05, gradients))
    # Set, but not yet stepped with.
    ours.param_groups[0]["lr"] = 5.0
    ours.flush()
    assert_same(ours, theirs)


def test_what_was_not_caught_up_is_when_it_gets_a_gradient() -> None:
    ours, reference = (PathSGD(parameters(), 0.1, 0.9, 0.05) for _ in range(2))
    for index, step in enumerate(steps(30, seed=3)):
        lazy(reference, (0.1, 0.9, 0.05, step[3]))
        ours.zero_grad()
        for parameter, gradient in zip(ours.param_groups[0]["params"], step[3], strict=True):
            parameter.grad = gradient
        ours.step()
        if index % 10 == 9:
            ours.flush()
            reference.flush()
    assert_same(ours, reference)


@pytest.mark.parametrize("resumed", [PathSGD, SGD])
@pytest.mark.parametrize("started", [PathSGD, SGD])
def test_either_optimizer_goes_on_from_the_others_checkpoint(started: type[SGD], resumed: type[SGD]) -> None:
    run = {PathSGD: lazy, SGD: naive}
    first, whole = started(parameters(), 0.1), SGD(parameters(), 0.1)
    path = list(steps(80, seed=1))
    for step in path[:30]:
        run[started](first, step)
        naive(whole, step)
    # The weights are read first, as Lightning does: what the state's flush changes shows in them.
    weights = [parameter.detach() for parameter in first.param_groups[0]["params"]]
    state = first.state_dict()
    second = resumed([nn.Parameter(weight.clone()) for weight in weights], 0.7)
    second.load_state_dict(copy.deepcopy(state))
    if resumed is SGD:
        for parameter in second.state:
            parameter.grad = torch.zeros_like(parameter)
    for step in path[30:]:
        run[resumed](second, step)
        naive(whole, step)
    second.state_dict()
    assert_same(second, whole)


def test_a_copy_is_up_to_date() -> None:
    optimizer = PathSGD(parameters(), 0.1)
    for step in steps(20):
        lazy(optimizer, step)
    copied = pickle.loads(pickle.dumps(optimizer))
    optimizer.flush()
    pairs = zip(copied.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    copied.flush()


def test_steps_that_a_gradient_scaler_skips_move_nothing() -> None:
    ours, theirs = (kind(parameters(torch.float32), 0.1, 0.9, weight_decay=0.05) for kind in (PathSGD, SGD))
    for optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for index, step in enumerate(steps(40, dtype=torch.float32)):
            optimizer.zero_grad(set_to_none=optimizer is ours)
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], step[3], strict=True):
                if gradient is not None:
                    if optimizer is ours:
                        ours.catch_up([parameter])
                    scale = scaler.scale(torch.tensor(1.0))
                    parameter.grad = gradient * scale * (torch.inf if index % 7 == 6 else 1.0)
            scaler.step(optimizer)
            scaler.update()
    ours.flush()
    assert_same(ours, theirs, torch.float32)


def test_a_closure_gives_the_loss() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = PathSGD([weight], 0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert weight.item() == 1.0


def test_a_second_group_is_refused() -> None:
    first, second = parameters()[:2]
    with pytest.raises(ValueError, match="one group of parameters"):
        PathSGD([{"params": [first]}, {"params": [second]}], 0.1)
