"""Candidates of a weight-sharing supernet, as networks to measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genas_plugins.scoring.angle import angle
from genas_plugins.scoring.noise import CommonNoise

__all__ = ["PREFIX", "Paths", "SubnetPaths", "Supernet", "named_as_in_nni"]

PREFIX = "network.supernet."
"""Where NNI's spaces hold their supernet. Common noise is drawn by these names, so that a candidate has one score in a
search and afterwards."""


class Supernet(Protocol):
    """A network with the weights of all candidates of a space; a candidate shares them.

    :class:`genas_plugins.SuperNet` and :class:`genas_plugins.nasbench201.NasBench201SuperNet` are such modules.
    """

    num_classes: int

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The constructor's arguments, enough to build a supernet of the same shape."""

    @property
    def search_space(self) -> Any:
        """How candidates are drawn and changed (:class:`genas_plugins.search.SearchSpace`)."""

    def subnet(self, candidate: Any) -> nn.Module:
        """One candidate as a module that shares parameters and owns its buffers."""

    def path_modules(self, candidate: Any) -> Iterable[nn.Module]:
        """What a training step along the candidate's path runs, as modules that share no parameter."""


class Paths(Protocol):
    """What a :class:`genas_plugins.experiment.scorer.Scorer` needs to know about a supernet."""

    search_space: Any
    supernet: nn.Module
    """Owns the parameters of all candidates."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The supernet's, where the space builds its networks from them."""

    @property
    def side_by_side(self) -> bool:
        """Whether several candidates may be open at the same time, in threads of their own."""

    def open(self, candidate: Any, example: Tensor) -> AbstractContextManager[tuple[nn.Module, frozenset[str] | None]]:
        """A network for the candidate and the names of its parameters (``None``: all of them).

        Args:
            candidate: Architecture of :attr:`search_space`.
            example: Batch of images ``(N, 3, H, W)``, to find out which parameters take part.
        """

    def num_classes(self, images: Tensor, labels: Tensor) -> int:
        """Number of classes that the supernet tells apart.

        Args:
            images: Batch ``(N, 3, H, W)``.
            labels: Its labels.
        """

    def angle(self, candidate: Any, names: frozenset[str] | None) -> float:
        """Angle between initial and present weights of the candidate, as a fraction of pi."""

    def common_noise(self, seed: int) -> CommonNoise:
        """Noise that all candidates share."""


class SubnetPaths:
    """Paths of a supernet that gives its candidates as subnets.

    >>> from genas_plugins import SuperNet
    >>> SubnetPaths(SuperNet(10, num_cells=3)).search_space.size > 10**17
    True

    Args:
        supernet: With trained weights.
        initial: Its parameters before training by name, needed for the angle; names may begin with :data:`PREFIX`.
    """

    side_by_side = True

    def __init__(self, supernet: Any, initial: Mapping[str, Tensor] | None = None) -> None:
        self.supernet = supernet
        self.search_space = supernet.search_space
        self.initial = initial
        self._before: tuple[Mapping[str, Tensor], torch.device, Any] | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The supernet's."""
        return self.supernet.arguments

    @contextmanager
    def open(self, candidate: Any, example: Tensor) -> Iterator[tuple[nn.Module, frozenset[str] | None]]:
        """Yield the candidate's subnet; see :class:`Paths`.

        Raises:
            TypeError: The candidate is of another space.
        """
        wanted = self.search_space.candidate
        if not isinstance(candidate, wanted):
            raise TypeError(f"{type(self.supernet).__name__} has a {wanted.__name__}, got {candidate!r}.")
        yield self.supernet.subnet(candidate), None

    def num_classes(self, images: Tensor, labels: Tensor) -> int:
        """Number of classes that the supernet tells apart."""
        return self.supernet.num_classes

    def common_noise(self, seed: int) -> CommonNoise:
        """Noise that all candidates share."""
        return CommonNoise(self.supernet, seed, PREFIX)

    def angle(self, candidate: Any, names: frozenset[str] | None = None) -> float:
        """Angle between initial and present weights of the candidate, as a fraction of pi.

        Raises:
            ValueError: The initial weights are not known, or lack a parameter.
        """
        if self.initial is None:
            raise ValueError("The angle needs the weights before training, which this supernet comes without.")
        device = next(self.supernet.parameters()).device
        # Building a supernet takes longer than the angle, and a search asks for a thousand.
        if self._before is None or self._before[0] is not self.initial or self._before[1] != device:
            self._before = (self.initial, device, self._with(self.initial, device))
        return angle(self._before[2], self.supernet, candidate, normalize=True)

    def _with(self, values: Mapping[str, Tensor], device: torch.device) -> Any:
        # On the meta device nothing is drawn from the global generator. Statistics stay there: nobody reads them.
        with torch.device("meta"):
            supernet = type(self.supernet)(**self.supernet.arguments)
        own = {name: values.get(name, values.get(PREFIX + name)) for name, _ in supernet.named_parameters()}
        missing = [name for name, value in own.items() if value is None]
        if missing:
            raise ValueError(
                f"The initial weights lack {len(missing)} of {len(own)} parameters, for instance {PREFIX}{missing[0]}."
            )
        supernet.load_state_dict({name: value.to(device) for name, value in own.items()}, strict=False, assign=True)
        return supernet


def named_as_in_nni(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a supernet under the names that they have in NNI's spaces."""
    return {PREFIX + name: value for name, value in state.items()}
