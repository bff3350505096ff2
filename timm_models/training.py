"""The training loop: timm's datasets, loaders, tasks, optimizers, schedulers and checkpoints, put together.

What timm's own script lacks, and the paper's recipe needs: the auxiliary loss, the learning-rate curve, steps of
a given batch on any number of devices, and a resumed run that continues as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm import utils
from timm.layers import convert_sync_batchnorm
from timm.models import clean_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch import Tensor, nn

from genas_plugins.checkpoints import CheckpointError, describe_mismatch
from genas_plugins.datasets import data_identity
from genas_plugins.devices import full_in_float64, in_float64
from genas_plugins.interrupts import pending_signal, raise_pending
from genas_plugins.scoring.batchnorm import preserve_batchnorm, recalibrate_batchnorm
from timm_models.data import (
    count_classes,
    evaluation_loader,
    image_config,
    image_mode,
    load_datasets,
    training_loader,
)
from timm_models.processes import Processes, processes
from timm_models.progress import Progress, checked_mean
from timm_models.runs import RunFolder, check_settings
from timm_models.schedule import LinearTailLRScheduler
from timm_models.settings import Settings, SettingsError
from timm_models.task import AuxiliaryClassificationTask
from timm_models.weights import read_weights

__all__ = ["Trainer", "TrainingInterrupted", "processes", "train"]

_logger = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended a training.

    Attributes:
        folder: Folder of the run, which can be continued; None: nothing was written.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder


def train(settings: Settings, resume: str | Path | None = None) -> Path:
    """Train a network.

    Args:
        settings: Settings of the training.
        resume: Folder of a run to continue, or a checkpoint in it; None: a new run.

    Returns:
        The run's folder.

    Raises:
        FileNotFoundError: The images or the checkpoint are missing.
        FolderInUseError: Another process writes to the run's folder.
        ValueError: Settings, images and checkpoint do not go together, or the run to continue began with others.
        DataChangedError: The run to continue began with other images.
        FloatingPointError: The loss is no longer a finite number.
        OSError: Something cannot be written; the last checkpoint is untouched.
        TrainingInterrupted: The user interrupted.
    """
    folder = None
    try:
        with processes(settings.device) as here:
            if resume is not None:
                check_settings(resume, settings, settings.images_of_a_step(here.count))
            trainer = Trainer(settings, here)
            with RunFolder.open(settings, here.primary, trainer.data_config["input_size"][-1], resume) as folder:
                trainer.fit(folder)
                return folder.path
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(folder and folder.path) from error
    except Exception as error:
        # A signal also ends the loader's workers, whose error may be raised first.
        if pending_signal() is None:
            raise
        raise TrainingInterrupted(folder and folder.path) from error


class Trainer:
    """One process's part of a training.

    Args:
        settings: Settings of the training.
        here: This process among those of the training.
    """

    def __init__(self, settings: Settings, here: Processes) -> None:
        self.settings, self.here = settings, here
        self.passes = settings.accumulation(here.count)
        if here.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        training, validation = load_datasets(settings, here.primary)
        # Only the first process writes and compares it: those of a node would all ask the same file system.
        self.identity = data_identity({"train": training, "validation": validation}) if here.primary else None
        utils.random_seed(settings.seed, 0)
        self.model = self._build_model(count_classes(training))
        self.data_config = image_config(asdict(settings), self.model, settings.model_kwargs.get("in_chans"))
        training.mode = validation.mode = image_mode(self.data_config)
        if settings.lighting and training.mode != "RGB":
            raise SettingsError("lighting adds a colour, and the network's images are grey: leave it at 0.")
        self.loader = training_loader(training, settings, self.data_config, here.device)
        self.validation_loader = evaluation_loader(validation, settings, self.data_config, here.device)
        if not len(self.loader):
            raise SettingsError(
                f"{len(training)} images make no batch of {settings.batch_size} on {here.count} process(es)."
            )
        if settings.batch_size == 1 and not settings.sync_bn:
            self._check_single_images()
        self.task = self._build_task()
        self.optimizer = create_optimizer_v2(
            self.task.get_trainable_module(),
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **settings.opt_kwargs,
        )
        self.scheduler, self.epochs = self._build_schedule()
        self.amp, self.scaler = self._build_amp()
        self.updates_per_epoch = math.ceil(len(self.loader) / self.passes)

    def _build_model(self, classes: int | None) -> nn.Module:
        settings = self.settings
        if settings.initial_checkpoint and not Path(settings.initial_checkpoint).is_file():
            raise FileNotFoundError(f"There is no checkpoint {settings.initial_checkpoint} to start from.")
        if settings.model_kwargs.get("auxiliary") and settings.auxiliary_weight == 0:
            raise SettingsError("The auxiliary head of model_kwargs needs an auxiliary_weight; the paper's is 0.4.")
        arguments: dict[str, Any] = {"drop_rate": settings.drop, **settings.model_kwargs}
        if settings.auxiliary_weight > 0:
            arguments["auxiliary"] = True
        numpy_archive = settings.initial_checkpoint.lower().endswith((".npz", ".npy"))
        try:
            model = timm.create_model(
                settings.model,
                num_classes=settings.num_classes or classes,
                # NumPy's archives are for networks that read them themselves.
                checkpoint_path=settings.initial_checkpoint if numpy_archive else None,
                **arguments,
            )
            if settings.initial_checkpoint and not numpy_archive:
                model.load_state_dict(read_weights(settings.initial_checkpoint))
        except (CheckpointError, EOFError, LookupError, RuntimeError) as error:
            if not settings.initial_checkpoint:
                raise
            raise SettingsError(f"{settings.initial_checkpoint} cannot be loaded: {error}") from error
        except TypeError as error:
            advice = " (it has no auxiliary head: auxiliary_weight must be 0)" if "auxiliary" in str(error) else ""
            raise SettingsError(f"{settings.model} refuses its arguments{advice}: {error}") from error
        if classes is not None and model.num_classes != classes:
            raise SettingsError(
                f"num_classes is {model.num_classes}, but there are {classes} folders of training images."
            )
        if settings.drop_path and not hasattr(model, "drop_path_prob"):
            raise SettingsError(f"drop_path is for GeNAS networks; for {settings.model} use model_kwargs.")
        if settings.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if settings.sync_bn and self.here.distributed:
            model = convert_sync_batchnorm(model)
        model.to(self.here.device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def _check_single_images(self) -> None:
        """Raise if a batch has one image where batch normalisation has no statistics of one."""
        image = torch.zeros((1, *self.data_config["input_size"]), device=self.here.device)
        try:
            with preserve_batchnorm(self.model):
                recalibrate_batchnorm(self.model, [(image, torch.zeros(1, dtype=torch.int64))])
        except ValueError as error:
            raise SettingsError(
                f"batch_size is 1, and batch normalisation has no statistics of one image of "
                f"{image.shape[-1]} pixels ({error}): choose a larger batch_size, or larger images."
            ) from error

    def _build_task(self) -> TrainingTask:
        arguments = {
            "criterion_kwargs": {"smoothing": self.settings.smoothing},
            "device": self.here.device,
            "verbose": False,
        }
        if self.settings.auxiliary_weight > 0:
            weight = self.settings.auxiliary_weight
            return AuxiliaryClassificationTask(self.model, auxiliary_weight=weight, **arguments)
        return ClassificationTask(self.model, **arguments)

    def _build_schedule(self) -> tuple[Any, int]:
        settings = self.settings
        if settings.sched == "linear_tail":
            scheduler = LinearTailLRScheduler(
                self.optimizer, settings.epochs, settings.tail_epochs, settings.warmup_epochs
            )
            return scheduler, settings.epochs
        return create_scheduler_v2(
            self.optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            decay_epochs=settings.decay_epochs,
            cooldown_epochs=settings.cooldown_epochs,
            decay_rate=settings.decay_rate,
            min_lr=settings.min_lr,
            warmup_lr=settings.warmup_lr,
            warmup_epochs=settings.warmup_epochs,
        )

    def _build_amp(self) -> tuple[Any, utils.NativeScaler | None]:
        if not self.settings.amp:
            return nullcontext, None
        dtype = getattr(torch, self.settings.amp_dtype)
        scaled = dtype is torch.float16 and self.here.device.type == "cuda"
        amp = partial(torch.autocast, device_type=self.here.device.type, dtype=dtype)
        return amp, utils.NativeScaler(device=self.here.device.type) if scaled else None

    def fit(self, folder: RunFolder) -> None:
        """Train to the end, from the start or from the run's last checkpoint."""
        folder.check(self.identity)
        start = self._restore(folder)
        folder.begin(self.identity, self.settings.images_of_a_step(self.here.count))
        folder.keep_genotype(self.model)
        if self.settings.torchcompile:
            self.task.compile()
        # Not what DistributedDataParallel wraps: validation needs none of its synchronisation.
        self._eval_model = self.task.get_eval_model()
        if self.here.distributed:
            cuda = self.here.device.type == "cuda"
            self.task.prepare_distributed(device_ids=[self.here.device] if cuda else None)
        saver = folder.saver(self.task, self.optimizer, self.scaler)
        folder.settle(saver)
        if start == self.epochs and self.here.primary:
            _logger.info("All %d epochs are done.", self.epochs)
        for epoch in range(start, self.epochs):
            # Everything random in an epoch follows from this, whether the run was resumed before it or not.
            # NumPy's seeds end at 2^32.
            seed = (self.settings.seed + self.here.count * epoch) % (2**32 - self.here.count)
            utils.random_seed(seed, self.here.rank)
            self.loader.sampler.set_epoch(epoch)
            if self.scheduler is not None:
                self.scheduler.step(epoch)
            if self.settings.drop_path:
                self.model.drop_path_prob = self.settings.drop_path * epoch / self.epochs
            trained = self._train_epoch(epoch)
            measured = self._validate()
            if not math.isfinite(measured["loss"]):
                raise FloatingPointError(
                    f"The validation loss is {measured['loss']} after epoch {epoch + 1}: lower the learning rate. The "
                    "last checkpoint is untouched."
                )
            folder.record(epoch, trained, measured, saver)

    def _restore(self, folder: RunFolder) -> int:
        """Load the checkpoint that the run continues from; returns the epoch to train next."""
        epoch = 0
        if folder.checkpoint is not None:
            self._check_checkpoint(folder.checkpoint, folder.saved)
            # Its tensors are read again by timm, and need not be in memory twice.
            folder.saved = {name: value for name, value in folder.saved.items() if name in ("epoch", "metric", "saver")}
            saved = resume_task_checkpoint(
                self.task, str(folder.checkpoint), self.optimizer, self.scaler, log_info=self.here.primary
            )
            if saved is None:
                raise SettingsError(f"{folder.checkpoint} does not say after which epoch it was written.")
            epoch = saved
        if self.settings.model_ema:
            self.task.setup_ema(decay=self.settings.model_ema_decay, use_warmup=self.settings.model_ema_warmup)
            if folder.checkpoint is not None:
                load_task_ema_checkpoint(self.task, str(folder.checkpoint))
        return epoch

    def _check_checkpoint(self, path: Path, saved: Any) -> None:
        """Raise if a checkpoint would not be restored in full: models may leave out what does not fit."""
        needed = ["state_dict", "optimizer", *(["state_dict_ema"] if self.settings.model_ema else [])]
        if not isinstance(saved, dict) or (
            missing := [name for name in needed if not isinstance(saved.get(name), dict)]
        ):
            raise SettingsError(f"{path} is no checkpoint of this run: it lacks {', '.join(missing or needed)}.")
        expected = self.task.get_trainable_module().state_dict()
        for name in needed[::2]:
            if mismatch := describe_mismatch(expected, clean_state_dict(saved[name])):
                raise SettingsError(f"{path} does not fit the network of this run; tensors of {name}: {mismatch}.")

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        module = self.task.get_trainable_module()
        module.train()
        self.optimizer.zero_grad()
        total, seen = full_in_float64((), 0.0, self.here.device), 0
        progress = Progress(self, epoch)
        batches = len(self.loader)
        for number, (images, target) in enumerate(self.loader):
            raise_pending()
            if self.settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            first = number // self.passes * self.passes
            last = min(first + self.passes, batches) - 1
            loss = self._backward(images, target, last - first + 1, update=number == last)
            total += in_float64(loss.detach() * len(target))
            seen += len(target)
            if number == last:
                update = number // self.passes
                self.optimizer.zero_grad()
                self.task.update_ema(step=epoch * self.updates_per_epoch + update + 1)
                if update % self.settings.log_interval == 0 or number == batches - 1:
                    progress.tell(update, checked_mean(total, seen, epoch, update), seen)
        if self.here.distributed:
            dist.all_reduce(total)
            if self.settings.dist_bn:
                utils.distribute_bn(module, self.here.count, self.settings.dist_bn == "reduce")
        mean = total.item() / (seen * self.here.count)
        return {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": progress.rate(seen)}

    def _backward(self, images: Tensor, target: Tensor, passes: int, update: bool) -> Tensor:
        quiet: AbstractContextManager[Any] = nullcontext() if update else self.task.no_sync()
        with quiet:
            with self.amp():
                loss = self.task(images, target)["loss"]
            scaled = loss / passes
            clip, mode = self.settings.clip_grad, self.settings.clip_mode
            parameters = None if clip is None else self.task.get_clip_parameters(exclude_head="agc" in mode)
            if self.scaler is not None:
                self.scaler(
                    scaled, self.optimizer, clip_grad=clip, clip_mode=mode, parameters=parameters, need_update=update
                )
                return loss
            scaled.backward()
        if update:
            if clip is not None:
                utils.dispatch_clip_grad(parameters, value=clip, mode=mode)
            self.optimizer.step()
        return loss

    def _validate(self) -> dict[str, float]:
        measured = self._evaluate(self._eval_model)
        if self.task.has_ema():
            if self.here.distributed and self.settings.dist_bn:
                averaged = self.task.get_trainable_module(ema=True)
                utils.distribute_bn(averaged, self.here.count, self.settings.dist_bn == "reduce")
            averaged = self._evaluate(self.task.get_eval_model(ema=True))
            measured |= {f"{name}_ema": value for name, value in averaged.items()}
        return measured

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        evaluator = self.task.create_evaluator(max_samples=self.validation_loader.sampler.num_valid_samples)
        with torch.inference_mode():
            for images, target in self.validation_loader:
                raise_pending()
                if self.settings.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                with self.amp():
                    output = model(images)
                evaluator.update(output, target)
        return dict(evaluator.compute(distributed=self.here.distributed))
