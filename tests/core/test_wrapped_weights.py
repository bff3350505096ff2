"""Weights as training programs leave them: wrapped, averaged, beside other things, under names in capitals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from genas_plugins import ZOO
from genas_plugins.checkpoints import (
    CheckpointError,
    load_official_network,
    load_official_supernet,
    read_state,
    save_network,
    unwrapped,
)
from genas_plugins.cli import main
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.supernet import SuperNet

NAME = "genas_flatness_c10"
GENOTYPE = ZOO[NAME].genotype


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
        else:
            value.fill_(7)
    return model


@pytest.fixture(scope="module")
def network() -> CellNetwork:
    return randomized(CellNetwork(GENOTYPE, 4, 3, 10))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


WRAPPERS = {
    "plain": lambda model: model.state_dict(),
    "parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "compiled, parallel": lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
    "parallel, compiled": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    "averaged, parallel, compiled": lambda model: AveragedModel(nn.DataParallel(torch.compile(model))).state_dict(),
    "inside": lambda model: {
        f"module.{name.replace('cells.0.', 'cells.0._orig_mod.')}": value for name, value in model.state_dict().items()
    },
}
PLACES = {
    "alone": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best": np.float64(0.5), "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}, "iteration": np.int64(7)},
    "model_ema": lambda state: {"model": {name: -value for name, value in state.items()}, "model_ema": state},
    "model_state": lambda state: {"model_state": state, "epoch": 3},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_every_wrapper_is_taken_off(wrapper, place, network, tmp_path):
    torch.save(PLACES[place](WRAPPERS[wrapper](network)), tmp_path / "FILE.PTH")
    loaded = load_official_network(tmp_path / "FILE.PTH", GENOTYPE)
    assert_same(loaded.state_dict(), network.state_dict())


def test_a_wrapped_supernet_is_read(tmp_path):
    supernet = randomized(SuperNet(5, init_channels=4, num_cells=3))
    torch.save({"model": AveragedModel(supernet).state_dict()}, tmp_path / "s.pt")
    assert_same(load_official_supernet(tmp_path / "s.pt").state_dict(), supernet.state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".SafeTensors"])
def test_the_case_of_a_suffix_says_nothing(suffix, network, tmp_path, capsys):
    torch.save({"model": network.state_dict()}, tmp_path / "IN.PTH.TAR")
    target = tmp_path / f"OUT{suffix}"
    assert main(["convert", str(tmp_path / "IN.PTH.TAR"), str(target)]) == 0
    assert f"genotype {GENOTYPE}, 3 cells, 10 classes" in capsys.readouterr().out
    assert_same(read_state(target), network.state_dict())
    assert load_official_network(target).genotype.normal == GENOTYPE.normal
    save_network(network, tmp_path / f"again{suffix}")
    assert_same(read_state(tmp_path / f"again{suffix}"), network.state_dict())


def test_what_does_not_land_is_an_error(network, tmp_path):
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    save_file(state | {"module.head.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"1 left over \(head\.weight\)"):
        load_official_network(tmp_path / "more.safetensors", GENOTYPE)
    state.pop("module.classifier.bias")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(classifier\.bias\)"):
        load_official_network(tmp_path / "less.safetensors", GENOTYPE)


def test_names_that_only_look_like_wrappers_stay():
    value = torch.zeros(1)
    for names in (["module.a", "b"], ["modules.a"], ["my_orig_mod.a"], ["n_averaged", "a"], ["a", "_orig_mod.a"]):
        assert list(unwrapped(dict.fromkeys(names, value))) == names
    assert unwrapped({"n_averaged": value}) == {"n_averaged": value}
    assert list(unwrapped({"_orig_mod.module.a": value, "n_averaged": value})) == ["a"]
    assert list(unwrapped({"a._orig_mod.b._orig_mod.c": value})) == ["a.b.c"]


def test_home_and_missing_files(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_network(network, "~/n.safetensors")
    assert (tmp_path / "n.safetensors").is_file()
    assert_same(read_state("~/n.safetensors"), network.state_dict())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file ~/none\.pt"):
        read_state(Path("~/none.pt"))
