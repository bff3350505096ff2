"""The sections of an experiment that say what is trained: supernet, images, training."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from genas_plugins._messages import shown
from genas_plugins._settings import Dotless, ImageCount, settings
from genas_plugins.checks import MOST
from genas_plugins.darts.network import MAX_CELLS, MAX_CHANNELS
from genas_plugins.spaces import OWN_SPACES, find_space
from genas_plugins.training.rates import final_rate

__all__ = ["ConfigError", "Data", "Space", "Training"]

_Count = Annotated[int, Field(ge=1, le=MOST)]
_Cells = Annotated[int, Field(ge=1, le=MAX_CELLS)]
_Pixels = Annotated[int, Field(ge=1, le=16_384)]
_Processes = Annotated[int, Field(ge=1, le=1_024)]
_Rate = Annotated[float, Field(gt=0, le=1e3), Dotless]


class ConfigError(ValueError):
    """An experiment file, or a ``--set`` on the command line, says something that cannot be run."""


@settings(ConfigError)
class Space:
    """The supernet, by default the official one.

    Attributes:
        name: ``darts``, ``nasbench201``, or a space that another package registers (:mod:`genas_plugins.spaces`).
        init_channels: Channels of the first cell; an even number.
        num_cells: Cells of the supernet, of the DARTS space.
        stem: First layers, of the DARTS space: ``cifar`` keeps the size of the images, ``imagenet`` quarters it.
        cells_per_stage: Cells of each of the three stages, of NAS-Bench-201.
        affine: Whether batch normalisation in the cells has weight and bias, of NAS-Bench-201; RLNAS's has none.
        arguments: Settings of a space of another package.
    """

    name: Annotated[str, Field(examples=["darts", "nasbench201"])] = "darts"
    init_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] = 16
    num_cells: _Cells = 8
    stem: Literal["cifar", "imagenet"] = "cifar"
    cells_per_stage: _Cells = 5
    affine: bool = True
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arguments and self.name in OWN_SPACES:
            raise ValueError(f"{self.name} has settings of its own instead of arguments, got {shown(self.arguments)}.")
        # It checks what it reads.
        find_space(self.name).supernet_arguments(1, self)


@settings(ConfigError)
class Data:
    """The images; see :func:`genas_plugins.datasets.load_search_data`. Sizes of ``null`` mean all there are.

    Attributes:
        name: The data set; ``image_folder`` is your own images, a folder for each class.
        root: Folder with the images; ``digits`` needs none.
        download: Let torchvision download CIFAR.
        image_size: Pixels to which images are resized, square; ``null`` leaves them.
        storage: ``memory`` decodes all images at the start, ``disk`` training images as they are needed (ImageNet).
        train_images: Images that train the supernet, of the half that does.
        validation_images: Images that score architectures, of the other half.
        test_images: Images for the accuracy at the end, which neither training nor search sees.
        random_labels: Train on random labels (RLNAS); validation keeps the true ones.
        flip: Mirror training images at random.
        crop_padding: Pixels of the border from which random crops of training images are taken; 0 crops nothing.
    """

    name: Literal["digits", "cifar10", "cifar100", "imagenet16-120", "image_folder"] = "digits"
    root: str | None = None
    download: bool = False
    image_size: _Pixels | None = None
    storage: Literal["memory", "disk"] = "memory"
    train_images: ImageCount | None = None
    validation_images: ImageCount | None = None
    test_images: ImageCount | None = None
    random_labels: bool = False
    flip: bool = True
    crop_padding: Annotated[int, Field(ge=0, le=1_024)] = 4


@settings(ConfigError)
class Training:
    """The supernet recipe of the official code, and what Lightning's trainer is told.

    Attributes:
        epochs: Passes over the images that train.
        batch_size: Images of a step, of each process.
        learning_rate: First learning rate; it falls as a cosine.
        final_learning_rate: Last learning rate; ``null`` is 0.001, or ``learning_rate`` if that is less.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        gradient_clip: Largest norm of the gradient; 0 does not clip.
        decay_unsampled: Weight decay and momentum move all paths at every step, as in the official run.
        precision: Lightning's name for the types of the training; scores are measured in the parameters' type.
        accelerator: Lightning's name for the kind of device.
        devices: Devices of this machine, one process on each.
        threads: PyTorch's threads on a CPU while it trains; ``null`` takes PyTorch's own number, usually that of the
            cores. On busy cores one is fastest.
        num_workers: Processes that load images; 0 loads them in the training's own.
        checkpoint_every: Epochs between checkpoints; must divide ``epochs``.
        logger: Lightning's logger, told of the training and of each generation of the search.
    """

    epochs: _Count = 250
    batch_size: _Count = 64
    learning_rate: _Rate = 0.025
    final_learning_rate: _Rate | None = None
    momentum: Annotated[float, Field(ge=0, lt=1), Dotless] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=100), Dotless] = 3e-4
    gradient_clip: Annotated[float, Field(ge=0), Dotless] = 5.0
    decay_unsampled: bool = True
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    devices: _Processes | Literal["auto"] = 1
    threads: _Processes | None = None
    num_workers: Annotated[int, Field(ge=0, le=1_024)] = 0
    checkpoint_every: _Count = 1
    logger: Literal["csv", "tensorboard", "wandb", "mlflow"] = "csv"

    def __post_init__(self) -> None:
        if self.epochs % self.checkpoint_every:
            raise ValueError(
                f"checkpoint_every must divide epochs ({self.epochs}), so that the last epoch is saved, "
                f"got {self.checkpoint_every}."
            )
        if self.final_learning_rate is None:
            # As a number, which is what a run is stored and compared with.
            object.__setattr__(self, "final_learning_rate", final_rate(self.learning_rate))
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be positive and at most learning_rate ({self.learning_rate}), "
                f"got {self.final_learning_rate}."
            )
