"""The search of a run folder whose candidates are measured elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from genas_plugins.cluster.identity import identity
from genas_plugins.cluster.slots import end_workers, slots_folder
from genas_plugins.experiment import config
from genas_plugins.experiment.costs import COSTS_FILE, Budget
from genas_plugins.experiment.outcome import hand_over
from genas_plugins.experiment.resuming import RunHistory, check_scores, check_weights
from genas_plugins.experiment.run_folder import HISTORY_FILE, INITIAL_FILE, SUPERNET_FILE, TrainedRun
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.locking import FolderInUseError, lock_folder
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.search import Dispatch, History, JsonLines
from genas_plugins.search.dispatch import ANSWERS_FILE

__all__ = ["ClusterRun"]


class ClusterRun:
    """The search of a folder whose supernet is trained.

    Args:
        folder: Of ``genas search --train-only``, or of a search that was ended.
        tries: See :class:`genas_plugins.search.Dispatch`.
        patience: Seconds to wait for the lock of a process that was killed just now.
        data_root: Where the images are here; ``None`` for where the run had them.

    Raises:
        FileNotFoundError: The folder holds no trained supernet, or the images are not there.
        DataChangedError: The images are others.
        FolderInUseError: Another process writes to it.
        ConfigError: Its settings or weights are not those of its history, or its candidates cannot be
            measured one by one.
        HistoryError: Its history is damaged.
        OSError: It cannot be written to.
    """

    def __init__(
        self, folder: Path, tries: int = 3, patience: float = 0.0, data_root: str | Path | None = None
    ) -> None:
        self.folder = folder
        self._data_root = data_root
        self._began = time.time()
        run = TrainedRun.open(folder)
        self.experiment, self.supernet = run.experiment, run.supernet
        search = run.experiment.search
        if search.racing is not None:
            raise config.ConfigError(
                f"The search in {folder} races its candidates slice by slice of the images, which workers elsewhere "
                "cannot: train a run with search.racing of null."
            )
        if run.experiment.score.neighbourhood is not None:
            raise config.ConfigError(
                f"The search in {folder} measures the neighbours of candidates once, which workers elsewhere "
                "cannot: train a run with score.neighbourhood of null."
            )
        self.identity = identity(run)
        self._stack = contextlib.ExitStack()
        try:
            self._lock(patience)
            # Looked at again when the search has ended, which must not be when they are missed.
            data = run.data(data_root)
            # What a worker elsewhere has measured must find room here.
            _check_writable(folder)
            history = RunHistory(folder / HISTORY_FILE, (SUPERNET_FILE, INITIAL_FILE))
            check_scores(history, run.experiment.score.build())
            if history.records:
                check_weights(folder, history.weights, scored=True)
            evolution = search.evolution(seed=run.experiment.seed)
            paths = SubnetPaths(run.supernet, run.initial)
            self.space = paths.search_space
            evolution.space = self._costed(run, paths, data.validation.images.shape[1:], history)
            answers: JsonLines[Any] = JsonLines(folder / ANSWERS_FILE)
            self.dispatch = Dispatch(evolution, history=history, answers=answers, tries=tries)
        except BaseException:
            self._stack.close()
            raise

    def finish(self) -> None:
        """Write what a search leaves in its folder, and let others write to it.

        Raises:
            SearchFailedError: No candidate had a finite score.
            OSError: A file cannot be written.
        """
        (self.folder / ANSWERS_FILE).unlink(missing_ok=True)
        scorer = Scorer.from_run(self.folder, data_root=self._data_root)
        seconds = time.time() - self._began
        hand_over(self.folder, self.experiment, self.dispatch.evolution, self.dispatch.records, scorer, seconds)
        self.close()

    def close(self) -> None:
        """End the workers of this machine and release the folder."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        with contextlib.suppress(OSError):
            end_workers(slots_folder(self.folder, visible))
        self._stack.close()

    def _lock(self, patience: float) -> None:
        end = time.monotonic() + patience
        while True:
            try:
                self._stack.enter_context(lock_folder(self.folder))
                return
            except FolderInUseError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def _costed(self, run: TrainedRun, paths: SubnetPaths, shape: Any, history: History) -> Any:
        search = run.experiment.search
        metrics = run.experiment.score.build().metrics
        budget = Budget(vars(search.constraints), search.objectives, None, search.counted, metrics)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return budget.space(paths, shape, device=device, lines=history.beside(COSTS_FILE))


def _check_writable(folder: Path) -> None:
    probe = folder / ".writable"
    try:
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}): make room, or change its permissions."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
