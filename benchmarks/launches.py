"""How many operators a training step and a batch of scoring start, ours against the plain way.

A GPU takes some microseconds to start an operator. At the batch of 64 of the supernet's training it computes for less
than that, so that a step takes what its operators take to start. They are counted on the meta device, where nothing is
computed and every layer takes the way that it takes on a GPU; no GPU is needed::

    python benchmarks/launches.py

Counted is what computes: not views, and not memory that is set aside. One that moves a list of tensors counts once for
every 64 of them, the number that PyTorch's multi-tensor kernels take. Training is counted as it is after the first
steps, when every weight has a momentum; loading and augmenting images are left out, in both arms:

* ours: the forward pass of ``SupernetModule``, with what catches up the path's weights, backward, clipping and
  ``PathSGD``;
* plain: that of ``benchmarks/training.py``, with gradients of zero for what is not sampled, and ``torch.optim.SGD``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# The neighbouring scripts: running this one puts their folder on the path.
from scoring import CLASSES, print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import CLIP, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, plain_forward

from genas_plugins import Genotype, SuperNet
from genas_plugins.scoring.inference import InferenceNetwork
from genas_plugins.spaces import DartsSearchSpace
from nni_strategy import DartsSpace
from nni_strategy.training import SupernetModule

__all__ = ["Launches", "count", "main", "scoring_counts", "training_counts"]

TENSORS_A_LAUNCH = 64
_FREE = ("alias", "detach", "empty", "lift_fresh", "new_empty", "_record_function")

Counts = dict[str, tuple[int, int]]


class Launches(TorchDispatchMode):
    """Counts the operators that compute something while it is active.

    Attributes:
        number: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(_FREE):
            self.number += math.ceil(len(arguments[0]) / TENSORS_A_LAUNCH) if name.startswith("_foreach") else 1
        return function(*arguments, **(keywords or {}))


def count(function: Callable[[], Any]) -> int:
    """Operators of one call."""
    with Launches() as launches:
        function()
    return launches.number


def _clip(parameters: Sequence[Tensor]) -> None:
    """``clip_grad_norm_`` as it is on a GPU; on the meta device it would go tensor by tensor."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))


def _supernet(args: argparse.Namespace) -> SuperNet:
    with torch.device("meta"):
        return SuperNet(CLASSES, args.init_channels, args.num_cells).train()


def _images(size: int, args: argparse.Namespace) -> Tensor:
    return torch.empty(size, 3, args.image_size, args.image_size, device="meta")


def training_counts(args: argparse.Namespace) -> list[Counts]:
    """Operators of ours and of the plain loop, by part of the step, for each sampled path."""
    with torch.device("meta"):
        ours = DartsSpace(CLASSES, args.init_channels, args.num_cells)
    module = SupernetModule(1, learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY).train()
    module.set_model(ours)
    own = module.configure_optimizers()["optimizer"]
    plain = _supernet(args)
    sgd = torch.optim.SGD(plain.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=True)
    for optimizer in (own, sgd):
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images, labels = _images(args.batch_size, args), torch.empty(args.batch_size, dtype=torch.long, device="meta")
    rng = np.random.default_rng(args.seed)
    space = DartsSearchSpace()
    losses: list[Tensor] = []

    def our_forward(path: Genotype) -> None:
        ours.network.resample(ours.to_sample(path))
        losses.append(F.cross_entropy(module(images), labels))

    def our_update() -> None:
        _clip([parameter for parameter in ours.parameters() if parameter.grad is not None])
        own.step()

    def plain_update() -> None:
        _clip(list(plain.parameters()))
        sgd.step()

    steps = []
    for path in (space.sample(rng) for _ in range(args.paths)):
        counts = {
            "zeroing": (count(own.zero_grad), count(lambda: sgd.zero_grad(set_to_none=False))),
            "forward": (
                count(lambda path=path: our_forward(path)),
                count(lambda path=path: losses.append(F.cross_entropy(plain_forward(plain, images, path), labels))),
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
    supernet, images = _supernet(args), _images(args.batch_size, args)
    rng = np.random.default_rng(args.seed)
    space = DartsSearchSpace()
    candidates = []
    for genotype in (space.sample(rng) for _ in range(args.paths)):
        subnet = supernet.subnet(genotype)
        network = InferenceNetwork(subnet.eval())
        evaluation = count(lambda network=network: network(images)), count(lambda subnet=subnet: subnet(images))
        calibration = count(lambda network=network: network.calibrate(images, 0.1))
        subnet.train()
        candidates.append(
            {
                "a batch of recalibration": (calibration, count(lambda subnet=subnet: subnet(images))),
                "a batch of validation": evaluation,
            }
        )
    return candidates


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
    parser.add_argument("--paths", type=int, default=20, help="paths, and candidates (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--num-cells", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.paths < 1:
        parser.error(f"--paths must be at least 1, got {args.paths}")
    print(f"{args}, torch {torch.__version__}")
    header = ["operators, mean (range)", "ours", "plain", "plain / ours"]
    print_table(header, [*_rows(training_counts(args)), *_rows(scoring_counts(args))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
