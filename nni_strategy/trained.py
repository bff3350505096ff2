"""Trained supernets of NNI spaces: a scorer around a mutated space, and checkpoints of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni.nas.nn.pytorch import ModelSpace
from torch import Tensor

from genas_plugins._messages import listed
from genas_plugins.checkpoints import CheckpointError, read_state, unwrapped
from genas_plugins.datasets import SearchData
from genas_plugins.experiment.run_folder import load_data, save_trained
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import CombinedScore
from nni_strategy.samples import SupernetPaths

__all__ = ["TrainedSupernet", "load_data", "load_space_weights", "save_trained", "scorer_of"]

TrainedSupernet = Scorer
"""The name that it had here first."""


def scorer_of(
    space: ModelSpace,
    data: SearchData,
    score: CombinedScore,
    *,
    initial: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Scorer:
    """Score paths of a mutated space.

    Args:
        space: With trained weights.
        data: Images to recalibrate and score on.
        score: The metric.
        initial: The space's parameters before training by name, for the angle.
        **settings: See :meth:`genas_plugins.experiment.scorer.Scorer.on_data`.

    Raises:
        TypeError: A number is not whole.
        ValueError: A setting is out of its range, or supernet and images have different numbers of classes.
    """
    return Scorer.on_data(SupernetPaths(space, initial), data, score, **settings)


def load_space_weights(space: ModelSpace, path: str | Path) -> None:
    """Load a checkpoint of a mutated space: its state dict, or Lightning's file of a one-shot training.

    Raises:
        CheckpointError: The names do not fit the space.
    """
    state = read_state(path)
    wanted = space.state_dict()
    first = next(iter(wanted))
    # As it is, for a space that has such names itself; and without what wrappers add.
    for tensors in (state, unwrapped(state)):
        prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
        named = {name.removeprefix(prefix): value for name, value in tensors.items()}
        if named.keys() == wanted.keys():
            break
    missing, left_over = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
    if missing or left_over:
        raise CheckpointError(
            f"{path} does not fit {type(space).__name__}: {len(missing)} tensors are missing "
            f"({listed(missing, 3)}), {len(left_over)} left over ({listed(left_over, 3)})."
        )
    space.load_state_dict(named)
