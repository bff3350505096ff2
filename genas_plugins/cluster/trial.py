"""Score what a tuner of NNI proposes, with the supernet of a run: the trial command of a cluster."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from genas_plugins.cluster.channel import Channel, trial_channel
from genas_plugins.cluster.slots import LostWorkerError, RefusedError, slots_folder, take_slot

__all__ = ["CANDIDATE", "add", "main", "measure", "run"]

CANDIDATE = "architecture"
"""Label under which a tuner proposes the plain data of an architecture, instead of NNI's choices by label."""


def add(parser: argparse.ArgumentParser) -> None:
    """Give ``genas trial`` its options."""
    parser.epilog = "example (of an experiment of NNI): trialCommand: genas trial --run /data/runs/cifar10"
    parser.add_argument("--run", required=True, metavar="DIR", help="the folder of a search, or its supernet's file")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that score on this machine, or on each set of visible GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="a worker that takes longer for one architecture is ended (default: %(default)g)",
    )
    parser.add_argument(
        "--idle",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="a worker ends when nobody asked it for so long (default: %(default)g)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--data-root", metavar="DIR", help="where the run's images are here, if not where they were")
    parser.add_argument("--threads", type=int, help="PyTorch's threads for one architecture on a CPU")
    parser.add_argument("--search-space", action="store_true", help="print NNI's search space of the run, and end")


def run(options: argparse.Namespace) -> int:
    """Score the proposal of one trial, and report to NNI."""
    for name in ("workers", "timeout", "idle"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(options, name):g}.")
    if options.search_space:
        from genas_plugins.cluster.choices import nni_search_space
        from genas_plugins.experiment.run_folder import TrainedRun

        print(json.dumps(nni_search_space(TrainedRun.open(options.run).supernet.search_space), indent=1))
        return 0
    return measure(options, trial_channel(os.environ))


def measure(options: argparse.Namespace, channel: Channel) -> int:
    """Ask a worker of this machine for what NNI's tuner proposes to this trial.

    Intermediate results are the losses at the sigmas; the final one is the score, with all that was measured as text.

    Args:
        options: Of the command line.
        channel: To NNI.

    Returns:
        Exit status: 1 if there is no score, for which NNI counts the trial as failed.
    """
    parameters = channel.parameters()
    request = {"candidate": parameters[CANDIDATE]} if CANDIDATE in parameters else {"sample": parameters}
    by: dict[str, Any] = {"host": socket.gethostname()}
    try:
        with take_slot(slots_folder(options.run, os.environ.get("CUDA_VISIBLE_DEVICES")), options.workers) as slot:
            answer, told = slot.ask(request, _worker_options(options), options.timeout)
            by |= told
    except (LostWorkerError, RefusedError, OSError) as error:
        kind = "lost" if isinstance(error, LostWorkerError) else "refused"
        return _without_score(channel, {kind: str(error), "by": by})
    if answer["status"] != "ok":
        return _without_score(channel, {"answer": answer, "by": by})
    _report(channel, answer, by)
    return 0


def _report(channel: Channel, answer: Mapping[str, Any], by: Mapping[str, Any]) -> None:
    for number, (sigma, loss) in enumerate(zip(answer.get("sigmas", ()), answer.get("losses", ()), strict=True)):
        channel.report("PERIODICAL", {"default": loss, "sigma": sigma}, number)
    shown = ("flatness", "slope", "depth", "angle", "top1", "top5", "seconds")
    figures = {name: answer[name] for name in shown if name in answer}
    told = json.dumps({"answer": answer, "by": by})
    channel.report("FINAL", {"default": answer["score"], **figures, "told": told})


def _without_score(channel: Channel, told: Mapping[str, Any]) -> int:
    reason = told.get("lost") or told.get("refused") or told["answer"]["reason"]
    print(f"genas: no score: {reason}", file=sys.stderr)
    # No final result, which NNI would take for a score.
    channel.report("PERIODICAL", {"default": 0.0, "reason": reason, "told": json.dumps(told)})
    return 1


def _worker_options(options: argparse.Namespace) -> Sequence[str]:
    line = ["--run", options.run, "--idle", str(options.idle)]
    for name in ("device", "data_root", "threads"):
        if (value := getattr(options, name)) is not None:
            line += [f"--{name.replace('_', '-')}", str(value)]
    return line


def main() -> int:
    """``python -m genas_plugins.cluster.trial``: the command without what finds the other subcommands."""
    parser = argparse.ArgumentParser(prog="genas trial", description=__doc__)
    add(parser)
    try:
        return run(parser.parse_args())
    except KeyboardInterrupt:
        # How NNI ends a trial.
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"genas: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
