"""Files that users hand over: wrapped detectors load whole, and configurations run nothing."""

from __future__ import annotations

import codecs
import logging
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from genas_plugins.checkpoints import CheckpointError

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2.checkpoint import DetectionCheckpointer

from detectron2_backbones import lazy_train_net, train_net
from detectron2_backbones._launch import config_path
from detectron2_backbones.weights import GenasCheckpointer, read_pickle

pytestmark = pytest.mark.detectron2

QUICKSTART = "retinanet_genas_flatness_c100_FPN_quickstart_synthetic"
WRAPPERS = {
    "module": lambda model: {f"module.{name}": value for name, value in model.state_dict().items()},
    "compiled": lambda model: torch.compile(model).state_dict(),
    "both": lambda model: {f"_orig_mod.module.{name}": value for name, value in model.state_dict().items()},
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "backbone compiled": lambda model: {
        name.replace("backbone.", "backbone._orig_mod.", 1): value for name, value in model.state_dict().items()
    },
    "arrays": lambda model: {name: value.numpy() for name, value in model.state_dict().items()},
}


@pytest.fixture(scope="module")
def detector(build_detector: Callable[..., nn.Module], randomize: Callable[..., Any]) -> nn.Module:
    model = randomize(build_detector())
    for parameter in model.head.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_detector_loads_whole(
    wrapper: str, strict: bool, detector: nn.Module, build_detector: Callable[..., nn.Module], tmp_path: Path
) -> None:
    content = {"model": WRAPPERS[wrapper](detector), "iteration": 7, "best": np.float64(0.5)}
    torch.save(content, tmp_path / "MODEL_FINAL.PTH")
    model = build_detector()
    rest = GenasCheckpointer(model, strict=strict).load(str(tmp_path / "MODEL_FINAL.PTH"))
    assert_same(model, detector)
    assert rest["iteration"] == 7


def test_a_compiled_detector_takes_a_plain_file(
    detector: nn.Module, build_detector: Callable[..., nn.Module], tmp_path: Path
) -> None:
    torch.save({"model": detector.state_dict()}, tmp_path / "model.pth")
    whole = build_detector()
    GenasCheckpointer(torch.compile(whole)).load(str(tmp_path / "model.pth"))
    assert_same(whole, detector)
    part = build_detector()
    part.backbone = torch.compile(part.backbone)
    GenasCheckpointer(part).load(str(tmp_path / "model.pth"))
    part.backbone = part.backbone._orig_mod
    assert_same(part, detector)


def test_a_wrapped_detector_of_another_genotype_is_refused(
    build_detector: Callable[..., nn.Module], tmp_path: Path
) -> None:
    other = build_detector("MODEL.GENAS.ARCH", "pdarts_c10")
    torch.save({"model": WRAPPERS["both"](other)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth.*missing \(cells\..*left over \(cells\."):
        GenasCheckpointer(build_detector()).load(str(tmp_path / "other.pth"))


def test_home_and_queries(
    detector: nn.Module,
    build_detector: Callable[..., nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"model": detector.state_dict()}, tmp_path / "model.pth")
    model = build_detector()
    GenasCheckpointer(model).load("~/model.pth")
    assert_same(model, detector)
    with pytest.raises(ValueError, match=r"only matching_heuristics=True is known, got \{'x'"):
        GenasCheckpointer(build_detector()).load("~/model.pth?x=1")
    cfg = train_net.read_config(
        config_path(QUICKSTART, ".yaml"), ["OUTPUT_DIR", "~/out", "MODEL.WEIGHTS", "~/model.pth"]
    )
    expected = [f"{tmp_path}/out", f"{tmp_path}/model.pth"]
    found = [cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS]
    assert found == expected
    lazy = lazy_train_net.read_config(
        str(config_path("retinanet_genas_flatness_c100_fpn_1x", ".py")),
        ["train.init_checkpoint='~/model.pth'", "train.output_dir='~/out'"],
    )
    assert [lazy.train.output_dir, lazy.train.init_checkpoint] == expected


@pytest.mark.parametrize("blobs", [True, False])
def test_caffe2_files_load_as_detectron2_loads_them(blobs: bool, tmp_path: Path) -> None:
    arrays = {"fc_w": np.full((3, 2), 2.0, np.float32), "fc_w_momentum": np.zeros(1, np.float32)}
    (tmp_path / "r50.PKL").write_bytes(pickle.dumps({"blobs": arrays} if blobs else arrays, protocol=2))
    (tmp_path / "r50.pkl").write_bytes((tmp_path / "r50.PKL").read_bytes())
    found = []
    for kind, name in ((GenasCheckpointer, "r50.PKL"), (DetectionCheckpointer, "r50.pkl")):
        model = nn.ModuleDict({"fc": nn.Linear(2, 3, bias=False)})
        kind(model).load(str(tmp_path / name))
        found.append(model["fc"].weight.detach())
    assert torch.equal(found[0], found[1]) and (found[0] == 2.0).all()


@pytest.mark.parametrize("shape", [(2**30,), (2**15, 2**15)])
def test_arrays_that_claim_more_than_the_file_holds_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    shared = np.zeros(500_000, np.float32)
    contents = [{f"a{number}": shared for number in range(100)}, {"a": _Call(np.ndarray, shape)}]
    for content in contents:
        (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": content}))
        with pytest.raises(CheckpointError, match=r"w\.pkl"):
            read_pickle(tmp_path / "w.pkl")
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    with pytest.raises(CheckpointError, match="numbers more results"):
        read_pickle(tmp_path / "w.pkl")


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


EVIL = 'OUTPUT_DIR: !!python/object/apply:os.mkdir ["executed"]\n'


@pytest.mark.parametrize("place", ["itself", "base", "list of bases"])
def test_a_yaml_file_runs_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(EVIL)
    Path("plain.yaml").write_text("SEED: 1\n")
    based = {"base": "_BASE_: evil.yaml\n", "list of bases": "_BASE_: [plain.yaml, evil.yaml]\n"}
    Path("config.yaml").write_text(based.get(place, EVIL))
    with pytest.raises(ValueError, match=r"is not a YAML file of plain data.*os\.mkdir.*write the values out"):
        train_net.read_config("config.yaml")
    assert not Path("executed").exists()


def test_a_lazy_configuration_in_yaml_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(EVIL)
    assert lazy_train_net.main(["--config-file", "evil.yaml"]) == 1
    assert "A LazyConfig is a Python program (.py), which is run, got evil.yaml." in capsys.readouterr().err
    assert not Path("executed").exists()


def test_yaml_without_end_is_refused(tmp_path: Path) -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text, message in (
        (laughs, "aliases stand for more than"),
        ("_BASE_: config.yaml\n", "without end"),
        ("- 1\n", "keys and values, got list"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            train_net.read_config(tmp_path / "config.yaml")
        assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    base = config_path(QUICKSTART, ".yaml")
    text = f"_BASE_: {base}\nSEED: 3\n".replace("\n", "\r\n")
    (tmp_path / "config.yaml").write_bytes(codecs.BOM_UTF8 + text.encode())
    cfg = train_net.read_config(tmp_path / "config.yaml")
    assert cfg.SEED == 3 and cfg.MODEL.GENAS.ARCH == "genas_flatness_c100"


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
