"""The history file: one line a record, cut lines dropped, damage refused, a full disk survived."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import genas_plugins
from genas_plugins.search import History, HistoryError

RECORDS = [{"index": i, "score": 1 / (i + 3), "candidate": [i, 2], "reason": "zu groß\u2028\n"} for i in range(4)]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for record in RECORDS:
        history.append(record)
    assert history.records == RECORDS
    return path


def test_records_are_json_lines_and_read_back_exactly(path):
    lines = path.read_bytes().split(b"\n")
    assert lines[-1] == b"" and [json.loads(line) for line in lines[:-1]] == RECORDS
    assert History(str(path)).records == RECORDS


def test_every_cut_of_the_last_line_leaves_the_records_before(path):
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        history = History(path)
        assert history.records == RECORDS[:3] and path.read_bytes() == whole[:start]
    history.append(RECORDS[3])
    assert path.read_bytes() == whole


def test_a_reader_keeps_new_records_to_itself(path):
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    history = History(path, read_only=True)
    history.append({"index": 3})
    assert history.records == [*RECORDS[:3], {"index": 3}] and path.read_bytes() == before


def test_a_caller_that_changes_its_record_does_not_change_the_history(path):
    history, record = History(path), {"index": 4}
    history.append(record)
    record["index"] = 9
    assert history.records[-1] == {"index": 4}


def test_a_new_history_makes_its_file_with_the_first_record(tmp_path):
    history = History(tmp_path / "new.jsonl")
    assert history.records == [] and not history.path.exists()
    history.append({"index": 0})
    assert history.path.read_text() == '{"index": 0}\n'
    (tmp_path / "empty.jsonl").touch()
    assert History(tmp_path / "empty.jsonl").records == []
    with pytest.raises(FileNotFoundError):
        History(tmp_path / "missing" / "h.jsonl").append({})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Line 2 of .*history.jsonl is not JSON"),
        (b"", "Line 2 of .* is not JSON"),
        (b"\xff", "Line 2 of .* is not JSON"),
        (b"[1]", "Line 2 of .* is not a JSON object"),
    ],
)
def test_damage_before_the_last_line_is_refused_and_left_for_inspection(path, line, message):
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(HistoryError, match=message):
        History(path)
    assert path.read_bytes() == b"\n".join(lines)


def test_a_number_without_json_is_refused_and_not_written(path):
    history, before = History(path), path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        history.append({"score": float("nan")})
    assert path.read_bytes() == before and history.records == RECORDS


FULL_DISK = """
import json, os, resource, signal, sys
from genas_plugins.search import History
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
history = History(sys.argv[1])
limit = os.path.getsize(sys.argv[1]) + 40
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    history.append({"index": 4, "text": "x" * 1000})
except OSError as error:
    history.append({"index": 4})
    print(json.dumps([error.errno, len(history.records)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_full_disk_costs_only_the_record_that_did_not_fit(path):
    root = str(Path(genas_plugins.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    # 27 is EFBIG; the shorter record after it still fits, behind whole lines.
    assert json.loads(result.stdout) == [27, 5]
    assert History(path).records == [*RECORDS, {"index": 4}]
