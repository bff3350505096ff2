"""Clean files from any checkpoint: the published genotype is recognised, and only the right one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genas_plugins.checkpoints import (
    CheckpointError,
    convert_network,
    load_official_network,
    read_metadata,
    save_network,
)
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.zoo import ZOO

# No published network: all convolutions are of one kind.
FOREIGN = Genotype([("sep_conv_3x3", 0), ("sep_conv_3x3", 1)] * 4, [("dil_conv_5x5", 0), ("dil_conv_5x5", 1)] * 4)


def network(genotype: Genotype, auxiliary: bool = True) -> CellNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CellNetwork(genotype, 4, 3, 5, auxiliary=auxiliary)
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.dim() == 1:
                value.uniform_(0.5, 1.5)
            elif not value.is_floating_point():
                value.fill_(len(name))
    return model


def official_file(path: Path, model: CellNetwork) -> Path:
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.cells.0.total_ops"] = state["module.total_params"] = torch.zeros(1)
    torch.save({"epoch": 250, "state_dict": state, "optimizer": {}}, path)
    return path


def logits(model: CellNetwork) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", ZOO)
def test_a_published_network_is_recognised(tmp_path, name):
    genotype = ZOO[name].genotype
    original = network(genotype)
    target = tmp_path / "network.safetensors"
    converted = convert_network(official_file(tmp_path / "model_best.pth.tar", original), target)
    # The order of the pairs too, which numbers the tensors.
    assert (converted.genotype.normal, converted.genotype.reduce) == (genotype.normal, genotype.reduce)
    metadata = read_metadata(target)
    assert metadata["format"] == "genas-network" and metadata["source"] == "model_best.pth.tar"
    assert Genotype.from_dict(metadata["genotype"]).normal == genotype.normal
    expected = logits(original)
    assert torch.equal(logits(converted), expected)
    assert torch.equal(logits(load_official_network(target)), expected)
    # Another reader of the format sees the same tensors, the auxiliary head's too.
    state, written = original.state_dict(), load_file(target)
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)


def test_no_two_published_networks_fit_one_file():
    fitted = {}
    for name, entry in ZOO.items():
        with torch.device("meta"):
            # Of the same width, since the width is read off the file.
            state = CellNetwork(entry.genotype, 8, 3, 1000).state_dict()
        fitted[name] = {(key, tuple(value.shape)) for key, value in state.items()}
    assert len(fitted) == 16
    for one, other in itertools.combinations(fitted, 2):
        assert fitted[one] != fitted[other], (one, other)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_auxiliary_head_is_kept_or_left_out(tmp_path, auxiliary):
    source = official_file(tmp_path / "source.pt", network(ZOO["genas_flatness_c100"].genotype))
    convert_network(source, tmp_path / "n.safetensors", auxiliary=auxiliary)
    assert read_metadata(tmp_path / "n.safetensors")["arguments"]["auxiliary"] is auxiliary
    kept = load_official_network(tmp_path / "n.safetensors", auxiliary=auxiliary)
    assert (kept.auxiliary_head is not None) is auxiliary
    # A file without one converts all the same.
    bare = official_file(tmp_path / "bare.pt", network(ZOO["genas_flatness_c100"].genotype, auxiliary=False))
    assert convert_network(bare, tmp_path / "bare.safetensors").auxiliary_head is None


def test_an_unpublished_network_needs_its_genotype(tmp_path):
    original = network(FOREIGN)
    source, target = official_file(tmp_path / "mine.pt", original), tmp_path / "mine.safetensors"
    with pytest.raises(CheckpointError, match=r"mine\.pt fits none of the published genotypes \(genas_flatness_c100,"):
        convert_network(source, target)
    assert not target.exists()
    with pytest.raises(CheckpointError, match="does not fit a network of the genotype"):
        convert_network(source, target, ZOO["pdarts_c10"].genotype)
    assert not target.exists()
    assert torch.equal(logits(convert_network(source, target, FOREIGN)), logits(original))
    # Now the file says what it holds.
    again = convert_network(target, tmp_path / "again.safetensors")
    assert again.genotype.normal == FOREIGN.normal and torch.equal(logits(again), logits(original))


def test_our_own_file_keeps_its_own_genotype(tmp_path):
    genotype = ZOO["sdarts_rs_c10"].genotype
    path = save_network(network(genotype), tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match=f"holds the genotype {genotype}, not"):
        convert_network(path, tmp_path / "n.safetensors", FOREIGN)
    assert convert_network(path, tmp_path / "n.safetensors").genotype.normal == genotype.normal


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        convert_network(tmp_path / "none.pt", tmp_path / "n.safetensors")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match=r"no cells \(weight, bias\)"):
        convert_network(tmp_path / "linear.pt", tmp_path / "n.safetensors")
    source = official_file(tmp_path / "source.pt", network(ZOO["genas_flatness_c100"].genotype))
    with pytest.raises(ValueError, match=r"saved as \.safetensors, got the file name 'n\.pt'"):
        convert_network(source, tmp_path / "n.pt")
    with pytest.raises(TypeError, match="Expected a Genotype, got str"):
        convert_network(source, tmp_path / "n.safetensors", "pdarts_c10")
    assert {path.name for path in tmp_path.iterdir()} == {"linear.pt", "source.pt"}
