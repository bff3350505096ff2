"""Images for the search: one half trains the supernet, the other half scores the candidates.

A search reads the same images about a thousand times, so they are held as ``uint8`` tensors that can stay on
the device; a training half of ImageNet size may stay on disk instead.
"""

from __future__ import annotations

from genas_plugins.datasets._folder import DiskImages
from genas_plugins.datasets._identity import (
    DATA_FILE,
    DataChangedError,
    check_identity,
    data_identity,
    describe_change,
    files_identity,
    read_identity,
    refuse_change,
    write_identity,
)
from genas_plugins.datasets._search import DATASETS, RECALIBRATION_IMAGES, load_search_data
from genas_plugins.datasets._tensors import ImageTensors, SearchData

__all__ = [
    "DATASETS",
    "DATA_FILE",
    "RECALIBRATION_IMAGES",
    "DataChangedError",
    "DiskImages",
    "ImageTensors",
    "SearchData",
    "check_identity",
    "data_identity",
    "describe_change",
    "files_identity",
    "load_search_data",
    "read_identity",
    "refuse_change",
    "write_identity",
]
