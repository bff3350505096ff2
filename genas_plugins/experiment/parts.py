"""Where images and labels are in a batch of somebody's loader, and whether cross-entropy is what a module means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["BatchParts", "check_loss", "find_parts"]

BatchParts = tuple[str | int, str | int] | Callable[[Any], tuple[Tensor, Tensor]]
"""Where images and labels are in a batch: two keys or positions, or a function of the batch."""

_IMAGES = ("image", "images", "img", "imgs", "pixel_values", "pixels", "input", "inputs", "x", "data")
_LABELS = ("label", "labels", "target", "targets", "y", "class", "classes")
_OTHER_LOSSES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.CTCLoss,
)


def find_parts(batch: Any, parts: BatchParts | None) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch.

    Args:
        batch: As the training step gets it.
        parts: See :class:`nni_strategy.GeNAS`.

    Raises:
        TypeError: They are not found, or are no tensors.
        ValueError: There is not a label for each image.
    """
    if callable(parts):
        found = tuple(parts(batch))
    elif parts is not None:
        found = tuple(_part(batch, key) for key in parts)
    elif isinstance(batch, Mapping):
        found = tuple(batch[_only(batch, names)] for names in (_IMAGES, _LABELS))
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        found = tuple(batch[:2])
    else:
        raise TypeError(f"GeNAS finds no images and labels in a batch that is {_shape_of(batch)}. {_ADVICE}")
    if len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise TypeError(f"Images and labels must be two tensors, got {_shape_of(list(found))}. {_ADVICE}")
    images, labels = found
    if images.ndim < 2 or labels.ndim < 1 or len(images) != len(labels):
        raise ValueError(
            f"Images and labels must be as many, got {tuple(images.shape)} and {tuple(labels.shape)}. {_ADVICE}"
        )
    return images, labels


_ADVICE = (
    'Say where they are with batch_parts=, two keys or positions such as ("image", "label") or a function of the batch '
    "that returns images and labels."
)


def _part(batch: Any, key: str | int) -> Any:
    try:
        return getattr(batch, key) if isinstance(key, str) and hasattr(batch, key) else batch[key]
    except (LookupError, TypeError) as error:
        raise TypeError(f"batch_parts names {key!r}, but a batch is {_shape_of(batch)}.") from error


def _only(batch: Mapping[str, Any], names: Sequence[str]) -> str:
    there = [key for key in batch if isinstance(key, str) and key.lower() in names]
    if len(there) != 1:
        found = f"several of them ({', '.join(there)})" if there else "none of them"
        raise TypeError(
            f"GeNAS looks for one of the keys {', '.join(names)} in a batch, and finds {found} in {_shape_of(batch)}. "
            f"{_ADVICE}"
        )
    return there[0]


def _shape_of(batch: Any) -> str:
    """A batch in a few words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{name} of {', '.join(str(key)[:40] for key in list(batch)[:8])}"
    if isinstance(batch, list | tuple):
        return f"{name} of {len(batch)} ({', '.join(map(_shape_of, batch[:4]))})" if len(batch) < 9 else name
    return name


def check_loss(module: nn.Module, loss: Any) -> None:
    """Raise if cross-entropy is to score a module that trains by a loss of another kind.

    Raises:
        ValueError: The module has such a loss and none for classes, and ``loss`` is not given.
    """
    if loss is not None:
        return
    own = [value for value in (*vars(module).values(), *module.children()) if isinstance(value, nn.Module)]
    others = [value for value in own if isinstance(value, _OTHER_LOSSES)]
    if others and not any(isinstance(value, nn.CrossEntropyLoss | nn.NLLLoss) for value in own):
        name = type(others[0]).__name__
        raise ValueError(
            f"{type(module).__name__} trains by {name}, and GeNAS would score by cross-entropy: pass the loss that is "
            f"meant, loss=torch.nn.{name}(), or torch.nn.CrossEntropyLoss() if that is it all the same."
        )
