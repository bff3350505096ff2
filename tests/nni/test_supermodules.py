"""Choices that NNI's supernets cannot compute, against PyTorch's own layers and plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nni.nas.hub.pytorch import ProxylessNAS
from nni.nas.nn.pytorch import ModelSpace, MutableBatchNorm2d, MutableConv2d, MutableLayerNorm, MutableLinear, Repeat
from nni.nas.oneshot.pytorch.strategy import RandomOneShot
from torch import Tensor, nn

from genas_plugins.experiment.costs import Costs
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import recalibrate_batchnorm
from nni_strategy import GeNAS, fixed_network
from nni_strategy.samples import SupernetPaths

IMAGES = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(3))


class One(ModelSpace):
    """A layer of a test's, with a classifier behind it."""

    def __init__(self, layer: Callable[[], nn.Module], features: Any = 4) -> None:
        super().__init__()
        self.layer = layer()
        self.classifier = MutableLinear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer(x).mean((2, 3)))


def supernet(layer: Callable[[], nn.Module], features: Any = 4) -> ModelSpace:
    torch.manual_seed(0)
    return GeNAS().mutate_model(One(layer, features)).eval()


def layer_of(space: ModelSpace, **sample: Any) -> nn.Module:
    """The layer with a path fixed, after a look at the network that is exported: it has the same outputs."""
    paths = SupernetPaths(space)
    paths.fix(paths.search_space.from_json(sample))
    if space.layer(IMAGES).dim() == 4:
        assert torch.equal(space(IMAGES), fixed_network(space, sample)(IMAGES))
    return space.layer


def middle(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The centre of kernels, up and left of it where there are two."""
    top, left = (weight.shape[2] - rows) // 2, (weight.shape[3] - columns) // 2
    return weight[:, :, top : top + rows, left : left + columns]


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (3, 3)])
def test_kernels_that_are_longer_in_one_direction(size: tuple[int, int]) -> None:
    choice = lambda: nni.choice("size", [(1, 7), (7, 1), (3, 3)])  # noqa: E731
    layer = layer_of(supernet(lambda: MutableConv2d(3, 4, choice(), padding="same")), size=size)
    assert layer.weight.shape == (4, 3, 7, 7)
    expected = F.conv2d(IMAGES, middle(layer.weight, *size), layer.bias, padding=(size[0] // 2, size[1] // 2))
    torch.testing.assert_close(layer(IMAGES), expected)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("same", [False, True])
def test_padding_by_values_of_the_image_is_that_of_the_path(mode: str, size: int, same: bool) -> None:
    def build() -> nn.Module:
        choice = nni.choice("size", [3, 5])
        return MutableConv2d(3, 4, choice, padding="same" if same else choice // 2, padding_mode=mode)

    layer = layer_of(supernet(build), size=size)
    expected = nn.Conv2d(3, 4, size, padding=size // 2, padding_mode=mode)
    expected.load_state_dict({"weight": middle(layer.weight, size, size), "bias": layer.bias})
    torch.testing.assert_close(layer(IMAGES), expected(IMAGES))


def wide(**arguments: Any) -> Callable[[], nn.Module]:
    width = nni.choice("width", [2, 4])
    return lambda: nn.Sequential(MutableConv2d(3, width, 1), MutableBatchNorm2d(width, **arguments), nn.ReLU())


@pytest.mark.parametrize("width", [2, 4])
def test_normalisation_without_weights(width: int) -> None:
    space = supernet(wide(affine=False), nni.choice("width", [2, 4]))
    convolution, norm, _ = layer_of(space, width=width)
    norm.train()
    before = convolution(IMAGES)
    mean, variance = before.mean((0, 2, 3)), before.var((0, 2, 3), unbiased=False)
    expected = (before - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(norm(before), expected)
    torch.testing.assert_close(norm.running_mean[:width], 0.1 * mean)
    assert torch.equal(norm.running_mean[width:], torch.zeros(4 - width))


def test_statistics_without_a_momentum_average_over_all_batches() -> None:
    space = supernet(wide(momentum=None), nni.choice("width", [2, 4]))
    convolution, norm, _ = layer_of(space, width=4)
    norm.train()
    means = []
    for part in IMAGES.split(2):
        norm(convolution(part))
        means.append(convolution(part).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    assert norm.num_batches_tracked == 3


def test_a_choice_of_momentum_trains_by_it_and_is_recalibrated_without() -> None:
    space = supernet(wide(momentum=nni.choice("momentum", [0.25, 0.5])), nni.choice("width", [2, 4]))
    convolution, norm, _ = layer_of(space, width=4, momentum=0.25)
    mean = convolution(IMAGES).mean((0, 2, 3))
    norm.train()(convolution(IMAGES))
    torch.testing.assert_close(norm.running_mean, 0.25 * mean)
    recalibrate_batchnorm(space, [(part, torch.zeros(2)) for part in IMAGES.split(2)])
    torch.testing.assert_close(norm.running_mean, mean)
    assert norm.momentum == 0.25


def test_another_strategys_normalisation_takes_part_in_a_recalibration() -> None:
    torch.manual_seed(0)
    space = RandomOneShot().mutate_model(One(wide(), nni.choice("width", [2, 4])))
    convolution, norm, _ = layer_of(space, width=2)
    recalibrate_batchnorm(space, [(part, torch.zeros(2)) for part in IMAGES.split(2)])
    torch.testing.assert_close(norm.running_mean[:2], convolution(IMAGES).mean((0, 2, 3)))


@pytest.mark.parametrize(("shape", "eps"), [((3, 9, 9), 1e-5), ((3, 4, 9), 0.5)])
def test_layer_normalisation_with_choices_of_shape_and_eps(shape: tuple[int, ...], eps: float) -> None:
    sizes, terms = nni.choice("shape", [(3, 9, 9), (3, 4, 9)]), nni.choice("eps", [1e-5, 0.5])
    space = supernet(lambda: MutableLayerNorm(sizes, eps=terms), 3)
    with torch.no_grad():
        space.layer.weight.uniform_()
        space.layer.bias.uniform_()
    paths = SupernetPaths(space)
    paths.fix(paths.search_space.from_json({"shape": shape, "eps": eps}))
    x = IMAGES[:, :, : shape[1]]
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (value[:, : shape[1]] for value in (space.layer.weight, space.layer.bias))
    expected = (x - mean) / (variance + eps).sqrt() * weight + bias
    torch.testing.assert_close(space.layer(x), expected)
    torch.testing.assert_close(fixed_network(space, {"shape": shape, "eps": eps}).layer(x), expected)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_repetition_may_be_empty(depth: int) -> None:
    layer = layer_of(supernet(lambda: Repeat(lambda index: nn.Conv2d(3, 3, 1), (0, 2), label="depth"), 3), depth=depth)
    expected = IMAGES
    for block in list(layer.blocks)[:depth]:
        expected = block(expected)
    assert torch.equal(layer(IMAGES), expected)


def test_what_a_space_sets_on_its_layers_reaches_the_supernet() -> None:
    def build() -> ModelSpace:
        torch.manual_seed(0)
        space = ProxylessNAS(10, base_widths=(8,) * 9, bn_eps=1e-2, bn_momentum=0.3).double()
        space.stem.requires_grad_(False)
        return space

    space, before = GeNAS().mutate_model(build()), build()
    convolution, norm, _ = space.stem
    assert torch.equal(convolution.weight, before.stem[0].weight)
    assert convolution.weight.dtype == torch.float64
    assert not convolution.weight.requires_grad
    assert space.blocks[0][0].weight.requires_grad
    norm.train()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    SupernetPaths(space)
    variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (variance + 1e-2).sqrt()
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_mean, 0.3 * x.mean((0, 2, 3)))


def test_the_angle_is_that_of_the_parts_that_the_path_uses() -> None:
    width = nni.choice("width", [2, 4])
    space = supernet(lambda: MutableConv2d(3, width, 1), width)
    initial = {name: value.detach().clone() for name, value in space.named_parameters()}
    with torch.no_grad():
        for value in space.parameters():
            value += 0.3 * torch.randn(value.shape)
    paths = SupernetPaths(space, initial)
    for chosen in (2, 4):
        candidate = paths.search_space.from_json({"width": chosen})
        with paths.open(candidate, IMAGES) as (_, names):
            measured = paths.angle(candidate, names)
        now, then = [], []
        for vector, weights in ((now, dict(space.named_parameters())), (then, initial)):
            kernel, bias = weights["layer.weight"][:chosen], weights["layer.bias"][:chosen]
            parts = (kernel, bias, weights["classifier.weight"][:, :chosen], weights["classifier.bias"])
            vector += [part.detach().double().flatten().numpy() for part in parts]
        first, second = np.concatenate(now), np.concatenate(then)
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert measured == pytest.approx(np.arccos(cosine) / np.pi, abs=1e-9)


class Noisy(nn.Module):
    """Draws in its forward pass, also while it is measured."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, device="cpu")


def test_a_network_that_draws_is_measured_as_a_function_of_the_candidate() -> None:
    space = supernet(
        lambda: nn.Sequential(MutableConv2d(3, nni.choice("width", [2, 4]), 1), Noisy()), nni.choice("width", [2, 4])
    )
    batches = [(IMAGES, torch.arange(6) % 5)]
    paths = SupernetPaths(space)
    strategy = GeNAS(metric="accuracy+flatness")
    scorer = Scorer(paths, strategy.score, validation=batches, recalibration=None, seed=0)
    candidates = [paths.search_space.from_json({"width": width}) for width in (2, 4)]
    first = [scorer.measure(candidate).score for candidate in candidates]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    again = [scorer.measure(candidate).score for candidate in reversed(candidates)]
    assert first == again[::-1]
    # It is counted, though it makes tensors on the CPU: both convolutions and the classifier.
    counted = [Costs(paths, (3, 9, 9))._count(candidate) for candidate in candidates]
    assert counted == [(3 * n + n + 5 * n + 5, 81 * 3 * n + 5 * n) for n in (2, 4)]
    assert torch.equal(state, torch.get_rng_state())
