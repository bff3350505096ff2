"""The processes of one training, whether ``torchrun`` started them or there is only one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm import utils

from timm_models.settings import SettingsError

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those of a training.

    Attributes:
        device: Device of this process.
        rank: Rank of this process, from 0.
        count: Number of processes.
        distributed: Whether there is more than one process.
    """

    device: torch.device
    rank: int
    count: int
    distributed: bool

    @property
    def primary(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the process group that ``torchrun`` announces, or form one alone; leave it at the end."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device is {wanted}, but torch sees no CUDA device: use --device cpu.")
    options = Namespace(device=wanted)
    found = utils.init_distributed_device(options)
    if not options.distributed:
        # A group of one, so that images come in the same order as with any number of processes.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(found, options.rank, options.world_size, options.distributed)
    finally:
        dist.destroy_process_group()
