"""Finds the tools that come inside MMSegmentation's wheel and runs them, every option passed on."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_classes", "find_tool", "run_tool"]

_logger = logging.getLogger(__name__)


def find_tool(name: str) -> Path:
    """Path of one of MMSegmentation's own scripts, such as ``train.py``.

    Raises:
        FileNotFoundError: The installed MMSegmentation does not have it.
    """
    import mmseg

    folder = Path(mmseg.__file__).parent
    # In the wheel, and in a checkout that was installed in place.
    for tools in (folder / ".mim" / "tools", folder.parent / "tools"):
        if (tools / name).is_file():
            return tools / name
    raise FileNotFoundError(f"The installed MMSegmentation ({folder}) has no tools/{name}: install mmsegmentation 1.2.")


def run_tool(name: str) -> None:
    """Run the script in this process, with this process's arguments."""
    path = find_tool(name)
    try:
        _check(sys.argv[1:], "test" if name == "test.py" else "train")
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    sys.argv[0] = str(path)
    # A script's own folder comes first, as when Python runs it.
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def check_classes(cfg: Any, part: str) -> None:
    """Compare the classes of the decode head with those of the images.

    An auxiliary head may predict something else, such as boundaries.

    Args:
        cfg: A configuration of MMSegmentation.
        part: ``"train"``, which the sets for training and validation are for, or ``"test"``, where a head of more
            classes is refused too.

    Raises:
        ValueError: The images have classes that a head does not know; the message has both numbers.
    """
    heads = _listed((cfg.get("model") or {}).get("decode_head"))
    counts = [head["num_classes"] for head in heads if isinstance(head.get("num_classes"), int)]
    loaders = ("train_dataloader", "val_dataloader") if part == "train" else ("test_dataloader",)
    for loader in loaders:
        for kind, classes in _classes((cfg.get(loader) or {}).get("dataset")):
            for count in counts:
                if count == classes:
                    continue
                message = f"decode_head has num_classes={count}, and {kind} of {loader} has {classes}: make them equal."
                if classes > count or part == "test":
                    raise ValueError(message)
                _logger.warning("%s Those that have no images are not learned.", message)


def _check(arguments: Sequence[str], part: str) -> None:
    from mmengine.config import Config, DictAction

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    options, _ = parser.parse_known_args(arguments)
    # What is wrong with the command itself, the tool says.
    if options.config is None or not Path(options.config).is_file():
        return
    cfg = Config.fromfile(options.config)
    if options.cfg_options:
        cfg.merge_from_dict(options.cfg_options)
    check_classes(cfg, part)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _classes(dataset: Any) -> Iterator[tuple[str, int]]:
    """Kind and number of classes of a data set, and of those within it, where they are known without opening it."""
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    for one in _listed(dataset):
        inner = [*_listed(one.get("dataset")), *_listed(one.get("datasets"))]
        if inner:
            yield from _classes(inner)
            continue
        kind = one.get("type")
        found = DATASETS.get(kind) if isinstance(kind, str) else kind
        names = (one.get("metainfo") or {}).get("classes") or getattr(found, "METAINFO", {}).get("classes")
        # A string is a file with their names.
        if names and not isinstance(names, str):
            yield getattr(found, "__name__", str(kind)), len(names)
