"""Speed and memory of a GeNAS network in timm: against the same network written plainly, and against relatives.

All are measured in one run and take turns, in the opposite order every second round, so that a drift of the
machine's speed falls on all of them. What counts are the ratios within a round:

* ours: ``timm.create_model("genas_flatness_c100", auxiliary=True)``;
* plain: the official forward pass written out: a loop over cells, a list of states, each operation a sequence
  with a ReLU of its own. Before anything is timed, both get the same weights and must give the same logits;
* relatives in timm: MobileNetV3, RegNetY, and NASNet-A (6 @ 864), of its widths the nearest to 580 M multiply-adds
  (timm's NASNet always has six cells a stage, which rules out the published 4 @ 1056).

Training is forward, loss, backward and a step of SGD with momentum. Ours and plain have the auxiliary head, which
is not in the printed parameters; the relatives have none. Peak memory is what a network and its batch add: on CUDA
to the tensors, on a CPU (``--memory``, Linux only) to the resident size of a fresh process for each of both modes.
From a checkout that is installed (``--threads 1 --clock cpu`` where others use the machine too)::

    python benchmarks/networks.py --check
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

# The neighbouring script: running this one puts their folder on the path.
from scoring import CLOCKS, print_table, spread
from timm.models.nasnet import NASNetALarge
from torch import Tensor, nn

from genas_plugins.counting import count_macs
from genas_plugins.darts.genotype import CellGene, Genotype
from genas_plugins.darts.network import AuxiliaryHead
from genas_plugins.darts.zoo import IMAGENET_CELLS, ZOO
from timm_models import GenasNet

__all__ = ["PlainNetwork", "build", "check_agreement", "main"]

OURS, PLAIN, NASNET = "genas_flatness_c100", "plain", "nasneta_6_864"
RELATIVES = ("mobilenetv3_large_100", "regnety_006", NASNET)
MODES = ("training", "inference")
CLASSES, LOSS_WEIGHTS = 1000, (1.0, 0.4)
LEAST_RATIO = 0.97

MakeArm = Callable[[str, argparse.Namespace], "Arm"]

conv = partial(nn.Conv2d, bias=False)


def relu_conv_bn(*convolutions: nn.Conv2d, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace), *convolutions, nn.BatchNorm2d(convolutions[-1].out_channels))


def separable(channels: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    depthwise = conv(channels, channels, kernel, stride, kernel // 2 * dilation, dilation, channels)
    return relu_conv_bn(depthwise, conv(channels, channels, 1))


class PlainReduce(nn.Module):
    """Two strided 1x1 convolutions, the second one pixel further, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even, self.odd = (conv(inputs, outputs // 2, 1, 2) for _ in range(2))
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


OPERATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda channels, stride: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": lambda channels, stride: PlainReduce(channels, channels) if stride == 2 else nn.Identity(),
    "sep_conv_3x3": lambda channels, stride: nn.Sequential(*(separable(channels, 3, s) for s in (stride, 1))),
    "sep_conv_5x5": lambda channels, stride: nn.Sequential(*(separable(channels, 5, s) for s in (stride, 1))),
    "dil_conv_3x3": lambda channels, stride: separable(channels, 3, stride, dilation=2),
    "dil_conv_5x5": lambda channels, stride: separable(channels, 5, stride, dilation=2),
}


class PlainCell(nn.Module):
    """A list of states; each node appends the sum of two operations on earlier ones."""

    def __init__(self, gene: CellGene, inputs: tuple[int, int], channels: int, reduction: bool, larger: bool) -> None:
        super().__init__()
        first = PlainReduce if larger else lambda *sizes: relu_conv_bn(conv(*sizes, 1))
        self.first, self.second = first(inputs[0], channels), relu_conv_bn(conv(inputs[1], channels, 1))
        self.sources = [source for _, source in gene]
        self.operations = nn.ModuleList(OPERATIONS[name](channels, 2 if reduction and s < 2 else 1) for name, s in gene)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.first(s0), self.second(s1)]
        for left in range(0, 8, 2):
            a = self.operations[left](states[self.sources[left]])
            b = self.operations[left + 1](states[self.sources[left + 1]])
            states.append(a + b)
        return torch.cat(states[2:], dim=1)


class PlainNetwork(nn.Module):
    """The official ImageNet network of two cells; parameters come in the order of those of :class:`GenasNet`."""

    def __init__(self, genotype: Genotype, channels: int, cells: int) -> None:
        super().__init__()
        first, second = conv(3, channels // 2, 3, 2, 1), conv(channels // 2, channels, 3, 2, 1)
        self.stem0 = nn.Sequential(first, nn.BatchNorm2d(channels // 2), *relu_conv_bn(second, inplace=True))
        self.stem1 = relu_conv_bn(conv(channels, channels, 3, 2, 1))
        self.cells = nn.ModuleList()
        self.tap = 2 * cells // 3
        inputs, larger = (channels, channels), True
        for index in range(cells):
            reduction = index in (cells // 3, self.tap)
            channels *= 2 if reduction else 1
            gene = genotype.reduce if reduction else genotype.normal
            self.cells.append(PlainCell(gene, inputs, channels, reduction, larger))
            inputs, larger = (inputs[1], 4 * channels), reduction
        self.auxiliary_head = AuxiliaryHead(4 * channels, CLASSES)
        self.classifier = nn.Linear(4 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if self.training and index == self.tap:
                auxiliary = self.auxiliary_head(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return (logits, auxiliary) if self.training else logits


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    OURS: lambda: timm.create_model(OURS, auxiliary=True),
    PLAIN: lambda: PlainNetwork(ZOO[OURS].genotype, ZOO[OURS].init_channels, IMAGENET_CELLS),
    NASNET: lambda: NASNetALarge(CLASSES, stem_size=32, num_features=864),
    "small": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
}


def build(name: str) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(0)
    return BUILDERS.get(name, partial(timm.create_model, name))()


@torch.no_grad()
def check_agreement(ours: GenasNet, plain: PlainNetwork, image_size: int) -> None:
    """Give the plain network the weights of ours; AssertionError if logits differ, in training or then evaluation.

    In float64: normalised by the statistics of two images, float32 differs by some thousandths on some processors.
    """
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    ours, plain = ours.double(), plain.double()
    x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for own, theirs in (*zip(ours.train()(x), plain.train()(x), strict=True), (ours.eval()(x), plain.eval()(x))):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


def memory(device: str) -> tuple[float, float]:
    """MB in use and their peak: of tensors on CUDA, of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage, whose maximum a process inherits from the one that started it.
    kib = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return int(kib["VmRSS"]) * 1024 / 1e6, int(kib["VmHWM"]) * 1024 / 1e6


class Arm:
    """A network and what is timed of it."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.args, self.device, self.clock = args, args.device, CLOCKS[args.clock]
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        self.network = torch.compile(self.model) if getattr(args, "compile", False) else self.model
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 1e-3, momentum=0.9)
        self.scaler = torch.amp.GradScaler(self.device, enabled=args.amp == "float16")
        self.amp = {"dtype": getattr(torch, args.amp or "bfloat16"), "enabled": args.amp is not None}
        self.synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        self.make_batch(torch.Generator().manual_seed(0))

    def make_batch(self, generator: torch.Generator) -> None:
        """Make the images and what training needs beside them."""
        args = self.args
        images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
        self.images = images.to(self.device, memory_format=self.layout)
        self.labels = torch.randint(CLASSES, (args.batch_size,), generator=generator).to(self.device)

    def size(self) -> dict[str, int]:
        """Parameters without the auxiliary head, and multiply-adds of an image."""
        named = self.model.named_parameters()
        parameters = sum(parameter.numel() for name, parameter in named if not name.startswith("auxiliary"))
        return {"parameters": parameters, "macs": count_macs(self.model, self.args.image_size)}

    def run(self) -> Tensor | None:
        """A forward pass; the loss in training."""
        out = self.network(self.images)
        if not self.model.training:
            return None
        pairs = zip(LOSS_WEIGHTS, out if isinstance(out, tuple) else (out,), strict=False)
        return sum(weight * F.cross_entropy(logits, self.labels) for weight, logits in pairs)

    def step(self) -> None:
        with torch.inference_mode(not self.model.training), torch.autocast(self.device, **self.amp):
            loss = self.run()
        if loss is None:
            return
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def seconds(self, mode: str, steps: int) -> float:
        """Time of so many steps, to the end of the device's work."""
        self.model.train(mode == "training")
        gc.collect()
        self.synchronize()
        start = self.clock()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return self.clock() - start


def make_arm(name: str, args: argparse.Namespace) -> Arm:
    """A network with its images."""
    return Arm(build(name), args)


def prepare(
    name: str, modes: Sequence[str], args: argparse.Namespace, make: MakeArm = make_arm
) -> tuple[Arm, dict[str, float]]:
    """Build a network and warm it up; also the peak memory in MB that it adds, by mode, where that can be told."""
    measure = args.device == "cuda" or args.memory_of is not None
    before = memory(args.device)[0] if measure else 0.0
    arm, peaks = make(name, args), {}
    # Inference first: the optimizer then has no momentum yet.
    for mode in sorted(modes):
        arm.seconds(mode, args.warmup)
        if measure:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            arm.seconds(mode, 1)
            peaks[mode] = memory(args.device)[1] - before
    return arm, peaks


def compare(
    names: Sequence[str], args: argparse.Namespace, command: Sequence[str], make: MakeArm = make_arm
) -> dict[str, dict[str, Any]]:
    """Measure networks in turns; ratios are to the first.

    Args:
        names: Of the networks.
        args: The settings.
        command: What measures the memory of one network, whose name and mode are added, in a process of its own.
        make: Builds a network with its images.

    Returns:
        By name: ``parameters``, ``macs``, and by mode ``images_per_second``, ``memory_mb``, ``ratio``.
    """
    arms, models = {}, {}
    for name in names:
        arms[name], peaks = prepare(name, MODES, args, make)
        for mode in MODES if args.memory and not peaks else ():
            done = subprocess.run([*command, name, mode], stdout=subprocess.PIPE, text=True, check=True)
            peaks[mode] = float(done.stdout)
        models[name] = {**arms[name].size(), "memory_mb": peaks, "images_per_second": {mode: [] for mode in MODES}}
    for index in range(args.rounds):
        for mode in MODES:
            for name in list(arms)[:: -1 if index % 2 else 1]:
                speed = args.steps * args.batch_size / arms[name].seconds(mode, args.steps)
                models[name]["images_per_second"][mode].append(speed)
    ours = models[names[0]]["images_per_second"]
    for model in models.values():
        other = model["images_per_second"]
        model["ratio"] = {m: [a / b for a, b in zip(ours[m], other[m], strict=True)] for m in MODES}
    return models


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else cpu[1] if cpu else platform.machine()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "date": str(datetime.date.today())}
    return {"hardware": hardware, "threads": torch.get_num_threads(), **versions, "settings": vars(args)}


def report(models: dict[str, dict[str, Any]]) -> None:
    """Print the two tables."""
    rows, ratios = [], []
    for name, model in models.items():
        values = model["images_per_second"].values()
        speeds = [f"{statistics.median(s):.1f} ({min(s):.1f} - {max(s):.1f})" for s in values]
        peaks = " / ".join(f"{model['memory_mb'][mode]:.0f}" if model["memory_mb"] else "-" for mode in MODES)
        rows.append([name, f"{model['parameters'] / 1e6:.2f}", f"{model['macs'] / 1e6:.0f}", *speeds, peaks])
        spreads = [spread(model["ratio"][mode]) for mode in MODES]
        ratios.append([f"ours / {name}", *spreads, f">= {LEAST_RATIO}" if name == PLAIN else ""])
    print_table(["median (min - max)", "params [M]", "MACs [M]", *(f"{m} [img/s]" for m in MODES), "peak [MB]"], rows)
    print_table(["ratio of speeds by round", *MODES, "target"], ratios[1:])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of what takes turns."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of a network and mode in a round (default: CPU 1, CUDA 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before all rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU (default: %(default)s)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: of this process's work only")
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="automatic mixed precision")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="on a CPU too, on Linux")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file for all figures")


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], batch_sizes: tuple[int, int]
) -> argparse.Namespace:
    """Parse, with defaults that differ between a CPU and CUDA, and refuse numbers that cannot be."""
    args = parser.parse_args(arguments)
    cuda = args.device == "cuda"
    args.batch_size = batch_sizes[cuda] if args.batch_size is None else args.batch_size
    args.steps = (10 if cuda else 1) if args.steps is None else args.steps
    for name in ("batch_size", "rounds", "steps", "warmup", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--models", nargs="*", choices=RELATIVES, default=RELATIVES, help="relatives (default: all)")
    parser.add_argument("--batch-size", type=int, help="(default: 16 on a CPU, 128 on CUDA)")
    parser.add_argument("--image-size", type=int, default=224, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="takes minutes: name few --models")
    parser.add_argument("--check", action="store_true", help="exit 1 when ours is slower than the plain one")
    args = parse_options(parser, arguments, (16, 128))
    if args.image_size < 32 or args.image_size % 32:
        parser.error(f"--image-size must be a multiple of 32, got {args.image_size}")
    if args.memory and args.compile and args.device != "cuda":
        parser.error("--memory on a CPU would count the compiler's own: leave out --compile")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # Libraries allocate what they keep now, so that it does not count as the first network's.
    prepare("small", MODES, args)
    if args.memory_of:
        print(*prepare(args.memory_of[0], args.memory_of[1:], args)[1].values())
        return 0
    record = environment(args)
    print(", ".join(f"{key}: {value}" for key, value in record.items()), flush=True)
    check_agreement(build(OURS), build(PLAIN), args.image_size)
    command = [sys.executable, __file__, *arguments, "--memory-of"]
    models = compare((OURS, PLAIN, *args.models), args, command)
    report(models)
    if args.output:
        args.output.write_text(json.dumps({**record, "models": models}, indent=1, default=str) + "\n")
    passed = all(statistics.median(models[PLAIN]["ratio"][mode]) >= LEAST_RATIO for mode in MODES)
    print("All targets are met." if passed else "A target is missed.")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
