"""The images of a training, as its folder knows them: stored when it begins, compared when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genas_plugins._messages import one_line
from genas_plugins.datasets import DATA_FILE, check_identity, files_identity, write_identity

__all__ = ["known_class", "leaves", "remember_images", "training_images"]

_logger = logging.getLogger(__name__)


def remember_images(folder: Path, cfg: Any, *, resume: bool) -> None:
    """Store what images a training begins with, or compare those of the run that it resumes.

    Data sets that are not MMSegmentation's, and runs that have stored nothing, are taken as they are.

    Args:
        folder: Folder of the training.
        cfg: Its configuration.
        resume: Go on with a checkpoint, if there is one.

    Raises:
        DataChangedError: The run began with other images; the message says what differs.
        ValueError: What is stored is damaged.
        OSError: It cannot be written.
    """
    identity = training_images(cfg)
    source = _resumed_run(folder, cfg) if resume else None
    if source is None and identity is None:
        # That of an earlier training in this folder.
        (folder / DATA_FILE).unlink(missing_ok=True)
    if identity is None:
        return
    known = source is not None and check_identity(source, identity)
    if not known or source != folder:
        write_identity(folder, identity)


def training_images(cfg: Any) -> dict[str, Any] | None:
    """The identity of ``train_dataloader``'s images, masks and classes; None where they cannot be listed."""
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS

    images: list[str] = []
    masks: list[str] = []
    classes: list[str] = []
    for one in leaves((cfg.get("train_dataloader") or {}).get("dataset")):
        kind = known_class(one)
        if not isinstance(kind, type) or not issubclass(kind, BaseSegDataset):
            return None
        try:
            listing = DATASETS.build({**one, "pipeline": [], "lazy_init": False, "serialize_data": False})
        # Whatever a wrong setting or a user's own class leads to is told by the script, which builds it again.
        except Exception as error:
            reason = one_line(error, 300) or type(error).__name__
            _logger.warning("%s cannot be read now, so a resume will not compare images: %s", kind.__name__, reason)
            return None
        images += [info[key] for key in ("img_path", "img_path2") for info in listing.data_list if key in info]
        masks += [info["seg_map_path"] for info in listing.data_list if "seg_map_path" in info]
        classes = classes or [str(name) for name in listing.metainfo.get("classes") or ()]
    return {"train": files_identity({"images": images, "masks": masks}, classes)} if images else None


def leaves(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of a data set, or of those that it wraps."""
    for one in dataset if isinstance(dataset, list | tuple) else [] if dataset is None else [dataset]:
        inner = [each for key in ("dataset", "datasets") for each in leaves(one.get(key))]
        yield from inner or [one]


def known_class(dataset: Mapping[str, Any]) -> Any:
    """The class that a data set's ``type`` names; None if it is not registered."""
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    kind = dataset.get("type")
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _resumed_run(folder: Path, cfg: Any) -> Path | None:
    """The folder of the checkpoint that mmengine would go on with."""
    if cfg.get("load_from"):
        return Path(cfg["load_from"]).parent
    return folder if (folder / "last_checkpoint").is_file() else None
