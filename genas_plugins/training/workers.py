"""The processes of loaders, where Python starts each from nothing."""

from __future__ import annotations

import multiprocessing

__all__ = ["preload"]


def preload(*modules: str) -> None:
    """Start the workers of loaders with ``modules`` imported, where Python starts them by a fork server.

    It does on Linux from 3.14 on, and a loader that does not keep its workers starts them anew in every epoch: each
    would import PyTorch and its host first, which takes longer than a small epoch. The server imports once and forks.
    This setting belongs to the process, so it is for commands and for users' programs, not for a library.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(list(modules))
