"""One search from an experiment file to a run folder, resumable after a kill at any moment."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from pytorch_lightning.callbacks import Callback, LambdaCallback, ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from genas_plugins.checkpoints import CheckpointError, load_supernet, read_state, save_supernet
from genas_plugins.datasets import SearchData
from genas_plugins.devices import check_float64
from genas_plugins.experiment import config
from genas_plugins.experiment.outcome import Found, Outcome, SearchFailedError, hand_over
from genas_plugins.experiment.profiling import SearchProfile
from genas_plugins.experiment.progress import listener
from genas_plugins.experiment.resuming import RunHistory, begin, check_folder, check_scored
from genas_plugins.experiment.run_folder import (
    HISTORY_FILE,
    INITIAL_FILE,
    SUPERNET_FILE,
    load_data,
)
from genas_plugins.experiment.scorer import search_batches
from genas_plugins.files import atomic_path
from genas_plugins.interrupts import raise_pending
from genas_plugins.locking import lock_folder
from genas_plugins.scoring.paths import SubnetPaths
from genas_plugins.search import InFlight, Record
from genas_plugins.spaces import find_space
from nni_strategy.loggers import RunLog
from nni_strategy.service import NniService
from nni_strategy.space import SupernetSpace, space_of
from nni_strategy.strategy import GeNAS
from nni_strategy.training import TrainingProgress, supernet_evaluator

__all__ = ["Found", "Outcome", "SearchFailedError", "run_experiment"]


def run_experiment(
    experiment: config.Experiment,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
    profile: int | None = None,
    train_only: bool = False,
) -> Outcome:
    """Train, search and write the run folder.

    The folder holds ``config.yaml`` (every setting), ``run.json`` and ``data.json`` (what a resumed run must have in
    common with it, see :mod:`genas_plugins.experiment.resuming`), ``initial.safetensors``, ``supernet.ckpt``,
    ``history.jsonl``, ``genotype.json``, ``cells.svg``, ``cells.png``, ``search.png`` and
    ``loss_curves.png``; Lightning's figures lie under ``training``. In the NAS-Bench-201 space the best is in
    ``architecture.json``, as the benchmark's string, and not drawn. A killed run continues with ``resume`` and
    ends as an uninterrupted one would have.

    Args:
        experiment: What to do.
        folder: Where to; created if missing.
        resume: Continue the run that the folder holds.
        progress: Makes the progress displays, see :mod:`genas_plugins.experiment.progress`; ``None`` for none.
        profile: Trace so many of the training steps and of the candidates that this run has to do, after a short
            warm-up, into ``profile/`` and ``profile.txt``; see
            :mod:`genas_plugins.experiment.profiling`. ``None`` for none.
        train_only: Stop when the supernet is trained, with which architectures can then be scored and correlated; a
            resumed run without it goes on with the search. The outcome has no architectures.

    Raises:
        ConfigError: The folder holds a run and ``resume`` is not set, holds another experiment or other files,
            holds nothing to resume, or its settings or weights were changed since; or Lightning cannot train with
            these settings on this machine.
        FileNotFoundError: The images are not where the experiment says.
        ValueError: They are not what it expects, or ``profile`` is below 1, or given with racing or with several
            candidates in flight.
        CheckpointError: The folder's supernet cannot be read.
        DataChangedError: The images are not those that the run began with.
        HistoryError: The folder's history is damaged, or was measured otherwise.
        FolderInUseError: Another process writes to the folder.
        OSError: The folder cannot be written to; what is in it stays readable, and can be resumed.
        KeyboardInterrupt: The user interrupted; the folder can be resumed.
        SearchFailedError: No candidate had a finite score.
    """
    search = experiment.search
    if profile is not None and search.service is not None:
        raise ValueError(
            "A profile traces candidates in this process: leave out --profile, or set search.service to null."
        )
    if profile is not None and (search.racing or experiment.score.neighbourhood or (search.in_flight or 1) > 1):
        raise ValueError(
            "A profile traces candidates one by one, as neither a race nor several in flight nor neighbourhoods are "
            "measured: leave out --profile, or set search.racing and score.neighbourhood to null and search.in_flight "
            "to 1 or null."
        )
    folder = Path(folder)
    # Lightning starts the other processes of a distributed run as copies of this one.
    primary = rank_zero_only.rank == 0
    if not primary:
        return _run(experiment, folder, primary, resume, progress, profile, train_only)
    check_folder(folder, experiment, resume)
    with lock_folder(folder):
        return _run(experiment, folder, primary, resume, progress, profile, train_only)


def _run(
    experiment: config.Experiment,
    folder: Path,
    primary: bool,
    resume: bool,
    progress: Callable[[str, int, int], Any] | None,
    profile: int | None,
    train_only: bool,
) -> Outcome:
    profiler = SearchProfile(folder, profile) if profile is not None and primary else None
    log = RunLog(experiment.training.logger, folder, primary)
    if primary:
        # Once more, now that nobody else can write to it.
        check_folder(folder, experiment, resume)
    torch.manual_seed(experiment.seed)
    data = load_data(experiment)
    space = _space(experiment, data.num_classes)
    history = RunHistory(folder / HISTORY_FILE, (SUPERNET_FILE, INITIAL_FILE), read_only=not primary)
    if primary:
        check_scored(folder, data, history)
    shown = progress if primary else None
    evaluator = _evaluator(experiment, data, folder, shown, profiler)
    device = evaluator.trainer.strategy.root_device
    check_float64((parameter.dtype for parameter in space.parameters()), device)
    space.to(device)
    search = experiment.search
    total = search.population * search.generations if search.evaluations is None else search.evaluations
    listen = listener(shown, total, profiler, len(history.records))
    kind = _TrainingOnly if train_only else GeNAS
    strategy = _strategy(kind, experiment, data, device, history, listen, profile)
    if experiment.search.service is not None and not train_only:
        strategy.elsewhere = NniService(folder, experiment.search.service, experiment.search.workers)
    if primary:
        shape = data.validation.images.shape[1:]
        strategy.budget.check(SubnetPaths(space.supernet), shape, device, experiment.seed)
    # Only now: a run that cannot start leaves nothing behind that would have to be resumed or removed.
    evaluator.trainer.logger = log.open(config.plain(experiment))
    strategy.search_log = log.search
    with log:
        if primary:
            begin(folder, experiment, data.identity)
            log.store()
        _initial_weights(space, folder / INITIAL_FILE, primary)
        start = time.time()
        with profiler or contextlib.nullcontext():
            _run_nni(space, evaluator, strategy, folder)
        if primary and train_only:
            # It begins when training has ended.
            (folder / HISTORY_FILE).touch()
        if train_only or not primary:
            return Outcome(folder, (), 0, 0)
        strategy.scorer.data = data
        seconds = time.time() - start
        outcome = hand_over(folder, experiment, strategy.evolution, strategy.records, strategy.scorer, seconds)
        log.finished(strategy.evolution.generation)
        return outcome


def _space(experiment: config.Experiment, num_classes: int) -> SupernetSpace:
    own = find_space(experiment.space.name)
    space = space_of(own, own.supernet_arguments(num_classes, experiment.space))
    if experiment.training.precision == "64-true":
        # Lightning does so too, but loads a checkpoint before: what it resumes would be rounded to float32.
        space.double()
    return space


def _strategy(
    kind: type[GeNAS],
    experiment: config.Experiment,
    data: SearchData,
    device: torch.device,
    history: RunHistory,
    listen: Callable[[Record], None],
    profile: int | None,
) -> GeNAS:
    score = experiment.score
    recalibration, validation = search_batches(data, device, score.recalibration, score.batch_size)
    in_flight: int | InFlight | None = experiment.search.in_flight
    if profile is not None:
        # One by one, and each as a search without a profile measures it.
        in_flight = InFlight(1, device, InFlight(in_flight, device).threads)
    return kind(
        score=score.searched,
        recalibration=score.recalibration,
        recalibration_batches=recalibration,
        validation_batches=validation,
        **{name: value for name, value in vars(experiment.search).items() if name not in ("service", "workers")}
        | {"constraints": vars(experiment.search.constraints), "in_flight": in_flight},
        seed=experiment.seed,
        history=history,
        on_record=listen,
        device=device,
    )


class _TrainingOnly(GeNAS):
    """Has done its part when the supernet is trained."""

    def _run(self) -> None:
        # Not GeNAS's, which goes on with the search.
        super(GeNAS, self)._run()


class _WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and that are data when they are read.

    Lightning writes to the system's folder of temporary files and moves the result, which between two file
    systems is a copy that a kill tears.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", **options: Any) -> dict[str, Any]:
        # Says in a sentence what is wrong with a file that is damaged or could execute code.
        read_state(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in checkpoint]
        if missing:
            raise CheckpointError(f"{path} holds no training to continue (no {missing[0]}): it is not this run's own.")
        return checkpoint


class _QuietExperiment(NasExperiment):
    """An experiment that writes nothing: no entry in a list in the user's home folder, no log, no state.

    The run folder has all that is needed to resume, and NNI's saving swallows interrupts.
    """

    def _start_logging(self, debug: bool) -> None: ...

    def _stop_logging(self) -> None: ...

    def _start_without_nni_manager(self) -> None: ...

    def _stop_without_nni_manager(self) -> None: ...

    def save_checkpoint(self) -> None: ...


def _initial_weights(space: SupernetSpace, path: Path, primary: bool) -> None:
    if path.exists():
        initial = load_supernet(path)
        if initial.num_classes != space.supernet.num_classes:
            raise config.ConfigError(
                f"The supernet of {path.parent} has {initial.num_classes} classes, and the images have "
                f"{space.supernet.num_classes}: resume it with the images that it was started with."
            )
        space.supernet.load_state_dict(initial.state_dict())
    elif primary:
        save_supernet(space.supernet, path)


def _evaluator(
    experiment: config.Experiment,
    data: SearchData,
    folder: Path,
    progress: Callable[[str, int, int], Any] | None,
    profiler: SearchProfile | None,
) -> Lightning:
    training = experiment.training
    checkpoint = folder / SUPERNET_FILE
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder,
            checkpoint.stem,
            every_n_epochs=training.checkpoint_every,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        ),
        LambdaCallback(on_train_batch_start=lambda *_: raise_pending()),
    ]
    if progress is not None:
        callbacks.append(TrainingProgress(progress, training.epochs))
    if profiler is not None:
        callbacks.append(
            LambdaCallback(
                on_train_batch_end=lambda *_: profiler.training_step(), on_train_end=lambda *_: profiler.training_end()
            )
        )
    recipe = ("batch_size", "learning_rate", "final_learning_rate", "momentum", "weight_decay", "gradient_clip")
    recipe += ("decay_unsampled", "num_workers", "threads")
    try:
        return supernet_evaluator(
            data,
            training.epochs,
            **{name: getattr(training, name) for name in recipe},
            flip=experiment.data.flip,
            crop_padding=experiment.data.crop_padding,
            seed=experiment.seed,
            fit_kwargs={"ckpt_path": str(checkpoint)} if checkpoint.exists() else None,
            accelerator=training.accelerator,
            devices=training.devices,
            strategy="auto" if training.devices == 1 else "ddp_find_unused_parameters_true",
            precision=training.precision,
            deterministic=experiment.deterministic,
            callbacks=callbacks,
            plugins=[_WholeCheckpoints()],
            # That of the run is opened when nothing else can go wrong.
            logger=False,
            # Lightning warns where an epoch is shorter.
            log_every_n_steps=max(1, min(50, len(data.train) // training.batch_size)),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise config.ConfigError(f"training: {error}") from error


def _run_nni(space: SupernetSpace, evaluator: Any, strategy: GeNAS, folder: Path) -> None:
    settings = NasExperimentConfig("sequential", "raw", experiment_working_directory=str(folder.resolve()))
    experiment = _QuietExperiment(space, evaluator, strategy, settings)
    try:
        # Not run(), which swallows an interrupt: what was found until then would pass for the result.
        experiment.start()
    except SystemExit as error:
        # Lightning turns an interrupt into an exit.
        if evaluator.trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    except MisconfigurationException as error:
        # What Lightning finds out only when it trains.
        raise config.ConfigError(f"training: {error}") from error
    finally:
        experiment.stop()
