"""GeNAS as an NNI one-shot strategy: train the supernet, search it, rank what was found."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.oneshot.pytorch.strategy import MutationHook
from nni.nas.space import ExecutableModelSpace
from torch import Tensor

from genas_plugins._keywords import keywords_of
from genas_plugins.devices import check_float64
from genas_plugins.experiment.costs import COSTS_FILE, Budget, Counted
from genas_plugins.experiment.neighbours import NEIGHBOURS_FILE
from genas_plugins.experiment.parts import BatchParts, check_loss
from genas_plugins.experiment.preflight import Preflight, check_images, check_measuring
from genas_plugins.experiment.resuming import check_scores
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import CombinedScore, NeighbourhoodScore, Recalibration
from genas_plugins.scoring.data import Batches
from genas_plugins.scoring.losses import Loss, loss_of_image
from genas_plugins.search import Evolution, History, InFlight, Record, SharedSearch, run_search
from genas_plugins.search.pareto import evolution_for
from nni_strategy.batches import EvaluatorBatches, flight_of
from nni_strategy.export import ranked_models
from nni_strategy.loggers import SearchLog, loggers_of
from nni_strategy.oneshot import UniformPathModule
from nni_strategy.samples import SupernetPaths
from nni_strategy.supermodules import UniformPaths

__all__ = ["GeNAS"]

_logger = logging.getLogger(__name__)

_SCORING = (*(item.name for item in dataclasses.fields(CombinedScore)), "momentum")


class GeNAS(UniformPaths):
    """Search for the flattest architecture (Jeong et al., IJCAI 2023) as an NNI one-shot strategy.

    The supernet is trained by uniform path sampling with whatever Lightning evaluator it is given. Then an
    evolution proposes architectures; each is scored with the supernet's weights after batch normalisation was
    recalibrated for it. ``experiment.export_top_models(top_k)`` returns the best, best first. The loggers of the
    evaluator's trainer are told how each generation went (:class:`nni_strategy.loggers.SearchLog`), and shown the
    search at its end.

    >>> strategy = GeNAS(metric="angle+flatness", sigmas=(0.001, 0.003), population=20, mutants=8, crossovers=8)
    >>> sorted(strategy.score.metrics), strategy.evolution.population
    (['angle', 'flatness'], 20)

    Works on every model space that NNI can turn into a supernet. In a distributed run the processes share the
    candidates, each on its own device, with the result of a search in one.

    Args:
        score: What is measured: a :class:`genas_plugins.scoring.CombinedScore`, or its settings as keywords
            (``metric``, ``sigmas``, ``alpha``, ``gamma``, ``noise``, ``recalibration_momentum`` and so on); or a
            :class:`genas_plugins.scoring.NeighbourhoodScore`, with which neighbours are measured too.
        recalibration: Number of training images and momentum, in place of ``recalibration_images`` and
            ``recalibration_momentum``; the batches are those of the loader.
        recalibration_images: Training images for the statistics of batch normalisation; 0 keeps the
            supernet's, and ``None`` are 850, or all that the training loader gives if these are fewer.
        validation_images: Validation images to score on; ``None`` for all that the evaluator's loader gives.
        recalibration_batches: Pairs of images and labels on the scoring device to use instead of the first
            batches of the evaluator's training loader.
        validation_batches: Such pairs instead of the evaluator's validation loader, iterated anew per sigma.
        batch_parts: Where images and labels are in a batch of the evaluator's loaders, after its hooks have
            transferred it: two keys or positions such as ``("image", "label")``, or a function that takes a batch and
            returns images and labels. ``None`` takes the first two of a sequence, and of a mapping the one key of
            each kind that has a usual name.
        loss: What is measured instead of cross-entropy in nats, a function of outputs and labels
            (:func:`genas_plugins.scoring.flatness`): for an evaluator of a regression or of several labels an image.
        racing: Confidence, for instance 0.999, with which a candidate that cannot be among the best ``parents`` so far
            is not measured on further images; the best are those of a search without racing. ``None`` measures all
            on all images. See :mod:`genas_plugins.search.racing`.
        in_flight: Candidates that each device measures at a time, in threads, on CUDA with a stream each
            (:class:`genas_plugins.search.InFlight`). ``None`` chooses: on a CPU as many as PyTorch has threads, each
            on one of them, so that scores do not depend on how many these are; on a GPU 1. Several are for
            :class:`DartsSpace` and :class:`NasBench201Space`, whose candidates are networks of their own; candidates
            of other spaces are measured one after another, on all of PyTorch's threads.
        constraints: The budget of all that the search proposes (the training samples all paths): limits of ``params``,
            ``macs``, ``latency`` (milliseconds) and of what is in ``costs``, as :meth:`genas_plugins.search.Limits.of`
            reads them: ``{"macs": "600M", "params": (4e6, None)}``.
        objectives: Two or more of what the score measures and of costs, for instance ``("flatness", "macs")``, for a
            search by :class:`genas_plugins.search.ParetoEvolution`, whose front :meth:`list_models` gives. None for the
            score alone.
        costs: Costs of your own by name, functions of a candidate (a :class:`~genas_plugins.Genotype`, say, or NNI's
            sample).
        counted: Which network's parameters, multiply-adds and latency are meant in a space of this package, by default
            those of the network that is trained after the search.
        seed: Seed of paths, noise and evolution.
        history: Records of the candidates on disk; a search that finds them there goes on after them.
        on_record: Called with each candidate's record, for progress.
        device: To score on; ``None`` for the one that the trainer uses.
        mutation_hooks: NNI's extra hooks for primitives of your own.
        **settings: Settings of the score, and of the evolution (``population``, ``generations``, ``parents``,
            ``mutants``, ``crossovers``, ``mutation_probability``), see :class:`genas_plugins.search.Evolution`.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: A setting out of its range; the message names it and the valid choices.
    """

    elsewhere: Callable[..., Any] | None = None
    """Who has candidates measured elsewhere, called as :func:`genas_plugins.search.run_search` is."""

    @keywords_of(Evolution, "space", "max_tries")
    @keywords_of(CombinedScore)
    def __init__(
        self,
        *,
        score: CombinedScore | NeighbourhoodScore | None = None,
        recalibration: Recalibration | None = None,
        recalibration_images: int | None = None,
        validation_images: int | None = None,
        recalibration_batches: Batches | None = None,
        validation_batches: Batches | None = None,
        batch_parts: BatchParts | None = None,
        loss: Loss | None = None,
        racing: float | None = None,
        in_flight: int | InFlight | None = None,
        constraints: Mapping[str, Any] | None = None,
        objectives: Sequence[str] = (),
        costs: Mapping[str, Callable[[Any], float]] | None = None,
        counted: Counted | None = None,
        seed: int = 0,
        history: History | None = None,
        on_record: Callable[[Record], None] | None = None,
        device: torch.device | str | None = None,
        mutation_hooks: list[MutationHook] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(mutation_hooks=mutation_hooks)
        scoring = {name: settings.pop(name) for name in _SCORING if name in settings}
        if score is not None and scoring:
            raise TypeError(f"score has its own {', '.join(scoring)}: pass one or the other.")
        self.neighbourhood = score if isinstance(score, NeighbourhoodScore) else None
        self.score = (score.score if isinstance(score, NeighbourhoodScore) else score) or CombinedScore(**scoring)
        if recalibration is not None:
            recalibration_images = recalibration.images
            self.score = dataclasses.replace(self.score, recalibration_momentum=recalibration.momentum)
        self._may_be_fewer = recalibration_images is None
        recalibration_images = Recalibration.images if recalibration_images is None else recalibration_images
        if self.neighbourhood is not None:
            self.neighbourhood = dataclasses.replace(self.neighbourhood, score=self.score)
        check_images(recalibration_images, validation_images)
        check_measuring(device, racing, in_flight, self.neighbourhood or self.score)
        self.racing, self.in_flight = racing, in_flight
        self.recalibration_images = recalibration_images
        self.validation_images = validation_images
        self.seed = seed
        if history is not None:
            check_scores(history, self.score)
        self.history = history
        self.on_record = on_record
        self.device = device
        self.records: list[Record] = []
        self._recalibration_batches, self._validation_batches = recalibration_batches, validation_batches
        self.batch_parts = batch_parts
        self.loss = loss_of_image(loss)
        self.scorer: Scorer | None = None
        self.search_log: SearchLog | None = None
        self._paths: SupernetPaths | None = None
        self._measured: dict[tuple[str, str], float] = {}
        self._alone: dict[str, dict[str, Any]] = {}
        self.budget = Budget(constraints, objectives, costs, counted, self.score.metrics)
        # The experiment's space takes the place of its; wrong settings are refused before it starts.
        self._evolution = evolution_for(self.budget.objectives, racing, seed=seed, **settings)

    def extra_repr(self) -> str:
        return f"score={self.score}, population={self._evolution.population}, generations={self._evolution.generations}"

    @property
    def evolution(self) -> Evolution[Any]:
        """The evolution, with the population so far."""
        return self._evolution

    @property
    def paths(self) -> SupernetPaths:
        """The supernet's paths.

        Raises:
            RuntimeError: The strategy is not initialised yet.
        """
        if self._paths is None:
            raise RuntimeError("The strategy has no supernet before an experiment initialises it.")
        return self._paths

    def configure_oneshot_module(self, training_module: LightningModule) -> UniformPathModule:
        """Wrap the evaluator's Lightning module with uniform path sampling."""
        return UniformPathModule(training_module, self.paths, self.seed, self._check_before_training)

    def mutate_evaluator(self, evaluator: Lightning) -> Lightning:
        """Let the evaluator train one path a step.

        Raises:
            ValueError: It trains by a loss that is none of classes, and GeNAS has no ``loss``.
        """
        if "flatness" in self.score.metrics and isinstance(evaluator, Lightning):
            check_loss(evaluator.module, self.loss)
        return super().mutate_evaluator(evaluator)

    def mutate_model(self, model: Any) -> Any:
        """Turn a model space into a supernet, in place.

        Raises:
            TypeError: NNI cannot turn this space into a supernet, or its forward needs more than images.
            ValueError: It has a choice that its supernet does not follow, or its paths cannot be measured several at a
                time, as ``in_flight`` asks.
        """
        model = super().mutate_model(model)
        initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        paths = SupernetPaths(model, initial)
        several = self.in_flight.count if isinstance(self.in_flight, InFlight) else self.in_flight or 1
        if several > 1 and not paths.side_by_side:
            raise ValueError(
                f"{type(model).__name__} is measured with one path fixed at a time, so in_flight must be 1, got "
                f"{several}; DartsSpace and NasBench201Space can have several."
            )
        self._paths = paths
        self._evolution.space = self._paths.search_space
        return model

    def load_initial_weights(self, initial: dict[str, Tensor]) -> None:
        """Replace the remembered weights before training, by parameter name, when a run is resumed."""
        self.paths.initial = dict(initial)

    def _run(self) -> None:
        super()._run()
        self.search()

    def search(self) -> None:
        """Search the supernet as it stands; :meth:`run` calls this after training.

        Raises:
            ValueError: The loaders give fewer images than asked for.
        """
        supernet = self.supernet
        evaluator: Lightning = self._mutated_model_space.evaluator  # type: ignore[union-attr,assignment]
        home = next(supernet.parameters()).device
        device = torch.device(self.device or evaluator.trainer.strategy.root_device)
        try:
            supernet.to(device)
            recalibration, validation = self._source(evaluator, device).both(
                self._recalibration_batches,
                self.recalibration_images,
                self._validation_batches,
                self.validation_images,
            )
            scorer = self.scorer = Scorer(
                self.paths,
                self.score,
                validation=validation,
                recalibration=recalibration,
                seed=self.seed,
                loss=self.loss,
                in_flight=flight_of(self.in_flight, self.paths, device, recalibration, validation),
            )
            shared = SharedSearch.current()
            if self.elsewhere is not None and shared is not None:
                # The first process drives the workers; the others have trained, and are not waited for.
                if shared.rank:
                    return
                shared = None
            image, _ = next(iter(validation))
            self._evolution.space = self._costed(device, image[0], shared)
            # A generation that was cut off is measured anew.
            del self.records[self._evolution.scored :]
            # What the history has was told by the process that measured it.
            known = 0 if self.history is None else len(self.history.records)
            log = self.search_log or SearchLog(loggers_of(evaluator), known)
            (self.elsewhere or run_search)(
                self._evolution,
                scorer.measure,
                history=self.history,
                on_record=self._remember,
                race=self._together(scorer),
                shared=shared,
                in_flight=scorer.in_flight,
                on_generation=lambda records: log.generation(records, self._best_score),
            )
            if self.search_log is None and len(self.records) > known:
                log.draw(self.records, [candidate for candidate, _ in self._evolution.best(1)])
        finally:
            supernet.to(home)

    def _costed(self, device: torch.device, image: Tensor, shared: SharedSearch | None) -> Any:
        kept = {"memory": self._measured, "lines": self.history and self.history.beside(COSTS_FILE)}
        return self.budget.space(self.paths, image.shape, device=self.device or device, shared=shared, **kept)

    def _together(self, scorer: Scorer) -> Any:
        if self.racing is not None:
            return scorer.race(self.racing, self._evolution.parents)
        if self.neighbourhood is None:
            return None
        lines = self.history and self.history.beside(NEIGHBOURS_FILE)
        told = self.records if self.history is None else self.history.records
        before = [self.paths.search_space.from_json(record.candidate) for record in told]
        found = scorer.neighbours(self.neighbourhood, lines=lines, memory=self._alone, before=before)
        self._evolution.cost = found.cost
        return found

    @property
    def _best_score(self) -> float | None:
        return max((record.score for record in self.records if record.score is not None), default=None)

    def _remember(self, record: Record) -> None:
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[ExecutableModelSpace]:
        """The best architectures, best first, with their scores as metric.

        Models carry the weights and statistics that the supernet has on their path, see
        :func:`nni_strategy.export.fixed_network`: in evaluation mode they compute what it does.

        After a search of several objectives they are the front, the best in the first objective first; ``limit`` takes
        so many of it that lie far from one another.

        Args:
            sort: Must be true.
            limit: Number of models; ``None`` for all that were scored.

        Raises:
            ValueError: ``sort`` is false.
        """
        if not sort:
            raise ValueError("GeNAS lists models by score only; sort must be true.")
        best = self._evolution.best(limit)
        if limit is not None and len(best) < limit:
            _logger.warning("Only %d architectures were scored, but %d are asked for.", len(best), limit)
        yield from ranked_models(self.supernet, self.paths.to_sample, best)

    def state_dict(self) -> dict[str, Any]:
        """Population, random state and records, beside the checkpoint that NNI remembers."""
        state = {
            **super().state_dict(),
            "evolution": self._evolution.state_dict(),
            "records": [record.to_dict() for record in self.records],
            "measured": [[*key, value] for key, value in self._measured.items()],
            "alone": dict(self._alone),
        }
        if self._paths is not None and "angle" in self.score.metrics:
            state["initial"] = self._paths.initial
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; after ``initialize``."""
        super().load_state_dict(state_dict)
        self._evolution.load_state_dict(state_dict["evolution"])
        self.records = [Record.of(record) for record in state_dict["records"]]
        self._measured.update({(name, plain): value for name, plain, value in state_dict.get("measured", ())})
        self._alone.update(state_dict.get("alone", {}))
        if "initial" in state_dict:
            self.load_initial_weights(state_dict["initial"])

    def _check_before_training(self) -> None:
        if type(self).search is not GeNAS.search:
            # A search of another kind knows itself what it reads.
            return
        evaluator: Lightning = self._mutated_model_space.evaluator  # type: ignore[union-attr,assignment]
        device = next(self.supernet.parameters()).device
        dtypes = (parameter.dtype for parameter in self.supernet.parameters())
        check_float64(dtypes, torch.device(self.device or device))
        image = Preflight(
            paths=self.paths,
            score=self.score,
            source=self._source(evaluator, device),
            recalibration=self._recalibration_batches,
            validation=self._validation_batches,
            recalibration_images=self.recalibration_images,
            validation_images=self.validation_images,
            racing=self.racing is not None,
            loss=self.loss,
            seed=self.seed,
        )()
        if image is not None:
            self.budget.check(self.paths, image.shape, self.device or device, self.seed)

    def _source(self, evaluator: Lightning, device: torch.device) -> EvaluatorBatches:
        return EvaluatorBatches(evaluator, device, self.batch_parts, self.seed, may_be_fewer=self._may_be_fewer)
