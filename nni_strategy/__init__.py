"""GeNAS in NNI: model spaces, a one-shot strategy, evaluators and experiments written as YAML files."""

from genas_plugins._optional import require

for _package in ("nni", "pytorch_lightning"):
    require(_package, extra="nni", purpose="nni_strategy")


from nni_strategy.space import DartsSpace  # noqa: E402
from nni_strategy.strategy import GeNAS  # noqa: E402
from nni_strategy.training import SupernetModule, supernet_evaluator  # noqa: E402

__all__ = ["DartsSpace", "GeNAS", "SupernetModule", "supernet_evaluator"]
