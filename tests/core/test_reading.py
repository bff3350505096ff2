"""What users hand over as text: byte order marks, a home folder, bounds, and messages that stay readable."""

from __future__ import annotations

import codecs
import json
import time
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from genas_plugins import ZOO
from genas_plugins._messages import listed, one_line, shown
from genas_plugins._reading import ReadingError, expand_home, parse_json, parse_yaml, read_text
from genas_plugins.cli import main
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.datasets import load_search_data
from genas_plugins.nasbench201.truth import read_truth
from genas_plugins.search import History, HistoryError, JsonLines

GENOTYPE = ZOO["genas_flatness_c10"].genotype
ARCHITECTURE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
# A mark in front of each text, as Windows' editors and PowerShell write them.
ENCODINGS = {
    "none": (b"", "utf-8"),
    "utf-8": (codecs.BOM_UTF8, "utf-8"),
    "utf-16": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "utf-16 reversed": (codecs.BOM_UTF16_BE, "utf-16-be"),
    "utf-32": (codecs.BOM_UTF32_LE, "utf-32-le"),
}


@pytest.fixture(params=ENCODINGS)
def encode(request: pytest.FixtureRequest) -> Any:
    """Writes a text as an editor of Windows would."""
    mark, encoding = ENCODINGS[request.param]

    def write(path: Path, text: str) -> Path:
        path.write_bytes(mark + text.replace("\n", "\r\n").encode(encoding))
        return path

    return write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_a_genotype_with_a_mark_is_read(encode, tmp_path):
    GENOTYPE.save(tmp_path / "plain.json")
    path = encode(tmp_path / "genotype.json", (tmp_path / "plain.json").read_text())
    assert find_genotype(path).normal == GENOTYPE.normal


def test_a_table_with_a_mark_is_read(encode, tmp_path):
    path = encode(tmp_path / "truth.csv", f'arch,cifar10\n"{ARCHITECTURE}",10.5\n')
    assert read_truth(path) == {ARCHITECTURE: 10.5}


def test_a_history_with_a_mark_is_read(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"index": 0}\r\n{"index": 1}\r\n')
    assert [record["index"] for record in JsonLines(path).records] == [0, 1]


def test_other_encodings_and_long_texts_are_refused(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("größer".encode("latin1"))
    with pytest.raises(ReadingError, match="not text in UTF-8"):
        read_text(path)
    path.write_bytes(b"x" * 11)
    assert read_text(path, limit=11) == "x" * 11
    with pytest.raises(ReadingError, match="more than 10 bytes"):
        read_text(path, limit=10)
    # A device has no end.
    with pytest.raises(ReadingError, match="more than 10 bytes"):
        read_text("/dev/zero", limit=10)
    path.write_bytes(b"[" * 2**21)
    with pytest.raises(ValueError, match=r"text is not a JSON file: it has more than 1,048,576 bytes"):
        find_genotype(path)


def test_home_is_found_from_each_option(home, capsys):
    GENOTYPE.save(home / "genotype.json")
    assert find_genotype("~/genotype.json") == GENOTYPE
    # The shell leaves what follows an equals sign.
    assert main(["plot", "cells", "~/genotype.json", "~/cells.svg"]) == 0
    assert (home / "cells.svg").is_file() and capsys.readouterr().out == f"{home}/cells.svg\n"
    options = expand_home(Namespace(output="~/runs", settings=["~/a.yaml", 3], name="a~b", count=1, none=None))
    assert options == Namespace(output=f"{home}/runs", settings=[f"{home}/a.yaml", 3], name="a~b", count=1, none=None)
    (home / "truth.csv").write_text(f"arch,cifar10\n{ARCHITECTURE},10.5\n")
    assert read_truth("~/truth.csv") == {ARCHITECTURE: 10.5}
    with pytest.raises(FileNotFoundError, match=f"no image folder at {home}/images"):
        load_search_data("image_folder", root="~/images")
    assert not list(Path().iterdir())


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases stand for more than 4,194,304 characters"),
        (MERGES, "aliases stand for more than 4,194,304 characters"),
        ("a: &a [*a]", "refers to itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: " + "1:" * 100_000 + "1", "a number of 200,001 characters"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [", "expected"),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_more_than_it_looks_is_refused_at_once(text, message):
    start = time.monotonic()
    with pytest.raises(ReadingError, match=message) as caught:
        parse_yaml(text)
    assert time.monotonic() - start < 5 and len(str(caught.value)) < 400


def test_yaml_is_read_as_its_own_library_reads_it():
    import yaml

    text = "base: &b {x: 1, y: [1.5, yes, ~]}\nother: {<<: *b, z: 2001-01-02}\nagain: *b\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None and parse_yaml("# nothing\n") is None


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "not JSON"], ids=["deep", "digits", "cut", "text"])
def test_json_that_cannot_be_is_a_reason(text, tmp_path):
    with pytest.raises(ReadingError) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 400
    (tmp_path / "genotype.json").write_text(text)
    with pytest.raises(ValueError, match=r"genotype\.json is not a JSON file"):
        find_genotype(tmp_path / "genotype.json")
    # Not the last line, which a crash may have cut off.
    (tmp_path / "history.jsonl").write_text(text + "\n{}\n")
    with pytest.raises(HistoryError, match="Line 1 of"):
        History(tmp_path / "history.jsonl")


def nested(depth: int) -> Any:
    value: Any = "laugh"
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value",
    [nested(60), {"a": nested(60)}, OrderedDict(a=nested(60)), "x" * 10**7, 10**5000, list(range(10**6))],
    ids=["lists", "dictionary", "derived", "text", "number", "long"],
)
def test_a_shown_value_is_short_whatever_it_holds(value):
    start = time.monotonic()
    assert len(shown(value)) <= 200
    assert time.monotonic() - start < 2


def test_a_shown_value_reads_as_python_writes_it():
    for value in ("text", "it's", 3, -0.5, None, [1, 2.5, "a"], {"a": [1]}, (1,), {"b": {"c": []}}, True, 10**20):
        assert shown(value) == repr(value)


def test_control_characters_are_escaped():
    evil = "a\x1b[31m\nb\r\u202e"
    assert shown(evil) == r"'a\x1b[31m\nb\r\u202e'"
    assert one_line(evil) == r"a\x1b[31m b \u202e"
    assert listed([evil, "größer", "c", "d", "e"]) == r"a\x1b[31m\nb\r\u202e, größer, c, d, ..."
    assert listed(["a", "b"]) == "a, b" and listed([]) == ""
    assert len(one_line("\x1b" * 10**6)) <= 2000
    long = one_line("x" * 5000 + " choose another.")
    assert len(long) == 2000 and long.endswith("choose another.")


def test_what_a_genotype_file_says_is_not_written_out(tmp_path, capsys):
    data = {**GENOTYPE.to_dict(), "code": list(range(100_000))}
    (tmp_path / "genotype.json").write_text(json.dumps(data))
    assert main(["fit", str(tmp_path / "genotype.json")]) == 1
    data["normal"] = [["\x1b[31m" * 1000, 0], *data["normal"][1:]]
    (tmp_path / "genotype.json").write_text(json.dumps(data))
    assert main(["fit", str(tmp_path / "genotype.json")]) == 1
    assert main(["fit", "\x1b[31mx" * 10_000]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(len(line) < 1200 and line.isprintable() for line in lines)
