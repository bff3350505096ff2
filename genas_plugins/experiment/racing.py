"""Races of a supernet's candidates: each is measured slice by slice of the images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genas_plugins.scoring import CombinedScore
from genas_plugins.scoring.data import Batches, TensorBatches
from genas_plugins.scoring.losses import IGNORED_LABELS, labelled
from genas_plugins.scoring.partial import PartialScore
from genas_plugins.search import Race
from genas_plugins.search.racing import check_confidence, check_order, round_ends

if TYPE_CHECKING:
    from genas_plugins.experiment.scorer import Scorer

__all__ = ["CandidateEntrant", "check_race", "check_race_images", "race_of"]


def check_race(confidence: float, score: CombinedScore) -> None:
    """Raise if a race with these settings cannot be run.

    Raises:
        ValueError: The confidence is out of its range, or the metric reads no images.
    """
    check_confidence(confidence)
    PartialScore(score)


def check_race_images(labels: Sequence[Tensor]) -> None:
    """Raise if images are not in random order.

    Args:
        labels: Class numbers of each batch.

    Raises:
        ValueError: The classes of the first slice are not those of all.
    """
    ends, seen = _rounds(labels)
    check_order(torch.cat(list(labels)).cpu().numpy(), seen[ends[0]])


class CandidateEntrant(PartialScore):
    """A candidate that a scorer measures slice by slice.

    Args:
        scorer: Has the paths, the score and the images for recalibration.
        candidate: Architecture of its search space.
        slices: Validation images in slices of whole batches, in their order.
    """

    def __init__(self, scorer: Scorer, candidate: Any, slices: Sequence[Batches]) -> None:
        super().__init__(scorer.score)
        self._scorer = scorer
        self._candidate = candidate
        self._slices = slices
        self._done = 0

    def advance(self) -> None:
        """Measure the next slice.

        Raises:
            MeasurementError: A number is not finite.
        """
        # The example decides which parameters take part, so it is the same for all slices.
        example, _ = next(iter(self._slices[0]))
        with self._scorer.open(self._candidate, example=example) as (model, sources):
            self.extend(model, self._slices[self._done], recalibration=self._scorer.recalibration, **sources)
        self._done += 1

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far, on the CPU."""
        return {**super().state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]


def race_of(scorer: Scorer, confidence: float, keep: int) -> Race[Any]:
    """See :meth:`genas_plugins.experiment.scorer.Scorer.race`."""
    check_race(confidence, scorer.score)
    batches = scorer.validation if isinstance(scorer.validation, TensorBatches) else list(scorer.validation)
    if scorer.loss is None and not isinstance(batches, TensorBatches):
        batches = _with_labels(scorer, batches)
    labels = batches.labels_of_batches if isinstance(batches, TensorBatches) else [batch for _, batch in batches]
    ends, seen = _rounds(labels)
    if scorer.loss is None:
        check_race_images(labels)
    slices = [
        batches.section(start, end) if isinstance(batches, TensorBatches) else batches[start:end]
        for start, end in itertools.pairwise([0, *ends])
    ]
    return Race(
        lambda candidate: CandidateEntrant(scorer, candidate, slices),
        [seen[end] for end in ends],
        confidence,
        keep,
        scorer.in_flight,
    )


def _rounds(labels: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Behind which batches candidates are compared, and the number of images before each batch and behind the last."""
    sizes = [len(batch) for batch in labels]
    return round_ends(sizes), [0, *itertools.accumulate(sizes)]


def _with_labels(scorer: Scorer, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The images that have a label: only these count, and a race counts images."""
    if not any(bool((labels == label).any()) for _, labels in batches for label in IGNORED_LABELS):
        return batches
    classes = scorer.paths.num_classes(*batches[0])
    known = [(images, labels, labelled(labels, classes)[0]) for images, labels in batches]
    return [(images[inside], labels[inside]) for images, labels, inside in known if bool(inside.any())]
