"""Nothing in a checkpoint is executed, by whichever way mmengine gets it and whatever its own reader falls back to."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, checkpoint, load_checkpoint

from genas_plugins.checkpoints import CheckpointError
from mmseg_backbones.compatibility import allow_checkpoints


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


class Roundabout:
    """Gets hold of a function through what a HistoryBuffer may refer to."""

    def __reduce__(self) -> Any:
        return (getattr, (HistoryBuffer, "__init__"))


class Evaluated:
    def __reduce__(self) -> Any:
        return (eval, ("__import__('os').mkdir('executed')",))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the working folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Store:
    """A storage of bytes, as mmengine opens one for s3."""

    def get(self, name: str) -> bytes:
        return Path("weights.pth").read_bytes()


@pytest.fixture(params=["file", "address", "torchvision", "mmcls", "openmmlab", "openmmlab-file", "s3"])
def route(request: pytest.FixtureRequest, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a user writes to name ``weights.pth`` of the working folder, for each scheme that mmengine knows."""
    monkeypatch.chdir(tmp_path)
    address = f"{site}/weights.pth"
    monkeypatch.setattr(checkpoint, "get_torchvision_models", lambda: {"some": address})
    monkeypatch.setattr(checkpoint, "get_mmcls_models", lambda: {"some": address})
    monkeypatch.setattr(checkpoint, "get_file_backend", lambda *arguments, **keywords: Store())
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))
    (tmp_path / "open_mmlab.json").write_text(json.dumps({"some": address, "local": "weights.pth"}))
    return {
        "file": "weights.pth",
        "address": address,
        "torchvision": "torchvision://some",
        "mmcls": "mmcls://some",
        "openmmlab": "open-mmlab://some",
        "openmmlab-file": "openmmlab://local",
        "s3": "s3://bucket/weights.pth",
    }[request.param]


@pytest.mark.parametrize("payload", [Payload, Roundabout, Evaluated])
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_executed(route: str, payload: type, legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What people set to go on loading mmengine's checkpoints.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved = {"state_dict": {"weight": torch.ones(1, 1)}, "meta": payload()}
    torch.save(saved, "weights.pth", _use_new_zipfile_serialization=not legacy)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="could execute code") as refused:
            load_checkpoint(torch.nn.Linear(1, 1), route)
        assert "weights_only=False" not in str(refused.value)
    assert not Path("executed").exists()


def test_mmengines_own_checkpoints_load(route: str) -> None:
    layer = torch.nn.Linear(2, 1)
    history = {"train/loss": HistoryBuffer([1.5, 2.5], [1, 1]), "value": np.float64(2.0)}
    state = {f"backbone.{name}" if "mmcls" in route else name: value for name, value in layer.state_dict().items()}
    torch.save({"state_dict": state, "message_hub": {"log_scalars": history}}, "weights.pth")
    other = torch.nn.Linear(2, 1)
    content = load_checkpoint(other, route)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in other.state_dict().items())
    # What comes by this scheme is a backbone's tensors alone.
    if "mmcls" not in route:
        assert content["message_hub"]["log_scalars"]["train/loss"].mean() == 2.0


def test_what_others_allow_and_take_back_is_not_missed(tmp_path: Path) -> None:
    """The fork's reader does this around each file, and removes what was allowed before as well."""
    path = tmp_path / "iter_3.pth"
    torch.save({"state_dict": {}, "message_hub": HistoryBuffer([1.0], [1])}, path)
    for _ in range(2):
        with torch.serialization.safe_globals([getattr, HistoryBuffer, np.ndarray, np.dtype]):
            pass
        assert load_checkpoint(torch.nn.Module(), str(path))["message_hub"].current() == 1.0
        torch.serialization.clear_safe_globals()
    # PyTorch's own reader, after one of mmengine's files was read.
    load_checkpoint(torch.nn.Module(), str(path))
    assert torch.load(path, weights_only=True)["message_hub"].current() == 1.0


def test_the_protection_is_there_whatever_reader_mmengine_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the fork has it: a second try that executes."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": Payload()}, "weights.pth")

    def trusting(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(file, map_location=map_location, weights_only=False)

    monkeypatch.setattr(checkpoint, "_safe_torch_load", trusting, raising=False)
    monkeypatch.setattr(checkpoint, "torch", torch)
    monkeypatch.setattr(checkpoint, "load_url", trusting)
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    allow_checkpoints()
    for read in (checkpoint._safe_torch_load, checkpoint.torch.load, CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match="could execute code"):
            read("weights.pth")
    assert not Path("executed").exists()
    # All else is PyTorch.
    assert checkpoint.torch.save is torch.save and checkpoint.torch.nn is torch.nn
