"""Paths of supernets as networks of their own, against those that NNI builds for the same sample."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import nni
import numpy as np
import pytest
import torch
from nni.mutable import Mutable
from nni.nas.hub.pytorch import DARTS, ENAS, AutoFormer, MobileNetV3Space, NasBench201, ProxylessNAS
from nni.nas.nn.pytorch import (
    Cell,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableLinear,
    MutableMultiheadAttention,
    Repeat,
)
from nni.nas.oneshot.pytorch.strategy import RandomOneShot
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from genas_plugins import CellNetwork
from genas_plugins.spaces import DartsSearchSpace
from nni_strategy import DartsSpace, GeNAS, build_network, fixed_network
from nni_strategy.export import PathModel
from nni_strategy.samples import SupernetPaths, fix_path
from nni_strategy.space import SupernetSpace

SPACES: dict[str, tuple[Callable[[], ModelSpace], int]] = {
    "NasBench201": (lambda: NasBench201(4, 1, 10), 8),
    "DARTS": (lambda: DARTS(width=(4, 8), num_cells=3), 8),
    "ProxylessNAS": (lambda: ProxylessNAS(10, base_widths=(8,) * 9), 16),
    "AutoFormer": (
        lambda: AutoFormer((8, 16), (2.0, 3.0), (1, 2), (1, 2), img_size=8, patch_size=4, num_labels=10),
        8,
    ),
}


def trained(build: Callable[[], ModelSpace], size: int) -> SupernetPaths:
    """A supernet with statistics that some images have left."""
    torch.manual_seed(0)
    paths = SupernetPaths(GeNAS().mutate_model(build()))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(4):
            paths.fix(paths.search_space.sample(rng))
            paths.supernet.train()(torch.randn(4, 3, size, size))
    paths.supernet.eval()
    return paths


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", SPACES)
def test_the_network_is_the_one_that_nni_builds_and_carries_the_weights(name: str) -> None:
    build, size = SPACES[name]
    paths, rng, images = trained(build, size), np.random.default_rng(1), torch.randn(3, 3, size, size)
    for _ in range(3):
        candidate = paths.search_space.sample(rng)
        sample = paths.to_sample(candidate)
        network = fixed_network(paths.supernet, sample)
        counted = build_network(paths, candidate)
        space = build()
        theirs = type(space).frozen_factory(sample)(*space.trace_args, **space.trace_kwargs)
        assert shapes(network) == shapes(counted) == shapes(build_network(space, sample)) == shapes(theirs)
        assert all(tensor.is_meta for tensor in counted.state_dict().values())
        theirs.load_state_dict(network.state_dict())
        paths.fix(candidate)
        with torch.no_grad():
            expected = paths.supernet(images)
            assert torch.equal(network(images), expected)
            torch.testing.assert_close(theirs.eval()(images), expected)
        assert not any(isinstance(module, BaseSuperNetModule) for module in network.modules())
        assert not network.simplify()
        assert all(parameter.requires_grad for parameter in network.parameters())
        # Copies: training the network leaves the supernet alone.
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.zero_()
            assert torch.equal(paths.supernet(images), expected)


def test_a_network_is_built_without_values_and_without_random_numbers() -> None:
    paths = trained(lambda: NasBench201(4, 1, 10), 8)
    candidate = paths.search_space.sample(np.random.default_rng(0))
    state = torch.get_rng_state()
    network = build_network(paths, candidate)
    with torch.device("meta"):
        assert network(torch.empty(2, 3, 8, 8)).shape == (2, 10)
    assert torch.equal(torch.get_rng_state(), state)
    own = SupernetPaths(DartsSpace(10, 4, 2))
    genotype = own.search_space.sample(np.random.default_rng(0))
    state = torch.get_rng_state()
    network = build_network(own, genotype)
    assert shapes(network) == shapes(build_network(own.supernet, own.to_sample(genotype)))
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes(network) == shapes(CellNetwork(genotype, 4, 2, 10, "cifar"))


def test_two_equal_operations_of_a_node_are_two_in_the_network() -> None:
    paths = trained(lambda: DARTS(width=4, num_cells=3), 8)
    sample = paths.to_sample(paths.search_space.sample(np.random.default_rng(0)))
    sample |= {f"normal/op_2_{k}": "sep_conv_3x3" for k in (0, 1)} | {f"normal/input_2_{k}": [0] for k in (0, 1)}
    network = fixed_network(paths.supernet, sample)
    theirs = DARTS.frozen_factory(sample)(width=4, num_cells=3)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in theirs.parameters())
    fix_path(paths.supernet.modules(), sample)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(images), paths.supernet(images))


def test_loose_ends_and_stages_of_one_cell_are_exported_as_they_were_measured() -> None:
    images = torch.randn(2, 3, 8, 8)
    for build, depth in ((lambda: ENAS(width=4, num_cells=3), None), (lambda: DARTS(width=4, num_cells=(3, 6)), 3)):
        paths = trained(build, 8)
        sample = paths.to_sample(paths.search_space.sample(np.random.default_rng(2)))
        sample |= {} if depth is None else {"depth": depth}
        fix_path(paths.supernet.modules(), sample)
        with torch.no_grad():
            assert torch.equal(fixed_network(paths.supernet, sample)(images), paths.supernet(images))


def test_what_was_changed_after_the_space_was_built_is_kept() -> None:
    def build() -> ModelSpace:
        space = ProxylessNAS(10, base_widths=(8,) * 9)
        # For a task of its own, with a stem that is not trained.
        space.classifier = nn.Linear(8, 3)
        space.stem.requires_grad_(False)
        return space

    paths = trained(build, 16)
    sample = paths.to_sample(paths.search_space.sample(np.random.default_rng(0)))
    network = fixed_network(paths.supernet, sample)
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert not any(parameter.requires_grad for parameter in network.stem.parameters())
    assert all(parameter.requires_grad for parameter in network.blocks.parameters())


def test_an_identity_that_was_chosen_keeps_its_place() -> None:
    # NNI leaves it out of the sequence, and so counts the layers behind it otherwise.
    build = lambda: MobileNetV3Space(10, base_widths=(8,) * 9, depth_range=(1, 2))  # noqa: E731
    paths = trained(build, 16)
    sample = paths.to_sample(paths.search_space.sample(np.random.default_rng(0)))
    sample |= {label: "identity" for label in sample if label.endswith("_se")}
    network = fixed_network(paths.supernet, sample)
    theirs = MobileNetV3Space.frozen_factory(sample)(10, base_widths=(8,) * 9, depth_range=(1, 2))
    assert list(shapes(network)) != list(shapes(theirs))
    assert list(shapes(network).values()) == list(shapes(theirs).values())


class Scaled(nn.Module):
    """A layer that NNI does not know how to choose for."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x * self.weight[:, None, None] + self.offset[:, None, None]


class ScaledChoice(BaseSuperNetModule):
    """The test's own supernet module, whose ``freeze`` carries what it is told to."""

    carries: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.choice = nni.choice("factor", [1, 2])
        self.add_mutable(self.choice)
        self.inner = type("Inner", (Scaled,), {})(1)

    @classmethod
    def mutate(cls, module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> Any:
        return cls() if type(module) is Scaled else None

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        self.inner.factor = memo["factor"]
        return {}

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        if not self.carries:
            raise NotImplementedError("no way to freeze")
        fixed = Scaled(sample["factor"])
        fixed.load_state_dict({name: getattr(self.inner, name) for name in self.carries}, strict=False)
        return fixed

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WithScaled(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(1)
        self.layer = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)], label="layer")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.scaled(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("carries", "left"), [(("weight", "offset"), None), (("weight",), "scaled.offset"), (("offset",), "scaled.weight")]
)
def test_a_module_of_somebodys_own_says_what_it_leaves_behind(
    carries: tuple[str, ...], left: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ScaledChoice, "carries", carries)
    space = GeNAS(mutation_hooks=[ScaledChoice.mutate]).mutate_model(WithScaled())
    with torch.no_grad():
        space.scaled.inner.weight.fill_(3.0)
        space.scaled.inner.offset.fill_(5.0)
    with caplog.at_level(logging.WARNING):
        network = fixed_network(space, {"factor": 2, "layer": 0})
    said = [record.message for record in caplog.records]
    assert shapes(network) == shapes(build_network(SupernetPaths(space), {"factor": 2, "layer": 0}))
    if left is None:
        assert said == []
        assert network.scaled.weight.tolist() == [3.0] * 3
        assert network.scaled.offset.tolist() == [5.0] * 3
    else:
        assert said == [
            f"WithScaled: 1 tensors could not be carried over from the supernet and have fresh values: {left}."
        ]


def test_a_module_without_freeze_is_named() -> None:
    space = GeNAS(mutation_hooks=[ScaledChoice.mutate]).mutate_model(WithScaled())
    with pytest.raises(TypeError, match=r"module scaled of type ScaledChoice cannot be fixed .* no way to freeze"):
        fixed_network(space, {"factor": 2, "layer": 0})


def test_wrong_arguments_are_refused() -> None:
    space = NasBench201(4, 1, 10)
    with pytest.raises(TypeError, match=r"NasBench201 is no supernet: GeNAS\(\).mutate_model"):
        fixed_network(space, {})
    GeNAS().mutate_model(space)
    with pytest.raises(ValueError, match=r"no sample of NasBench201: .*cell/0_1"):
        fixed_network(space, {})
    good = dict.fromkeys(space.simplify(), "conv_3x3")
    with pytest.raises(ValueError, match=r"no sample of NasBench201: .*conv_9x9"):
        fixed_network(space, {**good, "cell/0_1": "conv_9x9"})


class Plain(ModelSpace):
    """What NNI's freeze of a supernet cannot do: no bias, and a depth."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        width = nni.choice("width", [4, 8])
        self.first = MutableConv2d(3, width, 3, bias=False)
        self.norm = MutableBatchNorm2d(width, affine=False)
        self.blocks = Repeat(
            lambda index: nn.Sequential(MutableConv2d(width, width, 1, bias=False)), (1, 2), label="depth"
        )
        self.classifier = MutableLinear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.norm(self.first(x))).mean((2, 3)))


def test_a_model_stored_in_a_file_is_built_with_fresh_weights() -> None:
    paths = trained(Plain, 8)
    sample = {"width": 4, "depth": 2}
    model = PathModel.of(paths.supernet, sample)
    again = nni.load(nni.dump(model))
    assert again.sample == model.sample == sample
    network, fresh = model.executable_model(), again.executable_model()
    assert shapes(network) == shapes(fresh)
    assert not torch.equal(network.first.weight, fresh.first.weight)
    assert torch.equal(network.first.weight, paths.supernet.first.weight[:4])


class Stack(ModelSpace):
    """A body of the test's between a stem and a classifier."""

    def __init__(self, body: Callable[[], nn.Module], features: int = 4) -> None:
        super().__init__()
        self.stem, self.body, self.classifier = nn.Conv2d(3, 4, 3), body(), nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(x)).mean((2, 3)))


class Rectified:
    """A preprocessor that is no module."""

    def __call__(self, states: list[Tensor]) -> list[Tensor]:
        return [state.relu() for state in states]


class Sized(nn.Module):
    """Knows the choice of its layers, as many blocks of users do."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nni.choice("width", [2, 4])
        self.inner, self.outer = MutableConv2d(4, self.width, 1), MutableConv2d(self.width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


class Attentive(nn.Module):
    """Attention between pixels, with choices of its own."""

    def __init__(self) -> None:
        super().__init__()
        width, heads = nni.choice("width", [4, 8]), nni.choice("heads", [1, 2])
        self.inner, self.outer = MutableConv2d(4, width, 1), MutableConv2d(width, 4, 1)
        self.attention = MutableMultiheadAttention(width, heads, dropout=nni.choice("dropout", [0.0, 0.5]), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.inner(x).flatten(2).permute(2, 0, 1)
        pixels = self.attention(pixels, pixels, pixels)[0]
        return self.outer(pixels.permute(1, 2, 0).unflatten(2, x.shape[2:]))


def shared() -> nn.Module:
    convolution = nn.Conv2d(4, 4, 1)
    return nn.Sequential(LayerChoice([convolution, nn.Identity()], label="layer"), convolution)


OPERATIONS = {"conv": lambda *_: nn.Conv2d(4, 4, 1), "skip": lambda *_: nn.Identity()}
BODIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cell of modules": (lambda: Cell([nn.Conv2d(4, 4, 1), nn.Identity()], 2, 1, 1, label="cell"), 8),
    "cell of loose ends": (lambda: Cell([nn.Conv2d(4, 4, 1), nn.Tanh()], 2, 2, 1, "loose_end", label="cell"), 8),
    "cell of factories": (lambda: Cell(OPERATIONS, 2, 2, 1, preprocessor=Rectified(), label="cell"), 8),
    "a choice as attribute": (Sized, 4),
    "attention": (Attentive, 4),
    "a module in two places": (shared, 4),
    "a repetition of choices": (
        lambda: Repeat(lambda index: LayerChoice([nn.Conv2d(4, 4, 1), nn.Tanh()], label=f"layer{index}"), 2),
        4,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_modules_of_ones_own_are_copied_on_every_path(name: str) -> None:
    paths, images = trained(lambda: Stack(*BODIES[name]), 8), torch.randn(2, 3, 8, 8)
    for candidate in {paths.search_space.sample(np.random.default_rng(seed)) for seed in range(12)}:
        paths.fix(candidate)
        network = fixed_network(paths.supernet, paths.to_sample(candidate))
        with torch.no_grad():
            assert torch.equal(network(images), paths.supernet(images))
        assert not any(isinstance(value, Mutable) for part in network.modules() for value in vars(part).values())
        assert shapes(network) == shapes(build_network(paths, candidate))


class Around(ModelSpace):
    """A space of the hub inside another one."""

    def __init__(self, inner: Callable[[], ModelSpace]) -> None:
        super().__init__()
        self.inner = inner()
        self.head = LayerChoice([nn.Linear(10, 3), nn.Linear(10, 3, bias=False)], label="head")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@pytest.mark.parametrize(
    "inner", [SPACES["AutoFormer"][0], lambda: DARTS(width=4, num_cells=(3, 6)), lambda: DartsSpace(10, 4, 2)]
)
def test_a_space_inside_another_is_searched_and_exported(inner: Callable[[], ModelSpace]) -> None:
    paths, images = trained(lambda: Around(inner), 8), torch.randn(2, 3, 8, 8)
    candidate = paths.search_space.sample(np.random.default_rng(0))
    paths.fix(candidate)
    network = fixed_network(paths.supernet, paths.to_sample(candidate))
    with torch.no_grad():
        torch.testing.assert_close(network(images), paths.supernet(images))
    assert not any(module.training for module in network.modules())


def test_a_space_that_nni_cannot_build_anew_is_exported_in_this_process() -> None:
    sizes = {"num_classes": 10, "init_channels": 4, "num_cells": 2, "stem": "cifar"}
    space = SupernetSpace(DartsSearchSpace(), **sizes)
    sample = space.to_sample(space.search_space.sample(np.random.default_rng(0)))
    model = PathModel.of(space, sample)
    assert model.sample == sample
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = space.supernet.eval()(images, space.from_sample(sample))
        assert torch.equal(model.executable_model().eval()(images), expected)


def test_another_strategys_supernet_is_exported_too() -> None:
    torch.manual_seed(0)
    space = RandomOneShot().mutate_model(NasBench201(4, 1, 10)).eval()
    sample = dict.fromkeys(space.simplify(), "conv_3x3")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        # Here NNI's freeze does what it should.
        assert torch.equal(fixed_network(space, sample)(images), space.freeze(sample).eval()(images))
