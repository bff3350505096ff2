"""A trained supernet with what it takes to score its paths: from a run folder, or from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nni.nas.nn.pytorch import ModelSpace
from torch import Tensor

from genas_plugins.checkpoints import CheckpointError, load_supernet, read_state
from genas_plugins.datasets import ImageTensors, SearchData, load_search_data
from genas_plugins.scoring import Accuracy, CombinedScore, Measurement, accuracy, recalibrate_batchnorm
from genas_plugins.scoring.data import TensorBatches
from nni_strategy import config
from nni_strategy.samples import SupernetPaths
from nni_strategy.space import space_around
from nni_strategy.strategy import measure_candidate

__all__ = ["TrainedSupernet", "batch_size_for", "load_data", "load_space_weights"]

CONFIG_FILE = "config.yaml"
INITIAL_FILE = "initial.safetensors"
SUPERNET_FILE = "supernet.ckpt"
HISTORY_FILE = "history.jsonl"
_PREFIX = "network.supernet."


def load_data(experiment: config.Experiment) -> SearchData:
    """The images of an experiment.

    Raises:
        FileNotFoundError: They are not where the experiment says.
        ValueError: They are not what it expects.
    """
    settings = experiment.data
    return load_search_data(
        settings.name,
        root=settings.root,
        download=settings.download,
        image_size=settings.image_size,
        storage=settings.storage,
        train_images=settings.train_images,
        validation_images=settings.validation_images,
        test_images=settings.test_images,
        random_labels=settings.random_labels,
        recalibration_images=experiment.score.recalibration_images or None,
        seed=experiment.seed,
    )


def batch_size_for(device: torch.device, wanted: int | None) -> int:
    """Images a validation batch: what the user wants, or else what suits the device.

    64 on a CPU, as larger batches fall out of its caches. On CUDA as many as keep it busy: where they do not fit its
    memory they are halved (:meth:`~genas_plugins.scoring.data.TensorBatches.halve`). Elsewhere 512.
    """
    return wanted or {"cpu": 64, "cuda": 2048}.get(device.type, 512)


class TrainedSupernet:
    """Scores paths of a trained supernet.

    Args:
        space: The mutated space, with trained weights.
        data: Images to recalibrate and score on.
        score: The metric unless :meth:`measure` is given another.
        initial: Weights before training, for the angle.
        seed: Of the noise.
        recalibration_batch_size: Images a batch.
        batch_size: Validation images a batch; ``None`` chooses by the device.
        device: To score on; ``None`` for CUDA where there is one.

    Raises:
        ValueError: Supernet and images have different numbers of classes.
    """

    def __init__(
        self,
        space: ModelSpace,
        data: SearchData,
        score: CombinedScore,
        *,
        initial: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        recalibrate: bool = True,
        recalibration_batch_size: int = 64,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.space = space.to(self.device)
        self.data = data
        self.score = score
        self.seed = seed
        self.paths = SupernetPaths(self.space, initial)
        self._recalibration_batch_size = recalibration_batch_size
        self.validation = self._batches(data.validation, batch_size_for(self.device, batch_size))
        self.recalibration = self._batches(data.recalibration, recalibration_batch_size) if recalibrate else None
        self._check_classes()

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        *,
        score: CombinedScore | None = None,
        device: torch.device | str | None = None,
        data_root: str | Path | None = None,
    ) -> TrainedSupernet:
        """Open the run folder of ``genas search``.

        Args:
            folder: The run folder.
            score: The metric; ``None`` for the run's.
            device: To score on; ``None`` for CUDA where there is one.
            data_root: Where the images are now; ``None`` for where the run had them, which may have been seen from
                another folder.

        Raises:
            FileNotFoundError: The folder holds no finished supernet, or the images are not where they were.
            ConfigError: Its ``config.yaml`` cannot be read.
            CheckpointError: Its supernet cannot be read.
        """
        folder = Path(folder)
        # The history begins when training has ended.
        for name in (CONFIG_FILE, SUPERNET_FILE, HISTORY_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a search with a trained supernet: no {name}.")
        experiment = config.load(folder / CONFIG_FILE)
        if data_root is not None:
            located = dataclasses.replace(experiment.data, root=str(data_root))
            experiment = dataclasses.replace(experiment, data=located)
        try:
            data = load_data(experiment)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} {folder / CONFIG_FILE} has data.root {experiment.data.root!r}, seen from {Path.cwd()}; if "
                "the images are elsewhere now, say where with --data-root (data_root= in Python)."
            ) from error
        space = space_around(load_supernet(folder / SUPERNET_FILE))
        initial = None
        if (folder / INITIAL_FILE).is_file():
            initial = {f"{_PREFIX}{name}": value for name, value in read_state(folder / INITIAL_FILE).items()}
        return cls(
            space,
            data,
            score or experiment.score.build(),
            initial=initial,
            seed=experiment.seed,
            recalibrate=experiment.score.recalibration_images > 0,
            recalibration_batch_size=experiment.score.recalibration_batch_size,
            batch_size=experiment.score.batch_size,
            device=device,
        )

    def measure(self, candidate: Any, score: CombinedScore | None = None) -> Measurement:
        """Score one candidate of the space (of its ``search_space``)."""
        return measure_candidate(
            self.paths, candidate, score or self.score, self.recalibration, self.validation, self.seed
        )

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
        return self._batches(
            chosen if isinstance(chosen, ImageTensors) else chosen.load(), self._recalibration_batch_size
        )

    def test_accuracy(self, candidate: Any) -> Accuracy | None:
        """Accuracy of a path on the test images, which neither training nor search saw; ``None`` without any."""
        if self.data.test is None:
            return None
        example, _ = next(iter(self.validation))
        with self.paths.open(candidate, example) as (model, _):
            if self.recalibration is not None:
                recalibrate_batchnorm(model, self.recalibration, self.score.momentum)
            return accuracy(model, self._batches(self.data.test, self.validation.batch_size))

    def _check_classes(self) -> None:
        classes = self.paths.num_classes(*next(iter(self.validation)))
        if classes != self.data.num_classes:
            raise ValueError(
                f"The supernet has {classes} classes, and the images ({self.data.name}) have {self.data.num_classes}: "
                "their labels would mean other classes. Score it on the images of its training."
            )

    def _batches(self, images: ImageTensors, size: int) -> TensorBatches:
        return TensorBatches(images, size, self.data.mean, self.data.std, device=self.device)


def load_space_weights(space: ModelSpace, path: str | Path) -> None:
    """Load a checkpoint of a mutated space: its state dict, or Lightning's file of a one-shot training.

    Raises:
        CheckpointError: The names do not fit the space.
    """
    state = read_state(path)
    wanted = space.state_dict()
    first = next(iter(wanted))
    prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), "")
    named = {name.removeprefix(prefix): value for name, value in state.items()}
    missing, left_over = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
    if missing or left_over:
        raise CheckpointError(
            f"{path} does not fit {type(space).__name__}: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(left_over)} left over ({', '.join(left_over[:3])})."
        )
    space.load_state_dict(named)
