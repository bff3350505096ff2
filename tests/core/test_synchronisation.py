"""A score reads nothing from the device before its end: a GPU would stand idle meanwhile."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genas_plugins import ZOO, SuperNet
from genas_plugins.datasets import ImageTensors
from genas_plugins.nasbench201 import OPERATIONS, NasBench201Architecture, NasBench201SuperNet
from genas_plugins.scoring import CommonNoise, accuracy, flatness, mean_loss, recalibrate_batchnorm
from genas_plugins.scoring.data import TensorBatches, sum_over_batches
from genas_plugins.scoring.inference import InferenceNetwork

SIGMAS = (1e-3, 2e-3, 3e-3)
aten = torch.ops.aten


class Reads(TorchDispatchMode):
    """Counts operators that give a number to Python, or a tensor whose size is known only when it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero):
            self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def supernet(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return NasBench201SuperNet(4, 1, 10) if kind == "nasbench201" else SuperNet(10, 4, 3)


def candidate(kind: str, owner: Any) -> nn.Module:
    if kind == "nasbench201":
        return owner.subnet(NasBench201Architecture((*OPERATIONS, "nor_conv_3x3")))
    if kind == "darts":
        return owner.subnet(ZOO["genas_flatness_c10"].genotype)
    # Not rewritten for inference.
    return nn.Sequential(owner.subnet(ZOO["genas_flatness_c10"].genotype))


@pytest.fixture
def batches() -> TensorBatches:
    images = torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TensorBatches(ImageTensors(images, torch.arange(10), tuple("abcdefghij")), 4, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("settings", [{}, {"relative": True, "draws": 2}, {"common": True, "noise": "shared"}])
@pytest.mark.parametrize("kind", ["darts", "nasbench201", "any network"])
def test_nothing_is_read_within_a_score(kind: str, settings: dict[str, Any], batches: TensorBatches) -> None:
    owner = supernet(kind)
    network = candidate(kind, owner)
    if settings.get("common"):
        settings = {**settings, "common": CommonNoise(owner, 0)}
    with Reads() as reads:
        recalibrate_batchnorm(network, batches)
        flatness(network, batches, SIGMAS, generator=torch.Generator().manual_seed(0), **settings)
        accuracy(network, batches)
    # A list of numbers, at the end, is read without an operator.
    assert not reads.counts


def test_a_number_that_is_read_is_noticed(batches: TensorBatches) -> None:
    network = candidate("darts", supernet("darts"))
    with Reads() as reads:
        mean_loss(network, batches)
    assert reads.counts == {"aten._local_scalar_dense": 1}
    with Reads() as reads:
        sum_over_batches(batches, lambda images, _: images.sum() * float(images.max()))
    assert reads.counts == {"aten._local_scalar_dense": 3}


@pytest.mark.parametrize("kind", ["darts", "nasbench201"])
def test_passes_run_where_nothing_can_be_read(kind: str) -> None:
    # Tensors of the meta device have no numbers: a copy to the CPU would be an error too.
    with torch.device("meta"):
        network = InferenceNetwork(candidate(kind, supernet(kind)))
        images, labels = torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.long)
    network.calibrate(images, 0.5)
    network.load({name: torch.empty_like(value) for name, value in network._own.items()})
    total, count = sum_over_batches(
        [(images, labels)] * 2, lambda x, y: nn.functional.cross_entropy(network(x), y, reduction="sum")
    )
    assert isinstance(total, Tensor) and total.device.type == "meta" and count == 8
