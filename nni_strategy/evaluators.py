"""NNI evaluators that score a model with the weights of a trained supernet, for multi-trial strategies."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nni
from nni.nas.evaluator import Evaluator
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.space import ExecutableModelSpace

from genas_plugins._keywords import keywords_of
from genas_plugins.checkpoints import load_supernet
from genas_plugins.checks import check_count, check_device, check_seed
from genas_plugins.darts.genotype import Genotype
from genas_plugins.datasets import load_search_data
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.nasbench201 import NasBench201Architecture
from genas_plugins.scoring import CombinedScore, Measurement, NeighbourhoodScore
from nni_strategy.samples import SampleSpace
from nni_strategy.space import space_around
from nni_strategy.strategy import GeNAS
from nni_strategy.trained import load_space_weights, scorer_of

__all__ = ["CombinedEvaluator", "FlatnessEvaluator"]


@nni.trace
class CombinedEvaluator(Evaluator):
    """Score the model that a multi-trial strategy proposes, by any metric, with a trained supernet's weights.

    Nothing is trained: a trial takes as long as scoring one candidate. The score is reported to NNI as the
    final result; the noise of a candidate is a function of ``seed`` and the candidate, so that repeated
    trials agree.

    Args:
        supernet: The run folder of ``genas search``, or a checkpoint: the official supernet's, one of this
            package, or (with ``space``) the state dict of a mutated space.
        metric: See :class:`genas_plugins.scoring.CombinedScore`.
        data: With a checkpoint: keyword arguments of
            :func:`genas_plugins.datasets.load_search_data`. A run folder knows its own.
        space: With a checkpoint of another space than those of this package: the model space, unmutated. It is
            left as it is.
        initial: With a checkpoint: the weights before training, for metrics with the angle.
        seed: Seed of the noise, with a checkpoint. With a run folder, the run's.
        batch_size: Validation images a batch, with a checkpoint; ``None`` chooses by the device.
        device: To score on; ``None`` for CUDA where there is one.
        neighbourhood: Settings of a :class:`genas_plugins.scoring.NeighbourhoodScore`, for instance ``{"aggregate":
            "min"}``: neighbours are measured too, each once a process, and what is reported is put together.
        threads: PyTorch's threads on a CPU; see :meth:`genas_plugins.experiment.scorer.Scorer.on_data`.
        **settings: Other settings of :class:`genas_plugins.scoring.CombinedScore`. Where one is missing or ``None``,
            the run folder's is taken, or that class's default with a checkpoint.

    Raises:
        ValueError: A wrong setting; ``data`` is missing with a checkpoint; or ``data``, ``space``, ``initial`` or
            ``batch_size`` come with a run folder, which knows its own.
        TypeError: A setting is not of its kind, ``data`` has a key that :func:`load_search_data` does not know, or
            ``space`` is no model space.
        FileNotFoundError: ``supernet`` or ``initial`` does not exist.
    """

    @keywords_of(CombinedScore, **dict.fromkeys(CombinedScore.__dataclass_fields__))
    def __init__(
        self,
        supernet: str | Path,
        metric: str = "angle+flatness",
        *,
        data: Mapping[str, Any] | None = None,
        space: ModelSpace | None = None,
        initial: str | Path | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        device: str | None = None,
        neighbourhood: Mapping[str, Any] | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        self.supernet = str(supernet)
        given = {name: value for name, value in settings.items() if value is not None}
        if "sigmas" in given:
            given["sigmas"] = tuple(given["sigmas"])
        self.settings = {"metric": metric, **given}
        score = CombinedScore(**self.settings)
        self._near = None if neighbourhood is None else NeighbourhoodScore(score, **neighbourhood)
        path = Path(supernet)
        if not path.exists():
            raise FileNotFoundError(f"There is no run folder or checkpoint {path}.")
        if path.is_file() and data is None:
            raise ValueError(f"With the checkpoint {path}, pass data= to say which images to score on.")
        if space is not None and not isinstance(space, ModelSpace):
            raise TypeError(f"space must be an NNI ModelSpace, got {type(space).__name__}.")
        # All that can be known before the first trial, which may be hours away in a queue.
        own = {"data": data, "space": space, "initial": initial, "batch_size": batch_size}
        if path.is_dir() and (given := [name for name, value in own.items() if value is not None]):
            raise ValueError(f"The run folder {path} has its own {', '.join(given)}: leave out, or name a checkpoint.")
        if data is not None:
            known = inspect.signature(load_search_data).parameters
            if not isinstance(data, Mapping) or "name" not in data or not known.keys() >= data.keys():
                raise TypeError(f"data holds a name and any of {', '.join(list(known)[1:])}; got {data!r}.")
        if initial is not None and not Path(initial).is_file():
            raise FileNotFoundError(f"There is no file {initial} with the weights before training.")
        for name, count in (("batch_size", batch_size), ("threads", threads)):
            if count is not None:
                check_count(name, count)
        if device is not None:
            check_device(device)
        self._arguments = (data, initial, check_seed(seed), batch_size, device, threads)
        self._trained: Scorer | None = None

    def extra_repr(self) -> str:
        return f"supernet={self.supernet!r}, " + ", ".join(f"{k}={v!r}" for k, v in self.settings.items())

    @property
    def trained(self) -> Scorer:
        """The supernet with its data, loaded at first use and kept for the trials that follow."""
        if self._trained is None:
            self._trained = self._load()
        return self._trained

    def measure(self, model: Any) -> Measurement:
        """Score a genotype or NAS-Bench-201 architecture, a network that has one, or an NNI sample.

        Raises:
            TypeError: The model does not tell its architecture.
        """
        trained, score = self.trained, None
        if self._near is not None:
            # Over the settings of the run folder, where that has them.
            score = dataclasses.replace(self._near, score=trained.score)
        return trained.measure(self._candidate(model), score)

    def _candidate(self, model: Any) -> Any:
        space = self.trained.paths.search_space
        if isinstance(model, Genotype | NasBench201Architecture):
            return model
        if isinstance(model, Mapping):
            return space.from_json(dict(model)) if isinstance(space, SampleSpace) else space.from_sample(model)
        network = getattr(model, "network", model)
        for own in (getattr(network, name, None) for name in ("genotype", "architecture")):
            if isinstance(own, Genotype | NasBench201Architecture):
                return own
        raise TypeError(
            f"{type(model).__name__} does not tell its architecture; expected a Genotype, a network with a "
            "genotype, or an NNI sample."
        )

    def evaluate(self, model: Any) -> float:
        """Score a model (see :meth:`measure`) and, inside an experiment, report it to NNI."""
        score = self.measure(model).score
        if nni.get_current_parameter() is not None:
            nni.report_final_result(score)
        return score

    def _execute(self, model: ExecutableModelSpace) -> float:
        # The sample says it all; building the proposed network would be lost time.
        return self.evaluate(model.sample)

    def _load(self) -> Scorer:
        data, initial, seed, batch_size, device, threads = self._arguments
        path = Path(self.supernet)
        if path.is_dir():
            trained = Scorer.from_run(path, device=device, threads=threads)
            trained.score = dataclasses.replace(trained.score, **self.settings)
            return trained
        # In place of a space NNI gives a traced class its default model; the space stays in what is recorded.
        recorded = self.trace_kwargs.get("space")  # type: ignore[attr-defined]
        space = None if recorded is None else recorded.trace_copy().get()
        if space is not None:
            GeNAS().mutate_model(space)
        before = None
        if initial is not None:
            before = {name: tensor.clone() for name, tensor in _opened(space, initial).named_parameters()}
        space = _opened(space, path)
        return scorer_of(
            space,
            load_search_data(**(data or {})),
            CombinedScore(**self.settings),
            initial=before,
            seed=seed,
            batch_size=batch_size,
            device=device,
            threads=threads,
        )


def _opened(space: ModelSpace | None, path: str | Path) -> ModelSpace:
    if space is None:
        return space_around(load_supernet(path))
    load_space_weights(space, path)
    return space


@nni.trace
class FlatnessEvaluator(CombinedEvaluator):
    """Score the model that a multi-trial strategy proposes by its flatness (Eq. 4).

    Args:
        supernet: Run folder or checkpoint; see :class:`CombinedEvaluator`, as for all other arguments.
    """

    def __init__(self, supernet: str | Path, **settings: Any) -> None:
        if "metric" in settings:
            raise TypeError("FlatnessEvaluator always measures flatness; CombinedEvaluator takes a metric.")
        super().__init__(supernet, "flatness", **settings)
