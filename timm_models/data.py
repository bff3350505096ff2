"""Images for training and validation: timm's datasets and loaders, checked, and in an order that can be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import Dataset, IterableDataset

from timm_models.settings import Settings

__all__ = ["Lighting", "count_classes", "evaluation_loader", "load_datasets", "training_loader"]

_FOLDERS = ("", "folder", "image_folder")
_SOURCES = ("torch", "hfds")


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
        """The image with one colour added to all of its pixels."""
        factors = np.random.normal(scale=self.std, size=3).astype(np.float32)
        added = self._VECTORS @ (self._VALUES * factors)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) + 255.0 * added
        return Image.fromarray(pixels.clip(0.0, 255.0).astype(np.uint8))


def load_datasets(settings: Settings) -> tuple[Dataset, Dataset]:
    """The training and the validation set.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A folder for a split is missing, or the two have different classes.
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
            name = settings.dataset or "folder"
            raise ValueError(
                f"timm cannot open the dataset {name!r}, split {split!r}: {error or 'unknown'}."
            ) from error
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{settings.dataset} is a stream, and the launcher needs images by number: use folders.")
        # timm takes the whole folder where it finds none for the split, and would validate on what it trained on.
        if folders and Path(dataset.reader.root).resolve() == Path(settings.data_dir).resolve():
            raise ValueError(
                f"{settings.data_dir} has no folder {split!r}; it has: "
                f"{', '.join(sorted(entry.name for entry in Path(settings.data_dir).iterdir())[:10])}."
            )
        sets.append(dataset)
    first, second = (_class_names(dataset) for dataset in sets)
    if first != second:
        only = sorted(set(first) ^ set(second))
        raise ValueError(
            f"The classes of {settings.train_split} ({len(first)}) and {settings.val_split} ({len(second)}) differ "
            f"({', '.join(only[:5])}{', ...' if len(only) > 5 else ''}), so their numbers would too."
        )
    return sets[0], sets[1]


def _class_names(dataset: Any) -> dict[str, int]:
    return dict(getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {})


def count_classes(dataset: Any) -> int | None:
    """Number of classes, where the dataset says it."""
    return len(_class_names(dataset)) or None


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
        # Workers that live on keep a random state that a resumed run could not have.
        persistent_workers=False,
    )


def evaluation_loader(dataset: Dataset, settings: Settings, data_config: dict[str, Any], device: torch.device) -> Any:
    """Batches of centre crops; each process has its part, the last image may be repeated to make parts equal."""
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
