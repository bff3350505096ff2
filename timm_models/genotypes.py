"""The forms in which a genotype comes to a timm model, and the one in which timm saves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.zoo import find_genotype

__all__ = ["plain_genotype", "read_genotype"]


def read_genotype(genotype: Any) -> Genotype:
    """The genotype that an argument stands for.

    Args:
        genotype: A :class:`~genas_plugins.Genotype`; a name of the zoo, the path of a search's JSON file, its text, or
            28 numbers in a text; the data of such a file; or 28 integers.

    Raises:
        ValueError: It is none of these, or no genotype.
        TypeError: It has another type.
    """
    if isinstance(genotype, Genotype):
        return genotype
    if isinstance(genotype, str) or hasattr(genotype, "__fspath__"):
        return find_genotype(genotype)
    if isinstance(genotype, Mapping):
        return Genotype.from_dict(genotype)
    if not isinstance(genotype, Iterable):
        raise TypeError(
            "genotype must be a Genotype, a name of the zoo, the JSON file of a search, or 28 integers; "
            f"got {genotype!r}."
        )
    return Genotype.from_code(genotype)


def plain_genotype(genotype: Genotype) -> list[int] | dict[str, Any]:
    """A genotype as JSON data that :func:`read_genotype` reads anywhere, and that numbers operations as it does.

    That is its 28 integers. They do not have the order of a node's two edges, which numbers the tensors: a genotype
    whose order is another, as that of published ones, is a mapping of its pairs with the integers as ``"code"``.
    """
    code = genotype.code
    canonical = Genotype.from_code(code)
    same = (canonical.normal, canonical.reduce) == (genotype.normal, genotype.reduce)
    return list(code) if same else genotype.to_dict()
