"""Checkpoints in timm's ways: official files, our own, timm's, other heads and inputs, and those that do not fit."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.optim
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from genas_plugins.checkpoints import convert_network, load_official_network, read_state
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.zoo import ZOO
from timm_models.validate import load_model

# Of the published networks that with the fewest tensors.
NAME = "darts_v2_c10"
# Normal cells around two reductions; the published networks have 14, to the same effect.
CELLS = 4
State = dict[str, Tensor]


def official_state(
    name: str = NAME, channels: int = 4, cells: int = CELLS, classes: int = 1000, seed: int = 0
) -> State:
    """Random values under all names of an official network with its auxiliary head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = CellNetwork(ZOO[name].genotype, channels, cells, classes, auxiliary=True)
    state = {}
    for number, (key, value) in enumerate(network.state_dict().items()):
        if value.is_floating_point():
            state[key] = torch.rand(value.shape, generator=generator) + 0.25
        else:
            state[key] = torch.tensor(1000 + number)
    return state


def official_file(path: Path, state: State, prefix: str = "module.") -> Path:
    """A file as the official training script writes it, with what its profiler left in the network."""
    stored = {prefix + name: value for name, value in state.items()}
    for module in ("", "cells.0.", "cells.3._ops.1.", "classifier."):
        stored[f"{prefix}{module}total_ops"] = stored[f"{prefix}{module}total_params"] = torch.zeros(1)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    best = torch.tensor(76.05)
    torch.save({"epoch": 250, "state_dict": stored, "best_acc_top1": best, "optimizer": optimizer}, path)
    return path


def create(name: str = NAME, **arguments: object) -> nn.Module:
    # A seed, so that fresh layers can be told from loaded ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return timm.create_model(name, init_channels=4, num_cells=CELLS, **arguments)


def without(state: State, *prefixes: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def assert_holds(model: nn.Module, state: State) -> None:
    """Every tensor of the model comes from the file, and every one of these of the file is in the model."""
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture(scope="module")
def state() -> State:
    return official_state()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    return official_file(tmp_path_factory.mktemp("official") / "model_best.pth.tar", state)


@pytest.mark.parametrize("name", ZOO)
def test_an_official_checkpoint_fills_every_tensor_and_gives_the_cores_logits(tmp_path, images, name):
    state = official_state(name)
    path = official_file(tmp_path / "model_best.pth.tar", state)
    assert_holds(create(name, checkpoint_path=path), without(state, "auxiliary_head."))
    model = create(name, auxiliary=True, checkpoint_path=path)
    assert_holds(model, state)
    core = CellNetwork(ZOO[name].genotype, 4, CELLS, 1000, auxiliary=True)
    core.load_state_dict(state)
    # In training the auxiliary logits too, which are those of the cell at two thirds.
    x = images(2, 3, 97, 64)
    pairs = [*zip(core(x), model(x), strict=True), (core.eval()(x), model.eval()(x))]
    assert len(pairs) == 3
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_official_checkpoint_of_full_width(tmp_path):
    name = "genas_flatness_c100"
    state = official_state(name, channels=46, cells=14)
    model = timm.create_model(name, checkpoint_path=official_file(tmp_path / "model_best.pth.tar", state))
    assert_holds(model, without(state, "auxiliary_head."))
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_195_205


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_are_dropped(tmp_path, state, prefix):
    path = official_file(tmp_path / "file.pth.tar", state, prefix)
    assert_holds(create(auxiliary=True, checkpoint_path=path), state)
    # Nor does it matter who reads the file.
    model = create()
    stored = torch.load(path, weights_only=True)["state_dict"]
    before = dict(stored)
    result = model.load_state_dict(stored)
    assert result.missing_keys == result.unexpected_keys == []
    assert_holds(model, without(state, "auxiliary_head."))
    assert stored.keys() == before.keys() and all(stored[name] is before[name] for name in before)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_safetensors_of_this_project(tmp_path, file, state, auxiliary):
    converted = tmp_path / "network.safetensors"
    convert_network(file, converted)
    expected = state if auxiliary else without(state, "auxiliary_head.")
    assert_holds(create(auxiliary=auxiliary, checkpoint_path=converted), expected)
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "plain.safetensors")
    assert_holds(create(auxiliary=auxiliary, checkpoint_path=tmp_path / "plain.safetensors"), expected)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_checkpoint_of_timms_training_gives_its_averaged_weights(tmp_path, small, images, auxiliary):
    model = small(auxiliary=auxiliary)
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, momentum=0.9)
    average = ModelEmaV3(model, decay=0.5)
    out = model(images(2, 3, 64, 64))
    (sum(out) if auxiliary else out).square().sum().backward()
    optimizer.step()
    average.update(model)
    arguments = argparse.Namespace(model="genas_cell", lr=0.1, model_kwargs={"genotype": NAME})
    saver = CheckpointSaver(model, optimizer, arguments, average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=76.05)
    expected, trained = average.module.state_dict(), model.state_dict()
    assert not torch.equal(expected["classifier.weight"], trained["classifier.weight"])
    path = tmp_path / "last.pth.tar"
    assert_holds(small(auxiliary=auxiliary, checkpoint_path=path), expected)
    read = read_state(path)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)
    network = load_official_network(path, model.genotype, auxiliary=auxiliary)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(network.eval()(x), average.module(x))
    # Resuming takes the weights that were trained.
    resumed = small(auxiliary=auxiliary)
    timm.models.resume_checkpoint(resumed, path, log_info=False)
    assert_holds(resumed, trained)


def by_checkpoint_path(path: Path, **arguments: object) -> nn.Module:
    return create(checkpoint_path=path, **arguments)


def by_pretrained(path: Path, **arguments: object) -> nn.Module:
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **arguments)


WAYS = pytest.mark.parametrize("load", [by_checkpoint_path, by_pretrained])


@WAYS
@pytest.mark.parametrize("auxiliary", [False, True])
def test_other_classes_keep_fresh_classifiers(file, state, caplog, load, auxiliary):
    with caplog.at_level(logging.INFO):
        model = load(file, num_classes=10, auxiliary=auxiliary)
    fresh = create(num_classes=10, auxiliary=auxiliary).state_dict()
    heads = ["classifier.", "auxiliary_head.classifier."] if auxiliary else ["classifier."]
    expected = {name: fresh[name] if name.startswith(tuple(heads)) else value for name, value in state.items()}
    assert_holds(model, expected if auxiliary else without(expected, "auxiliary_head."))
    if load is by_checkpoint_path:
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [
            re.match(r"The checkpoint's (\S+)\* is for 1000 classes .* has 10", text)[1] for text in warnings
        ] == heads


@WAYS
def test_no_classes(file, state, load):
    model = load(file, num_classes=0, auxiliary=True)
    assert_holds(model, without(state, "classifier.", "auxiliary_head."))


@WAYS
@pytest.mark.parametrize(
    ("in_chans", "adapted"),
    [
        (1, lambda weight: weight.sum(1, keepdim=True)),
        # Repeated, and scaled so that an image of equal channels gives what it gave.
        (4, lambda weight: weight[:, [0, 1, 2, 0]] * 3 / 4),
        (6, lambda weight: weight[:, [0, 1, 2, 0, 1, 2]] / 2),
    ],
)
def test_other_input_channels(file, state, load, in_chans, adapted):
    loaded = load(file, in_chans=in_chans).state_dict()
    expected = without(state, "auxiliary_head.")
    torch.testing.assert_close(loaded["stem0.0.weight"], adapted(expected["stem0.0.weight"]))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items() if name != "stem0.0.weight")


@pytest.mark.parametrize(
    ("source", "target", "adapted"),
    [
        (1, 3, lambda weight: weight[:, [0, 0, 0]] / 3),
        (4, 1, lambda weight: weight.sum(1, keepdim=True)),
        (4, 3, lambda weight: weight[:, :3] * 4 / 3),
    ],
)
def test_a_checkpoint_of_other_input_channels(tmp_path, state, source, target, adapted):
    weight = torch.rand(2, source, 3, 3, generator=torch.Generator().manual_seed(1))
    path = official_file(tmp_path / "file.pth.tar", {**state, "stem0.0.weight": weight})
    loaded = create(in_chans=target, checkpoint_path=path).state_dict()["stem0.0.weight"]
    torch.testing.assert_close(loaded, adapted(weight))


@WAYS
def test_all_at_once(file, state, load):
    model = load(file, in_chans=1, num_classes=7, auxiliary=True, global_pool="avg", output_stride=16)
    assert_holds(
        nn.ModuleDict({"cells": model.cells, "stem1": model.stem1}),
        {name: value for name, value in state.items() if name.startswith(("cells.", "stem1."))},
    )
    assert model.classifier.out_features == model.auxiliary_head.classifier.out_features == 7


@WAYS
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1,), (0,), (-1,)])
def test_features_take_a_whole_checkpoint(file, images, load, indices):
    x = images(1, 3, 64, 64)
    whole = load(file).eval()
    model = load(file, features_only=True, out_indices=indices).eval()
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=list(indices), intermediates_only=True)
        for one, other in zip(model(x), expected, strict=True):
            assert torch.equal(one, other)
    kept = model.model.state_dict()
    assert_holds(model.model, {name: value for name, value in whole.state_dict().items() if name in kept})


def test_a_folder_for_the_hub(tmp_path, small, randomize, images):
    model = randomize(small(auxiliary=True)).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization="both")
    # The genotype is among the arguments that timm keeps beside the weights.
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_holds(loaded, model.state_dict())
    x = images(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


def test_there_is_nothing_to_download():
    where = {
        NAME: "the authors of GeNAS publish",
        "genas_cell": "the authors of GeNAS",
        "rlnas_c10": "does not have it",
    }
    for name, told in where.items():
        with pytest.raises(RuntimeError, match=rf"nothing to download for {name}: .*{told}.*checkpoint_path=FILE"):
            timm.create_model(name, genotype=NAME, init_channels=4, num_cells=CELLS, pretrained=True)
    assert timm.list_pretrained("*genas*") == []


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


MISFITS = {
    "another genotype": (
        lambda state: official_state("dropnas_c100"),
        r"\d+ missing \(cells.*\d+ left over \(cells",
    ),
    "another width": (lambda state: official_state(channels=6), r"different \(stem0\.0\.weight is \(3, 3, 3, 3\)"),
    "fewer cells": (lambda state: official_state(cells=3), r"\d+ missing \(cells"),
    "missing tensor": (drop("cells.3._ops.1.op.1.weight"), r"1 missing \(cells\.3\._ops\.1\.op\.1\.weight\)"),
    "missing statistics": (drop("stem1.2.running_var"), r"1 missing \(stem1\.2\.running_var\)"),
    "missing classifier": (drop("classifier.bias"), r"1 missing \(classifier\.bias\)"),
    "extra tensor": (
        lambda state: {**state, "cells.2._ops.8.op.1.weight": torch.zeros(1)},
        r"1 left over \(cells\.2\._ops\.8\.op\.1\.weight\)",
    ),
    "other kernel": (
        lambda state: {**state, "cells.3._ops.7.op.1.weight": torch.zeros(16, 1, 5, 5)},
        r"1 different \(cells\.3\._ops\.7\.op\.1\.weight is \(16, 1, 5, 5\) float instead of \(16, 1, 3, 3\)",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, state, misfit):
    change, message = MISFITS[misfit]
    path = official_file(tmp_path / "file.pth.tar", change(state))
    model = create()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as caught:
        timm.models.load_checkpoint(model, str(path))
    assert "does not fit" in str(caught.value) and str(ZOO[NAME].genotype) in str(caught.value)
    assert_holds(model, before)
    with pytest.raises(RuntimeError, match=message):
        by_pretrained(path)


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pth.tar")
    for load in (by_checkpoint_path, by_pretrained):
        with pytest.raises(RuntimeError, match=r"no cells \(weight, bias\)"):
            load(tmp_path / "linear.pth.tar")


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@WAYS
def test_code_in_a_file_is_not_executed(tmp_path, state, load):
    witness, path = tmp_path / "witness", tmp_path / "evil.pth.tar"
    torch.save({"state_dict": state, "optimizer": Payload(f"touch {witness}")}, path)
    with pytest.raises(RuntimeError, match="weights_only=True blocked"):
        load(path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["IN.PTH", "IN.SAFETENSORS", "in.bin"])
@pytest.mark.parametrize("wrapper", ["averaged", "compiled", "both", "plain"])
def test_weights_of_any_network_of_timm_are_unwrapped(wrapper: str, name: str, tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=4)
    wrap: dict[str, Callable[[], State]] = {
        "averaged": lambda: AveragedModel(source).state_dict(),
        "compiled": lambda: torch.compile(source).state_dict(),
        "both": lambda: nn.DataParallel(torch.compile(source)).state_dict(),
        "plain": source.state_dict,
    }
    state = wrap[wrapper]()
    if name.endswith("SAFETENSORS"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"model": state, "best": np.float64(0.5)}, tmp_path / name)
    loaded = load_model("test_resnet", tmp_path / name, 4, {}).state_dict()
    expected = source.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
