"""What is computed in float64 goes without it on a device that has none, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins import ZOO, SuperNet, devices
from genas_plugins.checks import check_device
from genas_plugins.correlation import Setting, measure_raw
from genas_plugins.correlation.training_free import naswot, synflow, zico
from genas_plugins.datasets import ImageTensors
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SuperNet
from genas_plugins.scoring import (
    CombinedScore,
    accuracy,
    angle,
    flatness,
    mean_loss,
    recalibrate_batchnorm,
    top_eigenvectors,
)
from genas_plugins.scoring.angle import parameter_angle
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.flatness import perturbed_image_losses

SIGMAS = (0.01, 0.02, 0.05)
CELL = NasBench201Architecture.from_string(
    "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|skip_connect~0|nor_conv_3x3~1|avg_pool_3x3~2|"
)


class Two:
    """A supernet before and after a training, a path of it and images."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.before = NasBench201SuperNet(num_classes=4, init_channels=4, cells_per_stage=1)
        self.after = NasBench201SuperNet(num_classes=4, init_channels=4, cells_per_stage=1)
        self.images = torch.rand(24, 3, 8, 8)
        self.labels = torch.arange(24) % 4
        self.batches = [(self.images[:16], self.labels[:16]), (self.images[16:], self.labels[16:])]
        pixels = (self.images * 255).to(torch.uint8)
        data = ImageTensors(pixels, self.labels, class_names=tuple("abcd"))
        self.tensors = TensorBatches(data, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.darts = [SuperNet(4, init_channels=4, num_cells=3) for _ in range(2)]

    @property
    def subnet(self) -> nn.Module:
        model = self.after.subnet(CELL)
        recalibrate_batchnorm(model, self.batches)
        return model


def regression(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, 4).float(), reduction="none")


def labels_that_are_missing(two: Two) -> float:
    return mean_loss(two.subnet, [(two.images, two.labels.masked_fill(two.labels == 3, 255))])


MEASUREMENTS: dict[str, Callable[[Two], Any]] = {
    "flatness": lambda two: flatness(two.subnet, two.batches, SIGMAS),
    "flatness of tensors": lambda two: flatness(two.subnet, two.tensors, SIGMAS, draws=2),
    "flatness of another loss": lambda two: flatness(two.subnet, two.batches, SIGMAS, loss=regression),
    "flatness along the Hessian": lambda two: flatness(two.subnet, two.batches, SIGMAS, noise="hessian"),
    "loss of each image": lambda two: [
        part.tolist() for part in perturbed_image_losses(two.subnet, two.tensors, SIGMAS)
    ],
    "loss of labelled images": labels_that_are_missing,
    "accuracy": lambda two: accuracy(two.subnet, two.tensors),
    "eigenvalue": lambda two: top_eigenvectors(two.subnet, two.batches, max_iterations=5).values,
    "angle": lambda two: angle(two.before, two.after, CELL),
    "angle of DARTS": lambda two: angle(*two.darts, ZOO["genas_flatness_c10"].genotype),
    "angle of parameters": lambda two: parameter_angle(dict(two.before.named_parameters()), two.after),
    "NASWOT": lambda two: naswot(two.subnet, two.images[:8]),
    "SynFlow": lambda two: synflow(two.subnet, (3, 8, 8)),
    "ZiCo": lambda two: zico(two.subnet, two.batches),
    "all that correlate measures": lambda two: measure_raw(
        two.subnet, [Setting(name="a", score=CombinedScore(sigmas=SIGMAS))], two.batches, recalibration=two.batches
    ),
}


@pytest.fixture(scope="module")
def two() -> Two:
    return Two()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measured_on_a_device_without_float64_as_on_one_with_it(
    name: str, two: Two, without_float64: Callable[..., Any]
) -> None:
    expected = MEASUREMENTS[name](two)
    if name == "NASWOT":
        # LAPACK's last digit depends on where the memory lies.
        expected = pytest.approx(expected, rel=1e-12)
    with without_float64() as trap:
        assert MEASUREMENTS[name](two) == expected
    assert trap.made or name == "accuracy"


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda x: x + torch.arange(3.0, dtype=torch.float64),
        # On the CPU, and then together with what is on the device.
        lambda x: devices.in_float64(x) + x,
        lambda x: devices.full_in_float64((3,), 1.0, x.device).add_(x),
        lambda x: nn.Linear(3, 1).double(),
    ],
)
def test_the_trap_finds_what_such_a_device_refuses(
    make: Callable[[Tensor], Any], without_float64: Callable[..., Any]
) -> None:
    x = torch.ones(3)
    make(x)
    with without_float64(), pytest.raises(AssertionError, match="a tensor of float64 on a device that has none"):
        make(x)


def test_where_float64_is_computed() -> None:
    assert [devices.has_float64(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [True, True, False]
    assert devices.float64_device(torch.device("mps")) == torch.device("cpu")
    assert devices.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    # 2^24 + 1 is no number of float32: half of a float32 sum of ones would be lost there.
    total = devices.full_in_float64((), 2.0**24, torch.device("mps"))
    assert (total + devices.in_float64(torch.tensor(1.0))).item() == 2**24 + 1
    assert devices.host_float64(range(3)).tolist() == [0.0, 1.0, 2.0]


def test_a_gpu_of_intel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        properties = type("Properties", (), {"has_fp64": has})
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=properties: found)
        assert devices.has_float64(torch.device("xpu")) is has


def test_a_network_of_float64_is_refused_where_it_cannot_be() -> None:
    devices.check_float64([torch.float64], torch.device("cpu"))
    devices.check_float64([torch.float32], torch.device("mps"))
    with pytest.raises(ValueError, match=r"of float64, which mps does not have: take float32 .* or another device"):
        devices.check_float64([torch.float32, torch.float64], torch.device("mps"))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_a_device_that_this_machine_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device is mps, but PyTorch finds no such GPU of Apple's here"):
        check_device("mps")
