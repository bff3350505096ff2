"""Supernet training by uniform path sampling (SPOS, Guo et al., ECCV 2020), inside NNI's one-shot protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import Optimizer

from nni_strategy.samples import SupernetPaths

__all__ = ["UniformPathModule"]

_TRAINING, _VALIDATION = 0, 1


class UniformPathModule(BaseOneShotLightningModule):
    """Wraps the user's Lightning module: before each step, one uniformly sampled path is fixed.

    The path is a function of the seed, the epoch and the number of the batch alone. So every process of a
    distributed run trains the same path at the same step, without communication, and a resumed run goes on
    with the paths that an uninterrupted one would have taken.

    Args:
        training_module: The evaluator's Lightning module, which holds the supernet.
        paths: The supernet's paths.
        seed: Of the path sampling.
        before: Called before the first step, when data and network are in place; an error ends the fit.
    """

    def __init__(
        self,
        training_module: pl.LightningModule,
        paths: SupernetPaths,
        seed: int,
        before: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(training_module)
        self._before = before
        self._paths = paths
        self._seed = seed

    @property
    def automatic_optimization(self) -> bool:
        """Lightning's own loop, with its clipping, precision and accumulation."""
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Fix a path and run the user's training step."""
        self._fix_path(_TRAINING, batch_idx)
        return _call(self.training_module.training_step, batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> Any:
        """Fix a path and run the user's validation step. Statistics are not recalibrated: a progress figure only."""
        self._fix_path(_VALIDATION, batch_idx)
        step = self.training_module.validation_step
        # Lightning tells several loaders apart, and leaves the number out where there is one.
        return _call(step, batch, batch_idx) if dataloader_idx is None else step(batch, batch_idx, dataloader_idx)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._before is not None:
            self._before()

    def _fix_path(self, stage: int, batch_idx: int) -> None:
        rng = np.random.default_rng((self._seed, stage, self.current_epoch, batch_idx))
        self._paths.fix(self._paths.search_space.sample(rng))

    # NNI's base class hands these hooks of the user's module to nobody.

    def configure_callbacks(self) -> Any:
        return self.training_module.configure_callbacks()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        self.training_module.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.training_module.configure_gradient_clipping(optimizer, *args, **kwargs)

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        self.training_module.on_before_zero_grad(optimizer)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.training_module.optimizer_zero_grad(epoch, batch_idx, optimizer)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.training_module.lr_scheduler_step(scheduler, metric)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.training_module.on_before_optimizer_step(optimizer)

    def on_validation_epoch_start(self) -> None:
        self.training_module.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        self.training_module.on_validation_epoch_end()

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.training_module.on_validation_batch_start(*args, **kwargs)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.training_module.on_validation_batch_end(*args, **kwargs)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.training_module.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.training_module.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.training_module.on_after_batch_transfer(batch, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.training_module.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.training_module.on_load_checkpoint(checkpoint)


def _call(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """Call a step with the number of the batch if it takes one, as Lightning does."""
    return step(batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)
