"""Weights of a backbone and of a whole detector, as data: nothing in a file is executed, whatever it holds."""

from __future__ import annotations

import importlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from detectron2_backbones.backbone import GeNASBackbone
from genas_plugins.checkpoints import CheckpointError, read_state, read_torch
from genas_plugins.files import write_text
from timm_models.weights import fit_state

__all__ = ["GenasCheckpointer", "find_backbone", "read_pickle"]

_ARRAYS = ("numpy._core.multiarray", "numpy.core.multiarray")


class GenasCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also loads the ImageNet weights of a GeNAS backbone.

    Files: an official checkpoint (``.pth.tar``), a file of ``genas convert`` (``.safetensors``), a checkpoint of
    ``timm_models.train``, a file of ``detectron2_backbones.convert`` (``.pkl``), or a checkpoint of a whole detector,
    which Detectron2 wrote. The backbone is found wherever the model has it. Each tensor of an ImageNet file must land
    in it, and each of the backbone must come from the file; classifier and auxiliary head are left out. Elsewhere
    Detectron2's rule holds: what does not fit is logged.

    Args:
        model: A detector.
        save_dir: Where checkpoints are written.
        strict: Refuse weights that do not fit the backbone; False: load what fits and log the rest.
        save_to_disk: None: only on the main process.
        **checkpointables: What else is saved and resumed, as Detectron2 has it.
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
            path: The file, or an address that Detectron2 can download.
            checkpointables: Which others to resume; None: all.

        Returns:
            What else the file holds.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It is damaged, could execute code, or does not fit the backbone.
        """
        if path and "://" not in path and not Path(path.partition("?")[0]).is_file():
            raise FileNotFoundError(
                f"There is no checkpoint file {path}. ImageNet weights are in the model zoo of "
                "https://github.com/clovaai/GeNAS; name the file that you downloaded."
            )
        try:
            return super().load(path, checkpointables)
        finally:
            # Left by an error, it would stop the next file from loading.
            self._parsed_url_during_load = None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the last, so that a killed run can be resumed at any moment."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = _read(filename)
        backbone = find_backbone(self.model)
        if backbone is not None:
            checkpoint["model"] = self._fit(checkpoint["model"], backbone, filename)
        return checkpoint

    def _fit(self, state: Mapping[str, Tensor], name: str, filename: str) -> dict[str, Tensor]:
        """The tensors by the names of the model, those of the backbone checked."""
        network = self.model.get_submodule(name)
        # In a whole detector's file the backbone has its place, and there are other tensors.
        whole = any(key in state for key in self.model.state_dict() if not key.startswith(f"{name}."))
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        others = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} if whole else {}
        try:
            fitted, _ = fit_state(own if whole else state, network, self.strict)
        except RuntimeError as error:
            raise CheckpointError(
                f"{filename}: {error} To load what fits: MODEL.GENAS.STRICT_WEIGHTS False (yacs), train.strict=False "
                "(LazyConfig)."
            ) from None
        return {**others, **{f"{name}.{key}": value for key, value in fitted.items()}}


def find_backbone(model: nn.Module) -> str | None:
    """The name of the GeNAS network in a model, such as ``backbone.bottom_up.network``; None: it has none.

    Raises:
        ValueError: It has several.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, GeNASBackbone)]
    if len(names) > 1:
        raise ValueError(f"The model has {len(names)} GeNAS backbones ({', '.join(names)}), expected one.")
    return ".".join(filter(None, (names[0], "network"))) if names else None


def _read(path: str) -> dict[str, Any]:
    if path.endswith(".pkl"):
        return read_pickle(path)
    if path.endswith(".safetensors"):
        return {"model": read_state(path)}
    content = read_torch(Path(path))
    if isinstance(content, dict) and isinstance(content.get("model"), Mapping):
        return {**content, "model": dict(content["model"])}
    return {"model": read_state(path)}


class _Unpickler(pickle.Unpickler):
    """Reads plain containers, numbers, strings and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in _ARRAYS and name in ("_reconstruct", "scalar"):
            return getattr(importlib.import_module(_ARRAYS[np.__version__.startswith("1.")]), name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could execute code")


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read a file in Detectron2's own format: ``"model"``, arrays by name, and ``"__author__"``.

    Returns:
        Its content, with tensors in place of the arrays.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged or something else, or could execute code when loaded.
    """
    data = Path(path).read_bytes()
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        state = {str(name): torch.from_numpy(np.array(value)) for name, value in content["model"].items()}
    except pickle.UnpicklingError as error:
        reason = str(error) if str(error).startswith("it refers to") else "it is damaged"
        raise CheckpointError(f"{path} is not loaded because {reason}.") from None
    # What damaged and foreign pickles raise has no common base.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or holds no arrays under 'model', as detectron2_backbones.convert writes them."
        ) from error
    return {**content, "model": state}
