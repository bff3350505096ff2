"""The search space of NAS-Bench-201: sampling, mutation and crossover."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from genas_plugins.nasbench201.architecture import EDGES, OPERATIONS, NasBench201Architecture
from genas_plugins.neighbourhood import Neighbourhood, Parts

if TYPE_CHECKING:
    from genas_plugins.counting import Size
    from genas_plugins.nasbench201.networks import NasBench201Network, NasBench201SuperNet

__all__ = ["NasBench201SearchSpace"]


_LABELS = tuple(f"cell/{source}_{node}" for source, node in EDGES)


class NasBench201SearchSpace:
    """Sampling, mutation and crossover of architectures. All randomness comes from the generator passed in.

    Example:
        >>> import numpy as np
        >>> from genas_plugins.nasbench201 import NasBench201SearchSpace
        >>> space = NasBench201SearchSpace()
        >>> architecture = space.sample(np.random.default_rng(0))
        >>> space.size, len(list(space.neighbours(architecture)))
        (15625, 24)
    """

    candidate = NasBench201Architecture
    choices = dict.fromkeys(_LABELS, (OPERATIONS, 1))
    trained = MappingProxyType({"init_channels": 16, "cells_per_stage": 5, "image_size": 32})
    """Sizes of the benchmark's networks."""

    @property
    def supernet_type(self) -> type[NasBench201SuperNet]:
        """Class of the supernet."""
        from genas_plugins.nasbench201.networks import NasBench201SuperNet

        return NasBench201SuperNet

    @property
    def size(self) -> int:
        """Number of architectures: 5 operations to the power of 6 edges, 15,625."""
        return len(OPERATIONS) ** len(EDGES)

    def architectures(self) -> Iterator[NasBench201Architecture]:
        """All architectures, in the order of their index."""
        for operations in itertools.product(OPERATIONS, repeat=len(EDGES)):
            yield NasBench201Architecture(operations)

    def sample(self, rng: np.random.Generator) -> NasBench201Architecture:
        """Draw uniformly; unconnected cells are part of the space."""
        return NasBench201Architecture(tuple(OPERATIONS[n] for n in rng.integers(len(OPERATIONS), size=len(EDGES))))

    def mutate(
        self, architecture: NasBench201Architecture, probability: float, rng: np.random.Generator
    ) -> NasBench201Architecture:
        """Redraw each of the six edges with ``probability``, from all five operations."""
        operations = list(architecture.operations)
        for edge in range(len(EDGES)):
            if rng.random() < probability:
                operations[edge] = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        return NasBench201Architecture(tuple(operations))

    def crossover(
        self, first: NasBench201Architecture, second: NasBench201Architecture, rng: np.random.Generator
    ) -> NasBench201Architecture:
        """Take each edge from either parent with equal chance."""
        triples = zip(first.operations, second.operations, rng.random(len(EDGES)) < 0.5, strict=True)
        return NasBench201Architecture(tuple(a if pick else b for a, b, pick in triples))

    def neighbours(self, architecture: NasBench201Architecture) -> Iterator[NasBench201Architecture]:
        """The 24 architectures that differ in the operation of one edge."""
        return iter(Neighbourhood(self, architecture))

    def parts(self, architecture: NasBench201Architecture, inputs: bool = False) -> Parts[NasBench201Architecture]:
        """The six edges and their operations (:mod:`genas_plugins.neighbourhood`); no input can be moved."""
        states = [((own,), [other for other in OPERATIONS if other != own]) for own in architecture.operations]
        return Parts(states, lambda chosen: NasBench201Architecture(tuple(chosen)))

    def distance(self, first: NasBench201Architecture, second: NasBench201Architecture) -> int:
        """Number of edges whose operations differ."""
        return sum(a != b for a, b in zip(first.operations, second.operations, strict=True))

    def to_json(self, architecture: NasBench201Architecture) -> str:
        """The benchmark's string, for a history or a state."""
        return str(architecture)

    def from_json(self, data: Any) -> NasBench201Architecture:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: Not an architecture of this space.
            TypeError: Not a string.
        """
        return NasBench201Architecture.from_string(data)

    def to_sample(self, architecture: NasBench201Architecture) -> dict[str, Any]:
        """The operation of each edge, by the labels of NNI's space."""
        return dict(zip(_LABELS, architecture.operations, strict=True))

    def from_sample(self, sample: Mapping[str, Any]) -> NasBench201Architecture:
        """The inverse of :meth:`to_sample`.

        Raises:
            KeyError: A label is missing.
            ValueError: An unknown operation.
        """
        return NasBench201Architecture(tuple(sample[label] for label in _LABELS))

    def read(self, text: str) -> NasBench201Architecture:
        """Read the benchmark's string."""
        return NasBench201Architecture.from_string(text)

    def supernet_arguments(self, num_classes: int, settings: Any) -> dict[str, Any]:
        """Arguments of :class:`NasBench201SuperNet` from the section ``space`` of an experiment.

        Raises:
            ValueError: See :func:`genas_plugins.nasbench201.check_sizes`.
        """
        from genas_plugins.nasbench201.networks import check_sizes

        check_sizes(settings.init_channels, settings.cells_per_stage)
        names = ("init_channels", "cells_per_stage", "affine")
        return {"num_classes": num_classes, **{name: getattr(settings, name) for name in names}}

    def network(self, architecture: NasBench201Architecture, arguments: Mapping[str, Any]) -> NasBench201Network:
        """A network with fresh weights."""
        from genas_plugins.nasbench201.networks import NasBench201Network

        return NasBench201Network(architecture, **{name: arguments[name] for name in arguments if name != "affine"})

    def costs(
        self, architecture: NasBench201Architecture, arguments: Mapping[str, Any], image_size: Size
    ) -> tuple[int, int]:
        """Parameters and multiply-adds of :meth:`network`, without building it.

        The multiply-adds are those of :func:`genas_plugins.counting.count_macs`; the benchmark's FLOPs add the
        classifier's bias.
        """
        from genas_plugins.nasbench201.costs import nasbench201_costs

        sizes = {name: arguments[name] for name in ("init_channels", "cells_per_stage", "num_classes")}
        costs = nasbench201_costs(architecture, **sizes, image_size=image_size)
        return costs.parameters, costs.flops - arguments["num_classes"]
