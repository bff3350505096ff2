"""Handles SIGTERM like Ctrl-C, and makes sure that neither is lost.

Python prints and discards an exception that a signal handler raises during a callback (in ``os.fork``, in a finalizer).
So the handler also records the signal, and long-running code polls for it between steps (:func:`raise_pending`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["exit_status", "held", "interruptible", "pending_signal", "raise_pending"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Those of the block that runs, and the first of the last one that has ended.
_pending: list[int] = []
_ended_by: int | None = None
_held = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    Signals that the process ignores, for instance as a background job, stay ignored.
    """
    global _ended_by
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner and number == signal.SIGTERM:
            # In a forked worker that has not set handlers of its own yet: let its parent terminate it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _pending.append(number)
        if not _held:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # None: the handler was not set from Python and could not be restored.
    taken = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
        # What comes next in this process has not been interrupted.
        _ended_by = pending_signal()
        _pending.clear()


@contextmanager
def held() -> Iterator[None]:
    """Within :func:`interruptible`, let a signal wait for the end of the block, where KeyboardInterrupt is raised.

    For calls of other packages that an exception from inside would leave in a state that they cannot get out of.
    """
    global _held
    before = len(_pending)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if len(_pending) > before:
        raise KeyboardInterrupt


def pending_signal() -> int | None:
    """The first signal received in the block of :func:`interruptible` that runs, or None."""
    return _pending[0] if _pending else None


def raise_pending() -> None:
    """Raise KeyboardInterrupt if a signal was received, in case its own exception was discarded."""
    if _pending:
        raise KeyboardInterrupt


def exit_status() -> int:
    """Exit status after an interrupted block, by the shell's convention: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_ended_by or signal.SIGINT)
