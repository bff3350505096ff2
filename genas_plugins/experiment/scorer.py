"""What scores the candidates of a supernet: its paths, the images, the score, and how many are measured at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins.checks import check_count, check_device, check_seed
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment.neighbours import Neighbours
from genas_plugins.experiment.racing import race_of
from genas_plugins.experiment.run_folder import TrainedRun
from genas_plugins.scoring import (
    Accuracy,
    CombinedScore,
    Measurement,
    NeighbourhoodScore,
    Recalibration,
    accuracy,
    recalibrate_batchnorm,
)
from genas_plugins.scoring.data import Batches, TensorBatches
from genas_plugins.scoring.losses import Loss
from genas_plugins.scoring.paths import Paths, SubnetPaths
from genas_plugins.search import InFlight, Race, candidate_seed, torch_threads

__all__ = ["Scorer", "batch_size_for", "search_batches"]


def batch_size_for(device: torch.device, wanted: int | None) -> int:
    """Images a validation batch: what the user wants, or else what suits the device.

    64 on a CPU, as larger batches fall out of its caches. On CUDA as many as keep it busy: where they do not fit its
    memory they are halved (:meth:`~genas_plugins.scoring.data.TensorBatches.halve`). Elsewhere 512.
    """
    return {"cpu": 64, "cuda": 2048}.get(device.type, 512) if wanted is None else wanted


def search_batches(
    data: SearchData,
    device: torch.device,
    recalibration: Recalibration | None = None,
    batch_size: int | None = None,
) -> tuple[TensorBatches | None, TensorBatches]:
    """The images that candidates are recalibrated and scored on, on a device.

    Args:
        data: Images of a search.
        device: Where candidates are measured.
        recalibration: Number of images, 0 for no recalibration, and batch size; ``None`` for the defaults.
        batch_size: Validation images a batch; ``None`` chooses by the device.

    Raises:
        TypeError: The batch size is not whole.
        ValueError: It is below 1.
    """
    recalibration = recalibration or Recalibration()
    if batch_size is not None:
        check_count("batch_size", batch_size)
    calibrating = None
    if recalibration.images:
        calibrating = _batches(data, data.recalibration, recalibration.batch_size, device)
    return calibrating, _batches(data, data.validation, batch_size_for(device, batch_size), device)


class Scorer:
    """Scores candidates of a supernet, which is left as it was.

    Equal seeds give equal scores: the noise on a candidate is a function of the seed and the candidate, or of the seed
    alone where it is common, whenever, in whatever order and on whatever number of threads candidates are measured.

    >>> from genas_plugins import ZOO, SuperNet
    >>> batches = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    >>> scorer = Scorer(SuperNet(10, init_channels=4, num_cells=2), CombinedScore(), validation=batches)
    >>> genotype = ZOO["genas_flatness_c10"].genotype
    >>> scorer.measure(genotype) == scorer.measure(genotype)
    True

    Args:
        paths: Paths of a supernet, or a supernet of this package.
        score: What is measured, unless :meth:`measure` is given another.
        validation: Images and labels to score on, on the supernet's device.
        recalibration: Training images for the statistics of batch normalisation; ``None`` keeps those that there are.
        seed: Seed of the noise.
        loss: What is measured instead of cross-entropy, see :func:`genas_plugins.scoring.flatness`.
        in_flight: How many candidates are measured at a time, and on how many threads each; by default one after
            another, on all of PyTorch's threads.
        data: Where the batches come from; needed for what is measured on other images.
    """

    def __init__(
        self,
        paths: Paths | nn.Module,
        score: CombinedScore,
        *,
        validation: Batches,
        recalibration: Batches | None = None,
        seed: int = 0,
        loss: Loss | None = None,
        in_flight: InFlight | None = None,
        data: SearchData | None = None,
    ) -> None:
        self.paths: Any = SubnetPaths(paths) if isinstance(paths, nn.Module) else paths
        self.score = score
        self.validation: Any = validation
        self.recalibration: Any = recalibration
        self.seed = check_seed(seed)
        self.loss = loss
        self.in_flight = in_flight or InFlight()
        self.data = data
        self._neighbours: dict[NeighbourhoodScore, Neighbours] = {}

    @classmethod
    def on_data(
        cls,
        paths: Paths | nn.Module,
        data: SearchData,
        score: CombinedScore,
        *,
        seed: int = 0,
        recalibration: Recalibration | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        threads: int | None = None,
    ) -> Scorer:
        """Score on the images of a search.

        Args:
            paths: Paths of a supernet, or a supernet of this package; it is moved to the device.
            data: Images to recalibrate and score on.
            score: The metric.
            seed: Seed of the noise.
            recalibration: Number of images, 0 for no recalibration, and batch size; ``None`` for the defaults.
            batch_size: Validation images a batch; ``None`` chooses by the device.
            device: To score on; ``None`` for CUDA where there is one.
            threads: PyTorch's threads for a measurement on a CPU. ``None`` measures as a search does: a path that is a
                network of its own on one thread, which gives the same score on any number of cores; others on all.

        Raises:
            TypeError: A number is not whole.
            ValueError: A setting is out of its range, this machine has no such device, or supernet and images have
                different numbers of classes.
        """
        place = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        paths = SubnetPaths(paths) if isinstance(paths, nn.Module) else paths
        paths.supernet.to(place)
        calibrating, validation = search_batches(data, place, recalibration, batch_size)
        scorer = cls(
            paths,
            score,
            validation=validation,
            recalibration=calibrating,
            seed=seed,
            in_flight=InFlight(None if paths.side_by_side and threads is None else 1, place, threads),
            data=data,
        )
        classes = paths.num_classes(*next(iter(scorer.validation)))
        if classes != data.num_classes:
            raise ValueError(
                f"The supernet has {classes} classes, and the images ({data.name}) have {data.num_classes}: "
                "their labels would mean other classes. Score it on the images of its training."
            )
        return scorer

    @classmethod
    def from_run(
        cls,
        folder: str | Path | TrainedRun,
        *,
        score: CombinedScore | None = None,
        device: torch.device | str | None = None,
        data_root: str | Path | None = None,
        threads: int | None = None,
    ) -> Scorer:
        """Open the run folder of ``genas search``, or the file of :func:`~.run_folder.save_trained`.

        Args:
            folder: The run folder or the file, or what was opened of it.
            score: The metric; ``None`` for the run's.
            device: To score on; ``None`` for CUDA where there is one.
            data_root: Where the images are now; ``None`` for where the run had them, which may have been seen from
                another folder.
            threads: PyTorch's threads for a measurement on a CPU, see :meth:`on_data`.

        Raises:
            FileNotFoundError: The folder holds no finished supernet, or the images are not where they were.
            ConfigError: Its ``config.yaml`` cannot be read, or was changed since.
            DataChangedError: The images are others than those that it was trained and is to be scored on.
            CheckpointError: Its supernet cannot be read, or the file does not say how it was trained.
        """
        run = folder if isinstance(folder, TrainedRun) else TrainedRun.open(folder)
        settings = run.experiment.score
        return cls.on_data(
            SubnetPaths(run.supernet, run.initial),
            run.data(data_root),
            score or settings.build(),
            seed=run.experiment.seed,
            recalibration=settings.recalibration,
            batch_size=settings.batch_size,
            device=device,
            threads=threads,
        )

    @property
    def device(self) -> torch.device:
        """Where candidates are measured."""
        return self.in_flight.device

    @contextmanager
    def open(
        self, candidate: Any, score: CombinedScore | None = None, example: Tensor | None = None
    ) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """Yield a candidate's network and what a score needs beside images: angle, noise, parameters and loss.

        Args:
            candidate: Architecture of ``paths.search_space``.
            score: What is to be measured; ``None`` for the scorer's.
            example: Batch of images, for their device and shape; ``None`` for the first to score on.
        """
        if example is None:
            example, _ = next(iter(self.validation))
        number = candidate_seed(self.seed, self.paths.search_space.to_json(candidate))
        with self.paths.open(candidate, example) as (model, names):
            yield (
                model,
                {
                    "angle": lambda: self.paths.angle(candidate, names),
                    "generator": torch.Generator(example.device).manual_seed(number),
                    "common": self.paths.common_noise(self.seed) if (score or self.score).common else None,
                    "parameters": names,
                    "loss": self.loss,
                },
            )

    def measure(self, candidate: Any, score: CombinedScore | NeighbourhoodScore | None = None) -> Measurement:
        """Score one candidate.

        Args:
            candidate: Architecture of ``paths.search_space``.
            score: What is measured; ``None`` for the scorer's. That of a neighbourhood measures the neighbours too,
                each once.

        Raises:
            MeasurementError: A number is not finite.
        """
        score = score or self.score
        if isinstance(score, NeighbourhoodScore):
            if score not in self._neighbours:
                self._neighbours[score] = self.neighbours(score)
            return self._neighbours[score].measure(candidate)
        with torch_threads(self.in_flight.threads), self.open(candidate, score) as (model, sources):
            return score(model, self.validation, recalibration=self.recalibration, **sources)

    def neighbours(self, score: NeighbourhoodScore, **kept: Any) -> Neighbours:
        """What measures candidates with their neighbours.

        Args:
            score: How a neighbourhood's score is put together.
            **kept: What is known already, see :class:`~genas_plugins.experiment.neighbours.Neighbours`.
        """

        def measure(candidate: Any) -> Measurement:
            return self.measure(candidate, score.score)

        space = self.paths.search_space
        return Neighbours(space, score, measure, seed=self.seed, in_flight=self.in_flight, **kept)

    def race(self, confidence: float, keep: int) -> Race[Any]:
        """A race of candidates, which are measured on as many images as their place among the best asks for.

        Args:
            confidence: See :class:`genas_plugins.search.Race`.
            keep: See :class:`genas_plugins.search.Race`.

        Raises:
            ValueError: A wrong confidence or metric, or images that are not in random order.
        """
        return race_of(self, confidence, keep)

    def recalibration_on(self, images: int) -> TensorBatches:
        """The first ``images`` of the train half; those that the run recalibrates on are the first of them.

        Raises:
            ValueError: The train half has fewer, or the run does not recalibrate.
        """
        train = self.data.train
        if self.recalibration is None or not 1 <= images <= len(train):
            raise ValueError(
                f"Recalibration on {images} images: this run "
                + ("does not recalibrate." if self.recalibration is None else f"has 1 to {len(train)} to train on.")
            )
        chosen = train.subset(range(images))
        chosen = chosen if isinstance(chosen, ImageTensors) else chosen.load()
        return _batches(self.data, chosen, self.recalibration.batch_size, self.device)

    def test_accuracy(self, candidate: Any) -> Accuracy | None:
        """Accuracy of a path on the test images, which neither training nor search saw; ``None`` without any."""
        if self.data is None or self.data.test is None:
            return None
        with torch_threads(self.in_flight.threads), self.calibrated(candidate) as model:
            return accuracy(model, _batches(self.data, self.data.test, self.validation.batch_size, self.device))

    @contextmanager
    def calibrated(self, candidate: Any) -> Iterator[nn.Module]:
        """Yield a candidate's network with its own statistics of batch normalisation."""
        with self.open(candidate) as (model, _):
            if self.recalibration is not None:
                recalibrate_batchnorm(model, self.recalibration, self.score.recalibration_momentum)
            yield model


def _batches(data: SearchData, images: ImageTensors, size: int, device: torch.device) -> TensorBatches:
    return TensorBatches(images, size, data.mean, data.std, device=device)
