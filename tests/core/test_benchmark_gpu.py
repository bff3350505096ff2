"""The benchmark that runs all others on a GPU: each step once, cut off and resumed, and a report of what there is."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    sys.modules.pop("gpu", None)


@pytest.fixture
def steps(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes steps of scripts, given by name as Python code that notes its runs; returns the notes."""

    def make(needs: dict[str, tuple[str, ...]] | None = None, resumed: str = "", **scripts: str) -> Path:
        notes = tmp_path / "notes"
        made = []
        for name, code in scripts.items():
            path = tmp_path / f"{name}.py"
            note = f"import sys; open({str(notes)!r}, 'a').write(' '.join([{name!r}, *sys.argv[1:]]) + '\\n')\n"
            path.write_text(note + code)
            more = {"resumed": resumed} if resumed else {}
            made.append(gpu.Step(name, f"{path} {{device}}", (needs or {}).get(name, ()), **more))
        monkeypatch.setattr(gpu, "STEPS", tuple(made))
        return notes

    return make


def test_each_step_is_done_once_and_told(gpu: Any, steps: Callable[..., Path], tmp_path: Path) -> None:
    notes = steps(one="print('first')\nprint('7 times')\n", two="print('a | b')")
    output = tmp_path / "out"
    for _ in range(2):
        assert gpu.main([str(output), "--device", "cpu"]) == 0
        assert notes.read_text().splitlines() == ["one cpu", "two cpu"]
    assert (output / "one.txt").read_text() == "first\n7 times\n"
    record = json.loads((output / "one.json").read_text())
    assert (record["code"], record["last"]) == (0, "7 times")
    assert f"torch {torch.__version__.partition('+')[0]}" in record["machine"]
    report = (output / "report.md").read_text()
    assert report.startswith(record["machine"])
    assert re.search(r"^\| one \| `python \S+one.py cpu` \| 0 \| [\d.]+ \| 20\S+ \| 7 times \|$", report, re.MULTILINE)
    # A bar would end the cell.
    assert "| a / b |" in report


def test_a_missed_target_is_told_and_the_others_are_done(gpu: Any, steps: Callable[..., Path], tmp_path: Path) -> None:
    steps(one="print('A target is missed.'); sys.exit(1)", two="print('yes')")
    assert gpu.main([str(tmp_path / "out"), "--device", "cpu"]) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 |" in report and "A target is missed." in report and "| yes |" in report
    assert gpu.main([str(tmp_path / "out"), "--device", "cpu", "--only", "two"]) == 0


def test_what_does_not_fit_the_call_is_begun_in_the_next(gpu: Any, steps: Callable[..., Path], tmp_path: Path) -> None:
    notes = steps(one="import time; time.sleep(0.3)", two="import time; time.sleep(100)")
    arguments = [str(tmp_path / "out"), "--device", "cpu", "--minutes", "0.03"]
    assert gpu.main(arguments) == 3
    assert notes.read_text().split()[::2] == ["one", "two"]
    assert "| two | | | | | not done yet |" in (tmp_path / "out" / "report.md").read_text()
    # With a whole call it does not get further either.
    assert gpu.main(arguments) == 1
    assert notes.read_text().split()[::2] == ["one", "two", "two"]
    assert json.loads((tmp_path / "out" / "two.json").read_text())["code"] == 124


def test_a_search_goes_on_in_as_many_calls_as_it_takes(gpu: Any, steps: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "out" / "digits"
    code = f"""
import os, time
os.makedirs({str(run)!r}, exist_ok=True)
open({str(run / "config.yaml")!r}, "w").close()
if sys.argv[-1] != "--resume":
    time.sleep(100)
"""
    notes = steps(resumed="--resume", one=code)
    arguments = [str(tmp_path / "out"), "--device", "cpu", "--minutes", "0.02"]
    assert gpu.main(arguments) == 3
    assert gpu.main(arguments) == 0
    first, second = notes.read_text().splitlines()
    assert first.startswith("one cpu --config quickstart_digits --set training.accelerator=cpu --set score.")
    assert second == "one cpu --resume"


def test_without_its_host_a_step_is_named_and_left_out(gpu: Any, steps: Callable[..., Path], tmp_path: Path) -> None:
    notes = steps(needs={"one": ("no_such_host",)}, one="", two="")
    assert gpu.main([str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert notes.read_text() == "two cpu\n"
    assert "| one | | | | | needs no_such_host |" in (tmp_path / "out" / "report.md").read_text()


def test_the_steps_are_commands_that_there_are(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["runs/gpu", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in listed] == [step.name for step in gpu.STEPS]
    common = (FOLDER / "scoring.py").read_text()
    for step in gpu.STEPS:
        script, *arguments = step.command.split()
        if not script.startswith("benchmarks/"):
            continue
        text = (FOLDER / Path(script).name).read_text()
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert f'"{option}"' in text + common, step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0", "--device", "cpu"], "--minutes must be above 0, got 0.0"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        pytest.param(
            [],
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none"),
        ),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], message: str, gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
