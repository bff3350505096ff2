"""Scores are measured in float32 where float32 is asked for, whatever the process allows elsewhere."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins import ZOO, SuperNet
from genas_plugins.correlation.training_free import naswot, synflow, zico
from genas_plugins.scoring import accuracy, flatness, mean_loss, precision, recalibrate_batchnorm, top_eigenvectors
from genas_plugins.scoring.noise import perturbations
from genas_plugins.scoring.perturbation import Perturbation
from genas_plugins.scoring.precision import exact_float32, parameter_types_alone

needs_switches = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9 has other switches"
)


BACKENDS = torch.backends


def switches() -> list[str]:
    owners = (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul)
    return [owner.fp32_precision for owner in owners]


def readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "refused"


def all_switches() -> dict[str, Any]:
    """Every switch, the older ones included; PyTorch refuses to tell these where newer ones disagree."""
    newer = {"conv": BACKENDS.cudnn.conv, "rnn": BACKENDS.cudnn.rnn, "cuda": BACKENDS.cudnn, "generic": BACKENDS}
    newer |= {"matmul": BACKENDS.cuda.matmul, "cpu conv": BACKENDS.mkldnn.conv, "cpu matmul": BACKENDS.mkldnn.matmul}
    return {
        **{name: owner.fp32_precision for name, owner in newer.items()},
        "allow cudnn": readable(lambda: BACKENDS.cudnn.allow_tf32),
        "allow matmul": readable(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "float32 matmul": readable(torch.get_float32_matmul_precision),
    }


@pytest.fixture
def fresh() -> Iterator[None]:
    """Afterwards the switches are those of a new process."""
    yield
    torch.set_float32_matmul_precision("highest")
    for owner in (BACKENDS, BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul):
        owner.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True


@pytest.fixture
def permissive() -> Iterator[list[str]]:
    """A process that lets everything round as coarsely as it can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield switches()
    finally:
        torch.set_float32_matmul_precision(before)


class Watched(nn.Module):
    """A small classifier that notes the switches each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(48, 6)
        self.seen: list[list[str]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(switches())
        return self.linear(self.relu(self.norm(x)).flatten(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 4, 4, generator=generator), torch.arange(8) % 6) for _ in range(2)]


@needs_switches
@pytest.mark.parametrize(
    "measure",
    [
        lambda model: flatness(model, batches(), (0.1, 0.2)),
        lambda model: accuracy(model, batches()),
        lambda model: mean_loss(model, batches()),
        lambda model: recalibrate_batchnorm(model, batches()),
        lambda model: top_eigenvectors(model, batches()),
        lambda model: naswot(model, batches()[0][0]),
        lambda model: zico(model, batches()),
    ],
    ids=["flatness", "accuracy", "loss", "recalibration", "Hessian", "NASWOT", "ZiCo"],
)
def test_every_measurement_is_exact_and_leaves_the_process_as_it_was(
    permissive: list[str], measure: Callable[[nn.Module], Any]
) -> None:
    model = Watched()
    measure(model)
    assert model.seen and all(seen == ["ieee"] * 4 for seen in model.seen)
    assert switches() == permissive != ["ieee"] * 4
    assert torch.get_float32_matmul_precision() == "medium"


@needs_switches
def test_an_error_leaves_the_process_as_it_was(permissive: list[str]) -> None:
    with pytest.raises(RuntimeError, match="out of paper"), exact_float32():
        raise RuntimeError("out of paper")
    assert switches() == permissive


@needs_switches
def test_a_thread_that_is_done_leaves_the_precision_to_one_that_is_not(permissive: list[str]) -> None:
    def measure(done: threading.Event, leave: threading.Event) -> list[str]:
        with exact_float32():
            done.set()
            assert leave.wait(30)
            return switches()

    events = [threading.Event() for _ in range(4)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(measure, events[0], events[1])
        assert events[0].wait(30)
        second = pool.submit(measure, events[2], events[3])
        assert events[2].wait(30)
        events[1].set()
        assert first.result() == ["ieee"] * 4
        events[3].set()
        assert second.result() == ["ieee"] * 4
    assert switches() == permissive


def turn(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


TURNS: dict[str, Callable[[], None]] = {
    "a new process": lambda: None,
    "cudnn.allow_tf32 = False": turn(BACKENDS.cudnn, "allow_tf32", False),
    "cuda.matmul.allow_tf32 = True": turn(BACKENDS.cuda.matmul, "allow_tf32", True),
    "set_float32_matmul_precision(high)": lambda: torch.set_float32_matmul_precision("high"),
    "set_float32_matmul_precision(medium)": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision = tf32": turn(BACKENDS, "fp32_precision", "tf32"),
    "fp32_precision = ieee": turn(BACKENDS, "fp32_precision", "ieee"),
    "cudnn.fp32_precision = tf32": turn(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "cuda.matmul.fp32_precision = tf32": turn(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn.fp32_precision = bf16": turn(BACKENDS.mkldnn, "fp32_precision", "bf16"),
    "cudnn.fp32_precision = ieee": turn(BACKENDS.cudnn, "fp32_precision", "ieee"),
}
if hasattr(BACKENDS.cudnn, "conv"):
    TURNS |= {
        "cudnn.conv.fp32_precision = ieee": turn(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        "cudnn.rnn.fp32_precision = ieee": turn(BACKENDS.cudnn.rnn, "fp32_precision", "ieee"),
    }


def mixed(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


TURNS |= {f"float32 matmul {name}, and then not": partial(mixed, name) for name in ("high", "medium")}


@needs_switches
@pytest.mark.parametrize("turned", TURNS)
def test_however_the_process_has_turned_its_switches_they_are_as_before(fresh: None, turned: str) -> None:
    TURNS[turned]()
    before = all_switches()
    for _ in range(2):
        with exact_float32():
            assert switches() == ["ieee"] * 4
        assert all_switches() == before


@needs_switches
@pytest.mark.parametrize("turned", TURNS)
def test_the_older_switches_can_be_read_meanwhile(fresh: None, turned: str) -> None:
    # What the compiler does, and a network that does without cuDNN for a while.
    TURNS[turned]()
    before = all_switches()
    with exact_float32():
        assert not BACKENDS.cudnn.allow_tf32 and not BACKENDS.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        with BACKENDS.cudnn.flags(enabled=False, allow_tf32=False):
            assert not BACKENDS.cudnn.enabled
    assert BACKENDS.cudnn.enabled
    assert all_switches() == before


@needs_switches
@pytest.mark.parametrize("turned", TURNS)
@pytest.mark.parametrize("flags", [{}, {"enabled": True, "benchmark": True}, {"enabled": True, "allow_tf32": False}])
def test_a_network_that_sets_the_flags_of_cudnn(fresh: None, turned: str, flags: dict[str, bool]) -> None:
    TURNS[turned]()
    before = all_switches()
    with exact_float32():
        for _ in range(2):
            with BACKENDS.cudnn.flags(**flags), BACKENDS.cudnn.flags(**flags):
                pass
            # What it asked for was for a while only: nothing rounds after that.
            assert not BACKENDS.cudnn.allow_tf32 and "tf32" not in switches()
            assert BACKENDS.cudnn.conv.fp32_precision == BACKENDS.cudnn.rnn.fp32_precision == "ieee"
    assert all_switches() == before


@needs_switches
def test_what_an_operation_inherits_it_inherits_afterwards(fresh: None) -> None:
    BACKENDS.fp32_precision = "tf32"
    with exact_float32():
        pass
    assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.mkldnn.conv.fp32_precision == "tf32"
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("given", ["highest", "high", "medium"])
def test_before_the_newer_switches_the_older_ones_are_turned(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(precision, "_operations", dict)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(given)
    try:
        with exact_float32():
            assert not BACKENDS.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        # Not "high", which cuda.matmul.allow_tf32 = True would make of "medium".
        assert BACKENDS.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == given
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_smallest_sigmas_of_the_paper_are_seen_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = SuperNet(10, 8, 4).subnet(ZOO["genas_flatness_c10"].genotype).cuda()
    images, labels = torch.randn(128, 3, 32, 32, device="cuda"), torch.arange(128, device="cuda") % 10
    recalibrate_batchnorm(model, [(images, labels)])
    sigmas = (1e-5, 5e-5, 1e-4)
    measured = flatness(model, [(images, labels)], sigmas, generator=torch.Generator("cuda").manual_seed(1))
    names = [name for name, _ in model.named_parameters()]
    exact = copy.deepcopy(model).double().eval()
    noise = perturbations(model, names, Perturbation(sigmas=sigmas), torch.Generator("cuda").manual_seed(1))
    for loss, noisy in zip(measured.losses, noise, strict=True):
        exact.load_state_dict(noisy, strict=False)
        assert loss == pytest.approx(F.cross_entropy(exact(images.double()), labels).item(), rel=1e-5)


SIGMAS = (1e-3, 3e-3, 6e-3)


def images_and_labels() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8) % 10) for _ in range(2)]


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 10))


def subnet() -> nn.Module:
    torch.manual_seed(0)
    return SuperNet(10, 4, 2).subnet(ZOO["genas_flatness_c10"].genotype)


def everything(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """All measurements, as plain numbers."""
    recalibrate_batchnorm(model, batches)
    statistics = [buffer.double().sum().item() for buffer in model.buffers()]
    flat = flatness(model, batches, SIGMAS)
    eigen = top_eigenvectors(model, batches, max_iterations=3)
    free = [naswot(model, batches[0][0]), zico(model, batches), synflow(model, (3, 16, 16))]
    return [statistics, flat.losses, mean_loss(model, batches), accuracy(model, batches), eigen.values, free]


def caller(name: str) -> Any:
    """What somebody may have set around a measurement."""
    if name.startswith("autocast"):
        return torch.autocast(name.split()[1], dtype=torch.bfloat16)
    return default_type(torch.float64)


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("around", ["autocast cpu", "default type"])
@pytest.mark.parametrize("build", [plain, subnet])
def test_scores_are_what_they_are_whatever_is_set_around_them(build: Callable[[], nn.Module], around: str) -> None:
    model, batches = build(), images_and_labels()
    wanted = everything(model, batches)
    with caller(around):
        found = everything(model, batches)
        assert torch.is_autocast_enabled("cpu") == around.startswith("autocast")
    assert found == wanted


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_autocast_is_off_for_any_device(device: str) -> None:
    # Without the device the switch of the thread is there all the same.
    torch.set_autocast_enabled(device, True)
    try:
        with parameter_types_alone():
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("build", [plain, subnet])
def test_images_of_another_type_are_read_in_that_of_the_parameters(build: Callable[[], nn.Module]) -> None:
    model, batches = build(), images_and_labels()
    wanted = everything(model, batches)
    assert everything(model, [(images.double(), labels) for images, labels in batches]) == wanted
    double = copy.deepcopy(model).double()
    measured = everything(double, batches)
    assert measured == everything(double, [(images.double(), labels) for images, labels in batches])
    # In float64, which float32 only approximates.
    with torch.no_grad():
        exact = sum(
            F.cross_entropy(double.eval()(images.double()), labels, reduction="sum").item()
            for images, labels in batches
        )
    assert measured[2] == pytest.approx(exact / 16, rel=1e-9)
    assert measured[2] != wanted[2]


def test_a_network_of_several_types_is_measured_in_them() -> None:
    # Half precision with normalisation in float32, as it is deployed.
    model = plain().bfloat16()
    model[1].float()
    recalibrate_batchnorm(model, images_and_labels())
    noisy = next(perturbations(model, [name for name, _ in model.named_parameters()], Perturbation(sigmas=(0.1, 0.2))))
    assert {name: value.dtype for name, value in noisy.items()} == {
        name: value.dtype for name, value in model.named_parameters()
    }
    exact = copy.deepcopy(model).float().eval()
    batches = images_and_labels()
    expected = sum(F.cross_entropy(exact(images), labels, reduction="sum").item() for images, labels in batches) / 16
    # 8 bits of mantissa within the network; the sum over images loses none.
    assert mean_loss(model, batches) == pytest.approx(expected, rel=1e-2)
    assert flatness(model, batches, (1e-4, 2e-4)).losses == pytest.approx([expected] * 2, rel=1e-2)
