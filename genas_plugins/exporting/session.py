"""An ONNX file run by onnxruntime on the CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from genas_plugins._optional import require

__all__ = ["INPUT", "OnnxSession", "quiet"]

INPUT = "images"
"""Name of the input of every file that we write."""


class OnnxSession:
    """A network of a file.

    Args:
        path: The file.
        threads: Threads of an operation; None: as many as PyTorch has.

    Attributes:
        outputs: Names of its outputs.
        batch: Images that it takes at a time; None: any number.
        version: onnxruntime's.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        runtime = require("onnxruntime", extra="export", purpose="running ONNX files")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.version: str = runtime.__version__
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        batch = self._session.get_inputs()[0].shape[0]
        self.batch: int | None = batch if isinstance(batch, int) else None

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs for images ``(N, C, H, W)``, in the order of their names."""
        size = self.batch or len(images)
        parts = [self._session.run(None, {INPUT: part.numpy()}) for part in images.contiguous().split(size)]
        return [torch.cat([torch.from_numpy(each) for each in output]) for output in zip(*parts, strict=True)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.onnx and onnxruntime from writing to the log of a program, and from setting one up."""
    root, silent = logging.getLogger(), logging.NullHandler()
    # onnxruntime logs to the root, which Python sets up to write to standard error where it has no handler.
    root.addHandler(silent)
    disabled = root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)
