"""NNI's search space of a run, for tuners that know nothing of architectures."""

from __future__ import annotations

from typing import Any

from genas_plugins.neighbourhood import values_by_label

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
    return {label: {"_type": "choice", "_value": values} for label, values in values_by_label(space.choices).items()}
