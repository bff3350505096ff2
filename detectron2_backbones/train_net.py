"""``python -m detectron2_backbones.train_net --config-file FILE``: train or evaluate a yacs configuration.

The options are those of Detectron2's own ``tools/train_net.py``. A bare name is one of the package's configurations.
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

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
from detectron2_backbones.config import add_genas_config, check_yaml
from detectron2_backbones.weights import GenasCheckpointer
from genas_plugins._reading import user_path

__all__ = ["Trainer", "main", "read_config"]


class Trainer(DefaultTrainer):
    """Detectron2's trainer with COCO's evaluation and a checkpointer that knows GeNAS weights."""

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with a checkpointer that knows GeNAS weights."""
        # Here, because the hook that saves is made next and keeps the checkpointer.
        self.checkpointer = GenasCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            strict=self.cfg.MODEL.GENAS.STRICT_WEIGHTS,
            trainer=weakref.proxy(self),
        )
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Average precision of boxes, written under ``OUTPUT_DIR/inference``."""
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a yacs configuration.

    Args:
        path: The file.
        overrides: Keys and values, alternating.

    Returns:
        Detectron2's configuration with ``MODEL.GENAS``, on the CPU where there is no CUDA.

    Raises:
        ValueError: A file is not YAML of plain data, such as one with tags that run code.
    """
    cfg = get_cfg()
    add_genas_config(cfg)
    path = user_path(path)
    check_yaml(path)
    # Detectron2 by default runs what a file's tags say.
    cfg.merge_from_file(str(path), allow_unsafe=False)
    cfg.merge_from_list(list(overrides))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = (os.path.expanduser(text) for text in (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR))
    device = available_device(cfg.MODEL.DEVICE)
    if device != cfg.MODEL.DEVICE:
        cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = device, False
    cfg.freeze()
    return cfg


def _work(options: argparse.Namespace) -> dict[str, Any]:
    start_logging()
    cfg = read_config(options.config_file, options.opts)
    register_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    with only_writer(cfg.OUTPUT_DIR, options), known_images(cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, options) as begin:
        return _run(cfg, options, begin)


def _run(cfg: CfgNode, options: argparse.Namespace, begin: Callable[[], None]) -> dict[str, Any]:
    default_setup(cfg, options)
    if options.eval_only:
        model = Trainer.build_model(cfg)
        check_classes(model, cfg.DATASETS.TEST, evaluation=True)
        checkpointer = GenasCheckpointer(model, cfg.OUTPUT_DIR, strict=cfg.MODEL.GENAS.STRICT_WEIGHTS)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=options.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=options.resume)
    check_backbones(trainer.model)
    check_classes(trainer.model, cfg.DATASETS.TRAIN)
    begin()
    return trainer.train()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, 1 with one line on standard error, or 130 after Ctrl-C."""
    return run_launcher("detectron2_backbones.train_net", ".yaml", _work, arguments)


if __name__ == "__main__":
    sys.exit(main())
