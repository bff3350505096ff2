"""All that this project says about a GPU, in two commands: how fast it is, and the paper's evidence at its size.

A plan is a list of steps in the order of their worth, each another benchmark, or the tests that need a GPU::

    python benchmarks/gpu.py runs/gpu --plan speed       # four minutes
    python benchmarks/gpu.py runs/gpu --plan evidence    # nine minutes

Each step has a share of the time, and what one leaves the others get; a step that takes longer is cut off. The report
is written after every step, so that nothing is lost when the call is ended early. Steps that are done are not done
again: repeat the command to go on with the others. It ends with 3 while steps are left, and then with 0, or with 1
where one failed or missed its target.

``--collect`` names a folder for what matters, in few and small files: ``report.md``, ``results.tar.gz`` with all that
the steps printed and measured, and the supernets that were trained. ``--rehearse --device cpu`` runs every step with a
few images. ``--list`` tells the steps. The project need not be installed. docs/gpu.md has the rest, and the kit for a
machine without a network (``--kit``, ``--seal``).
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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The checkout need not be installed.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_collect import collect  # noqa: E402
from gpu_kit import Kit, KitError, seal  # noqa: E402
from gpu_plans import PLANS, Plan, Step  # noqa: E402

from genas_plugins.files import write_text  # noqa: E402

__all__ = ["Call", "machine", "main"]

DONE, MISSED, LEFT, INTERRUPTED = 0, 1, 3, 130
CUT_OFF = 124
# Of a call's time: a step that had so much of it would not get further in another call.
WHOLE_CALL = 0.9
# Before it is cut off, a command that is told its seconds should have ended by itself.
MARGIN = 10.0
# Seconds between two looks at a step; so much is lost at most where the call is killed.
INTERVAL = 15.0
PATIENCE = 5.0
TOLD_LINES = 40
PACKAGES = ("torch", "torchvision", "numpy", "nni", "pytorch-lightning", "timm", "mmsegmentation", "detectron2")


@dataclass(frozen=True)
class Call:
    """One call of a plan.

    Attributes:
        plan: Its steps.
        folder: Where everything is kept, between calls too.
        device: For instance ``"cuda"``.
        minutes: There are.
        rehearse: Run the steps' small versions.
        source: The plan's data; ``None`` where it needs none.
        collected: Where what matters is put; ``None`` for nowhere.
        site: Folders of packages that the machine lacks.
    """

    plan: Plan
    folder: Path
    device: str
    minutes: float
    rehearse: bool = False
    source: Path | None = None
    collected: Path | None = None
    site: tuple[str, ...] = ()

    def run(self, chosen: Sequence[Step]) -> int:
        """Do the steps that are not done yet, and return the exit code."""
        end = time.monotonic() + 60 * self.minutes
        waiting = [step for step in chosen if not missing(step) and self.waits(step)]
        left_out = self.keep_report()
        while (waiting := [s for s in waiting if not self.blocked(s)]) and (left := end - time.monotonic()) > 1:
            step = waiting[0]
            print(f"{step.name} ...", flush=True)
            try:
                self.measure(step, left * step.share / sum(other.share for other in waiting))
            finally:
                left_out = self.keep_report()
            # Others cannot do without it, so that it has their time too.
            needed = step.resumes and any(other.after == step.name for other in waiting)
            if not (needed and self.waits(step)):
                del waiting[0]
        print(self.report())
        ended = [self.read(step) for step in chosen if not missing(step) and not self.blocked(step)]
        if any(record is None or record["again"] for record in ended):
            return LEFT
        return MISSED if left_out or any(record["code"] for record in ended) else DONE

    def blocked(self, step: Step) -> bool:
        """Whether a step cannot run because one that it needs failed for good."""
        before = next((other for other in self.plan.steps if other.name == step.after), None)
        record = None if before is None else self.read(before)
        return record is not None and record["code"] != 0 and not record["again"]

    def waits(self, step: Step) -> bool:
        """Whether a step was not done, or was cut off and may get further."""
        record = self.read(step)
        return record is None or record["again"]

    def read(self, step: Step) -> dict[str, Any] | None:
        """The record of a step that was done or cut off."""
        path = self.folder / f"{step.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def command(self, step: Step, seconds: float) -> list[str]:
        """The command of a step, without the interpreter."""
        told = {
            "device": self.device,
            "accelerator": "gpu" if self.device.startswith("cuda") else "cpu",
            "output": self.folder,
            "source": self.source,
            "seconds": f"{max(1.0, seconds - MARGIN):.0f}",
        }
        text = f"{step.command} {step.rehearsal}" if self.rehearse else step.command
        # Small networks and few images are not what the targets are about.
        return [part.format(**told) for part in text.split() if not (self.rehearse and part == "--check")]

    def measure(self, step: Step, seconds: float) -> None:
        """Run a step for so many seconds at most, and write down how it ended."""
        command = self.command(step, seconds)
        if step.writes and not step.resumes:
            shutil.rmtree(self.folder / step.writes, ignore_errors=True)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # As in a background job: the step would ignore, too, what ends it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        started = time.monotonic()
        given = os.environ.get("PYTHONPATH")
        paths = os.pathsep.join([str(ROOT), *self.site, *([given] if given else [])])
        with (self.folder / f"{step.name}.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, to end with it what it has started.
                start_new_session=True,
            )
            try:
                code = self.wait(process, started + seconds)
                # Before it says that it was interrupted.
                lines = (self.folder / f"{step.name}.txt").read_text(errors="replace").splitlines()
            finally:
                end_group(process)
        took = time.monotonic() - started
        record = {
            "command": " ".join(["python", *command]),
            "code": CUT_OFF if code is None else code,
            "again": code is None and (step.resumes or took < WHOLE_CALL * 60 * self.minutes),
            "seconds": round(took, 1),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            "last": next((line for line in reversed(lines) if line.strip()), ""),
            "rehearsal": self.rehearse,
            "machine": machine(self.device),
        }
        write_text(self.folder / f"{step.name}.json", json.dumps(record, indent=1) + "\n")

    def wait(self, process: subprocess.Popen[bytes], end: float) -> int | None:
        """The exit code, or ``None`` where the time is over; meanwhile what there is is collected."""
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, INTERVAL))
            self.keep_report()
        return None

    def keep_report(self) -> list[str]:
        """Write the report and collect what matters; return what was too large for it."""
        write_text(self.folder / "report.md", self.report())
        if self.collected is None:
            return []
        left_out = collect(self.folder, self.collected, self.plan.networks)
        if left_out:
            told = "".join(f"\nNot collected: {reason}.\n" for reason in left_out)
            write_text(self.collected / "report.md", self.report() + told)
        return left_out

    def report(self) -> str:
        """What is done, as Markdown."""
        records = {step: self.read(step) for step in self.plan.steps}
        done = [record for record in records.values() if record is not None]
        lines = [*dict.fromkeys(record["machine"] for record in done), ""]
        if any(record["rehearsal"] for record in done):
            lines += ["**A rehearsal: no figure here means anything.**", ""]
        lines += ["| step | shows | exit code | seconds | date | last line |", "|---|---|---|---|---|---|"]
        lines += [row(step, record) for step, record in records.items()]
        tables = self.folder / self.plan.tables
        if self.plan.tables and tables.is_file():
            lines += ["", tables.read_text(encoding="utf-8")]
        for step, record in records.items():
            if record is not None:
                said = (self.folder / f"{step.name}.txt").read_text(errors="replace").splitlines()[-TOLD_LINES:]
                lines += ["", f"`{record['command']}`", "", "```", *said, "```"]
        return "\n".join(lines) + "\n"


def row(step: Step, record: dict[str, Any] | None) -> str:
    """A step's line of the table."""
    if record is None:
        needs = missing(step)
        why = f"needs {', '.join(needs)}" if needs else "not run"
        return f"| {step.name} | {step.shows} | | | | {why} |"
    last = str(record["last"]).replace("|", "/")
    code = "cut off" if record["code"] == CUT_OFF else record["code"]
    return f"| {step.name} | {step.shows} | {code} | {record['seconds']} | {record['date']} | {last} |"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it has started; a search then says how to go on."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


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


def commit() -> str:
    """What people call this state of the checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="DIR", nargs="?", default=Path("runs/gpu"))
    parser.add_argument("--plan", choices=PLANS, default="speed", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="of this call, at most (default: the plan's 4 or 9)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps of the plan")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--kit", type=Path, metavar="DIR", help="packages and data that the machine lacks")
    parser.add_argument("--source", type=Path, metavar="DIR", help="the plan's data (default: DIR/data of the kit)")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="put what matters there, in few and small files")
    parser.add_argument("--rehearse", action="store_true", help="every step with a few images; no figure is of use")
    parser.add_argument("--list", action="store_true", help="tell the steps and do nothing")
    parser.add_argument("--seal", action="store_true", help="seal --kit for this state of the checkout and do nothing")
    args = parser.parse_args(arguments)
    plan = PLANS[args.plan]
    names = [step.name for step in plan.steps]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"--only: the plan {args.plan} has no step {min(unknown)!r}; it has: {', '.join(names)}")
    args.minutes = plan.minutes if args.minutes is None else args.minutes
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    if args.seal and args.kit is None:
        parser.error("--seal takes --kit, the folder to seal")
    if args.device.startswith("cuda") and not (args.seal or args.list or torch.cuda.is_available()):
        parser.error(f"--device {args.device}: this PyTorch ({torch.__version__}) sees no CUDA device")
    return args


def prepare(args: argparse.Namespace) -> Call:
    """Check the kit and the data, and put the kit's packages on the path.

    Raises:
        KitError: The kit cannot be used, or data is missing.
        OSError: The output cannot be written to.
    """
    plan = PLANS[args.plan]
    kit = None if args.kit is None else Kit.open(args.kit.resolve(), ROOT)
    source = args.source or (None if kit is None else kit.data)
    if plan.data:
        absent = [name for name in plan.data if source is None or not (source / name).is_file()]
        if absent:
            where = "neither --kit nor --source is given" if source is None else f"{source} lacks them"
            raise KitError(f"The plan {args.plan} reads {', '.join(absent)}, but {where}; see docs/gpu.md.")
    # What a rehearsal leaves must not pass for what was measured.
    folder = args.output.resolve() / (f"{args.plan}-rehearsal" if args.rehearse else args.plan)
    folder.mkdir(parents=True, exist_ok=True)
    site = () if kit is None else tuple(kit.site(args.output.resolve()))
    # To tell their versions, and what is missing.
    sys.path[1:1] = site
    collected = None if args.collect is None else args.collect.resolve()
    source = None if source is None else source.resolve()
    return Call(plan, folder, args.device, args.minutes, args.rehearse, source, collected, site)


def main(arguments: Sequence[str] | None = None) -> int:
    """Go on with a plan and return the exit code."""
    args = parse(arguments)
    plan = PLANS[args.plan]
    chosen = [step for step in plan.steps if args.only is None or step.name in args.only]
    if args.list:
        for step in chosen:
            print(f"{step.name}: python {step.command}")
        return DONE
    try:
        if args.seal:
            print(f"Sealed for {commit()}: {seal(args.kit, ROOT, commit())}")
            return DONE
        return prepare(args).run(chosen)
    except (KitError, OSError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return MISSED
    except KeyboardInterrupt:
        print("gpu: interrupted; repeat the command to go on.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    # A call that is ended from outside ends its step too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
