"""How many operators a training step and a batch of scoring start, ours against the plain way.

A GPU takes some microseconds to start an operator. At the batch of 64 of the supernet's training it computes for less
than that, so that a step takes what its operators take to start. They are counted on the meta device, where nothing is
computed and every layer takes the way that it takes on a GPU; no GPU is needed::

    python benchmarks/launches.py --space both

Counted is what computes: not views, and not memory that is set aside. One that moves a list of tensors counts once for
every 64 of them, the number that PyTorch's multi-tensor kernels take. Training is counted as it is after the first
steps, when every weight has a momentum; loading and augmenting a batch is no part of the step, and counted by itself,
over an epoch:

* ours: the forward pass of ``SupernetModule``, with what catches up the path's weights, backward, clipping and
  ``PathSGD``; the batches of ``TrainBatches``;
* plain: the official forward pass (that of the DARTS space is in ``benchmarks/training.py``), with gradients of zero
  for what is not sampled, and ``torch.optim.SGD``; batches that are cropped, mirrored and normalised one by one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# The neighbouring scripts: running this one puts their folder on the path.
from scoring import CLASSES, MEAN, STD, print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import CLIP, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, plain_forward

from genas_plugins.datasets import ImageTensors
from genas_plugins.nasbench201 import EDGES, NODES, NasBench201Architecture, NasBench201SuperNet, SuperCell
from genas_plugins.scoring.batchnorm import recalibrate_batchnorm
from genas_plugins.scoring.inference import InferenceNetwork
from nni_strategy import DartsSpace, NasBench201Space
from nni_strategy.space import SupernetSpace
from nni_strategy.training import SupernetModule, TrainBatches

__all__ = ["Launches", "count", "loading_counts", "main", "plain_batches", "scoring_counts", "training_counts"]

TENSORS_A_LAUNCH = 64
_FREE = ("alias", "detach", "empty", "lift_fresh", "new_empty", "_record_function")

Counts = dict[str, tuple[int, int]]


class Launches(TorchDispatchMode):
    """Counts the operators that compute something while it is active.

    Args:
        device: Only those whose result is there, copies to it included; ``None`` for all.

    Attributes:
        number: So far.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.number = 0
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        result = function(*arguments, **(keywords or {}))
        elsewhere = self._device and isinstance(result, Tensor) and result.device.type != self._device
        if not function.is_view and not name.startswith(_FREE) and not elsewhere:
            self.number += math.ceil(len(arguments[0]) / TENSORS_A_LAUNCH) if name.startswith("_foreach") else 1
        return result


def count(function: Callable[[], Any], device: str | None = None) -> int:
    """Operators of one call; see :class:`Launches`."""
    with Launches(device) as launches:
        function()
    return launches.number


def _clip(parameters: Sequence[Tensor]) -> None:
    """``clip_grad_norm_`` as it is on a GPU; on the meta device it would go tensor by tensor."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))


def plain_forward_201(supernet: NasBench201SuperNet, x: Tensor, architecture: NasBench201Architecture) -> Tensor:
    """Logits of the official forward pass: every edge by itself, ``none`` too, and a node adds what arrives."""
    x = supernet.stem(x)
    for cell in supernet.cells:
        if not isinstance(cell, SuperCell):
            x = cell(x)
            continue
        states = [x]
        for node in NODES:
            edges = zip(cell.layers(architecture), EDGES, strict=True)
            first, *others = (layer(states[source]) for layer, (source, end) in edges if end == node)
            states.append(sum(others, first))
        x = states[-1]
    return supernet.head(x)


@dataclass(frozen=True)
class Space:
    """What is counted.

    Attributes:
        title: Of the table.
        build: Makes the supernet.
        plain: The official forward pass.
        weight_decay: Of the training.
    """

    title: str
    build: Callable[[argparse.Namespace], SupernetSpace]
    plain: Callable[[Any, Tensor, Any], Tensor]
    weight_decay: float


SPACES = {
    "darts": Space(
        "the DARTS space",
        lambda args: DartsSpace(CLASSES, args.init_channels, args.num_cells),
        plain_forward,
        WEIGHT_DECAY,
    ),
    "nasbench201": Space(
        "NAS-Bench-201",
        lambda args: NasBench201Space(CLASSES, args.init_channels, args.cells_per_stage),
        plain_forward_201,
        5e-4,
    ),
}


def _build(args: argparse.Namespace) -> SupernetSpace:
    with torch.device("meta"):
        return SPACES[args.space].build(args).train()


def _paths(space: SupernetSpace, args: argparse.Namespace) -> Iterator[Any]:
    """The same ones for every count."""
    rng = np.random.default_rng(args.seed)
    return (space.search_space.sample(rng) for _ in range(args.paths))


def _images(size: int, args: argparse.Namespace) -> Tensor:
    return torch.empty(size, 3, args.image_size, args.image_size, device="meta")


def training_counts(args: argparse.Namespace) -> list[Counts]:
    """Operators of ours and of the plain loop, by part of the step, for each sampled path."""
    kind, ours, plain = SPACES[args.space], _build(args), _build(args).supernet
    module = SupernetModule(1, learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=kind.weight_decay).train()
    module.set_model(ours)
    own = module.configure_optimizers()["optimizer"]
    sgd = torch.optim.SGD(plain.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=kind.weight_decay, foreach=True)
    for optimizer in (own, sgd):
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images, labels = _images(args.batch_size, args), torch.empty(args.batch_size, dtype=torch.long, device="meta")
    losses: list[Tensor] = []

    def our_forward(path: Any) -> None:
        ours.network.resample(ours.to_sample(path))
        losses.append(F.cross_entropy(module(images), labels))

    def our_update() -> None:
        _clip([parameter for parameter in ours.parameters() if parameter.grad is not None])
        own.step()

    def plain_update() -> None:
        _clip(list(plain.parameters()))
        sgd.step()

    steps = []
    for path in _paths(ours, args):
        counts = {
            "zeroing": (count(own.zero_grad), count(lambda: sgd.zero_grad(set_to_none=False))),
            "forward": (
                count(lambda path=path: our_forward(path)),
                count(lambda path=path: losses.append(F.cross_entropy(kind.plain(plain, images, path), labels))),
            ),
            "backward": (count(losses[-2].backward), count(losses[-1].backward)),
            "clipping and optimizer": (count(our_update), count(plain_update)),
        }
        steps.append({**counts, "a training step": _summed(counts)})
    return steps


def _summed(counts: Counts) -> tuple[int, int]:
    ours, theirs = zip(*counts.values(), strict=True)
    return sum(ours), sum(theirs)


@torch.no_grad()
def scoring_counts(args: argparse.Namespace) -> list[Counts]:
    """Operators of ours and of the network's own forward passes, for each candidate."""
    space, images = _build(args), _images(args.batch_size, args)
    batch = [(images, torch.empty(args.batch_size, dtype=torch.long, device="meta"))]
    candidates = []
    for candidate in _paths(space, args):
        subnet = space.subnet(candidate)
        network = InferenceNetwork(subnet.eval())
        evaluation = count(lambda network=network: network(images)), count(lambda subnet=subnet: subnet(images))
        # With one batch and with two, because a recalibration has a beginning.
        once, twice = (count(lambda s=subnet, b=b: recalibrate_batchnorm(s, b, 0.1)) for b in (batch, 2 * batch))
        subnet.train()
        candidates.append(
            {
                "a batch of recalibration": (twice - once, count(lambda subnet=subnet: subnet(images))),
                "a batch of validation": evaluation,
            }
        )
    return candidates


def plain_batches(data: ImageTensors, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch, in which each batch is drawn, cropped, mirrored and normalised by itself."""
    device = data.labels.device
    scale = torch.tensor([1 / (255 * s) for s in STD]).view(1, 3, 1, 1).to(device)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1).to(device)
    for chosen in torch.randperm(len(data)).to(device).split(batch_size):
        images, labels = data.images[chosen], data.labels[chosen]
        count, _, height, width = images.shape
        corners = torch.randint(9, (2, count, 1)).to(device)
        mirrored = (torch.rand(count, 1, 1, 1) < 0.5).to(device)
        rows = corners[0] + torch.arange(height, device=device)
        columns = corners[1] + torch.arange(width, device=device)
        picture = torch.arange(count, device=device)[:, None, None]
        padded = F.pad(images, (4,) * 4).permute(0, 2, 3, 1)
        images = padded[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        images = torch.where(mirrored, images.flip(3), images).float().mul_(scale).add_(shift)
        yield images.contiguous(memory_format=torch.channels_last), labels


def loading_counts(args: argparse.Namespace) -> Counts:
    """Operators of a batch of training images, on average over an epoch and rounded up."""
    number = args.epoch_batches * args.batch_size
    pixels = torch.zeros(number, 3, args.image_size, args.image_size, dtype=torch.uint8)
    data = ImageTensors(pixels, torch.zeros(number, dtype=torch.long), ("only",))
    batches = TrainBatches(data, args.batch_size, MEAN, STD).to(torch.device("meta"))
    both = (
        count(lambda: list(batches), "meta"),
        count(lambda: list(plain_batches(batches.data, args.batch_size)), "meta"),
    )
    return {"loading and augmenting": tuple(math.ceil(operators / args.epoch_batches) for operators in both)}


def _rows(counted: Sequence[Counts]) -> list[list[str]]:
    rows = []
    for part in counted[0]:
        ours, theirs = zip(*(counts[part] for counts in counted), strict=True)
        ratio = f"{sum(theirs) / sum(ours):.2f}" if sum(ours) else ""
        rows.append([part, *(f"{np.mean(n):.0f} ({min(n)} - {max(n)})" for n in (ours, theirs)), ratio])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=[*SPACES, "both"], default="darts", help="(default: %(default)s)")
    parser.add_argument("--paths", type=int, default=20, help="paths, and candidates (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--num-cells", type=int, default=8, help="of the DARTS space (default: %(default)s)")
    parser.add_argument("--cells-per-stage", type=int, default=5, help="of NAS-Bench-201 (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epoch-batches", type=int, default=391, help="of loading (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.paths < 1:
        parser.error(f"--paths must be at least 1, got {args.paths}")
    print(f"{args}, torch {torch.__version__}")
    for name in SPACES if args.space == "both" else [args.space]:
        args.space = name
        header = [f"operators, mean (range), {SPACES[name].title}", "ours", "plain", "plain / ours"]
        counted = training_counts(args), scoring_counts(args), [loading_counts(args)]
        print_table(header, [row for counts in counted for row in _rows(counts)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
