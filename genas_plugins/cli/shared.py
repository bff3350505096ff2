"""What subcommands have in common: tables, options, and how an interrupted one goes on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from genas_plugins.files import disk_is_full
from genas_plugins.interrupts import pending_signal

__all__ = ["add_machine", "table", "told_how_to_go_on"]


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """The lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options for what may differ where a run is opened from where it was made."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--data-root", metavar="DIR", help="where the run's images are now, if not where they were")


@contextlib.contextmanager
def told_how_to_go_on(folder: Path, begun: Callable[[], bool], again: str) -> Iterator[None]:
    """Give an interrupt, and the error of a full disk, the command with which to go on.

    Args:
        folder: What is written to.
        begun: Whether there is something to continue.
        again: The command that continues it.
    """
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
