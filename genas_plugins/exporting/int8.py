"""Static quantisation to int8 with onnxruntime, and how far its outputs are from those of the network.

Weights are int8 with a scale for each output channel, which depthwise convolutions need; activations are uint8, between
the least and the largest value on the calibration images. Of what onnxruntime offers this is the fastest on x86 with
VNNI. On older x86 processors its sums may saturate, which a comparison on another machine does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genas_plugins._optional import require
from genas_plugins.exporting.session import INPUT, OnnxSession

__all__ = ["LARGEST_ERROR", "Fidelity", "measure_fidelity", "quantize"]

LARGEST_ERROR = 0.25
"""Largest error of an int8 network that is kept: norm of the difference of an output over the norm of the output."""

_BATCH = 16
# Batch normalisation that no convolution takes up follows a concatenation, and has one scale for all of its weights.
_LEFT_OUT = ("BatchNormalization",)


@dataclass(frozen=True)
class Fidelity:
    """How far the outputs of an int8 network are from those of the float32 network, on the calibration images.

    Attributes:
        images: Number of images.
        error: Of the worst output, the norm of the difference over the norm of the output.
        agreement: Share of the images with the same highest logit; None where the outputs are features.
    """

    images: int
    error: float
    agreement: float | None


def quantize(source: Path, target: Path, images: Tensor) -> Path:
    """Write an ONNX file in int8.

    Args:
        source: The file in float32.
        target: File to write.
        images: Images ``(N, C, H, W)`` whose activations give the ranges.
    """
    tools = require("onnxruntime.quantization", extra="export", purpose="quantising to int8")
    shapes = require("onnxruntime.quantization.shape_inference", extra="export", purpose="quantising to int8")
    registry = require("onnxruntime.quantization.registry", extra="export", purpose="quantising to int8")
    prepared = target.with_name("prepared.onnx")
    # It merges batch normalisation into convolutions, whose ranges would otherwise be measured before it.
    shapes.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    batch = OnnxSession(prepared).batch or _BATCH

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(batch))

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self._batches, None)
            return None if found is None else {INPUT: found.numpy()}

    tools.quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=sorted(set(registry.QDQRegistry) - set(_LEFT_OUT)),
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        calibrate_method=tools.CalibrationMethod.MinMax,
    )
    return target


def measure_fidelity(session: OnnxSession, network: Callable[[Tensor], list[Tensor]], images: Tensor) -> Fidelity:
    """Compare an int8 network with the float32 network on images ``(N, C, H, W)``."""
    differences, sums = np.zeros(len(session.outputs)), np.zeros(len(session.outputs))
    same = 0
    logits = False
    for batch in images.split(_BATCH):
        for index, (ours, theirs) in enumerate(zip(network(batch), session(batch), strict=True)):
            differences[index] += float((ours - theirs).double().square().sum())
            sums[index] += float(ours.double().square().sum())
            logits = ours.dim() == 2
            same += int((ours.argmax(1) == theirs.argmax(1)).sum()) if logits else 0
    errors = np.sqrt(differences / np.maximum(sums, torch.finfo(torch.float64).tiny))
    return Fidelity(len(images), float(errors.max()), same / len(images) if logits else None)
