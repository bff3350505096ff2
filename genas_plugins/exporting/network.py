"""Exports a network to ONNX with torch.onnx, and compares what onnxruntime computes with what PyTorch computes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genas_plugins._messages import one_line, shown
from genas_plugins._optional import require
from genas_plugins._reading import user_path
from genas_plugins.exporting.int8 import LARGEST_ERROR, Fidelity, measure_fidelity, quantize
from genas_plugins.exporting.session import INPUT, OnnxSession, quiet
from genas_plugins.files import atomic_path
from genas_plugins.scoring.batchnorm import evaluation_mode

__all__ = ["TOLERANCE", "ExportError", "Exported", "check_target", "export_onnx"]

TOLERANCE = 1e-3
"""Largest difference between an output of onnxruntime and PyTorch's, as a share of the largest value of that output.

Ours differ by some 1e-7; deep networks of others, where normalisation divides by little, by some 1e-4.
"""

OPSET = 18
"""Version of ONNX's operators: that in which torch.onnx writes, and old enough for most runtimes."""

_LEAST_FREE_SIZE = 33
"""Free heights and widths begin where a feature map of stride 32 has more than one pixel, which torch treats apart."""
_MOST_FREE_SIZE = 2**14
_FIXED = (
    "Where layers depend on height and width torch leaves them free in multiples of 32 only, or not at all: leave "
    "--dynamic-size (dynamic_size) out, and export each size that you need."
)


class ExportError(RuntimeError):
    """A network cannot be exported, or the file would not compute what it computes."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        size: Its bytes.
        outputs: Names of its outputs.
        difference: Of the float32 network: largest difference of an output from PyTorch's on random images, as a share
            of the output's largest value.
        fidelity: Of the int8 network, on the calibration images; None: the file is float32.
    """

    path: Path
    size: int
    outputs: tuple[str, ...]
    difference: float
    fidelity: Fidelity | None = None


def check_target(path: str | Path) -> Path:
    """Check the name of a file to write, and that what writes it is installed.

    Raises:
        ValueError: It does not end in ``.onnx``.
        FileExistsError: There is such a file.
        FileNotFoundError: Its folder does not exist.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    path = user_path(path)
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"Networks are exported as .onnx, got the file name {shown(path.name)}.")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: name another file, or remove it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist: create it first.")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, extra="export", purpose="exporting to ONNX")
    return path


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    output_names: Sequence[str] | None = None,
    calibration: Iterable[Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a network in evaluation mode as one ONNX file with the input ``images``, ``(N, channels, H, W)``.

    The float32 network is run by onnxruntime on random images, of other sizes and in other batches where these are
    free, and must give each output within :data:`TOLERANCE` of PyTorch's. The int8 network is run on the calibration
    images, where its error must be at most :data:`~genas_plugins.exporting.int8.LARGEST_ERROR`. Only then the file
    appears. The network's mode is restored.

    Args:
        model: Maps images to a tensor, or to several; float32, on the CPU. A supernet has no network of its own: pass
            ``supernet.subnet(genotype)``.
        path: File to write; ends in ``.onnx``, must not exist.
        image_size: Height and width of the images in pixels, or both as one number.
        channels: Channels of the images.
        dynamic_batch: Leave the number of images N free; otherwise it is 1.
        dynamic_size: Leave H and W free, from 33 pixels on.
        output_names: Names of the outputs. None: ``logits``, or ``features_0`` and so on where there are several.
        calibration: Batches of real images, prepared as for the network: write it in int8, quantised statically by
            their activations. They are all kept in memory. None: write float32.
        metadata: What to store in the file beside the network.

    Raises:
        ValueError: The suffix, the size or the calibration images are wrong, or the network is not float32 on the CPU.
        TypeError: The network is a supernet, or returns something else than tensors.
        FileExistsError: There is such a file.
        ExportError: torch cannot export the network, or the file computes something else.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        OSError: The file cannot be written.

    Example:
        >>> from genas_plugins import ZOO, CellNetwork
        >>> from genas_plugins.exporting import export_onnx
        >>> network = CellNetwork(ZOO["darts_v2_c10"].genotype, init_channels=2, num_cells=3, num_classes=10)
        >>> export_onnx(network, "network.onnx", 64).outputs
        ('logits',)
    """
    path = check_target(path)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    _check_model(model, size, dynamic_size)
    shapes = _shapes(channels, size, dynamic_batch, dynamic_size)
    # Before anything takes long: an image may be one that cannot be read.
    images = None if calibration is None else _calibration(calibration, (channels, *size))
    with evaluation_mode(model), torch.no_grad(), tempfile.TemporaryDirectory() as scratch, quiet():
        names = _names(output_names, len(_outputs(model, _random(shapes[0]))))
        # The second has two images where their number is free: torch takes one for a constant.
        program = _program(model, _random(shapes[1]), names, dynamic_batch, dynamic_size)
        written = Path(scratch) / "float.onnx"
        program.save(str(written), external_data=False)
        expected = [(each, _expected(model, each)) for each in map(_random, shapes)]
        difference = _compare(OnnxSession(written), expected)
        fidelity = None
        if images is not None:
            quantized = quantize(written, Path(scratch) / "int8.onnx", images)
            fidelity = measure_fidelity(OnnxSession(quantized), lambda batch: _outputs(model, batch), images)
            if not fidelity.error <= LARGEST_ERROR:
                raise ExportError(
                    f"In int8 the outputs are {fidelity.error:.0%} away from PyTorch's on {len(images)} calibration "
                    f"images, at most {LARGEST_ERROR:.0%} are kept: are they images like those of the training?"
                )
            written = quantized
        with atomic_path(path) as temporary:
            _store(written, temporary, metadata or {})
    return Exported(path, path.stat().st_size, names, difference, fidelity)


def _check_model(model: nn.Module, size: tuple[int, ...], dynamic_size: bool) -> None:
    if hasattr(model, "subnet") and hasattr(model, "search_space"):
        raise TypeError(f"A {type(model).__name__} has no network of its own: pass model.subnet(candidate).")
    wrong = {f"{value.dtype}, {value.device}" for value in model.parameters() if value.device.type != "cpu"}
    wrong |= {f"{value.dtype}" for value in model.parameters() if value.dtype != torch.float32}
    if wrong:
        raise ValueError(f"The network has parameters of {shown(sorted(wrong))}: pass model.float().cpu().")
    least = _LEAST_FREE_SIZE if dynamic_size else 1
    if len(size) != 2 or not all(type(each) is int and least <= each <= _MOST_FREE_SIZE for each in size):
        raise ValueError(
            f"An image's height and width must be {least} to {_MOST_FREE_SIZE:,} pixels, got {shown(size)}."
        )


def _shapes(
    channels: int, size: tuple[int, ...], dynamic_batch: bool, dynamic_size: bool
) -> list[tuple[int, int, int, int]]:
    """Shapes to compare on: where something is free, not only the one that is exported."""
    height, width = size
    # Also sizes that are no multiples of 32, where strided layers round.
    others = [(height, width), (height, width), (height + 32, width + 64), (height + 7, width + 19)]
    return [
        (batch, channels, *(other if dynamic_size else size))
        for batch, other in zip((1, 2, 3, 2) if dynamic_batch else (1, 1, 1, 1), others, strict=True)
    ][: 4 if dynamic_batch or dynamic_size else 2]


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    found = model(images)
    outputs = [found] if isinstance(found, Tensor) else list(found) if isinstance(found, list | tuple) else []
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        raise TypeError(
            f"{type(model).__name__} returns {type(found).__name__}, expected a tensor or several, as classifiers and "
            "backbones return them. A detector or segmentor is exported by its host."
        )
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ValueError(f"{type(model).__name__} returns values that are not finite: its weights are damaged.")
    return outputs


def _expected(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What PyTorch computes, of images of a size or number that is to be free."""
    try:
        return _outputs(model, images)
    except (RuntimeError, AssertionError) as error:
        raise ExportError(
            f"{type(model).__name__} does not take images {tuple(images.shape)} ({one_line(error, 200)}). {_FIXED}"
        ) from error


def _names(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(given or (["logits"] if count == 1 else [f"features_{index}" for index in range(count)]))
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"The network has {count} outputs, which {shown(names)} do not name.")
    return names


def _program(model: nn.Module, images: Tensor, names: tuple[str, ...], dynamic_batch: bool, dynamic_size: bool) -> Any:
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=2**16)} if dynamic_batch else {}
    if dynamic_size:
        limits = {"min": _LEAST_FREE_SIZE, "max": _MOST_FREE_SIZE}
        free |= {2: torch.export.Dim("height", **limits), 3: torch.export.Dim("width", **limits)}
    try:
        return torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(names),
            dynamic_shapes=(free,) if free else None,
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        what = f"torch {torch.__version__} cannot export {type(model).__name__}"
        reason = one_line(error.__cause__ or error, 300)
        if dynamic_size:
            raise ExportError(f"{what} with free height and width ({reason}). {_FIXED}") from error
        raise ExportError(f"{what}: {reason}") from error


def _compare(session: OnnxSession, expected: Sequence[tuple[Tensor, list[Tensor]]]) -> float:
    """The largest difference of an output as a share of its largest value; raises beyond the tolerance."""
    largest = 0.0
    for images, outputs in expected:
        for name, ours, theirs in zip(session.outputs, outputs, session(images), strict=True):
            scale = max(float(ours.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((ours - theirs).abs().max()) / scale if ours.shape == theirs.shape else float("inf")
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"onnxruntime {session.version} computes something else than PyTorch {torch.__version__}: {name} "
                    f"of images {tuple(images.shape)} differs by {difference:.2g} of its largest value, allowed are "
                    f"{TOLERANCE:g}. The file is not kept."
                )
            largest = max(largest, difference)
    return largest


def _calibration(batches: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    kept = list(batches)
    for batch in kept:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or batch.shape[1:] != shape:
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"Calibration needs batches of images (N, {', '.join(map(str, shape))}), got {found}.")
    if not sum(map(len, kept)):
        raise ValueError("Calibration needs images, and there are none.")
    return torch.cat(kept).float()


def _store(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    onnx = require("onnx", extra="export", purpose="exporting to ONNX")
    network = onnx.load(str(source))
    # The optimiser of onnxruntime adds all that it knows, and other runtimes look for what they do not.
    used = {"", *(node.domain for node in network.graph.node)}
    kept = [each for each in network.opset_import if each.domain in used or network.functions]
    del network.opset_import[:]
    network.opset_import.extend(kept)
    onnx.helper.set_model_props(network, {name: str(value) for name, value in metadata.items()})
    onnx.checker.check_model(network)
    target.write_bytes(network.SerializeToString())
