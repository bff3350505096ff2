"""Experiment files: those that we ship hold what their names claim, and a wrong one is told in a sentence."""

from __future__ import annotations

import codecs
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

import genas_plugins
from genas_plugins.correlation.settings import load_settings
from genas_plugins.experiment.config import ConfigError, Experiment, config_names, dump, find_config, load, parse
from genas_plugins.experiment.run_folder import load_data
from genas_plugins.scoring import CombinedScore

SHIPPED = (
    "darts_cifar100_angle_flatness",
    "darts_cifar100_flatness",
    "darts_cifar10_flatness",
    "darts_cifar10_reduced",
    "darts_imagenet_flatness",
    "nasbench201_cifar10_flatness",
    "nasbench201_cifar10_reduced",
    "nasbench201_cifar10_small",
    "quickstart_digits",
)
# Section 4.1 of the paper, its Table 8 for gamma, and the official supernet for what the paper leaves out.
PAPER_SIGMAS = {"cifar10": (1e-5, 5e-5, 1e-4), "cifar100": (1e-3, 3e-3, 6e-3)}


def test_the_shipped_files_are_these() -> None:
    assert tuple(config_names()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_loads_and_its_name_is_true(name: str) -> None:
    experiment = load(name)
    parts = name.split("_")
    assert experiment.space.name == ("nasbench201" if parts[0] == "nasbench201" else "darts")
    if parts[0] in ("darts", "nasbench201"):
        data = {"imagenet": "image_folder"}.get(parts[1], parts[1])
        sizes = {"reduced", "small"}
        assert experiment.data.name == ("image_folder" if sizes & set(parts) else data)
        assert parts[1] in (experiment.data.root or "")
        metric = "+".join(part for part in parts[2:] if part not in sizes) or "flatness"
        assert experiment.score.metric == metric
        assert experiment.space.stem == ("imagenet" if parts[1] == "imagenet" else "cifar")
    else:
        assert experiment.data.name == parts[1]
        assert experiment.data.root is None
        # A mirrored digit is another sign.
        assert not experiment.data.flip
    assert experiment.score.build().metric == experiment.score.metric


def test_the_search_in_nas_bench_201_has_the_settings_of_the_paper() -> None:
    experiment = load("nasbench201_cifar10_flatness")
    assert (experiment.space.init_channels, experiment.space.cells_per_stage) == (16, 5)
    assert (experiment.training.epochs, experiment.training.weight_decay) == (250, 5e-4)
    assert experiment.score.sigmas == (2e-3, 1e-2, 2e-2)
    assert (experiment.search.population, experiment.search.generations) == (100, 20)


@pytest.mark.parametrize("name", ["darts_cifar10_flatness", "darts_cifar100_flatness", "darts_cifar100_angle_flatness"])
def test_the_searches_of_the_paper_have_its_settings(name: str) -> None:
    experiment = load(name)
    space = experiment.space
    assert (space.name, space.init_channels, space.num_cells, space.stem) == ("darts", 16, 8, "cifar")
    training = experiment.training
    assert (training.epochs, training.batch_size) == (250, 64)
    assert (training.learning_rate, training.final_learning_rate) == (0.025, 0.001)
    assert (training.momentum, training.weight_decay, training.gradient_clip) == (0.9, 3e-4, 5.0)
    assert training.decay_unsampled
    assert training.precision == "32-true"
    data = experiment.data
    assert (data.flip, data.crop_padding, data.random_labels, data.image_size) == (True, 4, False, None)
    # All of the 25,000 that half of the training images are.
    assert (data.train_images, data.validation_images) == (None, None)
    search = dataclasses.asdict(experiment.search)
    # No budget, and the score alone.
    free = {"min": None, "max": None}
    assert search.pop("constraints") == {"params": free, "macs": free, "latency": free}
    assert (search.pop("objectives"), search.pop("counted")["network"]) == ((), "trained")
    assert search.pop("evaluations") is None
    assert (search.pop("service"), search.pop("workers")) == (None, 1)
    assert search == {
        "population": 50,
        "generations": 20,
        "parents": 10,
        "mutants": 25,
        "crossovers": 25,
        "mutation_probability": 0.1,
        "racing": None,
        "in_flight": None,
    }
    score = experiment.score
    assert score.sigmas == PAPER_SIGMAS[data.name]
    assert (score.alpha, score.gamma, score.noise, score.where) == (1.0, 16.0, "cumulative", "all")
    assert (score.recalibration_images, score.recalibration_batch_size) == (850, 64)


def test_imagenet_and_small_searches_keep_the_protocol_of_the_paper_where_they_say_so() -> None:
    imagenet = load("darts_imagenet_flatness")
    assert imagenet.data.storage == "disk"
    assert imagenet.data.validation_images == 25000
    assert imagenet.search == load("darts_cifar100_flatness").search
    assert imagenet.score.sigmas == PAPER_SIGMAS["cifar100"]
    # The paper's sigmas for NAS-Bench-201.
    assert load("darts_cifar10_reduced").score.sigmas == (2e-3, 1e-2, 2e-2)
    for name in ("darts_cifar10_reduced", "quickstart_digits"):
        small = load(name)
        assert small.score.metric == "flatness"
        assert small.search.population * small.search.generations <= 160


def test_defaults_are_those_of_the_classes_that_they_feed() -> None:
    assert Experiment().score.build() == CombinedScore()


def test_the_configs_are_found_in_a_checkout_and_in_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "genas_plugins"
    for folder, name in ((package.parent / "configs" / "nni", "stranger"), (package / "configs" / "nni", "installed")):
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text("seed: 7\n")
    monkeypatch.setattr(genas_plugins, "__file__", str(package / "__init__.py"))
    assert list(config_names()) == ["installed"]
    assert load("installed").seed == 7


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart_digits").write_text("seed: 5")
    assert load("quickstart_digits").seed == 5
    assert find_config("quickstart_digits") == Path("quickstart_digits")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_dumped_is_loaded_again(name: str, tmp_path: Path) -> None:
    experiment = load(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump(experiment))
    assert load(path) == experiment
    data = yaml.safe_load(path.read_text())
    # Every setting is spelled out.
    for section in dataclasses.fields(Experiment):
        value = getattr(experiment, section.name)
        if dataclasses.is_dataclass(value):
            assert list(data[section.name]) == [field.name for field in dataclasses.fields(value)]


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_a_small_number_needs_no_dot(text: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"training: {{weight_decay: {text}}}\nscore: {{sigmas: [{text}, 5e-5, 1e-4]}}")
    experiment = load(path)
    assert experiment.training.weight_decay == 1e-5
    assert experiment.score.sigmas == (1e-5, 5e-5, 1e-4)


def test_overrides_come_on_top(tmp_path: Path) -> None:
    experiment = load(
        "quickstart_digits",
        [
            "seed=3",
            "search.generations=2",
            "score.sigmas=[1e-3, 2e-3]",
            "data.root=null",
            "training.devices=auto",
            "score.metric=angle+flatness",
        ],
    )
    assert (experiment.seed, experiment.search.generations) == (3, 2)
    assert experiment.score.sigmas == (1e-3, 2e-3)
    assert (experiment.data.root, experiment.training.devices) == (None, "auto")
    assert experiment.score.metric == "angle+flatness"
    assert dataclasses.replace(experiment.training, devices=1) == load("quickstart_digits").training
    short = tmp_path / "short.yaml"
    short.write_text("seed: 3")
    assert load(short) == Experiment(seed=3)
    assert load(short, ["search.population=60"]).search.population == 60


def section(name: str, /, **values: Any) -> dict[str, Any]:
    return {name: values}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"serch": {}}, ["unknown key serch", "did you mean search?", "seed, deterministic, space"]),
        (section("search", popultion=1), ["unknown key search.popultion", "did you mean population?", "generations"]),
        (section("score", zzz=1), ["unknown key score.zzz;", "metric, alpha, gamma"]),
        ({"seed": "one"}, ["seed must be a whole number, got 'one'"]),
        ({"seed": 1.5}, ["seed must be a whole number"]),
        ({"seed": True}, ["seed must be a whole number"]),
        ({"deterministic": 1}, ["deterministic must be true or false, got 1"]),
        ({"search": None}, ["search must hold keys and values, got None"]),
        (section("data", name="svhn"), ["data.name must be one of digits, cifar10, cifar100", "'svhn'"]),
        (section("data", root=3), ["data.root must be text or null, got 3"]),
        (section("data", storage=[]), ["data.storage must be one of memory, disk"]),
        (section("training", learning_rate="fast"), ["training.learning_rate must be a number, got 'fast'"]),
        (section("training", devices="all"), ["training.devices must be a whole number or one of auto"]),
        (section("training", precision="8"), ["training.precision must be one of 32-true"]),
        (section("training", epochs=0), ["training: epochs must be at least 1, got 0"]),
        (section("training", batch_size=0), ["batch_size must be at least 1"]),
        (section("training", checkpoint_every=0), ["checkpoint_every must be at least 1"]),
        (section("training", checkpoint_every=100), ["checkpoint_every must divide epochs (250)", "got 100"]),
        (section("training", final_learning_rate=0.1), ["final_learning_rate must be positive and at most", "0.025"]),
        (section("score", sigmas=0.1), ["score.sigmas must be a list of numbers, got 0.1"]),
        (section("score", sigmas=[0.1, "x"]), ["score.sigmas[1] must be a number, got 'x'"]),
        (section("score", sigmas=[0.2, 0.1]), ["score: sigmas must be", "strictly increasing", "[0.2, 0.1]"]),
        (section("score", sigmas=[0.1]), ["at least two"]),
        (
            section("score", metric="sharpness"),
            ["score.metric must be one of flatness, angle, accuracy, angle+flatness", "'sharpness'"],
        ),
        (section("score", noise="hessian", common=True), ["score", "'hessian' cannot be common"]),
        (section("score", hessian_directions=0), ["hessian_directions must be at least 1, got 0"]),
        (section("score", noise="none"), ["score.noise must be one of cumulative, independent, shared", "got 'none'"]),
        (section("score", where="stem"), ["score.where must be one of all, cells, got 'stem'"]),
        (section("score", gamma=-1), ["gamma must be at least 0"]),
        (section("score", recalibration_momentum=2), ["momentum must be None"]),
        (section("score", recalibration_images=-1), ["recalibration_images must not be negative"]),
        (section("score", recalibration_batch_size=1), ["recalibration_batch_size must be at least 2"]),
        (
            section("search", population=10, mutants=25),
            ["search: mutants and crossovers", "population of 10", "25 and 0"],
        ),
        (section("search", mutation_probability=0), ["mutation_probability must be in (0, 1]"]),
        (section("search", racing=1), ["search: racing must be a confidence", "got 1.0"]),
        (section("search", in_flight=0), ["search: in_flight must be at least 1", "got 0"]),
        (section("space", init_channels=3), ["space: init_channels must be a positive even number, got 3"]),
        (section("space", stem="mnist"), ["space.stem must be one of cifar, imagenet"]),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(data)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.generations", ["section.key=value", "'search.generations'"]),
        ("=5", ["section.key=value"]),
        ("search.generations=[1", ["the value is not YAML"]),
        ("seed.deep=1", ["seed is not a section"]),
        ("search.generation=5", ["unknown key search.generation", "did you mean generations?"]),
        ("search=5", ["search must hold keys and values"]),
        ("search.generations=many", ["search.generations must be a whole number, got 'many'"]),
    ],
)
def test_a_wrong_override_is_refused(override: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError) as raised:
        load(path, [override])
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\nb: 2", "mine.yaml is not a YAML file: while parsing"),
        (b"\xff\xfe\x00", "mine.yaml is not a YAML file"),
        (b"- 1\n- 2", "mine.yaml must hold keys and values, got [1, 2]"),
        (b"!!python/object/apply:os.getcwd []", "mine.yaml is not a YAML file"),
        (b"search: {population: 0}", "mine.yaml: search: population must be at least 1"),
    ],
)
def test_a_file_that_is_no_experiment_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError) as raised:
        load("darts_cifar10_flat")
    assert "did you mean darts_cifar10_flatness?" in str(raised.value)
    for name in SHIPPED:
        assert name in str(raised.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LAUGHS}seed: *i\n", "aliases stand for more than"),
        (LAUGHS[:200], "is not a YAML file|unknown key"),
        ("seed: &a [*a]\n", "refers to itself"),
        ("seed: !!python/object/apply:os.mkdir [executed]\n", "could not determine a constructor"),
        ("space: {num_cells: 1000000000}\n", "num_cells must be at most 256, got 1000000000"),
        ("space: {init_channels: 1000000000}\n", "init_channels must be at most 65,536, got 1000000000"),
        ("space: {name: nasbench201, cells_per_stage: 1000000000}\n", "cells_per_stage must be at most 256"),
        (f"seed: {'x' * 500_000}\n", r"seed must be a whole number, got 'xx.*xx'"),
        (f"? {'x' * 500_000}\n: 1\n", "unknown key x"),
        ('"\\e[31m": 1\n', r"unknown key \\x1b\[31m"),
    ],
    ids=["laughs", "cut", "itself", "code", "cells", "channels", "stages", "text", "key", "control"],
)
def test_a_hostile_file_is_refused_in_a_short_sentence(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load("evil.yaml")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
    assert not Path("executed").exists()


def test_plain_data_that_multiplies_is_not_written_out() -> None:
    value: Any = "x"
    for _ in range(60):
        value = [value] * 10
    for data in ({"seed": value}, {"space": value}, {"score": {"sigmas": value}}):
        with pytest.raises(ConfigError) as caught:
            parse(data)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("mark", "encoding"), [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (b"", "utf-8")]
)
def test_files_of_windows_are_read(mark: bytes, encoding: str, tmp_path: Path) -> None:
    text = dump(load("quickstart_digits")).replace("\n", "\r\n")
    (tmp_path / "config.yaml").write_bytes(mark + text.encode(encoding))
    assert load(tmp_path / "config.yaml") == load("quickstart_digits")
    (tmp_path / "settings.yaml").write_bytes(mark + "- name: flat\r\n  metric: flatness\r\n".encode(encoding))
    assert [setting.name for setting in load_settings(tmp_path / "settings.yaml")[0]] == ["flat"]


def test_home_is_found_in_files_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {name: image_folder, root: ~/none, image_size: 32}\n")
    (tmp_path / "settings.yaml").write_text("- {name: flat, metric: flatness}\n")
    assert load_settings("~/settings.yaml")[0][0].name == "flat"
    for experiment in (load("~/config.yaml"), load("quickstart_digits", ["data.name=cifar10", "data.root=~/none"])):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none"):
            load_data(experiment)
