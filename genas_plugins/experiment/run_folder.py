"""What the folder of a search holds, and a trained supernet out of it or out of one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genas_plugins.checkpoints import CheckpointError, load_supernet, read_metadata, read_state, save_supernet
from genas_plugins.datasets import SearchData, load_search_data, read_identity, refuse_change
from genas_plugins.experiment import config
from genas_plugins.experiment.resuming import check_began, state_digest

__all__ = [
    "ARCHITECTURE_FILE",
    "CONFIG_FILE",
    "FRONT_FILE",
    "GENOTYPE_FILE",
    "HISTORY_FILE",
    "INITIAL_FILE",
    "SUPERNET_FILE",
    "TrainedRun",
    "load_data",
    "save_trained",
]

CONFIG_FILE = "config.yaml"
INITIAL_FILE = "initial.safetensors"
SUPERNET_FILE = "supernet.ckpt"
HISTORY_FILE = "history.jsonl"
GENOTYPE_FILE = "genotype.json"
ARCHITECTURE_FILE = "architecture.json"
FRONT_FILE = "pareto.csv"


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


@dataclass(frozen=True)
class TrainedRun:
    """A trained supernet and how it was trained.

    Attributes:
        path: The run folder, or the file.
        experiment: Its settings.
        supernet: With trained weights.
        initial: The weights before training, for the angle; ``None`` where they are not known.
        images: Identity of the images that were split; ``None`` where that is not known.
        told_by: The file that says how it was trained.
    """

    path: Path
    experiment: config.Experiment
    supernet: Any
    initial: Mapping[str, Tensor] | None
    images: Any
    told_by: Path

    @classmethod
    def open(cls, path: str | Path) -> TrainedRun:
        """Read the folder of ``genas search``, or the file of :func:`save_trained`.

        Raises:
            FileNotFoundError: The folder holds no finished supernet.
            ConfigError: Its ``config.yaml`` cannot be read, or was changed since.
            CheckpointError: Its supernet cannot be read, or the file does not say how it was trained.
        """
        path = Path(path)
        return cls._of_file(path) if path.is_file() else cls._of_folder(path)

    @classmethod
    def _of_folder(cls, folder: Path) -> TrainedRun:
        # The history begins when training has ended.
        for name in (CONFIG_FILE, SUPERNET_FILE, HISTORY_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a search with a trained supernet: no {name}.")
        initial = None
        if (folder / INITIAL_FILE).is_file():
            initial = read_state(folder / INITIAL_FILE)
        experiment = config.load(folder / CONFIG_FILE)
        # What decides which images have trained the supernet, and which network it is.
        check_began(folder, experiment, ("seed", "space", "data", "training"))
        images = (read_identity(folder) or {}).get("images")
        return cls(folder, experiment, load_supernet(folder / SUPERNET_FILE), initial, images, folder / CONFIG_FILE)

    @classmethod
    def _of_file(cls, path: Path) -> TrainedRun:
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
        # The global generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(experiment.seed)
            initial = type(supernet)(**supernet.arguments).state_dict()
        # Another release of PyTorch may draw other numbers: then the angle has nothing to start from.
        known = state_digest(initial) == metadata.get("initial_sha256")
        return cls(path, experiment, supernet, initial if known else None, metadata.get("images"), path)

    def data(self, root: str | Path | None = None) -> SearchData:
        """The images of the run.

        Args:
            root: Where they are now; ``None`` for where the run had them, which may have been seen from another folder.

        Raises:
            FileNotFoundError: They are not there.
            DataChangedError: They are others than those that it was trained and is to be scored on.
        """
        experiment = self.experiment
        if root is not None:
            experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=str(root)))
        try:
            data = load_data(experiment)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} {self.told_by} has data.root {experiment.data.root!r}, seen from {Path.cwd()}; if "
                "the images are elsewhere now, say where with --data-root (data_root= in Python)."
            ) from error
        if data.identity is not None and self.images is not None:
            what = f"what the run in {self.path} began with"
            if self.path.is_file():
                what = f"what {self.path} was trained on"
            refuse_change({"images": self.images}, data.identity, what, self.path, ("images",))
        return data


def save_trained(folder: str | Path, path: str | Path, **card: Any) -> Path:
    """Write the trained supernet of a run folder as one file, which ``genas score --run`` and others open.

    Beside the weights it has the experiment and the identity of its images. The weights before training, which the
    angle needs, are not in it: they are drawn again from the experiment's seed, and compared with a hash of those that
    the run had.

    Args:
        folder: Folder of ``genas search``; the search need not have come to its end, the training must.
        path: File to write; ends in ``.safetensors``.
        **card: JSON data to keep beside them, such as versions and hardware.

    Raises:
        FileNotFoundError: The folder holds no trained supernet.
        CheckpointError: Its supernet cannot be read.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    run = TrainedRun.open(folder)
    return save_supernet(
        run.supernet,
        path,
        experiment=config.plain(run.experiment),
        initial_sha256=None if run.initial is None else state_digest(run.initial),
        images=run.images,
        card=card,
    )
