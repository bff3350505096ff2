"""What the candidates of a search cost: parameters, multiply-adds, latency, and what a user counts himself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from genas_plugins._messages import listed, shown, suggestion
from genas_plugins.counting import Size, count_macs, count_parameters, height_and_width
from genas_plugins.search.budget import CostedSpace, Limits
from genas_plugins.search.evolution import SearchSpace
from genas_plugins.search.lines import JsonLines
from genas_plugins.search.pareto import OBJECTIVES, check_objectives
from genas_plugins.search.sharing import SharedSearch

__all__ = ["COSTS", "COSTS_FILE", "Budget", "Costs", "Counted", "measure_latency"]

COSTS: tuple[str, ...] = ("params", "macs", "latency")
"""Costs that every space has."""
COSTS_FILE = "costs.jsonl"
"""Beside a history: what was measured of candidates, also of those that were not within the budget."""

_TRIES, _FEWER_TRIES = 10_000, 500
_LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Counted:
    """Which network of a candidate parameters, multiply-adds and latency are those of.

    Attributes:
        network: ``"trained"`` is the one that is trained after the search, of the size that the space or the following
            say; ``"searched"`` is as wide and as deep as the supernet, on images of the search. They are one in a space
            that does not say what is trained afterwards.
        init_channels: Channels of its first cell; ``None``, here and in the following, for the space's.
        num_cells: Its cells, in the space of DARTS.
        cells_per_stage: Cells of each of its stages, in NAS-Bench-201.
        stem: Its first layers, ``"cifar"`` or ``"imagenet"``, in the space of DARTS.
        num_classes: Outputs of the classifier.
        image_size: Height and width of the image in pixels.
        latency_batch: Images of the pass whose time is the latency.
    """

    network: Literal["trained", "searched"] = "trained"
    init_channels: int | None = None
    num_cells: int | None = None
    cells_per_stage: int | None = None
    stem: Literal["cifar", "imagenet"] | None = None
    num_classes: int | None = None
    image_size: int | None = None
    latency_batch: int = 1

    def arguments(self, space: Any, supernet: Mapping[str, Any], images: Size) -> tuple[dict[str, Any], Size]:
        """The arguments of ``space.network`` and the size of the images.

        Args:
            space: Of the core, or another package's (:class:`genas_plugins.spaces.Space`).
            supernet: The supernet's arguments.
            images: Height and width of the images of the search.

        Raises:
            ValueError: A size is none of the space's, or out of its range.
        """
        base = {**supernet, "image_size": images}
        if self.network == "trained":
            base |= getattr(space, "trained", {})
        sizes = {item.name for item in dataclasses.fields(self)} - {"network", "latency_batch"}
        given = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if wrong := sorted(given.keys() - base.keys()):
            known = sorted(base.keys() & sizes)
            raise ValueError(
                f"{wrong[0]} is no size of {type(space).__name__}'s networks; there are: {listed(known, 9)}."
            )
        base |= given
        image_size = base.pop("image_size")
        return base, image_size


@dataclass(frozen=True)
class Budget:
    """What a search is told about costs.

    Attributes:
        constraints: Limits by name, as :meth:`genas_plugins.search.Limits.of` reads them.
        objectives: What it goes by; none for the score alone.
        costs: The user's own costs by name.
        counted: Which network is meant.
        metrics: What the score measures.

    Raises:
        ValueError: A limit is none, or a name is none of a cost or an objective.
    """

    constraints: Mapping[str, Any] | None
    objectives: Sequence[str]
    costs: Mapping[str, Callable[[Any], float]] | None
    counted: Counted | None
    metrics: Collection[str]

    def __post_init__(self) -> None:
        known = (*COSTS, *(self.costs or {}))
        for name, value in (self.constraints or {}).items():
            Limits.of(value)
            if name not in known:
                near = suggestion(name, known)
                raise ValueError(f"There is no cost {shown(name)} to limit{near}; there are: {listed(known, 20)}.")
        if taken := sorted({*COSTS, *OBJECTIVES} & set(self.costs or {})):
            raise ValueError(f"A cost of your own cannot be called {taken[0]}, which there is: give it another name.")
        if self.objectives:
            check_objectives(self.objectives, self.metrics, known)

    def space(
        self, paths: Any, example: Sequence[int], *, shared: SharedSearch | None = None, **settings: Any
    ) -> SearchSpace[Any]:
        """The space to search: that of the paths, within limits and with costs where there are any.

        Args:
            paths: See :class:`Costs`, as the others.
            example: Shape of an image.
            shared: Processes that all walk the space.
            **settings: Device and file.
        """
        limits = {name: Limits.of(value) for name, value in (self.constraints or {}).items()}
        limits = {name: value for name, value in limits.items() if not value.free}
        names = {*limits, *(self.objectives or ()), *(self.costs or {})} - OBJECTIVES.keys()
        if not names:
            return paths.search_space
        return Costs(paths, example, counted=self.counted, own=self.costs, **settings).space(names, limits, shared)

    def check(self, paths: Any, example: Sequence[int], device: torch.device | str, seed: int) -> None:
        """Raise if nothing is within the limits, or a candidate's costs are no numbers; nothing is remembered.

        Raises:
            BudgetError: The message has the smallest and the largest costs that were seen.
        """
        space = self.space(paths, example, device=device)
        if isinstance(space, CostedSpace):
            space.costs(space.sample(np.random.default_rng(seed)))


class Costs:
    """What candidates cost, by name, each counted or measured once.

    Args:
        paths: A supernet's paths (:class:`genas_plugins.scoring.paths.Paths`).
        example: Shape ``(channels, height, width)`` of an image of the search.
        counted: Which network is meant.
        own: Costs of the user's by name, functions of a candidate.
        device: Where latency is measured.
        memory: What was measured before, by name and the candidate as JSON; what is measured is added.
        lines: Where what is measured is kept for a search that is resumed; ``None`` keeps it in memory alone.

    Raises:
        ValueError: See :meth:`Counted.arguments`.
        HistoryError: The file is damaged.
    """

    def __init__(
        self,
        paths: Any,
        example: Sequence[int],
        *,
        counted: Counted | None = None,
        own: Mapping[str, Callable[[Any], float]] | None = None,
        device: torch.device | str = "cpu",
        memory: dict[tuple[str, str], float] | None = None,
        lines: JsonLines[dict[str, Any]] | None = None,
    ) -> None:
        self._paths = paths
        self._counted = counted or Counted()
        self._channels, *size = example
        self._device = torch.device(device)
        self._own = dict(own or {})
        self._arguments: dict[str, Any] = {}
        self._size: Size = tuple(size)
        space = paths.search_space
        if hasattr(space, "network"):
            self._arguments, self._size = self._counted.arguments(space, paths.arguments, self._size)
        self._counts: dict[Any, tuple[int, int]] = {}
        self._lines = lines
        self._measured = {} if memory is None else memory
        for number, line in enumerate(() if lines is None else lines.records):
            if not {"cost", "candidate", "value"} <= line.keys() or not isinstance(line["value"], float):
                raise lines.error(number, "is not what a candidate was measured to cost")
            self._measured[line["cost"], json.dumps(line["candidate"])] = line["value"]
        self._shared: SharedSearch | None = None

    def space(
        self, names: Collection[str], limits: Mapping[str, Limits], shared: SharedSearch | None = None
    ) -> CostedSpace[Any]:
        """The space with these costs, within limits.

        Args:
            names: What each record is to say.
            limits: By name.
            shared: Processes that all walk this space: of what is measured they take the first one's number.
        """
        self._shared = shared
        if shared is not None:
            first = shared.exchange(dict(self._measured))[0]
            self._measured.clear()
            self._measured.update(first)
        # What is computed comes before what must be measured, so that the latter is asked of fewer.
        order = [name for name in (*COSTS[:-1], *self._own, COSTS[-1]) if name in names or name in limits]
        own = self._paths.search_space
        quick = hasattr(own, "costs") and set(limits) <= set(COSTS[:-1])
        functions = {name: self._function(name) for name in order}
        return CostedSpace(own, functions, limits, _TRIES if quick else _FEWER_TRIES)

    def network(self, candidate: Any) -> nn.Module:
        """The network that is counted, with fresh weights."""
        space = self._paths.search_space
        return space.network(candidate, self._arguments) if self._arguments else self._paths.network(candidate)

    def latency(self, candidate: Any) -> float:
        """Milliseconds of a pass of the network, see :func:`measure_latency`."""
        # Nobody's draws may depend on the weights of a network that is thrown away.
        with torch.random.fork_rng(devices=[]):
            network = self.network(candidate)
        shape = self._counted.latency_batch, self._channels, *height_and_width(self._size)
        return measure_latency(network.to(self._device), shape)

    def _function(self, name: str) -> Callable[[Any], float]:
        if name in COSTS[:-1]:
            position = COSTS.index(name)
            return lambda candidate: self._count(candidate)[position]
        space = self._paths.search_space
        # A candidate of NNI's own spaces is text; what it stands for is a sample.
        read = (lambda candidate: candidate) if hasattr(space, "network") else space.to_sample
        measure = self.latency if name == "latency" else lambda candidate: self._own[name](read(candidate))
        return lambda candidate: self._remembered(name, measure, candidate)

    def _count(self, candidate: Any) -> tuple[int, int]:
        space = self._paths.search_space
        if hasattr(space, "costs"):
            return space.costs(candidate, self._arguments, self._size)
        if candidate not in self._counts:
            self._counts[candidate] = self._counted_of(candidate)
        return self._counts[candidate]

    def _counted_of(self, candidate: Any) -> tuple[int, int]:
        size = height_and_width(self._size)
        with torch.random.fork_rng(devices=[]):
            with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
                network = self.network(candidate)
                return count_parameters(network), count_macs(network, size, self._channels)
            # It computes with numbers, or makes tensors of its own on the CPU.
            network = self.network(candidate)
            return count_parameters(network), count_macs(network, size, self._channels)

    def _remembered(self, name: str, measure: Callable[[Any], Any], candidate: Any) -> float:
        plain = self._paths.search_space.to_json(candidate)
        key = name, json.dumps(plain)
        if key not in self._measured:
            value = measure(candidate)
            if self._shared is not None:
                value = self._shared.exchange(value)[0]
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise ValueError(f"The cost {name} of {shown(plain)} must be a finite number, got {shown(value)}.")
            self._measured[key] = float(value)
            if self._lines is not None:
                self._lines.append({"cost": name, "candidate": plain, "value": float(value)})
        return self._measured[key]


def measure_latency(network: nn.Module, shape: Sequence[int]) -> float:
    """Milliseconds of a pass of a network in evaluation mode: the median of passes in a twentieth of a second or more.

    On a CPU on one thread, so that other work and the number of cores have least to say.

    >>> 0 < measure_latency(nn.Conv2d(3, 4, 3), (1, 3, 8, 8)) < 1000
    True

    Args:
        network: On the device where it is measured, which is waited for.
        shape: ``(images, channels, height, width)`` of the input, which is zeros.
    """
    # It looks for compilers, and may say that there is no CUDA.
    from torch.utils.benchmark import Timer

    first = next(network.parameters())
    images = torch.zeros(tuple(shape), device=first.device, dtype=first.dtype)
    timer = Timer("network(images)", globals={"network": network.eval(), "images": images})
    with torch.no_grad():
        timer.timeit(2)
        return 1e3 * timer.blocked_autorange(min_run_time=_LEAST_SECONDS).median
