"""Races of a supernet's paths: what each needs to be measured, whole or slice by slice."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins.scoring import CombinedScore, CommonNoise
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.losses import IGNORED_LABELS, Loss, labelled
from genas_plugins.scoring.partial import PartialScore
from genas_plugins.search import InFlight, Race, candidate_seed
from genas_plugins.search.racing import check_confidence, check_order, round_ends
from nni_strategy.samples import SupernetPaths

__all__ = ["PathEntrant", "check_race", "check_race_images", "opened", "supernet_race"]

Batches = Iterable[tuple[Tensor, Tensor]]


def check_race(confidence: float, score: CombinedScore) -> None:
    """Refuse a race that cannot be run.

    Raises:
        ValueError: The confidence is out of its range, or the metric reads no images.
    """
    check_confidence(confidence)
    PartialScore(score)


def check_race_images(labels: Sequence[Tensor]) -> None:
    """Refuse images that are not in random order.

    Args:
        labels: Of each batch, class numbers.

    Raises:
        ValueError: The classes of the first slice are not those of all.
    """
    ends, seen = _rounds(labels)
    check_order(torch.cat(list(labels)).cpu().numpy(), seen[ends[0]])


def _rounds(labels: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Behind which batches candidates are compared, and the number of images before each batch and behind the last."""
    sizes = [len(batch) for batch in labels]
    return round_ends(sizes), [0, *itertools.accumulate(sizes)]


def _with_labels(paths: SupernetPaths, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The images that have a label: only these count, and a race counts images."""
    if not any(bool((labels == label).any()) for _, labels in batches for label in IGNORED_LABELS):
        return batches
    classes = paths.num_classes(*batches[0])
    known = [(images, labels, labelled(labels, classes)[0]) for images, labels in batches]
    return [(images[inside], labels[inside]) for images, labels, inside in known if bool(inside.any())]


@contextmanager
def opened(
    paths: SupernetPaths,
    candidate: Any,
    score: CombinedScore,
    validation: Batches,
    seed: int,
    loss: Loss | None = None,
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield one path of a supernet and what a score needs beside images: angle, noise, names of parameters and loss.

    Args:
        paths: The supernet's paths.
        candidate: Of ``paths.search_space``.
        score: What is to be measured.
        validation: Images and labels; those of the first batch are looked at, for their device and shape.
        seed: Of the search; the noise is a function of it and the candidate, or of it alone where it is common.
        loss: See :func:`genas_plugins.scoring.flatness`.
    """
    example, _ = next(iter(validation))
    number = candidate_seed(seed, paths.search_space.to_json(candidate))
    with paths.open(candidate, example) as (model, names):
        yield (
            model,
            {
                "angle": lambda: paths.angle(candidate, names),
                "generator": torch.Generator(example.device).manual_seed(number),
                "common": CommonNoise(paths.space, seed) if score.common else None,
                "parameters": names,
                "loss": loss,
            },
        )


class PathEntrant(PartialScore):
    """A path of a supernet, measured slice by slice.

    Args:
        paths: The supernet's paths.
        candidate: Of ``paths.search_space``.
        score: What is measured.
        recalibration: Training images for batch normalisation, or ``None``.
        slices: Validation images in slices of whole batches, in their order.
        seed: Of the search.
        loss: See :func:`genas_plugins.scoring.flatness`.
    """

    def __init__(
        self,
        paths: SupernetPaths,
        candidate: Any,
        score: CombinedScore,
        recalibration: Batches | None,
        slices: Sequence[Batches],
        seed: int,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(score)
        self._loss = loss
        self._path = (paths, candidate)
        self._recalibration = recalibration
        self._slices = slices
        self._seed = seed
        self._done = 0

    def advance(self) -> None:
        """Measure the next slice.

        Raises:
            MeasurementError: A number is not finite.
        """
        # The example decides which parameters take part, so it is the same for all slices.
        with opened(*self._path, self.score, self._slices[0], self._seed, self._loss) as (model, sources):
            self.extend(model, self._slices[self._done], recalibration=self._recalibration, **sources)
        self._done += 1

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far, on the CPU."""
        return {**super().state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]


def supernet_race(
    paths: SupernetPaths,
    score: CombinedScore,
    recalibration: Batches | None,
    validation: Batches,
    seed: int,
    *,
    confidence: float,
    keep: int,
    in_flight: InFlight | None = None,
    loss: Loss | None = None,
) -> Race[Any]:
    """A race of a supernet's paths.

    Args:
        paths: The supernet's paths.
        score: What is measured; not the angle alone.
        recalibration: Training images for batch normalisation, or ``None``.
        validation: Images and labels to score on, in random order.
        seed: Of the search.
        confidence: See :class:`genas_plugins.search.Race`.
        keep: See :class:`genas_plugins.search.Race`.
        in_flight: See :class:`genas_plugins.search.Race`.
        loss: See :func:`genas_plugins.scoring.flatness`; one number an image.

    Raises:
        ValueError: A wrong confidence or metric, or images that are not in random order.
    """
    check_race(confidence, score)
    batches = validation if isinstance(validation, TensorBatches) else list(validation)
    if loss is None and not isinstance(batches, TensorBatches):
        batches = _with_labels(paths, batches)
    labels = batches.labels_of_batches if isinstance(batches, TensorBatches) else [batch for _, batch in batches]
    ends, seen = _rounds(labels)
    if loss is None:
        check_race_images(labels)
    slices = [
        batches.section(start, end) if isinstance(batches, TensorBatches) else batches[start:end]
        for start, end in itertools.pairwise([0, *ends])
    ]
    return Race(
        lambda candidate: PathEntrant(paths, candidate, score, recalibration, slices, seed, loss),
        [seen[end] for end in ends],
        confidence,
        keep,
        in_flight or InFlight(),
    )
