"""The folder of a training: settings, checkpoints and metrics, and how a killed run is resumed."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from timm import utils
from timm.models import safe_model_name
from timm.task import TrainingTask
from torch import nn
from torch.optim import Optimizer

from genas_plugins._messages import one_line, shown
from genas_plugins._optional import require
from genas_plugins._reading import ReadingError, read_json
from genas_plugins.checkpoints import CheckpointError, read_torch
from genas_plugins.darts.genotype import Genotype
from genas_plugins.datasets import check_identity, write_identity
from genas_plugins.files import write_text
from genas_plugins.locking import lock_folder
from timm_models.searches import NETWORK_FILE, keep_genotype
from timm_models.settings import Settings, SettingsError, from_options, write_config

__all__ = ["MAY_CHANGE", "RunFolder", "check_settings"]

_logger = logging.getLogger(__name__)

CONFIG, SUMMARY = "args.yaml", "summary.csv"
_RUN_FILE = "run.json"
"""The settings that the run began with, and the images of a step: users edit ``args.yaml``."""

MAY_CHANGE = (
    *("data_dir", "dataset_download", "workers", "pin_mem", "device", "amp", "amp_dtype", "channels_last"),
    *("torchcompile", "grad_checkpointing", "batch_size", "validation_batch_size", "grad_accum_steps"),
    *("log_interval", "checkpoint_hist", "tensorboard", "dist_bn", "sync_bn"),
)
"""Settings that a resumed run may change: where and how it computes, not what. A step keeps its number of images."""
_PLACES = ("output", "experiment", "class_map")
"""Where things lie, too: the folder is the one that is named, and its classes are compared with the images."""

_LATEST = ("last.pth.tar", "tmp.pth.tar")
"""Checkpoints to resume from. timm writes the second and renames it, so a kill may leave only that one."""
_PROBE = 2**20


class RunFolder:
    """The folder of one training.

    ``args.yaml`` (all settings), ``network.json`` of a network of ours, ``summary.csv`` (a line per epoch),
    TensorBoard's files, and timm's checkpoints: ``last.pth.tar``, ``model_best.pth.tar`` and the best few by epochs.

    Attributes:
        path: Path of the folder.
        checkpoint: Checkpoint that the run continues from, or None.
        saved: What is in it; read once, as a file of many tensors takes long.
    """

    def __init__(
        self, path: Path, settings: Settings, primary: bool, checkpoint: Path | None, saved: Any = None
    ) -> None:
        self.path = path
        self.checkpoint, self.saved = checkpoint, saved
        self._settings, self._primary = settings, primary
        self._board: Any = None

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, primary: bool, size: int, resume: str | Path | None) -> Iterator[RunFolder]:
        """Create a run's folder, or open that of the run to continue, and lock it.

        Args:
            settings: Settings of the run.
            primary: Whether this process writes.
            size: Size of the images in pixels, for the folder's name.
            resume: Folder of the run to continue, or a checkpoint in it; None: a new run.

        Raises:
            FileNotFoundError: There is nothing to resume.
            FileExistsError: The folder holds a run already.
            FolderInUseError: Another process writes to it.
        """
        if resume is not None:
            path = Path(resume) if Path(resume).is_dir() else Path(resume).parent
            with lock_folder(path) if primary and path.is_dir() else nullcontext():
                yield cls(path, settings, primary, *_read_checkpoint(resume))
            return
        name = settings.experiment or "-".join(
            (datetime.now().strftime("%Y%m%d-%H%M%S"), safe_model_name(settings.model), str(size))
        )
        path = Path(settings.output) / name
        if primary:
            _refuse_a_run(path)
        with lock_folder(path) if primary else nullcontext():
            if primary:
                # Again, now that the folder is locked.
                _refuse_a_run(path)
            yield cls(path, settings, primary, None)

    def check(self, identity: Mapping[str, Any] | None) -> None:
        """Raise if the data differs from that of the run's start.

        Raises:
            DataChangedError: It is other data; the message says what differs.
            ValueError: The stored identity of the data cannot be read.
        """
        if identity is not None and (self.path / CONFIG).exists():
            check_identity(self.path, identity)

    def begin(self, identity: Mapping[str, Any] | None, step: int) -> None:
        """Write the run's settings and data identity, and remove an unfinished checkpoint of a killed process.

        To be called after all checks, so that a refused run is left unchanged.

        Args:
            identity: Identity of the data; None: this process does not write.
            step: Images of a step, over all processes.
        """
        if not self._primary or identity is None:
            return
        write_identity(self.path, identity)
        began = self.path / _RUN_FILE
        # A resumed run keeps what it began with; without args.yaml nothing has begun.
        if not (began.exists() and (self.path / CONFIG).exists()):
            write_text(began, json.dumps({"settings": _plain(self._settings), "step": step}, indent=1) + "\n")
        write_text(self.path / CONFIG, write_config(self._settings))
        torn = self.path / _LATEST[1]
        if torn != self.checkpoint and torn.exists():
            _logger.info("%s, which a killed process has left, is removed.", torn)
            torn.unlink()

    def keep_genotype(self, model: nn.Module) -> None:
        """Write the genotype of a network of ours, with what is known of its search, which may be gone one day."""
        genotype = getattr(model, "genotype", None)
        if self._primary and isinstance(genotype, Genotype) and not (self.path / NETWORK_FILE).exists():
            keep_genotype(self.path / NETWORK_FILE, genotype, self._settings.model_kwargs.get("genotype"))

    def saver(
        self, task: TrainingTask, optimizer: Optimizer, scaler: utils.NativeScaler | None
    ) -> utils.CheckpointSaver | None:
        """Build timm's saver of checkpoints, and open the summaries; None if this process does not write."""
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
            start = self.saved["epoch"] + 1
        _trim(self.path / SUMMARY, start)
        if self._settings.tensorboard:
            require("tensorboard", extra="timm", purpose="TensorBoard's files (tensorboard: false leaves them out)")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=start)
        return saver

    def settle(self, saver: utils.CheckpointSaver | None) -> None:
        """Restore a resumed run's checkpoints to their state after the epoch that it continues from.

        The run may have been killed while it wrote them, so the last save is repeated.
        """
        if saver is None or self.checkpoint is None:
            return
        # A whole checkpoint under its temporary name, which the next one would overwrite.
        latest = self.path / _LATEST[0]
        if self.checkpoint.name == _LATEST[1]:
            self.checkpoint = self.checkpoint.replace(latest)
        state = dict(self.saved.get("saver", {}))
        epoch, metric = state.pop("pending", (self.saved["epoch"], self.saved.get("metric")))
        saver.load_state_dict(state)
        self._save(saver, epoch, metric)

    def _save(self, saver: utils.CheckpointSaver, epoch: int, metric: float | None) -> tuple[float | None, int | None]:
        """Save a checkpoint; if that fails, raise an OSError with the system's reason."""
        try:
            return saver.save_checkpoint(epoch, metric=metric)
        except (RuntimeError, OSError) as error:
            unfinished = self.path / _LATEST[1]
            try:
                # PyTorch's writer hides the system's error, which writing to the file again shows.
                with unfinished.open("ab") as file:
                    file.write(bytes(_PROBE))
                    os.fsync(file.fileno())
            except OSError as reason:
                raise OSError(reason.errno, reason.strerror, str(unfinished)) from error
            finally:
                unfinished.unlink(missing_ok=True)
            raise

    def record(
        self,
        epoch: int,
        trained: Mapping[str, float],
        measured: Mapping[str, float],
        saver: utils.CheckpointSaver | None,
    ) -> None:
        """Write an epoch's results: metrics first, then the checkpoint that makes them final."""
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
        best, best_epoch = self._save(saver, epoch, ranking)
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


def _trim(summary: Path, epochs: int) -> None:
    """Keep the metrics of the first ``epochs`` epochs, without incomplete lines."""
    if not summary.is_file():
        return
    lines = summary.read_text(encoding="utf-8", errors="replace").splitlines()
    columns = len(lines[0].split(",")) if lines else 0
    kept: dict[int, str] = {}
    for line in lines[1:]:
        values = line.split(",")
        if len(values) == columns and values[0].isdecimal() and int(values[0]) < epochs:
            kept.setdefault(int(values[0]), line)
    if len(kept) < epochs:
        _logger.warning("%s has the figures of %d of %d epochs: others are lost.", summary, len(kept), epochs)
    # An empty table loses its header too, because the columns may change.
    write_text(summary, "".join(f"{line}\n" for line in [*lines[: bool(kept)], *kept.values()]))


def _refuse_a_run(path: Path) -> None:
    if (path / CONFIG).exists():
        raise FileExistsError(f"{path} holds a run: continue it with --resume {path}, or name another.")


def check_settings(place: str | Path, settings: Settings, step: int) -> None:
    """Raise if a run would be continued with settings that lead to another result than those that it began with.

    Args:
        place: Folder of the run, or a checkpoint in it. A run of an earlier version has stored nothing to compare.
        settings: Settings to continue with.
        step: Images of a step with them, over all processes.

    Raises:
        SettingsError: The message names the setting, or the stored file if it is damaged.
    """
    place = Path(place)
    folder = place if place.is_dir() else place.parent
    if not (folder / _RUN_FILE).is_file():
        return
    before, images = _read_began(folder / _RUN_FILE)
    ignored = {*MAY_CHANGE, *_PLACES}
    if place.is_file() or (folder / _LATEST[0]).is_file():
        # It has been read, and need not be there for ever.
        ignored.add("initial_checkpoint")
    now = _plain(settings)
    differing = [name for name in now if name not in ignored and before[name] != now[name]]
    if differing:
        told = ", ".join(f"{name} {shown(before[name])}, not {shown(now[name])}" for name in differing)
        raise SettingsError(
            f"The run in {folder} began with {told}: put that back in its {CONFIG}, or start another run. Without "
            f"another result may change: {', '.join(MAY_CHANGE)}."
        )
    if images != step:
        old, new = (
            f"batch_size {values['batch_size']}, grad_accum_steps {values['grad_accum_steps']}"
            for values in (before, now)
        )
        raise SettingsError(
            f"A step of the run in {folder} began with {images} images over all processes ({old}), and would have "
            f"{step} now ({new}): choose batch_size and grad_accum_steps so that it has {images}, or start another run."
        )


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON gives them back: model_kwargs may hold tuples, or dates of YAML."""
    return json.loads(json.dumps(asdict(settings), default=str))


def _read_began(path: Path) -> tuple[dict[str, Any], int]:
    try:
        stored = read_json(path)
        if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
            raise SettingsError("it holds no settings")
        if type(stored.get("step")) is not int:
            raise SettingsError("it does not say how many images a step has")
        return _plain(from_options({}, stored["settings"])), stored["step"]
    except (ReadingError, SettingsError) as error:
        raise SettingsError(
            f"{path}, what the run began with, is damaged ({one_line(error, 300)}): restore it, or remove it if you "
            "are sure that nothing was changed since."
        ) from error


def find_checkpoint(place: str | Path) -> Path | None:
    """Find the latest intact checkpoint in a run's folder, or check the one named; None: the run has none yet.

    Raises:
        FileNotFoundError: There is no such run.
        SettingsError: There are checkpoints, and all are damaged.
    """
    return _read_checkpoint(place)[0]


def _read_checkpoint(place: str | Path) -> tuple[Path | None, Any]:
    """See :func:`find_checkpoint`; with what is in it."""
    place = Path(place)
    candidates = [place] if place.is_file() else [place / name for name in _LATEST if (place / name).is_file()]
    if not candidates and not (place / CONFIG).is_file():
        raise FileNotFoundError(f"{place} is not the folder of a run.")
    for candidate in candidates:
        try:
            # Reads the whole file, since any part may be damaged.
            return candidate, read_torch(candidate)
        except (CheckpointError, OSError) as error:
            _logger.warning("%s", one_line(error, 500))
    earlier = [] if place.is_file() else sorted(place.glob("*.pth.tar"))
    # The only checkpoint still has its temporary name: the run was killed while it wrote its first.
    if not candidates or earlier == [place / _LATEST[1]]:
        return None, None
    others = [path.name for path in earlier if path not in candidates]
    advice = f"name an earlier one: {', '.join(others)}" if others else "no other is left, so start another run"
    raise SettingsError(
        f"The checkpoints of {place} are damaged ({', '.join(path.name for path in candidates)}): {advice}."
    )
