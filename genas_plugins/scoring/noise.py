"""Gaussian noise on weights: how it grows with sigma, what it is measured in, and who shares it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = ["CommonNoise", "Noise", "perturbations"]

Noise = Literal["cumulative", "independent", "shared", "random_walk"]


class CommonNoise:
    """Noise that the candidates of a supernet have in common: common random numbers, for a comparison under less noise.

    Each parameter has streams of its own, a function of the seed and of its name in the supernet. Candidates with a
    parameter in common get the same noise on it, whatever else is on their paths.

    Args:
        supernet: Owns the parameters of all candidates.
        seed: Of the search.
    """

    def __init__(self, supernet: nn.Module, seed: int) -> None:
        # Subnets name a parameter by its place on their path, which is not the same for all of them.
        self._names = {parameter: name for name, parameter in supernet.named_parameters()}
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


def perturbations(
    model: nn.Module,
    names: Collection[str],
    sigmas: Sequence[float],
    noise: Noise = "cumulative",
    generator: torch.Generator | None = None,
    relative: bool = False,
    *,
    draw: int = 0,
    common: CommonNoise | None = None,
) -> Iterator[dict[str, Tensor]]:
    """For each sigma, yield noisy copies of the named parameters, as :func:`torch.func.functional_call` takes them.

    Args:
        model: Has the parameters; it is not changed.
        names: Of the parameters.
        sigmas: Standard deviations, strictly increasing.
        noise: See :func:`genas_plugins.scoring.flatness`.
        generator: Source of the noise; ``None`` is a generator with seed 0.
        relative: See :func:`genas_plugins.scoring.flatness`.
        draw: Number of the draw: the first comes from ``generator`` as it stands, number ``d`` from a new generator
            whose seed is that of ``generator`` plus ``d``.
        common: Source of the noise in place of ``generator``.

    Raises:
        ValueError: An unknown noise mode, or a parameter that is not the supernet's of ``common``.
    """
    if noise not in get_args(Noise):
        raise ValueError(f"Unknown noise {noise!r}; valid modes: {', '.join(get_args(Noise))}.")
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
    previous = 0.0
    noisy = tensors
    for step, sigma in enumerate(sigmas):
        if noise == "cumulative":
            noisy = _add(noisy, normals(step), sigma - previous)
        elif noise == "random_walk":
            noisy = _add(noisy, normals(step), math.sqrt(sigma**2 - previous**2))
        else:
            noisy = _add(tensors, normals(step) if fixed is None else fixed, sigma)
        previous = sigma
        yield noisy


def _draw(tensors: dict[str, Tensor], generator: torch.Generator) -> list[Tensor]:
    # One call for all parameters: a kernel launch for each of several hundred tensors would dominate on a GPU.
    first = next(iter(tensors.values()))
    sizes = [tensor.numel() for tensor in tensors.values()]
    flat = torch.randn(sum(sizes), generator=generator, device=generator.device, dtype=first.dtype)
    pieces = flat.to(first.device).split(sizes)
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors.values(), strict=True)]


def _add(tensors: dict[str, Tensor], draw: list[Tensor], scale: float) -> dict[str, Tensor]:
    return dict(zip(tensors, torch._foreach_add(list(tensors.values()), draw, alpha=scale), strict=True))
