"""Weights: each kind of file lands completely, foreign ones are refused by name, and nothing is unpickled."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from genas_plugins import Genotype
from genas_plugins.checkpoints import CheckpointError, convert_network

pytest.importorskip("detectron2", reason="Detectron2 is not installed: docs/detectron2.md says how")

from detectron2.checkpoint import DetectionCheckpointer

from detectron2_backbones import GeNASBackbone
from detectron2_backbones.convert import convert, main
from detectron2_backbones.weights import GenasCheckpointer, find_backbone, read_pickle

pytestmark = pytest.mark.detectron2

NAME = "genas_flatness_c100"
PREFIX = "backbone.bottom_up.network."
KINDS = ("official", "converted", "timm", "pkl")
NORMS = ("BN", "FrozenBN")


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, write_official: Callable[..., Any], genotype: Genotype
) -> dict[str, Any]:
    """The same weights in each kind of file, and the tensors."""
    folder = tmp_path_factory.mktemp("weights")
    state = write_official(folder / "official.pth.tar")
    convert_network(folder / "official.pth.tar", folder / "clean.safetensors", genotype)
    convert(folder / "clean.safetensors", folder / "backbone.pkl")
    # As timm's saver writes it: the averaged weights are those that count.
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"epoch": 3, "arch": "genas_cell", "state_dict": zeros, "state_dict_ema": state}, folder / "run.pth.tar")
    paths = ("official.pth.tar", "clean.safetensors", "run.pth.tar", "backbone.pkl")
    return {"state": state, **{kind: str(folder / path) for kind, path in zip(KINDS, paths, strict=True)}}


def expected_of(model: nn.Module, state: dict[str, Tensor], counters: bool) -> dict[str, Tensor]:
    """What the network of a model is to hold: tensors of the file, by the names of the model."""
    names = [name for name in state if not name.startswith(("classifier", "auxiliary_head"))]
    own = {name for name in model.state_dict() if name.startswith(PREFIX)}
    expected = {f"{PREFIX}{name}": state[name] for name in names}
    if not counters:
        expected = {name: value for name, value in expected.items() if not name.endswith("num_batches_tracked")}
        own = {name for name in own if not name.endswith("num_batches_tracked")}
    assert expected.keys() == own
    return expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_lands_completely(
    kind: str, norm: str, files: dict[str, Any], build_detector: Callable[..., nn.Module]
) -> None:
    model = build_detector("MODEL.GENAS.NORM", norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GenasCheckpointer(model).load(files[kind])
    expected = expected_of(model, files["state"], counters=norm == "BN" and kind != "pkl")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    # 75 normalisations of four tensors, and one weight for each convolution.
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.backbone.bottom_up.modules())
    assert len([name for name in expected if not name.endswith("num_batches_tracked")]) == 4 * 75 + convolutions
    # The pyramid and the head are not touched.
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith(PREFIX))


@pytest.mark.parametrize("norm", NORMS)
def test_our_file_lands_completely_with_detectron2s_own_checkpointer(
    norm: str, files: dict[str, Any], build_detector: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_detector("MODEL.GENAS.NORM", norm)
    records: list[Any] = []
    monkeypatch.setattr(DetectionCheckpointer, "_log_incompatible_keys", lambda self, keys: records.append(keys))
    DetectionCheckpointer(model).load(files["pkl"])
    after = model.state_dict()
    expected = expected_of(model, files["state"], counters=False)
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert records[0].unexpected_keys == records[0].incorrect_shapes == []
    assert not [name for name in records[0].missing_keys if name.startswith(PREFIX)]


def test_weights_find_the_backbone_of_another_detector(
    files: dict[str, Any], build_detector: Callable[..., nn.Module]
) -> None:
    model = build_detector(config="faster_rcnn_genas_flatness_c100_FPN_1x")
    assert find_backbone(model) == PREFIX[:-1]
    GenasCheckpointer(model).load(files["pkl"])
    stem = "stem0.0.weight"
    assert torch.equal(model.backbone.bottom_up.network.get_parameter(stem), files["state"][stem])


def test_weights_find_a_backbone_without_a_pyramid(files: dict[str, Any], genotype: Genotype) -> None:
    model = nn.ModuleDict({"backbone": GeNASBackbone(genotype.code, init_channels=2, out_features=("res4",))})
    assert find_backbone(model) == "backbone.network"
    for kind in KINDS:
        GenasCheckpointer(model).load(files[kind])
        # The cells behind res4 are not there, and that is no error.
        assert len(model["backbone"].network.cells) == 9
        name = "cells.8.preprocess0.op.1.weight"
        assert torch.equal(model["backbone"].network.get_parameter(name), files["state"][name])
        nn.init.zeros_(model["backbone"].network.get_parameter(name))
    assert find_backbone(nn.Linear(1, 1)) is None


@pytest.mark.parametrize(("saved", "loaded"), [("BN", "BN"), ("BN", "FrozenBN"), ("FrozenBN", "BN")])
def test_a_whole_detector_comes_back(
    saved: str, loaded: str, tmp_path: Path, build_detector: Callable[..., nn.Module], randomize: Callable[..., Any]
) -> None:
    first = randomize(build_detector("MODEL.GENAS.NORM", saved))
    nn.init.ones_(first.head.cls_score.weight)
    GenasCheckpointer(first, str(tmp_path)).save("model_final", iteration=7)
    second = build_detector("MODEL.GENAS.NORM", loaded)
    rest = GenasCheckpointer(second).load(str(tmp_path / "model_final.pth"))
    assert rest["iteration"] == 7
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items() if name in state)


def test_another_number_of_classes_keeps_the_fresh_head_as_detectron2_does(
    tmp_path: Path, build_detector: Callable[..., nn.Module], randomize: Callable[..., Any]
) -> None:
    first = randomize(build_detector())
    GenasCheckpointer(first, str(tmp_path)).save("model_final")
    second = build_detector("MODEL.RETINANET.NUM_CLASSES", 5)
    GenasCheckpointer(second).load(str(tmp_path / "model_final.pth"))
    assert second.head.cls_score.out_channels == 45
    loaded = second.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in first.backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["official", "whole"])
def test_weights_of_another_genotype_are_refused_by_name(
    kind: str, tmp_path: Path, write_official: Callable[..., Any], build_detector: Callable[..., nn.Module]
) -> None:
    path = tmp_path / "other.pth"
    if kind == "official":
        write_official(path, genotype="pdarts_c10")
    else:
        GenasCheckpointer(build_detector("MODEL.GENAS.ARCH", "pdarts_c10"), str(tmp_path)).save("other")
    with pytest.raises(CheckpointError, match=r"other\.pth.*missing \(cells\..*left over \(cells\..*STRICT_WEIGHTS"):
        GenasCheckpointer(build_detector()).load(str(path))


def test_a_file_that_lacks_a_tensor_is_refused_unless_asked_otherwise(
    tmp_path: Path, files: dict[str, Any], build_detector: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    state = dict(files["state"])
    del state["cells.3.preprocess0.op.1.weight"]
    state["cells.3._ops.99.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "partial.pth")
    model = build_detector()
    with pytest.raises(
        CheckpointError, match=r"1 missing \(cells\.3\.preprocess0\.op\.1\.weight\); 1 left over \(cells\.3\._ops\.99"
    ):
        GenasCheckpointer(model).load(str(tmp_path / "partial.pth"))
    with caplog.at_level(logging.WARNING):
        GenasCheckpointer(model, strict=False).load(str(tmp_path / "partial.pth"))
    assert f"{PREFIX}cells.3.preprocess0.op.1" in caplog.text
    assert f"{PREFIX}cells.3._ops.99" in caplog.text
    name = "cells.3.preprocess1.op.1.weight"
    assert torch.equal(model.state_dict()[PREFIX + name], state[name])


def test_another_detectors_file_is_refused(tmp_path: Path, build_detector: Callable[..., nn.Module]) -> None:
    state = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(64, 3, 7, 7), "head.cls_score.weight": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "r50.pth")
    with pytest.raises(CheckpointError, match=r"r50\.pth"):
        GenasCheckpointer(build_detector()).load(str(tmp_path / "r50.pth"))


def test_a_missing_file_is_named(build_detector: Callable[..., nn.Module], files: dict[str, Any]) -> None:
    checkpointer = GenasCheckpointer(build_detector())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file nowhere\.pkl.*clovaai/GeNAS"):
        checkpointer.load("nowhere.pkl")
    # And the next file loads.
    checkpointer.load(files["pkl"])
    assert checkpointer.load("") == {}


class _Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", ["bad.pkl", "bad.pth"])
@pytest.mark.parametrize("place", ["instead", "beside"])
def test_nothing_is_executed(
    name: str, place: str, tmp_path: Path, build_detector: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content: Any = {"model": {}, "__author__": _Payload()} if place == "beside" else _Payload()
    if name == "bad.pkl":
        Path(name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    with pytest.raises(CheckpointError, match=r"refers to (posix|nt)\.mkdir, which could execute code"):
        GenasCheckpointer(build_detector()).load(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"model": {"a": "text"}}), pickle.dumps({"model": 3})],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pkl"):
        read_pickle(path)


def test_a_file_that_was_cut_off_is_refused_wherever_the_cut_is(tmp_path: Path) -> None:
    whole = pickle.dumps({"model": {"a": np.arange(6.0), "b": np.float32(2.0)}, "__author__": "x"}, protocol=4)
    path = tmp_path / "cut.pkl"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pkl"):
            read_pickle(path)
    path.write_bytes(whole)
    read = read_pickle(path)["model"]
    assert read["a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and read["b"].item() == 2.0


@pytest.mark.parametrize("kind", ["published", "official", "converted", "timm"])
def test_the_command_converts(
    kind: str,
    files: dict[str, Any],
    genotype: Genotype,
    write_official: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out.pkl"
    if kind == "published":
        # Which it is the command finds itself.
        files = {kind: str(tmp_path / "published.pth.tar")}
        files["state"] = write_official(Path(files[kind]), NAME)
    arch = ["--arch", " ".join(map(str, genotype.code))] if kind in ("official", "timm") else []
    assert main([files[kind], str(target), *arch]) == 0
    with target.open("rb") as file:
        content = pickle.load(file)
    assert content["__author__"] == "genas-plugins" and content["matching_heuristics"] is False
    wanted = {
        f"{PREFIX}{name}": value.numpy()
        for name, value in files["state"].items()
        if not name.startswith(("classifier", "auxiliary_head")) and not name.endswith("num_batches_tracked")
    }
    assert content["model"].keys() == wanted.keys()
    assert all(np.array_equal(value, wanted[name]) for name, value in content["model"].items())
    assert capsys.readouterr().out == f"{target}: {len(wanted)} tensors.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{official}", "out.pth"], "Detectron2 knows its format by the suffix .pkl, got the file name 'out.pth'"),
        (["{official}", "out.pkl", "--arch", "pdarts_c10"], "does not fit a network of the genotype"),
        (["{converted}", "out.pkl", "--arch", "pdarts_c10"], "holds the genotype"),
        (["{official}", "out.pkl", "--arch", "pdarts"], "did you mean pdarts_c10"),
        (["nowhere.pth", "out.pkl"], "There is no checkpoint file nowhere.pth"),
        (["{resnet}", "out.pkl"], "expected one"),
        (["{converted}", "missing/out.pkl"], "No such file or directory"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    message: str,
    files: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet").state_dict(), "resnet.pth")
    Path("out.pkl").write_text("before")
    assert main([part.format(resnet="resnet.pth", **files) for part in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("detectron2_backbones.convert: ") and message in error
    assert error.count("\n") == 1
    assert Path("out.pkl").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pkl", "resnet.pth"]
