"""How far scoring and supernet training are from the least time that this machine's own rates allow.

For one candidate (recalibration, and the validation images at every sigma) and for one training step, the script counts
floating-point operations and the least bytes that go to and from memory, measures this machine's rates, and prints the
times that follow beside the measured ones. The floor is the roofline (Williams et al., CACM 2009) layer by layer: the
sum over the layers of the larger of operations / matrix rate and bytes / copy rate.

What a layer costs, in the network as it is defined and not as this library rewrites it:

* a convolution or linear layer: two operations a multiply-add; it reads its weights and the pixels that it uses once
  and writes its output once. Batch normalisation and ReLU are folded into it or into the layer that reads it;
* a pooling: no operations; it reads its input and writes its output;
* an addition: it is folded into what computes its second operand, and reads the first;
* in a training step, the backward pass of a convolution reads the gradient of its output, its input and its weights
  once and writes the gradients of both (the first convolution's input has none); that of a pooling reads one gradient
  and writes the other; where several layers read one state, their gradients are added as above. The optimizer reads
  weight, gradient and momentum and writes weight and momentum, of the sampled path only.

Concatenations, losses, noise, gradient clipping and the augmentation of images are free. All of it is float32.

The matrix rate is that of a large product of matrices, the copy rate that of a copy between two large tensors. Tensors
that stay in a CPU's caches between two layers can be read faster than that, and layers that are fused need not go to
memory at all: the floor is that of a program that runs layer after layer, for tensors that fall out of the caches.

Run it from a checkout that is installed::

    python benchmarks/roofline.py
    python benchmarks/roofline.py --sizes

``--sizes`` measures instead how the cost grows: seconds a candidate against the number of images and against the
initial channels, seconds a step against the batch size, each with a least-squares line. On a machine that others use
as well: ``--threads 1 --clock cpu``. Images and weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# The neighbouring script: running this one puts their folder on the path.
from scoring import (
    CLASSES,
    CLOCKS,
    RECALIBRATION_BATCH,
    RECALIBRATION_IMAGES,
    SIGMAS,
    Benchmark,
    add_options,
    print_table,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genas_plugins import Genotype, SuperNet
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.spaces import DartsSearchSpace

__all__ = ["Cost", "Costs", "Rates", "count_scoring", "count_step", "floor", "main", "measure_rates"]

STAGES = ("scoring", "training")
IMAGE_COUNTS = (5_000, 10_000, 20_000, 35_000, 50_000)
CHANNELS = (8, 16, 24, 36)
BATCH_SIZES = (32, 64, 128, 256, 512)
# A search of the paper on CIFAR-10; with --images 25000 its candidates are these.
EPOCHS, TRAIN_IMAGES, CANDIDATES = 250, 25_000, 1_000
# Of the scores of a paper-size search, so that a CPU is done within minutes.
CPU_SCALE = 0.02
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
REPEATS = 7

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """One layer, or all that happens of a kind.

    Attributes:
        kind: For instance ``"depthwise"``.
        flops: Floating-point operations.
        bytes: Read and written.
    """

    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine can do: operations and bytes a second."""

    flops: float
    bytes: float


@cache
def _used(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``size`` pixels in a row a convolution reads; a 1x1 kernel of stride 2 skips every second."""
    read = {start * stride + tap * dilation - padding for start in range(out) for tap in range(kernel)}
    return len(read & set(range(size)))


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Costs(TorchDispatchMode):
    """Collects the cost of every layer that runs while it is active, as this module's docstring defines it.

    Tensors may be on the meta device, where nothing is computed.

    Attributes:
        layers: In the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Cost] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        operation = function.overloadpacket
        if operation is aten.convolution:
            self._convolution(result, *arguments[:2], *arguments[3:6], groups=arguments[8])
        elif operation is aten.convolution_backward:
            self._convolution(*arguments[:3], *arguments[4:7], groups=arguments[9], wanted=arguments[10])
        elif operation in (aten.mm, aten.addmm):
            a, b = arguments[-2:]
            self.layers.append(Cost("linear", 2 * a.shape[0] * a.shape[1] * b.shape[1], _size(a, b, result)))
        elif operation in (aten.max_pool2d_with_indices, aten.avg_pool2d):
            out = result[0] if isinstance(result, tuple) else result
            self.layers.append(Cost("pooling", 0, _size(arguments[0], out)))
        elif operation in (aten.max_pool2d_with_indices_backward, aten.avg_pool2d_backward):
            self.layers.append(Cost("pooling", 0, _size(arguments[0], result)))
        elif operation in (aten.add, aten.add_) and result.dim() == 4:
            self.layers.append(Cost("addition", 0, _size(arguments[0])))
        return result

    def _convolution(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *,
        groups: int,
        wanted: Sequence[bool] | None = None,
    ) -> None:
        """A convolution, or its backward pass where ``wanted`` says of which inputs: then ``out`` is a gradient."""
        sides = zip(x.shape[2:], out.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        pixels = 1
        for side in sides:
            pixels *= _used(*side)
        image = x.shape[0] * x.shape[1] * pixels * x.element_size()
        moved = _size(out) + image + _size(weight)
        flops = 2 * out.numel() * weight[0].numel()
        if wanted is not None:
            # Each gradient is as large as what it is of, and needs the other input.
            moved = _size(out) + (image + _size(weight)) * (wanted[0] + wanted[1])
            flops *= wanted[0] + wanted[1]
        kind = "depthwise" if groups > 1 else "pointwise" if weight[0, 0].numel() == 1 else "convolution"
        self.layers.append(Cost(kind, flops, moved))


def _network(init_channels: int, num_cells: int) -> SuperNet:
    with torch.device("meta"):
        return SuperNet(CLASSES, init_channels, num_cells)


def _batches(images: int, batch_size: int) -> Counter[int]:
    """How many batches there are of each size."""
    return Counter({batch_size: images // batch_size}) + Counter(
        {images % batch_size: 1} if images % batch_size else {}
    )


def count_scoring(supernet: SuperNet, genotype: Genotype, args: argparse.Namespace) -> list[Cost]:
    """The layers of one candidate's recalibration and of its validation images at every sigma.

    Args:
        supernet: On the meta device.
        genotype: The candidate.
        args: ``images``, ``batch_size``, ``recalibration_images``, ``image_size``.
    """
    batches = _batches(args.recalibration_images, RECALIBRATION_BATCH)
    for size, count in _batches(args.images, args.batch_size).items():
        batches[size] += count * len(SIGMAS)
    network = supernet.subnet(genotype).eval()
    layers: list[Cost] = []
    for size, count in batches.items():
        with Costs() as costs, torch.no_grad():
            network(torch.empty(size, 3, args.image_size, args.image_size, device="meta"))
        layers += [Cost(cost.kind, cost.flops * count, cost.bytes * count) for cost in costs.layers]
    return layers


def count_step(supernet: SuperNet, genotype: Genotype, batch_size: int, image_size: int) -> list[Cost]:
    """The layers of a training step along one path: forward, backward, optimizer.

    Args:
        supernet: On the meta device.
        genotype: The path.
        batch_size: Images.
        image_size: Pixels, square.
    """
    supernet.train().zero_grad()
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    labels = torch.empty(batch_size, dtype=torch.long, device="meta")
    with Costs() as costs:
        F.cross_entropy(supernet(images, genotype), labels).backward()
    weights = [parameter for parameter in supernet.parameters() if parameter.grad is not None]
    return [*costs.layers, Cost("optimizer", 0, 5 * _size(*weights))]


def floor(layers: Iterable[Cost], rates: Rates) -> float:
    """Least seconds of layers that run one after another."""
    return sum(max(layer.flops / rates.flops, layer.bytes / rates.bytes) for layer in layers)


def measure_rates(stage: str, device: torch.device, clock: Callable[[], float]) -> Rates:
    """The rates of a large matrix product and of a large copy in float32, the best of several.

    On CUDA the product may use TF32 where convolutions may: in training, unless that is switched off, not in scoring.
    """
    size = MATRIX_SIZE[device.type]
    a, b = torch.rand(2, size, size, device=device)
    product = torch.empty_like(a)
    source = torch.zeros(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = stage == "training" and torch.backends.cudnn.allow_tf32
    try:
        matrix = min(_seconds(lambda: torch.mm(a, b, out=product), device, clock) for _ in range(REPEATS))
        copy = min(_seconds(lambda: target.copy_(source), device, clock) for _ in range(REPEATS))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Rates(2 * size**3 / matrix, 2 * _size(source) / copy)


def _seconds(function: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def time_scoring(args: argparse.Namespace) -> list[float]:
    """Seconds of each round of scoring one candidate with the library; a round before them is not counted."""
    benchmark = Benchmark(args)
    genotype = find_genotype(args.genotype)
    return [benchmark.seconds(lambda: benchmark.ours(genotype)) for _ in range(1 + args.rounds)][1:]


def time_steps(args: argparse.Namespace) -> list[float]:
    """Seconds of each training step through NNI and Lightning but the first."""
    import training

    images, space, _ = training.set_up(args)
    turns = training.TakeTurns(itertools.repeat(None), CLOCKS[args.clock])
    training.train(space, images, args, callbacks=[turns])
    return turns.lightning


def step_paths(args: argparse.Namespace) -> list[Genotype]:
    """The paths of the steps that :func:`time_steps` times."""
    space = DartsSearchSpace()
    # The stream that nni_strategy.oneshot.UniformPathModule documents: seed, training, epoch, batch.
    return [space.sample(np.random.default_rng((args.seed, 0, 0, index))) for index in range(1, args.steps)]


def stage_layers(stage: str, args: argparse.Namespace) -> list[list[Cost]]:
    """The layers of each candidate or step that is timed."""
    supernet = _network(args.init_channels, args.num_cells)
    if stage == "scoring":
        return [count_scoring(supernet, find_genotype(args.genotype), args)]
    return [count_step(supernet, path, args.batch_size, args.image_size) for path in step_paths(args)]


def time_stage(stage: str, args: argparse.Namespace) -> list[float]:
    """Measured seconds of each candidate or step."""
    return time_scoring(args) if stage == "scoring" else time_steps(args)


def stage_args(stage: str, args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """The arguments of one stage: both call the size of their batches ``batch_size``."""
    size = args.batch_size if stage == "scoring" else args.train_batch_size
    return argparse.Namespace(**{**vars(args), "batch_size": size, **changes})


def print_floors(args: argparse.Namespace, all_rates: Mapping[str, Rates]) -> None:
    """The table of both stages, and what their floors are made of."""
    rows, parts = [], []
    spent: dict[str, float] = {}
    for stage, rates in all_rates.items():
        own = stage_args(stage, args)
        runs, times = stage_layers(stage, own), time_stage(stage, own)
        # Training takes another path at each step: the mean step against the mean floor.
        flops, moved = (statistics.mean(sum(getattr(c, n) for c in run) for run in runs) for n in ("flops", "bytes"))
        least, ours = statistics.mean(floor(run, rates) for run in runs), statistics.mean(times)
        spent[stage] = ours
        name = "one candidate" if stage == "scoring" else "one training step"
        counted = [flops / 1e9, moved / 1e9, flops / rates.flops, moved / rates.bytes, least, ours]
        span = f"{min(times):.3f} - {max(times):.3f}"
        rows.append([name, *(f"{value:.3f}" for value in counted), span, f"{ours / least:.2f}"])
        for kind in sorted({cost.kind for run in runs for cost in run}):
            costs = [cost for run in runs for cost in run if cost.kind == kind]
            flops, moved = (sum(getattr(cost, n) for cost in costs) / len(runs) for n in ("flops", "bytes"))
            share = floor(costs, rates) / len(runs) / least
            parts.append([f"{name}, {kind}", f"{flops / 1e9:.3f}", f"{moved / 1e9:.3f}", f"{share:.1%}"])
    header = ["", "GFLOP", "GB", "FLOPs / rate [s]", "bytes / rate [s]", "floor [s]", "ours [s]", "from - to"]
    print_table([*header, "ours / floor"], rows)
    print_table(["", "GFLOP", "GB", "of the floor"], parts)
    if set(spent) == set(STAGES):
        steps = EPOCHS * -(-TRAIN_IMAGES // args.train_batch_size)
        minutes = (CANDIDATES * spent["scoring"] + steps * spent["training"]) / 60
        print(
            f"{CANDIDATES:,} such candidates and {steps:,} such steps ({EPOCHS} epochs of {TRAIN_IMAGES:,} images): "
            f"{minutes:.1f} min, extrapolated"
        )


def print_sizes(args: argparse.Namespace, rates: Mapping[str, Rates]) -> None:
    """Seconds against images, channels and batch size, each with its line."""
    counts = [max(1, round(count * args.scale)) for count in IMAGE_COUNTS]
    if "scoring" in args.stages:
        print_growth(
            "scoring", "images", [stage_args("scoring", args, images=count) for count in counts], rates["scoring"]
        )
        by_channels = [stage_args("scoring", args, images=counts[0], init_channels=channels) for channels in CHANNELS]
        print_growth("scoring", "init_channels", by_channels, rates["scoring"])
    if "training" in args.stages:
        by_batch = [stage_args("training", args, batch_size=size) for size in BATCH_SIZES]
        print_growth("training", "batch_size", by_batch, rates["training"])


def print_growth(stage: str, name: str, settings: Sequence[argparse.Namespace], rates: Rates) -> None:
    """Measured seconds for several values of one setting, and how far they are from a line through them."""
    sizes = [getattr(own, name) for own in settings]
    times = [statistics.mean(time_stage(stage, own)) for own in settings]
    floors = [statistics.mean(floor(run, rates) for run in stage_layers(stage, own)) for own in settings]
    slope, start, residuals = fit_line(sizes, times)
    rows = [
        [
            str(size),
            f"{time:.3f}",
            f"{start + slope * size:.3f}",
            f"{residual:+.1%}",
            f"{least:.3f}",
            f"{time / least:.2f}",
        ]
        for size, time, residual, least in zip(sizes, times, residuals, floors, strict=True)
    ]
    print_table([name, "ours [s]", "line [s]", "1 - line / ours", "floor [s]", "ours / floor"], rows)
    print(
        f"{stage}: {start:+.4f} s and {slope:.6f} s for each of {name}; at most "
        f"{max(map(abs, residuals)):.1%} from that line. The floor's own line is at most "
        f"{max(map(abs, fit_line(sizes, floors)[2])):.1%} from its rows.",
        flush=True,
    )


def fit_line(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float, list[float]]:
    """Slope and start of the least-squares line, and how far each time is from it, as a share of the time."""
    slope, start = np.polyfit(sizes, times, 1)
    return slope, start, [1 - (start + slope * size) / time for size, time in zip(sizes, times, strict=True)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="training needs NNI (default: both)"
    )
    parser.add_argument("--sizes", action="store_true", help="cost against size, instead")
    parser.add_argument("--genotype", default="genas_flatness_c100", help="to score (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of scoring it (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of training (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1024, help="validation images (default: %(default)s)")
    parser.add_argument("--recalibration-images", type=int, default=RECALIBRATION_IMAGES)
    parser.add_argument("--batch-size", type=int, help="of the validation (default: 64 on a CPU, 2048 on CUDA)")
    parser.add_argument("--train-batch-size", type=int, default=64)
    parser.add_argument(
        "--scale",
        type=float,
        help=f"--sizes: of {IMAGE_COUNTS[0]} to {IMAGE_COUNTS[-1]} images (default: {CPU_SCALE} on a CPU, else 1)",
    )
    add_options(parser)
    # What the other benchmark's arms want, of which this script runs one.
    parser.set_defaults(candidates=0, workers=0, sigmas=SIGMAS, contiguous=False)
    args = parser.parse_args(arguments)
    cuda = torch.device(args.device).type == "cuda"
    args.batch_size = args.batch_size or (2048 if cuda else 64)
    args.scale = args.scale or (1.0 if cuda else CPU_SCALE)
    for name in ("rounds", "images", "recalibration_images", "batch_size", "train_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, because the first is not timed; got {args.steps}")
    if not args.scale > 0:
        parser.error(f"--scale must be above 0, got {args.scale}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{args}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    rates = {stage: measure_rates(stage, device, CLOCKS[args.clock]) for stage in args.stages}
    for stage, rate in rates.items():
        print(
            f"{stage}: matrix rate {rate.flops / 1e9:.1f} GFLOP/s (float32, {MATRIX_SIZE[device.type]} squared), "
            f"copy rate {rate.bytes / 1e9:.2f} GB/s ({COPIED_BYTES[device.type] / 2**20:.0f} MiB read and written)",
            flush=True,
        )
    (print_sizes if args.sizes else print_floors)(args, rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
