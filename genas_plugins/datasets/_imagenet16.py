"""ImageNet16-120, the 16x16 ImageNet subset of NAS-Bench-201 (Dong & Yang, ICLR 2020, section 2.2).

The published files are pickles, which can run any code when they are read; here they are read by an unpickler
that knows nothing but NumPy arrays.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genas_plugins._messages import one_line
from genas_plugins._pickles import load_arrays
from genas_plugins.datasets._tensors import ImageTensors

__all__ = ["NUM_CLASSES", "load_array_pickle", "load_imagenet16"]

NUM_CLASSES = 120
_TRAIN_FILES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
_TEST_FILES = ("val_data",)
_SIZE = 16


def load_array_pickle(path: str | Path) -> Any:
    """Read a pickle of containers and NumPy arrays without running anything that it names.

    Strings of Python 2 are read as latin1, as the files were published.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not such a pickle; a refused global is named.
    """
    data = Path(path).read_bytes()
    try:
        return load_arrays(data)
    # A damaged pickle fails in any of these ways, depending on where the damage is.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ValueError(f"{path} was refused as a data file: {one_line(error, 300)}. Download it anew.") from error


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 3, 16, 16) and labels 0..119 of one file, other classes dropped."""
    batch = load_array_pickle(path)
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise ValueError(f"{path} must hold a dict with 'data' and 'labels', as published; download it anew.")
    data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    pixels = 3 * _SIZE * _SIZE
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != pixels:
        raise ValueError(f"'data' in {path} must be uint8 of shape (n, {pixels}), but is {data.dtype} of {data.shape}.")
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or (labels < 1).any():
        raise ValueError(
            f"'labels' in {path} must be {len(data)} whole numbers counting from 1, but are {labels.dtype} "
            f"of shape {labels.shape}" + (f" from {labels.min()}." if labels.size else ".")
        )
    keep = labels <= NUM_CLASSES
    return data[keep].reshape(-1, 3, _SIZE, _SIZE), labels[keep].astype(np.int64) - 1


def _read_part(root: Path, names: tuple[str, ...]) -> ImageTensors:
    images, labels = zip(*(_read_batch(root / name) for name in names), strict=True)
    # The files carry no names; the published numbers count from 1.
    class_names = tuple(str(number) for number in range(1, NUM_CLASSES + 1))
    return ImageTensors(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)), class_names)


def load_imagenet16(root: str | Path) -> tuple[ImageTensors, ImageTensors]:
    """Read the training and the test images from the published files in ``root``.

    Raises:
        FileNotFoundError: A file is missing; the folder and the file are named.
        ValueError: A file is not what was published.
    """
    root = Path(root)
    missing = [name for name in _TRAIN_FILES + _TEST_FILES if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"ImageNet16-120 was looked for in {root}, which lacks {', '.join(missing)}: set data.root to "
            "the folder with train_data_batch_1 to train_data_batch_10 and val_data of ImageNet16."
        )
    return _read_part(root, _TRAIN_FILES), _read_part(root, _TEST_FILES)
