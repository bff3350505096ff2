"""Top eigenvectors of the Hessian of the loss: the directions in which the loss surface of a network bends most.

They are found by the method of Lanczos with full reorthogonalisation (Golub and Van Loan, Matrix Computations, section
10.1), one after another, each beside those found before (deflation). It is power iteration that forgets nothing: after
as many products of the Hessian and a vector, the best vector in the span of all iterates instead of the last one. Power
iteration, as in PyHessian (Yao et al., 2020), takes a multiple of the products and may rest on the second eigenvector
for several of them, where a test for convergence ends it too soon.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genas_plugins.devices import host_float64
from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.scoring.data import Batches, first_images
from genas_plugins.scoring.errors import MeasurementError
from genas_plugins.scoring.losses import Loss, check_summed, image_loss, loss_of_image
from genas_plugins.scoring.precision import in_parameter_type, parameter_types_alone

__all__ = ["HESSIAN_IMAGES", "Eigenpairs", "noise_directions", "top_eigenvectors"]

HESSIAN_IMAGES = 256
"""Images whose Hessian gives the directions of the noise: the first of the validation images, or all if fewer."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of a Hessian and their eigenvectors, the largest absolute value first.

    Attributes:
        values: Eigenvalues, in nats per squared unit of the weights; those of a loss that is not at its minimum may
            be negative.
        vectors: For each, an eigenvector in the shapes of the parameters, by name: orthogonal to the others, and of
            length 1 over all of them together. Its component of largest absolute value is positive.
        residuals: For each, ``|H v - lambda v|`` without the parts along the eigenvectors before it.
        products: Products of the Hessian and a vector that it took.
    """

    values: tuple[float, ...]
    vectors: tuple[dict[str, Tensor], ...]
    residuals: tuple[float, ...]
    products: int


@parameter_types_alone()
@torch.inference_mode(False)
def top_eigenvectors(
    model: nn.Module,
    batches: Batches,
    names: Collection[str] | None = None,
    count: int = 1,
    generator: torch.Generator | None = None,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    loss: Loss | None = None,
) -> Eigenpairs:
    """Eigenvectors of the Hessian of the mean loss with the largest absolute eigenvalues.

    The Hessian is that with respect to the named parameters in evaluation mode, with the statistics of batch
    normalisation that the model has, exact (derivatives of derivatives, no differences). Where the loss has a kink (a
    ReLU at 0), it is that of the side which PyTorch takes. A search that goes on until ``|H v - lambda v|`` is at most
    ``tolerance * |lambda|`` took 6 to 10 products for subnets of a trained supernet of NAS-Bench-201; each further
    eigenvector is a search of its own. A product costs about three passes forward and backward, and its memory is that
    of one batch.

    Nothing about the model or the global random state is changed, also when a batch fails.

    Args:
        model: Maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
        batches: Images and labels ``(N,)`` on the model's device; iterated anew for each product.
        names: Names of the parameters; ``None`` for all.
        count: How many eigenvectors.
        generator: Source of the random vectors that the search starts from, on any device; ``None`` is a generator
            with seed 0.
        tolerance: When an eigenvector is good enough, see above. Eigenvalues below ``sqrt(eps)`` times the largest
            (``eps`` of the weights' dtype) are measured by that instead: rounding hides them.
        max_iterations: Products for each eigenvector at most. What has not converged by then is returned as it is,
            with a warning in the log.
        loss: See :func:`genas_plugins.scoring.flatness`; ``None`` for cross-entropy.

    Raises:
        ValueError: Names that do not exist, a count below 1 or above the number of weights, a tolerance that is not
            between 0 and 1, no iteration, or no batches.
        MeasurementError: The Hessian is not finite.
    """
    hessian = _Hessian(model, batches, names, loss_of_image(loss))
    if not 1 <= count <= hessian.size:
        raise ValueError(f"count must be 1 to {hessian.size}, the number of weights, got {count}.")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, for instance 0.001, got {tolerance}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}.")
    if generator is None:
        generator = torch.Generator(hessian.device).manual_seed(0)
    values: list[float] = []
    vectors: list[Tensor] = []
    residuals: list[float] = []
    products = 0
    for number in range(1, count + 1):
        start = torch.randn(hessian.size, generator=generator, device=generator.device, dtype=hessian.dtype)
        floor = math.sqrt(torch.finfo(hessian.dtype).eps) * max(map(abs, values), default=0.0)
        value, vector, residual, steps = _largest(
            hessian, start.to(hessian.device), vectors, tolerance, floor, max_iterations
        )
        if residual > tolerance * max(abs(value), floor):
            _logger.warning(
                "Eigenvector %d (eigenvalue %g) has a residual of %g after %d products.", number, value, residual, steps
            )
        values.append(value)
        vectors.append(vector)
        residuals.append(residual)
        products += steps
    return Eigenpairs(tuple(values), tuple(map(hessian.by_name, vectors)), tuple(residuals), products)


@torch.inference_mode(False)
def noise_directions(
    model: nn.Module,
    batches: Batches,
    names: Collection[str],
    count: int,
    generator: torch.Generator | None,
    loss: Loss | None = None,
) -> tuple[dict[str, Tensor], ...]:
    """The directions of the noise ``"hessian"``: eigenvectors from the first :data:`HESSIAN_IMAGES` images.

    Their search starts from a generator of its own, with the seed of ``generator`` minus 1, so that the noise comes
    from ``generator`` as it stands.

    Args:
        model: See :func:`top_eigenvectors`.
        batches: Validation images and labels.
        names: Names of the perturbed parameters.
        count: How many directions.
        generator: Source of the noise; ``None`` is one with seed 0. It is not advanced.
        loss: See :func:`genas_plugins.scoring.flatness`.

    Raises:
        ValueError: See :func:`top_eigenvectors`.
        MeasurementError: The Hessian is not finite.
    """
    device = next(model.parameters()).device if generator is None else generator.device
    seed = 0 if generator is None else generator.initial_seed()
    start = torch.Generator(device).manual_seed((seed - 1) % 2**63)
    return top_eigenvectors(model, first_images(batches, HESSIAN_IMAGES), names, count, start, loss=loss).vectors


class _Hessian:
    """The Hessian as what it does to a vector: one number for each weight, parameter by parameter."""

    def __init__(
        self, model: nn.Module, batches: Batches, names: Collection[str] | None, loss: Loss | None = None
    ) -> None:
        self._model = model
        self._batches = batches
        self._loss = loss
        # New tensors on the same memory: no flag of the model's own is touched and no .grad is written.
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        chosen = set(self._tensors if names is None else names)
        if unknown := sorted(chosen - self._tensors.keys()):
            raise ValueError(f"The model has no parameters named {', '.join(unknown[:5])} ({len(unknown)} in all).")
        self._weights = {name: t.requires_grad_() for name, t in self._tensors.items() if name in chosen}
        if not self._weights:
            raise ValueError(f"The Hessian of {type(model).__name__} needs at least one parameter, got no names.")
        first = next(iter(self._weights.values()))
        self.dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in self._weights.values()))
        self.device = first.device
        self.size = sum(weight.numel() for weight in self._weights.values())

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector in the shapes of the parameters."""
        pieces = vector.split([weight.numel() for weight in self._weights.values()])
        pairs = zip(self._weights.items(), pieces, strict=True)
        return {name: piece.view(weight.shape).to(weight.dtype) for (name, weight), piece in pairs}

    def __call__(self, vector: Tensor) -> Tensor:
        """The product, averaged over all images."""
        pieces = list(self.by_name(vector).values())
        total = torch.zeros_like(vector)
        count = outside = torch.zeros((), dtype=torch.int64, device=self.device)
        none = True
        with evaluation_mode(self._model), torch.enable_grad():
            for images, labels in self._batches:
                none = False
                outputs = functional_call(self._model, self._tensors, (in_parameter_type(self._model, images),))
                # Batches are as large as they are; only sums add up.
                loss, counted, strange = image_loss(outputs, labels, self._loss)
                total += self._product(loss, pieces)
                count, outside = count + counted.sum(), outside + strange.sum()
        if none:
            raise ValueError("A Hessian needs at least one batch of images, got none; it reads them several times.")
        check_summed(int(count), int(outside), whole=True)
        return total / count

    def _product(self, loss: Tensor, pieces: list[Tensor]) -> Tensor:
        # A loss, or a gradient, that depends on no weight has rows of zeros.
        zeros = loss.new_zeros(self.size, dtype=self.dtype)
        if not loss.requires_grad:
            return zeros
        weights = list(self._weights.values())
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        pairs = [(g, piece) for g, piece in zip(gradients, pieces, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return zeros
        curved, along = zip(*pairs, strict=True)
        rows = torch.autograd.grad(curved, weights, along, allow_unused=True, materialize_grads=True)
        return torch.cat([row.reshape(-1).to(self.dtype) for row in rows])


def _largest(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    known: Sequence[Tensor],
    tolerance: float,
    floor: float,
    limit: int,
) -> tuple[float, Tensor, float, int]:
    """The eigenvalue of largest absolute value beside those of ``known``, with eigenvector, residual and products."""
    limit = min(limit, len(start) - len(known))
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    rest = _orthogonal(start, known)
    length = float(rest.norm())
    while True:
        basis.append(rest / length)
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        if not math.isfinite(diagonal[-1]):
            raise MeasurementError("The Hessian of the loss is not finite.")
        rest = _orthogonal(image, [*known, *basis])
        length = float(rest.norm())
        # What the Hessian is in the basis; its eigenvectors there are the best approximations that the basis has.
        inside = host_float64(diagonal).diag()
        inside += host_float64(beside).diag(1) if beside else 0.0
        approximations, coordinates = torch.linalg.eigh(inside, UPLO="U")
        best = int(approximations.abs().argmax())
        value = float(approximations[best])
        residual = length * abs(float(coordinates[-1, best]))
        if residual <= tolerance * max(abs(value), floor) or len(basis) == limit:
            break
        beside.append(length)
    vector = torch.zeros_like(start)
    for weight, direction in zip(coordinates[:, best].tolist(), basis, strict=True):
        vector.add_(direction, alpha=weight)
    vector = _orthogonal(vector, known)
    # An eigenvector has no sign of its own.
    vector /= vector.norm() * vector[vector.abs().argmax()].sign()
    return value, vector, residual, len(basis)


def _orthogonal(vector: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """What of a vector is orthogonal to unit vectors that are orthogonal to one another."""
    vector = vector.clone()
    # The second time takes away what rounding left.
    for _ in range(2):
        for direction in directions:
            vector -= (direction @ vector) * direction
    return vector
