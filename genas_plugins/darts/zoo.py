"""Published genotypes, with the channels, counts and figures of the GeNAS paper.

Four genotypes of GeNAS and twelve that the paper compares with, or that come with one of these, from its tables, from
genotypes.py of the official code and from their authors' code. They are data, in ``zoo.json`` beside this module.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from genas_plugins._messages import shown, suggestion
from genas_plugins._reading import ReadingError, parse_json, user_path
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork

__all__ = ["ZOO", "ZooEntry", "find_genotype"]

IMAGENET_CELLS = 14
OFFICIAL = "clovaai/GeNAS@fd3cba8, retrain_architecture/genotypes.py"


@dataclass(frozen=True)
class ZooEntry:
    """A published genotype and its ImageNet network of 14 cells.

    Attributes:
        name: Key of the entry in :data:`ZOO`.
        genotype: The two cells, their pairs in the published order.
        init_channels: C of the ImageNet network, chosen by the paper for about 600 M multiply-adds, or by the authors.
        params: Parameters of the network, without the auxiliary head, for 1000 classes.
        macs_million: Multiply-adds in millions at 224x224, convolutions and linear layers.
        search_dataset: Data set of the search, for instance ``"CIFAR-100"``.
        metric: Score that the search maximised.
        paper: Figures of the paper, whichever it gives: ``params_million`` and ``macs_giga``; in percent
            ImageNet ``top1``, ``top5``, ``imagenet_v2`` and ``imagenet_a``, ``coco_ap`` (RetinaNet),
            ``cityscapes_miou`` (DeepLab-v3).
        note: Further remarks, or None.
        source: Repository, commit and file that the genotype is from.

    Example:
        >>> from genas_plugins import ZOO
        >>> entry = ZOO["genas_flatness_c100"]
        >>> entry.init_channels, entry.params, entry.paper["top1"]
        (46, 5195205, 76.05)
    """

    name: str
    genotype: Genotype
    init_channels: int
    params: int
    macs_million: float
    search_dataset: str
    metric: str
    paper: Mapping[str, float] = field(hash=False)
    note: str | None = None
    source: str = OFFICIAL

    def network(self, num_classes: int = 1000, auxiliary: bool = False) -> CellNetwork:
        """Build the ImageNet network with fresh weights.

        Raises:
            ValueError: ``num_classes`` is below 1.
        """
        return CellNetwork(self.genotype, self.init_channels, IMAGENET_CELLS, num_classes, auxiliary=auxiliary)


def find_genotype(text: str | os.PathLike[str]) -> Genotype:
    """Find the genotype that a user means.

    Args:
        text: A name in :data:`ZOO`, the path of a genotype's JSON file or the JSON itself, or a code: 28 operation
            numbers separated by commas or spaces, with or without brackets.

    Raises:
        ValueError: It is none of these (the message lists the names), the file holds no genotype, or the code
            is not one.

    Example:
        >>> from genas_plugins.darts.zoo import find_genotype
        >>> genotype = find_genotype("genas_flatness_c100")
        >>> genotype.normal[:2]
        (('skip_connect', 0), ('sep_conv_5x5', 1))
        >>> find_genotype(str(genotype)) == genotype
        True
    """
    text = os.fspath(text)
    if text in ZOO:
        return ZOO[text].genotype
    numbers = re.findall(r"[^\s,]+", text.strip().strip("[]()"))
    if numbers and all(re.fullmatch(r"-?\d+", number) for number in numbers):
        return Genotype.from_code(int(number) for number in numbers)
    if text.lstrip().startswith("{"):
        try:
            return Genotype.from_dict(parse_json(text))
        except ReadingError as error:
            raise ValueError(f"{shown(text)} is not JSON: {error}.") from error
    if os.path.isfile(user_path(text)):
        return Genotype.load(text)
    near = suggestion(text.lower().replace("-", "_"), ZOO)
    raise ValueError(
        f"{shown(text)} is neither a published genotype{near}, nor a genotype's JSON file, nor 28 operation numbers. "
        f"Published genotypes: {', '.join(ZOO)}."
    )


def _read() -> Mapping[str, ZooEntry]:
    data = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))
    entries = {}
    for name, fields in data.items():
        genotype = Genotype(fields.pop("normal"), fields.pop("reduce"))
        entries[name] = ZooEntry(name=name, genotype=genotype, **fields)
    return MappingProxyType(entries)


ZOO: Mapping[str, ZooEntry] = _read()
"""The published genotypes by name, read-only."""
