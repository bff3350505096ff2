"""GeNAS measures what the evaluator trains: batches of any form, transferred by its hooks, checked before training."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Classification, Lightning, LightningModule, Regression, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import NasBench201
from nni.nas.space import RawFormatModelSpace
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from genas_plugins.experiment.parts import check_loss, find_parts
from genas_plugins.scoring import recalibrate_batchnorm
from nni_strategy import DartsSpace, GeNAS, NasBench201Space
from nni_strategy.batches import EvaluatorBatches

SETTINGS: dict[str, Any] = {"population": 3, "generations": 1, "parents": 2, "mutants": 1, "crossovers": 1}
SETTINGS["recalibration_images"] = 24
IMAGES = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 10
RAW = (IMAGES * 255).round()
NORMALISED = (RAW / 255 - 0.3) / 0.3
Pair = namedtuple("Pair", "pictures kinds")


class Module(LightningModule):
    """A user's module that trains on pairs, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class After(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() / 255 - 0.3) / 0.3, batch[1]


class Before(Module):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() / 255 - 0.3) / 0.3, batch[1]


class Transfer(Module):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return (batch[0].to(device).float() / 255 - 0.3) / 0.3, batch[1].to(device)


class Images(pl.LightningDataModule):
    """Data that is there after ``setup`` only, and normalised by the data module."""

    def setup(self, stage: str) -> None:
        self.images = TensorDataset(RAW, LABELS)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 16)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] / 255 - 0.3) / 0.3, batch[1]


class Of(Dataset):
    """Items made of an image and a label."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(NORMALISED)

    def __getitem__(self, index: int) -> Any:
        return self.make(NORMALISED[index], LABELS[index])


def loader(images: Tensor = NORMALISED, labels: Tensor = LABELS, size: int = 16, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), size, **options)


def trainer(folder: Path, **changes: Any) -> Any:
    quiet = ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing")
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **dict.fromkeys(quiet, False),
        **changes,
    )


def search(
    folder: Path,
    module: Module,
    training: Any,
    validation: Any = None,
    *,
    space: Any = None,
    data: Any = None,
    **changes: Any,
) -> GeNAS:
    """Train, search, and give the strategy."""
    loaders = {} if data else {"train_dataloaders": training, "val_dataloaders": validation or training}
    torch.manual_seed(0)
    # A quarter of the modules of one of DARTS.
    made = NasBench201Space(10, 4, 1) if space is None else space()
    strategy = GeNAS(**{**SETTINGS, **changes})
    evaluator = Lightning(module, trainer(folder), datamodule=data, **loaders)
    strategy(RawFormatModelSpace(made, evaluator), SequentialExecutionEngine())
    return strategy


@pytest.fixture
def searched(tmp_path: Path) -> Callable[..., GeNAS]:
    """Trains and searches, and gives the strategy."""
    return partial(search, tmp_path)


def losses(strategy: GeNAS) -> list[list[float]]:
    return [record["losses"] for record in strategy.records]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Of images that were normalised before."""
    return losses(search(tmp_path_factory.mktemp("wanted"), Module(), loader()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("module", [After, Before, Transfer])
def test_hooks_of_the_module_are_on_the_way(
    module: type[Module], dtype: torch.dtype, searched: Callable[..., GeNAS], wanted: list[list[float]]
) -> None:
    assert losses(searched(module(), loader(RAW.to(dtype)))) == wanted


def test_hooks_of_the_data_module_are_on_the_way(searched: Callable[..., GeNAS], wanted: list[list[float]]) -> None:
    assert losses(searched(Module(), None, data=Images())) == wanted
    # Without them the losses are others, by far more than rounding.
    raw = losses(searched(Module(), loader(RAW)))
    assert not np.allclose(raw, wanted, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda image, label: {"image": image, "label": label}, None),
        (lambda image, label: {"pixel_values": image, "Labels": label, "weight": 1.0}, None),
        (lambda image, label: {"a": image, "b": label}, ("a", "b")),
        (Pair, None),
        (Pair, ("pictures", "kinds")),
        (lambda image, label: [image, label, 7], None),
        (lambda image, label: (7, label, image), (2, 1)),
        (lambda image, label: ((image, 0.5), {"y": label}), lambda batch: (batch[0][0], batch[1]["y"])),
    ],
)
def test_batches_of_any_form(make: Any, parts: Any, searched: Callable[..., GeNAS], wanted: list[list[float]]) -> None:
    class Formed(Module):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(find_parts(batch, parts))

    found = searched(Formed(), DataLoader(Of(make), 16), batch_parts=parts)
    assert losses(found) == wanted


def test_several_validation_loaders_are_one_set(searched: Callable[..., GeNAS], wanted: list[list[float]]) -> None:
    numbers = []

    class Numbered(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            numbers.append(dataloader_idx)
            return batch

    parts = [loader(NORMALISED[:16], LABELS[:16]), loader(NORMALISED[16:], LABELS[16:])]
    assert losses(searched(Numbered(), loader(), parts)) == wanted
    assert set(numbers) == {0, 1}


def test_hooks_see_the_trainer_training_or_validating(searched: Callable[..., GeNAS]) -> None:
    seen = []

    class Asking(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append((self.trainer.training, self.trainer.validating, self.training))
            return batch

    searched(Asking(), loader())
    assert set(seen) == {(True, False, True), (False, True, False)}


class Drawing(Module):
    """Augments with all three global generators."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.rand(()) + np.random.rand() + random.random(), batch[1]


def test_looking_at_batches_leaves_no_trace(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(5)
    batches = loader(shuffle=True, generator=own)
    evaluator = Lightning(Drawing(), trainer(tmp_path), train_dataloaders=batches, val_dataloaders=loader(shuffle=True))
    source = EvaluatorBatches(evaluator, torch.device("cpu"), None, 3)
    torch.manual_seed(0)
    states = torch.get_rng_state(), own.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    for training in (True, False):
        first, second = (source.collect(training, 20) for _ in range(2))
        assert torch.equal(*(torch.cat([images for images, _ in pairs]) for pairs in (first, second)))
    with pytest.raises(ValueError, match="needs 49 images for recalibration"):
        source.collect(True, 49)
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], own.get_state())
    assert states[2:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert evaluator.module.training and evaluator.trainer.state.stage is None


class Stream(IterableDataset):
    """Images without a number."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(NORMALISED, LABELS, strict=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "recalibration": ({"recalibration_images": 850}, "needs 850 images for recalibration, .* gives 48"),
    "validation": ({"validation_images": 49}, "needs 49 images for validation, .* gives 48"),
    "a stream": (
        {"training": DataLoader(Stream(), 16), "recalibration_images": 49},
        "needs 49 images for recalibration, .* gives 48",
    ),
    "unknown keys": (
        {"training": DataLoader(Of(lambda image, label: {"a": image, "b": label}), 16)},
        "finds none of them in dict of a, b. Say where they are with batch_parts=",
    ),
    "two keys": (
        {"training": DataLoader(Of(lambda image, label: {"image": image, "x": image, "label": label}), 16)},
        r"finds several of them \(image, x\)",
    ),
    "wrong keys": ({"batch_parts": ("image", "label")}, "batch_parts names 'image', but a batch is list of 2"),
    "weights between": (
        {"training": DataLoader(TensorDataset(NORMALISED, torch.rand(48), LABELS), 16)},
        r"labels \(2,\) of float32: pass the loss that is meant",
    ),
    "several labels": ({"training": loader(labels=F.one_hot(LABELS, 10).float())}, r"labels \(2, 10\) of float32"),
    "numbers": ({"training": loader(labels=torch.rand(48, 1))}, r"labels \(2, 1\) of float32"),
    "bytes": ({"training": loader(RAW.to(torch.uint8))}, r"uint8 \(3, 8, 8\).* do it in on_after_batch_transfer"),
    "fewer classes": ({"space": lambda: DartsSpace(5, 4, 2)}, "label 5, and the network has 5 classes"),
    "fewer classes in another space": (
        {"space": lambda: NasBench201(4, 1, 5)},
        "label 5, and the network has 5 classes",
    ),
    "no labels": ({"validation": loader(labels=torch.full((48,), -100))}, "No image has a label"),
    "one class": ({"space": lambda: DartsSpace(1, 4, 2)}, "the network has 1 output"),
    "a race of sorted images": (
        {"validation": loader(NORMALISED.repeat(10, 1, 1, 1), LABELS.repeat(10).sort()[0]), "racing": 0.99},
        "order",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_training(case: str, searched: Callable[..., GeNAS]) -> None:
    changes, message = REFUSED[case]
    changes = dict(changes)
    module = Module()
    with pytest.raises((ValueError, TypeError), match=message):
        searched(module, changes.pop("training", loader()), changes.pop("validation", None), **changes)
    assert module.steps == 0


@pytest.mark.parametrize("images", [33, 65])
def test_a_last_batch_of_one_image_of_one_pixel_is_refused_before_the_training(
    images: int, searched: Callable[..., GeNAS]
) -> None:
    def given(**options: Any) -> DataLoader:
        return loader(torch.rand(images, 3, 32, 32), torch.arange(images) % 10, 32, **options)

    module = Module()
    with pytest.raises(ValueError, match="The training loader has a batch of one image"):
        searched(module, given(), space=lambda: DartsSpace(10, 4, 2, "imagenet"))
    assert module.steps == 0
    # Without it, or where features are larger, there is nothing to refuse.
    searched(module, given(drop_last=True), space=lambda: DartsSpace(10, 4, 2, "imagenet"))
    searched(Module(), loader(NORMALISED[:33], LABELS[:33]))


def test_a_regression_is_refused_or_measured_by_its_own_loss(tmp_path: Path) -> None:
    targets = torch.rand(48, 2, generator=torch.Generator().manual_seed(1))

    def search(**changes: Any) -> GeNAS:
        given = loader(labels=targets)
        options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        evaluator = Regression(train_dataloaders=given, val_dataloaders=given, **options)
        torch.manual_seed(0)
        strategy = GeNAS(**{**SETTINGS, **changes}, sigmas=(1e-7, 2e-7))
        strategy(RawFormatModelSpace(DartsSpace(2, 4, 2), evaluator), SequentialExecutionEngine())
        return strategy

    with pytest.raises(ValueError, match=r"trains by MSELoss, .* loss=torch.nn.MSELoss\(\)"):
        search()
    strategy = search(loss=F.mse_loss)
    for record in strategy.records:
        candidate = strategy.paths.search_space.from_json(record["candidate"])
        network = strategy.supernet.subnet(candidate)
        recalibrate_batchnorm(network, [(NORMALISED[:16], None), (NORMALISED[16:24], None)])
        expected = F.mse_loss(network.eval()(NORMALISED), targets).item()
        assert record["losses"] == pytest.approx([expected] * 2, rel=1e-3)


def test_a_race_takes_a_loss_of_each_image(searched: Callable[..., GeNAS]) -> None:
    many, targets = NORMALISED.repeat(6, 1, 1, 1), torch.rand(288, 10, generator=torch.Generator().manual_seed(1))

    class Several(Module):
        def loss(self, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.model(batch[0]), batch[1])

    found = {}
    for racing in (None, 0.9):
        changes = {"population": 6, "racing": racing, "loss": nn.BCEWithLogitsLoss()}
        found[racing] = searched(Several(), loader(many, targets), **changes)
    best = [found[racing].evolution.best(2) for racing in found]
    assert best[0] == best[1]
    assert {record["status"] for record in found[None].records} == {"ok"}


def test_a_race_counts_the_images_that_have_a_label(searched: Callable[..., GeNAS]) -> None:
    generator = torch.Generator().manual_seed(2)
    many, labels = torch.rand(480, 3, 8, 8, generator=generator), torch.randint(10, (480,), generator=generator)
    marked = labels.clone()
    marked[::4] = 255
    known = marked != 255

    class Marked(Module):
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1], ignore_index=255)

    whole = searched(Marked(), loader(), loader(many, marked), racing=0.9)
    alone = searched(Marked(), loader(), loader(many[known], marked[known], 12), racing=0.9)
    assert [r["status"] for r in whole.records] == [r["status"] for r in alone.records]
    for found, expected in zip(whole.records, alone.records, strict=True):
        assert found.get("images") == expected.get("images")
        assert found.get("losses", []) == pytest.approx(expected.get("losses", []), rel=1e-5)
    assert any("losses" in record for record in whole.records)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, partial(nn.CrossEntropyLoss, label_smoothing=0.1)])
def test_losses_of_classes_are_cross_entropy(criterion: Any) -> None:
    module = Module()
    module.criterion = criterion()
    check_loss(module, None)
    module.other = nn.MSELoss()
    check_loss(module, None)
    del module.criterion
    with pytest.raises(ValueError, match="Module trains by MSELoss"):
        check_loss(module, None)
    check_loss(module, F.mse_loss)


def test_a_step_without_the_number_of_the_batch(tmp_path: Path) -> None:
    class Short(Module):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(batch, 0)

        def validation_step(self, batch: Any) -> None:  # type: ignore[override]
            self.loss(batch)

    strategy = GeNAS(**SETTINGS)
    module = Short()
    evaluator = Lightning(module, trainer(tmp_path), train_dataloaders=loader(), val_dataloaders=loader())
    strategy(RawFormatModelSpace(DartsSpace(10, 4, 2), evaluator), SequentialExecutionEngine())
    assert module.steps == 3 and len(strategy.records) == 3


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_supernet_of_any_precision_is_scored_in_it(precision: str, tmp_path: Path) -> None:
    strategy = GeNAS(**SETTINGS, sigmas=(1e-7, 2e-7))
    given = {"train_dataloaders": loader(), "val_dataloaders": loader()}
    evaluator = Lightning(Module(), trainer(tmp_path, precision=precision), **given)
    torch.manual_seed(0)
    strategy(RawFormatModelSpace(DartsSpace(10, 4, 2), evaluator), SequentialExecutionEngine())
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {parameter.dtype for parameter in strategy.supernet.parameters()} == {dtype}
    record = strategy.records[0]
    network = strategy.supernet.subnet(strategy.paths.search_space.from_json(record["candidate"]))
    recalibrate_batchnorm(network, [(NORMALISED[:16], None), (NORMALISED[16:24], None)])
    exact = F.cross_entropy(network.eval()(NORMALISED.to(dtype)).double(), LABELS).item()
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 3e-2}.get(dtype, 1e-4)
    assert record["losses"] == pytest.approx([exact] * 2, rel=tolerance)


def test_classification_of_nni_is_searched_as_it_is(tmp_path: Path) -> None:
    given = {"train_dataloaders": loader(), "val_dataloaders": loader()}
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    evaluator = Classification(num_classes=10, **given, **options)
    strategy = GeNAS(**SETTINGS)
    strategy(RawFormatModelSpace(NasBench201(4, 1, 10), evaluator), SequentialExecutionEngine())
    assert all(record["status"] == "ok" for record in strategy.records)
