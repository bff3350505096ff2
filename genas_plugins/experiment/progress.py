"""Progress bars for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genas_plugins._optional import require

__all__ = ["Bar"]


class Bar:
    """A bar with what is known so far and the time left.

    Args:
        name: What progresses.
        total: Steps in all.
        done: Steps that were done before.

    Raises:
        MissingPackageError: tqdm is not installed.
    """

    def __init__(self, name: str, total: int, done: int) -> None:
        tqdm = require("tqdm", extra="nni", purpose="progress bars").tqdm
        self._bar = tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, mininterval=0.5)

    def step(self, shown: Mapping[str, Any]) -> None:
        """One step further; ``shown`` replaces the figures at the end unless it is empty."""
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
