"""Several candidates at a time on one device: while one waits for its launches, another computes.

What a score needs beside the device, building subnets, drawing noise and launching kernels on small batches, takes a
GPU's time without using it. Threads overlap that of one candidate with the work of another, each on a CUDA stream of
its own. On a CPU each candidate has a core to itself, instead of all cores one candidate. Over several devices,
processes share a search (:mod:`genas_plugins.search.sharing`); each may have several candidates in flight.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from genas_plugins.checks import check_count

__all__ = ["InFlight", "torch_threads"]

_MOST = 1_024

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with so many of PyTorch's threads in this thread, and afterwards with as many as before.

    Args:
        count: ``None`` changes nothing.
    """
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


class InFlight:
    """Measures up to ``count`` candidates at the same time.

    A small network keeps several threads of PyTorch waiting for one another, at the end of every operation; on cores
    that other work keeps busy they hardly get on. Candidates wait for nobody. So, by default on a CPU, each is
    measured on one thread, and as many of them at a time as PyTorch has threads, which is the number of cores unless
    somebody says otherwise (``OMP_NUM_THREADS``, ``taskset``, :func:`torch.set_num_threads`). What one thread computes
    does not depend on how many there are: scores are the same to the last bit on any number of cores.

    Memory for activations is needed ``count`` times.

    >>> list(InFlight(2).map(lambda number: number**2, range(4)))
    [0, 1, 4, 9]

    Args:
        count: 1 measures one after another, in the thread that asks. ``None`` chooses: on a CPU as above, on other
            devices 1.
        device: On which they are measured.
        threads: PyTorch's threads for each candidate. ``None``: one where ``count`` is chosen on a CPU; otherwise all
            that there are, divided among the candidates. With another number of them sums are added in another order,
            and scores differ in their last digits.

    Raises:
        TypeError: A number is not whole.
        ValueError: A number is below 1, or more than any device could hold.
    """

    def __init__(self, count: int | None = 1, device: torch.device | str = "cpu", threads: int | None = None) -> None:
        self.device = torch.device(device)
        if count is None:
            on_cpu = self.device.type == "cpu"
            count = min(torch.get_num_threads(), _MOST) if on_cpu and threads is None else 1
            threads = 1 if on_cpu and threads is None else threads
        self.count = check_count("in_flight", count, most=_MOST)
        self.threads = None if threads is None else check_count("threads", threads, most=_MOST)
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
            for item in items:
                # Not around the whole: what the caller does in between is not ours.
                with torch_threads(self.threads):
                    result = measure(item)
                yield result
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
            torch.set_num_threads(self.threads or max(1, threads // self.count))
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
