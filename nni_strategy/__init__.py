"""GeNAS in NNI: model spaces, a one-shot strategy, evaluators and experiments written as YAML files."""

import os
import warnings

from genas_plugins._optional import require

# NNI gives its tuner ten seconds to connect, which is less than these imports take on a busy machine.
if os.environ.get("SDK_PROCESS") != "dispatcher":
    with warnings.catch_warnings():
        # NNI wraps all that torch.nn exports, and warns of what is younger than NNI.
        warnings.filterwarnings("ignore", message=".*found to be not a nn.Module", category=RuntimeWarning)
        for _package in ("tqdm", "nni", "pytorch_lightning", "nni.nas.nn.pytorch"):
            require(_package, extra="nni", purpose="nni_strategy")

    from nni_strategy.cluster import ClusterGeNAS
    from nni_strategy.evaluators import CombinedEvaluator, FlatnessEvaluator
    from nni_strategy.export import build_network, fixed_network
    from nni_strategy.hub import genotype_from_hub, genotype_to_hub, published_genotypes
    from nni_strategy.nadarts import NADarts
    from nni_strategy.neighbourhood import NARandomSearch
    from nni_strategy.space import DartsSpace, NasBench201Space
    from nni_strategy.strategy import GeNAS
    from nni_strategy.training import SupernetModule, supernet_evaluator

__all__ = [
    "ClusterGeNAS",
    "CombinedEvaluator",
    "DartsSpace",
    "FlatnessEvaluator",
    "GeNAS",
    "NADarts",
    "NARandomSearch",
    "NasBench201Space",
    "SupernetModule",
    "build_network",
    "fixed_network",
    "genotype_from_hub",
    "genotype_to_hub",
    "published_genotypes",
    "supernet_evaluator",
]
