"""A supernet of this package under NNI's differentiable strategies: every edge mixes its operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from nni_strategy.space import _SuperNetModule

__all__ = ["RelaxedSuperNet"]

# NNI's, and the scale of DARTS's official code.
_SCALE = 1e-3


class RelaxedSuperNet(_SuperNetModule):
    """The mixture of all paths of a supernet, with architecture parameters for each of its edges.

    Shared by the cells of a kind, as in DARTS (Liu et al., ICLR 2019). It has the labels of the space, and exports its
    discretisation as a sample of it.

    Args:
        supernet: With a ``relaxation``, as :class:`genas_plugins.darts.relaxed.DartsRelaxation`: ``choices``,
            ``logits`` and ``discretize``.
        memo: Architecture parameters that NNI has drawn, by label; those that it lacks are drawn here.
        softmax: Turns architecture parameters into weights.

    Raises:
        TypeError: The supernet has no ``relaxation``.
    """

    def __init__(self, supernet: Any, memo: dict[str, Any], softmax: nn.Module) -> None:
        super().__init__(supernet)
        if not hasattr(supernet, "relaxation"):
            raise TypeError(
                f"{type(supernet).__name__} has no relaxation, which differentiable strategies need: an object with "
                "choices, logits and discretize, as genas_plugins.darts.relaxed.DartsRelaxation has. Search it with "
                "GeNAS or another strategy that samples paths."
            )
        self._arch_alpha = nn.ParameterDict()
        for label, options in supernet.relaxation.choices.items():
            alpha = memo.get(label)
            self._arch_alpha[label] = nn.Parameter(torch.randn(len(options)) * _SCALE) if alpha is None else alpha
        self._softmax = softmax
        self._mixes = True

    @classmethod
    def mutate(
        cls, module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
    ) -> BaseSuperNetModule | None:
        """NNI's hook: replaces the supernet of a :class:`nni_strategy.space.SupernetSpace`."""
        if isinstance(module, _SuperNetModule):
            return cls(module.supernet, memo, mutate_kwargs["softmax"])
        return None

    def arch_parameters(self) -> list[nn.Parameter]:
        """One for each edge, as long as it has operations."""
        return list(self._arch_alpha.values())

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Run the path of ``memo`` from now on, as strategies want that sample paths; without one the mixture."""
        self._mixes = not memo
        return {} if self._mixes else super().resample(memo)

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """The sample of the discretised mixture."""
        weights = {label: alpha.detach().softmax(-1).tolist() for label, alpha in self._arch_alpha.items()}
        sample = self.supernet.search_space.to_sample(self.supernet.relaxation.discretize(weights))
        return {label: value for label, value in sample.items() if label not in memo}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, dict[str, float]]:
        """The weight of each operation on each edge."""
        choices = self.supernet.relaxation.choices
        return {
            label: dict(zip(choices[label], self._softmax(alpha).tolist(), strict=True))
            for label, alpha in self._arch_alpha.items()
            if label not in memo
        }

    def path_modules(self) -> Iterable[nn.Module]:
        """All that the supernet has, or the path's."""
        return [self.supernet] if self._mixes else super().path_modules()

    def forward(self, x: Tensor) -> Tensor:
        if not self._mixes:
            return super().forward(x)
        weights = {label: self._softmax(alpha) for label, alpha in self._arch_alpha.items()}
        return self.supernet.relaxation.logits(x, weights)
