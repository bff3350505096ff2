"""Settings: each is an option and a key of a YAML file, of one type, in one range, and survives being written."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from timm_models.settings import Settings, SettingsError, add_options, from_options, read_config, write_config
from timm_models.train import main

NAMES = [field.name for field in dataclasses.fields(Settings)]

# A value for each setting, other than its default, and how it is written on the command line.
OTHER: dict[str, tuple[Any, list[str]]] = {
    "data_dir": ("/data/im net", ["/data/im net"]),
    "dataset": ("torch/cifar10", ["torch/cifar10"]),
    "dataset_download": (True, []),
    "train_split": ("training", ["training"]),
    "val_split": ("test", ["test"]),
    "class_map": ("classes.txt", ["classes.txt"]),
    "model": ("resnet18", ["resnet18"]),
    "model_kwargs": ({"init_channels": 8, "norm_layer": "groupnorm1"}, ["init_channels=8", "norm_layer=groupnorm1"]),
    "num_classes": (10, ["10"]),
    "initial_checkpoint": ("weights.pth", ["weights.pth"]),
    "img_size": (64, ["64"]),
    "mean": ((0.5, 0.4, 0.25), ["0.5", "0.4", "0.25"]),
    "std": ((0.5, 0.4, 0.25), ["0.5", "0.4", "0.25"]),
    "crop_pct": (0.9, ["0.9"]),
    "interpolation": ("bicubic", ["bicubic"]),
    "grad_checkpointing": (True, []),
    "sync_bn": (True, []),
    "dist_bn": ("broadcast", ["broadcast"]),
    "batch_size": (64, ["64"]),
    "validation_batch_size": (32, ["32"]),
    "grad_accum_steps": (2, ["2"]),
    "epochs": (300, ["300"]),
    "opt": ("adamw", ["adamw"]),
    "opt_kwargs": ({"foreach": True, "dampening": 0.5}, ["foreach=True", "dampening=0.5"]),
    "lr": (0.25, ["0.25"]),
    "momentum": (0.8, ["0.8"]),
    "weight_decay": (1e-4, ["1e-4"]),
    "clip_grad": (1.0, ["1"]),
    "clip_mode": ("value", ["value"]),
    "sched": ("cosine", ["cosine"]),
    "warmup_epochs": (3, ["3"]),
    "warmup_lr": (1e-6, ["1e-6"]),
    "min_lr": (1e-5, ["1e-5"]),
    "cooldown_epochs": (10, ["10"]),
    "decay_rate": (0.5, ["0.5"]),
    "decay_epochs": (2.5, ["2.5"]),
    "model_ema": (True, []),
    "model_ema_decay": (0.99, ["0.99"]),
    "model_ema_warmup": (True, []),
    "smoothing": (0.2, ["0.2"]),
    "drop": (0.3, ["0.3"]),
    "no_aug": (True, []),
    "scale": ((0.5, 0.75), ["0.5", "0.75"]),
    "ratio": ((0.75, 1.5), ["0.75", "1.5"]),
    "hflip": (0.0, ["0"]),
    "color_jitter": (0.4, ["0.4"]),
    "aa": ("rand-m9-mstd0.5", ["rand-m9-mstd0.5"]),
    "reprob": (0.25, ["0.25"]),
    "train_interpolation": ("random", ["random"]),
    "device": ("cpu", ["cpu"]),
    "amp": (True, []),
    "amp_dtype": ("bfloat16", ["bfloat16"]),
    "channels_last": (True, []),
    "torchcompile": (True, []),
    "workers": (8, ["8"]),
    "pin_mem": (True, []),
    "seed": (42, ["42"]),
    "log_interval": (7, ["7"]),
    "checkpoint_hist": (5, ["5"]),
    "output": ("runs", ["runs"]),
    "experiment": ("first", ["first"]),
    "auxiliary_weight": (0.4, ["0.4"]),
    "drop_path": (0.2, ["0.2"]),
    "lighting": (0.1, ["0.1"]),
    "tail_epochs": (3, ["3"]),
    "global_batch_size": (1024, ["1024"]),
    "tensorboard": (False, []),
}


def options(*arguments: str) -> dict[str, Any]:
    """What the command line gives."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(arguments))


def from_yaml(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return from_options({}, read_config(path))


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_the_table_above_is_complete() -> None:
    assert list(OTHER) == NAMES
    assert all(getattr(Settings(), name) != value for name, (value, _) in OTHER.items())


def test_nothing_given_is_the_default() -> None:
    assert options() == {}
    assert from_options({}) == Settings()


@pytest.mark.parametrize("name", NAMES)
def test_each_is_an_option(name: str) -> None:
    value, words = OTHER[name]
    word = option(name) if value is not False else f"--no-{name.replace('_', '-')}"
    settings = from_options(options(word, *words))
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    assert settings == dataclasses.replace(Settings(), **{name: value})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("section", [False, True], ids=["top", "section"])
def test_each_is_a_key(name: str, section: bool, tmp_path: Path) -> None:
    value, _ = OTHER[name]
    plain = {name: list(value) if isinstance(value, tuple) else value}
    settings = from_yaml(tmp_path, yaml.safe_dump({"genas": plain} if section else plain))
    assert settings == dataclasses.replace(Settings(), **{name: value})
    assert type(getattr(settings, name)) is type(value)


def test_each_switch_can_be_turned_off_again() -> None:
    for name in NAMES:
        if isinstance(OTHER[name][0], bool) and not name.startswith("no_"):
            assert getattr(from_options(options(f"--no-{name.replace('_', '-')}"), {name: True}), name) is False


@pytest.mark.parametrize("name", NAMES)
def test_each_survives_being_written(name: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(Settings(), **{name: OTHER[name][0]})
    text = write_config(settings)
    assert from_yaml(tmp_path, text) == settings
    assert list(yaml.safe_load(text)) == NAMES


@pytest.mark.parametrize("text", ["null", "1e-5", "yes", "007", "# no", "{a: b}", "a: b", "é ü", " ", "- x", "'", '"'])
def test_any_text_survives_being_written(text: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(Settings(), experiment=text, model_kwargs={"name": text, "list": [1, 2.5, None]})
    assert from_yaml(tmp_path, write_config(settings)) == settings


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("weight_decay: 3e-5", "weight_decay", 3e-5),
        ("weight_decay: 3.0e-5", "weight_decay", 3e-5),
        ("lr: 1", "lr", 1.0),
        ("lr: '0.5'", "lr", 0.5),
        ("clip_grad: null", "clip_grad", None),
        ("clip_grad:", "clip_grad", None),
        ("num_classes: null", "num_classes", None),
        ("mean: [0, 1, 2]", "mean", (0.0, 1.0, 2.0)),
        ("model_kwargs: {genotype: [1, 2]}", "model_kwargs", {"genotype": [1, 2]}),
    ],
)
def test_how_yaml_may_write_it(text: str, name: str, value: object, tmp_path: Path) -> None:
    found = getattr(from_yaml(tmp_path, text), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 2.5",
        "epochs: '250'",
        "epochs: true",
        "epochs: null",
        "epochs: [250]",
        "lr: fast",
        "lr: true",
        "lr: [0.5]",
        "lr: null",
        "amp: 1",
        "amp: 'yes'",
        "model: 50",
        "model: null",
        "opt_kwargs: [1]",
        "opt_kwargs: momentum",
        "scale: 0.08",
        "scale: [0.08]",
        "scale: [0.08, 0.5, 1.0]",
        "scale: ['0.08', '1']",
        "ratio: [true, false]",
        "mean: '0.5'",
        "mean: {r: 0.5}",
    ],
)
def test_another_type_is_refused_with_name_value_and_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        from_yaml(tmp_path, text)
    name, value = text.split(": ", 1)
    message = str(caught.value)
    assert f"{name} must be" in message and "settings.yaml" in message
    assert repr(yaml.safe_load(value)) in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("batchsize", "batch_size"), ("bach_size", "batch_size"), ("epoch", "epochs"), ("warmup", "warmup_lr")],
)
def test_an_unknown_key_is_refused_with_the_nearest(wrong: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        from_yaml(tmp_path, f"{wrong}: 1")
    assert repr(wrong) in str(caught.value) and f"did you mean {right}?" in str(caught.value)
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        from_yaml(tmp_path, f"genas:\n  {wrong}: 1")


def test_an_unknown_key_that_resembles_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"There is no setting 'qqqq'.*--help"):
        from_yaml(tmp_path, "qqqq: 1")
    with pytest.raises(SettingsError, match="There is no setting 5"):
        from_yaml(tmp_path, "5: 1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold keys and values, got None"),
        ("- lr", r"must hold keys and values, got \['lr'\]"),
        ("genas: [lr]", "section genas must hold settings by name, got list"),
        ("lr: [", "is not a YAML file"),
        ("a: b: c", "is not a YAML file"),
    ],
)
def test_a_file_of_something_else(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=expected) as caught:
        from_yaml(tmp_path, text)
    assert "settings.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary\.yaml is not a YAML file"):
        read_config(tmp_path / "binary.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_an_empty_section_is_none(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "lr: 0.1\ngenas:\n").lr == 0.1


def test_the_section_is_over_the_rest_and_the_command_line_over_both(tmp_path: Path) -> None:
    text = "epochs: 245\nlr: 0.1\nseed: 1\ngenas: {epochs: 250, lr: 0.2}\n"
    settings = from_yaml(tmp_path, text)
    assert (settings.epochs, settings.lr, settings.seed) == (250, 0.2, 1)
    settings = from_options(options("--lr", "0.3"), read_config(tmp_path / "settings.yaml"))
    assert (settings.epochs, settings.lr, settings.seed) == (250, 0.3, 1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1)) for name in ("batch_size", "grad_accum_steps", "epochs", "log_interval", "checkpoint_hist")),
        *((name, (-1,)) for name in ("workers", "seed", "warmup_epochs")),
        *((name, (-0.1, float("nan"))) for name in ("auxiliary_weight", "lighting")),
        *((name, (-0.1, 1.1, float("nan"))) for name in ("drop", "drop_path", "hflip", "reprob", "smoothing")),
        ("lr", (0.0, -0.5, float("nan"))),
        ("amp_dtype", ("half", "float32", "")),
        ("dist_bn", ("mean", "True")),
    ],
)
def test_out_of_range(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=name) as caught:
            from_options({name: value})
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # The gradient would be removed or turned round.
        ("clip_grad", 0.0),
        ("clip_grad", -1.0),
        ("clip_mode", "nope"),
        ("smoothing", 1.0),
        ("validation_batch_size", 0),
        ("cooldown_epochs", -1),
        ("scale", (1.0, 0.08)),
        ("scale", (0.0, 1.0)),
        ("ratio", (2.0, 0.5)),
        ("mean", (0.5, 0.5)),
        ("std", (0.0, 0.0, 0.0)),
        ("crop_pct", 0.0),
        ("model_ema_decay", 1.5),
        ("train_interpolation", "nope"),
        ("interpolation", "nope"),
        ("lr", float("inf")),
        # More than a machine has, longer than anybody waits, or no meaning at all.
        *((name, 10**12) for name in ("batch_size", "validation_batch_size", "epochs", "num_classes", "img_size")),
        *((name, 10**12) for name in ("workers", "grad_accum_steps", "global_batch_size", "checkpoint_hist")),
        *((name, 10**12) for name in ("warmup_epochs", "cooldown_epochs", "tail_epochs", "seed", "log_interval")),
        ("seed", 2**32),
        ("num_classes", 1),
        ("momentum", 1.5),
        ("momentum", 1.0),
        ("drop", 1.0),
        ("tail_epochs", -1),
        ("scale", (0.5, 2.0)),
        ("scale", (float("nan"), 1.0)),
        ("ratio", (1.0, float("nan"))),
        ("mean", (0.5, float("nan"), 0.5)),
        ("std", (float("inf"),)),
        ("color_jitter", 1e9),
        *((name, float("nan")) for name in ("decay_rate", "decay_epochs", "warmup_lr", "min_lr", "weight_decay")),
        *((name, float("inf")) for name in ("decay_rate", "decay_epochs", "clip_grad", "lighting", "auxiliary_weight")),
        *((name, -1.0) for name in ("decay_rate", "decay_epochs", "weight_decay", "clip_grad")),
        ("crop_pct", float("nan")),
        ("opt_kwargs", {"dampening": float("nan")}),
        ("opt_kwargs", {"betas": [0.9, float("inf")]}),
        ("model_kwargs", {"norm": {"eps": float("-inf")}}),
        ("lr", 10**400),
        ("mean", (10**400,)),
    ],
)
def test_more_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        from_options({name: value})


def test_a_rate_that_would_rise() -> None:
    with pytest.raises(SettingsError, match=r"min_lr.*at most lr \(0\.1\), got 0\.5"):
        from_options({"sched": "cosine", "lr": 0.1, "min_lr": 0.5})


@pytest.mark.parametrize("text", ["{}", "genas: {}", "genas:\n", "--- {}\n", "\ufeff{}"])
def test_an_empty_configuration_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds no settings|must hold keys and values, got \{\}"):
        from_yaml(tmp_path, text)


def test_no_name_of_a_configuration_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", ""]) == 1
    assert "There is no configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Nine aliases of nine aliases of ...: a thousand million values in a few lines.
        ("model_kwargs:\n  a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n", "its aliases stand for more than"),
        ("lr: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\nmodel_kwargs:\n", "its aliases stand for more than"),
        (f"model_kwargs:\n  a: &a {[1] * 3000}\n  b: [*a, *a, *a, *a]\n", "model_kwargs must have at most"),
        (f"model_kwargs:\n  a: &a {[1] * 3000}\nlr: [*a, *a, *a, *a]\n", "lr must be a number"),
        ("lr: " + "[" * 5000, "is not a YAML file"),
        ("seed: 1" + "0" * 5000, "is not a YAML file"),
        ("lr: " + "x" * 100_000, "lr must be a number"),
        ("x" * 500 + ": 1", "There is no setting"),
        ("# " + "x" * 2**20, "more than 1,048,576 bytes"),
    ],
    ids=["aliases", "aliases-of-a-number", "arguments", "list-of-lists", "nested", "digits", "text", "name", "size"],
)
def test_what_a_file_holds_does_not_make_a_message_long(text: str, expected: str, tmp_path: Path) -> None:
    if "&a0" in text:
        text += "".join(f"  a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10))
    with pytest.raises(SettingsError, match=expected) as caught:
        from_yaml(tmp_path, text)
    assert len(str(caught.value)) < 1500


def test_a_byte_order_mark_is_not_a_setting(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "\ufefflr: 0.25\n").lr == 0.25


def test_compiling_for_one_probability_and_changing_it_in_every_epoch() -> None:
    # torch.compile gives up after eight.
    with pytest.raises(SettingsError, match=r"drop_path.*torchcompile|torchcompile.*drop_path"):
        Settings(drop_path=0.1, torchcompile=True)


@pytest.mark.parametrize(
    ("batch", "processes", "passes"), [(128, 8, 1), (128, 1, 8), (64, 8, 2), (1024, 1, 1), (1, 8, 128), (32, 2, 16)]
)
def test_accumulation(batch: int, processes: int, passes: int) -> None:
    settings = Settings(batch_size=batch, global_batch_size=1024)
    assert settings.accumulation(processes) == passes
    assert batch * processes * passes == 1024


@pytest.mark.parametrize(("batch", "processes"), [(100, 1), (128, 3), (1025, 1), (2048, 1), (256, 8)])
def test_a_step_that_cannot_be_made(batch: int, processes: int) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(batch_size=batch, global_batch_size=1024).accumulation(processes)
    assert all(str(number) in str(caught.value) for number in (batch, processes, 1024))


def test_accumulation_without_a_global_batch() -> None:
    assert Settings(grad_accum_steps=3).accumulation(8) == 3
    with pytest.raises(SettingsError, match="grad_accum_steps"):
        Settings(grad_accum_steps=2, global_batch_size=1024)


def test_help_has_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the module that is run as a user does."""
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        # It was imported before.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        runpy.run_module("timm_models.train", run_name="__main__", alter_sys=True)
    result, error = capsys.readouterr()
    assert (ended.value.code, error) == (0, "")
    found = re.findall(r"^  --([a-z-]+)", result, re.MULTILINE)
    assert sorted(found) == sorted(name.replace("_", "-") for name in ("config", "resume", "debug", *NAMES))
    assert "torchrun" in result and "%(" not in result


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learning-rate", "0.1"], "--learning-rate"),
        (["--epochs", "many"], "epochs"),
        (["--model-kwargs", "foo"], "model-kwargs"),
        (["--opt-kwargs", "a=1", "foo"], "opt-kwargs"),
        (["surplus"], "surplus"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = None
    with contextlib.suppress(SystemExit):
        status = main(arguments)
    assert status in (None, 1)
    output = capsys.readouterr()
    assert output.out == "" and expected in output.err.splitlines()[-1].replace("_", "-")


def test_a_wrong_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("bach_size: 3\n")
    assert main(["--config", str(path)]) == 1
    assert "wrong.yaml" in capsys.readouterr().err
    assert main(["--config", "genas_flatness_c1000"]) == 1
    # The names of those that there are.
    assert "genas_flatness_c100_imagenet" in capsys.readouterr().err
    with pytest.raises(SettingsError):
        main(["--config", str(path), "--debug"])


@pytest.mark.parametrize(
    ("mark", "encoding"), [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (b"", "utf-8")]
)
def test_a_file_of_windows_is_read(mark: bytes, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_bytes(mark + "epochs: 7\r\nmodel: resnet18\r\n".encode(encoding))
    assert read_config(tmp_path / "args.yaml") == {"epochs": 7, "model": "resnet18"}


def test_home_is_found_in_each_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "args.yaml").write_text("data_dir: ~/images\noutput: ~/runs\n")
    settings = from_options({"initial_checkpoint": "~/w.pth", "class_map": "~/c.txt"}, read_config("~/args.yaml"))
    found = (settings.data_dir, settings.output, settings.initial_checkpoint, settings.class_map)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("images", "runs", "w.pth", "c.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}, *a{i - 1 if i else ''}]\n" for i in range(40)),
            "aliases",
        ),
        ("epochs: !!python/object/apply:os.mkdir [executed]\n", "could not determine a constructor"),
        (f"epochs: {'x' * 500_000}\n", "epochs must be a whole number, got 'xx"),
        (f"? {'x' * 500_000}\n: 1\n", "There is no setting 'xx"),
        ('"\\e[31m": 1\n', r"There is no setting '\\x1b\[31m'"),
    ],
    ids=["laughs", "code", "text", "key", "control"],
)
def test_a_hostile_file_is_refused_in_a_short_sentence(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        read_config("evil.yaml")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
    assert not Path("executed").exists()
