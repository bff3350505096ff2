"""Accuracy of GeNAS and other timm models on ImageNet, its shifted test sets, or any folder with one folder a class."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from timm.data import create_loader
from timm.task import ClassificationEvaluator
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torchvision.transforms import PILToTensor, Resize

from genas_plugins._messages import message_of
from genas_plugins._reading import expand_home
from genas_plugins.datasets._images import check_headers
from genas_plugins.files import atomic_path
from genas_plugins.scoring.accuracy import Accuracy
from genas_plugins.scoring.batchnorm import evaluation_mode
from genas_plugins.training import workers
from timm_models import shifted
from timm_models.data import image_config, image_mode
from timm_models.weights import read_weights

__all__ = ["Evaluation", "evaluate", "load_model", "main"]

_EPILOG = """examples:
  python -m timm_models.validate imagenet/val --model genas_flatness_c100 --checkpoint c100.pt --device cuda --amp
  python -m timm_models.validate imagenet-o --kind o --in-distribution imagenet/val --model resnet50 --pretrained
  python -m timm_models.validate imagenet-c --kind c --model genas_flatness_c100 --checkpoint c100.pt --results c.json
  python -m timm_models.validate flowers/val --model genas_cell --model-kwargs genotype=best.json --checkpoint best.pt
"""


@dataclass(frozen=True, eq=False)
class Evaluation(Accuracy):
    """Top-1 and top-5 as fractions, the number of images, and the highest softmax probability of each, on the CPU."""

    images: int
    confidences: Tensor


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Top-1 and top-5 accuracy in evaluation mode; the model's mode is restored.

    Args:
        model: Network on the device; maps images ``(N, C, H, W)`` to logits ``(N, num_classes)``.
        loader: Batches of images and targets ``(N,)``.
        indices: Outputs to compare; targets are positions in this list. None: all.
        device: Device to move images and targets to.
        amp_dtype: Type of automatic mixed precision. None: without.

    Raises:
        ValueError: There is no image; or the logits are not ``(N, num_classes)``, or not finite.
    """
    device = torch.device(device)
    evaluator, confidences = ClassificationEvaluator(device), []
    with evaluation_mode(model):
        for images, targets in loader:
            targets = targets.to(device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images.to(device))
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ValueError("The model must return logits (N, num_classes), and returned something else.")
            logits = logits.float() if indices is None else logits[:, list(indices)].float()
            if not logits.isfinite().all():
                raise ValueError("The logits are not finite: the weights are damaged, or float16 is too narrow.")
            evaluator.update(logits, targets)
            confidences.append(logits.softmax(1).amax(1).cpu())
    if not confidences:
        raise ValueError("There are no images to evaluate.")
    count, top1, top5 = evaluator.counts.tolist()
    return Evaluation(top1 / count, top5 / count, count, torch.cat(confidences))


def load_model(
    name: str, checkpoint: str | Path | None, num_classes: int | None, model_kwargs: Mapping[str, Any]
) -> nn.Module:
    """Build a timm model all of whose parameters are loaded.

    Args:
        name: Name of the timm model; ``genas_cell`` needs ``genotype`` in ``model_kwargs``.
        checkpoint: The weights; averaged ones (``state_dict_ema``) if there are. None: those that timm publishes.
        num_classes: Outputs. None: the model's own.
        model_kwargs: Further arguments of the model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, or leaves parameters without a finite value; or the published weights are for
            another number of classes.
        RuntimeError: The model has other tensors; or there are no published weights.
    """
    state = None if checkpoint is None else read_weights(checkpoint)
    model = timm.create_model(name, pretrained=state is None, num_classes=num_classes, **model_kwargs)
    if state is None:
        published = model.pretrained_cfg.get("num_classes")
        if published != model.num_classes:
            raise ValueError(f"The published weights of {name} are for {published} classes, not {model.num_classes}.")
        return model
    # A GenasNet keeps its fresh classifier if the file's does not fit: parameters that stay NaN were not loaded.
    for parameter in model.parameters():
        parameter.detach().fill_(float("nan"))
    model.load_state_dict(state)
    if unfilled := [key for key, value in model.named_parameters() if not value.isfinite().all()]:
        raise ValueError(
            f"{checkpoint} has no finite values for {len(unfilled)} parameters ({', '.join(unfilled[:3])}) of {name} "
            f"with {model.num_classes} classes: is it for another number of classes, or did its training diverge?"
        )
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0, 1 with a line on standard error if something is wrong, 130 after Ctrl-C."""
    parser = _parser()
    try:
        options = expand_home(parser.parse_args(arguments))
    except ValueError:  # of timm's ParseKwargs
        parser.error("--model-kwargs takes arguments KEY=VALUE")
    workers.preload("timm_models.validate")
    try:
        record = _validate(options)
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        if options.debug:
            raise
        print(f"timm_models.validate: {message_of(error)}", file=sys.stderr)
        return 1
    for key, value in record.items():
        print(f"{key:<{max(map(len, record))}}  {f'{value:.2f}' if isinstance(value, float) else value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m timm_models.validate", None, __doc__, _EPILOG, formatter_class=raw)
    add = parser.add_argument
    add("folder", metavar="DIR", help="the images, DIR/CLASS/IMAGE; of ImageNet-C DIR/CORRUPTION/SEVERITY/CLASS/IMAGE")
    add("--kind", choices=shifted.KINDS, default="imagenet", help="ImageNet or another set, V2, A, R, O, C (imagenet)")
    add("--in-distribution", metavar="DIR", help="with --kind o: ImageNet's validation images")
    add("--model", required=True, metavar="NAME", help="timm's name, such as genas_flatness_c100 or genas_cell")
    add("--model-kwargs", nargs="+", action=ParseKwargs, default={}, metavar="KEY=VALUE", help="the model's arguments")
    add("--checkpoint", metavar="FILE", help="the weights; averaged ones if it has them")
    add("--pretrained", action="store_true", help="instead of a checkpoint: the weights that timm publishes")
    add("--num-classes", type=int, metavar="N", help="the network's outputs, if the set is not ImageNet (one a folder)")
    add("--input-size", type=int, metavar="N", help="height and width of the network's input (the model's own)")
    add("--crop-pct", type=float, metavar="F", help="input size / resized shorter side (the model's own; 1 for c)")
    add("--no-antialias", action="store_true", help="resize as OpenCV, and with it the official GeNAS code, does")
    add("--batch-size", type=int, default=128, metavar="N", help="images at a time (%(default)s)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="with --amp (%(default)s)")
    add("--channels-last", action="store_true", help="a memory format that is faster on many devices")
    add("--results", metavar="FILE", help="write what is printed to FILE.csv or FILE.json; replaces it")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise if options are wrong, before anything is loaded."""
    results = Path(options.results or "results.csv")
    if bool(options.checkpoint) == options.pretrained:
        raise ValueError("Give --checkpoint FILE or --pretrained, one of them: random weights are not scored.")
    if options.crop_pct is not None and not 0 < options.crop_pct <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, got {options.crop_pct}.")
    limits = {"input_size": (1, 2**14), "batch_size": (1, 2**20), "workers": (0, 1024), "num_classes": (2, 10**6)}
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, got {value}.")
    if results.suffix.lower() not in (".csv", ".json") or not results.parent.is_dir():
        raise ValueError(f"--results must be a .csv or .json file in an existing folder, got {results}.")


def _validate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what it prints; figures are percentages, as in timm's result files."""
    _check(options)
    sets = shifted.open_images(options.kind, options.folder, options.in_distribution, options.num_classes)
    if isinstance(sets, tuple):
        check_headers([path for images in sets for path, _ in images.samples])
    classes = sets[0].num_classes if isinstance(sets, tuple) else 1000
    # 1000 classes are not asked for, so that a model of another number is refused rather than changed.
    asked = options.num_classes or (None if classes == 1000 else classes)
    model = load_model(options.model, options.checkpoint, asked, options.model_kwargs)
    if model.num_classes != classes:
        raise ValueError(f"{options.folder} has {classes} classes, {options.model} has {model.num_classes} outputs.")
    device = torch.device(options.device)
    model.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    # Images of ImageNet-C are cropped already, and its authors evaluate all of them.
    crop = options.crop_pct or (1.0 if options.kind == "c" else None)
    size = None if options.input_size is None else (3, options.input_size, options.input_size)
    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    given = {"input_size": size, "crop_pct": crop}
    config = image_config(given, model, options.model_kwargs.get("in_chans"), use_test_size=True)

    def score(images: shifted.ImageSet) -> Evaluation:
        dataset = shifted.ImageFiles(images.samples)
        dataset.mode = image_mode(config)
        loader = create_loader(
            dataset,
            batch_size=options.batch_size,
            num_workers=options.workers,
            device=device,
            pin_memory=device.type == "cuda",
            persistent_workers=False,
            **config,
        )
        if options.no_antialias:
            # torchvision resizes Pillow images with antialiasing only.
            steps = loader.dataset.transform.transforms
            steps[:1] = [PILToTensor(), Resize(steps[0].size, steps[0].interpolation, antialias=False)]
        return evaluate(model, loader, images.indices, device, amp_dtype)

    record = {"model": options.model, "weights": options.checkpoint or "timm's", "folder": options.folder}
    record |= {"kind": options.kind} | {key: str(value) for key, value in config.items()}
    record |= _measure_corruptions(sets, score) if isinstance(sets, dict) else _measure(sets, score)
    if isinstance(sets, tuple):
        print(*(images.report for images in sets), sep="\n", file=sys.stderr)
    if options.results is not None:
        _write(record, Path(options.results))
    return record


def _write(record: Mapping[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".json":
            json.dump(record, file, indent=2)
        else:
            csv.writer(file).writerows([record.keys(), record.values()])


def _measure(sets: Sequence[shifted.ImageSet], score: Callable[[shifted.ImageSet], Evaluation]) -> dict[str, Any]:
    first, *known = [score(images) for images in sets]
    if not known:
        return {"images": first.images, "top1": 100 * first.top1, "top5": 100 * first.top5}
    aupr = shifted.anomaly_aupr(first.confidences, known[0].confidences)
    total = first.images + known[0].images
    return {"images": total, "aupr": 100 * aupr, "aupr_of_chance": 100 * first.images / total}


def _measure_corruptions(folders: Mapping[str, Any], score: Callable[..., Evaluation]) -> dict[str, Any]:
    errors = {}
    for name, severities in folders.items():
        each = [100 - 100 * score(shifted.open_imagenet(folder)).top1 for folder in severities]
        errors[name] = fmean(each)
        print(f"{name}: {', '.join(f'{error:.2f}' for error in each)} % error at severities 1 to 5", file=sys.stderr)
    counted = [errors[name] for name in shifted.CORRUPTIONS if name in errors]
    missing = [name for name in shifted.CORRUPTIONS if name not in errors]
    mean = {"unnormalised_mean_error": fmean(counted)} if counted else {}
    return {f"error_{name}": error for name, error in errors.items()} | mean | {"missing": ", ".join(missing) or "none"}


if __name__ == "__main__":
    sys.exit(main())
