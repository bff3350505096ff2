"""The paper's search spaces as NNI model spaces, each its own weight-sharing supernet."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# NNI's one-shot module and its list of strategies import each other: entered through the former, the latter
# comes without the one-shot strategies, for the whole process.
import nni.nas.strategy  # noqa: F401
import torch
from nni.mutable import Categorical, CategoricalMultiple, label_scope
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.space import current_model
from torch import Tensor, nn

from genas_plugins.darts.genotype import NODES, OPERATIONS, Genotype, cell_edges
from genas_plugins.darts.network import CellNetwork, Stem
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.nasbench201 import (
    NasBench201Architecture,
    NasBench201Network,
    NasBench201SearchSpace,
    NasBench201SuperNet,
)
from genas_plugins.nasbench201 import architecture as cell201
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.spaces import DartsSearchSpace

__all__ = [
    "FROM_SAMPLE",
    "DartsSpace",
    "NasBench201Space",
    "SupernetSpace",
    "architecture_to_sample",
    "genotype_to_sample",
    "sample_to_architecture",
    "sample_to_genotype",
    "space_around",
]

_CELLS = ("normal", "reduce")
_CELL = "cell"
_EDGE_LABELS = tuple(f"{_CELL}/{source}_{node}" for source, node in cell201.EDGES)


def sample_to_genotype(sample: Mapping[str, Any]) -> Genotype:
    """Read an NNI sample of :class:`DartsSpace`.

    Raises:
        KeyError: A label is missing.
        ValueError: The sample is not a valid genotype.
    """
    cells = []
    for cell in _CELLS:
        pairs: list[tuple[str, int]] = []
        for node in NODES:
            inputs = sample[f"{cell}/inputs_{node}"]
            pairs += [(sample[f"{cell}/op_{node}_{position}"], int(source)) for position, source in enumerate(inputs)]
        cells.append(tuple(pairs))
    return Genotype(*cells)


def genotype_to_sample(genotype: Genotype) -> dict[str, Any]:
    """The NNI sample of a genotype: for each node its two inputs, in increasing order, and their operations."""
    sample: dict[str, Any] = {}
    for cell, gene in zip(_CELLS, (genotype.normal, genotype.reduce), strict=True):
        for node in NODES:
            edges = sorted((source, name) for target, name, source in cell_edges(gene) if target == node)
            sample[f"{cell}/inputs_{node}"] = [source for source, _ in edges]
            sample.update({f"{cell}/op_{node}_{position}": name for position, (_, name) in enumerate(edges)})
    return sample


def sample_to_architecture(sample: Mapping[str, Any]) -> NasBench201Architecture:
    """Read an NNI sample of :class:`NasBench201Space`.

    Raises:
        KeyError: A label is missing.
        ValueError: An unknown operation.
    """
    return NasBench201Architecture(tuple(sample[label] for label in _EDGE_LABELS))


def architecture_to_sample(architecture: NasBench201Architecture) -> dict[str, Any]:
    """The NNI sample of an architecture: the operation of each edge."""
    return dict(zip(_EDGE_LABELS, architecture.operations, strict=True))


FROM_SAMPLE = {Genotype: sample_to_genotype, NasBench201Architecture: sample_to_architecture}
"""How NNI's samples are read, by the type of the candidates."""


def _darts_choices() -> Iterable[Categorical | CategoricalMultiple]:
    for cell in _CELLS:
        with label_scope(cell):
            for node in NODES:
                yield CategoricalMultiple(range(node), n_chosen=2, label=f"inputs_{node}")
                for position in range(2):
                    yield Categorical(OPERATIONS[1:], label=f"op_{node}_{position}")


def _nasbench201_choices() -> Iterable[Categorical]:
    with label_scope(_CELL):
        for source, node in cell201.EDGES:
            yield Categorical(cell201.OPERATIONS, label=f"{source}_{node}")


class _SuperNetModule(BaseSuperNetModule):
    """A supernet behind NNI's protocol: it resamples a path, and runs the one that was sampled last."""

    def __init__(
        self,
        supernet: Any,
        choices: Iterable[Categorical | CategoricalMultiple],
        from_sample: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        super().__init__()
        self.supernet = supernet
        for choice in choices:
            self.add_mutable(choice)
        self._from_sample = from_sample
        self._candidate = from_sample({mutable.label: mutable.default() for mutable in self.mutables})

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        # NNI's own strategies draw from Python's global generator; GeNAS passes a complete memo.
        drawn: dict[str, Any] = {}
        for mutable in self.mutables:
            if mutable.label not in memo:
                values = list(mutable.values)
                multiple = isinstance(mutable, CategoricalMultiple)
                drawn[mutable.label] = sorted(random.sample(values, 2)) if multiple else random.choice(values)
        self._candidate = self._from_sample({**memo, **drawn})
        return drawn

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        return self.resample(memo)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        return copy.deepcopy(self.supernet.subnet(self._from_sample(sample)))

    def forward(self, x: Tensor) -> Tensor:
        return self.supernet(x, self._candidate)


class SupernetSpace(ModelSpace, disable_init_wrapper=True):
    """A space that is its own supernet, so that a one-shot strategy needs no conversion.

    Its candidates are those of :attr:`search_space`, of the type :attr:`candidate`; they are measured as subnets.
    """

    network: nn.Module
    candidate: type
    _measured: SubnetPaths | None = None

    @property
    def supernet(self) -> Any:
        """The weight-sharing supernet.

        Raises:
            AttributeError: The space is frozen.
        """
        return self.network.supernet

    @property
    def search_space(self) -> Any:
        """How the evolution samples, mutates and crosses."""
        raise NotImplementedError

    def to_sample(self, candidate: Any) -> dict[str, Any]:
        """The NNI sample of a candidate of :attr:`search_space`."""
        raise NotImplementedError

    def from_sample(self, sample: Mapping[str, Any]) -> Any:
        """The inverse of :meth:`to_sample`.

        Raises:
            KeyError: A label is missing.
            ValueError: Not a candidate of the space.
        """
        raise NotImplementedError

    def extra_oneshot_hooks(self, strategy: Any) -> list[Callable[..., bool]]:
        """For NNI's one-shot strategies: keep the supernet as it is, and do not look inside."""
        return [lambda module, name, memo, kwargs: isinstance(module, _SuperNetModule)]

    def subnet(self, candidate: Any) -> nn.Module:
        """One path as a small module that shares the supernet's parameters and owns its buffers.

        Raises:
            TypeError: ``candidate`` is of another space.
        """
        if not isinstance(candidate, self.candidate):
            raise TypeError(f"{type(self).__name__} has a {self.candidate.__name__}, got {candidate!r}.")
        return self.supernet.subnet(candidate)

    def path_modules(self) -> Iterable[nn.Module]:
        """What the path that was sampled last runs, as modules that share no parameter with one another."""
        network = self.network
        return network.supernet.path_modules(network._candidate) if isinstance(network, _SuperNetModule) else [network]

    def angle(self, initial: Mapping[str, Tensor], candidate: Any) -> float:
        """Angle to the initial weights as a fraction of pi.

        Args:
            initial: The parameters before training by name; an earlier ``state_dict()`` will do.
            candidate: The architecture.

        Raises:
            ValueError: ``initial`` lacks a parameter.
        """
        if self._measured is None or self._measured.initial is not initial:
            self._measured = SubnetPaths(self.supernet, initial)
        return self._measured.angle(candidate)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """One path with a copy of the supernet's trained weights."""
        self.validate(sample)
        return self.network.freeze(sample)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)`` along the path sampled last."""
        return self.network(x)


class DartsSpace(SupernetSpace):
    """Exactly the space of the paper: every node takes two *distinct* inputs, each through one of seven operations.

    (NNI hub's ``DARTS`` lets a node take one input twice.) Labels are ``{normal,reduce}/inputs_{2..5}``, a pair
    of inputs, and ``{normal,reduce}/op_{2..5}_{0,1}``, the operations on them.

    The space is its own supernet, so a one-shot strategy needs no conversion. Under NNI's model context
    (multi-trial strategies, ``frozen_factory``) it is the fixed :class:`~genas_plugins.CellNetwork` instead,
    with fresh weights and, as in the paper's retraining, without normalisation after pooling.

    Args:
        num_classes: Outputs of the classifier.
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack.
        stem: ``"cifar"`` or ``"imagenet"``.

    Raises:
        ValueError: See :func:`genas_plugins.darts.network.cell_shapes`.
    """

    candidate = Genotype

    def __init__(
        self, num_classes: int = 10, init_channels: int = 16, num_cells: int = 8, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        sample = current_model()
        if sample is None:
            supernet = SuperNet(num_classes, init_channels, num_cells, stem)
            self.network = _SuperNetModule(supernet, _darts_choices(), sample_to_genotype)
        else:
            genotype = sample_to_genotype(sample)
            self.network = CellNetwork(genotype, init_channels, num_cells, num_classes, stem)

    @property
    def search_space(self) -> DartsSearchSpace:
        """How the evolution samples, mutates and crosses; its candidates are genotypes."""
        return DartsSearchSpace()

    def to_sample(self, candidate: Genotype) -> dict[str, Any]:
        """The NNI sample of a genotype."""
        return genotype_to_sample(candidate)

    def from_sample(self, sample: Mapping[str, Any]) -> Genotype:
        """See :func:`sample_to_genotype`."""
        return sample_to_genotype(sample)


class NasBench201Space(SupernetSpace):
    """The NAS-Bench-201 space (Dong and Yang, ICLR 2020): six edges, five operations on each.

    Labels are those of NNI hub's space of the same name, ``cell/0_1`` to ``cell/2_3``; operations have the benchmark's
    names. Under NNI's model context it is one fixed network with fresh weights.

    Args:
        num_classes: Outputs of the classifier.
        init_channels: C, channels of the first stage; the benchmark has 16.
        cells_per_stage: N, cells in each of the three stages; the benchmark has 5.
        affine: Whether batch normalisation in the supernet's cells has weight and bias.

    Raises:
        ValueError: A number is below 1.
    """

    candidate = NasBench201Architecture

    def __init__(
        self, num_classes: int = 10, init_channels: int = 16, cells_per_stage: int = 5, affine: bool = True
    ) -> None:
        super().__init__()
        sample = current_model()
        if sample is None:
            supernet = NasBench201SuperNet(init_channels, cells_per_stage, num_classes, affine)
            self.network = _SuperNetModule(supernet, _nasbench201_choices(), sample_to_architecture)
        else:
            architecture = sample_to_architecture(sample)
            self.network = NasBench201Network(architecture, init_channels, cells_per_stage, num_classes)

    @property
    def search_space(self) -> NasBench201SearchSpace:
        """How the evolution samples, mutates and crosses; its candidates are architectures."""
        return NasBench201SearchSpace()

    def to_sample(self, candidate: NasBench201Architecture) -> dict[str, Any]:
        """The NNI sample of an architecture."""
        return architecture_to_sample(candidate)

    def from_sample(self, sample: Mapping[str, Any]) -> NasBench201Architecture:
        """See :func:`sample_to_architecture`."""
        return sample_to_architecture(sample)


def space_around(supernet: SuperNet | NasBench201SuperNet) -> SupernetSpace:
    """The space of a supernet, with a copy of its weights, in their type."""
    kind = NasBench201Space if isinstance(supernet, NasBench201SuperNet) else DartsSpace
    # Its own first weights are not kept: nobody else's draws may depend on them.
    with torch.random.fork_rng(devices=[]):
        # In the type of its weights: a run in float64 is scored in float64.
        space = kind(**supernet.arguments).to(next(supernet.parameters()).dtype)
    space.supernet.load_state_dict(supernet.state_dict())
    return space
