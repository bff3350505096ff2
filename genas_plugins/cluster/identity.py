"""What a worker and a search must have in common for a score to mean the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from genas_plugins._messages import shown
from genas_plugins._version import __version__
from genas_plugins.experiment.resuming import state_digest
from genas_plugins.experiment.run_folder import TrainedRun

__all__ = ["StrangeWorkerError", "check_identity", "identity"]


class StrangeWorkerError(RuntimeError):
    """A worker would give other scores than the search."""


def identity(run: TrainedRun) -> dict[str, Any]:
    """The version of the package and hashes of weights and settings, as plain data."""
    settings = json.dumps([run.experiment.seed, dataclasses.asdict(run.experiment.score)], sort_keys=True)
    initial = None if run.initial is None else state_digest(run.initial)
    return {
        "version": __version__,
        "weights": state_digest(run.supernet.state_dict()),
        "initial": initial,
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
    }


def check_identity(own: Mapping[str, Any], told: Any, where: str) -> None:
    """Raise if a worker's identity is not that of the search.

    Args:
        own: The search's.
        told: What the worker says.
        where: The worker, for the message.

    Raises:
        StrangeWorkerError: The message says what differs and what to do.
    """
    told = told if isinstance(told, Mapping) else {}
    advice = {
        "version": "install the same there",
        "weights": "copy the run folder there anew",
        "initial": "copy the run folder there anew",
        "settings": "copy the run folder there anew",
    }
    what = {"version": "genas-plugins", "weights": "a supernet", "initial": "weights before training"}
    for key, value in own.items():
        if told.get(key) != value:
            name = what.get(key, "a seed and a score")
            raise StrangeWorkerError(
                f"The worker on {shown(where, 80)} has {name} {shown(told.get(key), 20)}, this search has "
                f"{shown(value, 20)}: {advice[key]}. Its scores are not used."
            )
