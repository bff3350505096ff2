"""NNI's own command line, nnictl, with a web server that only this machine reaches."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import MutableMapping
from pathlib import Path

import nni  # noqa: F401

from genas_plugins._optional import require

__all__ = ["add", "keep_to_loopback", "run"]

HOST_VARIABLE = "GENAS_NNI_HOST"


def keep_to_loopback(environment: MutableMapping[str, str]) -> None:
    """Let NNI's web servers that are started with these variables listen on the loopback address alone.

    They have no password, and whoever reaches one can run commands as its user. ``GENAS_NNI_HOST`` names another
    address.

    Args:
        environment: Changed.
    """
    script = Path(__file__).with_name("loopback.js")
    options = environment.get("NODE_OPTIONS", "")
    if str(script) not in options:
        quoted = f'"{script}"'.replace("\\", "\\\\")
        environment["NODE_OPTIONS"] = f"{options} --require={quoted}".strip()


def add(parser: argparse.ArgumentParser) -> None:
    """Give ``genas nnictl`` its options, which are all nnictl's."""
    parser.epilog = "example: genas nnictl create --config configs/nni/cluster/flatness_local.yaml"
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command line of nnictl")


def run(options: argparse.Namespace) -> int:
    """Run nnictl."""
    # nnictl imports it, and says no more than that it is missing.
    require("pkg_resources", install="'setuptools<82'", purpose="nnictl")
    keep_to_loopback(os.environ)
    sys.argv = ["nnictl", *options.arguments]
    runpy.run_module("nni.tools.nnictl.nnictl", run_name="__main__")
    return 0
