"""The angle between initial and trained weights of an architecture.

After Hu et al. (ECCV 2020) and RLNAS (Zhang et al., CVPR 2021), as GeNAS (IJCAI 2023) uses it. One deviation
from the official code: there, a dilated convolution contributes the weight of its batch normalisation twice
and the bias not at all; here, weight and bias, as for every other operation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins.devices import in_float64
from genas_plugins.scoring.flatness import MeasurementError

__all__ = ["angle", "parameter_angle"]


def angle(
    initial: Any,
    trained: Any,
    genotype: Any,
    normalize: bool = False,
) -> float:
    """Angle between the architecture vectors of ``genotype`` in two supernets.

    In the DARTS space, a vector holds, for each cell, the weights along each of the 30 paths from an input to an
    intermediate node whose edges all exist, so that an edge on several paths counts several times; then the convolution
    and batch normalisation of the stem and of every preprocessing, and the classifier's weight without its
    bias. An operation contributes its convolutions and the weight and bias of its batch normalisation;
    pooling a constant kernel of 1/9 of shape ``(C, 3, 3)`` and its batch normalisation; an identity the
    ``(C, C)`` identity matrix.

    In the NAS-Bench-201 space it is RLNAS's: for each cell, the convolutions (with batch normalisation's weight
    and bias, if it has them) and the same pooling kernels along each of the paths from input to output, and
    nothing for a skip connection; then all parameters of stem, residual blocks and head, the classifier's bias
    included. A cell without such a path has angle 0.

    Args:
        initial: The supernet before training. What the vector of an architecture holds, its method
            ``vector_pieces(architecture)`` says: tensors, and how often each occurs; ``None`` for an angle of 0.
        trained: The same supernet after it.
        genotype: The architecture, of the supernets' space.
        normalize: Divide by pi, to [0, 1].

    Returns:
        Radians, or a fraction of pi; computed in float64.

    Raises:
        TypeError: Not a supernet.
        ValueError: The supernets differ in shape.
        MeasurementError: Weights are not finite, or all zero.
    """
    for supernet in (initial, trained):
        if not hasattr(supernet, "vector_pieces"):
            raise TypeError(f"The angle needs two supernets, got {type(supernet).__name__}.")
    if dict(initial.arguments) != dict(trained.arguments):
        raise ValueError(
            f"The initial supernet {dict(initial.arguments)} and the trained one {dict(trained.arguments)} "
            "differ; the angle needs two states of one supernet."
        )
    before, after = initial.vector_pieces(genotype), trained.vector_pieces(genotype)
    if before is None or after is None:
        return 0.0
    pieces = zip(before, after, strict=True)
    return _angle(((first, second, count) for (first, count), (second, _) in pieces), normalize)


def parameter_angle(
    initial: Mapping[str, Tensor],
    model: nn.Module | Mapping[str, Tensor],
    names: Collection[str] | None = None,
    normalize: bool = False,
) -> float:
    """Angle between initial and present parameters, each counted once: the measure for any other network.

    Args:
        initial: Initial values by parameter name.
        model: The trained network, or its parameters by name.
        names: Parameters to compare; ``None`` for all of the model's.
        normalize: Divide by pi, to [0, 1].

    Raises:
        ValueError: A name is missing from ``initial``.
        MeasurementError: Weights are not finite, or all zero.
    """
    pieces = []
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    for name, parameter in named:
        if names is not None and name not in names:
            continue
        if name not in initial:
            raise ValueError(f"The initial weights have no parameter named {name}.")
        pieces.append((initial[name].to(parameter.device), parameter, 1))
    return _angle(pieces, normalize)


def _angle(pieces: Iterable[tuple[Tensor, Tensor, int]], normalize: bool) -> float:
    """Between the vectors of all first and all second tensors, each as often as its number says."""
    products, counts = [], []
    for before, after, count in pieces:
        before, after = (in_float64(value.detach()).flatten() for value in (before, after))
        products += [before @ after, before @ before, after @ after]
        counts.append(count)
    dot = squared_a = squared_b = 0.0
    # Added up here, and read from the device once: each addition there would be an operator to start.
    read = torch.stack(products).view(-1, 3).tolist() if products else []
    for count, (both, first, second) in zip(counts, read, strict=True):
        dot, squared_a, squared_b = dot + count * both, squared_a + count * first, squared_b + count * second
    norms = math.sqrt(squared_a * squared_b)
    if not math.isfinite(norms) or norms == 0.0 or not math.isfinite(dot):
        raise MeasurementError(f"The angle is not defined: the weights' norms have the product {norms}.")
    # Rounding can push the cosine of equal vectors past 1.
    radians = math.acos(max(-1.0, min(1.0, dot / norms)))
    return radians / math.pi if normalize else radians
