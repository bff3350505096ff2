"""One path of a supernet as a network of its own, with the weights and statistics that it has there.

NNI's ``freeze`` of a supernet raises where a convolution has no bias, and rebuilds cells and the hub's NDS family with
fresh weights. Here what is on the path is copied, module by module: the chosen layers, the first blocks of a
repetition, and of an operation with a choice in its arguments the part of its weights that the path uses.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from nni.common.serializer import is_traceable
from nni.mutable import Mutable
from nni.nas.hub.pytorch.nasnet import NDSStagePathSampling
from nni.nas.nn.pytorch import ChosenInputs, ModelSpace, Repeat
from nni.nas.nn.pytorch.cell import preprocess_cell_inputs
from nni.nas.oneshot.pytorch.strategy import is_supernet
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedInput, DifferentiableMixedLayer
from nni.nas.oneshot.pytorch.supermodule.operation import MixedOperation
from nni.nas.oneshot.pytorch.supermodule.sampling import (
    PathSamplingCell,
    PathSamplingInput,
    PathSamplingLayer,
)
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace, SimplifiedModelSpace, model_context
from torch import Tensor, nn

from genas_plugins._messages import listed
from nni_strategy.samples import SampleSpace, SupernetPaths

__all__ = ["FixedCell", "FixedStage", "PathModel", "build_network", "fixed_network", "ranked_models"]

_logger = logging.getLogger(__name__)

# Supernets without their values, for networks that are only counted.
_hollow: weakref.WeakKeyDictionary[ModelSpace, ModelSpace] = weakref.WeakKeyDictionary()


def build_network(space: SupernetPaths | ModelSpace, candidate: Any) -> nn.Module:
    """The network of a candidate without values, on the meta device: for its parameters and multiply-adds.

    >>> from nni.nas.hub.pytorch import NasBench201
    >>> space = NasBench201(4, 1, 10)
    >>> network = build_network(space, {label: "conv_1x1" for label in space.simplify()})
    >>> sum(parameter.numel() for parameter in network.parameters())
    7246

    Nothing is copied and no random number is drawn, so a search may call it for every proposal. It is the network that
    is exported, with the outputs of all nodes of a cell joined, as NNI's supernets do; of the spaces of this package,
    the one that is trained afterwards, without normalisation after pooling.

    Args:
        space: The paths of a supernet (``strategy.paths``), or a model space; one that is no supernet yet is built by
            its constructor, as NNI does it (``type(space).frozen_factory(sample)``).
        candidate: Of the paths' search space, or an NNI sample of the space.
    """
    paths, space = (space, space.supernet) if isinstance(space, SupernetPaths) else (None, space)
    if isinstance(candidate, Mapping):
        sample = dict(candidate)
    else:
        sample = SampleSpace(space).to_sample(candidate) if paths is None else paths.to_sample(candidate)
    if hasattr(space, "subnet"):
        with torch.device("meta"):
            return space.search_space.network(space.from_sample(sample), space.supernet.arguments)
    if not is_supernet(space):
        # On the CPU first: a constructor may compute with tensors.
        with torch.random.fork_rng(devices=[]), model_context(sample):
            return space.trace_copy().get(traceable=False).to("meta")
    if space not in _hollow:
        tensors = [*space.parameters(), *space.buffers()]
        # What the copy finds here, it does not copy.
        memo: dict[int, Any] = {id(tensor): _without_values(tensor) for tensor in tensors}
        _hollow[space] = copy.deepcopy(space, memo)
    return fixed_network(_hollow[space], sample)


def fixed_network(supernet: ModelSpace, sample: Mapping[str, Any]) -> nn.Module:
    """The path of ``sample`` as a network of its own, of the space's class, with copies of its weights and buffers.

    In evaluation mode its logits are those of the supernet with this path fixed, and so its statistics of batch
    normalisation are those that the supernet has: of all paths that were trained. Before it is used as it is, take the
    statistics of its own, as the search did for its score: ``recalibrate_batchnorm(network, batches)``.

    What a module of your own cannot carry keeps fresh values, and a warning names it.

    Args:
        supernet: A space that a one-shot strategy has mutated.
        sample: A value for each label.

    Raises:
        TypeError: The space is not mutated, or a module of your own cannot be fixed; the message names it.
        ValueError: The sample lacks a label, or has a value that is none of its choices.
    """
    if hasattr(supernet, "subnet"):
        return supernet.freeze(dict(sample))
    if not is_supernet(supernet):
        raise TypeError(
            f"{type(supernet).__name__} is no supernet: GeNAS().mutate_model(space) makes one of it, and "
            "build_network(space, sample) shows the network of a sample without values."
        )
    if (problem := supernet.check_contains(dict(sample))) is not None:
        raise ValueError(f"This is no sample of {type(supernet).__name__}: {problem}")
    with torch.random.fork_rng(devices=[]):
        fixer = _Fixer(sample)
        network = fixer.copy(supernet)
    for part in network.modules():
        # What is new has nothing that its mode is for, but whoever looks at modes looks at all.
        if isinstance(part, FixedCell | ChosenInputs | nn.Sequential | nn.ModuleList):
            part.training = supernet.training
    if fixer.fresh:
        _logger.warning(
            "%s: %d tensors could not be carried over from the supernet and have fresh values: %s.",
            type(supernet).__name__,
            len(fixer.fresh),
            listed(sorted(fixer.fresh), 10),
        )
    return network


class _WithWeights:
    """A frozen model space whose network is a path of a supernet that is in this process."""

    supernet: ModelSpace | None = None
    sample: Any

    def executable_model(self) -> nn.Module:
        """The network, see :func:`fixed_network`; one with fresh weights in a process that read this from a file."""
        if self.supernet is None:
            return super().executable_model()  # type: ignore[misc]
        return fixed_network(self.supernet, self.sample)


class PathModel(_WithWeights, SimplifiedModelSpace):
    """A path of a supernet as one of NNI's models, which carries the weights that the supernet then has."""

    @classmethod
    def of(cls, supernet: ModelSpace, sample: dict[str, Any]) -> ExecutableModelSpace:
        """The model of a sample; it cannot be stored where NNI cannot build the space anew from its arguments."""
        if is_traceable(supernet):
            model = cls(supernet, supernet.simplify(), None).freeze(sample)
        else:
            model = _UntracedModel(supernet, None).freeze(sample)
        model.supernet = supernet
        return model


def ranked_models(
    space: ModelSpace, to_sample: Callable[[Any], dict[str, Any]], best: Iterable[tuple[Any, float]]
) -> Iterator[ExecutableModelSpace]:
    """Candidates as models, with their scores as metric.

    Args:
        space: The supernet.
        to_sample: NNI's sample of a candidate.
        best: Candidates and scores.
    """
    for candidate, score in best:
        model = PathModel.of(space, to_sample(candidate))
        model.metrics.final = score
        yield model


class _UntracedModel(_WithWeights, RawFormatModelSpace):
    pass


class FixedCell(nn.Module):
    """NNI's cell on a path: each node adds its operations on chosen inputs, and all nodes are joined.

    The names of parameters are those of :class:`nni.nas.nn.pytorch.Cell` under NNI's model context.
    """

    def __init__(self, cell: PathSamplingCell, ops: nn.ModuleList, inputs: nn.ModuleList) -> None:
        super().__init__()
        self.preprocessor = cell.preprocessor
        self.ops = ops
        self.inputs = inputs
        self.postprocessor = cell.postprocessor
        self.num_predecessors, self.concat_dim = cell.num_predecessors, cell.concat_dim

    def forward(self, *inputs: Any) -> Any:
        """What the postprocessor makes of the joined nodes and of the inputs, a list of tensors or several tensors."""
        processed = preprocess_cell_inputs(self.num_predecessors, *inputs)
        states = list(self.preprocessor(processed))
        for ops, chosen in zip(self.ops, self.inputs, strict=True):
            states.append(sum(op(choose(states)) for op, choose in zip(ops, chosen, strict=True)))
        return self.postprocessor(torch.cat(states[self.num_predecessors :], self.concat_dim), processed)


class FixedStage(nn.Sequential):
    """A stage of the NDS family that a path leaves after its first cell.

    NNI's supernet has a layer that brings the output before this cell to the shape of the stage's, which the network
    that NNI builds for the sample does without.
    """

    def __init__(self, cell: nn.Module, first_cell_transformation: nn.Module) -> None:
        super().__init__(cell)
        self.first_cell_transformation = first_cell_transformation

    def forward(self, inputs: Any) -> list[Tensor]:
        """The outputs of the cell before the last one, in the stage's shape, and of the last."""
        previous, last = self[0](inputs)
        return [self.first_cell_transformation(previous), last]


class _Fixer:
    """Copies modules, and puts what a supernet's module is on the path in its place."""

    def __init__(self, sample: Mapping[str, Any]) -> None:
        self.sample = dict(sample)
        self.fresh: list[str] = []
        self._memo: dict[int, Any] = {}

    def copy(self, module: nn.Module, name: str = "") -> nn.Module:
        """A copy without choices."""
        if id(module) not in self._memo:
            fixed = self._fixed(module, name)
            self._memo[id(module)] = self._plain(module, name) if fixed is None else fixed
        return self._memo[id(module)]

    def _plain(self, module: nn.Module, name: str) -> nn.Module:
        self._prepare(module, name)
        copied = copy.deepcopy(module, self._memo)
        for part in copied.modules():
            # Choices that a module keeps beside its layers, to know their sizes.
            for key, value in list(vars(part).items()):
                if isinstance(value, Mutable) and not isinstance(value, nn.Module):
                    setattr(part, key, value.freeze(self.sample))
            vars(part).pop("_mutables", None)
        return copied

    def _prepare(self, module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            if isinstance(child, BaseSuperNetModule | Repeat):
                self.copy(child, inner)
            else:
                self._prepare(child, inner)

    def _fixed(self, module: nn.Module, name: str) -> nn.Module | None:
        for kind, fix in self._kinds.items():
            if isinstance(module, kind):
                return fix(self, module, name)
        return self._unknown(module, name) if isinstance(module, BaseSuperNetModule) else None

    def _layer(self, choice: PathSamplingLayer | DifferentiableMixedLayer, name: str) -> nn.Module:
        chosen = self.sample[choice.label]
        return self.copy(choice[chosen], f"{name}.{chosen}")

    def _input(self, choice: PathSamplingInput | DifferentiableMixedInput, name: str) -> nn.Module:
        return ChosenInputs(self.sample[choice.label], choice.reduction)

    def _repeat(self, repeat: Repeat, name: str) -> nn.Module:
        depth = repeat.depth_choice
        depth = depth.freeze(self.sample) if isinstance(depth, Mutable) else depth
        blocks = [self.copy(block, f"{name}.blocks.{index}") for index, block in enumerate(repeat.blocks[:depth])]
        transformation = getattr(repeat, "first_cell_transformation", None)
        if isinstance(repeat, NDSStagePathSampling) and depth == 1 and transformation is not None:
            return FixedStage(blocks[0], self.copy(transformation, f"{name}.first_cell_transformation"))
        return nn.Sequential(*blocks)

    def _cell(self, cell: PathSamplingCell, name: str) -> nn.Module:
        ops, inputs = nn.ModuleList(), nn.ModuleList()
        for node, edges in enumerate(cell.ops, cell.num_predecessors):
            ops.append(nn.ModuleList())
            inputs.append(nn.ModuleList())
            for number in range(cell.num_ops_per_node):
                source = self.sample[f"{cell.label}/input_{node}_{number}"]
                operation = self.sample[f"{cell.label}/op_{node}_{number}"]
                # Two operations of a node may be one in the supernet, and are two in a network.
                alone = _Fixer(self.sample)
                at = f"{name}.ops.{node - cell.num_predecessors}.{source[0]}.{operation}"
                ops[-1].append(alone.copy(edges[source[0]][operation], at))
                self.fresh += alone.fresh
                inputs[-1].append(ChosenInputs(source, "sum"))
        fixed = FixedCell(cell, ops, inputs)
        for part in ("preprocessor", "postprocessor"):
            if isinstance(getattr(cell, part), nn.Module):
                setattr(fixed, part, self.copy(getattr(cell, part), f"{name}.{part}"))
        return fixed

    def _mixed(self, mixed: MixedOperation, name: str) -> nn.Module:
        arguments = {**mixed.init_arguments}
        if "momentum" not in mixed.mutable_arguments and hasattr(mixed, "momentum"):
            # During a recalibration the argument is another one.
            arguments["momentum"] = mixed.momentum
        arguments |= {key: mutable.freeze(self.sample) for key, mutable in mixed.mutable_arguments.items()}
        own = {**dict(mixed.named_parameters()), **dict(mixed.named_buffers())}
        first = next(iter(own.values()), torch.empty(0))
        with model_context(self.sample), torch.device("meta" if first.is_meta else "cpu"):
            made = mixed.bound_type(**arguments).to(first.device, first.dtype)
        if first.is_meta:
            return made.train(mixed.training)
        carried = {key: value for key, value in mixed.freeze_weight(**arguments).items() if value is not None}
        targets = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        for key, target in targets.items():
            source = carried.get(key, own.get(key))
            if source is None or source.shape != target.shape:
                self.fresh.append(f"{name}.{key}")
                continue
            target.data = source.detach().clone()
            target.requires_grad_(key in own and own[key].requires_grad)
        return made.train(mixed.training)

    def _unknown(self, module: BaseSuperNetModule, name: str) -> nn.Module:
        """A module of somebody's own: fixed as it says, and looked at for what it leaves behind."""
        marked = copy.deepcopy(module)
        tensors = [*marked.parameters(), *marked.buffers()]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))
        try:
            with torch.device("meta" if any(tensor.is_meta for tensor in tensors) else "cpu"):
                fixed, marks = (part.freeze(self.sample) for part in (module, marked))
        except (NotImplementedError, RuntimeError) as error:
            raise TypeError(
                f"The module {name} of type {type(module).__name__} cannot be fixed to a path: its freeze(sample) ends "
                f"with {type(error).__name__}: {error}. It must return a module with the path's weights."
            ) from error
        for key, tensor in marks.state_dict().items():
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isnan().all():
                self.fresh.append(f"{name}.{key}")
        return copy.deepcopy(fixed)

    _kinds: ClassVar[dict[type[nn.Module], Callable[..., nn.Module]]] = {
        PathSamplingLayer: _layer,
        PathSamplingInput: _input,
        DifferentiableMixedLayer: _layer,
        DifferentiableMixedInput: _input,
        PathSamplingCell: _cell,
        Repeat: _repeat,
        MixedOperation: _mixed,
    }


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
