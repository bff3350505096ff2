"""GeNAS with a supernet that is trained already, as a multi-trial strategy of NNI on any of its training services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nni.nas.space import ExecutableModelSpace
from nni.nas.strategy import Strategy

from genas_plugins.cluster.search import ClusterRun
from genas_plugins.search import Record
from nni_strategy.evaluators import CombinedEvaluator
from nni_strategy.export import ranked_models
from nni_strategy.service import NniService
from nni_strategy.space import space_around

__all__ = ["ClusterGeNAS"]


class ClusterGeNAS(Strategy):
    """Search the run folder of an evaluator, whose candidates NNI's engine spreads over processes and machines.

    The folder is that of ``genas search --train-only``, or of a search that was ended, and says what is searched and
    how; it is locked, and holds at the end what a search leaves. The result is that of the search in one process.

    >>> ClusterGeNAS(workers=2)
    ClusterGeNAS(service='local', workers=2)

    Args:
        service: ``"local"``, or the path of an experiment file of NNI (``docs/cluster.md``).
        workers: Processes that score, of the local service.
        tries: How often a candidate is given to a trial before it has failed.
    """

    def __init__(self, *, service: str = "local", workers: int = 1, tries: int = 3) -> None:
        super().__init__()
        self.service, self.workers, self.tries = service, workers, tries
        self.records: list[Record] = []
        self._best: list[tuple[Any, float]] = []
        self._space: Any = None

    def extra_repr(self) -> str:
        return f"service={self.service!r}, workers={self.workers}"

    def _run(self) -> None:
        """Search.

        Raises:
            TypeError: The evaluator is no :class:`~nni_strategy.evaluators.CombinedEvaluator`.
            ValueError: It has no run folder, the space is not the supernet's, or the folder cannot be searched.
            RuntimeError: See :class:`nni_strategy.service.NniService`.
            OSError: The folder cannot be written to.
        """
        evaluator = self.model_space.evaluator
        if not isinstance(evaluator, CombinedEvaluator):
            raise TypeError(f"ClusterGeNAS needs a FlatnessEvaluator of a run, got {type(evaluator).__name__}.")
        folder = Path(evaluator.supernet).resolve()
        if not folder.is_dir():
            raise ValueError(f"ClusterGeNAS searches a run folder, and {evaluator.supernet} is a file.")
        run = ClusterRun(folder, self.tries)
        try:
            self._space = space_around(run.supernet)
            if self.model_space.simplify().keys() != self._space.simplify().keys():
                raise ValueError(
                    f"The supernet in {folder} is one of {type(self._space).__name__}: give the experiment that space."
                )
            NniService(folder, self.service, self.workers, self.tries).spread(run.dispatch, run.space, run.identity)
            self.records, self._best = run.dispatch.records, run.dispatch.evolution.best()
            run.finish()
        finally:
            run.close()

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[ExecutableModelSpace]:
        """The best architectures, best first, which carry the weights and statistics of their paths.

        Args:
            sort: Must be true.
            limit: Number of models; ``None`` for all that were scored.

        Raises:
            ValueError: ``sort`` is false.
        """
        if not sort:
            raise ValueError("ClusterGeNAS lists models by score only; sort must be true.")
        yield from ranked_models(self._space, self._space.to_sample, self._best[:limit])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all is in the run folder, with which an experiment goes on."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict`."""
