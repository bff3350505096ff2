"""Images for training and validation, in a reproducible order.

Folders are read by the rules of ``genas search`` and ``timm_models.validate``; other sources and the loaders are
timm's. timm's own reader of folders treats nested folders as classes, replaces unreadable images by the next one, and
turns 16-bit pictures white.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import natural_key
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from genas_plugins._messages import listed, message_of
from genas_plugins._pickles import load_arrays
from genas_plugins._reading import read_text
from genas_plugins.datasets._images import bounded_aspect, check_headers, converted, open_image
from genas_plugins.datasets._listing import class_folders, list_images
from timm_models.settings import Settings
from timm_models.shifted import ImageFiles

__all__ = [
    "Checked",
    "Lighting",
    "count_classes",
    "evaluation_loader",
    "image_config",
    "image_mode",
    "load_datasets",
    "training_loader",
]

_FOLDERS = ("", "folder", "image_folder")
_TRAINING, _VALIDATION = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")
_MODES = {1: "L", 3: "RGB"}
_SOURCES = ("torch", "hfds")
_LONGEST_MAP = 2**26
"""Most bytes of a class map, enough for a million names."""


class Lighting:
    """Colour noise along the principal components of ImageNet's pixels (Krizhevsky et al., 2012, section 4.1).

    Args:
        std: Standard deviation of the component's factor; the official GeNAS code uses 0.1.
    """

    # The components and their standard deviations for R, G, B from 0 to 1, as AlexNet's successors use them.
    _VALUES = np.array([0.2175, 0.0188, 0.0045], dtype=np.float32)
    _VECTORS = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], dtype=np.float32
    )

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, image: Image.Image) -> Image.Image:
        """Add one random colour to all pixels of an image."""
        factors = np.random.normal(scale=self.std, size=3).astype(np.float32)
        added = self._VECTORS @ (self._VALUES * factors)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) + 255.0 * added
        return Image.fromarray(pixels.clip(0.0, 255.0).astype(np.uint8))


class Checked(Dataset[tuple[Any, int]]):
    """A dataset of timm or torchvision whose pictures are read as strictly as :class:`ImageFiles` reads files.

    Args:
        dataset: Dataset with Pillow images, or a ``reader`` of timm's, and with names of classes.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.class_to_idx = _class_names(dataset)
        self.class_names = tuple(sorted(self.class_to_idx, key=lambda name: self.class_to_idx[name]))
        self.mode = "RGB"
        self.transform: Any = None
        if hasattr(dataset, "loader"):
            # torchvision's own converts before anything can be checked.
            dataset.loader = _opened

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, transformed, and its class; ValueError where it cannot be read."""
        name = f"{index} of the dataset"
        if (reader := getattr(self.dataset, "reader", None)) is not None:
            # Not timm's dataset, which takes the next image instead of one that it cannot read.
            file, target, *_ = reader[index]
            image = open_image(file, self.mode, name=name)
        else:
            image, target = self.dataset[index]
            image = converted(image, self.mode, name)
        image = bounded_aspect(image)
        return (image if self.transform is None else self.transform(image)), target


def _opened(path: str) -> Image.Image:
    return open_image(path)


def load_datasets(settings: Settings, primary: bool = True) -> tuple[Dataset, Dataset]:
    """The training and the validation set.

    Args:
        settings: Settings that name the data.
        primary: Whether this process reports what was found, and checks the files' headers beforehand.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A folder for a split is missing, files cannot be read, there are fewer than two classes, or the two
            sets have different ones.
    """
    folders = settings.dataset in _FOLDERS
    # timm reads a folder where it does not know the name.
    if not folders and settings.dataset.split("/")[0].lower() not in _SOURCES:
        raise ValueError(
            f"timm has no dataset {settings.dataset!r}: leave it empty for folders of images, or name one of "
            f"{', '.join(f'{source}/...' for source in _SOURCES)}."
        )
    if folders and not (settings.data_dir and Path(settings.data_dir).is_dir()):
        raise FileNotFoundError(
            f"There is no folder of images {settings.data_dir!r}: pass --data-dir DIR with DIR/train and DIR/val."
        )
    if settings.class_map and not any(
        path.is_file() for path in (Path(settings.class_map), Path(settings.data_dir) / settings.class_map)
    ):
        raise FileNotFoundError(f"There is no class map {settings.class_map}.")
    sets = []
    for split, training in ((settings.train_split, True), (settings.val_split, False)):
        sets.append(_open_folder(settings, split, primary) if folders else _open_source(settings, split, training))
    first, second = (_class_names(dataset) for dataset in sets)
    if first != second:
        only = sorted(set(first) ^ set(second))
        raise ValueError(
            f"The classes of {settings.train_split} ({len(first)}) and {settings.val_split} ({len(second)}) differ "
            f"({listed(only)}), so their numbers would too."
        )
    if len(first) == 1:
        raise ValueError(f"{settings.dataset} has a single class ({listed(first)}): every loss would be 0.")
    return sets[0], sets[1]


def _open_folder(settings: Settings, split: str, primary: bool) -> ImageFiles:
    base = Path(settings.data_dir)
    names = (split, *(_VALIDATION if split in _VALIDATION else _TRAINING if split in _TRAINING else ()))
    root = next((base / name for name in names if (base / name).is_dir()), base)
    # Otherwise it would validate on what it trains on.
    if root.resolve() == base.resolve():
        raise ValueError(
            f"{settings.data_dir} has no folder {split!r}; it has: "
            f"{listed(sorted(entry.name for entry in base.iterdir()), 10) or 'nothing'}."
        )
    folders = class_folders(root)
    if not folders:
        raise ValueError(f"{root} has no class folders: expected {root}/<class>/<image>, one folder a class.")
    classes = {name: number for number, name in enumerate(sorted(folders, key=natural_key))}
    if settings.class_map:
        classes = _read_class_map(settings)
    present = [name for name in classes if name in folders]
    listing = list_images(root, folders, present, key=natural_key)
    if primary:
        listing.log()
        check_headers([path for path, _ in listing.samples])
    labels = [classes[name] for name in present]
    samples = sorted(
        ((path, labels[position]) for path, position in listing.samples), key=lambda sample: natural_key(sample[0])
    )
    named = [", ".join(name for name in classes if classes[name] == number) for number in range(len(classes))]
    return ImageFiles(samples, named, classes)


def _read_class_map(settings: Settings) -> dict[str, int]:
    """Labels by name of class, from the lines of a text file or timm's pickled dictionary, read as data."""
    path = next(
        path for path in (Path(settings.class_map), Path(settings.data_dir) / settings.class_map) if path.is_file()
    )
    try:
        if path.suffix.lower() == ".txt":
            names = [line.strip() for line in read_text(path, limit=_LONGEST_MAP).splitlines()]
            classes = {name: number for number, name in enumerate(names) if name}
            if len(classes) < sum(map(bool, names)):
                raise ValueError("a name is there twice")
        elif path.suffix.lower() == ".pkl":
            with path.open("rb") as file:
                classes = dict(load_arrays(file.read(_LONGEST_MAP)))
        else:
            raise ValueError("expected a file .txt, a name a line, or .pkl")
    # What a damaged pickle raises depends on where the damage is.
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError, LookupError, AttributeError, MemoryError) as error:
        raise ValueError(f"The class map {path} cannot be read: {message_of(error)}.") from error
    numbers = list(classes.values())
    if not all(type(number) is int and 0 <= number < len(numbers) for number in numbers):
        raise ValueError(f"The class map {path} must number its {len(numbers)} classes from 0 to {len(numbers) - 1}.")
    return {str(name): number for name, number in classes.items()}


def _open_source(settings: Settings, split: str, training: bool) -> Checked:
    try:
        dataset = create_dataset(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            is_training=training,
            class_map=settings.class_map or None,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"timm cannot open the dataset {settings.dataset!r}, split {split!r}: {error or 'unknown'}."
        ) from error
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{settings.dataset} is a stream, and the launcher needs images by number: use folders.")
    return Checked(dataset)


def _class_names(dataset: Any) -> dict[str, int]:
    return dict(getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {})


def count_classes(dataset: Any) -> int | None:
    """Number of classes; None if the dataset does not say it."""
    return len(_class_names(dataset)) or None


def image_config(
    arguments: Mapping[str, Any], model: nn.Module, channels: int | None = None, use_test_size: bool = False
) -> dict[str, Any]:
    """timm's configuration of the images for a network, adapted to its number of channels.

    Args:
        arguments: Arguments of timm's ``resolve_data_config``.
        model: The network.
        channels: Input channels of the network; None: its ``in_chans``, or else 3.
        use_test_size: Use the network's image size for evaluation.

    Raises:
        ValueError: The network has neither one input channel nor three.
    """
    channels = channels or getattr(model, "in_chans", 3)
    if channels not in _MODES:
        raise ValueError(f"The network has {channels} input channels, and images have 1 (grey) or 3 (RGB).")
    config = resolve_data_config({**arguments, "in_chans": channels}, model=model, use_test_size=use_test_size)
    config["input_size"] = (channels, *config["input_size"][1:])
    if channels == 1:
        # timm's are for three channels.
        config |= {name: (fmean(config[name]),) for name in ("mean", "std")}
    return config


def image_mode(config: Mapping[str, Any]) -> str:
    """Pillow's mode of the images of a configuration."""
    return _MODES[config["input_size"][0]]


def training_loader(dataset: Dataset, settings: Settings, data_config: dict[str, Any], device: torch.device) -> Any:
    """Batches of augmented images ``(N, C, H, W)``, normalised, on the device, with their classes.

    Their order depends on the seed and the epoch (``loader.sampler.set_epoch``), their augmentation on the global
    random state at the start of the epoch; the processes of a distributed run share each step's images.
    """
    try:
        loader = _training_loader(dataset, settings, data_config, device)
    except (AssertionError, KeyError) as error:
        raise ValueError(f"timm refuses the augmentation, aa={settings.aa!r}: {error or 'unknown'}.") from error
    loader.sampler.seed = settings.seed
    if settings.lighting and not settings.no_aug:
        # After the crop, which comes first.
        dataset.transform.transforms.insert(1, Lighting(settings.lighting))
    return loader


def _training_loader(dataset: Dataset, settings: Settings, data_config: dict[str, Any], device: torch.device) -> Any:
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=settings.batch_size,
        is_training=True,
        no_aug=settings.no_aug,
        re_prob=settings.reprob,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
        auto_augment=settings.aa or None,
        interpolation=data_config["interpolation"] if settings.no_aug else settings.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=settings.workers,
        distributed=True,
        pin_memory=settings.pin_mem,
        device=device,
        # Persistent workers would keep a random state that a resumed run could not restore.
        persistent_workers=False,
    )


def evaluation_loader(dataset: Dataset, settings: Settings, data_config: dict[str, Any], device: torch.device) -> Any:
    """Batches of centre crops; each process has a part, and the last image may be repeated to make parts equal."""
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=settings.validation_batch_size or settings.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=settings.workers,
        distributed=True,
        pin_memory=settings.pin_mem,
        device=device,
        persistent_workers=False,
    )
