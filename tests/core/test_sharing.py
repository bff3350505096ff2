"""Two processes share a search: its records are those of one process, and an error in one ends both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from genas_plugins.scoring import Measurement, MeasurementError
from genas_plugins.search import Evolution, SharedSearch, run_search
from genas_plugins.spaces import DartsSearchSpace

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without the gloo backend",
)

# Each scenario is a search in both processes, one after another in the same group.
PROCESS = """
import json
import sys
from datetime import timedelta

import torch

from genas_plugins.scoring import Measurement, MeasurementError
from genas_plugins.search import Evolution, History, InFlight, SharedSearch, run_search
from genas_plugins.spaces import DartsSearchSpace

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
store = torch.distributed.FileStore(f"{folder}/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
report = {}


def search(name, error=None, at=0, failing_rank=1, file=None, generations=2, in_flight=1):
    calls = []

    def measure(genotype):
        calls.append(list(genotype.code))
        if error is not None and rank == failing_rank and len(calls) > at:
            raise error
        if genotype.code[0] == 4:
            raise MeasurementError("The validation loss is nan.")
        return Measurement(genotype.code.count(4) / 3)

    evolution = Evolution(
        DartsSearchSpace(), population=5, generations=generations, parents=2, mutants=2, crossovers=2, seed=1
    )
    history = None if file is None else History(f"{folder}/{file}", read_only=rank > 0)
    if name == "disk" and rank == 0:
        def full(record):
            raise OSError(28, "No space left on device")
        history.append = full
    try:
        records = run_search(
            evolution, measure, history=history, shared=SharedSearch.current(), in_flight=InFlight(in_flight)
        )
        report[name] = {"records": [record.to_dict() for record in records], "calls": calls}
    except BaseException as error:
        report[name] = {"error": type(error).__name__, "text": str(error)}


search("whole", file="whole.jsonl")
search("short", file="resumed.jsonl", generations=1)
# The second process has not seen what the first wrote.
search("resumed", file="resumed.jsonl" if rank == 0 else "nothing.jsonl")
search("error", RuntimeError("out of memory"), at=1)
search("last", RuntimeError("at the end"), at=4, failing_rank=0)
search("interrupt", KeyboardInterrupt(), failing_rank=0)
search("disk", file="disk.jsonl")
search("in flight", file="in flight.jsonl", in_flight=2)
# As on machines with different numbers of cores.
search("unequal", file="unequal.jsonl", in_flight=2 + rank)
search("after")
with open(f"{folder}/report{rank}.json", "w") as file:
    json.dump(report, file)
torch.distributed.destroy_process_group()
"""


def alone() -> list[dict[str, Any]]:
    """The search of the processes, in this one."""

    def measure(genotype: Any) -> Measurement:
        if genotype.code[0] == 4:
            raise MeasurementError("The validation loss is nan.")
        return Measurement(genotype.code.count(4) / 3)

    evolution = Evolution(DartsSearchSpace(), population=5, generations=2, parents=2, mutants=2, crossovers=2, seed=1)
    return timeless(run_search(evolution, measure))


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., None], warm: Any
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharing")
    two_processes(warm("torch"), folder, PROCESS)
    return folder, [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["whole", "resumed", "in flight", "unequal", "after"])
def test_the_records_are_those_of_one_process(name: str, reports: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, both = reports
    expected = alone()
    assert "failed" in {record["status"] for record in expected}
    first, second = (report[name]["records"] for report in both)
    # Seconds too: who has not measured a candidate has them from who has.
    assert first == second
    assert timeless(first) == expected
    if name != "after":
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == first
    assert not (folder / "nothing.jsonl").exists()


def test_each_candidate_is_measured_once(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    proposed = [record["candidate"] for record in alone()]
    # Five candidates a generation: the first process has the odd one.
    for rank, report in enumerate(reports[1]):
        assert report["whole"]["calls"] == proposed[:5][rank::2] + proposed[5:][rank::2]
        assert report["resumed"]["calls"] == proposed[5:][rank::2]
        # The order in which two threads begin is nobody's promise.
        assert sorted(report["in flight"]["calls"]) == sorted(report["whole"]["calls"])


@pytest.mark.parametrize(
    ("name", "failing", "kind", "text"),
    [
        ("error", 1, "RuntimeError", "out of memory"),
        ("last", 0, "RuntimeError", "at the end"),
        ("interrupt", 0, "KeyboardInterrupt", ""),
        ("disk", 0, "OSError", "[Errno 28] No space left on device"),
    ],
)
def test_an_error_in_one_process_ends_both(
    name: str, failing: int, kind: str, text: str, reports: tuple[Path, list[dict[str, Any]]]
) -> None:
    own, other = reports[1][failing][name], reports[1][1 - failing][name]
    assert own == {"error": kind, "text": text}
    assert other == {
        "error": "SharedSearchError",
        "text": f"Process {failing} of 2 ended the search: {kind}: {text}",
    }


def test_one_process_alone_shares_nothing() -> None:
    assert SharedSearch.current() is None
    with pytest.raises(RuntimeError, match="initialise it first"):
        SharedSearch()
