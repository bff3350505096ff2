"""Reads pickles of arrays as data: nothing they refer to is run, and arrays are no larger than the file allows."""

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
    """Whether ``claimed`` bytes of arrays are implausibly many for a file of ``size`` bytes.

    The limit is four times the file and a megabyte: weights shared by several names and small expanded constants are
    legitimate.
    """
    return claimed > 4 * size + 2**20


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Replace ``_codecs.encode``, which could import any codec module."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}; NumPy arrays use 'latin1' only")
    return _codecs.encode(text, "latin1")


def _empty_array(*arguments: Any) -> np.ndarray:
    """Replace NumPy's ``_reconstruct``, which allocates any size; the pickle fills this array from its own bytes."""
    return np.empty(0, dtype=np.int8)


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    """Replace NumPy's ``scalar``, which without data allocates a value of any size."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a number's bytes are not those of its type")
    return np.frombuffer(data, dtype)[0]


def _admitted_globals() -> dict[tuple[str, str], Any]:
    admitted: dict[tuple[str, str], Any] = {
        # A placeholder argument of _reconstruct; the class itself, if called, would allocate arrays of any size.
        ("numpy", "ndarray"): "numpy.ndarray",
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode_latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        admitted[f"{core}.multiarray", "_reconstruct"] = _empty_array
        admitted[f"{core}.multiarray", "scalar"] = _scalar
        # Protocol 5, the default of Python 3.14, stores arrays this way: as a view of the file's own bytes.
        admitted[f"{core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    return admitted


def numpy_globals() -> list[Any]:
    """Globals that ``torch.load`` needs (``torch.serialization.safe_globals``) to read NumPy numbers and arrays."""
    allowed: list[Any] = [np.ndarray, np.dtype]
    for core in ("numpy.core", "numpy._core"):
        allowed += [(_empty_array, f"{core}.multiarray._reconstruct"), (_scalar, f"{core}.multiarray.scalar")]
    kinds = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.float16, np.float32, np.float64)
    return allowed + [type(np.dtype(kind)) for kind in kinds]


class _Nothing:
    """Placeholder for any other object of a pickle: accepts all arguments and items, and keeps none."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Nothing:
        return super().__new__(cls)

    def _ignore(self, *arguments: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    """Builds Python containers, strings, numbers and NumPy arrays.

    Args:
        file: The pickle. Strings of Python 2 are read as latin1.
        others: What stands for anything else that it refers to; ``None`` refuses.
    """

    _admitted = _admitted_globals()

    def __init__(self, file: Any, others: type | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._others = others

    def find_class(self, module: str, name: str) -> Any:
        found = self._admitted.get((module, name), self._others)
        if found is None:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could execute code and was not run")
        return found


class _Limited:
    """A file that raises once more than ``limit`` bytes are read."""

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
    """Read the containers and NumPy arrays of a pickle, leaving out all other objects.

    Args:
        file: The uncompressed pickle, read no further than needed.
        limit: Most bytes to read.

    Raises:
        pickle.UnpicklingError: The pickle is longer than ``limit``.
        Exception: The pickle is damaged; the type of the error depends on where.
    """
    return _Unpickler(_Limited(file, limit), _Nothing).load()


def load_arrays(data: bytes) -> Any:
    """Read a pickle of containers and NumPy arrays. Strings of Python 2 are read as latin1.

    Raises:
        pickle.UnpicklingError: It refers to another global, which the message names, or is damaged.
        Exception: The pickle is damaged; the type of the error depends on where.
    """
    for opcode, argument, _ in pickletools.genops(data):
        # The unpickler's memo is allocated up to the highest index in the pickle.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError("it numbers more results than it has bytes")
    return _Unpickler(io.BytesIO(data)).load()
