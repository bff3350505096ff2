"""Sizes at the edge: a last batch of one image, and networks that run at another size than they were traced at."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from genas_plugins import ZOO, CellNetwork, SuperNet
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201Network, NasBench201SuperNet
from genas_plugins.scoring import accuracy, flatness, recalibrate_batchnorm, top_eigenvectors
from genas_plugins.scoring.data import without_single_images

GENOTYPE = ZOO["genas_flatness_c10"].genotype
CELL = NasBench201Architecture.from_index(9_930)


def of_one_pixel() -> nn.Module:
    """A network whose last features have one pixel where images have 32."""
    torch.manual_seed(0)
    return SuperNet(10, 4, 3, "imagenet").subnet(GENOTYPE)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator)
    return list(zip(images.split(sizes), torch.arange(sum(sizes)).split(sizes), strict=True))


@pytest.mark.parametrize("build", [of_one_pixel, plain])
def test_a_last_image_is_recalibrated_with_the_batch_before_it(build: Callable[[], nn.Module]) -> None:
    found, wanted = build(), build()
    recalibrate_batchnorm(found, batches(8, 8, 1))
    recalibrate_batchnorm(wanted, batches(8, 9))
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), wanted.buffers(), strict=True))


@pytest.mark.parametrize(
    ("given", "expected"),
    [((8, 1), (9,)), ((8, 1, 8), (9, 8)), ((1, 8), (1, 8)), ((1, 1), (1, 1)), ((8, 2), (8, 2)), ((1,), (1,)), ((), ())],
)
def test_only_an_image_behind_several_joins_them(given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    found = list(without_single_images(batches(*given) if given else []))
    assert tuple(len(images) for images, _ in found) == expected
    assert torch.cat([torch.arange(0), *(labels for _, labels in found)]).tolist() == list(range(sum(given)))


def test_a_single_image_of_one_pixel_is_refused() -> None:
    model = of_one_pixel()
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batchnorm(model, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cifar": lambda: CellNetwork(GENOTYPE, 4, 3, 10, "cifar"),
    "imagenet": lambda: CellNetwork(GENOTYPE, 4, 3, 10, "imagenet"),
    "subnet": lambda: SuperNet(10, 4, 3).subnet(GENOTYPE),
    "nasbench201": lambda: NasBench201Network(CELL, 4, 1),
    "nasbench201 subnet": lambda: NasBench201SuperNet(4, 1).subnet(CELL),
}
SIZES = ((33, 32), (34, 35), (47, 61))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_runs_at_any_size(name: str, training: bool) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().train(training)
    traced = torch.jit.trace(copy.deepcopy(network), torch.rand(2, 3, 32, 32), check_trace=False)
    for height, width in SIZES:
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            assert torch.allclose(traced(images), network(images), atol=1e-4), (height, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_runs_at_any_size(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    auto = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    # PyTorch takes a dimension of 1, as features of one pixel have, for one that cannot change.
    scale = 3 if name == "imagenet" else 1
    program = export(network, (torch.rand(2, 3, 32 * scale, 48 * scale),), dynamic_shapes=(auto,)).module()
    for height, width in SIZES:
        images = torch.rand(3, 3, height * scale, width * scale)
        with torch.no_grad():
            assert torch.allclose(program(images), network(images), atol=1e-4), (height, width)


def test_a_symbolic_trace_runs_at_any_size() -> None:
    torch.manual_seed(0)
    network = CellNetwork(GENOTYPE, 4, 5, 10, "cifar").eval()
    traced = torch.fx.symbolic_trace(network)
    for height, width in SIZES:
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            assert torch.equal(traced(images), network(images)), (height, width)


@pytest.mark.parametrize("name", [*NETWORKS, "supernet", "nasbench201 supernet"])
def test_networks_are_pickled_and_copied(name: str) -> None:
    build = {**NETWORKS, "supernet": lambda: SuperNet(10, 4, 3), "nasbench201 supernet": NasBench201SuperNet}[name]
    network = build().eval()
    for again in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        pairs = zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class Held(nn.Module):
    """A network of somebody's that can be neither pickled nor copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = plain()
        self.pool = lambda x: x.mean((2, 3))

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("not to be pickled")

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layers(x))


def test_a_network_that_cannot_be_pickled_is_measured() -> None:
    model, seen = Held(), [(images, labels % 4) for images, labels in batches(8)]
    recalibrate_batchnorm(model, seen)
    model.eval()
    expected = nn.functional.cross_entropy(model(seen[0][0]), seen[0][1]).item()
    assert flatness(model, seen, (1e-8, 2e-8)).losses == pytest.approx([expected] * 2, abs=1e-5)
    assert 0.0 <= accuracy(model, seen).top1 <= 1.0
    assert top_eigenvectors(model, seen).products > 0
