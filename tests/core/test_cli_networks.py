"""The `genas` command on networks: zoo beside the paper, fit, convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genas_plugins import ZOO, CellNetwork
from genas_plugins.checkpoints import load_official_network, read_metadata, read_state
from genas_plugins.cli import main
from genas_plugins.counting import count_macs

NAME = "genas_flatness_c100"


def test_zoo_shows_our_counts_beside_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith(f"{NAME} ")]
    # Table 2 of the paper: 5.2 M parameters, 0.58 G multiply-adds, 76.05 and 92.64 %.
    assert row[3:] == ["46", "5.195", "5.2", "579.5", "580", "76.05", "92.64"]


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if "params_million" in entry.paper])
def test_our_counts_round_to_the_papers(name: str) -> None:
    entry = ZOO[name]
    found = {"params_million": round(entry.params / 1e6, 1), "macs_giga": round(entry.macs_million / 1e3, 2)}
    # Two of the paper's differ in their last digit, which the notes of their entries say.
    paper = {"rlnas_c10": ("macs_giga", 0.59, 0.58), "fairdarts_b_c10": ("params_million", 4.8, 4.9)}
    if name in paper:
        key, printed, ours = paper[name]
        assert (entry.paper[key], found.pop(key)) == (printed, ours) and str(printed) in entry.note
    assert found == {key: entry.paper[key] for key in found}


def test_fit_prints_the_widest_network_within_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    # Brute force at 64 pixels: the first even width over 2 M, one step back.
    needed = {}
    for channels in range(2, 80, 2):
        with torch.device("meta"):
            needed[channels] = count_macs(CellNetwork(ZOO[NAME].genotype, channels, 14, 1000), 64)
        if needed[channels] > 2e6:
            break
    widest = channels - 2
    assert main(["fit", NAME, "--macs", "0.002G", "--image-size", "64"]) == 0
    values = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:3])
    assert values["init_channels"] == str(widest)
    assert values["MACs (M)"] == f"{needed[widest] / 1e6:.1f}"


@pytest.mark.parametrize("amount", ["0", "-1M", "many", "nan", "infG", ""])
def test_fit_refuses_an_amount_that_is_none(amount: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", NAME, f"--macs={amount}"])
    assert "expected a number such as 600M" in capsys.readouterr().err


def test_fit_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", NAME, "--macs", "1M"]) == 1
    assert "the narrowest (2 channels) needs 3.7 M at 224 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("drop", [False, True])
def test_convert_writes_a_clean_file(drop: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = CellNetwork(ZOO[NAME].genotype, 4, 6, 7, auxiliary=True)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.cells.0.total_ops"] = torch.zeros(1)
    torch.save({"epoch": 249, "state_dict": state, "best_acc_top1": 76.0, "optimizer": {}}, tmp_path / "official.tar")
    out = tmp_path / "clean.safetensors"
    command = ["convert", str(tmp_path / "official.tar"), str(out), "--genotype", NAME]
    assert main([*command, "--drop-auxiliary"] if drop else command) == 0
    printed = capsys.readouterr().out
    assert "6 cells, 7 classes" in printed
    assert printed.endswith(f"{'without' if drop else 'with'} the auxiliary head.\n")
    clean = read_state(out)
    kept = {name: value for name, value in network.state_dict().items() if not (drop and name.startswith("auxiliary"))}
    assert clean.keys() == kept.keys()
    assert all(torch.equal(clean[name], value) for name, value in kept.items())
    assert read_metadata(out)["source"] == "official.tar"
    assert load_official_network(out).genotype == ZOO[NAME].genotype


def test_convert_finds_the_published_genotype_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = CellNetwork(ZOO["pdarts_c10"].genotype, 4, 6, 7)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    assert main(["convert", str(tmp_path / "plain.pth"), str(tmp_path / "clean.safetensors")]) == 0
    assert load_official_network(tmp_path / "clean.safetensors").genotype == ZOO["pdarts_c10"].genotype
    assert str(ZOO["pdarts_c10"].genotype) in capsys.readouterr().out


def test_convert_writes_nothing_when_the_genotype_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = CellNetwork(ZOO["pdarts_c10"].genotype, 4, 6, 7)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    out = tmp_path / "clean.safetensors"
    assert main(["convert", str(tmp_path / "plain.pth"), str(out), "--genotype", NAME]) == 1
    message = capsys.readouterr().err
    assert "missing (cells." in message
    assert "left over (cells." in message
    assert not out.exists()
