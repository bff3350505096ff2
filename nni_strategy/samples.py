"""Any NNI model space as something the evolution can walk, and its supernet as networks to measure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nni.mutable import CategoricalMultiple, MutableDict, MutableSymbol
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.oneshot.pytorch.supermodule.operation import MixedOperation
from torch import Tensor, nn
from torch.func import functional_call

from genas_plugins.neighbourhood import Parts
from genas_plugins.scoring import CommonNoise, parameter_angle
from genas_plugins.scoring.batchnorm import evaluation_mode, preserve_batchnorm
from genas_plugins.scoring.losses import check_classes, read_images
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.scoring.precision import in_parameter_type, parameter_types_alone
from genas_plugins.search import NoCandidateError, candidate_seed
from nni_strategy.supermodules import adopt

__all__ = ["SampleSpace", "SupernetPaths", "active_parameters", "fix_path"]

_MAX_TRIES = 1000


class SampleSpace:
    """Draws, mutates and crosses samples of an NNI model space; a candidate is a sample as sorted JSON text.

    Args:
        space: The model space, a supernet already or not.

    Raises:
        ValueError: The space has nothing to choose.
    """

    def __init__(self, space: ModelSpace) -> None:
        simplified = space.simplify()
        # What remains are constraints, which have a label but no value in a sample.
        self._mutables = {label: mutable for label, mutable in simplified.items() if isinstance(mutable, MutableSymbol)}
        if not self._mutables:
            raise ValueError(f"{type(space).__name__} has no choices left to search; is it frozen?")
        self._all = MutableDict(simplified)

    def sample(self, rng: np.random.Generator) -> str:
        """Draw every label uniformly, until the space's constraints hold."""
        return self._valid(lambda state: {}, rng)

    def mutate(self, candidate: str, probability: float, rng: np.random.Generator) -> str:
        """Redraw each label with ``probability``."""
        sample = self.to_sample(candidate)
        return self._valid(
            lambda state: {label: value for label, value in sample.items() if state.random_sample() >= probability},
            rng,
        )

    def crossover(self, first: str, second: str, rng: np.random.Generator) -> str:
        """Take each label from either parent with equal chance."""
        parents = self.to_sample(first), self.to_sample(second)
        return self._valid(lambda state: {label: parents[state.randint(2)][label] for label in self._mutables}, rng)

    def parts(self, candidate: str, inputs: bool = False) -> Parts[str]:
        """The labels and their values (:mod:`genas_plugins.neighbourhood`); all count alike.

        Raises:
            ValueError: A label has no list of values.
        """
        sample = self.to_sample(candidate)
        states = []
        for label, mutable in self._mutables.items():
            if not hasattr(mutable, "values"):
                raise ValueError(f"{label} has no list of values, so that it has no neighbours: {mutable!r}.")
            values = list(mutable.values)
            if isinstance(mutable, CategoricalMultiple):
                counts = range(1, len(values) + 1) if mutable.n_chosen is None else [mutable.n_chosen]
                values = [list(chosen) for count in counts for chosen in itertools.combinations(values, count)]
            states.append(((sample[label],), [value for value in values if value != sample[label]]))

        def combine(chosen: Sequence[Any]) -> str | None:
            found = dict(zip(self._mutables, chosen, strict=True))
            return json.dumps(found, sort_keys=True) if self._all.check_contains(found) is None else None

        return Parts(states, combine, complete=len(self._all) == len(self._mutables))

    def distance(self, first: str, second: str) -> int:
        """Number of labels whose values differ."""
        one, other = json.loads(first), json.loads(second)
        return sum(one[label] != other[label] for label in self._mutables)

    def to_json(self, candidate: str) -> dict[str, Any]:
        """The sample as plain data."""
        return json.loads(candidate)

    def from_json(self, data: Any) -> str:
        """The inverse of :meth:`to_json`."""
        return json.dumps(data, sort_keys=True)

    def to_sample(self, candidate: str) -> dict[str, Any]:
        """The sample as NNI wants it: JSON has no tuples, so values are looked up among the choices."""
        sample = json.loads(candidate)
        for label, mutable in self._mutables.items():
            values = getattr(mutable, "values", None)
            if values is None:
                continue
            by_text = {json.dumps(value): value for value in values}
            chosen = sample[label]
            text = json.dumps(chosen)
            sample[label] = by_text[text] if text in by_text else [by_text[json.dumps(item)] for item in chosen]
        return sample

    def _valid(self, kept: Any, rng: np.random.Generator) -> str:
        # NNI's mutables draw from numpy's older generator.
        state = np.random.RandomState(int(rng.integers(2**32)))
        for _ in range(_MAX_TRIES):
            sample = kept(state)
            for mutable in self._mutables.values():
                if mutable.label not in sample:
                    mutable.random(memo=sample, random_state=state)
            if self._all.check_contains(sample) is None:
                return json.dumps(sample, sort_keys=True)
        raise NoCandidateError(
            f"No valid sample of the space found in {_MAX_TRIES} draws; are its constraints too narrow?"
        )


class SupernetPaths:
    """Paths of a mutated NNI supernet, as networks to measure (:class:`genas_plugins.scoring.paths.Paths`).

    A space around a supernet of this package, as :class:`DartsSpace` is, is measured through its subnets. Every other
    one is measured itself, with a path fixed, and left bit for bit as it was.

    Args:
        space: The mutated space.
        initial: Its parameters before training, by name; needed for the angle.
    """

    def __init__(self, space: ModelSpace, initial: Mapping[str, Tensor] | None = None) -> None:
        self.supernet = space
        self._subnets = SubnetPaths(space.supernet) if hasattr(space, "subnet") else None
        adopt(space)
        # A training step does not have the time to look through thousands of modules, most of them without a choice.
        supernet = [module for module in space.modules() if isinstance(module, BaseSuperNetModule)]
        same = {module for module in supernet if isinstance(module, MixedOperation) and not module.mutable_arguments}
        fix_path(same, {})
        self._choices = [module for module in supernet if module not in same]
        self.search_space: Any = SampleSpace(space) if self._subnets is None else space.search_space
        self.initial = initial

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The supernet's, of a space of this package."""
        return {} if self._subnets is None else self._subnets.arguments

    @property
    def side_by_side(self) -> bool:
        """Whether several threads may have paths open at the same time: what :meth:`open` yields is each one's own."""
        return self._subnets is not None

    def to_sample(self, candidate: Any) -> dict[str, Any]:
        """The NNI sample of a candidate."""
        return (self.search_space if self._subnets is None else self.supernet).to_sample(candidate)

    def network(self, candidate: Any) -> nn.Module:
        """The candidate as a network of its own, see :func:`nni_strategy.export.fixed_network`.

        Under ``torch.device("meta")`` it is one without values, for its costs
        (:func:`nni_strategy.export.build_network`).
        """
        from nni_strategy.export import build_network, fixed_network

        if torch.get_default_device().type == "meta":
            return build_network(self, candidate)
        return fixed_network(self.supernet, self.to_sample(candidate))

    def fix(self, candidate: Any) -> None:
        """Make the supernet run the candidate's path from now on."""
        fix_path(self._choices, self.to_sample(candidate))

    @contextmanager
    def open(self, candidate: Any, example: Tensor) -> Iterator[tuple[nn.Module, frozenset[str] | None]]:
        """Yield a network for the candidate and the names of its parameters (``None``: all of them).

        Args:
            candidate: Architecture of :attr:`search_space`.
            example: Batch of images ``(N, 3, H, W)``, to find out which parameters take part.
        """
        if self._subnets is not None:
            with self._subnets.open(candidate, example) as opened:
                yield opened
            return
        # What a network draws in its forward pass is a function of the candidate, and nobody else's draws are changed.
        devices = [example.device] if example.is_cuda else []
        with preserve_batchnorm(self.supernet), torch.random.fork_rng(devices=devices):
            seed = candidate_seed(0, self.search_space.to_json(candidate))
            torch.default_generator.manual_seed(seed)
            if example.is_cuda:
                with torch.cuda.device(example.device):
                    torch.cuda.manual_seed(seed)
            self.fix(candidate)
            yield self.supernet, active_parameters(self.supernet, example[:2])

    def num_classes(self, images: Tensor, labels: Tensor) -> int:
        """Number of classes that the supernet tells apart.

        Args:
            images: Batch ``(N, 3, H, W)``.
            labels: Its labels.

        Raises:
            ValueError: Logits and labels are not those of a classification.
        """
        if self._subnets is not None:
            return self._subnets.num_classes(images, labels)
        candidate = self.search_space.sample(np.random.default_rng(0))
        with self.open(candidate, images) as (model, _), evaluation_mode(model), torch.no_grad():
            return check_classes(read_images(model, images[:2]), labels[:2])

    def common_noise(self, seed: int) -> CommonNoise:
        """Noise that all candidates share."""
        return CommonNoise(self.supernet, seed)

    def angle(self, candidate: Any, names: frozenset[str] | None) -> float:
        """Angle between initial and present weights of the candidate as a fraction of pi.

        For spaces without an angle of their own: that of the parameters that take part, each counted once, and of an
        operation with a choice in its arguments the part that the path uses.

        Raises:
            ValueError: The initial weights are not known.
        """
        if self._subnets is not None:
            self._subnets.initial = self.initial
            return self._subnets.angle(candidate)
        if self.initial is None:
            raise ValueError("The angle needs the weights before training, which this supernet comes without.")
        sample = self.to_sample(candidate)
        before, after = (
            self._on_path(sample, weights) for weights in (self.initial, dict(self.supernet.named_parameters()))
        )
        return parameter_angle(before, after, names, normalize=True)

    def _on_path(self, sample: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of parameters by name those parts that the path of ``sample`` uses."""
        found = dict(weights)
        for name, mixed in self.supernet.named_modules():
            if not isinstance(mixed, MixedOperation) or not mixed.mutable_arguments:
                continue
            arguments = {key: choice.freeze(sample) for key, choice in mixed.mutable_arguments.items()}
            keys = [key for key, _ in mixed.named_parameters() if f"{name}.{key}" in weights]
            own = {f"mixed.{key}": weights[f"{name}.{key}"] for key in keys}
            parts = functional_call(_Parts(mixed), own, kwargs={**mixed.init_arguments, **arguments})
            found |= {f"{name}.{key}": part for key, part in parts.items() if f"{name}.{key}" in weights}
        return found


class _Parts(nn.Module):
    """The weights that an operation of a supernet uses on a path, as something to be called with other weights."""

    def __init__(self, mixed: MixedOperation) -> None:
        super().__init__()
        self.mixed = mixed

    def forward(self, **arguments: Any) -> dict[str, Tensor | None]:
        """Its parts by name; ``None`` for what it does not have."""
        return self.mixed.freeze_weight(**arguments)


def fix_path(modules: Iterable[nn.Module], sample: dict[str, Any]) -> None:
    """Make a mutated supernet, given by its modules, run the path of ``sample``."""
    for module in modules:
        if isinstance(module, BaseSuperNetModule):
            module.resample(memo=sample)


@parameter_types_alone()
def active_parameters(model: nn.Module, images: Tensor) -> frozenset[str]:
    """Names of the parameters that the logits of ``images``, ``(N, 3, H, W)``, depend on.

    Raises:
        ValueError: The logits depend on no parameter.
    """
    named = dict(model.named_parameters())
    trainable = [parameter.requires_grad for parameter in named.values()]
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        with evaluation_mode(model), torch.enable_grad():
            gradients = torch.autograd.grad(
                model(in_parameter_type(model, images)).sum(), list(named.values()), allow_unused=True
            )
    finally:
        for parameter, flag in zip(named.values(), trainable, strict=True):
            parameter.requires_grad_(flag)
    used = frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)
    if not used:
        raise ValueError(f"The output of {type(model).__name__} depends on none of its parameters.")
    return used
