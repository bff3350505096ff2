"""The loss of each image: cross-entropy unless another is asked for, and which images have a label at all."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.devices import in_float64
from genas_plugins.scoring.data import TensorBatches, over_batches, sum_over_batches
from genas_plugins.scoring.precision import in_parameter_type

__all__ = [
    "IGNORED_LABELS",
    "Loss",
    "SummedLoss",
    "check_classes",
    "check_summed",
    "check_top_label",
    "image_loss",
    "labelled",
    "loss_of_each",
    "loss_of_image",
    "read_images",
    "summed_loss",
]

Loss = Callable[[Any, Tensor], Tensor]
"""A function of outputs and labels of ``N`` images: gives ``(N,)``, ``(N, ...)`` to be averaged, or their mean."""

IGNORED_LABELS = (-100, 255)
"""Labels that stand for "none": that of PyTorch's losses and that of segmentation sets. A class that the network has is
never one of them."""


class SummedLoss(NamedTuple):
    """A loss over batches: all numbers on the device, or on the CPU where that has no float64, or known before.

    Attributes:
        total: Sum over the images that have a label, float64.
        count: How many these are.
        outside: How many images have a label that is no class of the network.
    """

    total: Tensor
    count: Tensor | int
    outside: Tensor | int


def loss_of_image(loss: Loss | None) -> Loss | None:
    """The loss with one number an image, where it can be had: PyTorch's losses average as ``reduction`` says.

    Raises:
        TypeError: ``loss`` cannot be called.
    """
    if loss is None:
        return None
    if not callable(loss):
        raise TypeError(f"loss must be a function of outputs and labels, or None for cross-entropy, got {loss!r}.")
    if isinstance(loss, nn.Module):
        if hasattr(loss, "reduction"):
            loss = copy.copy(loss)
            loss.reduction = "none"
        return loss
    try:
        takes = "reduction" in inspect.signature(loss).parameters
    except ValueError:
        # A function that is not written in Python need not tell.
        takes = False
    return functools.partial(loss, reduction="none") if takes else loss


def read_images(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """What the network makes of images, read in the type of its parameters."""
    return model(in_parameter_type(model, images) if isinstance(model, nn.Module) else images)


def check_classes(logits: Any, labels: Tensor) -> int:
    """Number of classes of logits ``(N, num_classes)``.

    Raises:
        TypeError: The network returns no tensor.
        ValueError: Logits and labels are not those of a classification.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"The network must return logits (N, num_classes), got {type(logits).__name__}.")
    shape, wanted = tuple(logits.shape), tuple(labels.shape)
    kind = str(labels.dtype).removeprefix("torch.")
    if len(shape) != 2 or wanted != shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"Cross-entropy takes logits (N, num_classes) and a class number for each image, got outputs {shape} and "
            f"labels {wanted} of {kind}: pass the loss that is meant as loss=, for instance "
            "torch.nn.functional.mse_loss or torch.nn.functional.binary_cross_entropy_with_logits."
        )
    if shape[1] < 2:
        raise ValueError(
            f"Cross-entropy needs two classes or more, and the network has {shape[1]} output, for which it is 0: pass "
            "the loss that is meant as loss=, for instance torch.nn.functional.mse_loss."
        )
    return shape[1]


def labelled(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Which images have one of the classes as label, and which have a label that is neither that nor "none".

    Args:
        labels: ``(N,)``.
        num_classes: Outputs of the network.

    Returns:
        Two rows ``(N,)`` of booleans.
    """
    inside = (labels >= 0) & (labels < num_classes)
    none = functools.reduce(torch.logical_or, [labels == label for label in IGNORED_LABELS])
    return inside, ~(inside | none)


def image_loss(
    outputs: Any, labels: Tensor, loss: Loss | None, reduction: str = "sum"
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a batch, over the images that have a label.

    Args:
        outputs: What the network returns.
        labels: As the loss takes them.
        loss: ``None`` for cross-entropy in nats.
        reduction: ``"sum"``, or ``"none"`` for one number an image, 0 for those without a label.

    Returns:
        The loss, which images have a label ``(N,)``, and which have one that the network does not know ``(N,)``.

    Raises:
        TypeError: The loss is no tensor, or the network returns none.
        ValueError: Outputs and labels do not fit the loss.
    """
    if loss is None:
        inside, outside = labelled(labels, check_classes(outputs, labels))
        known = labels.long().masked_fill(~inside, -100)
        return F.cross_entropy(_precise(outputs), known, ignore_index=-100, reduction=reduction), inside, outside
    value = loss(outputs, labels)
    if not isinstance(value, Tensor):
        raise TypeError(f"The loss must be a tensor, got {type(value).__name__}.")
    count = len(labels)
    every = torch.ones(count, dtype=torch.bool, device=value.device)
    if value.ndim == 0:
        if reduction == "none":
            raise ValueError(
                "The loss gives the mean of a batch where one number an image is needed, as in a race: pass one with "
                'reduction="none".'
            )
        return value * count, every, ~every
    if len(value) != count:
        raise ValueError(f"The loss gives {len(value)} numbers for {count} images, expected one an image, or the mean.")
    rows = _precise(value).flatten(1).mean(1) if value.ndim > 1 else _precise(value)
    return (rows.sum() if reduction == "sum" else rows), every, ~every


def summed_loss(
    model: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]], loss: Loss | None = None
) -> SummedLoss:
    """Sum of the losses of all images; nothing is read from the device."""
    if loss is None and isinstance(batches, TensorBatches):
        # Each of their labels is a class; what is known before costs no launches.
        def plain(images: Tensor, labels: Tensor) -> Tensor:
            logits = read_images(model, images)
            check_top_label(batches, check_classes(logits, labels))
            # float64 on the device: no rounding over many batches, and no synchronisation before the end.
            return in_float64(F.cross_entropy(_precise(logits), labels, reduction="sum"))

        return SummedLoss(*sum_over_batches(batches, plain), 0)

    def measure(images: Tensor, labels: Tensor) -> Tensor:
        total, counted, outside = image_loss(read_images(model, images), labels, loss)
        return torch.stack([in_float64(part) for part in (total, counted.sum(), outside.sum())])

    return SummedLoss(*sum_over_batches(batches, measure)[0].unbind())


def loss_of_each(
    model: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]], loss: Loss | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of each image that has a label, in their order, and its sum over each batch in float64."""
    plain = loss is None and isinstance(batches, TensorBatches)

    def losses(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = read_images(model, images)
        if plain:
            check_top_label(batches, check_classes(outputs, labels))
            # The sum is not that of the row, which rounds in another order than summed_loss.
            logits = _precise(outputs)
            row, total = (F.cross_entropy(logits, labels, reduction=reduction) for reduction in ("none", "sum"))
            return row, in_float64(total)
        row, counted, outside = image_loss(outputs, labels, loss, "none")
        check_summed(int(counted.sum()), int(outside.sum()))
        return row[counted], in_float64(image_loss(outputs, labels, loss)[0])

    rows, sums = zip(*over_batches(batches, losses), strict=True)
    return torch.cat(rows), torch.stack(sums)


def check_summed(count: float, outside: float, *, whole: bool = False) -> None:
    """Raise if labels are no classes of the network, or a whole set has no label.

    Raises:
        ValueError: There are some; or ``whole``, and there is no label.
    """
    if outside:
        raise ValueError(
            f"{int(outside)} images have a label that is no class of the network: data and network have different "
            "numbers of classes."
        )
    if whole and not count:
        raise ValueError(f"No image has a label: {' and '.join(map(str, IGNORED_LABELS))} stand for none.")


def check_top_label(batches: TensorBatches, num_classes: int) -> None:
    """Raise if a label is no class of the network; nothing is read from the device.

    Raises:
        ValueError: There is one; the message has both numbers of classes.
    """
    if batches.top_label >= num_classes:
        raise ValueError(
            f"The images have a label {batches.top_label} (of {batches.num_classes} classes), and the network has "
            f"{num_classes} classes: take the network and the images of one training."
        )


def _precise(values: Tensor) -> Tensor:
    """Half precision has 8 to 11 bits, of which a sum over images leaves little."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
