"""Eigenvectors of the Hessian against autograd's own and NumPy, and the noise along them by hand."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from genas_plugins import ZOO
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.nasbench201 import NasBench201SuperNet
from genas_plugins.scoring import MeasurementError, flatness, mean_loss, recalibrate_batchnorm, top_eigenvectors
from genas_plugins.scoring.flatness import perturbed_losses
from genas_plugins.scoring.hessian import HESSIAN_IMAGES, noise_directions
from genas_plugins.scoring.noise import perturbations
from genas_plugins.scoring.perturbation import Perturbation
from genas_plugins.spaces import NasBench201Architecture

SIGMAS = (0.01, 0.03, 0.06)
FULL = "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
Batches = list[tuple[Tensor, Tensor]]


class Diagonal(nn.Module):
    """A network whose cross-entropy for label 0 is exactly ``2 + sum_i a_i theta_i^2 / 2`` at ``theta``.

    The softmax of the logits ``(-log(e^L - 1), 0)`` gives ``L``.
    """

    def __init__(self, curvatures: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=dtype)
        self.theta = nn.Parameter(torch.zeros(len(curvatures), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        loss = 2 + (self.curvatures * self.theta.square()).sum() / 2
        first = (-loss.expm1().log()).expand(len(x))
        return torch.stack([first, torch.zeros_like(first)], 1)


ONE: Batches = [(torch.zeros(1), torch.zeros(1, dtype=torch.long))]


def tiny(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Calibrated, and smooth, so that second derivatives exist wherever one looks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Conv2d(3, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(27, 4),
        ).to(dtype)
    recalibrate_batchnorm(model, batches(dtype))
    return model


def batches(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (8, 8, 3), classes: int = 4) -> Batches:
    """Batches of unequal size: the loss is a mean over images, not over batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator).to(dtype), torch.randint(classes, (n,), generator=generator))
        for n in sizes
    ]


def exact(model: nn.Module, data: Batches, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (columns) by the whole matrix, largest absolute value first."""
    model = copy.deepcopy(model).double().eval()
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    weights = [model.get_parameter(name).detach() for name in names]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([weight.numel() for weight in weights])
        replaced = {name: p.view_as(w) for name, p, w in zip(names, pieces, weights, strict=True)}
        return F.cross_entropy(functional_call(model, replaced, (images.double(),)), labels)

    matrix = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten() for weight in weights]))
    values, vectors = np.linalg.eigh(matrix.numpy())
    order = np.argsort(-abs(values))
    return values[order], vectors[:, order]


def flat(vector: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([piece.flatten() for piece in vector.values()]).numpy()


@pytest.mark.parametrize("names", [None, ["6.weight", "1.bias"]])
def test_eigenpairs_are_those_of_the_whole_matrix(names: list[str] | None) -> None:
    model, data = tiny(), batches()
    ours = top_eigenvectors(model, data, names, 5, tolerance=1e-10)
    # In the order of the model, whatever the order of the names.
    order = [name for name, _ in model.named_parameters() if names is None or name in names]
    values, vectors = exact(model, data, order)
    assert ours.values == pytest.approx(values[:5], rel=1e-9)
    assert all(list(vector) == order for vector in ours.vectors)
    rows = np.stack([flat(vector) for vector in ours.vectors])
    assert rows @ rows.T == pytest.approx(np.eye(5), abs=1e-12)
    assert abs(np.sum(rows.T * vectors[:, :5], axis=0)) == pytest.approx(np.ones(5), abs=1e-8)
    # An eigenvector has no sign; ours has a positive largest component.
    assert all(row[abs(row).argmax()] > 0 for row in rows)
    assert max(r / abs(v) for r, v in zip(ours.residuals, ours.values, strict=True)) < 1e-10


def test_the_tolerance_bounds_the_residual_of_the_matrix() -> None:
    model, data = tiny(), batches()
    values, vectors = exact(model, data, [name for name, _ in model.named_parameters()])
    loose, tight = (top_eigenvectors(model, data, tolerance=tolerance) for tolerance in (1e-2, 1e-6))
    assert loose.products < tight.products < 40
    for found, tolerance in ((loose, 1e-2), (tight, 1e-6)):
        vector = flat(found.vectors[0])
        residual = np.linalg.norm(vectors @ (values * (vectors.T @ vector)) - found.values[0] * vector)
        assert residual == pytest.approx(found.residuals[0], rel=1e-3, abs=1e-12)
        assert residual <= tolerance * abs(found.values[0])


@pytest.mark.parametrize(
    ("curvatures", "values"),
    [
        # The largest absolute value is negative.
        ([1.0, -4.0, 2.0, 0.5, 3.0], [-4.0, 3.0, 2.0]),
        # Power iteration would turn in circles between the first two.
        ([1.0, -3.0, 3.0, 0.5], [-3.0, 3.0, 1.0]),
        # An eigenvalue that occurs twice has two eigenvectors.
        ([2.0, 5.0, 1.0, 5.0, 0.1], [5.0, 5.0, 2.0]),
        # Rank one, and none.
        ([0.0, 0.0, -7.0, 0.0], [-7.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        # As many as there are weights.
        ([1.0, 3.0, -2.0], [3.0, -2.0, 1.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenpairs_in_closed_form(curvatures: list[float], values: list[float], dtype: torch.dtype) -> None:
    found = top_eigenvectors(Diagonal(curvatures, dtype), ONE, count=3, tolerance=1e-5)
    # The first two of one absolute value may change places.
    assert np.abs(found.values) == pytest.approx(np.abs(values), abs=1e-4)
    assert sorted(found.values) == pytest.approx(sorted(values), abs=1e-4)
    rows = np.stack([flat(vector) for vector in found.vectors])
    assert rows @ rows.T == pytest.approx(np.eye(3), abs=1e-5)
    assert np.array(curvatures) * rows == pytest.approx(np.array(found.values)[:, None] * rows, abs=1e-4)


def test_a_parameter_without_say_has_no_part_in_it() -> None:
    model = tiny()
    model.add_module("unused", nn.Linear(2, 2).double())
    model.unused.forward = None
    forward = nn.Sequential(*list(model)[:-1])
    model.forward = forward.forward
    found = top_eigenvectors(model, batches())
    assert found.values == pytest.approx(top_eigenvectors(tiny(), batches()).values, rel=1e-5)
    # What the search started with there has gone, as far as the tolerance says.
    assert max(float(t.abs().max()) for name, t in found.vectors[0].items() if name.startswith("unused")) < 1e-3
    assert top_eigenvectors(model, batches(), ["unused.weight"]).values == (0.0,)


def snapshot(model: nn.Module) -> list[object]:
    """Everything that a measurement must leave as it was."""
    return [
        [(name, value.tolist()) for name, value in model.state_dict().items()],
        [
            (id(p), p.data_ptr(), p.requires_grad, None if p.grad is None else p.grad.tolist())
            for p in model.parameters()
        ],
        [module.training for module in model.modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
    ]


class Failing(list):
    """Batches that break in the third pass, behind the first of them."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield self[0]
        if self.passes == 3:
            raise OSError("unreadable")
        yield from self[1:]


@pytest.mark.parametrize("outcome", ["found", "unreadable", "not finite"])
def test_nothing_is_left_behind(outcome: str) -> None:
    model, data = tiny().train(), batches()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].bias.grad = torch.ones(4).double()
    before = snapshot(model)
    with torch.no_grad():
        if outcome == "found":
            measured = flatness(model, data, SIGMAS, noise="hessian")
            # Frozen parameters move as all others do.
            assert noise_directions(model, data, ["0.weight"], 1, None)[0]["0.weight"].any()
            assert measured == flatness(tiny(), data, SIGMAS, noise="hessian")
        elif outcome == "unreadable":
            with pytest.raises(OSError, match="unreadable"):
                top_eigenvectors(model, Failing(data))
        else:
            with pytest.raises(MeasurementError, match="Hessian of the loss is not finite"):
                flatness(model, [(data[0][0] * math.nan, data[0][1])], SIGMAS, noise="hessian")
    model.requires_grad_(model[6].weight.requires_grad)
    model[0].weight.requires_grad_(False)
    assert snapshot(model) == before


def test_within_inference_mode_too() -> None:
    model, data = tiny(), batches()
    expected = flatness(model, data, SIGMAS, noise="hessian")
    with torch.inference_mode():
        assert flatness(model, data, SIGMAS, noise="hessian") == expected


def test_what_has_not_converged_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = top_eigenvectors(tiny(), batches(), max_iterations=3)
    assert found.products == 3 and found.residuals[0] > 1e-3 * abs(found.values[0])
    assert "Eigenvector 1 (eigenvalue" in caplog.text and "after 3 products" in caplog.text
    caplog.clear()
    top_eigenvectors(tiny(), batches(), count=3)
    assert not caplog.text


def test_the_seed_decides_where_the_search_starts_and_next_to_nothing_else() -> None:
    model, data = tiny(), batches()
    first, again, other = (
        top_eigenvectors(model, data, count=2, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert first.values == again.values and other.values != first.values
    assert other.values == pytest.approx(first.values, rel=1e-5)
    for a, b, c in zip(first.vectors, again.vectors, other.vectors, strict=True):
        assert np.array_equal(flat(a), flat(b))
        assert flat(c) == pytest.approx(flat(a), abs=1e-2)
    default = top_eigenvectors(model, data, count=2)
    assert default.values == top_eigenvectors(model, data, count=2, generator=torch.Generator().manual_seed(0)).values


def moved(model: nn.Module, directions: list[dict[str, Tensor]], steps: list[float]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for direction, step in zip(directions, steps, strict=True):
            for name, piece in direction.items():
                model.get_parameter(name).add_(piece, alpha=step)
    return model


def norm_of(model: nn.Module, names: list[str]) -> float:
    return math.sqrt(sum(float(model.get_parameter(name).detach().double().square().sum()) for name in names))


SUPERNETS = {
    "nasbench201": lambda: NasBench201SuperNet(4, 1, 4).subnet(NasBench201Architecture.from_string(FULL)),
    "darts": lambda: SuperNet(4, init_channels=4, num_cells=2).subnet(next(iter(ZOO.values())).genotype),
}


def subnet(space: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SUPERNETS[space]().double()
    recalibrate_batchnorm(model, batches())
    return model


@pytest.mark.parametrize(
    ("space", "relative", "where"),
    [("nasbench201", False, "all"), ("nasbench201", True, "cells"), ("darts", True, "cells")],
)
def test_losses_of_a_subnet_by_hand(space: str, relative: bool, where: str) -> None:
    model, data = subnet(space), batches(sizes=(4, 3))
    names = [name for name, _ in model.named_parameters() if where == "all" or name.startswith("cells.")]
    directions = list(noise_directions(model, data, names, 2, torch.Generator().manual_seed(5)))
    steps = torch.randn(2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()
    size = norm_of(model, names) / math.sqrt(2) if relative else 1.0
    expected = [mean_loss(moved(model, directions, [sigma * size * step for step in steps]), data) for sigma in SIGMAS]
    result = flatness(
        model,
        data,
        SIGMAS,
        noise="hessian",
        where=where,
        generator=torch.Generator().manual_seed(5),
        relative=relative,
        hessian_directions=2,
    )
    assert result.losses == pytest.approx(expected, rel=1e-10)
    assert len({round(loss, 9) for loss in expected}) == 3


@pytest.mark.parametrize("space", list(SUPERNETS))
def test_eigenvectors_of_a_subnet_by_another_product(space: str) -> None:
    model = subnet(space)
    data = batches(sizes=(4, 3))
    found = top_eigenvectors(model, data, tolerance=1e-3)
    names = [name for name, _ in model.named_parameters()]
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))

    def loss(*weights: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model.eval(), dict(zip(names, weights, strict=True)), (images,)), labels)

    weights, vector = tuple(p.detach() for p in model.parameters()), tuple(found.vectors[0].values())
    _, image = torch.autograd.functional.hvp(loss, weights, vector)
    residual = sum(float((a - found.values[0] * b).square().sum()) for a, b in zip(image, vector, strict=True)) ** 0.5
    assert residual == pytest.approx(found.residuals[0], rel=1e-4)
    assert 0.0 < residual <= 1e-3 * abs(found.values[0])


def test_each_draw_has_steps_of_its_own_along_the_same_eigenvectors() -> None:
    model, data = tiny(), batches()
    directions = list(
        noise_directions(model, data, [n for n, _ in model.named_parameters()], 2, torch.Generator().manual_seed(5))
    )
    steps = [
        torch.randn(2, generator=torch.Generator().manual_seed(5 + draw), dtype=torch.float64) for draw in range(3)
    ]
    expected = [
        [mean_loss(moved(model, directions, (sigma * step).tolist()), data) for sigma in SIGMAS] for step in steps
    ]
    passes: list[int] = []
    model.register_forward_hook(lambda _, inputs, output: passes.append(len(output)))

    def losses(draws: int) -> list[list[float]]:
        passes.clear()
        settings = {"noise": "hessian", "generator": torch.Generator().manual_seed(5), "hessian_directions": 2}
        return perturbed_losses(model, data, SIGMAS, draws=draws, **settings)

    assert np.array(losses(3)) == pytest.approx(np.array(expected), rel=1e-12)
    # The eigenvectors take no passes for another draw.
    three = len(passes)
    losses(1)
    assert three - len(passes) == 2 * len(SIGMAS) * len(data)


def test_steps_are_normal_numbers_and_relative_ones_as_long_as_isotropic_noise() -> None:
    model = nn.ParameterDict({"a": torch.full((4, 100), 3.0), "b": torch.linspace(-1, 1, 500)})
    basis = torch.linalg.qr(torch.randn(900, 3, generator=torch.Generator().manual_seed(0)))[0].T
    directions = [{"a": row[:400].view(4, 100), "b": row[400:]} for row in basis]

    def noise(mode: str, relative: bool, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = directions if mode == "hessian" else ()
        last = list(
            perturbations(
                model,
                ["a", "b"],
                Perturbation(sigmas=SIGMAS, noise=mode, relative=relative),
                generator,
                directions=chosen,
            )
        )[-1]
        return torch.cat([(last[name] - model[name]).flatten() for name in ("a", "b")]).detach()

    plain = torch.stack([basis @ noise("hessian", False, seed) for seed in range(500)])
    # Five standard errors of 500 draws.
    assert torch.cov(plain.T) / 0.06**2 == pytest.approx(np.eye(3), abs=5 * math.sqrt(2 / 500))
    assert plain.mean(0) / 0.06 == pytest.approx(np.zeros(3), abs=5 / math.sqrt(500))
    squares = torch.stack([noise("hessian", True, seed).square().sum() for seed in range(500)])
    isotropic = float(noise("shared", True, 0).square().sum())
    assert isotropic == pytest.approx(0.06**2 * norm_of(model, ["a", "b"]) ** 2, rel=0.1)
    # A third of a chi-square variable of three degrees has variance 2/3.
    assert float(squares.mean()) == pytest.approx(isotropic, rel=0.1 + 5 * math.sqrt(2 / 3 / 500))


def test_the_first_images_alone_give_the_directions() -> None:
    model = tiny()
    sizes = (100, 100, 100, 50)
    data = batches(sizes=sizes)
    names = [name for name, _ in model.named_parameters()]
    images, labels = (torch.cat(parts)[:HESSIAN_IMAGES] for parts in zip(*data, strict=True))
    start = torch.Generator().manual_seed(2**63 - 1)
    expected = top_eigenvectors(model, [(images, labels)], names, generator=start)
    assert flat(noise_directions(model, data, names, 1, None)[0]) == pytest.approx(flat(expected.vectors[0]), abs=1e-10)
    everything = top_eigenvectors(model, data, names)
    assert abs(flat(everything.vectors[0]) - flat(expected.vectors[0])).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["nothing.weight"]}, "no parameters named nothing.weight"),
        ({"names": []}, "at least one parameter, got no names"),
        ({"count": 0}, "count must be 1 to 199, the number of weights, got 0"),
        ({"count": 200}, "count must be 1 to 199, the number of weights, got 200"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1"),
        ({"tolerance": math.nan}, "tolerance must be between 0 and 1"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"batches": []}, "at least one batch of images, got none"),
        ({"batches": iter(batches())}, "at least one batch of images, got none; it reads them several times"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenvectors(**{"model": tiny(), "batches": batches(), **change})


def test_noise_along_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pass those of top_eigenvectors as directions="):
        next(perturbations(tiny(), ["0.weight"], Perturbation(sigmas=SIGMAS, noise="hessian")))
