"""Weights and archives from strangers: nothing in them runs, and none takes more memory or time than it has bytes."""

from __future__ import annotations

import bz2
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from genas_plugins import ZOO
from genas_plugins.checkpoints import CheckpointError, load_official_network, load_official_supernet, read_state
from genas_plugins.counting import count_macs, fit_channels
from genas_plugins.darts.network import CellNetwork, cell_shapes
from genas_plugins.darts.supernet import SuperNet
from genas_plugins.datasets._imagenet16 import load_array_pickle
from genas_plugins.nasbench201 import NasBench201SuperNet
from genas_plugins.nasbench201.truth import read_truth

GENOTYPE = ZOO["genas_flatness_c10"].genotype
GIGABYTE = 2**30


def network_tensors() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in CellNetwork(GENOTYPE, 4, 3, 10).state_dict().items()}


PEAK = """
import resource, sys
from genas_plugins.checkpoints import convert_network
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    convert_network(sys.argv[1], sys.argv[2], None)
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_number_expanded_to_gigabytes_is_refused_without_the_memory(tmp_path, warm):
    state = network_tensors()
    classes = 6_000_000
    state["classifier.weight"] = torch.zeros(1).as_strided((classes, 64), (0, 0))
    state["classifier.bias"] = torch.zeros(1).as_strided((classes,), (0,))
    torch.save(state, tmp_path / "in.pth")
    assert (tmp_path / "in.pth").stat().st_size < 200_000
    done = warm("torch")(PEAK, tmp_path / "in.pth", tmp_path / "out.safetensors", folder=tmp_path)
    refusal, kib = done.stdout.splitlines()
    assert "holds no dense tensors" in refusal and not (tmp_path / "out.safetensors").exists()
    assert int(kib) < 200_000


def test_small_tensors_that_were_saved_expanded_are_read(tmp_path):
    state = {"a": torch.tensor([2.0]).expand(3, 4), "b": torch.arange(6.0).view(2, 3).t()}
    torch.save(state, tmp_path / "file.pt")
    loaded = read_state(tmp_path / "file.pt")
    assert torch.equal(loaded["a"], torch.full((3, 4), 2.0)) and torch.equal(loaded["b"], state["b"])


def test_one_tensor_of_many_names_is_refused(tmp_path):
    shared = torch.zeros(500_000)
    torch.save({f"layer.{number}": shared for number in range(100)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"they claim 200,000,000 bytes in a file of 2,0\d\d,\d\d\d"):
        read_state(tmp_path / "file.pt")


def test_an_archive_that_was_compressed_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(20_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"bomb\.pt holds no dense tensors: they claim 80,000,\d{3} bytes"):
        read_state(tmp_path / "bomb.pt")


@pytest.mark.parametrize("claimed", [GIGABYTE, 2**50])
def test_a_header_that_the_file_does_not_bear_out_is_refused(claimed, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [claimed // 4], "data_offsets": [0, claimed]}}).encode()
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "file.safetensors")
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", claimed) + header)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "file.safetensors")


@pytest.mark.parametrize("kind", ["supernet", "network"])
@pytest.mark.parametrize("classes", [10**9, 2**62])
def test_sizes_without_elements_build_nothing(kind, classes, tmp_path):
    network = SuperNet(5, init_channels=4, num_cells=3) if kind == "supernet" else CellNetwork(GENOTYPE, 4, 3, 5)
    state = dict(network.state_dict()) | {"classifier.weight": torch.zeros(classes, 0)}
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"num_classes must be at most 16,777,216, got"):
        load_official_supernet(tmp_path / "file.pt") if kind == "supernet" else load_official_network(
            tmp_path / "file.pt", GENOTYPE
        )


def test_a_file_of_very_many_cells_is_refused_at_once(tmp_path):
    state = network_tensors() | {f"cells.{number}.x": torch.zeros(1) for number in range(20_000)}
    save_file(state, tmp_path / "file.safetensors")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="256 cells, got 4 and 20000"):
        load_official_network(tmp_path / "file.safetensors", GENOTYPE)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("genotype", ["[" * 100_000, "9" * 5000, json.dumps({"format": "x" * 10**6})])
def test_metadata_that_cannot_be_is_refused_in_a_line(genotype, tmp_path):
    save_file(network_tensors(), tmp_path / "n.safetensors", {"format": "genas-network", "genotype": genotype})
    with pytest.raises(CheckpointError, match=r"n\.safetensors") as caught:
        load_official_network(tmp_path / "n.safetensors")
    assert len(str(caught.value)) < 1000


def test_names_in_a_message_are_escaped_and_cut(tmp_path):
    torch.save({"\x1b[2J" + "x" * 10**6: torch.zeros(1), "\nb": torch.zeros(1)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"no cells \(\\x1b\[2Jx+ \.\.\. x+, \\nb\)") as caught:
        load_official_supernet(tmp_path / "file.pt")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "make",
    [
        lambda: cell_shapes(4, 10**9, "cifar"),
        lambda: cell_shapes(10**9, 8, "cifar"),
        lambda: NasBench201SuperNet(16, 10**9, 10),
        lambda: NasBench201SuperNet(10**9, 5, 10),
        lambda: CellNetwork(GENOTYPE, 4, 3, 10**12),
        lambda: fit_channels(GENOTYPE, num_cells=10**9),
        lambda: fit_channels(GENOTYPE, image_size=10**9),
    ],
)
def test_a_billion_of_anything_is_refused_at_once(make):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"at most|from 1 to"):
        make()
    assert time.monotonic() - start < 5


def test_the_widest_network_is_solved_for_and_not_counted_up():
    genotype = ZOO["pcdarts_c100"].genotype
    with torch.device("meta"):
        macs = {channels: count_macs(CellNetwork(genotype, channels, 5, 1000), 64) for channels in range(2, 42, 2)}
    for channels, needed in macs.items():
        if channels < 40:
            for budget in (needed, needed + 0.5, macs[channels + 2] - 1):
                assert fit_channels(genotype, budget, 64, 5) == channels
    with torch.device("meta"):
        wide = [count_macs(CellNetwork(genotype, channels, 5, 1000), 64) for channels in (65_534, 65_536)]
    assert [fit_channels(genotype, needed, 64, 5) for needed in (wide[1] - 1, wide[1])] == [65_534, 65_536]
    start = time.monotonic()
    for budget, message in ((1e30, "65,536 channels it needs"), (float("inf"), "finite"), (float("nan"), "finite")):
        with pytest.raises(ValueError, match=message):
            fit_channels(genotype, budget, 64, 5)
    assert time.monotonic() - start < 5


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_numpys_numbers_and_arrays_are_data(tmp_path):
    content = {
        "best": np.float64(0.75),
        "count": np.int64(3),
        "curve": np.arange(3.0),
        "state_dict": {"a": torch.ones(2), "b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.int64(7)},
    }
    torch.save(content, tmp_path / "FILE.PTH.TAR")
    state = read_state(tmp_path / "FILE.PTH.TAR")
    assert state["a"].tolist() == [1, 1] and state["b"].tolist() == [[0, 1, 2], [3, 4, 5]] and state["c"].item() == 7


@pytest.mark.parametrize(
    "evil",
    [
        Call(np.ndarray, (GIGABYTE,)),
        Call(np.empty(0).__reduce__()[0], np.ndarray, (GIGABYTE,), b"b"),
        Call(np.float64(0).__reduce__()[0], np.dtype(f"V{GIGABYTE}")),
        Call(os.mkdir, "executed"),
    ],
    ids=["ndarray", "reconstruct", "scalar", "code"],
)
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_no_pickle_makes_more_than_it_holds(kind, evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"data": evil, "labels": [1], "state_dict": {"a": torch.zeros(1)} if kind == "torch" else None}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "torch":
        torch.save(content, "file.pt")
        # An array that nothing was written to is refused by its size, or is empty.
        try:
            assert read_state("file.pt").keys() == {"a"}
        except CheckpointError as error:
            assert "file.pt" in str(error)
    else:
        Path("file").write_bytes(pickle.dumps(content, protocol=2))
        try:
            assert np.asarray(load_array_pickle("file")["data"]).nbytes == 0
        except ValueError as error:
            assert "refused as a data file" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert not Path("executed").exists()


def test_a_pickle_that_numbers_two_billion_results_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    with pytest.raises(ValueError, match="numbers more results than it has bytes"):
        load_array_pickle(path)


@pytest.mark.parametrize("place", ["archive", "folder"])
def test_an_archive_of_nats_bench_runs_nothing(place, tmp_path, monkeypatch):
    pytest.importorskip("nats_bench", reason="NATS-Bench is not installed")
    monkeypatch.chdir(tmp_path)
    content = {"meta_archs": [Call(os.mkdir, "executed")], "arch2infos": {}, "evaluated_indexes": [0]}
    Path("archive").mkdir()
    path = Path("NATS-tss-v1_0-3ffb9.pickle.pbz2") if place == "archive" else Path("archive/meta.pickle.pbz2")
    path.write_bytes(bz2.compress(pickle.dumps(content)))
    with pytest.raises(ValueError, match=r"archive|no test accuracy"):
        read_truth(path if place == "archive" else "archive")
    assert not Path("executed").exists()


def test_an_archive_of_nats_bench_unpacks_to_so_much_and_no_more(tmp_path):
    pytest.importorskip("nats_bench", reason="NATS-Bench is not installed")
    path = tmp_path / "NATS-tss-v1_0-3ffb9.pickle.pbz2"
    path.write_bytes(bz2.compress(pickle.dumps({"meta_archs": bytes(2**27)}, protocol=4)))
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="unpacks to far more than it is"):
        read_truth(path)
