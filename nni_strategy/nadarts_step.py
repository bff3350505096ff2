"""The architecture step of NA-DARTS: neighbours of a relaxed architecture, their losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from torch import Tensor, nn

if TYPE_CHECKING:
    from nni_strategy.nadarts import NADarts

__all__ = ["ASCENTS", "MovedSoftmax", "Moves", "NADartsModule", "aggregate_gradient"]

ASCENTS = ("a2m", "sam")
# Of the central difference in A2M's published code.
_DIFFERENCE = 0.01
_SETTINGS = "nadarts"


class Moves:
    """Moves of up to ``distance`` distributions, counted and numbered.

    Number 0 moves none; the others are the neighbours.

    >>> nasbench201 = Moves([5] * 6, distance=1)
    >>> nasbench201.count, nasbench201.of(24)
    (24, (4, 0, 0, 0, 0, 0))

    Args:
        sizes: Operations of each choice.
        distance: Choices that may be moved, at most as many as there are.

    Attributes:
        count: Number of neighbours.
    """

    def __init__(self, sizes: Sequence[int], distance: int) -> None:
        self._sizes = list(sizes)
        self._distance = distance
        # _ways[c][d]: moves of up to d of the choices from c on.
        self._ways = [[1] * (distance + 1)]
        for size in reversed(self._sizes):
            after = self._ways[0]
            self._ways.insert(0, [after[d] + (size - 1) * (after[d - 1] if d else 0) for d in range(distance + 1)])
        self.count = self._ways[0][distance] - 1

    def of(self, number: int) -> tuple[int, ...]:
        """By how many operations each distribution is moved.

        Args:
            number: From 0 to :attr:`count`.
        """
        found, left = [], self._distance
        for after in self._ways[1:]:
            if number < after[left]:
                found.append(0)
                continue
            number -= after[left]
            left -= 1
            found.append(1 + number // after[left])
            number %= after[left]
        return tuple(found)

    def sample(self, size: int | None, rng: np.random.Generator) -> list[int]:
        """Numbers of ``size`` different neighbours, uniformly; None for all in their order."""
        if size is None or size >= self.count:
            return list(range(1, self.count + 1))
        # There may be more than a 64-bit integer can count; the surplus of bits makes all equally likely.
        width = self.count.bit_length() // 8 + 9
        drawn: dict[int, None] = {}
        while len(drawn) < size:
            drawn[1 + int.from_bytes(rng.bytes(width), "little") % self.count] = None
        return list(drawn)


class NADartsModule(DartsLightningModule):
    """The training of :class:`NADarts`: NNI's, with an architecture step of its own.

    Args:
        training_module: The evaluator's Lightning module, which holds the mixture.
        settings: The strategy.
        moves: Those of the space.
    """

    def __init__(self, training_module: LightningModule, settings: NADarts, moves: Moves) -> None:
        names = ("arc_learning_rate", "gradient_clip_val", "log_prob_every_n_step", "warmup_epochs", "penalty")
        super().__init__(training_module, **{name: getattr(settings, name) for name in names})
        self._settings = settings
        self._moves = moves

    def arch_parameters(self) -> list[nn.Parameter]:
        """In an order that a checkpoint can rely on; NNI's depends on addresses."""
        return architecture_parameters(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the settings."""
        checkpoint[_SETTINGS] = self._settings.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the settings.

        Raises:
            ValueError: The search had others.
        """
        now = self._settings.settings
        for name, before in checkpoint.get(_SETTINGS, {}).items():
            if now[name] != before:
                raise ValueError(
                    f"The search to resume has {name}={before!r}, this strategy {name}={now[name]!r}: a search goes on "
                    "with the settings that it began with."
                )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """An architecture step on ``batch["val"]``, and NNI's step of the weights on ``batch["train"]``."""
        settings = self._settings
        theirs = 0 in (settings.distance, settings.size) and not settings.rho
        if theirs or self.trainer.current_epoch < self.warmup_epochs:
            return super().training_step(batch, batch_idx)
        self._step_architecture(batch["val"], batch_idx)
        before = self.warmup_epochs
        try:
            # To NNI an epoch of warm-up, in which it moves the weights alone.
            self.warmup_epochs = self.trainer.current_epoch + 1
            return super().training_step(batch, batch_idx)
        finally:
            self.warmup_epochs = before

    def _step_architecture(self, batch: Any, batch_idx: int) -> None:
        settings = self._settings
        self.resample()
        numbers = [0] if settings.include_self else []
        if settings.distance:
            rng = np.random.default_rng((settings.seed, self.trainer.current_epoch, batch_idx))
            numbers += self._moves.sample(settings.size, rng)
        alphas = self.arch_parameters()
        gradient = self._gradient(batch, batch_idx, numbers)
        if settings.rho:
            start = [alpha.detach().clone() for alpha in alphas]

            def at(factor: float, direction: Sequence[Tensor]) -> list[Tensor]:
                _put(alphas, [value + factor * step for value, step in zip(start, direction, strict=True)])
                return self._gradient(batch, batch_idx, numbers)

            try:
                gradient = _ascended(at, gradient, settings.rho, settings.ascent)
            finally:
                _put(alphas, start)
        for alpha, row in zip(alphas, gradient, strict=True):
            alpha.grad = row
        self.architecture_optimizers().step()

    def _gradient(self, batch: Any, batch_idx: int, numbers: Sequence[int]) -> list[Tensor]:
        """The gradient of the aggregated loss where the architecture parameters are."""
        alphas = self.arch_parameters()
        # Reducers of a distributed run wait for the gradients of all parameters.
        only = {"inputs": alphas} if self.trainer.world_size == 1 else {}
        losses, gradients = [], []
        for number in numbers:
            with self._settings.softmax.by(alphas, self._moves.of(number)):
                for alpha in alphas:
                    alpha.grad = None
                loss = self._architecture_loss(batch, batch_idx)
                self.manual_backward(loss, **only)
            losses.append(loss.detach())
            # A choice that the network never comes to has none.
            gradients.append([torch.zeros_like(alpha) if alpha.grad is None else alpha.grad for alpha in alphas])
        # Of all processes, whose gradients are averaged as well.
        shared = self.trainer.strategy.reduce(torch.stack(losses), reduce_op="mean")
        factors = aggregate_gradient(shared, self._settings.aggregate)
        return [
            sum(factor * row for factor, row in zip(factors, rows, strict=True))
            for rows in zip(*gradients, strict=True)
        ]

    def _architecture_loss(self, batch: Any, batch_idx: int) -> Tensor:
        # NNI counts the batches of both loaders in turn.
        loss = self.training_module.training_step(batch, 2 * batch_idx)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if self.penalty is None:
            return loss
        loss, details = self.penalty(loss, self.export_probs())
        self.log_dict({f"penalty/{name}": value for name, value in details.items()})
        return loss


def aggregate_gradient(losses: Tensor, aggregate: str) -> Tensor:
    """The derivatives of the aggregated loss, ``(n,)``, by the losses ``(n,)``; see :class:`NADarts`."""
    count = len(losses)
    even = torch.full_like(losses, 1 / count)
    if aggregate == "mean":
        return even
    if aggregate == "mean-std":
        spread = losses.std(correction=0)
        # Where all are equal, the spread has no derivative, and its smallest subgradient is zero.
        return even if spread == 0 else even + (losses - losses.mean()) / (count * spread)
    order = losses.argsort(stable=True)
    # Negative losses turn their order round: the worst has the largest loss.
    kept = order[-1:] if aggregate == "min" else order[(count - 1) // 2 : count // 2 + 1]
    return torch.zeros_like(losses).index_fill_(0, kept, 1 / len(kept))


def _ascended(
    at: Callable[[float, Sequence[Tensor]], list[Tensor]], gradient: Sequence[Tensor], rho: float, ascent: str
) -> list[Tensor]:
    """The gradient to go down; ``at`` gives that of the loss a factor times a direction away."""
    if ascent == "sam":
        norm = torch.stack([row.norm() for row in gradient]).norm()
        return at(0.0 if norm == 0 else rho / float(norm), gradient)
    above = at(rho, gradient)
    ahead, behind = at(_DIFFERENCE, above), at(-_DIFFERENCE, above)
    return [
        row + rho * (plus - minus) / (2 * _DIFFERENCE) for row, plus, minus in zip(above, ahead, behind, strict=True)
    ]


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def architecture_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Each once, in the order of the modules."""
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if hasattr(part, "arch_parameters") and not isinstance(part, pl.LightningModule):
            found |= {id(parameter): parameter for parameter in part.arch_parameters()}
    return list(found.values())


class MovedSoftmax(nn.Softmax):
    """NNI's softmax of every choice, moved round where a neighbour is looked at."""

    def __init__(self) -> None:
        super().__init__(dim=-1)
        self._moves: dict[int, int] = {}

    @contextmanager
    def by(self, parameters: Sequence[nn.Parameter], moves: Sequence[int]) -> Iterator[None]:
        """Move the distributions of these parameters."""
        self._moves = {id(parameter): move for parameter, move in zip(parameters, moves, strict=True) if move}
        try:
            yield
        finally:
            self._moves = {}

    def forward(self, parameter: Tensor) -> Tensor:
        weights = super().forward(parameter)
        move = self._moves.get(id(parameter))
        return weights if move is None else weights.roll(move, -1)
