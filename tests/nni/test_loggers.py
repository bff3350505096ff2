"""Loggers of a run and of users: what they are told, once each, and what cannot be logged with."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning.loggers as lightning
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import TensorDataset

from genas_plugins.cli import main
from genas_plugins.experiment.config import ConfigError, parse
from genas_plugins.experiment.scorer import Scorer
from nni_strategy import DartsSpace, GeNAS, NasBench201Space
from nni_strategy.loggers import RunLog
from nni_strategy.run import run_experiment

PICTURES = {"pictures/search", "pictures/loss_curves"}


def expected(records: list[dict[str, Any]], generation: int) -> dict[str, float]:
    """The figures of a generation, from the lines of the history."""
    scores = [record["score"] for record in records if record["generation"] == generation]
    best = max(record["score"] for record in records if record["generation"] <= generation)
    shares = [record["shares"]["slope"] for record in records if record["generation"] == generation]
    quartiles = np.percentile(scores, (25, 50, 75))
    names = ("first_quartile", "median", "third_quartile")
    return {
        "search/generation": generation,
        "search/best": best,
        "search/generation_best": max(scores),
        "search/mean": float(np.mean(scores)),
        **{f"search/{name}": float(value) for name, value in zip(names, quartiles, strict=True)},
        "search/slope_share": float(np.mean(shares)),
        "search/scored": len(scores),
        "search/failed": 0,
        "search/dropped": 0,
    }


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class Interrupted:
    """Runs that end in the middle of the second generation, and go on."""

    def __init__(self, tiny: Callable[..., dict[str, Any]], folder: Path) -> None:
        self.tiny, self.folder = tiny, folder

    def __call__(self, logger: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
        experiment = parse(self.tiny(training={"logger": logger}, **given))
        measure, left = Scorer.measure, [7]

        def measured(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return measure(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "measure", measured)
            with pytest.raises(KeyboardInterrupt):
                run_experiment(experiment, self.folder)
        run_experiment(experiment, self.folder, resume=True)
        # A third process has nothing more to say.
        run_experiment(experiment, self.folder, resume=True)


@pytest.fixture
def interrupted(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Interrupted:
    return Interrupted(tiny, tmp_path / "run")


def test_a_run_has_lightning_s_csv_with_the_generations(finished: Any) -> None:
    found = rows(finished.path / "training" / "version_0" / "metrics.csv")
    training, search = [row for row in found if "train_loss" in row], [row for row in found if "search/mean" in row]
    assert len(training) == 4 and len(training) + len(search) == len(found)
    for generation, row in enumerate(search):
        assert row == pytest.approx({**expected(finished.records, generation), "step": generation}, rel=1e-12)
    assert len(search) == 2


def test_csv_of_a_run_that_goes_on(
    interrupted: Interrupted, finished: Any, folder_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted("csv", monkeypatch)
    files = sorted((interrupted.folder / "training").glob("*/metrics.csv"))
    told = [[row["search/generation"] for row in rows(path) if "search/mean" in row] for path in files]
    # Lightning begins a new file in each process.
    assert told == [[0], [1]]
    folder_at(interrupted.folder).assert_same(finished)


def test_tensorboard(interrupted: Interrupted, finished: Any, folder_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted("tensorboard", monkeypatch)
    folder_at(interrupted.folder).assert_same(finished)
    board = EventAccumulator(str(interrupted.folder / "training" / "tensorboard"), {"images": 0, "scalars": 0})
    board.Reload()
    for name in expected(finished.records, 0):
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [
            (generation, pytest.approx(expected(finished.records, generation)[name], rel=1e-6)) for generation in (0, 1)
        ]
    assert [event.step for event in board.Scalars("train_loss")] == [1, 3, 5, 7]
    assert set(board.Tags()["images"]) == PICTURES
    (picture,) = board.Images("pictures/search")
    assert (picture.step, picture.width > 500, picture.encoded_image_string[1:4]) == (2, True, b"PNG")
    hparams = (interrupted.folder / "training" / "tensorboard" / "hparams.yaml").read_text()
    assert "logger: tensorboard" in hparams


class Calls:
    """Stand-ins with the calls of Weights & Biases and of MLflow that Lightning and we make."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.metrics: list[tuple[Any, dict[str, float]]] = []
        self.pictures: list[tuple[str, str]] = []
        self.settings: list[Any] = []
        self.ends: list[Any] = []
        self.axes: set[tuple[str, str | None]] = set()

    def wandb(self) -> dict[str, ModuleType]:
        package, sdk, library, run = map(ModuleType, ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"))
        calls = self

        class Run:
            def __init__(self, **settings: Any) -> None:
                self.config = SimpleNamespace(update=lambda told, **_: calls.settings.append(told))
                calls.begun.append(settings)

            def define_metric(self, name: str, step_metric: str | None = None, **_: Any) -> None:
                calls.axes.add((name, step_metric))

            def log(self, told: dict[str, Any]) -> None:
                shown = {key: value for key, value in told.items() if key.startswith("pictures/")}
                calls.pictures += [(key, Path(image).name) for key, images in shown.items() for image in images]
                if not shown:
                    calls.metrics.append((told.get("search/generation", told.get("trainer/global_step")), told))

            def finish(self, exit_code: int) -> None:
                calls.ends.append(exit_code)

        package.Error = type("Error", (Exception,), {})
        package.run, package.init, package.Image = None, Run, lambda path: path
        run.Run, library.RunDisabled = Run, type("RunDisabled", (), {})
        return {"wandb": package, "wandb.sdk": sdk, "wandb.sdk.lib": library, "wandb.wandb_run": run}

    def mlflow(self) -> dict[str, ModuleType]:
        names = ("mlflow", "mlflow.tracking", "mlflow.entities", "mlflow.utils", "mlflow.utils.mlflow_tags")
        names += ("mlflow.tracking.context", "mlflow.tracking.context.registry")
        modules = {name: ModuleType(name) for name in names}
        calls = self

        class MlflowClient:
            def __init__(self, uri: str) -> None:
                self.uri = uri

            def get_experiment_by_name(self, name: str) -> None:
                return None

            def create_experiment(self, name: str, artifact_location: str | None) -> str:
                calls.begun.append({"project": name, "uri": self.uri, "artifacts": artifact_location})
                return "1"

            def create_run(self, experiment_id: str, tags: dict[str, str]) -> Any:
                calls.begun[-1] |= {"name": tags["mlflow.runName"], "id": "one"}
                return self.get_run("one")

            def get_run(self, number: str) -> Any:
                assert number == "one"
                return SimpleNamespace(info=SimpleNamespace(run_id=number, experiment_id="1"))

            def update_run(self, number: str, status: str) -> None:
                calls.ends.append(status)

            def set_terminated(self, number: str, status: str) -> None:
                calls.ends.append(status)

            def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
                calls.metrics += [(metric["step"], {metric["key"]: metric["value"]}) for metric in metrics]
                calls.settings += [{param["key"]: param["value"]} for param in params]

            def log_artifact(self, run_id: str, path: str, folder: str) -> None:
                calls.pictures.append((f"{folder}/{Path(path).stem}", Path(path).name))

        modules["mlflow"].set_tracking_uri = lambda uri: None
        modules["mlflow"].MlflowException = type("MlflowException", (Exception,), {})
        modules["mlflow.tracking"].MlflowClient = MlflowClient
        modules["mlflow.entities"].Metric = modules["mlflow.entities"].Param = dict
        modules["mlflow.utils.mlflow_tags"].MLFLOW_RUN_NAME = "mlflow.runName"
        modules["mlflow.tracking.context.registry"].resolve_tags = dict
        return modules


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    made = Calls()
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, module in {**made.wandb(), **made.mlflow()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightning.wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setattr(lightning.mlflow, "_MLFLOW_AVAILABLE", True)
    yield made


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_stand_in_is_told_once(
    logger: str, calls: Calls, interrupted: Interrupted, finished: Any, folder_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(logger, monkeypatch)
    folder_at(interrupted.folder).assert_same(finished)
    found: dict[int, dict[str, float]] = {0: {}, 1: {}}
    for step, told in calls.metrics:
        for key, value in told.items():
            if key.startswith("search/"):
                assert key not in found[step], "told twice"
                found[step][key] = value
    for generation in (0, 1):
        assert found[generation] == pytest.approx(expected(finished.records, generation), rel=1e-12)
    assert sum("train_loss" in told for _, told in calls.metrics) == 4
    assert {name for name, _ in calls.pictures} == PICTURES and len(calls.pictures) == 2
    # One log for all three processes.
    if logger == "wandb":
        assert len({begun["id"] for begun in calls.begun}) == 1 and len(calls.begun) == 3
        assert {(begun["project"], begun["name"], begun["resume"]) for begun in calls.begun} == {
            ("genas", "run", "allow")
        }
        assert ("search/*", "search/generation") in calls.axes
        assert calls.ends == [1, 0, 0]
        assert [told["training"]["logger"] for told in calls.settings] == ["wandb"]
    else:
        (begun,) = calls.begun
        assert (begun["project"], begun["name"]) == ("genas", "run")
        assert begun["uri"] == f"sqlite:///{interrupted.folder / 'mlflow.db'}"
        assert begun["artifacts"] == (interrupted.folder / "mlartifacts").as_uri()
        assert calls.ends[-1] == "FINISHED" and "FAILED" in calls.ends and calls.ends.count("RUNNING") == 2
        assert {"training/logger": "mlflow"} in calls.settings


def test_weights_and_biases_itself_offline(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": "", "PROJECT": "genas"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    run_experiment(parse(tiny(training={"logger": "wandb"})), tmp_path / "run")
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert json.loads((tmp_path / "run" / "training" / "log.json").read_text())["wandb"]["id"] in log.name
    told = log.read_bytes()
    assert all(name.encode() in told for name in ("search/median", "search/slope_share", "train_loss"))
    shown = {path.name.rpartition("_")[0].rpartition("_")[0] for path in run.glob("files/media/images/pictures/*.png")}
    assert shown == {"search", "loss_curves"}


def test_mlflow_itself(
    tiny: Callable[..., dict[str, Any]], finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow without its database")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_experiment(parse(tiny(training={"logger": "mlflow"})), tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    number = json.loads((tmp_path / "run" / "training" / "log.json").read_text())["mlflow"]["id"]
    assert client.get_run(number).info.status == "FINISHED"
    for name, value in expected(finished.records, 1).items():
        found = {metric.step: metric.value for metric in client.get_metric_history(number, name)}
        assert found.keys() == {0, 1} and found[1] == pytest.approx(value, rel=1e-12)
    assert {Path(each.path).stem for each in client.list_artifacts(number, "pictures")} == {"search", "loss_curves"}


@pytest.mark.parametrize("logger", ["comet", "TensorBoard", "", None, True, ["csv"]])
def test_an_unknown_logger_is_refused(logger: Any) -> None:
    with pytest.raises(ConfigError, match=r"^training\.logger must be one of csv, tensorboard, wandb, mlflow, got "):
        parse({"training": {"logger": logger}})


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_is_refused_before_anything_is_done(
    logger: str, genas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, logger, None)
    folder = tmp_path / "run"
    command = ["search", "--config", str(genas.config), "--set", f"training.logger={logger}", "--quiet"]
    assert main([*command, "--output", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"genas: {logger} is needed for training.logger: {logger} but is not installed: pip install {logger}.\n"
    )
    assert not folder.exists() or not [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(("logger", "advice"), [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI")])
def test_a_log_that_cannot_begin_is_a_sentence_and_no_run(
    logger: str,
    advice: str,
    calls: Calls,
    tiny: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules[logger]
    error = module.Error if logger == "wandb" else module.MlflowException

    def refused(*arguments: Any, **keywords: Any) -> Any:
        raise error("No API key configured.\nUse `wandb login` to log in.")

    if logger == "wandb":
        monkeypatch.setattr(module, "init", refused)
    else:
        monkeypatch.setattr(sys.modules["mlflow.tracking"].MlflowClient, "create_experiment", refused)
    with pytest.raises(ConfigError) as raised:
        run_experiment(parse(tiny(training={"logger": logger})), tmp_path / "run")
    told = str(raised.value)
    assert told.startswith(
        f"training.logger: {logger} cannot begin: No API key configured. Use `wandb login` to log in."
    )
    assert advice in told and "\n" not in told
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"csv": 3}'])
def test_a_damaged_note_of_what_was_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "log.json").write_text(content)
    with pytest.raises(ConfigError, match=r"log\.json is damaged .*: remove it, and a new log is told of all"):
        RunLog("csv", tmp_path, True)


def test_another_logger_may_go_on_and_is_told_all(
    tiny: Callable[..., dict[str, Any]], finished: Any, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    run_experiment(parse(tiny(training={"logger": "tensorboard"})), folder, resume=True)
    board = EventAccumulator(str(folder / "training" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("search/median")] == [0, 1]


class Noted(Logger):
    """A user's own logger."""

    name, version = "noted", 0

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told.append((step, dict(metrics)))

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None: ...


def searched(strategy: GeNAS, loggers: Any, tmp_path: Path, space: Any = None) -> None:
    images = TensorDataset(torch.rand(16, 3, 8, 8), torch.arange(16) % 4)
    loader = DataLoader(images, batch_size=8)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    evaluator = Classification(
        train_dataloaders=loader,
        val_dataloaders=loader,
        num_classes=4,
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=loggers,
        **quiet,
    )
    space = space or NasBench201Space(num_classes=4, init_channels=4, cells_per_stage=1)
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())


def test_a_users_own_loggers_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loggers = [Noted(), TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    strategy = GeNAS(population=4, generations=2, recalibration_images=8)
    space = DartsSpace(num_classes=4, init_channels=4, num_cells=3)
    searched(strategy, loggers, tmp_path, space)
    records = [record.to_dict() for record in strategy.records]
    wanted = [(generation, pytest.approx(expected(records, generation), rel=1e-12)) for generation in (0, 1)]
    assert [(step, told) for step, told in loggers[0].told if "search/mean" in told] == wanted
    table = rows(tmp_path / "table" / "version_0" / "metrics.csv")
    assert [row["search/best"] for row in table if "search/best" in row] == [
        told["search/best"] for _, told in loggers[0].told[-2:]
    ]
    board = EventAccumulator(str(tmp_path / "board" / "version_0"))
    board.Reload()
    assert set(board.Tags()["images"]) == {"pictures/search", "pictures/cells"}
    assert [event.step for event in board.Scalars("search/slope_share")] == [0, 1]


def test_no_logger_is_no_hindrance(tmp_path: Path) -> None:
    strategy = GeNAS(population=2, generations=1, recalibration_images=8)
    searched(strategy, False, tmp_path)
    assert len(strategy.records) == 2 and not list(tmp_path.iterdir())
