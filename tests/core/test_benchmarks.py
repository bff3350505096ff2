"""The speed benchmarks run and print their tables; their figures are for a quiet machine, not for a test."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--init-channels", "2", "--num-cells", "2", "--image-size", "8", "--device", "cpu"]
IMAGES = ["--images", "4", "--recalibration-images", "4"]
NEEDS_NNI = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nni", "pytorch_lightning")),
    reason="NNI and Lightning are not installed",
)


@contextlib.contextmanager
def benchmarks() -> Iterator[Callable[[str], Any]]:
    """Imports a benchmark as Python does when it runs one: from a path that holds their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module
    for name in ("scoring", "training"):
        sys.modules.pop(name, None)


@pytest.fixture
def load() -> Iterator[Callable[[str], Any]]:
    with benchmarks() as imported:
        yield imported


@pytest.fixture(scope="module")
def scoring_printed() -> str:
    """All tables of the benchmark of scoring."""
    printed = io.StringIO()
    with benchmarks() as load, contextlib.redirect_stdout(printed):
        scoring = load("scoring")
        # Of a module that is thrown away.
        scoring.ROUNDS = 2
        assert scoring.main([*NETWORK, *IMAGES, "--candidates", "2", "--in-flight", "2", "--busy", "1"]) == 0
    return printed.getvalue()


def test_scoring_prints_a_row_per_candidate_and_the_targets(scoring_printed: str) -> None:
    rows = re.findall(r"^(\d)((?: +[\d.]+){5})$", scoring_printed, re.MULTILINE)
    assert [index for index, _ in rows] == ["0", "1"]
    for _, row in rows:
        ours, bare, naive, overhead, gain = map(float, row.split())
        # The printed seconds have three decimals.
        slack = 0.0006 / min(ours, bare)
        assert overhead == pytest.approx(ours / bare, rel=2 * slack + 0.001)
        assert gain == pytest.approx(naive / ours, rel=2 * slack + 0.01)
    assert re.search(r"^ours / bare .* <= 1\.15$", scoring_printed, re.MULTILINE)
    assert re.search(r"^naive / ours .* >= 5\.0$", scoring_printed, re.MULTILINE)
    peak = r"^peak memory \[MB\].* \d+ -> \d+ \([+-][\d.]+%\) +< \+5%$"
    assert re.search(peak, scoring_printed, re.MULTILINE)


def test_scoring_several_at_a_time_is_held_against_one_after_another(scoring_printed: str) -> None:
    table = scoring_printed[scoring_printed.index("in flight") :]
    rows = re.findall(
        r"^(\d) +([\d.]+) \(([\d.]+) - ([\d.]+)\) +([\d.]+) \(([\d.]+) - ([\d.]+)\)$", table, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["1", "2"]
    assert set(rows[0][4:]) == {"1.000"}
    (_, _, least, most, *_), (_, _, lowest, highest, *ratios) = ([float(number) for number in row] for row in rows)
    assert all(0.99 * lowest / most <= ratio <= 1.01 * highest / least for ratio in ratios)


def test_scoring_beside_other_work_is_held_against_scoring_alone(scoring_printed: str) -> None:
    number = r"([\d.]+) \([\d.]+ - [\d.]+\)"
    alone = re.search(rf"^alone \[s\], 1 in flight +{number}$", scoring_printed, re.MULTILINE)
    beside = re.search(rf"^beside 1 busy processes \[s\] +{number}$", scoring_printed, re.MULTILINE)
    assert alone and beside and float(alone[1]) > 0 and float(beside[1]) > 0
    assert re.search(rf"^beside / alone +{number} +<= 3\.0$", scoring_printed, re.MULTILINE)


def test_busy_processes_are_busy_and_do_not_outlive_their_parent(load: Callable[[str], Any]) -> None:
    scoring = load("scoring")
    parent = textwrap.dedent(
        """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
        print(child.pid, flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", parent, scoring.RESTLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        wait_until(lambda: cpu_seconds(child) > 0.1)
        process.kill()
    wait_until(lambda: not alive(child))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stat(pid: int) -> list[str]:
    """The fields of Linux's file behind the name of the command, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def cpu_seconds(pid: int) -> float:
    user, system = map(int, stat(pid)[11:13])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    try:
        # Who waits for nobody to ask how it ended is dead.
        return stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# With 2 channels, PyTorch's gradient of the plain loop's strided convolutions writes beyond its memory.
TRAINING = [*NETWORK, "--init-channels", "4", "--steps", "4", "--batch-size", "2"]


def check_training(printed: str) -> None:
    rows = re.findall(r"^(\d)\.\.(\d)((?: +[\d.]+){3})$", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "2"), ("3", "3")]
    for *_, row in rows:
        ours, plain, ratio = map(float, row.split())
        assert ratio == pytest.approx(plain / ours, rel=0.1 / min(ours, plain) + 0.001)
    assert re.search(r"^plain / ours, blocks .* >= 1\.15$", printed, re.MULTILINE)
    difference = re.search(r"^largest difference of a parameter, float64 +(\S+) +<= 1e-08$", printed, re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) <= 1e-8


@NEEDS_NNI
def test_training_ends_where_the_plain_loop_does(
    load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = load("training")
    assert training.main(TRAINING) == 0
    check_training(capsys.readouterr().out)
    for arm in ("ours", "plain"):
        assert training.main([*TRAINING, "--memory-of", arm]) == 0
        # Of this process, whose peak was earlier.
        assert float(capsys.readouterr().out) >= 0


@NEEDS_NNI
@pytest.mark.slow
def test_training_tells_the_memory_of_processes_of_their_own() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), *TRAINING, "--threads", "1", "--memory"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check_training(done.stdout)
    peak = r"^peak memory that training adds, ours / plain \[MB\] +\S+ / \S+ +no more$"
    assert re.search(peak, done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "option", "expected"),
    [
        ("scoring", "--candidates", "--candidates must be at least 1"),
        ("scoring", "--images", "--images must be at least 1"),
        ("scoring", "--recalibration-images", "--recalibration-images must be at least 1"),
        ("scoring", "--in-flight", "--in-flight must be at least 1"),
        ("scoring", "--busy", "--busy must be at least 1"),
        pytest.param("training", "--steps", "--steps must be at least 2", marks=NEEDS_NNI),
    ],
)
def test_a_run_of_nothing_is_refused(
    load: Callable[[str], Any], capsys: pytest.CaptureFixture[str], name: str, option: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(name).main([option, "0"])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "value"),
    [("MOST_OVERHEAD", 0.0), ("LEAST_GAIN", {"cpu": float("inf")}), ("MOST_GROWTH", -1.0), (None, None)],
)
def test_check_fails_on_every_missed_target(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, target: str | None, value: Any
) -> None:
    scoring = load("scoring")
    for name, easy in (("MOST_OVERHEAD", 1e9), ("LEAST_GAIN", {"cpu": 0.0}), ("MOST_GROWTH", 1e9)):
        monkeypatch.setattr(scoring, name, value if name == target else easy)
    monkeypatch.setattr(scoring, "ROUNDS", 1)
    arguments = [*NETWORK, "--candidates", "1", "--images", "2", "--recalibration-images", "2"]
    assert scoring.main([*arguments, "--check"]) == (0 if target is None else 1)
