"""Speed of supernet training through NNI and Lightning, against a plain PyTorch loop.

Both arms train the same supernet from the same weights on the same batches along the same paths, with the same
optimizer and clipping. They take turns step by step: as soon as Lightning has finished a step, the plain loop does
the same one, so that a drift of the machine's speed falls on both. The time of a step is everything between
two of them: loading and augmenting the batch, the step itself, logging, the progress bar.

At the end the weights of both arms are compared; they must be equal bit for bit on a CPU.

Run it from a checkout that is installed (two to four minutes on two CPU cores)::

    python benchmarks/training.py --check

A machine that others use as well is too noisy for the clock on the wall: ``--threads 1 --clock cpu`` counts the
work of this process only. Images are random, which changes the loss and not the time that a step takes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace

# The neighbouring script: running this one puts their folder on the path.
from scoring import CLASSES, CLOCKS, MEAN, STD, print_table, random_images, spread
from torch import nn
from torch.optim import SGD

from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.spaces import DartsSearchSpace
from genas_plugins.supernet import SuperNet
from nni_strategy import DartsSpace, GeNAS, supernet_evaluator
from nni_strategy.training import TrainBatches

__all__ = ["main"]

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, CLIP = 0.025, 0.9, 3e-4, 5.0
MOST_OVERHEAD = 1.10


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
            loss = F.cross_entropy(self.supernet(images, genotype), labels)
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


def take_turns(args: argparse.Namespace, folder: str) -> tuple[TakeTurns, float]:
    """Run both arms; return the times and the largest difference between their weights."""
    device = torch.device(args.device)
    images = random_images(args.steps * args.batch_size, args.image_size, args.seed)
    held_out = random_images(args.batch_size, args.image_size, args.seed + 1)
    data = SearchData(images, held_out, held_out, None, MEAN, STD, CLASSES, "random", args.image_size)
    torch.manual_seed(args.seed)
    space = DartsSpace(CLASSES, args.init_channels, args.num_cells)
    supernet = SuperNet(CLASSES, args.init_channels, args.num_cells)
    supernet.load_state_dict(space.supernet.state_dict())
    plain = PlainLoop(supernet, images, args.batch_size, args.seed, device)
    turns = TakeTurns(plain.steps(), CLOCKS[args.clock])
    # One candidate at the end, because a strategy searches what it trained; it is not timed.
    strategy = GeNAS(
        population=1,
        generations=1,
        mutants=0,
        crossovers=0,
        recalibration_images=args.batch_size,
        seed=args.seed,
    )
    with quiet():
        evaluator = supernet_evaluator(
            data,
            1,
            batch_size=args.batch_size,
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            gradient_clip=CLIP,
            seed=args.seed,
            accelerator=device.type,
            devices=1,
            callbacks=[turns],
            default_root_dir=folder,
        )
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine(continue_on_failure=False))
    pairs = zip(space.supernet.state_dict().values(), supernet.state_dict().values(), strict=True)
    difference = max(float((ours.cpu() - theirs.cpu()).abs().max()) for ours, theirs in pairs)
    return turns, difference


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each arm (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--num-cells", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu counts this process's work only: for a CPU that others use too, with --threads 1",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, because the first is not timed; got {args.steps}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        turns, difference = take_turns(args, folder)
    # Blocks of steps for the range: single steps differ by their path and by what else the machine does.
    size = max(1, len(turns.plain) // 10)
    rows, ratios = [], []
    for first in range(0, len(turns.plain), size):
        ours, least = turns.lightning[first : first + size], turns.plain[first : first + size]
        ratios.append(sum(ours) / sum(least))
        steps = f"{first + 1}..{first + len(ours)}"
        rows.append([steps, *(f"{1000 * statistics.mean(t):.1f}" for t in (ours, least)), f"{ratios[-1]:.3f}"])
    print(f"{args}, {torch.get_num_threads()} threads")
    print_table(["steps", "NNI + Lightning [ms]", "plain loop [ms]", "ratio"], rows)
    single = [ours / least for ours, least in zip(turns.lightning, turns.plain, strict=True)]
    print_table(
        ["", "median (min - max)", "target"],
        [
            ["ratio of steps", spread(single), f"<= {MOST_OVERHEAD}"],
            ["ratio of blocks", spread(ratios), ""],
            ["largest difference of the weights", f"{difference:g}", "0 on a CPU"],
        ],
    )
    equal = difference == 0 or torch.device(args.device).type != "cpu"
    passed = statistics.median(single) <= MOST_OVERHEAD and equal
    print("All targets are met." if passed else "A target is missed.")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
