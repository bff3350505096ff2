"""NNI's search space of a run, for tuners that know nothing of architectures."""

from __future__ import annotations

from itertools import combinations
from typing import Any

__all__ = ["nni_search_space"]


def nni_search_space(space: Any) -> dict[str, dict[str, Any]]:
    """The choices of a space as the search space of an experiment of NNI.

    >>> from genas_plugins.spaces import DartsSearchSpace, NasBench201SearchSpace
    >>> nni_search_space(DartsSearchSpace())["normal/inputs_3"]
    {'_type': 'choice', '_value': [[0, 1], [0, 2], [1, 2]]}
    >>> nni_search_space(NasBench201SearchSpace())["cell/0_1"]["_value"][:2]
    ['none', 'skip_connect']

    Args:
        space: See :class:`genas_plugins.spaces.Space`.
    """
    return {
        label: {"_type": "choice", "_value": list(values if count == 1 else map(list, combinations(values, count)))}
        for label, (values, count) in space.choices.items()
    }
