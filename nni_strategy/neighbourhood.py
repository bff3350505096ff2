"""Random search of neighbourhoods, NA-RS of Wang et al. (BMVC 2021, arXiv 2105.06369), as an NNI strategy."""

from __future__ import annotations

from typing import Any

from nni.nas.oneshot.pytorch.strategy import MutationHook

from genas_plugins._keywords import keywords_of
from genas_plugins.scoring import CombinedScore, NeighbourhoodScore
from nni_strategy.strategy import GeNAS

__all__ = ["NARandomSearch"]


class NARandomSearch(GeNAS):
    """Train a supernet by uniform path sampling, and draw architectures at random: the best has the best neighbourhood.

    A candidate's score is put together from its own and those of its neighbours. All of these measurements count, so
    that searches of one budget compare, whatever the neighbourhood; ``size=0`` is plain random search. What neighbours
    have in common is measured once.

    >>> strategy = NARandomSearch(evaluations=500, aggregate="min", size=8, metric="accuracy")
    >>> strategy.neighbourhood.aggregate, strategy.evolution.evaluations
    ('min', 500)

    Args:
        evaluations: Measurements of single architectures that the search may take.
        aggregate: See :class:`genas_plugins.scoring.NeighbourhoodScore`, as the following.
        distance: See there.
        size: See there.
        include_self: See there.
        inputs: See there.
        batch: Candidates that are drawn before what they need is measured, several at a time.
        mutation_hooks: See :class:`GeNAS`.
        **settings: Of the score (``metric`` and so on), and others of :class:`GeNAS` but those of the evolution.

    Raises:
        ValueError: A setting is out of its range.
    """

    @keywords_of(CombinedScore)
    def __init__(
        self,
        *,
        evaluations: int = 1000,
        aggregate: str = "mean",
        distance: int = 1,
        size: int | None = None,
        include_self: bool = True,
        inputs: bool = False,
        batch: int = 10,
        mutation_hooks: list[MutationHook] | None = None,
        **settings: Any,
    ) -> None:
        own = {name: settings.pop(name) for name in list(settings) if name in CombinedScore.__dataclass_fields__}
        score = NeighbourhoodScore(CombinedScore(**own), aggregate, distance, size, include_self, inputs)
        random = {"population": batch, "parents": 1, "mutants": 0, "crossovers": 0, "evaluations": evaluations}
        super().__init__(score=score, mutation_hooks=mutation_hooks, **random, **settings)
