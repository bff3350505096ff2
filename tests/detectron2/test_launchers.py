"""The launchers: training, evaluation, resuming after a kill, and what they refuse, with yacs and LazyConfig."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins import Genotype
from genas_plugins.checkpoints import convert_network
from genas_plugins.files import packaged_configs

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from detectron2_backbones import _launch, lazy_train_net, train_net
from detectron2_backbones._launch import available_device, check_classes, register_datasets

pytestmark = pytest.mark.detectron2

NAME = "genas_flatness_c100"
QUIETLY = "import warnings; warnings.simplefilter('ignore')\n"
YACS = """
    MODEL.GENAS.INIT_CHANNELS 2 MODEL.FPN.OUT_CHANNELS 8 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 6 SOLVER.STEPS () SOLVER.CHECKPOINT_PERIOD 2 DATALOADER.NUM_WORKERS 0 SEED 1
    MODEL.RETINANET.SCORE_THRESH_TEST 0.0
"""
BOTTOM_UP = "model.backbone.bottom_up"
LAZY = """
    model.backbone.bottom_up.init_channels=2 model.backbone.top_block.in_channels=32 model.head.conv_dims=[8]
    dataloader.train.mapper.augmentations.0.short_edge_length=[64] dataloader.train.total_batch_size=2
    dataloader.test.mapper.augmentations.0.short_edge_length=64 dataloader.train.num_workers=0
    dataloader.test.num_workers=0 train.max_iter=6 train.checkpointer.period=2 train.log_period=1 train.seed=1
    model.test_score_thresh=0.0
"""
# All kinds of operations, and a third of the tensors of a published network.
CODE = (4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0)
CODES = [" ".join(map(str, CODE)), ",".join(map(str, CODE))]
KINDS = {
    "yacs": ("train_net", f"retinanet_{NAME}_FPN_1x", [*YACS.split(), "MODEL.GENAS.ARCH", CODES[0]]),
    "lazy": ("lazy_train_net", f"retinanet_{NAME}_fpn_1x", [*LAZY.split(), f"{BOTTOM_UP}.arch=[{CODES[1]}]"]),
}
SETTINGS = {
    "yacs": {"output": "OUTPUT_DIR {}", "weights": "MODEL.WEIGHTS {}", "norm": "MODEL.GENAS.NORM {}"},
    "lazy": {
        "output": "train.output_dir={}",
        "weights": "train.init_checkpoint={}",
        "norm": "model.backbone.bottom_up.norm={}",
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, write_official: Callable[..., Any], genotype: Genotype) -> Path:
    """An ImageNet file, as ``genas convert`` writes it."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_official(folder / "official.pth.tar")
    convert_network(folder / "official.pth.tar", folder / "clean.safetensors", genotype)
    return folder / "clean.safetensors"


def arguments_of(kind: str, *flags: str, **settings: Any) -> list[str]:
    _, config, overrides = KINDS[kind]
    chosen = [part for name, value in settings.items() for part in SETTINGS[kind][name].format(value).split()]
    return [*flags, "--config-file", config, *overrides, *chosen]


def in_one_process(*runs: tuple[str, list[str]]) -> str:
    """The code of several runs of a kind with these arguments."""
    calls = [f"{KINDS[kind][0]}.main({arguments!r})" for kind, arguments in runs]
    return f"{QUIETLY}from detectron2_backbones import lazy_train_net, train_net\nprint([{', '.join(calls)}])"


@pytest.fixture(scope="module")
def launchers(start_warm: Callable[..., Any], tiny_coco: Path) -> Iterator[Any]:
    """A process that has imported both; Detectron2 asks where its data sets are when it is imported."""
    modules = (f"detectron2_backbones.{module}" for module, _, _ in KINDS.values())
    server = start_warm(*modules, DETECTRON2_DATASETS=str(tiny_coco))
    yield server
    server.close()


@pytest.fixture
def start(launchers: Any, tmp_path: Path) -> Callable[..., Any]:
    """Starts a launcher as a command."""

    def command(kind: str, *flags: str, more: Sequence[str] = (), **settings: Any) -> Any:
        line = ("-m", f"detectron2_backbones.{KINDS[kind][0]}", *arguments_of(kind, *flags, **settings), *more)
        return launchers.python(*line, folder=tmp_path, before=QUIETLY)

    return command


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_is_resumed(kind: str, start: Callable[..., Any], weights: Path, tmp_path: Path) -> None:
    last = tmp_path / "run" / "last_checkpoint"
    running = start(kind, output="run", weights=weights)
    ended = running.wait(until=last.exists)
    assert ended is None, ended
    running.signal(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    done_before = int(last.read_text().removeprefix("model_").removesuffix(".pth"))
    assert done_before < 5
    done = start(kind, "--resume", output="run", weights=weights).wait()
    assert done.status == 0, done.stderr[-2000:]
    assert f"Starting training from iteration {done_before + 1}" in done.stdout
    final = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert final["iteration"] == 5
    # The optimizer goes on, too: its momentum is in the checkpoint.
    trainer = final["trainer"].get("_trainer", final["trainer"])
    assert trainer["optimizer"]["state"]
    # Statistics of frozen normalisation, and the stem, are still those of the ImageNet file.
    reference = convert_network(weights, tmp_path / "again.safetensors").state_dict()
    prefix = "backbone.bottom_up.network."
    still = [name for name in final["model"] if name.startswith((f"{prefix}stem", f"{prefix}cells.0."))]
    still += [name for name in final["model"] if name.startswith(prefix) and ".running_" in name]
    assert len(still) > 2 * 75
    assert all(torch.equal(final["model"][name], reference[name.removeprefix(prefix)]) for name in still)
    moved = "cells.13.preprocess1.op.1.weight"
    assert not torch.equal(final["model"][prefix + moved], reference[moved])
    # And COCO's evaluation ran at the end.
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in done.stdout
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert "bbox/AP50" in metrics[-1]


def test_weights_are_evaluated_without_training(launchers: Any, weights: Path, tmp_path: Path) -> None:
    runs = [(kind, arguments_of(kind, "--eval-only", output=kind, weights=weights)) for kind in KINDS]
    done = launchers(in_one_process(*runs), folder=tmp_path)
    assert done.stdout.endswith("[0, 0]\n"), done.stderr[-2000:]
    # One of the first run, and that of the second twice: in one process it also logs where the first did.
    assert done.stdout.count("copypaste: Task: bbox") == 3
    assert "Starting training" not in done.stdout


def test_frozen_normalisation_without_weights_is_refused_before_training(launchers: Any, tmp_path: Path) -> None:
    runs = [(kind, arguments_of(kind, output=kind)) for kind in KINDS]
    done = launchers(in_one_process(*runs), folder=tmp_path)
    assert done.stdout.endswith("[1, 1]\n"), done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("detectron2_backbones.")]
    assert [line.partition(" layers")[0] for line in lines] == [
        f"detectron2_backbones.{module}: 75 of 75 FrozenBN" for module, _, _ in KINDS.values()
    ]
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    assert "Starting training" not in done.stdout
    assert torch.cuda.is_available() or "There is no CUDA device: the run is on the CPU" in done.stdout


def test_the_same_seed_gives_the_same_weights(launchers: Any, tmp_path: Path) -> None:
    names = ("first", "second", "other")
    runs = [("yacs", [*arguments_of("yacs", output=name, norm="GN"), "DATASETS.TEST", "()"]) for name in names]
    for _, arguments in runs:
        arguments.extend(["SOLVER.MAX_ITER", "2"])
    runs[2][1].extend(["SEED", "2"])
    done = launchers(in_one_process(*runs), folder=tmp_path)
    assert done.stdout.endswith("[0, 0, 0]\n"), done.stderr[-2000:]
    first, second, other = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in names
    )
    # Not to the last bit: the first run of a process may round differently.
    torch.testing.assert_close(second, first)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other, first)


@pytest.mark.slow
def test_two_processes_train_together(start: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    # One process for each of two machines, on the CPU; DDP takes no device there.
    common = ["train.device=cpu", "train.ddp.device_ids=null", "train.max_iter=2", "train.eval_period=0"]
    common.append("dataloader.train.total_batch_size=4")
    flags = ["--num-machines", "2", "--dist-url", url]
    processes = [
        start("lazy", *flags, "--machine-rank", str(rank), output="run", norm="GN", more=common) for rank in range(2)
    ]
    ends = [process.wait() for process in processes]
    assert [end.status for end in ends] == [0, 0], ends[0].stderr[-2000:]
    said = ends[0].stdout + ends[0].stderr
    assert "World size: 2" in said
    assert "Making batched data loader with batch_size=2" in said
    assert torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["iteration"] == 1


def test_another_processs_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise ProcessRaisedException(
            "-- Process 0 terminated:\nTraceback:\n  File x\nValueError: no such: thing\n", 0, 1
        )

    monkeypatch.setattr(_launch, "launch", fail)
    assert train_net.main(["--config-file", KINDS["yacs"][1]]) == 1
    assert capsys.readouterr().err == "detectron2_backbones.train_net: no such: thing\n"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train_net.main, ["--config-file", "nowhere"], "no configuration 'nowhere'; the package has: Base-RetinaNet"),
        (train_net.main, [], "There is no configuration ''"),
        (lazy_train_net.main, ["--config-file", "nowhere"], "the package has: retinanet_genas_flatness_c100_fpn_1x"),
        (train_net.main, ["--config-file", KINDS["yacs"][1], "--num-gpus", "99"], "--num-gpus 99 does not fit"),
        (train_net.main, ["--config-file", KINDS["yacs"][1], "MODEL.GENAS.ARCHS", "x"], "ARCHS"),
        (train_net.main, ["--config-file", KINDS["yacs"][1], "MODEL.GENAS.ARCH"], "MODEL.GENAS.ARCH"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    main: Callable[..., int], arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"{main.__module__}: ") and error.count("\n") == 1
    assert message in error


def test_overrides_take_non_strict_weights() -> None:
    path = packaged_configs("detectron2", ".py")[KINDS["lazy"][1]]
    assert lazy_train_net.read_config(str(path), ["train.strict=False"]).train.strict is False
    path = packaged_configs("detectron2", ".yaml")[KINDS["yacs"][1]]
    assert train_net.read_config(path, ["MODEL.GENAS.STRICT_WEIGHTS", "False"]).MODEL.GENAS.STRICT_WEIGHTS is False


def test_the_device_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [available_device(name) for name in ("cuda", "cuda:1", "cpu", "mps")] == ["cpu", "cpu", "cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_device("cuda:1") == "cuda:1"


def test_only_the_quickstarts_sets_are_registered_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from detectron2_backbones import synthetic

    asked: list[str] = []
    monkeypatch.setattr(synthetic, "register", lambda root: asked.append(str(root)))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(["coco_2017_train"])
    assert asked == []
    register_datasets(["coco_2017_train", "genas_synthetic_val"])
    monkeypatch.delenv("DETECTRON2_DATASETS")
    register_datasets(["genas_synthetic_train"])
    assert asked == [str(tmp_path), "datasets"]


class Detector(nn.Module):
    """What tells its number of classes, itself or in its heads as Faster R-CNN does."""

    def __init__(self, classes: int, heads: bool) -> None:
        super().__init__()
        owner = self
        if heads:
            self.roi_heads = owner = nn.Module()
        owner.num_classes = classes


@pytest.mark.parametrize("heads", [False, True])
def test_the_classes_of_detector_and_images_are_compared(heads: bool, caplog: pytest.LogCaptureFixture) -> None:
    name = f"three_classes_{heads}"

    def load() -> list[Any]:
        # As COCO's annotations do, which tell their classes when they are read.
        MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
        return []

    DatasetCatalog.register(name, load)
    try:
        with pytest.raises(ValueError, match=f"detector has 2 classes, and {name} has 3"):
            check_classes(Detector(2, heads), [name])
        check_classes(Detector(3, heads), [name], evaluation=True)
        with caplog.at_level("WARNING", "detectron2_backbones"):
            check_classes(Detector(80, heads), [name])
        with pytest.raises(ValueError, match=f"detector has 80 classes, and {name} has 3"):
            check_classes(Detector(80, heads), [name], evaluation=True)
        check_classes(nn.Linear(1, 1), [name], evaluation=True)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
