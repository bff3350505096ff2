"""NA-DARTS: NNI's DARTS with the architecture loss taken over the neighbourhood of the relaxed architecture."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.hub import pytorch as hub
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import MutationHook
from nni.nas.space import ExecutableModelSpace
from nni.nas.strategy import DARTS
from torch import nn

from genas_plugins._messages import shown
from genas_plugins.checks import check_count, check_flag, check_real, check_seed
from genas_plugins.scoring.neighbourhood import AGGREGATES
from nni_strategy.export import PathModel
from nni_strategy.hub import genotype_from_hub
from nni_strategy.nadarts_step import (
    ASCENTS,
    MovedSoftmax,
    Moves,
    NADartsModule,
    architecture_parameters,
)

__all__ = ["NADarts"]

_logger = logging.getLogger(__name__)

Space = TypeVar("Space", bound=ModelSpace)


class NADarts(DARTS):
    """Neighbourhood-aware DARTS (Wang et al., BMVC 2021, arXiv 2105.06369) as an NNI one-shot strategy.

    A step of NNI's DARTS moves the architecture parameters down the gradient of the validation loss L(p), where p has a
    distribution over operations, a softmax, for each choice: each edge of a cell, in NNI's other spaces each
    ``LayerChoice`` and so on. Here it is the gradient of ::

        -aggregate of { -L(q) : q = p and the sampled neighbours of p }

    A **neighbour** q of p has the distributions of p but for 1 to ``distance`` choices, whose probabilities are moved
    round by k operations: the operation o + k (modulo their number K, ``none`` counted where the relaxed edge has it)
    gets the probability that o had, 1 <= k < K. Of a discrete architecture, where the distributions are 0 and 1, these
    are the architectures with other operations on up to ``distance`` edges, each once. In between q stays a function
    of all architecture parameters, so that every one of them gets a gradient from every neighbour. The mean over the
    K - 1 moves of one choice gives each operation the probability (1 - p_o) / (K - 1): what the chance of an operation
    is when one sampled from p is replaced by one of the others.

    Of the paper its abstract was at hand, by which the neighbourhood gets a differentiable representation and the loss
    is aggregated over it: how that is written out above is this package's, and may not be the authors'. While p is
    nearly even, its neighbours nearly are p, and the gradient of the mean over all of them has DARTS's direction.

    Neighbours are drawn uniformly, without repetition, from (seed, epoch, batch) alone. A step costs 1 + ``size``
    passes forward and back over the validation batch, one after another in the memory of one, where DARTS has 1; on a
    single device the gradients of weights are not computed in them. With ``distance=0`` the step is NNI's own.

    **A2M** (Gambella et al., arXiv 2503.10404): with ``rho`` above 0, let g be the above gradient at the architecture
    parameters a. ``ascent="a2m"`` goes down g(b) + rho H g(b), where b = a + rho g(a) and H is the Hessian at a: by the
    chain rule the gradient of the loss at b. H g(b) is the central difference of gradients at a plus and minus
    0.01 g(b), as in the authors' code (AI-Tech-Research-Lab/AsquaredM@5a303f9): four gradients a step. ``ascent="sam"``
    goes down g(b) with b = a + rho g(a) / |g(a)|, a step of length rho, as SAM makes for weights: two gradients. With
    ``distance=0`` the loss is A2M's, otherwise that of the neighbourhood.

    Works on :class:`DartsSpace` and :class:`NasBench201Space`, which become the mixture of all their paths
    (:class:`nni_strategy.relaxed.RelaxedSuperNet`), and on the spaces that NNI's DARTS takes. The evaluator is one for
    NNI's DARTS: its training loader trains the weights, its validation loader the architecture. All that changes is in
    Lightning's checkpoints: a search that ``fit_kwargs={"ckpt_path": ...}`` of the evaluator resumes, or
    :meth:`load_state_dict`, goes on as an uninterrupted one; one with other settings is refused.

    >>> strategy = NADarts(distance=1, size=8, aggregate="mean", arc_learning_rate=0.003, seed=0)
    >>> strategy
    NADarts(distance=1, size=8, aggregate='mean', include_self=True, rho=0.0, ascent='a2m', seed=0)

    Args:
        distance: The largest number of choices in which a neighbour differs; 0 for NNI's DARTS.
        size: Neighbours a step; None for all of them. Not read with ``distance=0``.
        aggregate: ``"mean"``, ``"median"``, ``"min"`` (the worst) or ``"mean-std"`` of the negative losses, as in
            :class:`genas_plugins.scoring.NeighbourhoodScore`.
        include_self: Whether the architecture itself is one of those that are aggregated.
        rho: Of A2M; 0 for none.
        ascent: The form of A2M, ``"a2m"`` or ``"sam"``.
        arc_learning_rate: Of Adam for the architecture parameters, as the following is NNI's.
        gradient_clip_val: Largest norm of the weights' gradient.
        log_prob_every_n_step: Steps between two logs of the distributions.
        warmup_epochs: Epochs in which the weights are trained alone.
        penalty: NNI's penalty for costs; that of a neighbour is its own.
        mutation_hooks: NNI's extra hooks for primitives of your own.
        seed: Of the first architecture parameters, of weights that NNI creates for its supernet, and of the neighbours.

    Raises:
        TypeError: A setting is not of its kind.
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        *,
        distance: int = 1,
        size: int | None = 4,
        aggregate: str = "mean",
        include_self: bool = True,
        rho: float = 0.0,
        ascent: str = "a2m",
        arc_learning_rate: float = 3e-4,
        gradient_clip_val: float | None = None,
        log_prob_every_n_step: int = 10,
        warmup_epochs: int = 0,
        penalty: Any = None,
        mutation_hooks: list[MutationHook] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            arc_learning_rate=check_real("arc_learning_rate", arc_learning_rate, above=0),
            gradient_clip_val=gradient_clip_val,
            log_prob_every_n_step=check_count("log_prob_every_n_step", log_prob_every_n_step),
            warmup_epochs=check_count("warmup_epochs", warmup_epochs, 0),
            penalty=penalty,
            mutation_hooks=mutation_hooks,
        )
        for name, value, valid in (("aggregate", aggregate, AGGREGATES), ("ascent", ascent, ASCENTS)):
            if value not in valid:
                raise ValueError(f"Unknown {name} {shown(value)}; valid {name}s: {', '.join(valid)}.")
        self.distance = check_count("distance", distance, 0)
        self.size = None if size is None else check_count("size", size, 0)
        self.include_self = check_flag("include_self", include_self)
        if not include_self and 0 in (distance, size):
            raise ValueError(
                f"include_self must be true where there are no neighbours, got distance={distance} and size={size}."
            )
        self.aggregate = aggregate
        self.rho = check_real("rho", rho, least=0)
        self.ascent = ascent
        self.seed = check_seed(seed)
        self.moves: Moves | None = None
        self.softmax = MovedSoftmax()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a step besides NNI's settings."""
        names = ("distance", "size", "aggregate", "include_self", "rho", "ascent", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def architecture(self) -> Any:
        """What the distributions would become now.

        A :class:`~genas_plugins.Genotype` of :class:`DartsSpace` and of the DARTS space in NNI's hub, an architecture
        of NAS-Bench-201 of :class:`NasBench201Space`, and of other spaces NNI's sample. In the hub's space NNI takes
        the two strongest operations of different inputs, so that no node takes an input twice; it compares the
        parameters of edges, where DARTS and :class:`DartsSpace` compare their softmax.

        Raises:
            RuntimeError: The strategy is not initialised yet.
        """
        space, sample = self.supernet, self._sample()
        if isinstance(space, hub.DARTS):
            return genotype_from_hub(sample)
        return space.from_sample(sample) if hasattr(space, "from_sample") else sample

    def configure_softmax(self) -> nn.Module:
        """One softmax for all choices, which knows where a neighbour differs."""
        return self.softmax

    def configure_oneshot_module(self, training_module: LightningModule) -> NADartsModule:
        """Wrap the evaluator's Lightning module."""
        assert self.moves is not None
        return NADartsModule(training_module, self, self.moves)

    def mutate_model(self, model: Space) -> Space:
        """Turn a model space into a mixture, in place; what is drawn for it comes from ``seed``.

        Raises:
            TypeError: NNI's DARTS cannot search the space.
            ValueError: It has no choices, fewer than ``distance``, or fewer than ``size`` neighbours.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = super().mutate_model(model)
        sizes = [len(alpha) for alpha in architecture_parameters(model)]
        if not sizes:
            raise ValueError(f"{type(model).__name__} has no choices that NNI's DARTS can relax; is it frozen?")
        if self.distance > len(sizes):
            raise ValueError(
                f"distance must be at most {len(sizes)}, the choices of {type(model).__name__}, got {self.distance}."
            )
        self.moves = Moves(sizes, self.distance)
        if self.distance and self.size is not None and self.size > self.moves.count:
            raise ValueError(
                f"size must be at most {self.moves.count:,}, the neighbours within distance {self.distance} in "
                f"{type(model).__name__}, or None for all of them, got {self.size:,}."
            )
        return model

    def mutate_evaluator(self, evaluator: Lightning) -> Lightning:
        """Let the evaluator train weights and architecture in turn.

        Raises:
            ValueError: Its trainer asks for what Lightning does not do with two optimizers.
        """
        trainer = getattr(evaluator, "trainer", None)
        if clip := getattr(trainer, "gradient_clip_val", None):
            raise ValueError(
                f"The evaluator's trainer has gradient_clip_val={clip}, and Lightning does not clip where there are "
                "two optimizers, as in a differentiable search. Leave it out there (gradient_clip=0 in "
                f"supernet_evaluator), and pass gradient_clip_val={clip} to NADarts."
            )
        if (several := getattr(trainer, "accumulate_grad_batches", 1)) != 1:
            raise ValueError(
                f"The evaluator's trainer has accumulate_grad_batches={several}, and a differentiable search takes a "
                "step every batch. Leave it out, and use larger batches."
            )
        if self.rho and getattr(trainer, "precision", None) == "16-mixed":
            raise ValueError(
                "rho steps along the gradient, which the precision 16-mixed scales; expected bf16-mixed or 32-true."
            )
        return super().mutate_evaluator(evaluator)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[ExecutableModelSpace]:
        """The one architecture that the search has found.

        It carries the weights that the mixture has on its path, and the statistics of batch normalisation of the
        mixture: usually it is trained anew.

        Args:
            sort: Must be true.
            limit: One is found, however many are asked for.

        Raises:
            ValueError: ``sort`` is false.
        """
        if not sort:
            raise ValueError("NADarts finds one architecture, the strongest; sort must be true.")
        if limit not in (1, None):
            _logger.warning("A differentiable search finds one architecture, but %s are asked for.", limit)
        yield PathModel.of(self.supernet, self._sample())

    def _sample(self) -> dict[str, Any]:
        self.oneshot_module.set_model(self.supernet)
        return self.oneshot_module.export()

    def _run(self) -> None:
        evaluator = self._mutated_model_space.evaluator  # type: ignore[union-attr]
        if "ckpt_path" in evaluator.fit_kwargs and "weights_only" in inspect.signature(pl.Trainer.fit).parameters:
            # A checkpoint is read as data, unless somebody says otherwise.
            evaluator.fit_kwargs = {"weights_only": True, **evaluator.fit_kwargs}
        super()._run()
