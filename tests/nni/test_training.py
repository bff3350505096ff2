"""Supernet training: the official recipe against hand-written loops, the loader against brute force, resuming."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, TensorDataset

from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.datasets import ImageTensors, SearchData
from genas_plugins.spaces import DartsSearchSpace
from genas_plugins.training import batches as augmenting
from genas_plugins.training.path_sgd import PathSGD
from nni_strategy import training
from nni_strategy.space import DartsSpace, NasBench201Space
from nni_strategy.strategy import GeNAS
from nni_strategy.training import SupernetModule, TrainBatches, TrainingProgress, supernet_evaluator

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def random_images(count: int, size: int = 8, seed: int = 0, classes: int = 10) -> ImageTensors:
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    labels = torch.arange(count) % classes
    return ImageTensors(pixels, labels, tuple(str(label) for label in range(classes)))


@pytest.fixture
def data() -> SearchData:
    train, validation = random_images(24), random_images(16, seed=1)
    return SearchData(train, train, validation, None, MEAN, STD, 10, "digits", 8)


class TrainOnly(GeNAS):
    """The strategy without the search after training."""

    def search(self) -> None: ...


def train(space: ModelSpace, evaluator: Lightning) -> ModelSpace:
    TrainOnly()(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    return space


class Witness(Callback):
    """Notes the learning rate of each epoch, and the images, labels and path of each step."""

    def __init__(self, space: DartsSpace | None = None) -> None:
        self.space = space
        self.rates: list[float] = []
        self.steps: list[tuple[int, Tensor, Tensor, Genotype | None]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        (group,) = trainer.optimizers[0].param_groups
        self.rates.append(group["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        path = None if self.space is None else self.space.network._candidate
        self.steps.append((trainer.current_epoch, batch[0].clone(), batch[1].clone(), path))


def test_a_users_own_evaluator(data: SearchData, tmp_path: Path) -> None:
    images = data.train.images.float() / 255
    loader = DataLoader(TensorDataset(images, data.train.labels), batch_size=8)
    evaluator = Classification(
        num_classes=10,
        learning_rate=0.01,
        train_dataloaders=loader,
        val_dataloaders=loader,
        max_epochs=1,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    torch.manual_seed(0)
    space = NasBench201(4, 1, 10)
    before = [parameter.clone() for parameter in space.parameters()]
    strategy = GeNAS(population=3, generations=1, parents=1, mutants=0, crossovers=0, recalibration_images=16)
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    moved = [not torch.equal(a, b) for a, b in zip(before, space.parameters(), strict=True)]
    assert any(moved)
    assert "train_acc" in evaluator.trainer.callback_metrics
    assert len(strategy.records) == 3


class Hooked(SupernetModule):
    """A user's module that has its own say in every hook of an optimisation."""

    def __init__(self) -> None:
        super().__init__(epochs=1)
        self.called: Counter[str] = Counter()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.called["optimizer_step"] += 1
        optimizer.param_groups[0]["lr"] = 0.0 if batch_idx else 0.5
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.called["configure_gradient_clipping"] += 1
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.called["on_before_zero_grad"] += 1

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.called["on_before_optimizer_step"] += 1

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.called["lr_scheduler_step"] += 1

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called["on_before_batch_transfer"] += 1
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.called["transfer_batch_to_device"] += 1
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called["on_after_batch_transfer"] += 1
        return batch

    def on_validation_epoch_start(self) -> None:
        self.called["on_validation_epoch_start"] += 1

    def on_validation_epoch_end(self) -> None:
        self.called["on_validation_epoch_end"] += 1

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.called["on_validation_batch_start"] += 1

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.called["on_validation_batch_end"] += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called["on_save_checkpoint"] += 1


def test_hooks_of_the_users_module_are_called(data: SearchData, tmp_path: Path) -> None:
    images = data.train.images.float() / 255
    loader = DataLoader(TensorDataset(images, data.train.labels), batch_size=12)
    module = Hooked()
    trainer = Trainer(max_epochs=1, callbacks=[ModelCheckpoint(tmp_path)], num_sanity_val_steps=0, **QUIET)
    space = DartsSpace(10, 4, 2)
    before = [parameter.clone() for parameter in space.parameters()]
    train(space, Lightning(module, trainer, train_dataloaders=loader, val_dataloaders=loader))
    assert module.called == {
        "optimizer_step": 2,
        "configure_gradient_clipping": 2,
        "on_before_zero_grad": 2,
        "on_before_optimizer_step": 2,
        "lr_scheduler_step": 1,
        "on_before_batch_transfer": 4,
        "transfer_batch_to_device": 4,
        "on_after_batch_transfer": 4,
        "on_validation_epoch_start": 1,
        "on_validation_epoch_end": 1,
        "on_validation_batch_start": 2,
        "on_validation_batch_end": 2,
        "on_save_checkpoint": 1,
    }
    # One step of 0.5 along a gradient clipped to 1e-3, and the decay of weights 3e-4 times smaller than they are.
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, space.parameters(), strict=True)])
    norm = torch.cat([parameter.flatten() for parameter in before]).norm()
    assert 0 < moved.norm() <= 0.5 * (1e-3 + 3e-4 * norm)


def test_official_settings(data: SearchData, tmp_path: Path) -> None:
    witness = Witness()
    evaluator = supernet_evaluator(
        data, 3, batch_size=24, callbacks=[witness], enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    train(DartsSpace(10, 4, 2), evaluator)
    (optimizer,) = evaluator.trainer.optimizers
    (group,) = optimizer.param_groups
    assert type(optimizer) is PathSGD
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 3e-4, False)
    assert evaluator.trainer.gradient_clip_val == 5.0
    # 0.001 + 0.024 (1 + cos(pi t / 3)) / 2 for t = 0, 1, 2.
    assert witness.rates == pytest.approx([0.025, 0.019, 0.007], abs=1e-12)
    assert len(witness.steps) == 3


def plain_training(
    supernet: SuperNet,
    steps: list[tuple[int, Tensor, Tensor, Genotype]],
    rates: list[float],
    decay: float,
    clip: float,
    unsampled: bool,
) -> None:
    """SGD with momentum, weight decay and clipping, written out."""
    parameters = list(supernet.parameters())
    buffers: dict[int, Tensor] = {}
    supernet.train()
    for epoch, images, labels, genotype in steps:
        loss = F.cross_entropy(supernet(images, genotype), labels)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients if g is not None))
        factor = min(1.0, clip / (norm + 1e-6))
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                if gradient is None:
                    # Before its first gradient a parameter has none that could be zeroed.
                    if not unsampled or number not in buffers:
                        continue
                    gradient = torch.zeros_like(parameter)
                gradient = factor * gradient + decay * parameter
                old = buffers.get(number)
                buffers[number] = gradient if old is None else 0.9 * old + gradient
                parameter -= rates[epoch] * buffers[number]


@pytest.mark.parametrize("unsampled", [True, False])
def test_training_equals_a_plain_loop(unsampled: bool, data: SearchData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = DartsSpace(10, 4, 2)
    plain = copy.deepcopy(space.supernet)
    witness = Witness(space)
    evaluator = supernet_evaluator(
        data,
        2,
        batch_size=8,
        learning_rate=0.1,
        final_learning_rate=0.02,
        weight_decay=0.05,
        gradient_clip=0.5,
        decay_unsampled=unsampled,
        callbacks=[witness],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    train(space, evaluator)
    # Six steps, of the paths that seed, stage, epoch and batch name.
    paths = [
        DartsSearchSpace().sample(np.random.default_rng((0, 0, epoch, batch)))
        for epoch in range(2)
        for batch in range(3)
    ]
    assert [step[3] for step in witness.steps] == paths
    plain_training(plain, witness.steps, [0.1, 0.06], decay=0.05, clip=0.5, unsampled=unsampled)
    for (name, value), other in zip(space.supernet.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=name)


def test_weights_decay_where_no_path_goes(data: SearchData, tmp_path: Path) -> None:
    weights = {}
    for unsampled in (True, False):
        torch.manual_seed(0)
        space = DartsSpace(10, 4, 2)
        witness = Witness(space)
        evaluator = supernet_evaluator(
            data,
            1,
            batch_size=2,
            learning_rate=0.1,
            final_learning_rate=0.1,
            weight_decay=0.05,
            decay_unsampled=unsampled,
            callbacks=[witness],
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **QUIET,
        )
        initial = copy.deepcopy(space.supernet)
        train(space, evaluator)
        weights[unsampled] = (initial, space.supernet, [step[3] for step in witness.steps])

    initial, trained, paths = weights[False]
    # Both cells of this stack reduce, so the normal cell's genes are never used.
    used = {(name, source, node) for path in paths for node, name, source in edges(path.reduce)}
    never = [
        (name, source, node)
        for node in (2, 3, 4, 5)
        for source in range(node)
        for name in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
        if (name, source, node) not in used
    ]
    assert never
    for supernet in (trained, weights[True][1]):
        for name, source, node in never:
            for cell, old in zip(supernet.cells, initial.cells, strict=True):
                now, before = cell.operation(name, source, node), old.operation(name, source, node)
                pairs = zip(now.parameters(), before.parameters(), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)

    # An operation that the first step alone uses: afterwards momentum and decay move it as a linear recurrence.
    first, later = edges(paths[0].reduce), {edge for path in paths[1:] for edge in edges(path.reduce)}
    node, name, source = next(e for e in first if e not in later and "conv" in e[1])
    steps = len(paths)
    _, official, _ = weights[True]
    _, strict, _ = weights[False]
    matrix = np.array([[1 - 0.1 * 0.05, -0.1 * 0.9], [0.05, 0.9]])
    power = np.linalg.matrix_power(matrix, steps - 1)
    for cell, other, old in zip(official.cells, strict.cells, initial.cells, strict=True):
        triples = zip(*(c.operation(name, source, node).parameters() for c in (cell, other, old)), strict=True)
        for decayed, once, start in triples:
            # After one step with momentum from rest, the buffer is what the step was made of.
            buffer = (start - once) / 0.1
            expected = power[0, 0] * once + power[0, 1] * buffer
            torch.testing.assert_close(decayed, expected.float(), rtol=0, atol=1e-5)
            assert not torch.equal(decayed, once)


def edges(cell: Any) -> list[tuple[int, str, int]]:
    return [(2 + position // 2, name, source) for position, (name, source) in enumerate(cell)]


@pytest.mark.parametrize("unsampled", [True, False])
def test_a_resumed_training_ends_with_the_same_bits(unsampled: bool, data: SearchData, tmp_path: Path) -> None:
    def run(folder: Path, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        evaluator = supernet_evaluator(
            data,
            2,
            batch_size=8,
            weight_decay=0.05,
            decay_unsampled=unsampled,
            crop_padding=1,
            callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)],
            default_root_dir=folder,
            **QUIET,
            **more,
        )
        return train(DartsSpace(10, 4, 2), evaluator).state_dict()

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "epoch=0.ckpt"
    torch.manual_seed(5)
    resumed = run(tmp_path / "resumed", fit_kwargs={"ckpt_path": str(checkpoint), "weights_only": True})
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["epoch=1.ckpt"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class StopError(Exception):
    """Ends a run in the middle of an epoch."""


def test_a_checkpoint_within_an_epoch_holds_the_present_weights(data: SearchData, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise StopError

    torch.manual_seed(0)
    space = DartsSpace(10, 4, 2)
    plain = copy.deepcopy(space.supernet)
    witness = Witness(space)
    evaluator = supernet_evaluator(
        data,
        1,
        batch_size=6,
        weight_decay=0.05,
        callbacks=[witness, Stop()],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    with pytest.raises(StopError):
        train(space, evaluator)
    plain_training(plain, witness.steps, [0.025], decay=0.05, clip=5.0, unsampled=True)
    state = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    for name, value in plain.state_dict().items():
        (own,) = (state[key] for key in state if key.endswith(f"supernet.{name}"))
        torch.testing.assert_close(own, value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("build", [lambda: DartsSpace(10, 4, 2), lambda: NasBench201Space(10, 4, 1)])
def test_a_run_with_torchs_own_optimizer_is_continued(
    build: Any, data: SearchData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, own: bool, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        space = build()
        with monkeypatch.context() as patch:
            if not own:
                # What other spaces get, and this one got before: zeros in the gradients.
                patch.setattr(training, "SupernetSpace", type(None))
            evaluator = supernet_evaluator(
                data,
                2,
                batch_size=8,
                weight_decay=0.05,
                callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)],
                default_root_dir=folder,
                **QUIET,
                **more,
            )
            train(space, evaluator)
        assert type(evaluator.trainer.optimizers[0]) is (PathSGD if own else torch.optim.SGD)
        return space.state_dict()

    whole = run(tmp_path / "whole", own=False)
    before = {"ckpt_path": str(tmp_path / "whole" / "epoch=0.ckpt"), "weights_only": True}
    resumed = run(tmp_path / "resumed", own=True, fit_kwargs=before)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_frozen_space_is_trained_like_any_network(data: SearchData, tmp_path: Path) -> None:
    space = DartsSpace(10, 4, 2)
    genotype = DartsSearchSpace().sample(np.random.default_rng(0))
    network = RawFormatModelSpace(space, None).freeze(space.to_sample(genotype)).executable_model()
    before = [parameter.clone() for parameter in network.parameters()]
    evaluator = supernet_evaluator(
        data, 1, batch_size=8, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    evaluator.evaluate(network)
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True) if a.dim() > 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [lambda: DartsSpace(10, 4, 3), lambda: NasBench201Space(10, 4, 1)])
def test_batches_are_counted_as_one_by_one(build: Any, frozen: bool) -> None:
    torch.manual_seed(0)
    space = build()
    candidates = [space.search_space.sample(np.random.default_rng(seed)) for seed in range(6)]
    if frozen:
        sample = space.to_sample(candidates[0])
        space = RawFormatModelSpace(space, None).freeze(sample).executable_model()
    plain = copy.deepcopy(space).train()
    module = SupernetModule(1).train()
    module.set_model(space.train())
    module.configure_optimizers()
    for model in (space, plain):
        *_, frozen_one, last = (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        # It averages over all batches, and needs the count to do so.
        last.momentum = None
        # It counts nothing.
        frozen_one.eval()
    for candidate in candidates:
        images = torch.randn(4, 3, 8, 8)
        if not frozen:
            for model in (space, plain):
                model.network.resample(model.to_sample(candidate))
        torch.testing.assert_close(module(images), plain(images), rtol=0, atol=0)
    module.eval()(images)
    for (name, value), other in zip(space.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_forward_pass_that_fails_keeps_the_counters() -> None:
    module = SupernetModule(1)
    module.set_model(DartsSpace(10, 4, 3))
    module.configure_optimizers()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    with pytest.raises(RuntimeError):
        module.train()(torch.zeros(2, 5, 8, 8))
    assert before.keys() == module.model.state_dict().keys()


WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero, torch.ops.aten.equal}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that it reads, shapes that depend on values, copies."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        self.reads += function.overloadpacket in WAITS
        if function.overloadpacket is torch.ops.aten._to_copy:
            self.copies += arguments[0].device != out.device
        return out


@pytest.mark.parametrize("build", [lambda: DartsSpace(10, 4, 3), lambda: NasBench201Space(10, 4, 1)])
def test_the_host_does_not_wait_for_a_step(build: Any, data: SearchData, tmp_path: Path) -> None:
    class Display:
        def __init__(self, *unused: Any) -> None:
            self.shown: list[Any] = []

        def step(self, shown: Any) -> None:
            self.shown.append(shown)

        def close(self) -> None: ...

    class Count(Callback):
        """From the end of a step to the end of the next, loading and displaying included."""

        def __init__(self) -> None:
            self.mode, self.reads = Waits(), []

        def on_train_epoch_start(self, *unused: Any) -> None:
            self.mode.__enter__()

        def on_train_batch_end(self, *unused: Any) -> None:
            self.reads.append(self.mode.reads)

        def on_train_epoch_end(self, *unused: Any) -> None:
            self.mode.__exit__(None, None, None)

    displays: list[Display] = []
    progress = TrainingProgress(lambda *unused: displays.append(Display()) or displays[-1], 1)
    count = Count()
    evaluator = supernet_evaluator(
        data,
        1,
        batch_size=2,
        callbacks=[progress, count],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    train(build(), evaluator)
    assert len(count.reads) == 12
    shown = [bool(shown) for shown in displays[0].shown]
    assert shown == [step == 9 for step in range(12)]
    read = [later > before for before, later in zip([0, *count.reads], count.reads, strict=False)]
    assert read == shown


@pytest.mark.parametrize("options", [{}, {"flip": False}, {"crop_padding": 0}])
def test_an_epoch_is_drawn_ahead_and_moved_at_once(options: dict[str, Any]) -> None:
    copies = []
    for count in (14, 70):
        batches = batches_of(labelled(count), **options).to(torch.device("meta"))
        with Waits() as waits:
            assert len(list(batches)) == count // 7
        assert waits.reads == 0
        copies.append(waits.copies)
    # The order, the corners and the mirrored ones.
    assert copies == [3 - len(options)] * 2


def test_augmentation_is_drawn_batch_by_batch_from_one_stream() -> None:
    data, padding = labelled(17), 3
    images, labels = collected(batches_of(data, seed=2, crop_padding=padding), 5)
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 5)
    order = torch.randperm(17, generator=generator)
    assert torch.equal(labels, order)
    generator.manual_seed((2 * 1_000_003 + 5) * 1_009 + 1)
    padded = F.pad(data.images, (padding,) * 4)
    expected = []
    for chosen in order.split(7):
        corners = torch.randint(2 * padding + 1, (2, len(chosen)), generator=generator).tolist()
        mirrored = (torch.rand(len(chosen), generator=generator) < 0.5).tolist()
        for number, top, left, mirror in zip(chosen.tolist(), *corners, mirrored, strict=True):
            crop = padded[number, :, top : top + 8, left : left + 8]
            expected.append(crop.flip(2) if mirror else crop)
    np.testing.assert_allclose(images.numpy(), normalised(torch.stack(expected).numpy().astype(np.float64)), atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"flip": False}, {"crop_padding": 0}, {"flip": False, "crop_padding": 0}])
@pytest.mark.parametrize("several", [2, 3, 50])
def test_batches_that_are_augmented_together_are_those_of_one_by_one(
    several: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_of(labelled(40), seed=1, **options)
    alone = list(batches)
    monkeypatch.setattr(augmenting, "_batches_at_once", lambda device, size: several)
    together = list(batches)
    assert [len(labels) for _, labels in together] == [7, 7, 7, 7, 7, 5]
    for own, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        assert own[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("device", "size", "expected"), [("cpu", 1, 1), ("meta", 4 * 3 * 32 * 32 * 64, 21), ("meta", 10**9, 1)]
)
def test_batches_are_augmented_together_where_they_are_small_and_not_on_a_cpu(
    device: str, size: int, expected: int
) -> None:
    assert augmenting._batches_at_once(torch.device(device), size) == expected


def labelled(count: int, size: int = 8) -> ImageTensors:
    """Images whose label is their number."""
    return random_images(count, size, classes=count)


def batches_of(data: ImageTensors | Dataset, **options: Any) -> TrainBatches:
    return TrainBatches(data, 7, MEAN, STD, **options)


def collected(batches: TrainBatches, epoch: int) -> tuple[Tensor, Tensor]:
    batches.set_epoch(epoch)
    images, labels = zip(*batches, strict=True)
    assert len(images) == len(batches)
    return torch.cat(images), torch.cat(labels)


def normalised(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(row).reshape(3, 1, 1) for row in (MEAN, STD))
    return (pixels / 255 - mean) / std


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    data = labelled(40)
    images, labels = collected(batches_of(data), 3)
    state = torch.get_rng_state()
    again, same = collected(batches_of(data), 3)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert torch.equal(torch.get_rng_state(), state)
    orders = {tuple(collected(batches_of(data, seed=seed), epoch)[1].tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    for order in orders:
        assert sorted(order) == list(range(40))
    sizes = [len(labels) for _, labels in batches_of(data)]
    assert sizes == [7, 7, 7, 7, 7, 5]


def test_without_augmentation_images_are_only_normalised() -> None:
    data = labelled(20)
    images, labels = collected(batches_of(data, flip=False, crop_padding=0), 0)
    expected = normalised(data.images.numpy().astype(np.float64))[labels.numpy()]
    np.testing.assert_allclose(images.numpy(), expected, atol=2e-6)
    assert torch.equal(data.images, labelled(20).images)


def test_every_image_is_one_of_its_crops_and_mirror_images() -> None:
    padding, count = 2, 400
    data = labelled(count)
    images, labels = collected(batches_of(data, crop_padding=padding), 0)
    assert images.shape == (count, 3, 8, 8)
    raw = data.images.numpy().astype(np.float64)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        padded = np.zeros((3, 8 + 2 * padding, 8 + 2 * padding))
        padded[:, padding:-padding, padding:-padding] = raw[label]
        matches = []
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                crop = padded[:, top : top + 8, left : left + 8]
                for mirrored in (False, True):
                    candidate = normalised(crop[:, :, ::-1] if mirrored else crop)
                    if np.abs(candidate - image).max() < 1e-5:
                        matches.append((top, left, mirrored))
        assert len(matches) == 1
        seen.update(matches)
    # All 50 cases, and uniformly so: 8 expected of each.
    assert len(seen) == 50
    assert chisquare(list(seen.values())).pvalue > 1e-3


class Pairs(Dataset):
    """What a data set on disk gives: pairs of a uint8 image and a label."""

    def __init__(self, data: ImageTensors) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data.images[index], int(self.data.labels[index])


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_data_set_on_disk_gives_the_same_batches() -> None:
    data = labelled(30)
    images, labels = collected(batches_of(data), 1)
    state = torch.get_rng_state()
    others, same = collected(batches_of(Pairs(data)), 1)
    assert torch.equal(labels, same)
    assert torch.equal(images, others)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(41)
    _, alone = collected(batches_of(data), 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares, augmented = [], []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        images, labels = collected(batches_of(data), 2)
        shares.append(labels.tolist())
        augmented.append(images)
    # Two of 41 are left out, so that every process takes the same number of steps.
    assert [len(share) for share in shares] == [13, 13, 13]
    assert len({label for share in shares for label in share}) == 39
    assert [label for three in zip(*shares, strict=True) for label in three] == alone[:39].tolist()
    assert not torch.equal(augmented[0], augmented[1])
    # What is measured must not depend on the process, nor on how long was trained.
    batches = batches_of(data)
    batches.set_epoch(5)
    images, labels = (torch.cat(parts) for parts in zip(*batches.whole(), strict=True))
    monkeypatch.undo()
    expected, numbers = collected(batches_of(data), 0)
    assert torch.equal(labels, numbers)
    assert torch.equal(images, expected)
    assert len(collected(batches, 5)[1]) == 41


def test_moving_to_a_device_leaves_the_data_alone() -> None:
    data = labelled(8)
    batches = batches_of(data)
    batches.to(torch.device("meta"))
    assert data.images.device.type == "cpu"
    assert batches.data.images.device.type == "meta"


def test_a_batch_has_at_least_one_image() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TrainBatches(labelled(4), 0, MEAN, STD)


def test_mean_and_std_have_three_channels() -> None:
    with pytest.raises(ValueError, match="three numbers each"):
        TrainBatches(labelled(4), 2, MEAN, STD[:2])


def test_validation_is_off_during_training(data: SearchData, tmp_path: Path) -> None:
    evaluator = supernet_evaluator(
        data, 1, batch_size=8, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    train(DartsSpace(10, 4, 2), evaluator)
    assert set(evaluator.trainer.callback_metrics) == {"train_loss"}


def test_validation_can_be_switched_on(data: SearchData, tmp_path: Path) -> None:
    evaluator = supernet_evaluator(
        data,
        1,
        batch_size=8,
        limit_val_batches=1.0,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **QUIET,
    )
    train(DartsSpace(10, 4, 2), evaluator)
    metrics = evaluator.trainer.callback_metrics
    assert metrics["val_loss"] > 0
    assert 0 <= metrics["val_top1"] <= 1
