"""Supernet training by uniform path sampling (SPOS, Guo et al., ECCV 2020), inside NNI's one-shot protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

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
        seed: Seed of the path sampling.
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


def _handed_on(name: str) -> Callable[..., Any]:
    def hook(self: UniformPathModule, *arguments: Any, **keywords: Any) -> Any:
        return getattr(self.training_module, name)(*arguments, **keywords)

    hook.__name__ = name
    return hook


# NNI's base class hands these hooks of the user's module to nobody.
for _hook in (
    "configure_callbacks",
    "optimizer_step",
    "configure_gradient_clipping",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "on_before_optimizer_step",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_save_checkpoint",
    "on_load_checkpoint",
):
    setattr(UniformPathModule, _hook, _handed_on(_hook))


def _call(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """Call a step with the number of the batch if it takes one, as Lightning does."""
    return step(batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)
