"""Gaussian noise on weights: how it grows with sigma, where it points, what it is measured in, and who shares it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from genas_plugins.scoring.perturbation import Perturbation

__all__ = ["CommonNoise", "noise_shares", "perturbations"]


class CommonNoise:
    """Noise that the candidates of a supernet have in common: common random numbers, for a comparison under less noise.

    Each parameter has streams of its own, a function of the seed and of its name in the supernet. Candidates with a
    parameter in common get the same noise on it, whatever else is on their paths.

    Args:
        supernet: Owns the parameters of all candidates.
        seed: Seed of the search.
        prefix: What precedes the supernet's names of its parameters where the noise is to be that of a module around
            it.
    """

    def __init__(self, supernet: nn.Module, seed: int, prefix: str = "") -> None:
        # Subnets name a parameter by its place on their path, which is not the same for all of them.
        self._names = {parameter: prefix + name for name, parameter in supernet.named_parameters()}
        self._seed = seed

    def normals(self, parameters: Sequence[nn.Parameter], draw: int, step: int) -> list[Tensor]:
        """Standard normal numbers in the shapes of the parameters, on their device.

        Args:
            parameters: The supernet's own, not copies.
            draw: Number of the draw.
            step: Number of the sigma.

        Raises:
            ValueError: A parameter is not the supernet's.
        """
        generator = torch.Generator(parameters[0].device)
        drawn = []
        for parameter in parameters:
            if parameter not in self._names:
                raise ValueError(
                    f"A parameter of shape {tuple(parameter.shape)} is none of the supernet's {len(self._names)}: "
                    "common noise is for candidates that share its parameters, not for copies of them."
                )
            text = json.dumps([self._seed, draw, step, self._names[parameter]])
            generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
            drawn.append(
                torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            )
        return drawn


def noise_shares(perturbation: Perturbation) -> list[tuple[float, ...]]:
    """What the noise at each sigma is made of: the factors of its standard normal draws, in their order.

    Modes and sigmas with the same factors, for instance at the first sigma, give the same noisy weights.
    """
    noise = perturbation.noise
    shares: list[tuple[float, ...]] = []
    previous = 0.0
    for step, sigma in enumerate(perturbation.sigmas):
        before = shares[-1] if shares else ()
        if noise == "cumulative":
            shares.append((*before, sigma - previous))
        elif noise == "random_walk":
            shares.append((*before, math.sqrt(sigma**2 - previous**2)))
        else:
            shares.append((sigma,) if noise in ("shared", "hessian") else (0.0,) * step + (sigma,))
        previous = sigma
    return shares


def perturbations(
    model: nn.Module,
    names: Collection[str],
    perturbation: Perturbation,
    generator: torch.Generator | None = None,
    *,
    draw: int = 0,
    common: CommonNoise | None = None,
    directions: Sequence[Mapping[str, Tensor]] = (),
) -> Iterator[dict[str, Tensor]]:
    """For each sigma, yield noisy copies of the named parameters, as :func:`torch.func.functional_call` takes them.

    Args:
        model: Has the parameters; it is not changed.
        names: Names of the parameters.
        perturbation: Sigmas, and the kind of the noise.
        generator: Source of the noise; ``None`` is a generator with seed 0.
        draw: Number of the draw: the first comes from ``generator`` as it stands, number ``d`` from a new generator
            whose seed is that of ``generator`` plus ``d``.
        common: Source of the noise in place of ``generator``.
        directions: Orthogonal unit vectors of the noise ``"hessian"``, by the names of the parameters.

    Raises:
        ValueError: The noise ``"hessian"`` without directions, or a parameter that is not the supernet's of ``common``.
    """
    noise, relative = perturbation.noise, perturbation.relative
    if noise == "hessian" and not directions:
        raise ValueError("The noise 'hessian' needs directions; pass those of top_eigenvectors as directions=.")
    chosen = set(names)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    if generator is None:
        generator = torch.Generator(next(iter(tensors.values())).device).manual_seed(0)
    if draw:
        generator = torch.Generator(generator.device).manual_seed(generator.initial_seed() + draw)
    scales = [tensor.square().mean().sqrt() for tensor in tensors.values()] if relative else None

    def normals(step: int) -> list[Tensor]:
        pieces = _draw(tensors, generator) if common is None else common.normals([*parameters.values()], draw, step)
        return pieces if scales is None else list(torch._foreach_mul(pieces, scales))

    fixed = normals(0) if noise == "shared" else None
    if noise == "hessian":
        fixed = _along([[direction[name] for name in tensors] for direction in directions], generator)
        if relative:
            whole = torch.stack(torch._foreach_norm(list(tensors.values()))).norm()
            fixed = list(torch._foreach_mul(fixed, whole / math.sqrt(len(directions))))
    noisy = tensors
    for step, (*_, share) in enumerate(noise_shares(perturbation)):
        start = noisy if noise in ("cumulative", "random_walk") else tensors
        noisy = _add(start, normals(step) if fixed is None else fixed, share)
        yield noisy


def _draw(tensors: dict[str, Tensor], generator: torch.Generator) -> list[Tensor]:
    # One call for all parameters: a kernel launch for each of several hundred tensors would dominate on a GPU.
    first = next(iter(tensors.values()))
    sizes = [tensor.numel() for tensor in tensors.values()]
    # Of several types the one that holds all: noise for the others is rounded, not drawn otherwise.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    flat = torch.randn(sum(sizes), generator=generator, device=generator.device, dtype=dtype)
    pieces = flat.to(first.device).split(sizes)
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors.values(), strict=True)]


def _along(directions: list[list[Tensor]], generator: torch.Generator) -> list[Tensor]:
    first = directions[0][0]
    drawn = torch.randn(len(directions), generator=generator, device=generator.device, dtype=first.dtype)
    total = [torch.zeros_like(piece) for piece in directions[0]]
    for number, direction in zip(drawn.tolist(), directions, strict=True):
        total = list(torch._foreach_add(total, direction, alpha=number))
    return total


def _add(tensors: dict[str, Tensor], draw: list[Tensor], scale: float) -> dict[str, Tensor]:
    return dict(zip(tensors, torch._foreach_add(list(tensors.values()), draw, alpha=scale), strict=True))
