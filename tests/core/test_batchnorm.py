"""Recalibration of batch normalisation against hand-computed statistics, and the traces it must not leave."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins.scoring import recalibrate_batchnorm
from genas_plugins.scoring.batchnorm import evaluation_mode, preserve_batchnorm


def batches(count: int = 14, size: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 4, 4, generator=generator) * (1 + i) + i, torch.zeros(size)) for i in range(count)]


def network() -> nn.Sequential:
    """Two batch norms with unlike momenta and used statistics, a dropout, and a frozen part."""
    net = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=None)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net(torch.randn(6, 3, 4, 4))
    net[2].eval()
    return net


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a measurement must leave as it was."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grad": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", "none") for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:3],
        "python": random.getstate(),
    }


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def assert_same(before: dict[str, Any], after: dict[str, Any], *, statistics: bool = True) -> None:
    assert before.keys() == after.keys() and before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        if statistics or not is_statistic(name):
            assert torch.equal(value, after["state"][name]), name
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][0], after["numpy"][0]) and before["numpy"][1] == after["numpy"][1]
    for key in ("grad", "modes", "momenta", "python"):
        assert before[key] == after[key], key


def failing(good: list[Any], error: Exception) -> Any:
    yield from good
    raise error


def test_cumulative_is_the_mean_over_batches_of_mean_and_unbiased_variance():
    norm, data = nn.BatchNorm2d(3), batches()
    recalibrate_batchnorm(norm, data)
    arrays = [images.double().numpy() for images, _ in data]
    mean = np.mean([array.mean((0, 2, 3)) for array in arrays], 0)
    variance = np.mean([array.var((0, 2, 3), ddof=1) for array in arrays], 0)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    assert int(norm.num_batches_tracked) == 14


def test_official_momentum_keeps_a_quarter_of_the_initial_values():
    images = batches(1)[0][0]
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(123.0)
    recalibrate_batchnorm(norm, [(images, torch.zeros(5))] * 14, momentum=0.1)
    kept = 0.9**14
    array = images.double().numpy()
    np.testing.assert_allclose(norm.running_mean.numpy(), (1 - kept) * array.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    variance = kept + (1 - kept) * array.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)


def test_deeper_statistics_are_those_of_training_mode():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    data = batches(1)
    recalibrate_batchnorm(net, data)
    hidden = net[1](nn.functional.batch_norm(data[0][0], None, None, training=True)).double().numpy()
    np.testing.assert_allclose(net[2].running_mean.numpy(), hidden.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(net[2].running_var.numpy(), hidden.var((0, 2, 3), ddof=1), rtol=1e-4)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_only_statistics_change_and_dropout_stays_off(momentum):
    net = network()
    before = snapshot(net)
    recalibrate_batchnorm(net, batches(), momentum)
    after = snapshot(net)
    assert_same(before, after, statistics=False)
    changed = [name for name, value in before["state"].items() if not torch.equal(value, after["state"][name])]
    assert changed == [name for name in before["state"] if is_statistic(name)] and len(changed) == 6
    # Two calls agree because nothing random ran; a dropout would have drawn.
    recalibrate_batchnorm(net, batches(), momentum)
    assert_same(after, snapshot(net))


def test_a_norm_without_statistics_is_left_alone():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    recalibrate_batchnorm(net, batches(2))
    assert net[0].running_mean is None and net[0].momentum == 0.1 and int(net[1].num_batches_tracked) == 2


@pytest.mark.parametrize(
    "data",
    [
        lambda: failing(batches(3), OSError("the disk is gone")),
        lambda: [*batches(2), (torch.zeros(2, 7, 4, 4), None)],
        lambda: [],
    ],
    ids=["loader", "model", "empty"],
)
def test_a_failure_restores_the_old_statistics(data):
    net = network()
    before = snapshot(net)
    with pytest.raises((OSError, RuntimeError, ValueError)):
        recalibrate_batchnorm(net, data())
    assert_same(before, snapshot(net))


def test_no_batches_and_a_wrong_momentum_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batchnorm(network(), [])
    for momentum in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"None .*or in \(0, 1\]"):
            recalibrate_batchnorm(network(), batches(1), momentum)


def test_the_guards_restore_after_an_exception():
    net = network()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="inside"), preserve_batchnorm(net), evaluation_mode(net):
        assert not any(module.training for module in net.modules())
        net.train()
        with torch.no_grad():
            nn.Sequential(net[0], net[2], net[3])(batches(1)[0][0])
        raise RuntimeError("inside")
    assert_same(before, snapshot(net))


def test_a_class_that_resets_its_statistics_in_a_way_of_its_own_does_so() -> None:
    class Own(nn.BatchNorm2d):
        def reset_running_stats(self) -> None:
            super().reset_running_stats()
            self.running_mean.fill_(5.0)

    network = nn.Sequential(nn.BatchNorm2d(3), Own(3)).double()
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recalibrate_batchnorm(network, [(images, torch.zeros(6))], momentum=0.25)
    # The first norm hands on images of mean 0.
    torch.testing.assert_close(network[1].running_mean, torch.full((3,), 0.75 * 5.0, dtype=torch.float64))
    torch.testing.assert_close(network[0].running_mean, 0.25 * images.mean((0, 2, 3)))
    assert [int(norm.num_batches_tracked) for norm in network] == [1, 1]


def test_statistics_of_several_types_are_kept_bit_for_bit() -> None:
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(2).double(), nn.BatchNorm2d(4).half(), nn.BatchNorm2d(2, affine=False)]
    network = nn.ModuleList([*norms, nn.BatchNorm2d(5, track_running_stats=False)])
    for number, buffer in enumerate(network.buffers()):
        buffer.fill_(number + 0.1)
    before = [buffer.clone() for buffer in network.buffers()]
    with preserve_batchnorm(network):
        for buffer in network.buffers():
            buffer.zero_()
    assert len(before) == 12
    assert all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))
