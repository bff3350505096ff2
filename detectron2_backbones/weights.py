"""Loads the weights of backbones and whole detectors as data: nothing in a file is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from detectron2_backbones.backbone import GeNASBackbone
from genas_plugins._messages import one_line, shown
from genas_plugins._pickles import claims_too_much, load_arrays
from genas_plugins._reading import user_path
from genas_plugins.checkpoints import CheckpointError, dense_tensors, read_state, read_torch, tensors_of, unwrapped
from genas_plugins.files import write_text
from genas_plugins.states import is_safetensors
from timm_models.weights import fit_state

__all__ = ["GenasCheckpointer", "find_backbone", "read_pickle"]


class GenasCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also loads the ImageNet weights of a GeNAS backbone.

    Files: an official checkpoint (``.pth.tar``), a file of ``genas convert`` (``.safetensors``), a checkpoint of
    ``timm_models.train``, a file of ``detectron2_backbones.convert`` (``.pkl``), or a checkpoint of a whole detector
    that Detectron2 wrote, also if it was compiled, averaged or trained by several processes. The backbone is found
    wherever the model has it. The tensors of an ImageNet file and those of the backbone must match one another;
    classifier and auxiliary head are left out. Elsewhere, as in Detectron2, tensors that do not fit are logged.

    Args:
        model: A detector.
        save_dir: Folder for checkpoints.
        strict: Refuse weights that do not fit the backbone; False: load what fits and log the rest.
        save_to_disk: Whether this process writes checkpoints; None: if it is the main process.
        **checkpointables: Further objects to save and resume, as in Detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = True,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file; an empty ``path`` loads nothing.

        Args:
            path: The file, or an address that Detectron2 can download; ``?matching_heuristics=True`` behind it asks
                Detectron2 to match names by their ends.
            checkpointables: Names of the further objects to resume; None: all.

        Returns:
            The remaining content of the file.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: The file is damaged, could execute code, or does not fit the backbone.
            ValueError: Something else stands behind ``?``.
        """
        path = path and str(user_path(path))
        if path and "://" not in path and not Path(path.partition("?")[0]).is_file():
            raise FileNotFoundError(
                f"There is no checkpoint file {path}. ImageNet weights are in the model zoo of "
                "https://github.com/clovaai/GeNAS; name the file that you downloaded."
            )
        try:
            return super().load(path, checkpointables)
        finally:
            # If an error left it set, the next file could not be loaded.
            self._parsed_url_during_load = None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last, so that a killed run can be resumed at any moment."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = _read(filename)
        queries = parse_qs(self._parsed_url_during_load.query) if self._parsed_url_during_load is not None else {}
        if queries.pop("matching_heuristics", ["False"]) == ["True"]:
            checkpoint["matching_heuristics"] = True
        if queries:
            raise ValueError(f"Behind {filename}? only matching_heuristics=True is known, got {shown(queries)}.")
        backbone = find_backbone(self.model)
        if backbone is not None:
            checkpoint["model"] = self._fit(checkpoint["model"], backbone, filename)
        return checkpoint

    def _fit(self, state: Mapping[str, Tensor], name: str, filename: str) -> dict[str, Tensor]:
        """Rename the tensors to the names of the model, and check those of the backbone."""
        network = self.model.get_submodule(name)
        # A compiled model has the prefixes of torch.compile as well.
        own_names = {plain: key for key in self.model.state_dict() for plain in unwrapped({key: None})}
        name = next(iter(unwrapped({name: None})))
        state = unwrapped(state)
        # The file of a whole detector also has tensors outside the backbone.
        whole = any(key in state for key in own_names if not key.startswith(f"{name}."))
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        others = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} if whole else {}
        try:
            fitted, _ = fit_state(own if whole else state, network, self.strict)
        except RuntimeError as error:
            raise CheckpointError(
                f"{filename}: {error} To load what fits: MODEL.GENAS.STRICT_WEIGHTS False (yacs), train.strict=False "
                "(LazyConfig)."
            ) from None
        named = {**others, **{f"{name}.{key}": value for key, value in fitted.items()}}
        return {own_names.get(key, key): value for key, value in named.items()}


def find_backbone(model: nn.Module) -> str | None:
    """The name of the GeNAS network in a model, such as ``backbone.bottom_up.network``; None: it has none.

    Raises:
        ValueError: The model has several.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, GeNASBackbone)]
    if len(names) > 1:
        raise ValueError(f"The model has {len(names)} GeNAS backbones ({', '.join(names)}), expected one.")
    return ".".join(filter(None, (names[0], "network"))) if names else None


def _read(filename: str) -> dict[str, Any]:
    path = Path(filename)
    if path.suffix.lower() == ".pkl":
        return read_pickle(path)
    if is_safetensors(path):
        return {"model": read_state(path)}
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("model"), Mapping):
        return {**content, "model": dense_tensors(content["model"], path)}
    return {"model": tensors_of(content, path)}


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read a file in Detectron2's own format: ``"model"``, arrays by name, and ``"__author__"``; or in Caffe2's.

    Returns:
        Its content, with tensors in place of the arrays; of Caffe2, as Detectron2 returns it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged or of another kind, could execute code, or claims more memory than its
            size.
    """
    data = user_path(path).read_bytes()
    try:
        content = load_arrays(data)
        caffe2 = "model" not in content
        # Detectors have their arrays under "blobs", ImageNet's networks at the top level.
        arrays = content.get("blobs", content) if caffe2 else content["model"]
        arrays = {str(name): np.asarray(value) for name, value in arrays.items() if not str(name).endswith("_momentum")}
    except pickle.UnpicklingError as error:
        reason = one_line(error, 300) if str(error).startswith("it ") else "it is damaged"
        raise CheckpointError(f"{path} is not loaded because {reason}.") from None
    # Errors of damaged and foreign pickles have no common base class.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or holds no arrays under 'model', as detectron2_backbones.convert writes them."
        ) from error
    if claims_too_much(sum(value.nbytes for value in arrays.values()), len(data)):
        raise CheckpointError(f"{path} holds arrays that claim more than its {len(data):,} bytes.")
    state = dense_tensors(arrays, path)
    if caffe2:
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    return {**content, "model": state}
