"""The auxiliary loss of DARTS and GeNAS as a training task of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

__all__ = ["AuxiliaryClassificationTask"]


class AuxiliaryClassificationTask(ClassificationTask):
    """Classification with an auxiliary head: ``loss = criterion(logits) + weight * criterion(auxiliary logits)``.

    Args:
        model: A network that returns ``(logits, auxiliary_logits)`` in training mode, such as
            ``timm.create_model("genas_flatness_c100", auxiliary=True)``.
        criterion: Loss of logits and target; None: cross-entropy, as ``criterion_kwargs`` describe it.
        auxiliary_weight: Weight of the auxiliary loss; the paper's is 0.4.
        criterion_kwargs: Arguments of timm's ``create_classification_loss``, such as ``smoothing``.
        device: Device of the criterion.
        dtype: Type of the task's tensors.
        verbose: Log which criterion is used.

    Raises:
        ValueError: ``auxiliary_weight`` is negative or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        auxiliary_weight: float = 0.4,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not 0.0 <= auxiliary_weight < float("inf"):
            raise ValueError(f"auxiliary_weight must be at least 0 and finite, got {auxiliary_weight}.")
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self.auxiliary_weight = auxiliary_weight

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            input: Images ``(N, C, H, W)``.
            target: Classes ``(N,)``, or their probabilities ``(N, num_classes)``.

        Returns:
            ``loss`` to be minimised, ``output`` (the logits), ``main_loss`` and ``auxiliary_loss``, not weighted.

        Raises:
            ValueError: The network returned no auxiliary logits: it has no auxiliary head, or is in evaluation
                mode.
        """
        outputs = self.trainable_module(input)
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise ValueError(
                "The network returned no auxiliary logits: build it with auxiliary=True and put it in training mode "
                "(model.train()), or use timm.task.ClassificationTask."
            )
        output, auxiliary = outputs
        main_loss = self.criterion(output, target)
        auxiliary_loss = self.criterion(auxiliary, target)
        return {
            "loss": main_loss + self.auxiliary_weight * auxiliary_loss,
            "output": output,
            "main_loss": main_loss.detach(),
            "auxiliary_loss": auxiliary_loss.detach(),
        }
