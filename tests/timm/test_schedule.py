"""The learning rate that the optimizer has in each of the paper's 250 epochs, against the official rule in fractions.

The rule is that of ``adjust_lr`` and ``main`` in retrain_architecture/retrain.py of clovaai/GeNAS@fd3cba8.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import Tensor, nn

from genas_plugins.files import packaged_configs
from timm_models.schedule import LinearTailLRScheduler
from timm_models.train import main

PEAK, EPOCHS, TAIL, WARMUP = Fraction(1, 2), 250, 5, 5

# Worked out by hand: 0.5 (245 - t) / 245 for most; a fifth of it, two fifths ... in the first five epochs; and
# 0.5 (250 - t) / 1225 in the last five.
BY_HAND = {
    0: 0.1,
    1: 0.19918367346938776,
    2: 0.29755102040816327,
    3: 0.39510204081632655,
    4: 0.49183673469387756,
    5: 0.48979591836734693,
    6: 0.4877551020408163,
    100: 0.29591836734693877,
    244: 0.0020408163265306124,
    245: 0.0020408163265306124,
    246: 0.0016326530612244899,
    247: 0.0012244897959183673,
    248: 0.0008163265306122449,
    249: 0.00040816326530612246,
}


def official(epoch: int) -> Fraction:
    """Learning rate of an epoch, counted from 0, without rounding."""
    if EPOCHS - epoch > 5:
        rate = PEAK * Fraction(EPOCHS - 5 - epoch, EPOCHS - 5)
    else:
        rate = PEAK * Fraction(EPOCHS - epoch, (EPOCHS - 5) * 5)
    if epoch < 5:
        rate *= Fraction(epoch + 1, 5)
    return rate


CURVE = [float(official(epoch)) for epoch in range(EPOCHS)]


class Pixels(nn.Module):
    """A linear classifier of pixels with a second one as auxiliary head: 250 epochs of it take seconds."""

    num_classes = 2

    def __init__(self, auxiliary: bool) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, 2)
        self.auxiliary_head = nn.Linear(3, 2) if auxiliary else None

    def forward(self, x: Tensor) -> Any:
        pixels = x.mean((2, 3))
        if self.auxiliary_head is None or not self.training:
            return self.classifier(pixels)
        return self.classifier(pixels), self.auxiliary_head(pixels)


def test_the_fractions_are_those_worked_out_by_hand() -> None:
    assert {epoch: CURVE[epoch] for epoch in BY_HAND} == pytest.approx(BY_HAND, rel=1e-15)


def test_every_epoch_of_a_real_training_with_the_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        for name, value in (("dark", 20), ("light", 220)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / split / name / "0.png")
    built: list[str] = []
    rates: list[float] = []
    step = torch.optim.SGD.step

    def create(name: str, auxiliary: bool, **arguments: Any) -> nn.Module:
        built.append(name)
        return Pixels(auxiliary)

    def watched(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return step(optimizer, *arguments)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    # What cannot be had here; the schedule is as it is shipped.
    small = ["--num-classes", "2", "--img-size", "4", "--batch-size", "1", "--global-batch-size", "1"]
    small += ["--workers", "0", "--device", "cpu", "--no-tensorboard"]
    places = ["--data-dir", str(tmp_path), "--output", str(tmp_path), "--experiment", "run"]
    assert main(["--config", "genas_flatness_c100_imagenet", *small, *places]) == 0
    assert built == ["genas_flatness_c100"]
    # Two steps an epoch, both with the rate of the epoch.
    assert len(rates) == 2 * EPOCHS
    assert rates[::2] == pytest.approx(CURVE, rel=1e-12, abs=0)
    assert rates[1::2] == rates[::2]
    with (tmp_path / "run" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(EPOCHS))
    assert [float(row["lr"]) for row in rows] == pytest.approx(CURVE, rel=1e-12, abs=0)


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def run(scheduler: LinearTailLRScheduler, epochs: int) -> list[list[float]]:
    found = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
    return found


def test_groups_keep_their_proportions() -> None:
    found = run(LinearTailLRScheduler(optimizer(0.5, 0.05), EPOCHS), EPOCHS)
    assert [rates[0] for rates in found] == pytest.approx(CURVE, rel=1e-12, abs=0)
    assert [rates[1] for rates in found] == pytest.approx([rate / 10 for rate in CURVE], rel=1e-12, abs=0)


def test_a_short_curve_by_hand() -> None:
    # 6 epochs, tail 2, warm-up 3, peak 12: (4 - t) / 4 before the tail, (6 - t) / 8 in it.
    scheduler = LinearTailLRScheduler(optimizer(12.0), epochs=6, tail=2, warmup=3)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(4.0)
    assert [rate for (rate,) in run(scheduler, 6)] == pytest.approx([4.0, 6.0, 6.0, 3.0, 3.0, 1.5])


def test_without_warm_up_the_first_epoch_has_the_highest_rate() -> None:
    assert run(LinearTailLRScheduler(optimizer(0.3), 10, tail=1, warmup=0), 1) == [[0.3]]


def test_a_warm_up_that_reaches_into_the_tail() -> None:
    # 4 epochs, tail 2, warm-up 4, peak 1: (1, 1/2, 1/2, 1/4) times (1/4, 2/4, 3/4, 1).
    scheduler = LinearTailLRScheduler(optimizer(1.0), epochs=4, tail=2, warmup=4)
    assert [rate for (rate,) in run(scheduler, 4)] == pytest.approx([0.25, 0.25, 0.375, 0.25])


def test_it_has_no_memory() -> None:
    # A resumed run asks for an epoch without those before it.
    for epoch in (0, 3, 120, 245, 249):
        scheduler = LinearTailLRScheduler(optimizer(0.5), EPOCHS)
        scheduler.step(epoch)
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(CURVE[epoch], rel=1e-12, abs=0)


def test_beyond_the_last_epoch_nothing_is_learnt() -> None:
    scheduler = LinearTailLRScheduler(optimizer(0.5), EPOCHS)
    for epoch in (250, 251, 1000):
        scheduler.step(epoch)
        assert scheduler.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("epochs", "tail", "warmup"), [(250, 0, 5), (250, 250, 5), (250, 300, 5), (5, 5, 0), (250, -1, 5), (250, 5, -1)]
)
def test_refused(epochs: int, tail: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="tail" if warmup >= 0 else "warmup"):
        LinearTailLRScheduler(optimizer(0.5), epochs, tail, warmup)


@pytest.mark.parametrize("name", [name for name in packaged_configs("timm") if name.endswith("_imagenet")])
def test_what_timms_own_script_makes_of_the_configuration(name: str) -> None:
    """It reads the same file without the section; its nearest curve is within 1 % of the highest rate."""
    keys = yaml.safe_load(packaged_configs("timm")[name].read_text())
    keys.pop("genas")
    scheduler, epochs = create_scheduler_v2(optimizer(keys["lr"]), **scheduler_kwargs(Namespace(**keys)))
    assert epochs == EPOCHS
    # As the script does: a step after each epoch, for the next.
    found = []
    for epoch in range(epochs):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    deviation = [abs(rate - wanted) / 0.5 for rate, wanted in zip(found, CURVE, strict=True)]
    # In the fourth epoch, where the official warm-up multiplies a rate that falls already: 0.4 instead of 0.3951.
    assert max(deviation) == deviation[3] == pytest.approx(0.4 * 3 / 245 / 0.5, rel=1e-9)
    assert max(deviation) < 0.0098
    assert max(deviation[4:]) < 0.0025
    # And the area under the curve is the same to three thousandths.
    assert sum(found) == pytest.approx(sum(CURVE), rel=3e-3)
