"""A whole search, and all that reads its folder, on a device without float64, such as Apple's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch.utils.data import TensorDataset

from genas_plugins import devices
from genas_plugins.cli import main
from genas_plugins.correlation import Setting
from genas_plugins.correlation.run import measure_all
from genas_plugins.experiment.config import parse
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.scoring import CombinedScore
from genas_plugins.spaces import NasBench201Architecture
from nni_strategy import GeNAS, NasBench201Space
from nni_strategy.run import run_experiment

ARCHITECTURE = "|nor_conv_3x3~0|+|avg_pool_3x3~0|skip_connect~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"


@pytest.fixture(scope="module")
def searched(
    tiny: Callable[..., dict[str, Any]],
    without_float64: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of the tiny search."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    with without_float64() as trap:
        run_experiment(parse(tiny()), folder)
    assert trap.made
    return folder


def test_a_search_finds_what_it_finds_where_there_is_float64(searched: Path, finished: Any, folder_at: Any) -> None:
    folder_at(searched).assert_same(finished)


def test_a_race_with_accuracy(
    tiny: Callable[..., dict[str, Any]], without_float64: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {"score": {"metric": "accuracy+flatness", "batch_size": 16}, "search": {"racing": 0.9}}
    experiment = parse(tiny(data={"validation_images": 256}, training={"epochs": 1}, **changes))
    expected = run_experiment(experiment, tmp_path / "with").best
    with without_float64():
        found = run_experiment(experiment, tmp_path / "without").best
    assert [best.record.score for best in found] == [best.record.score for best in expected]


def test_score(searched: Path, without_float64: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    for metric in ("angle+flatness", "angle+accuracy"):
        command = ["score", ARCHITECTURE, "--run", str(searched), "--metric", metric]
        assert main(command) == 0
        expected = capsys.readouterr().out
        with without_float64():
            assert main(command) == 0
        assert capsys.readouterr().out == expected and "angle / pi" in expected


def test_what_correlate_measures(searched: Path, without_float64: Callable[..., Any], tmp_path: Path) -> None:
    settings = [
        Setting(name="a", score=CombinedScore(metric="angle+flatness")),
        Setting(name="b", score=CombinedScore(noise="hessian"), images=32),
    ]
    scorer = Scorer.from_run(searched)
    # Two batches for what needs no training.
    assert scorer.recalibration.halve()
    architectures = [NasBench201Architecture.from_index(index) for index in (700, 9000, 15000)]
    expected = measure_all(scorer, architectures, settings, tmp_path / "with", training_free=True)
    with without_float64():
        found = measure_all(scorer, architectures, settings, tmp_path / "without", training_free=True)
    for one, other in zip(found, expected, strict=True):
        free, wanted = one.pop("training_free"), other.pop("training_free")
        # LAPACK's last digit depends on where the memory lies; None stands for minus infinity.
        assert free == {name: value and pytest.approx(value, rel=1e-12) for name, value in wanted.items()}
        assert one == other


def test_a_training_in_float64_is_refused_before_it_begins(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    with pytest.raises(ValueError, match=r"of float64, which cpu does not have: .*training\.precision: 32-true"):
        run_experiment(parse(tiny(training={"precision": "64-true"})), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_users_own_training_in_float64_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = TensorDataset(torch.rand(16, 3, 8, 8), torch.arange(16) % 4)
    loaders = {f"{name}_dataloaders": DataLoader(images, batch_size=8) for name in ("train", "val")}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = {"precision": "64-true", "accelerator": "cpu", "default_root_dir": tmp_path, **quiet}
    evaluator = Classification(**loaders, num_classes=4, max_epochs=1, **trainer)
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    steps = []
    monkeypatch.setattr(evaluator.module, "training_step", lambda *batch: steps.append(batch))
    space = NasBench201Space(num_classes=4, init_channels=4, cells_per_stage=1)
    with pytest.raises(ValueError, match="of float64, which cpu does not have"):
        GeNAS(recalibration_images=8)(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    assert not steps
