"""The ground truth of NAS-Bench-201: test accuracy of every architecture, from any of three sources.

Trained for 200 epochs by the benchmark's authors (Dong and Yang, ICLR 2020, arXiv 2001.00326), mean over their
seeds. On CIFAR-10 trained on its 50,000 images and tested on its 10,000; on the others tested on the half of the
validation images that the authors call the test set.
"""

from __future__ import annotations

import bz2
import csv
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from genas_plugins._messages import listed, one_line, shown
from genas_plugins._optional import require
from genas_plugins._pickles import load_known
from genas_plugins._reading import ReadingError, read_text, user_path
from genas_plugins.nasbench201 import EDGES, OPERATIONS, NasBench201Architecture

__all__ = ["DATASETS", "lookup", "read_truth"]

DATASETS: tuple[str, ...] = ("cifar10", "cifar100", "imagenet16_120")

_EPOCHS = 200
_NNI_DATASETS = dict(zip(DATASETS, ("cifar10", "cifar100", "imagenet16-120"), strict=True))
_NATS_DATASETS = dict(zip(DATASETS, ("cifar10", "cifar100", "ImageNet16-120"), strict=True))
# NNI writes conv_3x3 where the benchmark writes nor_conv_3x3.
_NNI_OPERATIONS = {operation.removeprefix("nor_"): operation for operation in OPERATIONS}

_CSV_LIMIT = 2**29
"""Most bytes of a CSV; the benchmark's table of one accuracy has two million, one of every epoch a hundred million."""

_LEAST_UNPACKED, _MOST_PACKED = 2**26, 100
"""Bytes to which any archive may unpack, and the multiple of its size to which a larger one may."""

# Errors on damaged and foreign archives, besides those that NATS-Bench raises itself.
_DAMAGE = (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError)

# Where a row came from, the architecture, its accuracy as it was read.
_Row = tuple[str, str, Any]


def read_truth(source: str | os.PathLike[str], dataset: str = "cifar10") -> dict[str, float]:
    """Read the test accuracy of every architecture that a source holds.

    Args:
        source: ``"nni"`` for NNI's database (downloaded before with ``nni.nas.benchmark.download_benchmark``), the
            path of a NATS-Bench archive (its folder, or its ``.pickle.pbz2`` file), or that of a CSV file with a
            header, a column ``arch`` and one for the data set. NATS-Bench keeps its archive as pickles; what they name
            besides containers and NumPy arrays is left out, and nothing is run.
        dataset: One of :data:`DATASETS`.

    Returns:
        Accuracy in percent by the benchmark's architecture string, in the order of the source.

    Raises:
        ValueError: The data set is unknown; the source lacks it, holds no architecture, one twice, a malformed
            one, or an accuracy that is no number from 0 to 100. The message says where.
        OSError: The file, the archive or NNI's database cannot be read.
        ImportError: The package that reads the source is not installed.
    """
    if dataset not in DATASETS:
        raise ValueError(f"Unknown data set {dataset!r} of NAS-Bench-201; expected one of {', '.join(DATASETS)}.")
    path = user_path(source)
    if source == "nni":
        return _collect(_nni_rows(_NNI_DATASETS[dataset]), "NNI's database")
    if path.is_dir() or path.suffix.lower() == ".pbz2":
        return _collect(_nats_rows(path, _NATS_DATASETS[dataset]), str(path))
    return _collect(_csv_rows(path, dataset), str(path))


def lookup(truth: Mapping[str, float], architectures: Iterable[str]) -> list[float]:
    """The accuracies of these architectures, in their order.

    Raises:
        ValueError: Some are missing; the message counts them and names the first.
    """
    wanted = list(architectures)
    missing = [architecture for architecture in wanted if architecture not in truth]
    if missing:
        raise ValueError(
            f"The ground truth has no accuracy for {len(missing)} of {len(wanted)} architectures: "
            f"{listed(missing[:3])}{' and more' if len(missing) > 3 else ''}."
        )
    return [truth[architecture] for architecture in wanted]


def _collect(rows: Iterable[_Row], source: str) -> dict[str, float]:
    truth: dict[str, float] = {}
    for place, text, given in rows:
        try:
            architecture = str(NasBench201Architecture.from_string(text))
            accuracy = float(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {one_line(error, 300)}") from error
        # NaN is not in the range either.
        if not 0 <= accuracy <= 100:
            raise ValueError(f"{place}: the accuracy of {architecture} is {accuracy}; expected percent, from 0 to 100.")
        if architecture in truth:
            raise ValueError(f"{place}: {architecture} was there before; expected each architecture once.")
        truth[architecture] = accuracy
    if not truth:
        raise ValueError(f"{source} holds no architecture for this data set.")
    if max(truth.values()) <= 1:
        raise ValueError(f"No accuracy in {source} is above 1: they look like fractions; expected percent.")
    return truth


def _csv_rows(path: Path, dataset: str) -> Iterator[_Row]:
    try:
        text = read_text(path, limit=_CSV_LIMIT)
    except ReadingError as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(reader, [])
        columns = [_column(header, name, path) for name in ("arch", dataset)]
        for row in reader:
            if not row:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(row) != len(header):
                raise ValueError(f"{place}: {len(row)} values, but the header names {len(header)} columns.")
            architecture, accuracy = (row[column] for column in columns)
            yield place, architecture, accuracy
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}.") from error


def _column(header: Sequence[str], name: str, path: Path) -> int:
    if header.count(name) != 1:
        raise ValueError(
            f"{path} needs one column {name!r} in its first line; it has {listed(map(repr, header), 20) or 'nothing'}."
        )
    return header.index(name)


def _nni_rows(dataset: str) -> Iterator[_Row]:
    purpose = "NNI's NAS-Bench-201 database"
    require("nni", extra="nni", purpose=purpose)
    # NNI 3.0 asks for neither: without peewee its module fails with a NameError, with peewee 4 with an ImportError.
    require("peewee", extra="nasbench201", purpose=purpose)
    if not hasattr(require("playhouse.sqlite_ext", extra="nasbench201", purpose=purpose), "SqliteExtDatabase"):
        raise ImportError(f"{purpose} needs peewee 3: pip install 'genas-plugins[nasbench201]'.", name="peewee")
    benchmark = require("nni.nas.benchmark.nasbench201", extra="nni", purpose=purpose)
    try:
        trials = list(benchmark.query_nb201_trial_stats(None, _EPOCHS, dataset, reduction="mean"))
    except RuntimeError as error:
        # NNI raises this for a file that is not the published one.
        raise OSError(f"{purpose} cannot be read: {error}") from error
    for trial in trials:
        cell = trial["config"]["arch"]
        place = f"{purpose}, configuration {trial['config']['id']}"
        try:
            operations = tuple(_NNI_OPERATIONS[cell[f"{start}_{end}"]] for start, end in EDGES)
        except KeyError as error:
            raise ValueError(f"{place}: {error} is missing or unknown in the architecture {cell}.") from error
        yield place, str(NasBench201Architecture(operations)), trial["test_acc"]


def _nats_rows(path: Path, dataset: str) -> Iterator[_Row]:
    nats_bench = require("nats_bench", extra="nasbench201", purpose="a NATS-Bench archive")
    with _pickles_as_data(require("nats_bench.api_utils", extra="nasbench201", purpose="a NATS-Bench archive")):
        # A folder holds one file for each architecture, which is read on demand.
        try:
            api = nats_bench.create(str(path), "tss", fast_mode=path.is_dir(), verbose=False)
        except _DAMAGE as error:
            raise ValueError(f"{path} is no archive of NATS-Bench, or is damaged: {one_line(error, 300)}.") from error
        for index in range(len(api)):
            place = f"{path}, architecture {index}"
            try:
                found = api.get_more_info(index, dataset, iepoch=None, hp=str(_EPOCHS), is_random=False)
                accuracy = found["test-accuracy"]
            # Errors of the API for a missing file, training length, data set or test set.
            except (AssertionError, KeyError, ValueError, *_DAMAGE) as error:
                reason = shown(error)
                raise ValueError(
                    f"{place}: no test accuracy on {dataset} after {_EPOCHS} epochs ({reason})."
                ) from error
            yield place, api.arch(index), accuracy


@contextmanager
def _pickles_as_data(api_utils: ModuleType) -> Iterator[None]:
    """Let NATS-Bench read its pickles without running what they name."""
    own = api_utils.pickle
    api_utils.pickle = SimpleNamespace(load=_load_archive)
    try:
        yield
    finally:
        api_utils.pickle = own


def _load_archive(file: bz2.BZ2File) -> Any:
    return load_known(file, max(_LEAST_UNPACKED, _MOST_PACKED * os.fstat(file.fileno()).st_size))
