"""The images that a search measures: the evaluator's own, by the way on which they reach its network."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nni.nas.evaluator.pytorch import Lightning
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from genas_plugins.experiment.parts import BatchParts, find_parts
from genas_plugins.scoring.data import Batches, TensorBatches
from genas_plugins.scoring.paths import Paths
from genas_plugins.search import InFlight
from genas_plugins.training.batches import TrainBatches

__all__ = ["EvaluatorBatches", "flight_of"]

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def flight_of(wanted: int | InFlight | None, paths: Paths, device: torch.device, *batches: Batches | None) -> InFlight:
    """How many candidates are measured at a time, and on how many threads each.

    Args:
        wanted: What the user says; ``None`` chooses.
        paths: The supernet's paths.
        device: Where candidates are measured.
        *batches: What they are measured on.
    """
    if isinstance(wanted, InFlight):
        return wanted
    if wanted is not None or not paths.side_by_side:
        return InFlight(wanted or 1, device)
    chosen = InFlight(None, device)
    # A loader of somebody's own may not bear several readers at a time.
    shared = all(part is None or isinstance(part, TensorBatches | list | tuple) for part in batches)
    return chosen if shared else InFlight(1, device, chosen.threads)


class EvaluatorBatches:
    """Batches of a Lightning evaluator on a device, transferred as its trainer transfers them.

    The hooks ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` are those of
    the data module, or else of the Lightning module, and see the trainer training, or validating, as they do in a fit.
    What they and the loaders draw is a function of the seed; all global generators are left as they were.

    Args:
        evaluator: The evaluator.
        device: Where the batches are wanted.
        parts: Where images and labels are; ``None`` for the usual places.
        seed: Seed of what loaders and hooks draw.
        may_be_fewer: Whether a number of training images is one at most.
    """

    def __init__(
        self,
        evaluator: Lightning,
        device: torch.device,
        parts: BatchParts | None,
        seed: int,
        *,
        may_be_fewer: bool = False,
    ) -> None:
        self._evaluator = evaluator
        self._device = device
        self._parts = parts
        self._seed = seed
        self._may_be_fewer = may_be_fewer

    def repeatable(self, training: bool) -> bool:
        """Whether the loader, or each of several, can be iterated once more."""
        return not any(isinstance(loader, Iterator) for loader in _leaves(self.loader(training)))

    def loader(self, training: bool) -> Any:
        """The evaluator's loader, or loaders, as they are."""
        name = "train_dataloader" if training else "val_dataloader"
        module = self._evaluator.datamodule
        return getattr(self._evaluator, f"{name}s") if module is None else getattr(module, name)()

    def both(
        self, recalibration: Batches | None, first: int, validation: Batches | None, last: int | None
    ) -> tuple[Batches | None, Batches]:
        """What candidates are recalibrated and scored on: what the user brings, or else what the loaders give.

        Args:
            recalibration: The user's batches.
            first: Images of the training loader, where there are none; 0 for no recalibration.
            validation: The user's batches.
            last: Images of the validation loader, where there are none; ``None`` for all.
        """
        if recalibration is None and first:
            recalibration = self.collect(True, first)
        return recalibration, self.collect(False, last) if validation is None else validation

    def collect(
        self, training: bool, images: int | None, keep: Callable[[Tensor, Tensor], Any] = lambda *pair: pair
    ) -> list[Any]:
        """The first ``images`` of the training or the validation loader.

        Args:
            training: Which.
            images: How many; ``None`` for all.
            keep: What to keep of images and labels of a batch.

        Raises:
            TypeError: Images and labels are not found in a batch.
            ValueError: There are fewer.
        """
        kept: list[Any] = []
        seen, missing = 0, images
        with self._as_in_fit(training):
            for batch, number in _batches_of(self.loader(training), training):
                inputs, labels = find_parts(self._transferred(batch, number), self._parts)
                inputs, labels = inputs.to(self._device), labels.to(self._device)
                if missing is not None:
                    inputs, labels = inputs[:missing], labels[:missing]
                    missing -= len(labels)
                seen += len(labels)
                kept.append(keep(inputs, labels))
                if missing == 0:
                    break
        if (missing and not (training and self._may_be_fewer)) or not kept:
            purpose = "recalibration" if training else "validation"
            raise ValueError(
                f"GeNAS needs {images or 'some'} images for {purpose}, the evaluator's loader gives {seen}; lower "
                f"{purpose}_images or bring more data."
            )
        return kept

    def _transferred(self, batch: Any, number: int) -> Any:
        evaluator = self._evaluator
        batch = evaluator.trainer.precision_plugin.convert_input(batch)
        for name in _HOOKS:
            arguments = (batch, self._device, number) if name == _HOOKS[1] else (batch, number)
            data = evaluator.datamodule
            owner = data if data is not None and is_overridden(name, data) else evaluator.module
            batch = getattr(owner, name)(*arguments)
        return batch

    @contextmanager
    def _as_in_fit(self, training: bool) -> Iterator[None]:
        """Trainer and modules are as in a fit; afterwards they and all random states are as they were."""
        module, state = self._evaluator.module, self._evaluator.trainer.state
        inner = getattr(module, "training_module", module)
        stage, modes = state.stage, [(part, part.training) for part in module.modules()]
        for part in (module, inner):
            # A search of a supernet that was not trained here has none yet.
            if part._trainer is None:
                part.trainer = self._evaluator.trainer
        with _random_states(self._seed, self.loader(training)), torch.no_grad():
            try:
                state.stage = RunningStage.TRAINING if training else RunningStage.VALIDATING
                module.train(training)
                yield
            finally:
                state.stage = stage
                for part, mode in modes:
                    part.training = mode


@contextmanager
def _random_states(seed: int, loaders: Any) -> Iterator[None]:
    """Draw from ``seed``, and leave the global generators, and those that loaders bring, as they were."""
    own = []
    for loader in _leaves(loaders):
        sampler = getattr(loader, "sampler", None)
        found = (getattr(part, "generator", None) for part in (loader, sampler))
        own += [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()
    # Asking a CUDA that nobody uses for its state would start it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in own:
                generator.set_state(state)


def _batches_of(loaders: Any, training: bool) -> Iterator[tuple[Any, int]]:
    """Batches with the number of their loader, as Lightning iterates over one loader or several."""
    if loaders is None:
        return
    if isinstance(loaders, TrainBatches):
        loaders = loaders.whole()
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle" if training else "sequential")
    for batch, _, number in iter(loaders):
        yield batch, number


def _leaves(loaders: Any) -> Iterable[Any]:
    if loaders is None:
        return ()
    return loaders.flattened if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential").flattened
