"""All that this project says about a GPU, measured by one command, in calls of a few minutes.

Every step is another benchmark, or the tests that need a GPU; what each printed is kept in a file of its own. A step
that is done is not done again; one that was cut off begins anew, the search where it was. The command ends with 3 while
steps are left, and then with 0, or with 1 where a target was missed::

    until python benchmarks/gpu.py runs/gpu --minutes 9; [ $? -ne 3 ]; do :; done

It writes ``report.md``: the machine, versions, and for each step its command, exit code, time and last line. Steps
whose host is not installed are left out, and named. ``--list`` tells the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genas_plugins.files import write_text

__all__ = ["STEPS", "Step", "main"]

ROOT = Path(__file__).resolve().parents[1]
DONE, MISSED, LEFT = 0, 1, 3
TOO_LONG = 124
PACKAGES = ("torch", "torchvision", "nni", "pytorch-lightning", "timm", "mmsegmentation", "detectron2")
_CUT_OFF = (-2, -9, -15, 130)


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: Of its file.
        command: Without the interpreter; ``{device}`` and ``{output}`` are filled in.
        needs: Modules without which it cannot run.
        resumed: Goes on where a run folder is, ``{output}/digits``; added to the command when there is one.
    """

    name: str
    command: str
    needs: tuple[str, ...] = ()
    resumed: str = ""


_SEARCH = ("nni", "pytorch_lightning")
STEPS: tuple[Step, ...] = (
    Step("tests", "-m pytest -q -m gpu tests/core tests/nni tests/timm", ("pytest", *_SEARCH, "timm")),
    Step("roofline", "benchmarks/roofline.py --device {device} --images 25000", _SEARCH),
    Step("scoring", "benchmarks/scoring.py --device {device} --in-flight 2 4 --check"),
    Step(
        "scoring_paper", "benchmarks/scoring.py --device {device} --images 25000 --candidates 2 --in-flight 2 4 --check"
    ),
    Step("training", "benchmarks/training.py --device {device} --memory --check", _SEARCH),
    Step("sizes_scoring", "benchmarks/roofline.py --device {device} --sizes --stages scoring"),
    Step("sizes_training", "benchmarks/roofline.py --device {device} --sizes --stages training", _SEARCH),
    Step(
        "search",
        "-m genas_plugins search --quiet --output {output}/digits",
        _SEARCH,
        resumed="--resume",
    ),
    Step("agreement", "benchmarks/agreement.py {output}/digits --device {device} --check", _SEARCH),
    Step("racing", "benchmarks/racing.py {output}/digits --device {device} --check", _SEARCH),
    Step(
        "networks",
        "benchmarks/networks.py --device {device} --batch-size 128 --amp bfloat16 --channels-last --memory --check",
        ("timm",),
    ),
    Step(
        "networks_compiled",
        "benchmarks/networks.py --device {device} --batch-size 128 --amp bfloat16 --channels-last --compile --models "
        "--check",
        ("timm",),
    ),
    Step("mmseg", "benchmarks/dense.py mmseg --device {device}", ("mmseg",)),
    Step("detectron2", "benchmarks/dense.py detectron2 --device {device}", ("detectron2",)),
)
"""In the order of what they are worth. The search is one of digits, for a trained supernet."""


def arguments_of(step: Step, output: Path, device: str) -> list[str]:
    """The command of a step, without the interpreter."""
    arguments = [part.format(device=device, output=output) for part in step.command.split()]
    if step.resumed:
        begun = (output / "digits" / "config.yaml").exists()
        accelerator = "gpu" if device.startswith("cuda") else "cpu"
        # In small batches, because races compare candidates between batches: at 2,048 digits are one.
        settings = (f"training.accelerator={accelerator}", "score.batch_size=64")
        fresh = ["--config", "quickstart_digits", *(part for item in settings for part in ("--set", item))]
        arguments += [step.resumed] if begun else fresh
    return arguments


def measure(step: Step, output: Path, device: str, seconds: float) -> bool:
    """Run a step for so many seconds at most, and keep what it printed; return whether it came to its end."""
    command = arguments_of(step, output, device)
    started = time.monotonic()
    log = output / f"{step.name}.partial"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # A search says how to go on with it.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code is None or code in _CUT_OFF:
        return False
    keep(step, output, command, device, code, time.monotonic() - started)
    return True


def keep(step: Step, output: Path, command: Sequence[str], device: str, code: int, seconds: float) -> None:
    """Write down how a step ended; it is not done again."""
    log = output / f"{step.name}.partial"
    lines = log.read_text(errors="replace").splitlines()
    log.rename(output / f"{step.name}.txt")
    record = {
        "command": " ".join(["python", *command]),
        "code": code,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "last": next((line for line in reversed(lines) if line.strip()), ""),
        "machine": machine(device),
    }
    write_text(output / f"{step.name}.json", json.dumps(record, indent=1) + "\n")


def machine(device: str) -> str:
    """Hardware and versions, in a line."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB), CUDA {torch.version.cuda}"
    else:
        hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([hardware, *versions])


def missing(step: Step) -> list[str]:
    """Modules that a step needs and that there are not."""
    return [name for name in step.needs if importlib.util.find_spec(name) is None]


def read(output: Path, step: Step) -> dict[str, Any] | None:
    """The record of a step that is done."""
    path = output / f"{step.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def report(output: Path, records: Mapping[str, dict[str, Any] | None]) -> str:
    """What is done, as Markdown."""
    machines = dict.fromkeys(record["machine"] for record in records.values() if record is not None)
    lines = [*machines, "", "| step | command | exit code | seconds | date | last line |", "|---|---|---|---|---|---|"]
    for step in STEPS:
        record = records.get(step.name)
        if record is not None:
            last = str(record["last"]).replace("|", "/")
            cells = [step.name, f"`{record['command']}`", record["code"], record["seconds"], record["date"], last]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        else:
            why = f"needs {', '.join(missing(step))}" if missing(step) else "not done yet"
            lines.append(f"| {step.name} | | | | | {why} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Go on with the measurements and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="DIR", nargs="?", default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, at most (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="tell the steps and do nothing")
    args = parser.parse_args(arguments)
    chosen = [step for step in STEPS if args.only is None or step.name in args.only]
    if args.list:
        for step in chosen:
            print(f"{step.name}: python {' '.join(arguments_of(step, args.output, args.device))}")
        return DONE
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this PyTorch ({torch.__version__}) sees no CUDA device")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    limit = 60 * args.minutes
    end = time.monotonic() + limit
    for step in chosen:
        if read(output, step) is not None or missing(step):
            continue
        left = end - time.monotonic()
        if left <= 0:
            break
        print(f"{step.name} ...", flush=True)
        command = arguments_of(step, output, args.device)
        if not measure(step, output, args.device, left):
            if not step.resumed and left > 0.99 * limit:
                # It had the whole call, and would not get further in the next.
                keep(step, output, command, args.device, TOO_LONG, left)
            break
    records = {step.name: read(output, step) for step in STEPS}
    text = report(output, records)
    write_text(output / "report.md", text)
    print(text)
    ended = [records[step.name] for step in chosen if not missing(step)]
    if None in ended:
        return LEFT
    return MISSED if any(record["code"] for record in ended) else DONE


if __name__ == "__main__":
    sys.exit(main())
