"""JSON schemas of our YAML files: they are those of the code, and tell an editor what the code would refuse."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from genas_plugins.correlation.settings import load_settings
from genas_plugins.experiment.config import ConfigError, Experiment, Space, Training, load, parse
from genas_plugins.files import packaged_configs

ROOT = Path(__file__).parents[2]
PLACES = {
    "nni": "genas_plugins.experiment.config:Experiment",
    "correlate": "genas_plugins.correlation.settings:File",
    "timm": "timm_models.settings:File",
}
FILES = [path for host in PLACES for path in packaged_configs(host).values()]


def schema(host: str) -> dict[str, Any]:
    """The schema that comes with the package."""
    return json.loads(packaged_configs("schemas", ".json")[host].read_text(encoding="utf-8"))


@pytest.mark.parametrize("host", PLACES)
def test_what_is_shipped_is_what_the_command_writes(host: str, warm: Callable[..., Any], tmp_path: Path) -> None:
    if host == "timm":
        pytest.importorskip("timm")
    command = ("-m", "genas_plugins.schema", PLACES[host])
    done = warm("torch").python(*command, folder=tmp_path).wait()
    assert done.status == 0, done.stderr
    shipped = packaged_configs("schemas", ".json")[host].read_text(encoding="utf-8")
    assert done.stdout == shipped, f"write it anew: python {' '.join(command)} > configs/schemas/{host}.json"
    Draft202012Validator.check_schema(json.loads(shipped))
    # What editors would not understand.
    assert not re.search(r'"(g[te]|l[te])":|:\w+:`', shipped)


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in FILES])
def test_a_shipped_file_names_its_schema_and_follows_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    found = (path.parent / name).resolve()
    assert found == packaged_configs("schemas", ".json")[path.parent.name].resolve()
    Draft202012Validator(json.loads(found.read_text(encoding="utf-8"))).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("nni", "{}"),
        ("nni", "serch: {}"),
        ("nni", "search: {popultion: 1}"),
        ("nni", "search: null"),
        ("nni", "seed: -1"),
        ("nni", "seed: '1'"),
        ("nni", "deterministic: 1"),
        ("nni", "data: {name: svhn}"),
        ("nni", "training: {learning_rate: 0}"),
        ("nni", "training: {momentum: 1}"),
        ("nni", "training: {devices: all}"),
        ("nni", "score: {metric: sharpness}"),
        ("nni", "score: {sigmas: 0.1}"),
        ("correlate", "[]"),
        ("correlate", "- {metric: accuracy}"),
        ("correlate", "- {name: a, metrik: accuracy}"),
        ("correlate", "- {name: a, images: 0}"),
        ("correlate", "- {name: a, noise: none}"),
        ("correlate", "- {name: a, rank_sum: [b]}"),
        ("timm", "{}"),
        ("timm", "bach_size: 3"),
        ("timm", "batch_size: 0"),
        ("timm", "genas: {bach_size: 3}"),
        ("timm", "genas: {genas: {lr: 1.0}}"),
        ("timm", "lr: 0"),
        ("timm", "crop_pct: 1.5"),
        ("timm", "clip_mode: nope"),
        ("timm", "scale: [0.08]"),
        ("timm", "mean: [0.5, 0.5]"),
    ],
)
def test_what_the_code_refuses_an_editor_marks(host: str, text: str, tmp_path: Path) -> None:
    assert not Draft202012Validator(schema(host)).is_valid(yaml.safe_load(text))
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    if host == "timm":
        pytest.importorskip("timm")
        read = importlib.import_module("timm_models.settings").read_config
    else:
        read = load if host == "nni" else load_settings
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        read(path)


def plain_types(found: dict[str, Any]) -> dict[str, set[str]]:
    """The JSON types of each setting."""
    return {
        name: {kind.get("type", "object") for kind in entry.get("anyOf", [entry])}
        for name, entry in found["properties"].items()
        if "$ref" not in entry
    }


# What YAML makes of values, by the only type that may take it. A whole number is a number.
OTHERS = {"boolean": True, "integer": 3, "number": 0.5, "string": "text", "null": None, "array": [], "object": {}}


@pytest.mark.parametrize("section", ["", "space", "data", "training", "score", "search"])
def test_every_setting_refuses_values_of_other_types(section: str) -> None:
    """A setting whose type converts (1 to true, "3" to 3) would be found here, however it is declared."""
    whole = schema("nni")
    kinds = plain_types(whole["$defs"][section.capitalize()] if section else whole)
    assert kinds
    for name, types in kinds.items():
        for other, value in OTHERS.items():
            if other in types or (other, "number") == ("integer", *(types & {"number"})):
                continue
            data = {section: {name: value}} if section else {name: value}
            path = f"{section}.{name}" if section else name
            with pytest.raises(ConfigError, match=rf"^{path} must (be|hold) .*, got"):
                parse(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"space": {5: 1}}, "unknown key space.5; valid keys of space: "),
        ({None: 1}, "unknown key None; valid keys of the experiment: seed, "),
        ({"self": 1}, "unknown key self; valid keys of the experiment: seed, "),
        ({"data": {"\x1b[31m": 1}}, "unknown key data.\\x1b[31m; valid keys of data: "),
        # A key that is not known before what is wrong with others.
        ({"seed": "x", "zzz": 1}, "unknown key zzz; "),
        ([1], "the experiment must hold keys and values, got [1]."),
        ({"training": {"learning_rate": "1e999"}}, "training: learning_rate must be finite, got '1e999'."),
        ({"training": {"devices": 0}}, "training: devices must be at least 1, got 0."),
        ({"score": {"sigmas": [0.1, float("inf")]}}, "score: sigmas[1] must be finite, got inf."),
        ({"score": {"sigmas": {0.1, 0.2}}}, "score.sigmas must be a list of numbers, got {0.1, 0.2}."),
        ({"search": {"parents": 10**400}}, "search: "),
    ],
)
def test_a_sentence_for_what_yaml_can_hold(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(data)
    assert str(raised.value).startswith(message)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


def test_python_is_told_the_same() -> None:
    for make, message in (
        (lambda: Training(epochs=0), "epochs must be at least 1, got 0."),
        (lambda: Training(epoch=1), "unknown key epoch (did you mean epochs?); valid keys of Training: epochs, "),
        (lambda: Experiment(space=Space(num_cells=3), seed=True), "seed must be a whole number, got True."),
        (lambda: Space(init_channels=3), "init_channels must be a positive even number, got 3."),
    ):
        with pytest.raises(ConfigError) as raised:
            make()
        assert str(raised.value).startswith(message)
        # pydantic's own words for it are many lines.
        assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_an_older_run_is_read() -> None:
    # As written before score and noise had one class, and before there were racing, in_flight and hessian_directions.
    old = {
        "seed": 3,
        "deterministic": False,
        "space": {"name": "darts", "init_channels": 8, "num_cells": 5, "stem": "cifar"},
        "score": {
            "metric": "angle+flatness",
            "sigmas": [0.001, 0.003],
            "alpha": 1.0,
            "noise": "cumulative",
            "draws": 1,
        },
        "search": {"population": 20, "generations": 2, "parents": 5, "mutants": 10, "crossovers": 6},
    }
    experiment = parse(old)
    assert (experiment.seed, experiment.space.num_cells, experiment.search.racing) == (3, 5, None)
    assert experiment.score.build().metrics == {"angle", "flatness"}
    assert experiment.score.sigmas == (0.001, 0.003)


def test_settings_of_the_time_when_the_momentum_had_a_short_name(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("- {name: a, momentum: 0.1}\n- {name: b, recalibration_momentum: 1e-1}\n")
    assert [setting.score.recalibration_momentum for setting in load_settings(path)[0]] == [0.1, 0.1]
    path.write_text("- {name: a, momentum: 0.1, recalibration_momentum: 0.2}\n")
    with pytest.raises(ConfigError, match=r"unknown key momentum; valid keys of a setting: .*recalibration_momentum"):
        load_settings(path)
