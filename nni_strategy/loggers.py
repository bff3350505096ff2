"""Lightning's loggers of a run: which there are, what they are told of the search, and how a resumed run goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nni.nas.evaluator.pytorch import Lightning
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from genas_plugins._messages import one_line
from genas_plugins._optional import require
from genas_plugins._reading import ReadingError, read_json
from genas_plugins.darts.genotype import Genotype
from genas_plugins.experiment.config import ConfigError
from genas_plugins.experiment.generations import generation_figures
from genas_plugins.files import write_text
from genas_plugins.plotting import plot_cells, plot_search
from genas_plugins.search import Record

__all__ = ["PICTURES", "RunLog", "SearchLog", "loggers_of"]

PICTURES = ("search", "loss_curves", "cells")
"""The pictures of a run, each a PNG of that name in its folder."""

_PROJECT = "genas"
# By the setting: the errors with which a log says that it cannot begin.
_ERRORS = {"wandb": "Error", "mlflow": "MlflowException"}
_ADVICE = {
    "wandb": " Or set WANDB_MODE=offline, and sync later.",
    "mlflow": " Tracking goes where MLFLOW_TRACKING_URI says, or else into the run's folder.",
}


def loggers_of(evaluator: Lightning) -> list[Logger]:
    """The loggers of an evaluator's trainer, its user's own or those of a run."""
    return list(getattr(evaluator.trainer, "loggers", ()))


class SearchLog:
    """Tells loggers how each generation of a search went, and shows them pictures.

    The figures are those of :func:`genas_plugins.experiment.generations.generation_figures`; their step is the
    generation. Pictures go to TensorBoard, Weights & Biases and MLflow; other loggers take figures only.

    Args:
        loggers: Lightning's.
        known: So many of the first candidates were told before, in whole generations.
        on_told: Called with the number of candidates that the loggers know of, after each generation.
    """

    def __init__(self, loggers: Sequence[Logger], known: int = 0, on_told: Callable[[int], None] | None = None) -> None:
        self.loggers = loggers
        self.known = known
        self._on_told = on_told

    @property
    def takes_pictures(self) -> bool:
        """Whether one of the loggers has a place for pictures."""
        return any(isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger) for logger in self.loggers)

    def generation(self, records: Sequence[Record], best: float | None) -> None:
        """Tell how a generation went, unless the loggers know that from before.

        Args:
            records: Of all its candidates.
            best: The best score so far.
        """
        count = records[-1].index + 1
        if count <= self.known:
            return
        figures = generation_figures(records, best)
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.define_metric("search/*", step_metric="search/generation")
                # With a step, Lightning would add it to those of the training.
                logger.log_metrics(figures)
            else:
                logger.log_metrics(figures, step=records[0].generation)
            _flush(logger)
        self.known = count
        if self._on_told is not None:
            self._on_told(count)

    def pictures(self, files: Mapping[str, Path], step: int) -> None:
        """Show pictures.

        Args:
            files: PNG files by their names in the log.
            step: The number of generations that they show.
        """
        for logger in self.loggers:
            for name, path in files.items():
                if isinstance(logger, TensorBoardLogger):
                    pixels = require("matplotlib.image", extra="plots", purpose="showing pictures").imread(path)
                    logger.experiment.add_image(f"pictures/{name}", pixels[..., :3], step, dataformats="HWC")
                elif isinstance(logger, WandbLogger):
                    logger.log_image(f"pictures/{name}", [str(path)])
                elif isinstance(logger, MLFlowLogger):
                    logger.experiment.log_artifact(logger.run_id, str(path), "pictures")
            _flush(logger)

    def draw(self, records: Sequence[Record], best: Sequence[Any]) -> None:
        """Draw a search that has no folder of its own, and the cells of what it found, where that can be and is wanted.

        Args:
            records: All candidates.
            best: The best architecture, if there is one.
        """
        there = importlib.util.find_spec("matplotlib") is not None
        if not (there and self.takes_pictures and records) or rank_zero_only.rank:
            return
        with tempfile.TemporaryDirectory() as folder:
            files = {"search": plot_search(records, Path(folder, "search.png"))}
            if best and isinstance(best[0], Genotype):
                files["cells"] = plot_cells(best[0], Path(folder, "cells.png"))
            self.pictures(files, records[-1].generation + 1)


def _flush(logger: Logger) -> None:
    """A kill must not take what counts as told."""
    logger.save()
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.flush()


class RunLog:
    """The logger of a run's folder. A run that is resumed goes on with the same log.

    That of ``"csv"``, the default, is Lightning's in ``training``, a new file for each process that works on the run.
    TensorBoard's files are in ``training/tensorboard``; Weights & Biases writes into the folder and where it is logged
    in, or only the former with ``WANDB_MODE=offline``; MLflow where ``MLFLOW_TRACKING_URI`` says, or into ``mlflow.db``
    and ``mlartifacts`` in the folder.

    Args:
        name: ``"csv"``, ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.
        folder: The run's folder.
        primary: Whether this is the process that writes.

    Raises:
        MissingPackageError: The logger's package is not installed.
        ConfigError: What is known of the log so far cannot be read.
    """

    def __init__(self, name: str, folder: Path, primary: bool) -> None:
        # Others have nothing to say.
        self.name = name if primary else "csv"
        self._folder, self._primary = folder, primary
        if self.name != "csv":
            # Loggers are called as their packages are.
            require(self.name, install=self.name, purpose=f"training.logger: {self.name}")
        self._path = folder / "training" / "log.json"
        self._told = self._read()
        self._search: SearchLog | None = None

    @property
    def search(self) -> SearchLog:
        """What is told of the search; after :meth:`open`.

        Raises:
            RuntimeError: The log is not open.
        """
        if self._search is None:
            raise RuntimeError("The log of a run must be opened first.")
        return self._search

    def open(self, settings: Mapping[str, Any]) -> Logger:
        """Begin the log, or go on with it; in the folder nothing is written for ``"csv"`` and ``"tensorboard"``.

        Args:
            settings: The experiment, told when the log begins.

        Raises:
            ConfigError: It cannot begin: nobody is logged in, or a server does not answer.
        """
        own = self._own()
        began = "id" in own
        try:
            logger = self._build(own)
            if self.name != "csv" and not began:
                logger.log_hyperparams(dict(settings))
        except (OSError, *self._errors()) as error:
            told = one_line(error, 300).rstrip(".")
            raise ConfigError(
                f"training.logger: {self.name} cannot begin: {told}.{_ADVICE.get(self.name, '')}"
            ) from error
        self._search = SearchLog([logger], own.get("candidates", 0), self._tell if self._primary else None)
        return logger

    def store(self) -> None:
        """Remember the log for a process that resumes the run."""
        if self._primary and self.name != "csv":
            self._write()

    def finished(self, generations: int) -> None:
        """Show the pictures that the run has written, unless they were shown before."""
        own = self._own()
        if own.get("pictures") == generations or not self.search.takes_pictures:
            return
        paths = {name: self._folder / f"{name}.png" for name in PICTURES}
        self.search.pictures({name: path for name, path in paths.items() if path.exists()}, generations)
        own["pictures"] = generations
        self._write()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for logger in () if self._search is None else self._search.loggers:
            logger.finalize("success" if error is None else "failed")
            if isinstance(logger, WandbLogger):
                # Not at the end of the process, which may go on with another run.
                logger.experiment.finish(exit_code=0 if error is None else 1)

    def _build(self, own: dict[str, Any]) -> Logger:
        if self.name == "csv":
            return CSVLogger(self._folder, name="training")
        if self.name == "tensorboard":
            own.setdefault("id", "tensorboard")
            return TensorBoardLogger(self._folder, "training", own["id"], default_hp_metric=False)
        if self.name == "wandb":
            own.setdefault("id", secrets.token_hex(4))
            project = os.environ.get("WANDB_PROJECT", _PROJECT)
            logger: Any = WandbLogger(self._folder.name, self._folder, project=project, id=own["id"])
            # Says now whether anybody is logged in.
            _ = logger.experiment
            return logger
        place: dict[str, Any] = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
        if place["tracking_uri"] is None:
            # Lightning's own default is a folder of files, which MLflow 3.17 refuses.
            whole = self._folder.resolve()
            place = {
                "tracking_uri": f"sqlite:///{whole / 'mlflow.db'}",
                "artifact_location": (whole / "mlartifacts").as_uri(),
            }
        logger = MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT), self._folder.name, run_id=own.get("id"), **place
        )
        if "id" in own:
            logger.experiment.update_run(own["id"], status="RUNNING")
        own["id"] = logger.run_id
        return logger

    def _errors(self) -> tuple[type[Exception], ...]:
        if self.name not in _ERRORS:
            return ()
        module = require(self.name, install=self.name, purpose=f"training.logger: {self.name}")
        return (getattr(module, _ERRORS[self.name]),)

    def _own(self) -> dict[str, Any]:
        return self._told.setdefault(self.name, {})

    def _tell(self, candidates: int) -> None:
        self._own()["candidates"] = candidates
        self._write()

    def _read(self) -> dict[str, Any]:
        if not self._primary or not self._path.exists():
            return {}
        try:
            told = read_json(self._path)
        except ReadingError as error:
            raise self._damaged(str(error)) from error
        if not isinstance(told, dict) or not all(isinstance(own, dict) for own in told.values()):
            raise self._damaged("it is not what a run writes")
        return told

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._path} is damaged ({reason}): remove it, and a new log is told of all generations.")

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        write_text(self._path, json.dumps(self._told) + "\n")
