"""The package's search spaces as NNI model spaces, each its own weight-sharing supernet."""

from __future__ import annotations

import contextlib
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
from nni.nas.strategy import DARTS, Proxyless
from torch import Tensor, nn

from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import Stem
from genas_plugins.nasbench201 import (
    NasBench201Architecture,
    NasBench201SearchSpace,
)
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.spaces import DartsSearchSpace

__all__ = [
    "DartsSpace",
    "NasBench201Space",
    "SupernetSpace",
    "architecture_to_sample",
    "genotype_to_sample",
    "sample_to_architecture",
    "sample_to_genotype",
    "space_around",
    "space_of",
]


def sample_to_genotype(sample: Mapping[str, Any]) -> Genotype:
    """Read an NNI sample of :class:`DartsSpace`; see :meth:`genas_plugins.spaces.DartsSearchSpace.from_sample`."""
    return DartsSearchSpace().from_sample(sample)


def genotype_to_sample(genotype: Genotype) -> dict[str, Any]:
    """The NNI sample of a genotype: for each node its two inputs, in increasing order, and their operations."""
    return DartsSearchSpace().to_sample(genotype)


def sample_to_architecture(sample: Mapping[str, Any]) -> NasBench201Architecture:
    """Read an NNI sample of :class:`NasBench201Space`; a KeyError or ValueError refuses it."""
    return NasBench201SearchSpace().from_sample(sample)


def architecture_to_sample(architecture: NasBench201Architecture) -> dict[str, Any]:
    """The NNI sample of an architecture: the operation of each edge."""
    return NasBench201SearchSpace().to_sample(architecture)


def _mutables(choices: Mapping[str, tuple[tuple[Any, ...], int]]) -> Iterable[Categorical | CategoricalMultiple]:
    """NNI's decisions for those of a space; what stands before a slash in a label is a scope of NNI's."""
    for label, (values, count) in choices.items():
        *scopes, name = label.split("/")
        with contextlib.ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(label_scope(scope))
            yield (
                Categorical(values, label=name)
                if count == 1
                else CategoricalMultiple(values, n_chosen=count, label=name)
            )


class _SuperNetModule(BaseSuperNetModule):
    """A supernet behind NNI's protocol: it resamples a path, and runs the one that was sampled last."""

    def __init__(self, supernet: Any) -> None:
        super().__init__()
        self.supernet = supernet
        for choice in _mutables(supernet.search_space.choices):
            self.add_mutable(choice)
        self._from_sample = supernet.search_space.from_sample
        self._candidate = self._from_sample({mutable.label: mutable.default() for mutable in self.mutables})

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

    def path_modules(self) -> Iterable[nn.Module]:
        """What :meth:`forward` runs, as modules that share no parameter with one another."""
        return self.supernet.path_modules(self._candidate)

    def forward(self, x: Tensor) -> Tensor:
        return self.supernet(x, self._candidate)


class SupernetSpace(ModelSpace, disable_init_wrapper=True):
    """A space of :mod:`genas_plugins.spaces`, which is its own supernet: a one-shot strategy needs no conversion.

    Its candidates are measured as subnets. Under NNI's model context (multi-trial strategies, ``frozen_factory``) it is
    the fixed network of the sample instead, with fresh weights.

    Args:
        space: What is searched.
        arguments: The supernet's.
    """

    network: nn.Module
    _measured: SubnetPaths | None = None

    def __init__(self, space: Any, **arguments: Any) -> None:
        super().__init__()
        self._space = space
        sample = current_model()
        if sample is None:
            self.network = _SuperNetModule(space.supernet_type(**arguments))
        else:
            self.network = space.network(space.from_sample(sample), arguments)

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
        return self._space

    def to_sample(self, candidate: Any) -> dict[str, Any]:
        """The NNI sample of a candidate of :attr:`search_space`."""
        return self._space.to_sample(candidate)

    def from_sample(self, sample: Mapping[str, Any]) -> Any:
        """The inverse of :meth:`to_sample`.

        Raises:
            KeyError: A label is missing.
            ValueError: Not a candidate of the space.
        """
        return self._space.from_sample(sample)

    def extra_oneshot_hooks(self, strategy: Any) -> list[Callable[..., bool]]:
        """For NNI's one-shot strategies: keep the supernet as it is, and do not look inside.

        Differentiable ones (NNI's DARTS and GumbelDARTS, :class:`nni_strategy.NADarts`) get the mixture of all paths,
        a :class:`nni_strategy.relaxed.RelaxedSuperNet`.
        """
        from nni_strategy.relaxed import RelaxedSuperNet

        if isinstance(strategy, DARTS) and not isinstance(strategy, Proxyless):
            return [RelaxedSuperNet.mutate]
        return [lambda module, name, memo, kwargs: isinstance(module, _SuperNetModule)]

    def subnet(self, candidate: Any) -> nn.Module:
        """One path as a small module that shares the supernet's parameters and owns its buffers.

        Raises:
            TypeError: ``candidate`` is of another space.
        """
        wanted = self._space.candidate
        if not isinstance(candidate, wanted):
            raise TypeError(f"{type(self).__name__} has a {wanted.__name__}, got {candidate!r}.")
        return self.supernet.subnet(candidate)

    def path_modules(self) -> Iterable[nn.Module]:
        """What the path that was sampled last runs, as modules that share no parameter with one another."""
        network = self.network
        return network.path_modules() if isinstance(network, _SuperNetModule) else [network]

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

    Under NNI's model context it is the fixed :class:`~genas_plugins.CellNetwork`, as in the paper's retraining without
    normalisation after pooling.

    >>> sorted(DartsSpace(num_classes=10, init_channels=4, num_cells=2).simplify())[:2]
    ['normal/inputs_2', 'normal/inputs_3']

    Args:
        num_classes: Outputs of the classifier.
        init_channels: C, channels of the first cells; even.
        num_cells: Cells in the stack.
        stem: ``"cifar"`` or ``"imagenet"``.

    Raises:
        ValueError: See :func:`genas_plugins.darts.network.cell_shapes`.
    """

    def __init__(
        self, num_classes: int = 10, init_channels: int = 16, num_cells: int = 8, stem: Stem = "cifar"
    ) -> None:
        sizes = {"num_classes": num_classes, "init_channels": init_channels, "num_cells": num_cells, "stem": stem}
        super().__init__(DartsSearchSpace(), **sizes)


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

    def __init__(
        self, num_classes: int = 10, init_channels: int = 16, cells_per_stage: int = 5, affine: bool = True
    ) -> None:
        sizes = {"num_classes": num_classes, "init_channels": init_channels}
        super().__init__(NasBench201SearchSpace(), **sizes, cells_per_stage=cells_per_stage, affine=affine)


class RegisteredSpace(SupernetSpace):
    """A space that another package has registered (:mod:`genas_plugins.spaces`)."""

    def __init__(self, space: Any, **arguments: Any) -> None:
        super().__init__(space, **arguments)


def space_of(space: Any, arguments: Mapping[str, Any]) -> SupernetSpace:
    """The NNI space of one of :mod:`genas_plugins.spaces`.

    Args:
        space: What is searched.
        arguments: The supernet's.
    """
    own = {DartsSearchSpace: DartsSpace, NasBench201SearchSpace: NasBench201Space}.get(type(space))
    return RegisteredSpace(space, **arguments) if own is None else own(**arguments)


def space_around(supernet: Any) -> SupernetSpace:
    """The space of a supernet, with a copy of its weights, in their type."""
    # Its own first weights are not kept: nobody else's draws may depend on them.
    with torch.random.fork_rng(devices=[]):
        # In the type of its weights: a run in float64 is scored in float64.
        space = space_of(supernet.search_space, supernet.arguments).to(next(supernet.parameters()).dtype)
    space.supernet.load_state_dict(supernet.state_dict())
    return space
