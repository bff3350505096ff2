"""Genotypes from and to samples of the DARTS space in NNI's hub, whose published architectures they are too."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nni.nas.hub.pytorch import DARTS

from genas_plugins._messages import shown
from genas_plugins.darts.genotype import NODES, OPERATIONS, Genotype, cell_edges

__all__ = ["genotype_from_hub", "genotype_to_hub", "published_genotypes"]

# The hub has no list of what DARTS.load_searched_model knows.
_PUBLISHED = ("darts-v2",)
_LABEL = re.compile(r"(normal|reduce)/(op|input)_(\d+)_([01])")


def genotype_from_hub(sample: Mapping[str, Any]) -> Genotype:
    """The genotype of a sample of the hub's DARTS space (``normal/op_2_0``, ``normal/input_2_0`` and so on).

    ``CellNetwork(genotype, width, num_cells, num_classes, dataset)`` is NNI's network for the sample: it has the same
    tensors in the same order. What the sample says of ``width`` and ``depth`` is no part of a genotype.

    Raises:
        ValueError: The sample lacks a label, has a label, an operation or a node that the space of DARTS does not have,
            or lets a node take one input twice, which that space allows and a genotype cannot say.
    """
    found = {match.groups(): value for label, value in sample.items() if (match := _LABEL.fullmatch(label))}
    for (cell, kind, _, _), value in found.items():
        if kind == "op" and value not in OPERATIONS[1:]:
            raise ValueError(
                f"The {cell} cell of the sample has the operation {shown(value)}, which the space of DARTS does not; "
                f"its operations: {', '.join(OPERATIONS[1:])}."
            )
    if strange := sorted({label for label in sample if not _LABEL.fullmatch(label)} - {"width", "depth"}):
        raise ValueError(f"The sample has the label {shown(strange[0])}, which the hub's DARTS space does not.")
    if deep := sorted({int(node) for _, _, node, _ in found} - {*NODES}):
        raise ValueError(f"The sample has a node {deep[0]}; cells of the space of DARTS have the nodes {NODES}.")
    return Genotype(*(_cell(found, cell) for cell in ("normal", "reduce")))


def genotype_to_hub(genotype: Genotype) -> dict[str, Any]:
    """The sample of a genotype in the hub's DARTS space, for ``DARTS.frozen_factory(sample)`` and the like.

    A space with several widths or depths also wants ``width`` and ``depth``.

    Raises:
        ValueError: A node has one input only, for which the hub's space has no operation.
    """
    sample: dict[str, Any] = {}
    for cell in ("normal", "reduce"):
        edges = list(cell_edges(getattr(genotype, cell)))
        for node in NODES:
            entering = [(operation, source) for target, operation, source in edges if target == node]
            if len(entering) != 2:
                raise ValueError(
                    f"Node {node} of the {cell} cell has {len(entering)} input; in the hub's DARTS space it has two."
                )
            for number, (operation, source) in enumerate(entering):
                sample[f"{cell}/op_{node}_{number}"] = operation
                sample[f"{cell}/input_{node}_{number}"] = [source]
    return sample


def published_genotypes() -> dict[str, Genotype]:
    """What the hub's ``DARTS.load_searched_model`` knows, by name; nothing is built or downloaded."""
    return {name: genotype_from_hub(_Asked.load_searched_model(name)) for name in _PUBLISHED}


class _Asked(DARTS):
    """Tells the sample of a searched model instead of building it."""

    @classmethod
    def frozen_factory(cls, sample: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        return lambda **arguments: sample


def _cell(found: Mapping[tuple[str, ...], Any], cell: str) -> tuple[tuple[str, int], ...]:
    pairs = []
    for node in NODES:
        for number in "01":
            keys = [(cell, kind, str(node), number) for kind in ("op", "input")]
            for key in keys:
                if key not in found:
                    raise ValueError(f"The sample lacks the label {cell}/{key[1]}_{node}_{number}.")
            operation, source = (found[key] for key in keys)
            if isinstance(source, list | tuple) and len(source) == 1:
                source = source[0]
            pairs.append((operation, source))
    return tuple(pairs)
