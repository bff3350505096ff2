"""SIGTERM is what Ctrl-C is, and neither is lost.

An exception that a signal handler raises while Python runs a callback (in ``os.fork``, in a finalizer) is printed and
forgotten. So the handler also notes the signal, and whatever runs for long asks between its steps.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["exit_status", "interruptible", "pending_signal", "raise_pending"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_pending: list[int] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    A signal that the process ignores, as those of a job in the background may be, stays ignored.
    """
    _pending.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner and number == signal.SIGTERM:
            # A worker that was forked and has no handlers of its own yet: how its parent ends it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _pending.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # None: set by other than Python, and could not be put back.
    taken = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def pending_signal() -> int | None:
    """The first signal that came in the last block of :func:`interruptible`."""
    return _pending[0] if _pending else None


def raise_pending() -> None:
    """Raise the KeyboardInterrupt of a signal whose exception was swallowed."""
    if _pending:
        raise KeyboardInterrupt


def exit_status() -> int:
    """The exit status of a command that a signal ended, as a shell has it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (pending_signal() or signal.SIGINT)
