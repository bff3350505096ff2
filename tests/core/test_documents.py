"""What README and docs tell people to type runs: every command meets its real parser, every call its real signature."""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from genas_plugins.darts.zoo import find_genotype
from genas_plugins.files import packaged_configs

ROOT = Path(__file__).resolve().parents[2]
# The list of changes names options of the time.
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if path.name != "CHANGELOG.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("genas", "python", "python3.11", "torchrun", "pip", "pytest", "bash", "ruff", "until")
_WORDS = {"until", "while", "if", "do", "then", "!", "time"}
_SILENT = {"done", "fi", "[", ":", "."}
HOSTS = {
    "genas_plugins": (),
    "genas search": ("nni", "pytorch_lightning"),
    "nni_strategy": ("nni", "pytorch_lightning"),
    "timm_models": ("timm",),
    "mmseg_backbones": ("mmseg", "timm"),
    "detectron2_backbones": ("detectron2", "timm"),
    "benchmarks/training.py": ("nni", "pytorch_lightning"),
    "benchmarks/roofline.py": ("nni", "pytorch_lightning"),
    "benchmarks/launches.py": ("nni", "pytorch_lightning"),
    "benchmarks/agreement.py": ("nni", "pytorch_lightning"),
    "benchmarks/racing.py": ("nni", "pytorch_lightning"),
    "benchmarks/nasbench201.py": ("nni", "pytorch_lightning"),
    "benchmarks/networks.py": ("timm",),
    "benchmarks/dense.py": ("timm",),
    "benchmarks/export.py": ("timm", "onnxruntime"),
    "genas publish": ("timm",),
    "genas export": ("timm",),
}
# Of others, or of Python; their options are not ours.
STRANGERS = {
    *("ruff", "pytest", "mim", "source", ".", "cd", "git", "nvidia-smi", "taskset", "export", "tar", "sed"),
    *("mkdocs", "twine", "pre-commit", "jupyter"),
}
MODULES = {"venv", "build", "twine", "pytest", "pip", "wheel"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        path: The document.
        line: Of its first line, from 1.
        language: As the fence says; may be empty.
        text: Without the fences.
    """

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                found.append(Block(path, text[: match.start()].count("\n") + 2, match[1], match[2]))
    return found


def spans() -> list[Block]:
    """All code in the running text, each without its backticks and line ends."""
    found = []
    for path in DOCUMENTS:
        text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))
        for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
            found.append(Block(path, text[: match.start()].count("\n") + 1, "", " ".join(match[1].split())))
    return found


def mentions() -> list[Block]:
    """Code in the running text that is a command with options."""
    named = []
    for span in spans():
        text = f"python {span.text}" if span.text.startswith("benchmarks/") else span.text
        # What may be left out is there, and what may be repeated stands once.
        text = re.sub(r"\[(--[^\]]+)\]", r"\1", text).replace(" ...", "")
        if text.split(" ")[0] in _PROGRAMS:
            named.append(Block(span.path, span.line, "", text))
    return named


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, word by word, without assignments, comments and where their output goes."""
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            if (command := _bare(words)) and command[0] not in _SILENT:
                yield command
            words = []


def _bare(words: list[str]) -> list[str]:
    while words and (words[0] in _WORDS or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words = words[1:]
    if words[:2] == ["timeout", "--signal"]:
        words = words[4:]
    return words


def is_placeholder(word: str) -> bool:
    """Whether the reader is to put something in its place: ``DIR``, ``OUT.safetensors``, ``work_dirs/.../x.pth``."""
    return "..." in word or re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[a-z.]+)?|[A-Z]|\w*[a-z][A-Z]", word) is not None


def links() -> list[tuple[Block, str]]:
    """Links to files of the repository, with their anchors."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\]\(([^)\s]+)\)", text):
            if "://" not in match[1]:
                found.append((Block(path, text[: match.start()].count("\n") + 1, "", match[0]), match[1]))
    return found


class Parsed(BaseException):
    """A real parser has taken a command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def needs(name: str) -> None:
    """Skip where a host is missing."""
    for host in HOSTS.get(name, ()):
        if importlib.util.find_spec(host) is None:
            pytest.skip(f"{host} is not installed")


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument parser stops when it has parsed."""
    kept = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(kept(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parse(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the parser of ``python -m MODULE``, ``python FILE.py`` or ``genas`` makes of arguments."""
    needs(" ".join([program, *arguments[:1]]) if program == "genas" else program)
    needs(program.split(".")[0])
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(Parsed) as taken:
        if program == "genas":
            importlib.import_module("genas_plugins.cli").main(arguments)
        elif program.endswith(".py"):
            path = ROOT / program
            monkeypatch.syspath_prepend(str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    return taken.value.options


def check(command: list[str], where: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as far as its parser, and look at what it names."""
    program, *arguments = command
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        with pytest.raises(Parsed) as taken:
            get_args_parser().parse_args(arguments)
        options = taken.value.options
        if not options.module:
            # Of the host's repository.
            return
        program, arguments = options.training_script, options.training_script_args
    elif re.fullmatch(r"python(3(\.\d+)?)?", program):
        if arguments[:1] == ["-m"]:
            program, arguments = arguments[1], arguments[2:]
        else:
            program, arguments = arguments[0], arguments[1:]
            assert (ROOT / program).is_file(), f"{where}: there is no {program}"
    if program == "pip":
        check_pip(arguments, where)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"{where}: there is no {arguments[0]}"
    elif program == "genas" or program.split(".")[0] in HOSTS or program.endswith(".py"):
        try:
            options = parse(program, arguments, monkeypatch)
        except SystemExit as error:
            # Help is an end of its own.
            assert error.code == 0, f"{where}: the parser refuses {' '.join(command)}"
            return
        check_names(program, options, where)
    else:
        assert program in STRANGERS | MODULES, f"{where}: what is {program}?"


def check_pip(arguments: list[str], where: Block) -> None:
    """Constraints that there are, and extras that ``setup.py`` has."""
    told = (ROOT / "setup.py").read_text(encoding="utf-8")
    for option, word in zip(["", *arguments], arguments, strict=False):
        if option == "-c":
            assert (ROOT / word).is_file(), f"{where}: there is no {word}"
        if match := re.fullmatch(r"\.\[([\w,]+)\]", word):
            for extra in match[1].split(","):
                assert f'"{extra}"' in told, f"{where}: setup.py has no extra {extra}"


def check_names(program: str, options: argparse.Namespace, where: Block) -> None:
    """Configurations, settings and genotypes by their names."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    if program == "genas":
        if isinstance(name := given.get("config"), str) and not is_placeholder(name):
            from genas_plugins.experiment import config

            if name.startswith("examples/"):
                # Of a package that is not installed here.
                assert (ROOT / name).is_file(), f"{where}: there is no {name}"
                return
            overrides = [item for item in given.get("overrides", []) if not is_placeholder(item.partition("=")[2])]
            config.load(name, overrides)
        check_settings(given.get("settings", []), where)
        if isinstance(name := given.get("genotype"), str) and re.fullmatch(r"[a-z][a-z0-9_]+", name):
            find_genotype(name)
    elif program == "timm_models.train" and isinstance(name := given.get("config"), str):
        assert name in packaged_configs("timm"), f"{where}: there is no configuration {name}"
    elif program.startswith("mmseg_backbones") and isinstance(name := given.get("config"), str):
        assert is_placeholder(name) or (ROOT / name).is_file(), f"{where}: there is no {name}"
    elif program.startswith("detectron2_backbones") and isinstance(name := given.get("config_file"), str):
        known = {*packaged_configs("detectron2"), *packaged_configs("detectron2", ".py")}
        assert is_placeholder(name) or name in known, f"{where}: there is no configuration {name}"


def check_settings(names: Sequence[str], where: Block) -> None:
    for name in names:
        assert is_placeholder(name) or name in packaged_configs("correlate"), f"{where}: there are no settings {name}"


def scripts() -> list[Any]:
    """Every command of a block of its own, and every mention with options."""
    found = [(block, command) for block in blocks("bash") for command in commands(block.text)]
    for mention in mentions():
        (command, *_) = commands(mention.text)
        found.append((mention, command))
    return [pytest.param(block, command, id=f"{block} {' '.join(command)[:50]}") for block, command in found]


def named(command: list[str]) -> tuple[str, str] | None:
    """What a command without options names: a subcommand, a module or a file."""
    match command:
        case ["genas"] | ["genas", "--help"]:
            return "genas", "search"
        case ["genas", name]:
            return "genas", name
        case ["python", "-m", name]:
            return "module", name
        case ["python", name]:
            return "file", name
        case _:
            return None


def subcommands() -> Iterable[str]:
    return importlib.import_module("genas_plugins.cli").subcommands()


def modules() -> Iterable[str]:
    files = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("*/*.py")]
    return {*MODULES, *(".".join(path.parts) for path in files)}


@pytest.mark.parametrize(("where", "command"), scripts())
def test_a_command_meets_its_parser(
    where: Block, command: list[str], parser: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not where.language and (name := named(command)) is not None:
        # In the running text, a name alone is no command line.
        kind, name = name
        there = {"genas": subcommands, "module": modules, "file": lambda: [name] * (ROOT / name).exists()}[kind]()
        assert name in there, f"{where}: there is no {name}"
        return
    check(command, where, monkeypatch)


@pytest.mark.parametrize(
    "where", [pytest.param(span, id=str(span)) for span in spans() if re.match(r"--set \S+=", span.text)]
)
def test_a_setting_of_the_running_text_is_one(where: Block) -> None:
    from genas_plugins.experiment import config

    override = where.text.removeprefix("--set ")
    key, _, value = override.partition("=")
    if is_placeholder(value):
        data = dataclasses.asdict(config.Experiment())
        for part in key.split("."):
            assert part in data, f"{where}: there is no setting {key}"
            data = data[part]
        return
    config.load("quickstart_digits", [override])


@pytest.mark.parametrize("where", [pytest.param(block, id=str(block)) for block in blocks("yaml")])
def test_a_yaml_block_is_what_is_read(where: Block, tmp_path: Path) -> None:
    from genas_plugins.correlation.settings import load_settings
    from genas_plugins.experiment import config

    path = tmp_path / "block.yaml"
    path.write_text(where.text)
    if isinstance(yaml.safe_load(where.text), list):
        load_settings(path)
    else:
        config.load(path)


@pytest.mark.parametrize(
    ("where", "target"), [pytest.param(block, target, id=f"{block} {target}") for block, target in links()]
)
def test_a_link_leads_somewhere(where: Block, target: str) -> None:
    name, _, anchor = target.partition("#")
    if "reference/" in name:
        # Made from the code when the site is built, which looks at anchors.
        made = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        assert f": {name.removeprefix('../')}\n" in made, f"{where}: there is no {target}"
        return
    path = where.path.parent / name if name else where.path
    assert path.exists(), f"{where}: there is no {target}"
    if anchor:
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{where}: {name} has no heading {anchor}"


UNKNOWN = object()


@dataclasses.dataclass(frozen=True)
class Instance:
    """Some object of a class."""

    kind: type


class Reader:
    """Follows a block of Python as far as names, attributes and calls can be known without running it."""

    def __init__(self, where: Block, names: dict[str, Any]) -> None:
        self.where = where
        self.names = names

    def read(self, text: str) -> None:
        for node in ast.parse(text).body:
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(self.where), "exec"), self.names)
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expression(child)
            elif isinstance(child, ast.stmt):
                self.statement(child)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self.names[node.targets[0].id] = self.expression(node.value)

    def expression(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Name):
            return self.names.get(node.id, getattr(builtins, node.id, UNKNOWN))
        if isinstance(node, ast.Attribute):
            return self.attribute(self.expression(node.value), node.attr)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expression(child)
        return UNKNOWN

    def attribute(self, owner: Any, name: str) -> Any:
        if owner is UNKNOWN:
            return UNKNOWN
        if isinstance(owner, Instance):
            if dataclasses.is_dataclass(owner.kind):
                known = {item.name for item in dataclasses.fields(owner.kind)}
                assert name in known or hasattr(owner.kind, name), f"{self.where}: {owner.kind.__name__} has no {name}"
            found = getattr(owner.kind, name, UNKNOWN)
            return types.MethodType(found, owner) if isinstance(found, types.FunctionType) else UNKNOWN
        assert hasattr(owner, name), f"{self.where}: {owner} has no {name}"
        return getattr(owner, name)

    def call(self, node: ast.Call) -> Any:
        function = self.expression(node.func)
        arguments = [self.expression(argument) for argument in node.args]
        named = {item.arg: self.expression(item.value) for item in node.keywords if item.arg is not None}
        if function is UNKNOWN or not callable(function):
            return UNKNOWN
        try:
            signature = inspect.signature(function)
        except ValueError:
            # Of C.
            return Instance(function) if isinstance(function, type) else UNKNOWN
        if not any(isinstance(argument, ast.Starred) for argument in node.args):
            try:
                signature.bind(*arguments, **named)
            except TypeError as error:
                pytest.fail(f"{self.where}: {ast.unparse(node)}: {error}")
        self.check_swallowed(function, signature, node)
        if isinstance(function, type):
            return Instance(function)
        try:
            kind = typing.get_type_hints(function).get("return")
        except NameError:
            # Of a name that only type checkers import.
            return UNKNOWN
        return Instance(kind) if isinstance(kind, type) else UNKNOWN

    def check_swallowed(self, function: Any, signature: inspect.Signature, node: ast.Call) -> None:
        """Hold what ``**kwargs`` takes of a class with typed fields against these."""
        takes_all = any(item.kind is item.VAR_KEYWORD for item in signature.parameters.values())
        if not (isinstance(function, type) and dataclasses.is_dataclass(function) and takes_all):
            return
        hints = typing.get_type_hints(function)
        for item in node.keywords:
            if item.arg in signature.parameters or item.arg is None:
                continue
            assert item.arg in hints, f"{self.where}: {function.__name__} has no field {item.arg}"
            if isinstance(item.value, ast.Constant):
                kinds = [kind for kind in flat(hints[item.arg]) if isinstance(kind, type)]
                fits = isinstance(item.value.value, tuple(kinds))
                assert fits, f"{self.where}: {item.arg}={item.value.value!r} is none of {kinds}"


def flat(hint: Any) -> Iterator[Any]:
    """The alternatives of a type."""
    inner = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    if not inner:
        yield typing.get_origin(hint) or hint
    for part in inner:
        yield from flat(part)


def host_of(text: str) -> list[str]:
    """Packages and hosts that a block imports."""
    return re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE) + re.findall(r", (timm_models)\b", text)


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_python_meets_its_signatures(path: Path) -> None:
    # In the order of the document: what an earlier block made is there in a later one.
    names: dict[str, Any] = {}
    for block in blocks("python"):
        if block.path != path:
            continue
        for name in host_of(block.text):
            needs(name)
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        Reader(block, names).read(block.text)


@pytest.mark.parametrize(
    "where", [pytest.param(span, id=str(span)) for span in spans() if re.match(r"[A-Z]\w+\(.*\)$", span.text)]
)
def test_a_call_of_the_running_text_meets_its_signature(where: Block) -> None:
    needs("nni_strategy")
    names: dict[str, Any] = {}
    for module in ("genas_plugins", "genas_plugins.scoring", "nni_strategy", "nni.nas.experiment.config"):
        exec(f"from {module} import *", names)
    Reader(where, names).read(where.text)


def test_a_wrong_document_is_found(monkeypatch: pytest.MonkeyPatch, parser: None) -> None:
    where = Block(ROOT / "README.md", 1, "bash", "")
    for line in (
        "genas serch --output DIR",
        "genas search --config quickstart_digits --output DIR --set search.populatoin=3",
        "genas search --config quickstart_digit --output DIR",
        "python benchmarks/scoring.py --candidate 4 --checks",
        "python benchmarks/scorings.py",
        "pip install -c constraint.txt '.[nni]'",
        "genas correlate --run DIR --truth CSV --settings papers --output DIR",
        "kubectl apply",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(next(commands(line)), where, monkeypatch)
    for text in ("from genas_plugins import SuperNet\nSuperNet(10, channels=4)", "import torch\ntorch.manuel_seed(0)"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            Reader(where, {}).read(text)
    with pytest.raises(AssertionError, match="training_service='local' is none of"):
        needs("nni_strategy")
        code = "from nni.nas.experiment.config import NasExperimentConfig\n"
        Reader(where, {}).read(code + 'NasExperimentConfig("ts", "simplified", training_service="local")')
