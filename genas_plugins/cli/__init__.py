"""The ``genas`` command.

Each subcommand is a module with a docstring, whose first line is its help, ``add(parser)`` and ``run(options)``. Those
of other packages are found by their entry points. A module is imported when its subcommand is asked for, and so imports
at its top what it needs: a host that is missing, or fails, is in nobody else's way.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from genas_plugins._messages import message_of
from genas_plugins._plugins import load, registered, summary
from genas_plugins._reading import expand_home
from genas_plugins._version import __version__
from genas_plugins.interrupts import exit_status, interruptible

__all__ = ["GROUP", "main", "subcommands"]

GROUP = "genas_plugins.commands"
"""Group of the entry points of subcommands: a name and its module."""
_OWN = ("score", "correlate", "zoo", "fit", "convert", "plot")
_UNREAD = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; ``None`` for the process's own.

    Returns:
        Exit status: 0, 1 with one line on standard error if something is wrong, 130 after Ctrl-C, 143 after
        SIGTERM, 141 when nobody reads the output any more.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    # A subcommand may fail to be imported before its parser could read the option.
    options = argparse.Namespace(debug="--debug" in line)
    try:
        with interruptible():
            expand_home(_parser(line).parse_args(line, options))
            options.line = line
            status: int = options.command(options)
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


def subcommands() -> dict[str, EntryPoint]:
    """The subcommands by name: those of other packages, which replace none of our own, and our own."""
    return registered(GROUP) | {name: EntryPoint(name, f"{__name__}.{name}", GROUP) for name in _OWN}


def _parser(line: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line, with the options of the subcommand that it asks for."""
    parser = argparse.ArgumentParser(prog="genas", description="Flatness-based neural architecture search (GeNAS).")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in line if not word.startswith("-")), None)
    for name, point in subcommands().items():
        told = summary(point)
        short = f"{told[:1].lower()}{told[1:]}".rstrip(".").replace("%", "%%")
        command = commands.add_parser(name, help=short, description=told)
        if name == asked:
            module = load(point, "add", "run")
            module.add(command)
            command.set_defaults(command=module.run)
    return parser
