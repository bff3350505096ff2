"""Modules under the names that they had before they got rooms: users' code still imports them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "genas_plugins.genotype": "genas_plugins.darts.genotype",
    "genas_plugins.network": "genas_plugins.darts.network",
    "genas_plugins.operations": "genas_plugins.darts.operations",
    "genas_plugins.path_sgd": "genas_plugins.training.path_sgd",
    "genas_plugins.profiling": "genas_plugins.experiment.profiling",
    "genas_plugins.ranking": "genas_plugins.correlation.statistics",
    "genas_plugins.scoring.training_free": "genas_plugins.correlation.training_free",
    "genas_plugins.spaces.darts": "genas_plugins.darts.space",
    "genas_plugins.spaces.nasbench201": "genas_plugins.nasbench201",
    "genas_plugins.supernet": "genas_plugins.darts.supernet",
    "genas_plugins.truth": "genas_plugins.nasbench201.truth",
    "genas_plugins.zoo": "genas_plugins.darts.zoo",
    "nni_strategy.config": "genas_plugins.experiment.config",
    "nni_strategy.correlate": "genas_plugins.correlation.run",
    "nni_strategy.progress": "genas_plugins.experiment.progress",
    "nni_strategy.report": "genas_plugins.correlation.report",
    "nni_strategy.resuming": "genas_plugins.experiment.resuming",
    "nni_strategy.settings": "genas_plugins.correlation.settings",
}


class _Mover(MetaPathFinder, Loader):
    """Gives the moved module itself, not a copy."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def install() -> None:
    """Let Python find the modules under their old names, once."""
    if not any(isinstance(finder, _Mover) for finder in sys.meta_path):
        # First: a stale installation may still have the files.
        sys.meta_path.insert(0, _Mover())
