"""The two commands that measure on a GPU: shares of the time, calls that end early, kits, and what comes back."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
MODULES = ("gpu", "gpu_plans", "gpu_kit", "gpu_collect")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def gpu(modules: Any) -> Any:
    return modules("gpu")


@pytest.fixture
def plan(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a plan of scripts, given by name as Python code that notes its runs; returns the notes."""

    def make(options: dict[str, dict[str, Any]] | None = None, networks: str = "", **scripts: str) -> Path:
        notes = tmp_path / "notes"
        steps = []
        for name, code in scripts.items():
            path = tmp_path / f"{name}.py"
            note = f"import sys; open({str(notes)!r}, 'a').write(' '.join([{name!r}, *sys.argv[1:]]) + '\\n')\n"
            path.write_text(note + code)
            own = {"share": 10.0, **(options or {}).get(name, {})}
            steps.append(gpu.Step(name, f"shows {name}", command=f"{path} {{device}} {{seconds}}", **own))
        monkeypatch.setattr(gpu, "PLANS", {"speed": gpu.Plan(4, tuple(steps), networks=networks)})
        return notes

    return make


def run(gpu: Any, tmp_path: Path, *more: str) -> int:
    return gpu.main([str(tmp_path / "out"), "--device", "cpu", *more])


def test_each_step_is_done_once_and_told(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    notes = plan(one="print('first')\nprint('7 times')\n", two="print('a | b')")
    for _ in range(2):
        assert run(gpu, tmp_path) == 0
        assert [line.split()[0] for line in notes.read_text().splitlines()] == ["one", "two"]
    output = tmp_path / "out" / "speed"
    assert (output / "one.txt").read_text() == "first\n7 times\n"
    record = json.loads((output / "one.json").read_text())
    assert (record["code"], record["last"]) == (0, "7 times")
    assert f"torch {torch.__version__.partition('+')[0]}" in record["machine"]
    report = (output / "report.md").read_text()
    assert report.startswith(record["machine"])
    assert re.search(r"^\| one \| shows one \| 0 \| [\d.]+ \| 20\S+ \| 7 times \|$", report, re.MULTILINE)
    assert re.search(r"^`python \S+one.py cpu \d+`\n\n```\nfirst\n7 times\n```$", report, re.MULTILINE)
    # A bar would end the cell.
    assert "| a / b |" in report


def test_a_missed_target_is_told_and_the_others_are_done(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    plan(one="print('A target is missed.'); sys.exit(1)", two="print('yes')")
    assert run(gpu, tmp_path) == 1
    report = (tmp_path / "out" / "speed" / "report.md").read_text()
    assert "| 1 |" in report and "A target is missed." in report and "| yes |" in report
    assert run(gpu, tmp_path, "--only", "two") == 0


def test_what_a_step_leaves_of_its_share_the_others_get(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    notes = plan({"one": {"share": 40.0}, "two": {"share": 80.0}}, one="", two="")
    assert run(gpu, tmp_path, "--minutes", "2") == 0
    given = [int(line.split()[2]) for line in notes.read_text().splitlines()]
    # Less ten seconds in which a command is to end by itself: a third of 120 seconds, then nearly all of them.
    assert given[0] == 30
    assert 100 <= given[1] <= 110


def test_a_step_that_takes_longer_than_its_share_is_cut_off_and_tried_again(
    gpu: Any, plan: Callable[..., Path], tmp_path: Path
) -> None:
    notes = plan(one="print('begun', flush=True); import time; time.sleep(100)", two="print('done')")
    arguments = ("--minutes", "0.05")
    assert run(gpu, tmp_path, *arguments) == 3
    report = (tmp_path / "out" / "speed" / "report.md").read_text()
    assert re.search(r"\| one \| shows one \| cut off \| \S+ \| \S+ \| begun \|", report)
    assert "| done |" in report
    # With all of a call it does not get further either.
    assert run(gpu, tmp_path, *arguments) == 1
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["one", "two", "one"]
    assert json.loads((tmp_path / "out" / "speed" / "one.json").read_text())["code"] == 124


def test_a_step_is_cut_off_in_a_background_job_too(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, which is what ends a step."""
    plan(one="import time; time.sleep(100)", two="print('done')")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(gpu, tmp_path, "--minutes", "0.05") == 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "out" / "speed" / "one.json").read_text())["seconds"] < gpu.PATIENCE
    assert "| done |" in (tmp_path / "out" / "speed" / "report.md").read_text()


def test_a_step_that_goes_on_where_it_was_is_tried_until_it_is_done(
    gpu: Any, plan: Callable[..., Path], tmp_path: Path
) -> None:
    code = f"import pathlib, time; mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
    code += "if not mark.exists():\n    mark.touch()\n    time.sleep(100)\n"
    notes = plan({"one": {"resumes": True}}, one=code)
    assert run(gpu, tmp_path, "--minutes", "0.03") == 3
    assert run(gpu, tmp_path, "--minutes", "0.1") == 0
    assert len(notes.read_text().splitlines()) == 2


def test_a_step_that_others_need_has_their_time_too(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import pathlib, time; mark = pathlib.Path({str(mark)!r})\n"
    code += "if not mark.exists():\n    mark.touch()\n    time.sleep(100)\n"
    notes = plan({"one": {"resumes": True}, "two": {"after": "one"}}, one=code, two="")
    assert run(gpu, tmp_path, "--minutes", "0.1") == 0
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["one", "one", "two"]


def test_without_what_it_needs_a_step_is_not_begun(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    notes = plan({"two": {"after": "one"}}, one="sys.exit('no images')", two="", three="")
    assert run(gpu, tmp_path) == 1
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["one", "three"]
    assert "| two | shows two | | | | not run |" in (tmp_path / "out" / "speed" / "report.md").read_text()


def test_what_a_step_began_is_removed_where_it_cannot_go_on(
    gpu: Any, plan: Callable[..., Path], tmp_path: Path
) -> None:
    made = tmp_path / "out" / "speed" / "digits"
    plan({"one": {"writes": "digits"}}, one=f"import os, time; os.makedirs({str(made)!r}); time.sleep(100)")
    for _ in range(2):
        run(gpu, tmp_path, "--minutes", "0.03")
        # makedirs would have failed on a folder that is there.
        assert "FileExistsError" not in (tmp_path / "out" / "speed" / "one.txt").read_text()


def test_a_step_ends_with_all_that_it_started(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    child = tmp_path / "child"
    plan(
        one=f"import subprocess, time; p = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(100)"
    )
    assert run(gpu, tmp_path, "--minutes", "0.03") == 1
    state = Path(f"/proc/{child.read_text()}/stat")
    # Gone, or nobody has asked how it ended.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_there_is_is_collected_while_a_step_runs(
    gpu: Any, plan: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "INTERVAL", 0.05)
    archive = tmp_path / "back" / "results.tar.gz"
    code = f"""
import tarfile, time
print("half way", flush=True)
for _ in range(200):
    time.sleep(0.05)
    try:
        if b"half way" in tarfile.open({str(archive)!r}).extractfile("one.txt").read():
            break
    except (OSError, KeyError, tarfile.TarError):
        pass
else:
    sys.exit(1)
"""
    plan(one=code)
    assert run(gpu, tmp_path, "--collect", str(tmp_path / "back")) == 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_ended_leaves_its_report_and_is_gone_on_with(
    sign: signal.Signals, warm: Callable[..., Any], tmp_path: Path
) -> None:
    notes, back = tmp_path / "notes", tmp_path / "back"
    (tmp_path / "one.py").write_text(f"open({str(notes)!r}, 'a').write('one ')")
    (tmp_path / "two.py").write_text(f"import time; open({str(notes)!r}, 'a').write('two '); time.sleep(100)")
    (tmp_path / "main.py").write_text(
        f"import signal, sys; sys.path.insert(0, {str(FOLDER)!r})\nimport gpu\n"
        f"steps = [gpu.Step(n, n, 10, '{tmp_path}/' + n + '.py') for n in ('one', 'two')]\n"
        "gpu.PLANS['speed'] = gpu.Plan(1, tuple(steps))\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(gpu.main([{str(tmp_path / 'out')!r}, '--device', 'cpu', '--collect', {str(back)!r}]))\n"
    )
    process = warm("torch").python(tmp_path / "main.py", folder=tmp_path)
    ended = process.wait(until=lambda: notes.exists() and "two" in notes.read_text())
    assert ended is None, ended
    process.signal(sign)
    done = process.wait()
    if sign is signal.SIGKILL:
        assert done.status == -9
        # What it had started is an orphan in its own group.
        subprocess.run(["pkill", "-f", str(tmp_path / "two.py")], check=False)
    else:
        assert done.status == 130
        assert done.stderr.endswith("interrupted; repeat the command to go on.\n")
    report = (back / "report.md").read_text()
    assert re.search(r"\| one \| one \| 0 \|", report)
    assert "| two | two | | | | not run |" in report
    (tmp_path / "two.py").write_text("")
    assert warm("torch").python(tmp_path / "main.py", folder=tmp_path).wait().status == 0
    assert notes.read_text().split() == ["one", "two"]


def test_without_its_host_a_step_is_named_and_left_out(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    notes = plan({"one": {"needs": ("no_such_host",)}}, one="", two="")
    assert run(gpu, tmp_path) == 0
    assert notes.read_text().startswith("two cpu ")
    report = (tmp_path / "out" / "speed" / "report.md").read_text()
    assert "| one | shows one | | | | needs no_such_host |" in report


def test_a_full_disk_is_named(warm: Callable[..., Any], tmp_path: Path) -> None:
    command = (FOLDER / "gpu.py", tmp_path / "out", "--device", "cpu", "--only", "tests")
    # A report does not fit; Python turns the signal into an error.
    no_room = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))"
    ended = warm("torch").python(*command, folder=tmp_path, before=no_room).wait()
    assert ended.status == 1
    assert ended.stderr == "gpu: [Errno 27] File too large\n"
    assert not list((tmp_path / "out" / "speed").iterdir())


# --- what comes back --------------------------------------------------------------------------------------------


def test_few_and_small_files_come_back(gpu: Any, plan: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "speed"
    code = f"""
import pathlib
folder = pathlib.Path({str(folder)!r})
(folder / "seed0").mkdir()
(folder / "seed0" / "measurements.jsonl").write_text("{{}}\\n")
(folder / "seed0" / "supernet.ckpt").write_bytes(b"not this one")
(folder / "seed0.safetensors").write_bytes(b"weights")
with (folder / "seed1.safetensors").open("wb") as file:
    file.truncate(2**24 + 1)
"""
    plan(networks="seed*.safetensors", one=code)
    back = tmp_path / "back"
    assert run(gpu, tmp_path, "--collect", str(back)) == 1
    assert sorted(path.name for path in back.iterdir()) == ["report.md", "results.tar.gz", "seed0.safetensors"]
    with tarfile.open(back / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["one.json", "one.txt", "report.md", "seed0/measurements.jsonl"]
    told = "Not collected: seed1.safetensors, because it has 16.0 MiB and at most 16.0 MiB do."
    assert told in (back / "report.md").read_text()


def test_no_more_files_come_back_than_may(modules: Any, tmp_path: Path) -> None:
    collect = modules("gpu_collect").collect
    (tmp_path / "report.md").write_text("")
    for seed in range(9):
        (tmp_path / f"seed{seed}.safetensors").write_bytes(b"w")
    left_out = collect(tmp_path, tmp_path / "back", "seed*.safetensors")
    assert len(list((tmp_path / "back").iterdir())) == 8
    assert left_out == [f"seed{seed}.safetensors, because at most 8 files come back" for seed in (6, 7, 8)]


def test_the_largest_of_what_was_printed_is_left_out(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modules("gpu_collect")
    monkeypatch.setattr(module, "MOST_BYTES", 4000)
    (tmp_path / "report.md").write_text("all is well")
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "large.txt").write_bytes(os.urandom(8000))
    left_out = module.collect(tmp_path, tmp_path / "back")
    assert len(left_out) == 1 and left_out[0].startswith("large.txt, because results.tar.gz would have ")
    with tarfile.open(tmp_path / "back" / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["report.md", "small.txt"]
    assert (tmp_path / "back" / "results.tar.gz").stat().st_size <= 4000


# --- kits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kit(modules: Any, tmp_path: Path) -> tuple[Any, Path, Path]:
    """The module, a sealed kit and the checkout that it is for."""
    module = modules("gpu_kit")
    root, folder = tmp_path / "root", tmp_path / "kit"
    (root / "genas_plugins").mkdir(parents=True)
    (root / "genas_plugins" / "a.py").write_text("a = 1\n")
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "x.zip").write_bytes(b"data")
    (tmp_path / "package.py").write_text("value = 5\n")
    with tarfile.open(folder / "site.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package.py", "package.py")
    module.seal(folder, root, "v1-3-gabc")
    return module, folder, root


def test_a_kit_is_unpacked_once(kit: tuple[Any, Path, Path], tmp_path: Path) -> None:
    module, folder, root = kit
    opened = module.Kit.open(folder, root)
    assert opened.data == folder / "data"
    for _ in range(2):
        (site,) = opened.site(tmp_path)
        assert (Path(site) / "package.py").read_text() == "value = 5\n"
    (folder / "site.tgz").unlink()
    assert module.Kit(folder).site(tmp_path) == []


def change_checkout(folder: Path, root: Path) -> None:
    (root / "genas_plugins" / "a.py").write_text("a = 2\n")


def add_to_checkout(folder: Path, root: Path) -> None:
    (root / "configs").mkdir()
    (root / "configs" / "b.yaml").write_text("")


def lose_data(folder: Path, root: Path) -> None:
    (folder / "data" / "x.zip").unlink()


def damage_data(folder: Path, root: Path) -> None:
    (folder / "data" / "x.zip").write_bytes(b"dat")


def lose_seal(folder: Path, root: Path) -> None:
    (folder / "kit.json").unlink()


def damage_seal(folder: Path, root: Path) -> None:
    (folder / "kit.json").write_text('{"files": {}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_checkout, r"sealed for another state of this checkout \(v1-3-gabc\): rehearse with this one"),
        (add_to_checkout, "sealed for another state of this checkout"),
        (lose_data, r"x\.zip is missing since the kit was sealed: pack and seal it again"),
        (damage_data, r"x\.zip is other than it was since the kit was sealed"),
        (lose_seal, r"There is no sealed kit in .*kit \(no kit\.json\)"),
        (damage_seal, r"kit\.json is damaged .*: seal the kit again"),
    ],
)
def test_a_kit_of_something_else_is_refused(
    change: Callable[[Path, Path], None], message: str, kit: tuple[Any, Path, Path]
) -> None:
    module, folder, root = kit
    change(folder, root)
    with pytest.raises(module.KitError, match=message):
        module.Kit.open(folder, root)


def test_a_damaged_archive_of_packages_is_refused(kit: tuple[Any, Path, Path], tmp_path: Path) -> None:
    module, folder, root = kit
    whole = (folder / "site.tgz").read_bytes()
    (folder / "site.tgz").write_bytes(whole[: len(whole) // 2])
    module.seal(folder, root, "v2")
    with pytest.raises(module.KitError, match=r"site\.tgz is damaged"):
        module.Kit.open(folder, root).site(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "site" in path.name]


def test_there_is_nothing_to_seal(modules: Any, tmp_path: Path) -> None:
    module = modules("gpu_kit")
    with pytest.raises(module.KitError, match="There is nothing to seal in"):
        module.seal(tmp_path / "none", tmp_path, "v1")


# --- the plans --------------------------------------------------------------------------------------------------


def test_the_plans_are_commands_that_there_are(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    common = (FOLDER / "scoring.py").read_text() + (FOLDER / "networks.py").read_text()
    for name, plan in gpu.PLANS.items():
        assert gpu.main(["runs/gpu", "--plan", name, "--list"]) == 0
        listed = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in listed] == [step.name for step in plan.steps]
        for step in plan.steps:
            script, *arguments = f"{step.command} {step.rehearsal}".split()
            if not script.startswith("benchmarks/"):
                continue
            text = (FOLDER / Path(script).name).read_text()
            for option in (argument for argument in arguments if argument.startswith("--")):
                assert f'"{option}"' in text + common, (step.name, option)


def test_the_plans_take_the_minutes_that_they_say(gpu: Any) -> None:
    assert {name: plan.minutes for name, plan in gpu.PLANS.items()} == {"speed": 4, "evidence": 9}


def test_the_documentation_has_every_step(gpu: Any) -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    for plan in gpu.PLANS.values():
        for step in plan.steps:
            assert f"| `{step.name}` | {step.shows} |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0", "--device", "cpu"], "--minutes must be above 0, got 0.0"),
        (["--only", "nothing", "--device", "cpu"], "the plan speed has no step 'nothing'; it has: tests, "),
        (["--seal"], "--seal takes --kit"),
        (["--plan", "all"], "invalid choice: 'all'"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--plan", "evidence"],
            "The plan evidence reads cifar10_train.zip, cifar10_test.zip, nasbench201_accuracy.csv, but neither --kit "
            "nor --source is given",
        ),
        (["--plan", "evidence", "--source", "none"], "but none lacks them"),
        (["--kit", "none"], "There is no sealed kit in"),
    ],
)
def test_missing_data_and_kits_are_told(
    arguments: list[str], message: str, gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gpu, tmp_path, *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
