"""``python -m detectron2_backbones.convert IN OUT.pkl``: ImageNet weights in Detectron2's own format.

The launchers of this package load ImageNet checkpoints as they are. Detectron2's own tools, and demos, need this.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from genas_plugins._messages import message_of
from genas_plugins._reading import expand_home
from genas_plugins.checkpoints import convert_network
from genas_plugins.darts.genotype import Genotype
from genas_plugins.darts.zoo import find_genotype
from genas_plugins.files import atomic_path

__all__ = ["convert", "main"]

_PREFIX = "backbone.bottom_up.network."


def convert(source: str | Path, target: str | Path, genotype: Genotype | None = None) -> int:
    """Write the stem and the cells of a checkpoint under the names that they have below a feature pyramid.

    Classifier, auxiliary head and the counters of batch normalisation, which frozen layers lack, are left out.

    Args:
        source: An official ImageNet checkpoint, a file of ``genas convert`` or a checkpoint of ``timm_models.train``.
        target: File to write, atomically; its name must end in ``.pkl``.
        genotype: Genotype of the network. None: the file's own, or else the one published genotype that fits.

    Returns:
        The number of tensors.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or does not fit the genotype.
        ValueError: ``target`` has another suffix.
        OSError: The file cannot be written; an older one of that name is left as it was.
    """
    if Path(target).suffix != ".pkl":
        raise ValueError(f"Detectron2 knows its format by the suffix .pkl, got the file name {Path(target).name!r}.")
    with tempfile.TemporaryDirectory() as folder:
        network = convert_network(source, Path(folder) / "network.safetensors", genotype, auxiliary=False)
    model = {
        f"{_PREFIX}{name}": value.float().numpy()
        for name, value in network.state_dict().items()
        if not name.startswith("classifier.") and not name.endswith("num_batches_tracked")
    }
    content = {"model": model, "__author__": "genas-plugins", "matching_heuristics": False}
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        pickle.dump(content, file, protocol=4)
    return len(model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m detectron2_backbones.convert", description="Write ImageNet weights in Detectron2's format."
    )
    parser.add_argument("source", metavar="IN", help="an ImageNet checkpoint; nothing in it is executed")
    parser.add_argument("target", metavar="OUT.pkl", help="the file to write")
    parser.add_argument(
        "--arch", metavar="NAME", help="name of the zoo, a genotype's JSON file or 28 integers (what fits the file)"
    )
    options = expand_home(parser.parse_args(arguments))
    try:
        count = convert(options.source, options.target, find_genotype(options.arch) if options.arch else None)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"detectron2_backbones.convert: {message_of(error)}", file=sys.stderr)
        return 1
    print(f"{options.target}: {count} tensors.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
