"""Speed of supernet training through NNI and Lightning, against the loop that one would write without this library.

Both arms train the same supernet from the same weights on the same batches along the same paths:

* ours: ``supernet_evaluator`` and ``GeNAS``, with logger, checkpoints and the progress bar of ``genas search``;
* plain: the official forward pass, a ReLU in every layer that starts with one and two strided convolutions where the
  resolution halves; gradients of zero for what is not sampled; clipping and ``torch.optim.SGD`` over all parameters.
  It gets its batches from the same loader, since loading is not what is compared.

They take turns step by step: as soon as Lightning has finished a step, the plain loop does the same one, so that a
drift of the machine's speed falls on both. The time of a step is everything between two of them: loading and
augmenting the batch, the step itself, logging, the progress bar.

Before that, both train in float64 for a few steps, on small images, and their weights are compared: the difference is
told as a share of the way that a parameter went from its start, for the parameter where it is largest. In float32 that
says nothing: a first step that differs in the last bit ends elsewhere after ten, because it decides on which side of
zero units lie that are nearly dead.

Run it from a checkout that is installed (five minutes on two CPU cores; ``--memory`` for the peak memory of each arm,
in a process of its own; on a CPU only on Linux)::

    python benchmarks/training.py --memory --check

A machine that others use as well is too noisy for the clock on the wall: ``--threads 1 --clock cpu`` counts the
work of this process only. Images are random, which changes the loss and not the time that a step takes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

# The neighbouring script: running this one puts their folder on the path.
from scoring import CLASSES, CLOCKS, MEAN, STD, add_options, print_table, random_images, spread
from torch import Tensor, nn
from torch.optim import SGD

from genas_plugins.darts.genotype import Genotype, cell_edges
from genas_plugins.darts.operations import FactorizedReduce
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.experiment.progress import Bar
from genas_plugins.spaces import DartsSearchSpace
from nni_strategy import DartsSpace, GeNAS, supernet_evaluator
from nni_strategy.training import TrainBatches, TrainingProgress

__all__ = ["main"]

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, CLIP = 0.025, 0.9, 3e-4, 5.0
LEAST_GAIN = {"cpu": 1.15, "cuda": 3.0}
MOST_DIFFERENCE = 1e-8
COMPARED = {"steps": 20, "batch_size": 16, "image_size": 16}
ARMS = ("ours", "plain")


def plain_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """What the official code computes in a layer."""
    if isinstance(layer, FactorizedReduce):
        x = F.relu(x)
        return layer.bn(torch.cat([layer.conv_1(x), layer.conv_2(x[:, :, 1:, 1:])], dim=1))
    return layer.op(x) if hasattr(layer, "op") else layer(x)


def plain_forward(supernet: SuperNet, x: Tensor, genotype: Genotype) -> Tensor:
    """Logits of the official forward pass: a loop over cells, a list of states."""
    s0, s1 = supernet.stem_states(x)
    for shape, cell in zip(supernet.shapes, supernet.cells, strict=True):
        states = [plain_layer(cell.preprocess0, s0), plain_layer(cell.preprocess1, s1)]
        edges = list(cell_edges(genotype.reduce if shape.reduction else genotype.normal))
        for pair in zip(edges[::2], edges[1::2], strict=True):
            a, b = (plain_layer(cell.operation(name, source, node), states[source]) for node, name, source in pair)
            states.append(a + b)
        s0, s1 = s1, torch.cat(states[2:], dim=1)
    return supernet.head(s1)


class PlainLoop:
    """The steps of supernet training, written out.

    Args:
        supernet: Trained in place.
        data: Training images.
        batch_size: Images a step.
        seed: Of the batches and the paths.
        device: To train on.
    """

    def __init__(
        self, supernet: SuperNet, data: ImageTensors, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self.supernet = supernet.to(device).train()
        self.dtype = supernet.classifier.weight.dtype
        self.optimizer = SGD(supernet.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.batches = TrainBatches(data, batch_size, MEAN, STD, seed=seed).to(device)
        self.seed = seed
        self.space = DartsSearchSpace()

    def steps(self) -> Iterator[None]:
        """One epoch, a step each time."""
        self.batches.set_epoch(0)
        for index, (images, labels) in enumerate(self.batches):
            # The stream of paths that UniformPathModule documents: seed, training, epoch, batch.
            genotype = self.space.sample(np.random.default_rng((self.seed, 0, 0, index)))
            loss = F.cross_entropy(plain_forward(self.supernet, images.to(self.dtype), genotype), labels)
            self.optimizer.zero_grad(set_to_none=False)
            loss.backward()
            nn.utils.clip_grad_norm_(self.supernet.parameters(), CLIP)
            self.optimizer.step()
            yield


class TakeTurns(pl.Callback):
    """After every step of Lightning's, lets the plain loop do the same step, and times both.

    Attributes:
        lightning: Seconds of each of Lightning's steps but the first.
        plain: Seconds of the same steps of the plain loop.
    """

    def __init__(self, plain: Iterator[None], clock: Callable[[], float]) -> None:
        self.lightning: list[float] = []
        self.plain: list[float] = []
        self._steps = plain
        self._clock = clock
        self._start: float | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        device = trainer.strategy.root_device
        synchronize(device)
        end = self._clock()
        next(self._steps)
        synchronize(device)
        back = self._clock()
        # Lightning's first step has the start of the fit in it, which is not what a step costs.
        if self._start is not None:
            self.lightning.append(end - self._start)
            self.plain.append(back - end)
        self._start = back


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bar and Lightning's advice off the terminal, where the table goes; both still run."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        lightning.setLevel(level)


class TrainOnly(GeNAS):
    """The strategy without the search after training."""

    def search(self) -> None: ...


def set_up(args: argparse.Namespace) -> tuple[ImageTensors, DartsSpace, SuperNet]:
    """Images, and the supernets of both arms, with the same random weights."""
    images = random_images(args.steps * args.batch_size, args.image_size, args.seed)
    torch.manual_seed(args.seed)
    space = DartsSpace(CLASSES, args.init_channels, args.num_cells)
    supernet = SuperNet(CLASSES, args.init_channels, args.num_cells)
    supernet.load_state_dict(space.supernet.state_dict())
    return images, space, supernet


def plain_loop(supernet: SuperNet, images: ImageTensors, args: argparse.Namespace) -> Iterator[None]:
    """The other arm, a step each time."""
    return PlainLoop(supernet, images, args.batch_size, args.seed, torch.device(args.device)).steps()


def train(
    space: DartsSpace,
    images: ImageTensors,
    args: argparse.Namespace,
    callbacks: Sequence[pl.Callback] = (),
    precision: str = "32-true",
) -> None:
    """Our arm: an epoch through NNI and Lightning."""
    # Not above, where NNI stands before nni_strategy, because Python 3.14 imports it only afterwards.
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.space import RawFormatModelSpace

    held_out = random_images(args.batch_size, args.image_size, args.seed + 1)
    data = SearchData(images, held_out, held_out, None, MEAN, STD, CLASSES, "random", args.image_size)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        evaluator = supernet_evaluator(
            data,
            1,
            batch_size=args.batch_size,
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            gradient_clip=CLIP,
            seed=args.seed,
            accelerator=torch.device(args.device).type,
            devices=1,
            callbacks=[TrainingProgress(Bar, 1), *callbacks],
            enable_progress_bar=False,
            default_root_dir=folder,
            precision=precision,
        )
        strategy = TrainOnly(seed=args.seed)
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine(continue_on_failure=False))


def difference(args: argparse.Namespace) -> float:
    """The largest distance of a parameter of ours to the plain one after training in float64, as a share of its way.

    Infinite if one moved that did not in the plain loop.
    """
    args = argparse.Namespace(**{**vars(args), **COMPARED})
    images, space, supernet = set_up(args)
    start = [parameter.detach().double().clone() for parameter in supernet.parameters()]
    for _ in plain_loop(supernet.double(), images, args):
        pass
    train(space, images, args, precision="64-true")
    largest = 0.0
    for before, own, other in zip(start, space.supernet.parameters(), supernet.parameters(), strict=True):
        own, other = own.detach().cpu(), other.detach().cpu()
        apart, way = float((own - other).norm()), float((other - before).norm())
        if apart:
            largest = max(largest, apart / way if way else float("inf"))
    return largest


def take_turns(args: argparse.Namespace) -> TakeTurns:
    """Run both arms in turns."""
    images, space, supernet = set_up(args)
    turns = TakeTurns(plain_loop(supernet, images, args), CLOCKS[args.clock])
    train(space, images, args, callbacks=[turns])
    return turns


def peak_memory(arm: str, args: argparse.Namespace) -> float:
    """MB that training adds: of tensors on CUDA, of this process on a CPU."""
    images, space, supernet = set_up(args)
    cuda = torch.device(args.device).type == "cuda"
    before = resident("VmRSS")
    if arm == "ours":
        train(space, images, args)
    else:
        for _ in plain_loop(supernet, images, args):
            pass
    return torch.cuda.max_memory_allocated() / 1e6 if cuda else resident("VmHWM") - before


def resident(field: str) -> float:
    """Resident size of this process in MB, now (``VmRSS``) or at its highest (``VmHWM``)."""
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each arm (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    add_options(parser)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of both, over ten steps each")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, because the first is not timed; got {args.steps}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(args.memory_of, args))
        return 0
    apart, turns = difference(args), take_turns(args)
    # Blocks of steps for the range: single steps differ by their path and by what else the machine does.
    size = max(1, len(turns.plain) // 10)
    rows, ratios = [], []
    for first in range(0, len(turns.plain), size):
        ours, plain = turns.lightning[first : first + size], turns.plain[first : first + size]
        ratios.append(sum(plain) / sum(ours))
        steps = f"{first + 1}..{first + len(ours)}"
        rows.append([steps, *(f"{1000 * statistics.mean(t):.1f}" for t in (ours, plain)), f"{ratios[-1]:.3f}"])
    print(f"{args}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_table(["steps", "ours [ms]", "plain loop [ms]", "plain / ours"], rows)
    least = LEAST_GAIN[torch.device(args.device).type]
    single = [plain / ours for ours, plain in zip(turns.lightning, turns.plain, strict=True)]
    table = [
        ["plain / ours, blocks", spread(ratios), f">= {least}"],
        ["plain / ours, single steps", spread(single), ""],
        ["largest difference of a parameter, float64", f"{apart:.2g}", f"<= {MOST_DIFFERENCE:g}"],
    ]
    passed = statistics.median(ratios) >= least and apart <= MOST_DIFFERENCE
    if args.memory:
        command = [sys.executable, __file__, *arguments, "--steps", "10", "--memory-of"]
        peaks = [
            float(subprocess.run([*command, arm], stdout=subprocess.PIPE, text=True, check=True).stdout) for arm in ARMS
        ]
        table.append(["peak memory that training adds, ours / plain [MB]", "{:.0f} / {:.0f}".format(*peaks), "no more"])
        passed = passed and peaks[0] <= peaks[1]
    print_table(["", "median (min - max)", "target"], table)
    print("All targets are met." if passed else "A target is missed.")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
