"""Train a supernet, search it, and write the best genotype."""

from __future__ import annotations

import argparse
import logging
import shlex
import warnings
from collections.abc import Iterable
from pathlib import Path

import nni

from genas_plugins._optional import require
from genas_plugins.cli.shared import table, told_how_to_go_on
from genas_plugins.correlation.report import LEAST_SLOPE
from genas_plugins.experiment import config
from genas_plugins.experiment.progress import Bar
from genas_plugins.search.budget import in_units
from genas_plugins.training import workers
from nni_strategy.run import Outcome, run_experiment

__all__ = ["add", "quiet_hosts", "run", "run_experiment"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give ``genas search`` its options."""
    parser.epilog = "example: genas search --config quickstart_digits --output runs/digits"
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of one that comes with the package")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, for instance search.generations=5; may be repeated",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the run folder; must not hold a run")
    parser.add_argument("--resume", action="store_true", help="continue the run that the folder holds")
    parser.add_argument("--train-only", action="store_true", help="stop when the supernet is trained")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        metavar="N",
        help="trace N training steps and N candidates (default: %(const)s, after a warm-up) into DIR/profile",
    )


def run(options: argparse.Namespace) -> int:
    """Search, and print the best architectures."""
    require("matplotlib", extra="plots", purpose="the search's pictures")
    folder = Path(options.output)
    if options.config is not None:
        experiment = config.load(options.config, options.overrides)
    elif options.resume and (folder / "config.yaml").exists():
        experiment = config.load(folder / "config.yaml", options.overrides)
    elif options.resume:
        raise config.ConfigError(f"{folder} holds no run to resume (no config.yaml); start it with --config.")
    else:
        raise config.ConfigError(
            f"--config is missing; experiments that come with the package: {', '.join(config.config_names())}."
        )
    quiet_hosts()
    workers.preload("genas_plugins.datasets", "PIL.Image")
    again = f"genas search --output {shlex.quote(str(folder))} --resume"
    interrupted = again + " --train-only" * options.train_only
    with told_how_to_go_on(folder, (folder / "config.yaml").exists, interrupted):
        outcome = run_experiment(
            experiment,
            folder,
            resume=options.resume,
            progress=None if options.quiet else Bar,
            profile=options.profile,
            train_only=options.train_only,
        )
    if options.train_only:
        print(f"The trained supernet is in {folder}; search it with: {again}")
    if outcome.best:
        print("\n".join(_report(outcome)))
        if options.profile is not None:
            print(f"Where the time goes is in {folder / 'profile.txt'}.")
    return 0


def quiet_hosts() -> None:
    """NNI and Lightning tell much that is of no use to who runs this command."""
    nni.silence_stdout()
    logging.getLogger("nni").addHandler(logging.NullHandler())
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


def _report(outcome: Outcome) -> Iterable[str]:
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    failed += f", {outcome.dropped} dropped" if outcome.dropped else ""
    if outcome.front:
        yield f"\n{len(outcome.front)} of {outcome.scored} architectures{failed} are on the front; some of it:\n"
    else:
        yield f"\nThe best {len(outcome.best)} of {outcome.scored} architectures{failed}:\n"
    costs = list(outcome.best[0].record.costs or {})
    rows = [("", "score", *costs, "slope", "losses at the sigmas", "test top-1", "code")]
    for rank, found in enumerate(outcome.best, 1):
        record = found.record
        slope = (record.shares or {}).get("slope")
        rows.append(
            (
                f"{rank}",
                f"{record.score:.6g}",
                *(in_units((record.costs or {})[name]) for name in costs),
                "-" if slope is None else f"{slope:.1%}",
                " ".join(f"{loss:.4f}" for loss in record.losses or ()) or "-",
                "-" if found.test_top1 is None else f"{found.test_top1:.1%}",
                str(found.genotype),
            )
        )
    yield from table(rows)
    yield "\nslope: share of the slope term in Eq. 4; test top-1: with the supernet's weights."
    shares = [found.record.shares["slope"] for found in outcome.best if "slope" in (found.record.shares or {})]
    if shares and max(shares) < LEAST_SLOPE:
        yield (
            f"The slope term decides less than {LEAST_SLOPE:.0%} of these scores, which rank nearly as the loss does: "
            "larger score.sigmas or a smaller score.alpha give it weight."
        )
    if outcome.spared is not None:
        yield f"Racing saved {outcome.spared:.1%} of the image evaluations."
    if outcome.front:
        yield f"The whole front is in {outcome.folder / 'pareto.csv'} and drawn in {outcome.folder / 'pareto.png'}."
    yield f"The best architecture, the history and pictures are in {outcome.folder}."
