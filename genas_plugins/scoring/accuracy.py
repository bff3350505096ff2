"""Classification accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.scoring.data import over_batches
from genas_plugins.scoring.inference import InferenceNetwork

__all__ = ["Accuracy", "accuracy", "image_hits"]


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images, from 0 to 1.

    Attributes:
        top1: The label has the highest logit.
        top5: The label is among the five highest (among all, where there are fewer than five classes).
    """

    top1: float
    top5: float


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Measure top-1 and top-5 accuracy in evaluation mode; the model's mode is restored.

    Args:
        model: Maps images ``(N, 3, H, W)`` to logits ``(N, num_classes)``.
        batches: Images and labels ``(N,)`` on the model's device.

    Raises:
        ValueError: ``batches`` is empty.
    """
    hits = image_hits(model, batches)
    top1, top5 = hits.sum(0).tolist()
    return Accuracy(top1 / len(hits), top5 / len(hits))


def image_hits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What :func:`accuracy` is the mean of: for each image whether the label is first, and among the first five.

    Returns:
        ``(N, 2)``, boolean. Arguments and errors are those of :func:`accuracy`.
    """
    with evaluation_mode(model), torch.no_grad():
        network = InferenceNetwork.of(model) or model

        def hits(images: Tensor, labels: Tensor) -> Tensor:
            logits = network(images)
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
            found = ranked == labels[:, None]
            return torch.stack([found[:, 0], found.any(1)], dim=1)

        return torch.cat(over_batches(batches, hits))
