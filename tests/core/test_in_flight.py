"""Several candidates at a time: the records are those of one after another, and nothing is begun after an error."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from genas_plugins import SuperNet
from genas_plugins.scoring import CombinedScore, Measurement, MeasurementError
from genas_plugins.search import Evolution, History, InFlight, candidate_seed, run_search, torch_threads
from genas_plugins.spaces import DartsSearchSpace

SPACE = DartsSearchSpace()


def evolution() -> Evolution:
    return Evolution(SPACE, population=9, generations=2, parents=3, mutants=3, crossovers=3, seed=0)


def measure(genotype: Any) -> Measurement:
    if genotype.code[0] == 4:
        raise MeasurementError("The validation loss is nan.")
    return Measurement(genotype.code.count(4) / 3)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def delayed(genotype: Any) -> Measurement:
    """Those that are begun first end last."""
    with lock:
        turn = next(turns)
    time.sleep(0.004 * (3 - turn % 4))
    return measure(genotype)


lock = threading.Lock()
turns: Iterator[int] = iter(range(10**6))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 4, 20])
def test_records_are_those_of_one_after_another(count: int, tmp_path: Path) -> None:
    history, seen = History(tmp_path / "history.jsonl"), []
    records = run_search(evolution(), delayed, history=history, on_record=seen.append, in_flight=InFlight(count))
    expected = timeless(run_search(evolution(), measure))
    assert {record["status"] for record in expected} == {"ok", "failed"}
    assert timeless(records) == expected
    assert records == seen == History(tmp_path / "history.jsonl").records


def test_as_many_as_asked_for_are_measured_at_a_time() -> None:
    # Three meet nine times, which fewer cannot; were they four, one would be left over.
    meeting = threading.Barrier(3, timeout=30)
    inside, most = 0, 0

    def meet(genotype: Any) -> Measurement:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        meeting.wait()
        with lock:
            inside -= 1
        return measure(genotype)

    run_search(evolution(), meet, in_flight=InFlight(3))
    assert most == 3


@pytest.mark.parametrize("killed_at", [0, 4, 9, 13])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_error_nothing_is_begun_and_the_search_goes_on(
    killed_at: int, error: type[BaseException], tmp_path: Path
) -> None:
    begun: list[tuple[int, ...]] = []
    raised = threading.Event()

    def watched(genotype: Any) -> Measurement:
        begun.append(genotype.code)
        if len(begun) > killed_at + 1:
            # The error comes while these are measured, however long a busy disk takes for the records before it.
            raised.wait(5.0)
            time.sleep(0.3)
        return measure(genotype)

    def kill(record: dict[str, Any]) -> None:
        if record["index"] == killed_at:
            raised.set()
            raise error

    path = tmp_path / "history.jsonl"
    with pytest.raises(error):
        run_search(evolution(), watched, history=History(path), on_record=kill, in_flight=InFlight(2))
    # Those that were recorded, and one more in each thread, which has come to its end.
    assert len(begun) <= killed_at + 1 + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("in-flight")]
    assert [record["index"] for record in History(path).records] == list(range(killed_at + 1))
    resumed = run_search(evolution(), measure, history=History(path), in_flight=InFlight(3))
    assert timeless(resumed) == timeless(run_search(evolution(), measure))


def test_an_error_of_a_candidate_comes_in_its_place(tmp_path: Path) -> None:
    proposals = [proposal.candidate for proposal in evolution().ask()]

    def broken(genotype: Any) -> Measurement:
        if genotype == proposals[3]:
            raise RuntimeError("out of memory")
        time.sleep(0.01)
        return Measurement(1.0)

    path = tmp_path / "history.jsonl"
    with pytest.raises(RuntimeError, match="out of memory"):
        run_search(evolution(), broken, history=History(path), in_flight=InFlight(4))
    assert [record["index"] for record in History(path).records] == [0, 1, 2]


@pytest.mark.parametrize(("available", "count", "each"), [(4, 2, 2), (5, 2, 2), (2, 4, 1)])
def test_threads_of_torch_are_divided_and_given_back(threads: None, available: int, count: int, each: int) -> None:
    torch.set_num_threads(available)
    found = list(InFlight(count).map(lambda _: torch.get_num_threads(), range(8)))
    assert found == [each] * 8
    assert torch.get_num_threads() == available
    # Also what a new thread has.
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [available]


@pytest.mark.parametrize("available", [1, 2, 3])
def test_on_a_cpu_there_is_a_candidate_for_each_thread(threads: None, available: int) -> None:
    torch.set_num_threads(available)
    in_flight = InFlight(None)
    meeting = threading.Barrier(available, timeout=30)

    def meet(_: int) -> int:
        # Fewer would wait for ever.
        meeting.wait()
        return torch.get_num_threads()

    assert list(in_flight.map(meet, range(2 * available))) == [1] * 2 * available
    assert (in_flight.count, torch.get_num_threads()) == (available, available)


def test_on_other_devices_there_is_one() -> None:
    assert (InFlight(None, "cuda").count, InFlight(None, "cuda").threads) == (1, None)


def test_threads_that_are_asked_for_are_given_back(threads: None) -> None:
    torch.set_num_threads(2)
    seen = []
    for found in InFlight(1, threads=1).map(lambda _: torch.get_num_threads(), range(2)):
        # Who reads the results computes as before.
        seen.append((found, torch.get_num_threads()))
    assert seen == [(1, 2)] * 2
    with pytest.raises(RuntimeError, match="broken"), torch_threads(1):
        raise RuntimeError("broken")
    assert torch.get_num_threads() == 2


def test_one_at_a_time_stays_in_its_thread() -> None:
    assert set(InFlight().map(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"in_flight must be at least 1, got {count}"):
        InFlight(count)


def scores(device: str, count: int | None) -> list[dict[str, Any]]:
    """Records of a search of a supernet on a device."""
    torch.manual_seed(0)
    supernet = SuperNet(10, 4, 2).to(device)
    inputs, labels = torch.randn(64, 3, 8, 8).to(device), (torch.arange(64) % 10).to(device)
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))
    search = Evolution(SPACE, population=5, generations=2, parents=2, mutants=2, crossovers=1, seed=0)
    score = CombinedScore(sigmas=(1e-3, 3e-3, 6e-3))

    def measured(genotype: Any) -> Measurement:
        generator = torch.Generator(device).manual_seed(candidate_seed(0, SPACE.to_json(genotype)))
        return score(supernet.subnet(genotype), batches, recalibration=batches[:2], generator=generator)

    return timeless(run_search(search, measured, in_flight=InFlight(count, device)))


def flat(records: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> np.ndarray:
    return np.array([key(record) for record in records])


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """The records of one candidate after another on a single core."""
    with torch_threads(1):
        return scores("cpu", None)


@pytest.mark.parametrize("available", [2, 4])
def test_scores_are_the_same_on_any_number_of_cores(threads: None, available: int, alone: list[dict[str, Any]]) -> None:
    torch.set_num_threads(available)
    # To the last bit.
    assert scores("cpu", None) == alone


def test_scores_of_a_supernet_are_those_of_one_after_another(alone: list[dict[str, Any]]) -> None:
    # To the last bit.
    assert scores("cpu", 4) == scores("cpu", 1) == alone


class Stream:
    """What of a CUDA stream is asked for here: who waits for whom."""

    waits: ClassVar[list[tuple[Stream, Stream]]] = []

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self, other))


@pytest.mark.parametrize("fails", [False, True])
def test_streams_wait_for_the_callers_and_it_for_them(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    callers, used = Stream(), threading.local()
    seen: list[Stream] = []
    monkeypatch.setattr(Stream, "waits", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: callers)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(used, "stream", stream))
    meeting = threading.Barrier(2, timeout=30)

    def measure(_: int) -> None:
        meeting.wait()
        seen.append(used.stream)
        # What was put on the caller's stream before is there for this one.
        assert (used.stream, callers) in Stream.waits
        if fails:
            raise RuntimeError("out of paper")

    in_flight = InFlight(2, "cuda:1")
    with pytest.raises(RuntimeError, match="out of paper") if fails else contextlib.nullcontext():
        list(in_flight.map(measure, range(2)))
    first, second = seen
    assert first is not second and first.device == second.device == torch.device("cuda:1")
    # Whatever the caller frees or changes next, work that an error left behind has read it.
    assert {(callers, first), (callers, second)} == set(Stream.waits[2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_streams_are_those_of_one_after_another() -> None:
    several, one = scores("cuda", 4), scores("cuda", 1)
    assert [record["candidate"] for record in several] == [record["candidate"] for record in one]
    # A kernel may be chosen anew, and round otherwise.
    np.testing.assert_allclose(flat(several, lambda r: r["losses"]), flat(one, lambda r: r["losses"]), rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_thread_has_a_stream_of_its_own_for_good() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def stream(_: int) -> int:
        meeting.wait()
        return torch.cuda.current_stream().cuda_stream

    in_flight = InFlight(2, "cuda")
    first, second = (set(in_flight.map(stream, range(2))) for _ in range(2))
    assert first == second and len(first) == 2
    assert torch.cuda.default_stream().cuda_stream not in first
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
