"""The history file: one line a record, cut lines dropped, damage refused, a full disk survived."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from genas_plugins.search import History, HistoryError, JsonLines, check_records

RECORDS = [{"index": i, "score": 1 / (i + 3), "candidate": [i, 2], "reason": "zu groß\u2028\n"} for i in range(4)]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "history.jsonl"
    history = JsonLines(path)
    for record in RECORDS:
        history.append(record)
    assert history.records == RECORDS
    return path


def test_records_are_json_lines_and_read_back_exactly(path):
    lines = path.read_bytes().split(b"\n")
    assert lines[-1] == b"" and [json.loads(line) for line in lines[:-1]] == RECORDS
    assert JsonLines(str(path)).records == RECORDS


def test_every_cut_of_the_last_line_leaves_the_records_before(path):
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        history = JsonLines(path)
        assert history.records == RECORDS[:3] and path.read_bytes() == whole[:start]
    history.append(RECORDS[3])
    assert path.read_bytes() == whole


def test_a_reader_keeps_new_records_to_itself(path):
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    history = JsonLines(path, read_only=True)
    history.append({"index": 3})
    assert history.records == [*RECORDS[:3], {"index": 3}] and path.read_bytes() == before


def test_a_caller_that_changes_its_record_does_not_change_the_history(path):
    history, record = JsonLines(path), {"index": 4}
    history.append(record)
    record["index"] = 9
    assert history.records[-1] == {"index": 4}


def test_a_new_history_makes_its_file_with_the_first_record(tmp_path):
    history = JsonLines(tmp_path / "new.jsonl")
    assert history.records == [] and not history.path.exists()
    history.append({"index": 0})
    assert history.path.read_text() == '{"index": 0}\n'
    (tmp_path / "empty.jsonl").touch()
    assert JsonLines(tmp_path / "empty.jsonl").records == []
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "missing" / "h.jsonl").append({})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Line 2 of .*history.jsonl is not JSON"),
        (b'{"index": NaN}', "Line 2 of .* is not JSON .NaN"),
        (b"[" * 100_000, "Line 2 of .* is not JSON"),
        (b"\xff", "Line 2 of .* is not JSON"),
        (b"[1]", "Line 2 of .* is not a JSON object"),
    ],
)
def test_damage_before_the_last_line_is_refused_and_left_for_inspection(path, line, message):
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(HistoryError, match=f"{message}.*: remove it and all lines after it"):
        JsonLines(path)
    assert path.read_bytes() == b"\n".join(lines)


LINES = [(json.dumps(record) + "\n").encode() for record in RECORDS]


@pytest.mark.parametrize(
    ("data", "told", "kept"),
    [
        ([*LINES, b"\n"], "1 empty line", 4),
        ([*LINES, b"\0" * 64 + b"\n"], "1 empty line", 4),
        ([*LINES, b"\0" * 4096], "NUL bytes", 4),
        ([*LINES, LINES[3]], "1 repeated line", 4),
        ([*LINES, LINES[3], LINES[3], b" \t\r\n", b"\n"], "2 empty lines and 2 repeated lines", 4),
        ([*LINES[:3], LINES[3][:20]], "1 cut-off last line", 3),
        ([*LINES[:3], LINES[3][:20] + b"\n"], "1 cut-off last line", 3),
        ([*LINES[:3], LINES[3][:20] + b"\0" * 64 + b"\n", b"\n"], "1 empty line and 1 cut-off last line", 3),
        ([LINES[0], b"\n", LINES[1], b"\0" * 10 + LINES[2], LINES[3]], "1 empty line", 4),
        ([LINES[0], LINES[0], *LINES[1:]], "1 repeated line", 4),
    ],
)
def test_what_a_crash_leaves_is_removed_in_one_line_of_the_log(path, caplog, data, told, kept):
    path.write_bytes(b"".join(data))
    reader = JsonLines(path, read_only=True)
    assert reader.records == RECORDS[:kept] and path.read_bytes() == b"".join(data) and caplog.text == ""
    with caplog.at_level(logging.WARNING):
        history = JsonLines(path)
    assert history.records == RECORDS[:kept]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: removed {told}, as a crash may leave."]
    caplog.clear()
    history.append({"index": kept})
    assert path.read_bytes() == b"".join([*LINES[:kept], f'{{"index": {kept}}}\n'.encode()])
    assert JsonLines(path).records == [*RECORDS[:kept], {"index": kept}] and caplog.text == ""


@pytest.mark.parametrize("text", ["\ufeff", ""], ids=["a byte order mark", "none"])
def test_a_history_that_an_editor_has_saved_is_read_as_it_is(path, caplog, text):
    path.write_bytes(text.encode() + b"".join(LINES).replace(b"\n", b"\r\n"))
    before = path.read_bytes()
    assert JsonLines(path).records == RECORDS and path.read_bytes() == before and caplog.text == ""


def test_a_last_line_that_no_search_has_begun_is_refused(path):
    path.write_bytes(b"".join(LINES) + b"not JSON\n")
    with pytest.raises(HistoryError, match=r"Line 5 of .* is not JSON"):
        JsonLines(path)
    assert path.read_bytes() == b"".join(LINES) + b"not JSON\n"


def test_two_writers_do_not_interleave(path):
    first, second = JsonLines(path), JsonLines(path)
    first.append({"index": 4})
    with pytest.raises(HistoryError, match="written to by somebody else"):
        second.append({"index": 4, "other": True})
    first.append({"index": 5})
    path.unlink()
    with pytest.raises(HistoryError, match=r"written to by somebody else \(0 bytes"):
        first.append({"index": 6})
    assert JsonLines(path).records == [] and second.records == RECORDS


OK = {
    **{"index": 0, "generation": 0, "origin": "random", "candidate": [1, 2], "status": "ok", "score": 2.5},
    **{"shares": {"flatness": 1.0}, "sigmas": [0.1, 0.2], "losses": [1.0, 2.0], "seconds": 0.25},
}
FAILED = {**OK, "index": 1, "status": "failed", "score": None, "reason": "The loss is nan."}
DROPPED = {**OK, "index": 2, "status": "dropped", "score": None, "estimate": 1.5, "standard_error": 0.5, "images": 64}


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"index": 0}, "has the index 0 where 1 belongs"),
        (0, {"status": None}, "has the status None, expected one of ok, failed, dropped"),
        (0, {"status": ["ok"]}, r"has the status \['ok'\], expected one of"),
        (0, {"score": "2.5"}, "has '2.5' as score"),
        (0, {"score": None}, "has None as score"),
        (0, {"shares": [1.0]}, r"has \[1.0\] as shares"),
        (0, {"losses": [1.0]}, "does not have as many losses as sigmas"),
        (0, {"seconds": True}, "has True as seconds"),
        (1, {"score": 1.0}, "has 1.0 as score"),
        (2, {"images": "x" * 5000}, r"has 'x{1,60} \.\.\. x{1,60}' as images"),
        *((0, {key: ...}, f"lacks {key}|has the") for key in ("index", "generation", "origin", "candidate", "status")),
        *((0, {key: ...}, f"lacks {key}") for key in ("score", "shares", "seconds")),
        *((0, {key: ...}, "does not have as many losses as sigmas") for key in ("losses", "sigmas")),
        (1, {"reason": ...}, "lacks reason"),
        *((2, {key: ...}, f"lacks {key}") for key in ("estimate", "standard_error", "images")),
    ],
)
def test_records_that_no_search_writes_are_refused_by_line(tmp_path, number, changes, message):
    path = tmp_path / "history.jsonl"
    records = [OK, FAILED, DROPPED]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    check_records(History(path))
    changed = {key: value for key, value in {**records[number], **changes}.items() if value is not ...}
    records[number] = changed
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(HistoryError, match=f"^Line {number + 1} of .*history.jsonl ({message}).*: remove it and all"):
        check_records(History(path))


def test_a_number_without_json_is_refused_and_not_written(path):
    history, before = JsonLines(path), path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        history.append({"score": float("nan")})
    assert path.read_bytes() == before and history.records == RECORDS


FULL_DISK = """
import json, os, resource, signal, sys
from genas_plugins.search import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
history = JsonLines(sys.argv[1])
limit = os.path.getsize(sys.argv[1]) + 40
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    history.append({"index": 4, "text": "x" * 1000})
except OSError as error:
    history.append({"index": 4})
    print(json.dumps([error.errno, len(history.records)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_full_disk_costs_only_the_record_that_did_not_fit(path, warm):
    result = warm("torch")(FULL_DISK, path, folder=path.parent)
    # 27 is EFBIG; the shorter record after it still fits, behind whole lines.
    assert json.loads(result.stdout) == [27, 5]
    assert JsonLines(path).records == [*RECORDS, {"index": 4}]
