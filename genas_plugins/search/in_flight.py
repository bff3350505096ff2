"""Several candidates at a time on one device: while one waits for its launches, another computes.

What a score needs beside the device, building subnets, drawing noise and launching kernels on small batches, takes a
GPU's time without using it. Threads overlap that of one candidate with the work of another, each on a CUDA stream of
its own. Over several devices, processes share a search (:mod:`genas_plugins.search.sharing`); each may have several
candidates in flight.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["InFlight"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class InFlight:
    """Measures up to ``count`` candidates at the same time.

    On a CPU the threads divide those of PyTorch among them; fewer of these may add up in another order, so that scores
    can differ in their last digits from those of one after another. Memory for activations is needed ``count`` times.

    Args:
        count: 1 measures one after another, in the thread that asks.
        device: On which they are measured.

    Raises:
        ValueError: ``count`` is below 1.
    """

    def __init__(self, count: int = 1, device: torch.device | str = "cpu") -> None:
        if count < 1:
            raise ValueError(f"in_flight must be at least 1, the number of candidates at a time, got {count}.")
        self.count = count
        self.device = torch.device(device)
        # For good: the memory that PyTorch keeps for a stream is not that of another.
        self._streams: list[torch.cuda.Stream] = []

    def map(self, measure: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``measure(item)`` in the order of the items; an exception comes where its result would.

        What ``measure`` returns must not be on the device: nothing waits for it there. When the iterator is closed, or
        one has failed, those that are being measured are waited for and the others are not begun.

        Args:
            measure: Measures one candidate and changes nothing that another reads.
            items: Candidates.
        """
        if self.count == 1:
            yield from map(measure, items)
            return
        with self._threads() as pool:
            futures = [pool.submit(measure, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        threads = torch.get_num_threads()
        streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        if self.device.type == "cuda":
            self._streams = self._streams or [torch.cuda.Stream(self.device) for _ in range(self.count)]
            for stream in self._streams:
                # Weights and images may still be on their way.
                stream.wait_stream(torch.cuda.current_stream(self.device))
                streams.put(stream)

        def begin() -> None:
            torch.set_num_threads(max(1, threads // self.count))
            if self.device.type == "cuda":
                # Of this thread alone, with its device.
                torch.cuda.set_stream(streams.get())

        try:
            with ThreadPoolExecutor(self.count, "in-flight", begin) as pool:
                yield pool
        finally:
            # Threads that are begun later would have the workers' number.
            torch.set_num_threads(threads)
            for stream in self._streams:
                # An error may have left work behind, which reads weights and images that are freed or changed now.
                torch.cuda.current_stream(self.device).wait_stream(stream)
