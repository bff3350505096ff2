"""Writes a trained network as a folder that ``timm.create_model`` opens anywhere, and pushes it to the hub."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from timm.models import push_to_hf_hub, save_for_hf

from genas_plugins._messages import one_line, shown
from genas_plugins._reading import user_path
from genas_plugins.files import atomic_folder
from genas_plugins.plotting import plot_cells
from timm_models.card import PICTURE, UNKNOWN, card_text, describe
from timm_models.network import GenasNet
from timm_models.searches import FoundGenotype, read_found
from timm_models.trained import TrainedNetwork

__all__ = ["PushError", "check_repository", "publish", "push"]

CARD = "README.md"
# An owner and a name of the hub: letters, digits, "-", "_", ".", of which the last three begin and end none.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
# Of the authors' weights, and not of those that are published here.
_OF_OTHERS = ("license", "origin_url")


class PushError(RuntimeError):
    """The hub did not take a network; the folder is written all the same."""


def check_repository(name: str) -> str:
    """Check the name of a repository of the hub.

    Raises:
        ValueError: It is not OWNER/NAME.
    """
    if not re.fullmatch(rf"{_PART}/{_PART}", name) or "--" in name or ".." in name:
        raise ValueError(f"--push takes OWNER/NAME, a repository of the Hugging Face hub, got {shown(name)}.")
    return name


def publish(
    network: TrainedNetwork,
    folder: str | Path,
    *,
    search: FoundGenotype | None = None,
    repository: str | None = None,
    license: str | None = None,
) -> FoundGenotype | None:
    """Write weights (``model.safetensors``), configuration (``config.json``), card and picture into a new folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds it again, wherever ``timm_models`` is imported.
    The folder appears whole or not at all.

    Args:
        network: A trained :class:`~timm_models.GenasNet`.
        folder: A new or an empty folder.
        search: What is known of the search that found the genotype; None: what the training knows.
        repository: OWNER/NAME where it will lie on the hub, for the card.
        license: The hub's name of the licence of the weights, such as ``mit``; None: unknown.

    Returns:
        What is known of the search; None: nothing.

    Raises:
        FileExistsError: The folder is not empty.
        ImportError: matplotlib is not installed.
        TypeError: The network is not one of ours.
        ValueError: The search found another genotype.
        OSError: Something cannot be written; nothing is left behind.
    """
    model = _checked(network)
    if search is None:
        search = _known(network, model)
    elif search.genotype != model.genotype:
        raise ValueError(
            f"The search found the genotype {search.genotype}, and {network.checkpoint} holds the network of "
            f"{model.genotype}: name its own search, or leave --search out."
        )
    target = user_path(folder)
    name = (repository or target.resolve().name).rpartition("/")[2]
    address = f"hf-hub:{repository}" if repository else f"local-dir:{name}"
    with atomic_folder(target) as temporary:
        text = card_text(network, search, name=name, address=address, license=license)
        (temporary / CARD).write_text(text, encoding="utf-8")
        plot_cells(model.genotype, temporary / PICTURE)
        save_for_hf(_unclaimed(model), str(temporary), safe_serialization=True, **_configuration(network))
    return search


def push(
    network: TrainedNetwork,
    folder: str | Path,
    repository: str,
    *,
    search: FoundGenotype | None = None,
    license: str | None = None,
) -> str:
    """Push a published network to the hub with timm's own function, then its picture and card.

    A repository that is not there is created. A card that lies there already is left as it is, as timm leaves it.

    Args:
        network: What was published.
        folder: The folder that :func:`publish` wrote.
        repository: OWNER/NAME.
        search: As returned by :func:`publish`.
        license: As given to it.

    Returns:
        The address of the repository.

    Raises:
        PushError: The hub did not take it, or cannot be reached.
    """
    model = _checked(network)
    api = huggingface_hub.HfApi()
    card = {
        "description": describe(network, search, f"hf-hub:{repository}"),
        # Without it timm's function would claim another one.
        "license": license or UNKNOWN,
    }
    try:
        own_card = not api.file_exists(repo_id=repository, filename=CARD)
        push_to_hf_hub(
            _unclaimed(model), repository, model_card=card, safe_serialization=True, **_configuration(network)
        )
        files = [PICTURE, CARD] if own_card else [PICTURE]
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=files,
            commit_message="Add the card and the picture of the cells" if own_card else "Add the picture of the cells",
        )
    # Its client's errors are of whichever HTTP library its version is built on.
    except Exception as error:
        raise PushError(
            f"{folder} is written, and the hub did not take it: {one_line(error, 500) or type(error).__name__}. Log in "
            f"with hf auth login, then push it with: hf upload {repository} {folder}"
        ) from error
    return f"{api.endpoint}/{repository}"


def _checked(network: TrainedNetwork) -> GenasNet:
    if isinstance(network.model, GenasNet) and network.data_config is not None:
        return network.model
    if network.data_config is None:
        raise TypeError(
            f"{network.checkpoint} holds a network with the stem for CIFAR, which timm's models do not have: train "
            "genas_cell with its genotype and publish that."
        )
    raise TypeError(
        f"{network.checkpoint} holds timm's {network.name}, expected a GeNAS network: timm.models.push_to_hf_hub "
        "publishes others."
    )


def _known(network: TrainedNetwork, model: GenasNet) -> FoundGenotype | None:
    if network.genotype_file is None:
        return None
    try:
        found = read_found(network.genotype_file)
    except (OSError, ValueError):  # changed, or gone, since it was trained
        return None
    return found if found.genotype == model.genotype else None


def _configuration(network: TrainedNetwork) -> dict[str, Any]:
    """What timm's functions write beside the architecture and its arguments."""
    described = {"label_names": list(network.class_names)} if network.class_names else {}
    return {"model_config": described, "data_config": dict(network.data_config or {})}


def _unclaimed(model: GenasNet) -> GenasNet:
    """The same network, whose configuration does not say that its weights are the authors'."""
    other = copy.copy(model)
    other.pretrained_cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in _OF_OTHERS}
    return other
