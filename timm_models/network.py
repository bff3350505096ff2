"""The cell networks of GeNAS with the interface of timm's convnets.

Parameter names are those of the official GeNAS code (clovaai/GeNAS@fd3cba8), so that its ImageNet checkpoints
load by name. The interface is that of timm 1.0.31; ``timm/models/nasnet.py`` is its nearest relative.
"""

# No "from __future__ import annotations": torch.fx copies the annotation of forward's argument into its graphs.
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import checkpoint
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from genas_plugins.counting import fit_channels
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import AuxiliaryHead, Cell, CellShape, build_imagenet_stem, cell_shapes
from genas_plugins.darts.operations import Layers
from genas_plugins.darts.zoo import IMAGENET_CELLS
from timm_models.genotypes import plain_genotype, read_genotype
from timm_models.weights import fit_state

__all__ = ["GenasFeatures", "GenasNet"]

_STEM_STRIDE = 8
"""Stride of the first cells."""


class GenasNet(nn.Module):
    """A genotype as an ImageNet network: a stem of stride 8, cells, pooling, classifier.

    Args:
        genotype: The two cells: a :class:`~genas_plugins.Genotype`, a name of the zoo, the JSON file of a
            search or what is in it, or the 28 operation numbers.
        init_channels: C, channels of the first cells; even. None: the largest with which the network of 14
            cells needs at most 600 M multiply-adds at 224 pixels.
        num_cells: Cells in the stack; the paper's networks have 14.
        num_classes: Outputs of the classifier; 0: no classifier.
        in_chans: Channels of the images.
        global_pool: Any pooling of timm; ``""``: none, the output stays ``(N, C, H, W)``.
        output_stride: Stride of the features: 32, 16 or 8. Below 32 the last reduction cell, or both, keep the
            resolution and all later kernels are dilated, so that every second (fourth) row and column, from the first,
            equals the features at stride 32.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Probability to drop an operation of a cell, other than an identity, for an image in
            training; the attribute ``drop_path_prob`` may be changed between epochs, as the paper does.
        norm_layer: A normalisation layer or timm's name for it.
        act_layer: An activation layer or timm's name for it.
        auxiliary: Add the auxiliary head of the paper on the cell at two thirds. In training mode the network
            then returns ``(logits, auxiliary_logits)``; :class:`timm_models.AuxiliaryClassificationTask` is
            the loss for that.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        feature_info: The features that ``features_only`` and :meth:`forward_intermediates` return: the stem at
            stride 4 and the last cells before the resolution falls, at 8, 16 and 32 (or as ``output_stride``
            has it). They are outputs of convolutions and poolings, not activated.

    Raises:
        ValueError: The genotype, ``init_channels``, ``num_cells``, ``output_stride``, ``drop_path_rate`` or the name of
            a layer is invalid.
        TypeError: ``genotype`` has another type.

    Example:
        >>> import timm, torch, timm_models
        >>> model = timm.create_model("genas_cell", genotype="genas_flatness_c100", init_channels=4, num_classes=10)
        >>> model.eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
        >>> [(info["num_chs"], info["reduction"]) for info in model.feature_info]
        [(4, 4), (16, 8), (32, 16), (64, 32)]
    """

    # TorchScript would compile it.
    __jit_unused_properties__ = ("_model_args",)

    def __init__(
        self,
        genotype: Genotype | str | Mapping[str, Any] | Iterable[int],
        init_channels: int | None = None,
        num_cells: int = IMAGENET_CELLS,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: str | Callable[..., nn.Module] = nn.ReLU,
        auxiliary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._given_arguments = {}
        self.genotype = read_genotype(genotype)
        if init_channels is None:
            init_channels = fit_channels(self.genotype)
        shapes = cell_shapes(init_channels, num_cells, "imagenet", output_stride)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}.")
        self._layers = _find_layers(norm_layer, act_layer, device, dtype)
        self.init_channels, self.num_cells = init_channels, num_cells
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.drop_path_prob = float(drop_path_rate)
        self.grad_checkpointing = False
        self.pruned: tuple[str, ...] = ()
        self.stem0, self.stem1 = build_imagenet_stem(init_channels, in_chans, self._layers)
        self.cells = nn.ModuleList(
            Cell.from_shape(shape, self.genotype.reduce if shape.reduction else self.genotype.normal, self._layers)
            for shape in shapes
        )

        self.feature_info, self._taps = _features(init_channels, shapes)
        # Before the classifier, as in the official code: timm takes the last two parameters for the classifier's.
        self._auxiliary_tap = 2 * num_cells // 3 + 1
        self.auxiliary_head: AuxiliaryHead | None = None
        if auxiliary and num_classes > 0:
            features = shapes[self._auxiliary_tap - 1].out_channels
            self.auxiliary_head = AuxiliaryHead(features, num_classes, "imagenet", self._layers)

        self.num_features = shapes[-1].out_channels
        self.global_pool, self.head_drop, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **self._layers.placement
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm saves with a network: those given, but the genotype as numbers, not as a path."""
        sizes = {"init_channels": self.init_channels, "num_cells": self.num_cells}
        return {**self._given_arguments, "genotype": plain_genotype(self.genotype), **sizes}

    @_model_args.setter
    def _model_args(self, given: Mapping[str, Any]) -> None:
        self._given_arguments = dict(given)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that are not to be decayed: none, as in the paper."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the parameters from the input to the head; coarse: by stage."""
        if not coarse:
            return {"stem": r"^stem[01]", "blocks": r"^cells\.(\d+)"}
        blocks, start = [], 0
        for stage, end in enumerate(self._taps[1:]):
            cells = "|".join(str(index) for index in range(start, end))
            blocks.append((rf"^cells\.(?:{cells})\.", (stage,)))
            start = end
        return {"stem": r"^stem[01]", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each cell in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and that of the auxiliary head, by fresh ones.

        Args:
            num_classes: Outputs; 0: no classifier and no auxiliary head.
            global_pool: Another pooling; None: as it was.
        """
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        reference = self.stem0[0].weight
        self._layers = Layers(self._layers.norm, self._layers.act, reference.device, reference.dtype)
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **self._layers.placement
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if num_classes == 0:
            self.auxiliary_head = None
        elif self.auxiliary_head is not None:
            inputs = self.auxiliary_head.classifier.in_features
            self.auxiliary_head.classifier = nn.Linear(inputs, num_classes, **self._layers.placement)
            self.auxiliary_head.classifier.train(self.training)
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    @torch.jit.ignore
    def stages(self) -> list[list[nn.Module]]:
        """Modules grouped by the feature that they compute: the stem, then the cells up to each reduction."""
        ends = zip(self._taps, self._taps[1:], strict=False)
        return [[self.stem0, self.stem1], *(list(self.cells[start:end]) for start, end in ends)]

    def _run(self, x: Tensor, taps: list[int], last: int) -> tuple[Tensor, list[Tensor]]:
        """Run the stem and the first ``last`` cells; returns the last features, and those at ``taps``."""
        s0 = self.stem0(x)
        tapped = [s0] if 0 in taps else []
        s1 = s0
        if last > 0:
            s1 = self.stem1(s0)
        for index, cell in enumerate(self.cells):
            if index < last:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    out = checkpoint(cell, s0, s1, self.drop_path_prob)
                else:
                    out = cell(s0, s1, self.drop_path_prob)
                s0, s1 = s1, out
                if index + 1 in taps:
                    tapped.append(s1)
        return s1, tapped

    def forward_features(self, x: Tensor) -> Tensor:
        """Features ``(N, num_features, H / 32, W / 32)``, rounded up, of images ``(N, in_chans, H, W)``."""
        taps: list[int] = []
        return self._run(x, taps, len(self.cells))[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``(N, num_classes)`` of features; before the classifier: ``(N, head_hidden_size)``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    # No return annotation, so that TorchScript infers a tensor where there is no auxiliary head.
    def forward(self, x: Tensor):
        """Logits ``(N, num_classes)`` of images ``(N, in_chans, H, W)``.

        In training with an auxiliary head: a pair of such tensors, the auxiliary logits second.
        """
        if self.auxiliary_head is not None:
            return self._forward_with_auxiliary(x)
        else:  # TorchScript compiles what follows a return, but not the branch that is not taken.
            return self.forward_head(self.forward_features(x))

    def _forward_with_auxiliary(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and self.auxiliary_head is not None:
            features, tapped = self._run(x, [self._auxiliary_tap], len(self.cells))
            return self.forward_head(features), self.auxiliary_head(tapped[0])
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute features of several strides, those of :attr:`feature_info`.

        Args:
            x: Images ``(N, in_chans, H, W)``.
            indices: Indices of the features; an integer n: the last n; None: all.
            norm: Has no effect, there is no last normalisation.
            stop_early: Skip the cells behind the last of ``indices``.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return the features without the final ones.

        Returns:
            The features; without ``intermediates_only`` a pair of the final features and them.

        Raises:
            ValueError: An index out of range, or another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"The features of this network are NCHW, got output_fmt={output_fmt!r}.")
        taken = self._take(indices)
        taps = [self._taps[index] for index in taken]
        last = max(taps) if stop_early or intermediates_only else len(self.cells)
        final, features = self._run(x, taps, last)
        # In the order asked for, which may differ from the network's.
        ordered = sorted(set(taps))
        intermediates = [features[ordered.index(tap)] for tap in taps]
        return intermediates if intermediates_only else (final, intermediates)

    def _take(self, indices: int | Iterable[int] | None) -> list[int]:
        count = len(self._taps)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"The last {indices} features were asked for, and the network has 1 to {count}.")
            return list(range(count - indices, count))
        taken = list(indices)
        if wrong := [index for index in taken if not -count <= index < count]:
            strides = ", ".join(str(info["reduction"]) for info in self.feature_info)
            raise ValueError(
                f"Feature index {wrong[0]} is out of range: the network has {count} features (0 to {count - 1}, or "
                f"{-count} to -1), of strides {strides}."
            )
        if not taken:
            raise ValueError("No feature was asked for: indices are empty.")
        return [index % count for index in taken]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features ``indices`` do not need.

        Args:
            indices: Indices of the features to keep, as in :meth:`forward_intermediates`.
            prune_norm: Has no effect.
            prune_head: Remove the classifier, also where all cells stay.

        Returns:
            The indices, none negative.

        Raises:
            ValueError: An index out of range.
        """
        taken = self._take(indices)
        last = self._taps[max(taken)]
        pruned = last < len(self.cells)
        self.pruned += tuple(f"cells.{index}." for index in range(last, len(self.cells)))
        self.cells = self.cells[:last]
        if last == 0:
            self.pruned += ("stem1.",)
            self.stem1 = nn.Identity()
        if pruned:
            self.num_features = self.feature_info[max(taken)]["num_chs"]
            self.feature_info = self.feature_info[: max(taken) + 1]
            self._taps = self._taps[: max(taken) + 1]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights into the network: its own, or those of an official checkpoint.

        Prefixes (``module.``), the profiler's buffers, and the auxiliary head where this network has none are
        left out. With another number of classes the classifier keeps its fresh values, with other input
        channels the first convolution is adapted as timm does; both are logged.

        Args:
            state_dict: Tensors by name.
            strict: Require that all other tensors and those of the network match one another.
            assign: Replace the network's tensors instead of copying into them.

        Returns:
            PyTorch's record of missing and unexpected names.

        Raises:
            RuntimeError: Names or shapes do not fit; the message has those that are missing and left over.
        """
        state, partial = fit_state(state_dict, self, strict)
        return super().load_state_dict(state, strict=strict and not partial, assign=assign)


class GenasFeatures(FeatureGetterNet):
    """The network of ``features_only=True``: cut behind its last feature, and yet able to load whole checkpoints."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`GenasNet.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See :meth:`GenasNet.load_state_dict`; names may have the prefix ``model.`` or not."""
        if all(name.startswith("model.") for name in state_dict):
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        return self.model.load_state_dict(state_dict, strict, assign)


def _features(init_channels: int, shapes: Sequence[CellShape]) -> tuple[list[dict[str, Any]], list[int]]:
    """timm's table of features, and where each is computed: 0 is the output of ``stem0``, k that of cell k - 1."""
    table, taps = [{"num_chs": init_channels, "reduction": _STEM_STRIDE // 2, "module": "stem0"}], [0]
    stride = _STEM_STRIDE
    for index, shape in enumerate(shapes):
        if shape.reduction and not shape.replace_stride:
            stride *= 2
        if index + 1 == len(shapes) or shapes[index + 1].reduction:
            table.append({"num_chs": shape.out_channels, "reduction": stride, "module": f"cells.{index}"})
            taps.append(index + 1)
    return table, taps


def _find_layers(norm: Any, act: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Layers:
    try:
        layers = Layers(get_norm_layer(norm), get_act_layer(act), device, dtype)
    except KeyError as error:
        raise ValueError(f"timm has no normalisation or activation layer {error}.") from error
    if layers.norm is None or layers.act is None:
        raise ValueError(f"norm_layer and act_layer cannot be left out, got {norm!r} and {act!r}.")
    return layers
