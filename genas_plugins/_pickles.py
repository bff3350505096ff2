"""Pickles of arrays, read as data: nothing that they name is run, and no array is larger than the file makes it."""

from __future__ import annotations

import _codecs
import io
import pickle
import pickletools
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

__all__ = ["claims_too_much", "load_arrays", "load_known", "numpy_globals"]


def claims_too_much(claimed: int, size: int) -> bool:
    """Whether arrays of ``claimed`` bytes are more than a file of ``size`` bytes can mean.

    Four times as much is admitted, and a megabyte: weights that several names share, and small constants that were
    saved expanded, are no attack.
    """
    return claimed > 4 * size + 2**20


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``, which could be made to import any codec module."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}; NumPy arrays use 'latin1' only")
    return _codecs.encode(text, "latin1")


def _empty_array(*arguments: Any) -> np.ndarray:
    """Stand in for NumPy's ``_reconstruct``, which makes arrays of any size; a pickle fills this one from its bytes."""
    return np.empty(0, dtype=np.int8)


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    """Stand in for NumPy's ``scalar``, which without data makes one of any size."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a number's bytes are not those of its type")
    return np.frombuffer(data, dtype)[0]


def _admitted_globals() -> dict[tuple[str, str], Any]:
    admitted: dict[tuple[str, str], Any] = {
        # Only a mark for _reconstruct: called, it would make arrays of any size.
        ("numpy", "ndarray"): "numpy.ndarray",
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode_latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        admitted[f"{core}.multiarray", "_reconstruct"] = _empty_array
        admitted[f"{core}.multiarray", "scalar"] = _scalar
        # How protocol 5, the default of Python 3.14, stores an array; a view of the file's own bytes.
        admitted[f"{core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    return admitted


def numpy_globals() -> list[Any]:
    """What ``torch.load`` is to admit (``torch.serialization.safe_globals``) to read NumPy's numbers and arrays."""
    allowed: list[Any] = [np.ndarray, np.dtype]
    for core in ("numpy.core", "numpy._core"):
        allowed += [(_empty_array, f"{core}.multiarray._reconstruct"), (_scalar, f"{core}.multiarray.scalar")]
    kinds = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.float16, np.float32, np.float64)
    return allowed + [type(np.dtype(kind)) for kind in kinds]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds Python containers, strings, numbers and NumPy arrays; refuses any other global."""

    _admitted = _admitted_globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which could execute code and was not run"
            ) from None


class _Nothing:
    """Stands for whatever else a pickle makes: takes all that it is given, and keeps none of it."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Nothing:
        return super().__new__(cls)

    def _ignore(self, *arguments: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _KnownUnpickler(_ArrayUnpickler):
    """Leaves out what :class:`_ArrayUnpickler` would refuse."""

    def find_class(self, module: str, name: str) -> Any:
        return self._admitted.get((module, name), _Nothing)


class _Limited:
    """The beginning of a file, beyond which there is an error."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, count: int) -> bytes:
        return self._counted(self._file.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise pickle.UnpicklingError("it unpacks to far more than it is")
        return data


def load_known(file: BinaryIO, limit: int) -> Any:
    """Read a pickle of containers and NumPy arrays in which other objects may be, which are left out.

    Args:
        file: Unpacked; read no further than needed.
        limit: Most bytes to read of it.

    Raises:
        pickle.UnpicklingError: It is longer.
        Exception: It is damaged: what is raised depends on where.
    """
    return _KnownUnpickler(_Limited(file, limit), encoding="latin1").load()


def load_arrays(data: bytes) -> Any:
    """Read a pickle of containers and NumPy arrays. Strings of Python 2 are read as latin1.

    Raises:
        pickle.UnpicklingError: It refers to something else, which the message names, or is damaged.
        Exception: It is damaged: what is raised depends on where.
    """
    for opcode, argument, _ in pickletools.genops(data):
        # Its table of results is as long as the highest number in it.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError("it numbers more results than it has bytes")
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
