"""Checkpoints: official files, written from their documented names alone, ours, and what is neither."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from genas_plugins.checkpoints import (
    CheckpointError,
    load_official_network,
    load_official_supernet,
    load_supernet,
    read_metadata,
    read_state,
    save_network,
    save_supernet,
)
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.network import CellNetwork
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.darts.zoo import ZOO

GENOTYPE = ZOO["genas_flatness_c100"].genotype
PREFIX = "training_module._model.network.supernet."


class OfficialNames:
    """Tensors under the names that the official modules give them, without any module of ours."""

    def __init__(self, seed: int = 0) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator)

    def bn(self, name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            self.weight(f"{name}.{entry}", channels)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(len(self.state))

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.weight(f"{name}.weight", outputs, inputs)
        self.weight(f"{name}.bias", outputs)

    def reduce(self, name: str, inputs: int, outputs: int) -> None:
        self.weight(f"{name}.conv_1.weight", outputs // 2, inputs, 1, 1)
        self.weight(f"{name}.conv_2.weight", outputs // 2, inputs, 1, 1)
        self.bn(f"{name}.bn", outputs)

    def operation(self, name: str, kind: str, channels: int, stride: int, pool_bn: bool = False) -> None:
        kernel = int(kind[-1]) if kind[-1].isdigit() else 0
        if kind == "skip_connect" and stride == 2:
            self.reduce(name, channels, channels)
        elif "pool" in kind and pool_bn:
            self.bn(f"{name}.1", channels)
        elif "conv" in kind:
            for first in (1, 5) if kind.startswith("sep") else (1,):
                self.weight(f"{name}.op.{first}.weight", channels, 1, kernel, kernel)
                self.weight(f"{name}.op.{first + 1}.weight", channels, channels, 1, 1)
                self.bn(f"{name}.op.{first + 2}", channels)

    def stem(self, kind: str, channels: int) -> int:
        if kind == "cifar":
            self.weight("stem.0.weight", 3 * channels, 3, 3, 3)
            self.bn("stem.1", 3 * channels)
            return 3 * channels
        self.weight("stem0.0.weight", channels // 2, 3, 3, 3)
        self.bn("stem0.1", channels // 2)
        self.weight("stem0.3.weight", channels, channels // 2, 3, 3)
        self.bn("stem0.4", channels)
        self.weight("stem1.1.weight", channels, channels, 3, 3)
        self.bn("stem1.2", channels)
        return channels

    def auxiliary_head(self, kind: str, inputs: int, classes: int) -> None:
        self.weight("auxiliary_head.features.2.weight", 128, inputs, 1, 1)
        self.bn("auxiliary_head.features.3", 128)
        self.weight("auxiliary_head.features.5.weight", 768, 128, 2, 2)
        if kind == "cifar":
            self.bn("auxiliary_head.features.6", 768)
        self.linear("auxiliary_head.classifier", 768, classes)


def official(
    channels: int,
    cells: int,
    classes: int,
    stem: str = "cifar",
    genotype: Genotype | None = None,
    auxiliary: bool = False,
) -> dict[str, torch.Tensor]:
    """A state_dict as the official code names it: a supernet, or the network of a genotype."""
    names = OfficialNames()
    convolutions = [f"{kind}_conv_{size}x{size}" for kind in ("sep", "dil") for size in (3, 5)]
    operations = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", *convolutions]
    before = previous = names.stem(stem, channels)
    reduced = stem == "imagenet"
    for index in range(cells):
        reduction = index in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduction else 1
        cell = f"cells.{index}"
        for name, inputs, halve in (("preprocess0", before, reduced), ("preprocess1", previous, False)):
            if halve:
                names.reduce(f"{cell}.{name}", inputs, channels)
            else:
                names.weight(f"{cell}.{name}.op.1.weight", channels, inputs, 1, 1)
                names.bn(f"{cell}.{name}.op.2", channels)
        if genotype is None:
            sources = [source for node in range(2, 6) for source in range(node)]
            for edge, source in enumerate(sources):
                for number, kind in enumerate(operations, start=1):
                    stride = 2 if reduction and source < 2 else 1
                    names.operation(f"{cell}._ops.{edge}._ops.{number}", kind, channels, stride, pool_bn=True)
        else:
            for position, (kind, source) in enumerate(genotype.reduce if reduction else genotype.normal):
                stride = 2 if reduction and source < 2 else 1
                names.operation(f"{cell}._ops.{position}", kind, channels, stride)
        before, previous, reduced = previous, 4 * channels, reduction
        if auxiliary and index == 2 * cells // 3:
            names.auxiliary_head(stem, previous, classes)
    names.linear("classifier", previous, classes)
    return names.state


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def assert_holds(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """A supernet of three cells, so that files stay small."""
    return official(4, 3, 5)


def test_documented_names_are_covered():
    state = official(16, 8, 100)
    assert {
        "stem.0.weight",
        "cells.0.preprocess0.op.1.weight",
        "cells.0._ops.3._ops.4.op.1.weight",
        "cells.0._ops.1._ops.1.1.weight",
        "cells.2._ops.0._ops.3.conv_1.weight",
        "cells.3.preprocess0.conv_1.weight",
        "classifier.weight",
    } <= state.keys()
    assert not any("._ops.0." in name.partition("_ops.")[2] for name in state if "cells" in name)
    state = official(8, 3, 5, "imagenet", GENOTYPE, auxiliary=True)
    assert {
        "stem0.0.weight",
        "stem1.1.weight",
        "cells.0._ops.1.op.1.weight",
        "cells.0.preprocess0.conv_1.weight",
        "auxiliary_head.features.2.weight",
        "classifier.weight",
    } <= state.keys()


@pytest.mark.parametrize(("prefix", "legacy"), [("", True), ("module.", False)])
def test_official_supernet(tmp_path, prefix, legacy):
    state = official(16, 8, 100)
    stored = prefixed(state, prefix)
    for name in ("total_ops", f"{prefix}total_params", f"{prefix}cells.0._ops.1.total_ops"):
        stored[name] = torch.zeros(1)
    path = tmp_path / "checkpoint_epoch_250.pth.tar"
    content = {"epoch": 249, "state_dict": stored, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    generator_before = torch.random.get_rng_state()
    supernet = load_official_supernet(path)
    assert torch.equal(torch.random.get_rng_state(), generator_before)
    assert dict(supernet.arguments) == {
        "num_classes": 100,
        "init_channels": 16,
        "num_cells": 8,
        "stem": "cifar",
    }
    assert_holds(supernet, state)
    assert all(parameter.requires_grad for parameter in supernet.parameters())
    assert supernet.training
    with torch.no_grad():
        assert supernet.eval()(torch.zeros(1, 3, 8, 8), GENOTYPE).shape == (1, 100)


@pytest.mark.parametrize(("stem", "cells"), [("imagenet", 4), ("cifar", 2), ("imagenet", 2)])
def test_supernet_of_any_shape(tmp_path, stem, cells):
    state = official(6, cells, 3, stem)
    torch.save(state, tmp_path / "state.pt")
    supernet = load_official_supernet(tmp_path / "state.pt")
    assert dict(supernet.arguments) == {
        "num_classes": 3,
        "init_channels": 6,
        "num_cells": cells,
        "stem": stem,
    }
    assert_holds(supernet, state)


def test_lightning_checkpoint(tmp_path, small):
    content = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": prefixed(small, PREFIX),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    torch.save(content, tmp_path / "supernet.ckpt")
    assert_holds(load_official_supernet(tmp_path / "supernet.ckpt"), small)


def test_plain_safetensors(tmp_path, small):
    save_file(prefixed(small, "module."), tmp_path / "x.safetensors", {"format": "pt", "note": "not JSON"})
    assert read_metadata(tmp_path / "x.safetensors") == {}
    assert_holds(load_official_supernet(tmp_path / "x.safetensors"), small)
    assert_holds(load_supernet(tmp_path / "x.safetensors"), small)


def test_dtype_is_that_of_the_file(tmp_path, small):
    half = {name: value.half() if value.is_floating_point() else value for name, value in small.items()}
    torch.save(half, tmp_path / "half.pt")
    assert_holds(load_official_supernet(tmp_path / "half.pt"), half)


def test_loaded_tensors_are_independent(tmp_path, small):
    state = dict(small)
    bias = torch.ones(1).expand_as(state["stem.1.bias"])
    state["stem.1.bias"] = state["stem.1.weight"] = bias
    torch.save(state, tmp_path / "views.pt")
    supernet = load_official_supernet(tmp_path / "views.pt")
    with torch.no_grad():
        supernet.stem[1].bias[0] += 1
    assert supernet.stem[1].bias.tolist() == [2.0] + [1.0] * 11
    assert supernet.stem[1].weight.tolist() == [1.0] * 12


def saved(tmp_path, state: dict[str, torch.Tensor]) -> str:
    torch.save({"state_dict": state}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def test_missing_tensor_is_named(tmp_path, small):
    state = {name: value for name, value in small.items() if name != "cells.1._ops.3._ops.4.op.6.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(cells\.1\._ops\.3\._ops\.4\.op\.6\.weight\)\.$"):
        load_official_supernet(saved(tmp_path, state))


def test_left_over_tensor_is_named(tmp_path, small):
    state = {**small, "cells.1._ops.3._ops.8.op.1.weight": torch.zeros(1), "cells.77.x": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"left over \(.*cells\.77\.x\)"):
        load_official_supernet(saved(tmp_path, state))


def test_a_foreign_cell_number_builds_nothing_large(tmp_path, small):
    with pytest.raises(CheckpointError, match=r"left over \(cells\.99999999999\.x\)"):
        load_official_supernet(saved(tmp_path, {**small, "cells.99999999999.x": torch.zeros(1)}))


def test_tensors_outside_of_the_prefix_are_left_over(tmp_path, small):
    state = prefixed(small, "module.")
    state["stem.0.weight"] = state.pop("module.stem.0.weight")
    with pytest.raises(CheckpointError, match=r"lacks stem\.0\.weight"):
        load_official_supernet(saved(tmp_path, state))
    state = prefixed(small, "module.") | {"classifier.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"1 left over \(\./classifier\.bias\)\.$"):
        load_official_supernet(saved(tmp_path, state))


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (torch.zeros(4, 12, 3, 3), r"\(4, 12, 3, 3\) float instead of \(4, 12, 1, 1\) float"),
        (torch.zeros(4, 12, 1, 1, dtype=torch.int64), r"\(4, 12, 1, 1\) integer instead of"),
    ],
)
def test_different_tensor_is_described(tmp_path, small, value, described):
    state = {**small, "cells.0.preprocess1.op.1.weight": value}
    message = rf"1 different \(cells\.0\.preprocess1\.op\.1\.weight is {described}"
    with pytest.raises(CheckpointError, match=message):
        load_official_supernet(saved(tmp_path, state))


def test_long_lists_are_cut(tmp_path, small):
    state = {name: value for name, value in small.items() if not name.startswith("cells.2._ops.13")}
    with pytest.raises(CheckpointError, match=r"\d+ missing \((cells[\w.]+, ){4}\.\.\.\)") as caught:
        load_official_supernet(saved(tmp_path, state))
    missing = len(small) - len(state)
    assert f"{missing} missing" in str(caught.value)


def test_ambiguous_prefixes(tmp_path, small):
    state = prefixed(small, "network.") | prefixed(small, "initial.")
    with pytest.raises(CheckpointError, match=r"2 networks, under \['initial\.', 'network\.'\]"):
        load_official_supernet(saved(tmp_path, state))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stem.0.weight", torch.tensor(1.0), r"lacks stem\.0\.weight"),
        ("stem.0.weight", torch.zeros(9, 3, 3, 3), "positive even number, got 3"),
        ("classifier.weight", torch.zeros(0, 32), "num_classes must be at least 1"),
    ],
)
def test_shapes_of_no_network(tmp_path, small, name, value, message):
    with pytest.raises(CheckpointError, match=message):
        load_official_supernet(saved(tmp_path, {**small, name: value}))


def test_other_networks(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict()
    with pytest.raises(CheckpointError, match=r"no cells \(0\.weight, 0\.bias\)"):
        load_official_supernet(saved(tmp_path, state))


@pytest.mark.parametrize(("stem", "cells"), [("imagenet", 5), ("cifar", 6)])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_official_network(tmp_path, stem, cells, auxiliary):
    genotype = ZOO["pcdarts_c100"].genotype
    state = official(8, cells, 10, stem, genotype, auxiliary=True)
    stored = prefixed(state, "module.") | {"module.cells.1._ops.0.total_params": torch.zeros(1)}
    content = {"epoch": 250, "state_dict": stored, "best_acc_top1": torch.tensor(76.0), "optimizer": {}}
    torch.save(content, tmp_path / "model_best.pth.tar")
    network = load_official_network(tmp_path / "model_best.pth.tar", genotype, auxiliary=auxiliary)
    if not auxiliary:
        state = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    assert_holds(network, state)
    assert network.genotype.normal == genotype.normal
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_auxiliary_head_that_is_not_there(tmp_path):
    path = saved(tmp_path, official(4, 3, 5, "cifar", GENOTYPE))
    with pytest.raises(CheckpointError, match=r"no auxiliary_head\.\* tensors: load it with auxiliary=False"):
        load_official_network(path, GENOTYPE, auxiliary=True)


def test_wrong_genotype(tmp_path):
    path = saved(tmp_path, official(4, 3, 5, "cifar", GENOTYPE))
    with pytest.raises(CheckpointError, match=r"missing \(cells.*left over \(cells") as caught:
        load_official_network(path, ZOO["dropnas_c100"].genotype)
    assert str(ZOO["dropnas_c100"].genotype) in str(caught.value)


def test_genotype_is_needed(tmp_path):
    path = saved(tmp_path, official(4, 3, 5, "cifar", GENOTYPE))
    with pytest.raises(CheckpointError, match="pass genotype="):
        load_official_network(path)
    with pytest.raises(TypeError, match="Expected a Genotype, got str"):
        load_official_network(path, "genas_flatness_c100")


def test_supernet_and_network_are_not_taken_for_each_other(tmp_path, small):
    with pytest.raises(CheckpointError, match="left over"):
        load_official_network(saved(tmp_path, small), GENOTYPE)
    with pytest.raises(CheckpointError, match="missing"):
        load_official_supernet(saved(tmp_path, official(4, 3, 5, "cifar", GENOTYPE)))
    network = CellNetwork(GENOTYPE, 4, 3, 5, stem="cifar")
    path = save_network(network, tmp_path / "network.safetensors")
    with pytest.raises(CheckpointError, match="fixed network, no supernet"):
        load_supernet(path)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_supernet_round_trip(tmp_path, stem):
    supernet = SuperNet(5, init_channels=4, num_cells=3, stem=stem).double()
    supernet.to(memory_format=torch.channels_last)
    path = save_supernet(supernet, tmp_path / "s.safetensors", epochs=3, data={"name": "CIFAR-10"})
    loaded = load_supernet(path)
    assert loaded.arguments == supernet.arguments
    assert_holds(loaded, supernet.state_dict())
    metadata = read_metadata(path)
    assert metadata.pop("arguments") == dict(supernet.arguments)
    assert metadata == {"format": "genas-supernet", "epochs": 3, "data": {"name": "CIFAR-10"}}
    # Another reader of the format sees the same values.
    assert torch.equal(load_file(path)["classifier.weight"], supernet.classifier.weight)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("name", ["sdarts_rs_c10", "missing edges"])
def test_network_round_trip_keeps_the_order_of_pairs(tmp_path, auxiliary, name):
    # The same operation on swapped inputs: restored by its code alone, it would load, and compute nonsense.
    genotype = ZOO["sdarts_rs_c10" if name in ZOO else "fairdarts_b_c10"].genotype
    if name not in ZOO:
        # The first pair of each node is the one that may miss.
        genotype = Genotype([genotype.normal[place ^ 1] for place in range(8)], genotype.reduce)
    network = CellNetwork(genotype, 4, 3, 5, stem="cifar", auxiliary=auxiliary)
    network.to(memory_format=torch.channels_last)
    path = save_network(network, tmp_path / "n.safetensors", top1=76.05)
    by_code = Genotype.from_code(genotype.code)
    assert by_code.normal != genotype.normal
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for given in (None, genotype, by_code):
        loaded = load_official_network(path, given, auxiliary=auxiliary)
        assert loaded.genotype.normal == genotype.normal
        assert_holds(loaded, network.state_dict())
        with torch.no_grad():
            # Contiguous and channels-last kernels add in another order.
            torch.testing.assert_close(loaded.eval()(images), network.eval()(images), rtol=1e-4, atol=1e-5)
    metadata = read_metadata(path)
    assert metadata["genotype"]["code"] == list(genotype.code)
    assert metadata["arguments"] == {
        "num_classes": 5,
        "init_channels": 4,
        "num_cells": 3,
        "stem": "cifar",
        "auxiliary": auxiliary,
    }
    assert metadata["top1"] == 76.05
    with pytest.raises(CheckpointError, match=f"holds the genotype {genotype}, not {GENOTYPE}"):
        load_official_network(path, GENOTYPE)


@pytest.mark.parametrize("genotype", ["not JSON", '"text"', "[1, 2]", '{"format": "genas-genotype"}'])
def test_damaged_metadata(tmp_path, genotype):
    state = official(4, 3, 5, "cifar", GENOTYPE)
    path = tmp_path / "n.safetensors"
    save_file(state, path, {"format": "genas-network", "arguments": "{}", "genotype": genotype})
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_official_network(path)


def test_saving_refuses_bad_input(tmp_path):
    supernet = SuperNet(2, init_channels=2, num_cells=2)
    with pytest.raises(ValueError, match=r"saved as \.safetensors, got the file name 'supernet\.pt'"):
        save_supernet(supernet, tmp_path / "supernet.pt")
    with pytest.raises(ValueError, match="uses the metadata names format"):
        save_supernet(supernet, tmp_path / "s.safetensors", format="mine")
    with pytest.raises(TypeError, match="serializable"):
        save_supernet(supernet, tmp_path / "s.safetensors", model=supernet)
    with pytest.raises(TypeError, match="Expected a supernet, got SubNet"):
        save_supernet(supernet.subnet(GENOTYPE), tmp_path / "s.safetensors")
    with pytest.raises(TypeError, match="Expected a CellNetwork, got SuperNet"):
        save_network(supernet, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="meta device"):
        save_supernet(supernet.to("meta"), tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_the_old_file(tmp_path):
    path = save_supernet(SuperNet(2, init_channels=2, num_cells=2), tmp_path / "s.safetensors")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A real error of the operating system, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_supernet(SuperNet(3, init_channels=2, num_cells=2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path):
    readers = (read_state, read_metadata, load_supernet, load_official_supernet, load_official_network)
    for reader in readers:
        for name in ("none.pt", "none.safetensors", ""):
            with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
                reader(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"epoch 1\n", b"<!DOCTYPE html><html>", b"cat sat\n", b"{}", b"\x80\x02", bytes(4096)],
)
def test_files_of_another_kind(tmp_path, suffix, content):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".* is damaged or is not a checkpoint"):
        read_state(path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_supernet(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, kind):
    state = {f"layer.{number}": torch.ones(3, 2) for number in range(4)}
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        # A name that is cut short may look like one of foreign code.
        with pytest.raises(CheckpointError, match=r"is damaged or is not a checkpoint|could execute code"):
            read_state(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        {},
        {"state_dict": [1]},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.eye(2).to_sparse()},
    ],
)
def test_contents_of_another_kind(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt holds .*save model\.state_dict"):
        read_state(tmp_path / "file.pt")


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 0", "pickle 2"])
def test_code_is_not_executed(tmp_path, kind):
    witness, path = tmp_path / "witness", tmp_path / "evil.pth.tar"
    content = {"state_dict": {"stem.0.weight": torch.zeros(1)}, "optimizer": Payload(f"touch {witness}")}
    if kind in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_bytes(pickle.dumps(content["optimizer"], protocol=int(kind[-1])))
    with pytest.raises(CheckpointError, match=r"evil\.pth\.tar is not loaded because it refers to") as caught:
        load_official_supernet(path)
    assert f"{os.system.__module__}.system, which could execute code" in str(caught.value)
    # torch's own advice, to load the file without protection, does not reach the user.
    assert caught.value.__cause__ is None
    assert "weights_only" not in str(caught.value)
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_modern_pickle_is_not_executed(tmp_path):
    witness, path = tmp_path / "witness", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload(f"touch {witness}"), protocol=5))
    with pytest.raises(CheckpointError, match=r"evil\.pkl is damaged or is not a checkpoint"):
        read_state(path)
    assert not witness.exists()


def test_metadata_is_readable_without_us(tmp_path):
    from safetensors import safe_open

    path = save_network(CellNetwork(GENOTYPE, 4, 3, 5, stem="cifar"), tmp_path / "n.safetensors")
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "genas-network"
    assert json.loads(metadata["genotype"])["code"] == list(GENOTYPE.code)
