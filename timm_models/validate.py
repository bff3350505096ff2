"""Accuracy of GeNAS and other timm models on ImageNet, its shifted test sets and other folders of images.

``python -m timm_models.validate --help`` describes the command.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.task import ClassificationEvaluator
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torchvision import transforms

from genas_plugins._optional import require
from genas_plugins.files import write_text
from genas_plugins.scoring.accuracy import Accuracy
from genas_plugins.scoring.batchnorm import evaluation_mode
from timm_models import shifted

__all__ = ["Evaluation", "evaluate", "load_model", "main"]

_EPILOG = """examples:
  python -m timm_models.validate imagenet/val --model genas_flatness_c100 --checkpoint flatness_c100.pth.tar
  python -m timm_models.validate imagenetv2-matched-frequency-format-val --kind v2 --model resnet50 --pretrained
  python -m timm_models.validate imagenet-o --kind o --in-distribution imagenet/val --model genas_flatness_c100 \\
      --checkpoint flatness_c100.pth.tar --device cuda --amp --channels-last
  python -m timm_models.validate imagenet-c --kind c --model genas_flatness_c100 --checkpoint best.pth.tar \\
      --results corruptions.json
  python -m timm_models.validate flowers/test --model genas_cell --checkpoint flowers.pth.tar \\
      --model-kwargs genotype=best.json init_channels=40
"""


@dataclass(frozen=True)
class Evaluation(Accuracy):
    """Fractions of images, from 0 to 1.

    Attributes:
        images: How many images there were.
        confidences: The highest softmax probability of each, ``(images,)``, on the CPU.
    """

    images: int
    confidences: Tensor = field(compare=False, repr=False)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Evaluation:
    """Top-1 and top-5 accuracy in evaluation mode; the model's mode is restored.

    Args:
        model: On the device; maps images ``(N, C, H, W)`` to logits ``(N, num_classes)``.
        loader: Images and targets ``(N,)``.
        indices: The outputs that compete, of which a target is the position. None: all.
        device: Where images and targets are put.
        amp_dtype: The type of automatic mixed precision. None: without.
        channels_last: Put images in this memory format.

    Raises:
        ValueError: There is no image; the logits are not ``(N, num_classes)``, or not finite, or too few.
    """
    device = torch.device(device)
    evaluator, confidences = ClassificationEvaluator(device), []
    with evaluation_mode(model):
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ValueError("The model must return logits (N, num_classes), and returned something else.")
            last = int(targets.max()) if indices is None else max(indices)
            if last >= logits.shape[1]:
                raise ValueError(f"The model has {logits.shape[1]} outputs, and class {last} needs {last + 1}.")
            logits = logits.float() if indices is None else logits[:, list(indices)].float()
            if not logits.isfinite().all():
                raise ValueError("The logits are not finite: the weights are damaged, or float16 is too narrow.")
            evaluator.update(logits, targets)
            confidences.append(logits.softmax(1).amax(1).cpu())
    if not confidences:
        raise ValueError("There are no images to evaluate.")
    images, top1, top5 = evaluator.counts.tolist()
    return Evaluation(top1 / images, top5 / images, images, torch.cat(confidences))


def load_model(
    name: str,
    checkpoint: str | Path | None,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model of which no parameter is random.

    Args:
        name: timm's name; ``genas_cell`` needs ``genotype`` in ``model_kwargs``.
        checkpoint: The weights, averaged ones (``state_dict_ema``) if there are. None: those that timm publishes.
        num_classes: Outputs. None: the model's own.
        model_kwargs: Further arguments of the model.

    Raises:
        ValueError: The checkpoint does not fit, or leaves parameters without a finite value; or the published weights
            are for another number of classes.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"There is no checkpoint file {checkpoint}.")
    model = timm.create_model(name, pretrained=checkpoint is None, num_classes=num_classes, **(model_kwargs or {}))
    if checkpoint is None:
        published = model.pretrained_cfg.get("num_classes")
        if published != model.num_classes:
            raise ValueError(f"The published weights of {name} are for {published} classes, not {model.num_classes}.")
        return model
    # Some models keep a fresh classifier where the file's does not fit. What stays NaN was not loaded.
    for parameter in model.parameters():
        parameter.detach().fill_(float("nan"))
    try:
        load_checkpoint(model, str(checkpoint))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        reason = str(error)
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = "it holds more than tensors, which could execute code; save the state_dict alone."
        raise ValueError(f"{checkpoint} cannot be loaded into {name}: {reason}") from error
    if empty := [key for key, value in model.named_parameters() if not value.isfinite().all()]:
        raise ValueError(
            f"{checkpoint} gives no finite values to {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''} of {name} "
            f"with {model.num_classes} classes: is it for another number of classes, or of a training that diverged?"
        )
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; None: the process's own.

    Returns:
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        record = _validate(options)
        if options.results is not None:
            _write(options.results, record)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        if options.debug:
            raise
        message = str(error).strip() or type(error).__name__
        if message.startswith("Caught "):  # in a process of the loader, which sends its traceback along
            message = message.splitlines()[-1].partition(": ")[2]
        print(f"timm_models.validate: {' '.join(message.split())}", file=sys.stderr)
        return 1
    print("\n".join(_table(record)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m timm_models.validate",
        description="Accuracy of a timm model on ImageNet, a shifted test set, or any folder with one folder a class.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="the images: DIR/<class>/<image>, for ImageNet-C DIR/<corruption>/<severity>/...")
    add("--kind", choices=shifted.KINDS, default="imagenet", help="imagenet also for other datasets (default)")
    add("--in-distribution", metavar="DIR", help="with --kind o: ImageNet's validation images")
    add("--class-map", metavar="FILE", help="for another dataset: its folders, one a line, in the order of the outputs")
    add("--model", required=True, metavar="NAME", help="timm's name, such as genas_flatness_c100 or genas_cell")
    add("--model-kwargs", nargs="+", action=_KeyValues, default={}, metavar="KEY=VALUE", help="the model's arguments")
    add("--checkpoint", metavar="FILE", help="the weights; averaged ones count where the file has both")
    add("--pretrained", action="store_true", help="instead of a checkpoint: the weights that timm publishes")
    add("--num-classes", type=int, metavar="N", help="outputs (the model's for ImageNet, else one a folder)")
    add("--input-size", type=int, metavar="N", help="height and width of the network's input (the model's own)")
    add("--crop-pct", type=float, metavar="F", help="input size / resized shorter side (the model's own; 1 for c)")
    add("--interpolation", choices=("bilinear", "bicubic"), help="of resizing (the model's own)")
    add("--no-antialias", action="store_true", help="resize as OpenCV and the official GeNAS evaluation do")
    add("--mean", type=float, nargs=3, metavar="F", help="of red, green, blue from 0 to 1 (the model's own)")
    add("--std", type=float, nargs=3, metavar="F", help="likewise")
    add("--batch-size", type=int, default=128, metavar="N", help="images at a time (128)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images (4)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="its type (%(default)s)")
    add("--channels-last", action="store_true", help="memory format that is faster on many devices")
    add("--results", metavar="FILE", help="write the results as .csv or .json too, in per cent; replaces the file")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser
