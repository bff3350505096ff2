"""Hold scores of NAS-Bench-201 architectures against the accuracies that training each gives."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from genas_plugins._optional import require
from genas_plugins._plugins import load
from genas_plugins.checks import check_device
from genas_plugins.cli import subcommands
from genas_plugins.cli.shared import add_machine, table, told_how_to_go_on
from genas_plugins.correlation import with_neighbours
from genas_plugins.correlation.report import remarks, table_of, write_report
from genas_plugins.correlation.run import check_folder, choose, measure_all
from genas_plugins.correlation.settings import Images, check_options, check_sums, load_settings
from genas_plugins.experiment import config
from genas_plugins.experiment.progress import Bar
from genas_plugins.experiment.run_folder import load_data
from genas_plugins.experiment.scorer import Scorer
from genas_plugins.locking import lock_folder
from genas_plugins.nasbench201.truth import read_truth

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.epilog = (
        "example: genas correlate --run runs/nasbench201 --truth accuracies.csv --sample 500 --output runs/correlation"
    )
    add_option = parser.add_argument
    add_option("--run", metavar="DIR", help="the folder of a search in NAS-Bench-201, or the file of its supernet")
    add_option("--config", metavar="FILE", help="instead: train and search first, into DIR/search")
    add_option("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="with it")
    add_option(
        "--truth",
        required=True,
        metavar="SOURCE",
        help="a CSV with the columns arch and that of the data set, a NATS-Bench archive, or: nni",
    )
    add_option("--dataset", default="cifar10", help="cifar10 (default), cifar100 or imagenet16_120")
    add_option("--settings", nargs="+", default=["paper_tables"], metavar="FILE", help="YAML; default: paper_tables")
    add_option("--sample", type=int, metavar="N", help="so many architectures; default: all 15,625")
    add_option("--images", type=int, metavar="N", help="so many validation images; default: the run's")
    add_option("--minutes", type=float, metavar="N", help="measure for so long at most, then report; --resume goes on")
    add_option("--training-free", action="store_true", help="also NASWOT, SynFlow and ZiCo")
    add_option("--seed", type=int, default=0, help="of the sample and the bootstrap; default: %(default)s")
    add_option("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap; default: %(default)s")
    add_option("--output", required=True, metavar="DIR", help="where tables, scores and pictures go")
    add_option("--resume", action="store_true", help="continue what the folder holds")
    add_machine(parser)
    add_option("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Measure, and write and print the table."""
    require("matplotlib", extra="plots", purpose="the pictures")
    if not options.quiet:
        require("tqdm", extra="nni", purpose="progress bars, which --quiet goes without,")
    progress = None if options.quiet else Bar
    _check_choice(options)
    # All that can be wrong is found before anything takes long.
    host = None if options.config is None else _host()
    truth = read_truth(options.truth, options.dataset)
    settings, sums = load_settings(*options.settings)
    check_sums(sums, settings, options.training_free)
    if options.device is not None:
        check_device(options.device, "--device")
    wanted = {name: getattr(options, name) for name in ("seed", "resamples", "images", "training_free")}
    check = partial(check_options, settings, **wanted)
    check()
    architectures = choose(truth, options.sample, options.seed)
    folder = Path(options.output)
    check_folder(folder, options.resume)
    source = Path(options.run) if host is None else folder / "search"
    search = None if host is None else _search(host, source, options, check)
    # The same command: --resume goes on where there is something, and begins where there is not.
    again = f"genas {shlex.join([*options.line, *['--resume'] * (not options.resume)])}"
    with told_how_to_go_on(folder, lambda: True, again), lock_folder(folder):
        if search is not None:
            search(resume=options.resume and (source / "config.yaml").exists(), progress=progress)
        scorer = Scorer.from_run(source, device=options.device, data_root=options.data_root)
        if search is None:
            batches = scorer.recalibration
            check(available=Images.of(scorer.data, None if batches is None else batches.batch_size))
        rows_of = set(map(str, architectures))
        raws = measure_all(
            scorer,
            with_neighbours(architectures, settings, scorer.seed),
            settings,
            folder,
            images=options.images,
            training_free=options.training_free,
            resume=options.resume,
            seconds=None if options.minutes is None else 60 * options.minutes,
            progress=progress,
        )
        if len(raws) < 3:
            raise ValueError(f"{len(raws)} architectures are measured, a correlation takes 3: go on with --resume.")
        rows, left_out = write_report(
            folder,
            raws,
            settings,
            truth,
            rows_of=rows_of,
            sums=sums,
            seed=options.seed,
            resamples=options.resamples,
        )
    print("\n".join(table(table_of(rows))), *remarks(rows, left_out), sep="\n")
    print(f"correlations.csv, scores.csv, taus.csv and scatter.png are in {folder}.")
    return 0


def _check_choice(options: argparse.Namespace) -> None:
    """Raise if options contradict one another."""
    if (options.run is None) == (options.config is None):
        raise ValueError("Name either --run, the folder of a search, or --config, to train first.")
    if options.run is None and options.data_root is not None:
        raise ValueError("--data-root belongs to --run; with --config, say --set data.root=DIR.")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}.")
    if options.run is not None and options.overrides:
        raise ValueError("--set belongs to --config; a run keeps the settings that it has.")


def _host() -> Any:
    """The module of ``genas search``, which trains and searches in a host that this package does not know."""
    point = subcommands().get("search")
    if point is None:
        raise ValueError("--config needs genas search, which is not installed: name a finished search with --run.")
    return load(point, "quiet_hosts", "run_experiment")


def _search(host: Any, folder: Path, options: argparse.Namespace, check: Callable[..., None]) -> Callable[..., Any]:
    """The search that ``--config`` asks for, ready to begin in ``folder``."""
    experiment = config.load(options.config, options.overrides)
    if experiment.space.name != "nasbench201":
        raise ValueError(f"{options.config} searches the space {experiment.space.name}, expected nasbench201.")
    score = experiment.score
    batch_size = score.recalibration_batch_size if score.recalibration_images != 0 else None
    check(available=Images.of(load_data(experiment), batch_size))
    host.quiet_hosts()
    return partial(host.run_experiment, experiment, folder)
