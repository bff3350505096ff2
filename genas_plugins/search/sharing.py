"""Processes of a distributed run that share the candidates of a search, one each at a time.

All run the same search. What one has measured it tells the others, so that all see the same records; and an exception
in one of them ends all, instead of leaving the others to wait.
"""

from __future__ import annotations

from typing import Any

import torch.distributed

__all__ = ["SharedSearch", "SharedSearchError"]


class SharedSearchError(RuntimeError):
    """Another process of a shared search failed."""


class SharedSearch:
    """The processes of ``torch.distributed``'s default group, which all must run the same search.

    Between two calls of :meth:`exchange` a process works for itself. If it fails there, it calls :meth:`tell` in place
    of the next exchange, on which the others wait.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
    """

    def __init__(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("A search is shared among the processes of torch.distributed: initialise it first.")
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    @classmethod
    def current(cls) -> SharedSearch | None:
        """The processes of this run, or ``None`` where there is but one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        shared = cls()
        return shared if shared.size > 1 else None

    def exchange(self, item: Any) -> list[Any]:
        """Give an item to all processes, and return those of all, by rank.

        Raises:
            SharedSearchError: Another process failed since the last exchange.
        """
        answers = self._gather((item, None))
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise SharedSearchError(f"Process {rank} of {self.size} ended the search: {failure}")
        return [answer for answer, _ in answers]

    def tell(self, error: BaseException) -> None:
        """Let the others know that this process ends; what they told themselves is not told again."""
        if isinstance(error, SharedSearchError):
            return
        try:
            self._gather((None, f"{type(error).__name__}: {error}"))
        except RuntimeError:
            # The connection is what failed: the others see that for themselves.
            return

    def _gather(self, item: Any) -> list[Any]:
        answers: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(answers, item)
        return answers
