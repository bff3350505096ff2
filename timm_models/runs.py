"""The folder of a training: its settings, checkpoints, figures, and where it goes on after it was killed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.models import safe_model_name
from timm.task import TrainingTask
from torch.optim import Optimizer

from genas_plugins._optional import require
from genas_plugins.files import write_text
from genas_plugins.locking import lock_folder
from timm_models.settings import Settings, SettingsError, write_config

__all__ = ["RunFolder"]

_logger = logging.getLogger(__name__)

CONFIG, SUMMARY = "args.yaml", "summary.csv"
_LATEST = ("last.pth.tar", "tmp.pth.tar")
"""What a run continues from. timm writes the second and renames it: a kill in between leaves only that one."""


class RunFolder:
    """The folder of one training.

    ``args.yaml`` (all settings), ``summary.csv`` (a line per epoch), TensorBoard's files, and timm's checkpoints:
    ``last.pth.tar``, ``model_best.pth.tar`` and the best few by their epochs.

    Attributes:
        path: Where it is.
        checkpoint: What the run continues from, or None.
    """

    def __init__(self, path: Path, settings: Settings, primary: bool, checkpoint: Path | None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self._settings, self._primary = settings, primary
        self._board: Any = None

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, primary: bool, size: int, resume: str | Path | None) -> Iterator[RunFolder]:
        """Create a run's folder, or find that of the run to continue, and be the only one who writes to it.

        Args:
            settings: Those of the run.
            primary: This process writes.
            size: Pixels, for the folder's name.
            resume: The folder or a checkpoint in it.

        Raises:
            FileNotFoundError: There is nothing to resume.
            FileExistsError: The folder holds a run already.
            FolderInUseError: Another process writes to it.
        """
        if resume is not None:
            path = Path(resume) if Path(resume).is_dir() else Path(resume).parent
            with lock_folder(path) if primary and path.is_dir() else nullcontext():
                checkpoint = find_checkpoint(resume)
                if primary:
                    write_text(path / CONFIG, write_config(settings))
                yield cls(path, settings, primary, checkpoint)
            return
        name = settings.experiment or "-".join(
            (datetime.now().strftime("%Y%m%d-%H%M%S"), safe_model_name(settings.model), str(size))
        )
        path = Path(settings.output) / name
        if primary:
            _refuse_a_run(path)
        with lock_folder(path) if primary else nullcontext():
            if primary:
                # Once more, now that nobody else can begin one.
                _refuse_a_run(path)
                write_text(path / CONFIG, write_config(settings))
            yield cls(path, settings, primary, None)

    def saver(
        self, task: TrainingTask, optimizer: Optimizer, scaler: utils.NativeScaler | None
    ) -> utils.CheckpointSaver | None:
        """timm's keeper of checkpoints, with what it knew when the run stopped; None where nothing is written."""
        if not self._primary:
            return None
        saver = utils.CheckpointSaver(
            model=task.get_trainable_module(),
            optimizer=optimizer,
            amp_scaler=scaler,
            checkpoint_dir=str(self.path),
            recovery_dir=str(self.path),
            max_history=self._settings.checkpoint_hist,
            task=task,
        )
        start = 0
        if self.checkpoint is not None:
            start = utils.load_checkpoint_metadata(str(self.checkpoint))["epoch"] + 1
        utils.trim_summary(str(self.path / SUMMARY), start)
        if self._settings.tensorboard:
            require("tensorboard", extra="timm", purpose="TensorBoard's files (tensorboard: false leaves them out)")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=start)
        return saver

    def settle(self, saver: utils.CheckpointSaver | None) -> None:
        """Bring a resumed run's checkpoints into the state after the epoch that it continues from.

        The run may have been killed while it wrote them; so what it did last is done again.
        """
        if saver is None or self.checkpoint is None:
            return
        # A whole checkpoint under its temporary name, which the next one would overwrite.
        latest = self.path / _LATEST[0]
        if self.checkpoint.name == _LATEST[1]:
            self.checkpoint = self.checkpoint.replace(latest)
        saved = utils.load_checkpoint_metadata(str(self.checkpoint))
        state = dict(saved.get("saver", {}))
        epoch, metric = state.pop("pending", (saved["epoch"], saved.get("metric")))
        saver.load_state_dict(state)
        saver.save_checkpoint(epoch, metric=metric)

    def record(
        self,
        epoch: int,
        trained: Mapping[str, float],
        measured: Mapping[str, float],
        saver: utils.CheckpointSaver | None,
    ) -> None:
        """Keep what an epoch gave: figures first, then the checkpoint that makes it final."""
        if saver is None:
            return
        ranking = measured.get("top1_ema", measured["top1"])
        figures = dict(trained)
        rate = figures.pop("lr")
        utils.update_summary(epoch, figures, measured, filename=str(self.path / SUMMARY), lr=rate)
        if self._board is not None:
            for group, values in (("train", trained), ("eval", measured)):
                for name, value in values.items():
                    self._board.add_scalar(f"{group}/{name}", value, epoch)
            self._board.flush()
        best, best_epoch = saver.save_checkpoint(epoch, metric=ranking)
        averaged = f" ({measured['top1_ema']:.2f} averaged)" if "top1_ema" in measured else ""
        _logger.info(
            "epoch %d: training loss %.4f, validation loss %.4f, top-1 %.2f%s, top-5 %.2f; best %.2f in epoch %d",
            epoch + 1,
            trained["loss"],
            measured["loss"],
            measured["top1"],
            averaged,
            measured["top5"],
            math.nan if best is None else best,
            (best_epoch or 0) + 1,
        )


def _refuse_a_run(path: Path) -> None:
    if (path / CONFIG).exists():
        raise FileExistsError(f"{path} holds a run: continue it with --resume {path}, or name another.")


def find_checkpoint(place: str | Path) -> Path | None:
    """The latest checkpoint in a run's folder that is whole, or the one that is named; None: the run has none yet.

    Raises:
        FileNotFoundError: There is no such run.
        SettingsError: There are checkpoints, and all are damaged.
    """
    place = Path(place)
    candidates = [place] if place.is_file() else [place / name for name in _LATEST if (place / name).is_file()]
    if not candidates:
        if (place / CONFIG).is_file():
            return None
        raise FileNotFoundError(f"{place} is not the folder of a run.")
    for candidate in candidates:
        try:
            # All of it, not only what is read at first.
            torch.load(candidate, map_location="cpu", weights_only=True)
        # What torch.load raises depends on where the damage is: IndexError and struct.error among others.
        except Exception as error:
            _logger.warning("%s is damaged: %s", candidate, " ".join(str(error).split())[:200])
            continue
        return candidate
    raise SettingsError(
        f"The checkpoints of {place} are damaged ({', '.join(path.name for path in candidates)}): name an earlier one, "
        "checkpoint-EPOCH.pth.tar."
    )
