"""A trained supernet with what it takes to score its paths: from a run folder, from one file, or from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nni.nas.nn.pytorch import ModelSpace
from torch import Tensor

from genas_plugins._messages import listed
from genas_plugins.checkpoints import (
    CheckpointError,
    load_supernet,
    read_metadata,
    read_state,
    save_supernet,
    unwrapped,
)
from genas_plugins.checks import check_count, check_device, check_seed
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.datasets import ImageTensors, SearchData, load_search_data, read_identity, refuse_change
from genas_plugins.experiment import config
from genas_plugins.experiment.resuming import check_began, state_digest
from genas_plugins.nasbench201 import NasBench201SuperNet
from genas_plugins.scoring import Accuracy, CombinedScore, Measurement, accuracy, recalibrate_batchnorm
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.search import InFlight, torch_threads
from nni_strategy.samples import SupernetPaths
from nni_strategy.space import space_around
from nni_strategy.strategy import measure_candidate

__all__ = ["TrainedSupernet", "batch_size_for", "load_data", "load_space_weights", "save_trained"]

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
    return {"cpu": 64, "cuda": 2048}.get(device.type, 512) if wanted is None else wanted


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
        threads: PyTorch's threads for a measurement on a CPU. ``None`` measures as a search does: a path that is a
            network of its own on one thread, which gives the same score on any number of cores; others on all.

    Raises:
        TypeError: A number is not whole.
        ValueError: A setting is out of its range, this machine has no such device, or supernet and images have
            different numbers of classes.
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
        threads: int | None = None,
    ) -> None:
        for name, size in (("recalibration_batch_size", recalibration_batch_size), ("batch_size", batch_size)):
            if size is not None:
                check_count(name, size)
        self.device = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.space = space.to(self.device)
        self.data = data
        self.score = score
        self.seed = check_seed(seed)
        self.paths = SupernetPaths(self.space, initial)
        self.in_flight = InFlight(None if self.paths.side_by_side and threads is None else 1, self.device, threads)
        self.recalibration_batch_size = recalibration_batch_size
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
        threads: int | None = None,
    ) -> TrainedSupernet:
        """Open the run folder of ``genas search``, or the file of :func:`save_trained`.

        Args:
            folder: The run folder or the file.
            score: The metric; ``None`` for the run's.
            device: To score on; ``None`` for CUDA where there is one.
            data_root: Where the images are now; ``None`` for where the run had them, which may have been seen from
                another folder.
            threads: PyTorch's threads for a measurement on a CPU, see above.

        Raises:
            FileNotFoundError: The folder holds no finished supernet, or the images are not where they were.
            ConfigError: Its ``config.yaml`` cannot be read, or was changed since.
            DataChangedError: The images are others than those that it was trained and is to be scored on.
            CheckpointError: Its supernet cannot be read, or the file does not say how it was trained.
        """
        path = Path(folder)
        opened = _Source.of_file(path) if path.is_file() else _Source.of_folder(path)
        experiment = opened.experiment
        if data_root is not None:
            located = dataclasses.replace(experiment.data, root=str(data_root))
            experiment = dataclasses.replace(experiment, data=located)
        try:
            data = load_data(experiment)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} {opened.told_by} has data.root {experiment.data.root!r}, seen from {Path.cwd()}; if "
                "the images are elsewhere now, say where with --data-root (data_root= in Python)."
            ) from error
        if data.identity is not None and opened.images is not None:
            what = f"what the run in {path} began with" if path.is_dir() else f"what {path} was trained on"
            refuse_change({"images": opened.images}, data.identity, what, path, ("images",))
        return cls(
            space_around(opened.supernet),
            data,
            score or experiment.score.build(),
            initial=opened.initial,
            seed=experiment.seed,
            recalibrate=experiment.score.recalibration_images > 0,
            recalibration_batch_size=experiment.score.recalibration_batch_size,
            batch_size=experiment.score.batch_size,
            device=device,
            threads=threads,
        )

    def measure(self, candidate: Any, score: CombinedScore | None = None) -> Measurement:
        """Score one candidate of the space (of its ``search_space``)."""
        with torch_threads(self.in_flight.threads):
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
            chosen if isinstance(chosen, ImageTensors) else chosen.load(), self.recalibration_batch_size
        )

    def test_accuracy(self, candidate: Any) -> Accuracy | None:
        """Accuracy of a path on the test images, which neither training nor search saw; ``None`` without any."""
        if self.data.test is None:
            return None
        example, _ = next(iter(self.validation))
        with torch_threads(self.in_flight.threads), self.paths.open(candidate, example) as (model, _):
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a trained supernet is opened from."""

    experiment: config.Experiment
    supernet: SuperNet | NasBench201SuperNet
    initial: Mapping[str, Tensor] | None
    told_by: Path
    images: Any
    """Identity of those that were split; None where that is not known."""

    @classmethod
    def of_folder(cls, folder: Path) -> _Source:
        # The history begins when training has ended.
        for name in (CONFIG_FILE, SUPERNET_FILE, HISTORY_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a search with a trained supernet: no {name}.")
        initial = None
        if (folder / INITIAL_FILE).is_file():
            initial = _prefixed(read_state(folder / INITIAL_FILE))
        experiment = config.load(folder / CONFIG_FILE)
        # What decides which images have trained the supernet, and which network it is.
        check_began(folder, experiment, ("seed", "space", "data", "training"))
        images = (read_identity(folder) or {}).get("images")
        return cls(experiment, load_supernet(folder / SUPERNET_FILE), initial, folder / CONFIG_FILE, images)

    @classmethod
    def of_file(cls, path: Path) -> _Source:
        metadata = read_metadata(path)
        if "experiment" not in metadata:
            raise CheckpointError(
                f"{path} does not say how its supernet was trained: pass the folder of a search, or a file that "
                "nni_strategy.trained.save_trained wrote."
            )
        try:
            experiment = config.parse(metadata["experiment"])
        except config.ConfigError as error:
            raise CheckpointError(f"{path} has an experiment that cannot be read: {error}") from error
        supernet = load_supernet(path)
        initial = _initial_weights(supernet, experiment.seed)
        # Another release of PyTorch may draw other numbers: then the angle has nothing to start from.
        known = state_digest(initial) == metadata.get("initial_sha256")
        return cls(experiment, supernet, _prefixed(initial) if known else None, path, metadata.get("images"))


def save_trained(folder: str | Path, path: str | Path, **card: Any) -> Path:
    """Write the trained supernet of a run folder as one file, which :meth:`TrainedSupernet.from_run` opens.

    Beside the weights it has the experiment and the identity of its images. The weights before training, which the
    angle needs, are not in it: they are drawn again from the experiment's seed, and compared with a hash of those that
    the run had.

    Args:
        folder: Of ``genas search``; the search need not have come to its end, the training must.
        path: Ends in ``.safetensors``.
        **card: JSON data to keep beside them, such as versions and hardware.

    Raises:
        FileNotFoundError: The folder holds no trained supernet.
        CheckpointError: Its supernet cannot be read.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    source = _Source.of_folder(Path(folder))
    initial = None if source.initial is None else read_state(Path(folder) / INITIAL_FILE)
    return save_supernet(
        source.supernet,
        path,
        experiment=config.plain(source.experiment),
        initial_sha256=None if initial is None else state_digest(initial),
        images=source.images,
        card=card,
    )


def _initial_weights(supernet: SuperNet | NasBench201SuperNet, seed: int) -> dict[str, Tensor]:
    """The weights with which a run begins; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(supernet)(**supernet.arguments).state_dict()


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{_PREFIX}{name}": value for name, value in state.items()}


def load_space_weights(space: ModelSpace, path: str | Path) -> None:
    """Load a checkpoint of a mutated space: its state dict, or Lightning's file of a one-shot training.

    Raises:
        CheckpointError: The names do not fit the space.
    """
    state = read_state(path)
    wanted = space.state_dict()
    first = next(iter(wanted))
    # As it is, for a space that has such names itself; and without what wrappers add.
    for tensors in (state, unwrapped(state)):
        prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
        named = {name.removeprefix(prefix): value for name, value in tensors.items()}
        if named.keys() == wanted.keys():
            break
    missing, left_over = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
    if missing or left_over:
        raise CheckpointError(
            f"{path} does not fit {type(space).__name__}: {len(missing)} tensors are missing "
            f"({listed(missing, 3)}), {len(left_over)} left over ({listed(left_over, 3)})."
        )
    space.load_state_dict(named)
