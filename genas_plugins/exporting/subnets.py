"""The network of one architecture, with the weights of a supernet: what a search measures, to be measured elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from genas_plugins._reading import ReadingError, read_json, user_path
from genas_plugins.checkpoints import load_supernet, read_metadata
from genas_plugins.darts.genotype import Genotype
from genas_plugins.experiment.run_folder import ARCHITECTURE_FILE, GENOTYPE_FILE, TrainedRun

__all__ = ["Subnet", "open_subnet"]

_SIZES = {"digits": 8, "imagenet16-120": 16, "cifar10": 32, "cifar100": 32}
_STEMS = {"imagenet": 224, "cifar": 32}


@dataclass(frozen=True)
class Subnet:
    """A path of a trained supernet.

    Its statistics of batch normalisation are the supernet's, which are not those of this path: it has the path's
    latency, and not the accuracy that the path has after recalibration.

    Attributes:
        model: The network, in evaluation mode on the CPU.
        architecture: Its architecture as text: 28 integers, or the string of its space.
        image_size: Height and width of the images that the supernet was trained on; None: they are not known.
        run: The search; None: the file of the supernet does not say it.
    """

    model: nn.Module
    architecture: str
    image_size: int | None
    run: TrainedRun | None


def open_subnet(place: str | Path, architecture: str | None = None) -> Subnet:
    """Open the network of one architecture of a supernet.

    Args:
        place: The folder of ``genas search``, its ``supernet.ckpt``, or the file of a supernet.
        architecture: The candidate as its space reads it; None: the best that the search found.

    Raises:
        FileNotFoundError: There is no supernet, or the search has no best architecture yet.
        ValueError: A file cannot be read, or the architecture is none of its space.
    """
    path = user_path(place)
    run = None
    if path.is_dir() or (path.parent / "config.yaml").is_file() or "experiment" in read_metadata(path):
        run = TrainedRun.open(path.parent if (path.parent / "config.yaml").is_file() and path.is_file() else path)
    supernet = load_supernet(path) if run is None else run.supernet
    space = supernet.search_space
    candidate = _found(path, space) if architecture is None else space.read(architecture)
    size = None
    if run is not None:
        size = run.experiment.data.image_size or _SIZES.get(run.experiment.data.name)
    else:
        size = _STEMS.get(getattr(supernet, "stem_kind", "cifar"))
    text = str(candidate) if isinstance(candidate, Genotype) else _text(space.to_json(candidate))
    return Subnet(supernet.subnet(candidate).eval(), text, size, run)


def _text(candidate: Any) -> str:
    return candidate if isinstance(candidate, str) else json.dumps(candidate)


def _found(path: Path, space: Any) -> Any:
    """The best architecture of a finished search."""
    folder = path if path.is_dir() else path.parent
    if (folder / GENOTYPE_FILE).is_file():
        return Genotype.load(folder / GENOTYPE_FILE)
    file = folder / ARCHITECTURE_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {GENOTYPE_FILE} nor {ARCHITECTURE_FILE}, the best of a finished search: name an "
            "architecture with --genotype."
        )
    try:
        return space.from_json(read_json(file)["architecture"])
    except (ReadingError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no architecture of this search ({error}): name one with --genotype.") from error
