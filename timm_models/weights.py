"""Fits weights with the names of the official code to a network, which may differ in its head or its input."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor

from genas_plugins.checkpoints import CheckpointError, describe_mismatch, network_state, read_state, unwrapped

if TYPE_CHECKING:
    from timm_models.network import GenasNet

__all__ = ["check_pretrained", "fit_state", "read_weights"]

_logger = logging.getLogger(__name__)

_FIRST_CONV = "stem0.0.weight"
_HEADS = ("classifier.", "auxiliary_head.classifier.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint of any timm network as data, with the names of tensors that timm uses.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: See :func:`genas_plugins.checkpoints.read_state`.
    """
    return clean_state_dict(unwrapped(read_state(path)))


def fit_state(state: Mapping[str, Any], model: GenasNet, strict: bool) -> tuple[Mapping[str, Any], bool]:
    """Fit a checkpoint's tensors to the network; see :meth:`GenasNet.load_state_dict`.

    Returns:
        The tensors, and whether a classifier was left out.

    Raises:
        RuntimeError: ``strict``, and the tensors do not fit.
    """
    expected = model.state_dict()
    if state.keys() == expected.keys() and not describe_mismatch(expected, state):
        return state, False
    state = _checked(state, model, expected, strict)
    partial = False
    for head in _HEADS:
        ours, theirs = expected.get(f"{head}bias"), state.get(f"{head}bias")
        if ours is not None and theirs is not None and ours.shape != theirs.shape:
            partial = True
            state = {name: value for name, value in state.items() if not name.startswith(head)}
            _logger.warning(
                "The checkpoint's %s* is for %d classes and is left out: this network has %d, and keeps its fresh one.",
                head,
                len(theirs),
                len(ours),
            )
    channels = state[_FIRST_CONV].shape[1] if _FIRST_CONV in state else model.in_chans
    if channels != model.in_chans:
        state[_FIRST_CONV] = adapt_input_conv(model.in_chans, state[_FIRST_CONV], base_chans=channels)
        _logger.info("%s is adapted from %d to %d input channels.", _FIRST_CONV, channels, model.in_chans)
    return state, partial


def check_pretrained(state: Mapping[str, Any], model: GenasNet) -> dict[str, Any]:
    """Check the tensors of ``pretrained=True`` with a file: timm itself adapts head and input, but is not strict."""
    return _checked(state, model, model.state_dict(), True)


def _checked(state: Mapping[str, Any], model: GenasNet, expected: Mapping[str, Tensor], strict: bool) -> dict[str, Any]:
    try:
        state = network_state(state, "The checkpoint")
    except CheckpointError as error:
        if not strict:
            return dict(state)
        raise RuntimeError(str(error)) from None
    unwanted = model.pruned
    if model.num_classes == 0:
        unwanted += ("classifier.",)
    if model.auxiliary_head is None:
        unwanted += ("auxiliary_head.",)
    # Frozen batch normalisation has no counters: either side may lack them, as in PyTorch.
    counters = {name for name in state.keys() ^ expected.keys() if name.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if not (name in counters or name.startswith(unwanted))}
    # Tensors that are adapted later may only differ in the adapted dimension.
    compared = {name: value for name, value in expected.items() if name not in counters}
    for head in _HEADS:
        _tolerate(compared, state, f"{head}weight", 0)
        _tolerate(compared, state, f"{head}bias", 0)
    _tolerate(compared, state, _FIRST_CONV, 1)
    if strict and (mismatch := describe_mismatch(compared, state)):
        raise RuntimeError(
            f"The checkpoint does not fit this network of the genotype {model.genotype}; tensors: {mismatch}. Is it "
            "that of another genotype, or of another number of channels or cells?"
        )
    return state


def _tolerate(expected: dict[str, Tensor], state: Mapping[str, Any], name: str, dimension: int) -> None:
    if name in expected and isinstance(state.get(name), Tensor) and state[name].dim() == expected[name].dim():
        shape = list(expected[name].shape)
        shape[dimension] = state[name].shape[dimension]
        expected[name] = expected[name].new_empty(shape, device="meta")
