"""``python -m detectron2_backbones.lazy_train_net --config-file FILE``: train or evaluate a LazyConfig.

The options are those of Detectron2's own ``tools/lazyconfig_train_net.py``. A bare name is one of the package's
configurations.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detectron2_backbones._data import known_images
from detectron2_backbones._launch import (
    available_device,
    check_backbones,
    check_classes,
    only_writer,
    register_datasets,
    run_launcher,
    start_logging,
)
from detectron2_backbones.weights import GenasCheckpointer

__all__ = ["main", "read_config"]


def read_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a LazyConfig.

    Args:
        path: The Python file.
        overrides: Overrides such as ``train.max_iter=100``.

    Returns:
        The configuration, on the CPU where there is no CUDA.

    Raises:
        ValueError: The file is not a Python program. A LazyConfig in YAML runs code as well, which its user may not
            expect.
    """
    if Path(path).suffix != ".py":
        raise ValueError(f"A LazyConfig is a Python program (.py), which is run, got {path}.")
    cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
    device = available_device(cfg.train.device)
    if device != cfg.train.device:
        cfg.train.device, cfg.train.amp.enabled = device, False
    for key in ("init_checkpoint", "output_dir"):
        cfg.train[key] = os.path.expanduser(cfg.train[key])
    return cfg


def _names(cfg: DictConfig, part: str) -> Sequence[str]:
    """The data sets of ``dataloader.train`` or ``dataloader.test``."""
    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names", default=())
    return [names] if isinstance(names, str) else list(names)


def _evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _train(cfg: DictConfig, model: nn.Module, resume: bool, begin: Callable[[], None]) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    strict = OmegaConf.select(cfg, "train.strict", default=True)
    checkpointer = GenasCheckpointer(model, cfg.train.output_dir, strict=strict, trainer=trainer)
    # The order counts: checkpoints and logs include the results of the hooks before them.
    every = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.EvalHook(cfg.train.eval_period, lambda: _evaluate(cfg, model)),
    ]
    if comm.is_main_process():
        every.insert(2, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        every.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(every)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    check_backbones(model)
    check_classes(model, _names(cfg, "train"))
    begin()
    # A checkpoint holds the number of the iteration that was done last.
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def _work(options: argparse.Namespace) -> None:
    start_logging()
    cfg = read_config(options.config_file, options.opts)
    folder = cfg.train.output_dir
    for part in ("train", "test"):
        register_datasets(_names(cfg, part))
    with only_writer(folder, options), known_images(folder, _names(cfg, "train"), options) as begin:
        _run(cfg, options, begin)


def _run(cfg: DictConfig, options: argparse.Namespace, begin: Callable[[], None]) -> None:
    default_setup(cfg, options)
    model = instantiate(cfg.model).to(cfg.train.device)
    if not options.eval_only:
        _train(cfg, model, options.resume, begin)
        return
    check_classes(model, _names(cfg, "test"), evaluation=True)
    strict = OmegaConf.select(cfg, "train.strict", default=True)
    checkpointer = GenasCheckpointer(model, cfg.train.output_dir, strict=strict)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=options.resume)
    _evaluate(cfg, create_ddp_model(model))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, 1 with one line on standard error, or 130 after Ctrl-C."""
    return run_launcher("detectron2_backbones.lazy_train_net", ".py", _work, arguments)


if __name__ == "__main__":
    sys.exit(main())
