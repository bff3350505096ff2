"""The ``genas`` command: search, score, zoo, fit, convert, plot.

The one place in the core that knows the hosts; each is imported only when its subcommand runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genas_plugins._messages import message_of
from genas_plugins._reading import expand_home
from genas_plugins._version import __version__
from genas_plugins.files import disk_is_full
from genas_plugins.interrupts import exit_status, interruptible, pending_signal

if TYPE_CHECKING:
    from nni_strategy.run import Outcome

__all__ = ["main"]

_UNREAD = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; ``None`` for the process's own.

    Returns:
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C, 143 after
        SIGTERM, 141 when nobody reads the output any more.
    """
    options = expand_home(_parser().parse_args(arguments))
    options.line = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with interruptible():
            status = command(options)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        # Lightning starts the other processes of a distributed run as copies of this one: the first speaks.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(str(interrupt) or "Interrupted.", file=sys.stderr)
        return exit_status()
    except BrokenPipeError:
        # As head does, which has read enough. What is still to be written would be an error once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        if options.debug:
            raise
        print(f"genas: {message_of(error)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _told_how_to_go_on(folder: Path, begun: Callable[[], bool], again: str) -> Iterator[None]:
    """Give an interrupt, and the error of a full disk, the command with which to go on."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        # Ctrl-C ends a loader's workers as well, whose end may be what is met first.
        if isinstance(error, RuntimeError) and pending_signal() is None:
            raise
        told = f"Continue with: {again}" if begun() else "Nothing was begun: start it again."
        raise KeyboardInterrupt(f"\nInterrupted. {told}") from error
    except OSError as error:
        if not disk_is_full(error) or not begun():
            raise
        raise OSError(f"{folder} cannot be written to: {error.strerror}. Make room. Continue with: {again}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="genas", description="Flatness-based neural architecture search (GeNAS).")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = _command(
        commands,
        "search",
        _search,
        "train a supernet, search it, and write the best genotype",
        "genas search --config quickstart_digits --output runs/digits",
    )
    search.add_argument("--config", metavar="FILE", help="a YAML file, or the name of one that comes with the package")
    search.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, for instance search.generations=5; may be repeated",
    )
    search.add_argument("--output", required=True, metavar="DIR", help="the run folder; must not hold a run")
    search.add_argument("--resume", action="store_true", help="continue the run that the folder holds")
    search.add_argument("--train-only", action="store_true", help="stop when the supernet is trained")
    search.add_argument("--quiet", action="store_true", help="no progress bars")
    search.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        metavar="N",
        help="trace N training steps and N candidates (default: %(const)s, after a warm-up) into DIR/profile",
    )

    score = _command(
        commands,
        "score",
        _score,
        "score one genotype with the supernet of a run",
        "genas score genas_flatness_c10 --run runs/cifar10 --metric accuracy",
    )
    score.add_argument(
        "genotype", help="a name of the zoo, a JSON file, 28 integers, or a string of NAS-Bench-201, in quotes"
    )
    score.add_argument(
        "--run", required=True, metavar="DIR", help="the folder of a search, or the file of its supernet"
    )
    score.add_argument("--metric", help="another metric than the run's")
    score.add_argument("--sigmas", nargs="+", type=float, metavar="SIGMA", help="other sigmas than the run's")
    _add_machine(score)

    correlate = _command(
        commands,
        "correlate",
        _correlate,
        "hold scores of NAS-Bench-201 architectures against the accuracies that training each gives",
        "genas correlate --run runs/nasbench201 --truth accuracies.csv --sample 500 --output runs/correlation",
    )
    correlate.add_argument(
        "--run", metavar="DIR", help="the folder of a search in NAS-Bench-201, or the file of its supernet"
    )
    correlate.add_argument("--config", metavar="FILE", help="instead: train and search first, into DIR/search")
    correlate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="with it")
    correlate.add_argument(
        "--truth",
        required=True,
        metavar="SOURCE",
        help="a CSV with the columns arch and that of the data set, a NATS-Bench archive, or: nni",
    )
    correlate.add_argument("--dataset", default="cifar10", help="cifar10 (default), cifar100 or imagenet16_120")
    correlate.add_argument(
        "--settings", nargs="+", default=["paper_tables"], metavar="FILE", help="YAML; default: paper_tables"
    )
    correlate.add_argument("--sample", type=int, metavar="N", help="so many architectures; default: all 15,625")
    correlate.add_argument("--images", type=int, metavar="N", help="so many validation images; default: the run's")
    correlate.add_argument(
        "--minutes", type=float, metavar="N", help="measure for so long at most, then report; --resume goes on"
    )
    correlate.add_argument("--training-free", action="store_true", help="also NASWOT, SynFlow and ZiCo")
    correlate.add_argument("--seed", type=int, default=0, help="of the sample and the bootstrap; default: %(default)s")
    correlate.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap; default: %(default)s"
    )
    correlate.add_argument("--output", required=True, metavar="DIR", help="where tables, scores and pictures go")
    correlate.add_argument("--resume", action="store_true", help="continue what the folder holds")
    _add_machine(correlate)
    correlate.add_argument("--quiet", action="store_true", help="no progress bars")

    zoo = _command(commands, "zoo", _zoo, "list the published genotypes", "genas zoo")
    zoo.add_argument(
        "--measure", action="store_true", help="build the networks and count, instead of the stored counts"
    )

    fit = _command(
        commands,
        "fit",
        _fit,
        "find the widest ImageNet network of a genotype within a budget",
        "genas fit runs/cifar10/genotype.json --macs 600M",
    )
    fit.add_argument("genotype", help="a name of the zoo, a JSON file, or 28 integers in quotes")
    fit.add_argument("--macs", type=_amount, default=600e6, metavar="N", help="multiply-adds, default 600M; also 0.6G")
    fit.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="default 224")

    convert = _command(
        commands,
        "convert",
        _convert,
        "write the network of an official, timm or own checkpoint as clean safetensors",
        "genas convert model_best.pth.tar flatness_c100.safetensors --genotype genas_flatness_c100",
    )
    convert.add_argument("checkpoint", help="a file of torch.save or safetensors; nothing in it is executed")
    convert.add_argument("output", help="the file to write: .safetensors")
    convert.add_argument(
        "--genotype", help="as in genas score; default: the file's own, or the published one that fits"
    )
    convert.add_argument("--drop-auxiliary", action="store_true", help="leave the auxiliary head out")

    plot = _command(
        commands,
        "plot",
        _plot,
        "draw the cells of a genotype, or the progress and the loss curves of a search",
        "genas plot cells genas_flatness_c100 cells.svg",
    )
    plot.add_argument("what", choices=("cells", "search", "losses"))
    plot.add_argument("source", help="for cells: as in genas score; otherwise the folder of a search")
    plot.add_argument("output", help="the picture: .svg, .png or .pdf")
    plot.add_argument("--top", type=int, default=5, help="for losses: how many of the best")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.epilog = f"example: {example}"
    parser.set_defaults(command=function)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """What may differ where a run is opened from where it was made."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--data-root", metavar="DIR", help="where the run's images are now, if not where they were")


def _search(options: argparse.Namespace) -> int:
    from genas_plugins._optional import require

    require("tqdm", extra="nni", purpose="the search's progress bars")
    require("matplotlib", extra="plots", purpose="the search's pictures")
    import nni_strategy  # noqa: F401  (a missing NNI is told before anything of it is needed)
    from genas_plugins.experiment import config
    from genas_plugins.experiment.progress import Bar
    from nni_strategy.run import run_experiment

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
    _quiet_hosts()
    again = f"genas search --output {shlex.quote(str(folder))} --resume"
    interrupted = again + " --train-only" * options.train_only
    with _told_how_to_go_on(folder, (folder / "config.yaml").exists, interrupted):
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


def _quiet_hosts() -> None:
    """NNI and Lightning tell much that is of no use to who runs this command."""
    import logging
    import warnings

    import nni

    nni.silence_stdout()
    logging.getLogger("nni").addHandler(logging.NullHandler())
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


def _report(outcome: Outcome) -> Iterable[str]:
    from genas_plugins.correlation.report import LEAST_SLOPE

    failed = f", {outcome.failed} failed" if outcome.failed else ""
    failed += f", {outcome.dropped} dropped" if outcome.dropped else ""
    yield f"\nThe best {len(outcome.best)} of {outcome.scored} architectures{failed}:\n"
    rows = [("", "score", "slope", "losses at the sigmas", "test top-1", "code")]
    for rank, found in enumerate(outcome.best, 1):
        record = found.record
        slope = (record.shares or {}).get("slope")
        rows.append(
            (
                f"{rank}",
                f"{record.score:.6g}",
                "-" if slope is None else f"{slope:.1%}",
                " ".join(f"{loss:.4f}" for loss in record.losses or ()) or "-",
                "-" if found.test_top1 is None else f"{found.test_top1:.1%}",
                str(found.genotype),
            )
        )
    yield from _table(rows)
    yield "\nslope: share of the slope term in Eq. 4; test top-1: with the supernet's weights."
    shares = [found.record.shares["slope"] for found in outcome.best if "slope" in (found.record.shares or {})]
    if shares and max(shares) < LEAST_SLOPE:
        yield (
            f"The slope term decides less than {LEAST_SLOPE:.0%} of these scores, which rank nearly as the loss does: "
            "larger score.sigmas or a smaller score.alpha give it weight."
        )
    if outcome.spared is not None:
        yield f"Racing saved {outcome.spared:.1%} of the image evaluations."
    yield f"The best architecture, the history and pictures are in {outcome.folder}."


def _score(options: argparse.Namespace) -> int:
    import nni_strategy  # noqa: F401
    from genas_plugins.darts.zoo import find_genotype
    from genas_plugins.experiment.scorer import Scorer
    from genas_plugins.spaces import NasBench201Architecture

    # A string of NAS-Bench-201 begins with a bar.
    is_cell = options.genotype.startswith("|")
    candidate = NasBench201Architecture.from_string(options.genotype) if is_cell else find_genotype(options.genotype)
    trained = Scorer.from_run(options.run, device=options.device, data_root=options.data_root)
    changes = {name: getattr(options, name) for name in ("metric", "sigmas") if getattr(options, name) is not None}
    score = dataclasses.replace(trained.score, **changes)
    measured = trained.measure(candidate, score)
    accuracy = trained.test_accuracy(candidate)
    rows = [("metric", score.metric), ("score", f"{measured.score:.6g}")]
    rows += [(f"share of {name}", f"{share:.1%}") for name, share in measured.shares.items()]
    if measured.flatness is not None:
        pairs = zip(measured.flatness.sigmas, measured.flatness.losses, strict=True)
        rows += [(f"loss at sigma {sigma:g}", f"{loss:.6f}") for sigma, loss in pairs]
    if measured.angle is not None:
        rows.append(("angle / pi", f"{measured.angle:.6f}"))
    if measured.accuracy is not None:
        rows.append(("validation top-1", f"{measured.accuracy.top1:.2%}"))
    if accuracy is not None:
        rows.append(("test top-1", f"{accuracy.top1:.2%}"))
    print("\n".join(_table(rows)))
    return 0


def _correlate(options: argparse.Namespace) -> int:
    from genas_plugins._optional import require

    require("matplotlib", extra="plots", purpose="the pictures")
    import nni_strategy  # noqa: F401
    from genas_plugins.checks import check_device
    from genas_plugins.correlation import run as correlate
    from genas_plugins.correlation.settings import Images, check_options, check_sums, load_settings
    from genas_plugins.experiment import config, report
    from genas_plugins.experiment.progress import Bar
    from genas_plugins.experiment.run_folder import load_data
    from genas_plugins.experiment.scorer import Scorer
    from genas_plugins.locking import lock_folder
    from genas_plugins.nasbench201.truth import read_truth
    from nni_strategy.run import run_experiment

    if (options.run is None) == (options.config is None):
        raise ValueError("Name either --run, the folder of a search, or --config, to train first.")
    if options.run is None and options.data_root is not None:
        raise ValueError("--data-root belongs to --run; with --config, say --set data.root=DIR.")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}.")
    if options.run is not None and options.overrides:
        raise ValueError("--set belongs to --config; a run keeps the settings that it has.")
    # All that can be wrong is found before anything takes long.
    truth = read_truth(options.truth, options.dataset)
    settings, sums = load_settings(*options.settings)
    check_sums(sums, settings, options.training_free)
    if options.device is not None:
        check_device(options.device, "--device")
    wanted = {name: getattr(options, name) for name in ("seed", "resamples", "images", "training_free")}
    check_options(settings, **wanted)
    architectures = correlate.choose(truth, options.sample, options.seed)
    folder = Path(options.output)
    correlate.check_folder(folder, options.resume)
    progress = None if options.quiet else Bar
    run = Path(options.run) if options.run else folder / "search"
    experiment = None
    if options.config is not None:
        _quiet_hosts()
        experiment = config.load(options.config, options.overrides)
        if experiment.space.name != "nasbench201":
            raise ValueError(f"{options.config} searches the space {experiment.space.name}, expected nasbench201.")
        there = Images.of(
            load_data(experiment), experiment.score.recalibration_images > 0, experiment.score.recalibration_batch_size
        )
        check_options(settings, **wanted, available=there)
    # The same command: --resume goes on where there is something, and begins where there is not.
    again = f"genas {shlex.join([*options.line, *['--resume'] * (not options.resume)])}"
    with _told_how_to_go_on(folder, lambda: True, again), lock_folder(folder):
        if experiment is not None:
            run_experiment(experiment, run, resume=options.resume and (run / "config.yaml").exists(), progress=progress)
        trained = Scorer.from_run(run, device=options.device, data_root=options.data_root)
        if experiment is None:
            there = Images.of(trained.data, trained.recalibration is not None, trained.recalibration_batch_size)
            check_options(settings, **wanted, available=there)
        raws = correlate.measure_all(
            trained,
            architectures,
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
        rows, left_out = report.write_report(
            folder, raws, settings, truth, sums=sums, seed=options.seed, resamples=options.resamples
        )
    print("\n".join(_table(report.table_of(rows))), *report.remarks(rows, left_out), sep="\n")
    print(f"correlations.csv, scores.csv, taus.csv and scatter.png are in {folder}.")
    return 0


def _zoo(options: argparse.Namespace) -> int:
    import torch

    from genas_plugins.counting import count_macs, count_parameters
    from genas_plugins.darts.zoo import ZOO

    rows = [("name", "searched on", "metric", "C", "params (M)", "paper", "MACs (M)", "paper", "top-1", "top-5")]
    for entry in ZOO.values():
        parameters, macs, paper = entry.params, entry.macs_million, entry.paper
        if options.measure:
            with torch.device("meta"):
                network = entry.network()
            parameters, macs = count_parameters(network), count_macs(network) / 1e6
        row = (entry.name, entry.search_dataset, entry.metric, f"{entry.init_channels}", f"{parameters / 1e6:.3f}")
        row += (f"{paper['params_million']:.1f}" if "params_million" in paper else "-", f"{macs:.1f}")
        row += (f"{1000 * paper['macs_giga']:.0f}" if "macs_giga" in paper else "-",)
        rows.append(row + tuple(f"{paper[key]:.2f}" if key in paper else "-" for key in ("top1", "top5")))
    print("\n".join(_table(rows)))
    print("\nImageNet networks of 14 cells at 224 pixels, without the auxiliary head; accuracies are the paper's.")
    return 0


def _amount(text: str) -> float:
    """``600M``, ``0.6G`` or ``6e8``."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 1.0)
    try:
        amount = float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        amount = 0.0
    if not 0.0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number such as 600M, 0.6G or 6e8, got {text!r}")
    return amount


def _fit(options: argparse.Namespace) -> int:
    import torch

    from genas_plugins.counting import count_macs, count_parameters, fit_channels
    from genas_plugins.darts.network import CellNetwork
    from genas_plugins.darts.zoo import IMAGENET_CELLS, find_genotype

    if options.image_size < 32:
        raise ValueError(f"--image-size must be at least 32, got {options.image_size}.")
    genotype = find_genotype(options.genotype)
    channels = fit_channels(genotype, options.macs, options.image_size)
    with torch.device("meta"):
        network = CellNetwork(genotype, channels, IMAGENET_CELLS, 1000)
    parameters, macs = count_parameters(network), count_macs(network, options.image_size)
    rows = [
        ("init_channels", f"{channels}"),
        ("params (M)", f"{parameters / 1e6:.3f}"),
        ("MACs (M)", f"{macs / 1e6:.1f}"),
    ]
    print("\n".join(_table(rows)))
    print(f"\n{IMAGENET_CELLS} cells, 1000 classes, {options.image_size} pixels, without the auxiliary head.")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from genas_plugins.checkpoints import convert_network
    from genas_plugins.counting import count_parameters
    from genas_plugins.darts.zoo import find_genotype

    genotype = None if options.genotype is None else find_genotype(options.genotype)
    network = convert_network(options.checkpoint, options.output, genotype, auxiliary=not options.drop_auxiliary)
    head = "with" if network.auxiliary_head is not None else "without"
    print(
        f"{options.output}: genotype {network.genotype}, {len(network.shapes)} cells, {network.num_classes} classes, "
        f"{count_parameters(network) / 1e6:.3f} M parameters, {head} the auxiliary head."
    )
    return 0


def _plot(options: argparse.Namespace) -> int:
    from genas_plugins.darts.zoo import find_genotype
    from genas_plugins.plotting import LossCurve, plot_cells, plot_loss_curves, plot_search
    from genas_plugins.search import History

    if options.what == "cells":
        print(plot_cells(find_genotype(options.source), options.output))
        return 0
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}.")
    path = Path(options.source) / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{options.source} is not the folder of a search: no history.jsonl.")
    history = History(path, read_only=True)
    records = history.records
    if options.what == "search":
        print(plot_search(records, options.output))
        return 0
    scored = sorted((record for record in records if record.losses), key=lambda record: -record.score)[: options.top]
    if not scored:
        raise ValueError(f"{path} has no losses: its search did not measure flatness.")
    curves = [
        LossCurve(f"#{rank}", tuple(record.sigmas), tuple(record.losses), record.score)
        for rank, record in enumerate(scored, 1)
    ]
    print(plot_loss_curves(curves, options.output))
    return 0


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
