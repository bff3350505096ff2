"""What is known of the search that found a genotype: read out of a search's folder, and kept with a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genas_plugins._reading import read_json, user_path
from genas_plugins.darts.genotype import Genotype
from genas_plugins.experiment import config
from genas_plugins.experiment.run_folder import CONFIG_FILE, GENOTYPE_FILE

__all__ = ["NETWORK_FILE", "FoundGenotype", "keep_genotype", "open_search", "read_found"]

NETWORK_FILE = "network.json"
"""Name, in the folder of a training, of the genotype that it trains; not that of a search, which may lie there too."""
_KEPT = ("record", "test_top1", "provenance")
_SETTINGS = "search"


@dataclass(frozen=True)
class FoundGenotype:
    """A genotype, and what its file and the search's settings say of how it was found.

    Attributes:
        genotype: The two cells.
        record: Its line of the history: score, shares, losses; empty if unknown.
        test_top1: Top-1 accuracy as a fraction, on the search's test images with the supernet's weights; None: unknown.
        provenance: Versions, data set, metric, seed, number of candidates; empty if unknown.
        settings: Sections of the experiment, without where its images lay; empty if unknown.
    """

    genotype: Genotype
    record: Mapping[str, Any]
    test_top1: float | None
    provenance: Mapping[str, Any]
    settings: Mapping[str, Any]


def read_found(path: str | Path) -> FoundGenotype:
    """Read the JSON file of a search, or what a training keeps of it; settings may lie in ``config.yaml`` beside it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no genotype.
    """
    path = user_path(path)
    genotype = Genotype.load(path)
    data = read_json(path)
    settings = _mapping(data.get(_SETTINGS))
    if not settings and (path.parent / CONFIG_FILE).is_file():
        settings = _settings(path.parent / CONFIG_FILE)
    top1 = data.get("test_top1")
    known = isinstance(top1, int | float) and not isinstance(top1, bool)
    return FoundGenotype(
        genotype,
        _mapping(data.get("record")),
        float(top1) if known else None,
        _mapping(data.get("provenance")),
        settings,
    )


def open_search(place: str | Path) -> FoundGenotype:
    """Read the genotype that the search in a folder found, or that of one of its files.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read.
    """
    place = user_path(place)
    path = place / GENOTYPE_FILE if place.is_dir() else place
    if not path.is_file():
        raise FileNotFoundError(
            f"{place} is not the folder of a finished search in the DARTS space: it has no {GENOTYPE_FILE}."
        )
    return read_found(path)


def keep_genotype(path: str | Path, genotype: Genotype, given: Any) -> Path:
    """Write the genotype of a training's network, with what is known of its search, which may be gone one day.

    Args:
        path: The JSON file to write.
        genotype: The two cells, their pairs in the order of the network.
        given: What the network was built from; if it is a search's file, what is known is copied.

    Raises:
        OSError: The file cannot be written.
    """
    known: dict[str, Any] = {}
    if isinstance(given, str) and user_path(given).is_file():
        try:
            found = read_found(given)
        except ValueError:  # changed since the network was built
            found = None
        if found is not None and found.genotype == genotype:
            values = {name: getattr(found, name) for name in _KEPT} | {_SETTINGS: found.settings}
            known = {name: value for name, value in values.items() if value not in (None, {})}
    # What a user's file holds may be anything that JSON has, and NumPy is none of it.
    return genotype.save(path, **json.loads(json.dumps(known)))


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = config.plain(config.load(path))
    except config.ConfigError:
        # Of another version, or edited: then they are unknown.
        return {}
    # Where images lie is nobody else's business.
    found["data"].pop("root", None)
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
