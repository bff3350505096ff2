"""Search spaces by name: those of this package, and those that others register.

A package registers a space by an entry point of the group ``genas_plugins.spaces``, whose name is that in
``space.name`` of an experiment and whose value is a class with the methods of :class:`Space`. CONTRIBUTING.md has one
in a single file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import nn

from genas_plugins import _plugins
from genas_plugins._messages import shown, suggestion
from genas_plugins.darts.space import DartsSearchSpace
from genas_plugins.nasbench201.architecture import NasBench201Architecture
from genas_plugins.nasbench201.space import NasBench201SearchSpace

__all__ = [
    "GROUP",
    "OWN_SPACES",
    "DartsSearchSpace",
    "NasBench201Architecture",
    "NasBench201SearchSpace",
    "Space",
    "find_space",
    "registered_spaces",
]

GROUP = "genas_plugins.spaces"
"""Group of the entry points."""

_OWN = {
    name: EntryPoint(name, place, GROUP)
    for name, place in (
        ("darts", "genas_plugins.darts.space:DartsSearchSpace"),
        ("nasbench201", "genas_plugins.nasbench201.space:NasBench201SearchSpace"),
    )
}
OWN_SPACES = tuple(_OWN)
"""Names of this package's."""

Candidate = TypeVar("Candidate")


class Space(Protocol[Candidate]):
    """All that the package needs of a space. Candidates are hashable; all randomness comes from ``rng``.

    The supernet has the methods of :class:`genas_plugins.scoring.paths.Supernet`. If its subnets have a method
    ``inference``, they are rewritten for scoring (:class:`genas_plugins.scoring.inference.InferenceNetwork`). A space
    may have a method ``costs(candidate, arguments, image_size)``, the parameters and multiply-adds of :meth:`network`
    without building it, and a mapping ``trained``, the sizes of the network that is trained after a search.

    Attributes:
        candidate: Type of the architectures.
        supernet_type: Class of the supernet.
        choices: The decisions of an architecture, as in NNI's samples: by label the values, and how many of them are
            chosen; above 1 they are distinct and in increasing order.
    """

    candidate: type
    choices: Mapping[str, tuple[tuple[Any, ...], int]]

    @property
    def supernet_type(self) -> type[nn.Module]: ...

    def sample(self, rng: np.random.Generator) -> Candidate: ...

    def mutate(self, candidate: Candidate, probability: float, rng: np.random.Generator) -> Candidate: ...

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate: ...

    def to_json(self, candidate: Candidate) -> Any:
        """Plain data for a history or a state."""

    def from_json(self, data: Any) -> Candidate: ...

    def to_sample(self, candidate: Candidate) -> dict[str, Any]:
        """What is chosen, by the labels of :attr:`choices`."""

    def from_sample(self, sample: Mapping[str, Any]) -> Candidate: ...

    def read(self, text: str) -> Candidate:
        """An architecture of the command line; a ValueError or TypeError refuses the text."""

    def supernet_arguments(self, num_classes: int, settings: Any) -> dict[str, Any]:
        """The supernet's arguments, from the section ``space`` of an experiment; a ValueError refuses it."""

    def network(self, candidate: Candidate, arguments: Mapping[str, Any]) -> nn.Module:
        """One architecture as a network with fresh weights, of the size that the supernet's arguments give."""


def registered_spaces() -> dict[str, EntryPoint]:
    """The entry points of all spaces by name; a registered one cannot take the name of one of this package."""
    return _plugins.registered(GROUP) | _OWN


def find_space(name: str) -> Any:
    """The space of a name.

    >>> find_space("nasbench201").size
    15625

    Raises:
        ValueError: There is none; the message has those that there are.
        ImportError: It cannot be loaded.
    """
    # For our own nothing that is installed is looked through.
    known = _OWN if name in _OWN else registered_spaces()
    if name not in known:
        near = suggestion(name, known)
        raise ValueError(f"There is no space {shown(name)}{near}; there are: {', '.join(known)}.")
    return _plugins.load(known[name])()
