"""The paper's search space as an NNI model space."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
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

from genas_plugins.genotype import NODES, OPERATIONS, Genotype, cell_edges
from genas_plugins.network import CellNetwork, Stem
from genas_plugins.scoring import angle
from genas_plugins.spaces import DartsSearchSpace
from genas_plugins.supernet import SubNet, SuperNet

__all__ = ["DartsSpace", "genotype_to_sample", "sample_to_genotype"]

_CELLS = ("normal", "reduce")


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


class _DartsSuperNet(BaseSuperNetModule):
    """The supernet behind NNI's protocol: it resamples a path, and runs the one that was sampled last."""

    def __init__(self, supernet: SuperNet) -> None:
        super().__init__()
        self.supernet = supernet
        for cell in _CELLS:
            with label_scope(cell):
                for node in NODES:
                    self.add_mutable(CategoricalMultiple(range(node), n_chosen=2, label=f"inputs_{node}"))
                    for position in range(2):
                        self.add_mutable(Categorical(OPERATIONS[1:], label=f"op_{node}_{position}"))
        self._genotype = sample_to_genotype({mutable.label: mutable.default() for mutable in self.mutables})

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        # NNI's own strategies draw from Python's global generator; GeNAS passes a complete memo.
        drawn: dict[str, Any] = {}
        for mutable in self.mutables:
            if mutable.label not in memo:
                values = list(mutable.values)
                multiple = isinstance(mutable, CategoricalMultiple)
                drawn[mutable.label] = sorted(random.sample(values, 2)) if multiple else random.choice(values)
        self._genotype = sample_to_genotype({**memo, **drawn})
        return drawn

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        return self.resample(memo)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        return copy.deepcopy(self.supernet.subnet(sample_to_genotype(sample)))

    def forward(self, x: Tensor) -> Tensor:
        return self.supernet(x, self._genotype)


class DartsSpace(ModelSpace):
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
        ValueError: See :func:`genas_plugins.network.cell_shapes`.
    """

    def __init__(
        self, num_classes: int = 10, init_channels: int = 16, num_cells: int = 8, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        sample = current_model()
        if sample is None:
            self.network: nn.Module = _DartsSuperNet(SuperNet(num_classes, init_channels, num_cells, stem))
        else:
            genotype = sample_to_genotype(sample)
            self.network = CellNetwork(genotype, init_channels, num_cells, num_classes, stem)
        self._before: tuple[Mapping[str, Tensor], torch.device, SuperNet] | None = None

    @property
    def supernet(self) -> SuperNet:
        """The weight-sharing supernet.

        Raises:
            AttributeError: The space is frozen.
        """
        return self.network.supernet

    @property
    def search_space(self) -> DartsSearchSpace:
        """How the evolution samples, mutates and crosses; its candidates are genotypes."""
        return DartsSearchSpace()

    def extra_oneshot_hooks(self, strategy: Any) -> list[Callable[..., bool]]:
        """For NNI's one-shot strategies: keep the supernet as it is, and do not look inside."""
        return [lambda module, name, memo, kwargs: isinstance(module, _DartsSuperNet)]

    def to_sample(self, candidate: Genotype) -> dict[str, Any]:
        """The NNI sample of a candidate of :attr:`search_space`."""
        return genotype_to_sample(candidate)

    def subnet(self, candidate: Genotype) -> SubNet:
        """One path as a small module that shares the supernet's parameters and owns its buffers."""
        return self.supernet.subnet(candidate)

    def angle(self, initial: Mapping[str, Tensor], candidate: Genotype) -> float:
        """Angle to the initial weights as a fraction of pi.

        Args:
            initial: The parameters before training by name; an earlier ``state_dict()`` will do.
            candidate: The architecture.

        Raises:
            ValueError: ``initial`` lacks a parameter.
        """
        device = next(self.parameters()).device
        # Building a supernet takes longer than the angle, and a search asks for a thousand.
        if self._before is None or self._before[0] is not initial or self._before[1] != device:
            self._before = (initial, device, self._supernet_with(initial, device))
        return angle(self._before[2], self.supernet, candidate, normalize=True)

    def _supernet_with(self, values: Mapping[str, Tensor], device: torch.device) -> SuperNet:
        # On the meta device nothing is drawn from the global generator. Statistics stay there: nobody reads them.
        with torch.device("meta"):
            supernet = SuperNet(**self.supernet.arguments)
        prefix = "network.supernet."
        own = {name: values.get(prefix + name) for name, _ in supernet.named_parameters()}
        missing = [name for name, value in own.items() if value is None]
        if missing:
            raise ValueError(
                f"The initial weights lack {len(missing)} of {len(own)} parameters, for instance {prefix}{missing[0]}."
            )
        supernet.load_state_dict({name: value.to(device) for name, value in own.items()}, strict=False, assign=True)
        return supernet

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """One path with a copy of the supernet's trained weights."""
        self.validate(sample)
        return self.network.freeze(sample)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)`` along the path sampled last."""
        return self.network(x)
