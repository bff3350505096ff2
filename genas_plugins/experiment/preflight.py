"""What can be known before a training that may take days: whether its supernet can be measured at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genas_plugins.checks import MOST_IMAGES, check_count, check_device
from genas_plugins.experiment.neighbours import NO_RACE
from genas_plugins.experiment.racing import check_race, check_race_images
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import CombinedScore, MeasurementError, NeighbourhoodScore, recalibrate_batchnorm
from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.scoring.data import Batches, TensorBatches
from genas_plugins.scoring.losses import IGNORED_LABELS, Loss, check_classes, labelled, read_images
from genas_plugins.scoring.paths import Paths
from genas_plugins.search import InFlight
from genas_plugins.training.batches import smallest_batch

__all__ = ["Preflight", "check_images", "check_measuring"]

_TRIED = 2


def check_images(recalibration: int, validation: int | None) -> None:
    """Raise if a search cannot be measured on so many images.

    Raises:
        TypeError: A number is not whole.
        ValueError: It is out of its range.
    """
    check_count("recalibration_images", recalibration, 0, MOST_IMAGES)
    if validation is not None and check_count("validation_images", validation, 0, MOST_IMAGES) == 0:
        raise ValueError("validation_images must be at least 1, or None for all, got 0.")


def check_measuring(
    device: torch.device | str | None,
    racing: float | None,
    in_flight: int | InFlight | None,
    score: CombinedScore | NeighbourhoodScore,
) -> None:
    """Raise if candidates cannot be measured so.

    Raises:
        ValueError: There is no such device, such candidates do not race, or ``in_flight`` is no number of them.
    """
    if device is not None:
        check_device(device)
    if racing is not None and isinstance(score, NeighbourhoodScore):
        raise ValueError(NO_RACE)
    if racing is not None:
        check_race(racing, score)
    if in_flight is not None and not isinstance(in_flight, InFlight):
        # Refuses what is no number of candidates; the device is known when the search begins.
        InFlight(in_flight)


@dataclasses.dataclass
class _Seen:
    """The first images of some batches that have a label, and all labels, batch by batch, on the CPU."""

    images: Tensor
    labels: Tensor
    all_labels: list[Tensor] | None


class Source(Protocol):
    """Batches of an evaluator."""

    def loader(self, training: bool) -> Any:
        """The training or the validation loader, as it is."""

    def repeatable(self, training: bool) -> bool:
        """Whether it can be iterated once more."""

    def collect(self, training: bool, images: int | None, keep: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """What ``keep`` gives of the first so many images and labels, batch by batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preflight:
    """Measures two images before the training, and looks at all labels that will be read.

    Attributes:
        paths: The supernet's paths.
        score: What the search measures.
        source: The evaluator's batches, on the device of the supernet.
        recalibration: Batches that the user brings, or ``None`` for the evaluator's.
        validation: Batches that the user brings, or ``None`` for the evaluator's.
        recalibration_images: How many the search will read; 0 for no recalibration.
        validation_images: How many the search will read; ``None`` for all.
        racing: Whether candidates race.
        loss: What is measured, see :func:`genas_plugins.scoring.flatness`.
        seed: Seed of the search.
    """

    paths: Paths
    score: CombinedScore
    source: Source
    recalibration: Batches | None
    validation: Batches | None
    recalibration_images: int
    validation_images: int | None
    racing: bool
    loss: Loss | None
    seed: int

    def __call__(self) -> Tensor | None:
        """Check all that can be.

        Returns:
            A validation image ``(C, H, W)``, or ``None`` where looking at one would take it from the search.

        Raises:
            ValueError: The images, their number, their labels or the loss do not fit the network or the search.
            TypeError: Images and labels are not found in a batch.
        """
        validation = self._seen(False, self.validation, self.validation_images)
        recalibration = None
        if self.recalibration is not None or self.recalibration_images:
            recalibration = self._seen(True, self.recalibration, self.recalibration_images)
        if validation is None:
            # A loader that can be read once is left for the search.
            return None
        if self.racing and validation.all_labels is not None and self.loss is None:
            check_race_images(validation.all_labels)
        # The whole batch, too, for a network that is made for its size.
        for count in (_TRIED, len(validation.images)):
            try:
                self._measure(validation, recalibration, count)
                break
            except MeasurementError:
                # Weights that were not trained yet may give such numbers.
                break
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                if count < len(validation.images):
                    continue
                kind = str(validation.images.dtype).removeprefix("torch.")
                raise ValueError(
                    f"GeNAS cannot measure the network on the evaluator's images, {kind} "
                    f"{tuple(validation.images.shape[1:])} when all hooks have transferred them: "
                    f"{' '.join(str(error).split())}. What training_step makes of them is not seen here: do it in "
                    "on_after_batch_transfer, or in batch_parts= as a function of the batch."
                ) from error
        return validation.images[0]

    def _measure(self, validation: _Seen, recalibration: _Seen | None, count: int) -> None:
        candidate = self.paths.search_space.sample(np.random.default_rng(self.seed))
        score = dataclasses.replace(self.score, draws=1, hessian_directions=1)
        chosen = [(validation.images[:count], validation.labels[:count])]
        calibrating = None
        if recalibration is not None:
            calibrating = [(recalibration.images[:count], recalibration.labels[:count])]
        scorer = Scorer(self.paths, score, validation=chosen, seed=self.seed, loss=self.loss)
        with scorer.open(candidate) as (model, sources):
            self._check_single_images(model, recalibration or validation)
            if self.loss is None and score.metrics != {"angle"}:
                self._check_labels(model, chosen[0], validation)
            score(model, chosen, recalibration=calibrating, **sources)

    def _check_single_images(self, model: nn.Module, seen: _Seen) -> None:
        if smallest_batch(self.source.loader(True)) != 1:
            return
        try:
            recalibrate_batchnorm(model, [(seen.images[:1], seen.labels[:1])])
        except ValueError as error:
            raise ValueError(
                "The training loader has a batch of one image, of which batch normalisation has no statistics where "
                f"features are of one pixel ({error}): choose another batch_size or number of training images, or "
                "drop_last=True."
            ) from error

    def _check_labels(self, model: nn.Module, example: tuple[Tensor, Tensor], validation: _Seen) -> None:
        with evaluation_mode(model), torch.no_grad():
            classes = check_classes(read_images(model, example[0]), example[1])
        labels = validation.labels if validation.all_labels is None else torch.cat(validation.all_labels)
        inside, outside = labelled(labels, classes)
        if bool(outside.any()):
            raise ValueError(
                f"The validation images have the label {int(labels[outside][0])}, and the network has {classes} "
                f"classes, numbered from 0: give the space num_classes={int(labels.max()) + 1}, or bring its images."
            )
        if not bool(inside.any()):
            raise ValueError(f"No validation image has a label: {IGNORED_LABELS[0]} and {IGNORED_LABELS[1]} are none.")
        sets = [getattr(loader, "dataset", None) for loader in (self.source.loader(True), self.source.loader(False))]
        for names in (getattr(data, "classes", None) for data in sets):
            if isinstance(names, list | tuple) and len(names) > classes:
                raise ValueError(f"The images have {len(names)} classes, and the network has {classes}.")

    def _seen(self, training: bool, given: Batches | None, count: int | None) -> _Seen | None:
        parameter = next(self.paths.supernet.parameters())
        if isinstance(given, TensorBatches):
            images, labels = next(iter(given))
            return _Seen(images.to(parameter.device), labels.to(parameter.device), given.labels_of_batches)
        seen = _Collected(parameter.device)
        if given is None and self.source.repeatable(training):
            self.source.collect(training, count, seen)
        elif given is not None and not isinstance(given, Iterator):
            for images, labels in given:
                # Who recalibrates needs no labels.
                seen(images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels)
        else:
            return None
        return seen.result()


class _Collected:
    """Keeps of batches the first one with labels, and all labels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: tuple[Tensor, Tensor] | None = None
        self._labels: list[Tensor] = []

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self._labels.append(labels.cpu())
        if self._first is not None:
            return
        known = torch.ones(len(labels), dtype=torch.bool)
        if labels.ndim == 1:
            known = torch.stack([labels.cpu() != label for label in IGNORED_LABELS]).all(0)
        if bool(known.any()):
            known = known.to(images.device)
            self._first = images[known].to(self._device), labels[known].to(self._device)

    def result(self) -> _Seen:
        if self._first is None:
            raise ValueError(f"No image has a label: {IGNORED_LABELS[0]} and {IGNORED_LABELS[1]} stand for none.")
        return _Seen(*self._first, self._labels)
