"""Classification accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.scoring.data import TensorBatches, over_batches
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.scoring.losses import check_classes, check_summed, check_top_label, labelled, read_images

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
        batches: Images and labels ``(N,)`` on the model's device. Images whose label is -100 or 255 have none and do
            not count, unless that is one of the network's classes.

    Raises:
        ValueError: ``batches`` is empty or has no label, or a label is no class of the network.
    """
    hits = image_hits(model, batches)
    top1, top5 = hits.sum(0).tolist()
    return Accuracy(top1 / len(hits), top5 / len(hits))


def image_hits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What :func:`accuracy` is the mean of: for each image whether the label is first, and among the first five.

    Returns:
        ``(N, 2)``, boolean, of the images that have a label. Arguments and errors are those of :func:`accuracy`.
    """
    known = isinstance(batches, TensorBatches)
    with evaluation_mode(model), torch.no_grad():
        network = InferenceNetwork.of(model) or model

        def hits(images: Tensor, labels: Tensor) -> Tensor:
            logits = read_images(network, images)
            classes = check_classes(logits, labels)
            found = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
            columns = [found[:, 0], found.any(1)]
            if known:
                check_top_label(batches, classes)
            else:
                columns += labelled(labels, classes)
            return torch.stack(columns, dim=1)

        rows = torch.cat(over_batches(batches, hits))
    if known:
        return rows
    counted, outside = rows[:, 2:].sum(0).tolist()
    check_summed(counted, outside, whole=True)
    return rows[rows[:, 2], :2] if counted < len(rows) else rows[:, :2]
