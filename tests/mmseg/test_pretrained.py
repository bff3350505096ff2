"""Every spelling of mmengine's Pretrained loads, from each file that mmengine would take, or says why not."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from genas_plugins.checkpoints import CheckpointError

register_all_modules()
# All kinds of operations, and a third of the tensors of a published network.
CODE = [4, 3, 1, 0, 3, 3, 2, 0, 0, 3, 0, 6, 0, 0, 1, 3, 4, 0, 3, 2, 0, 3, 0, 0, 7, 0, 3, 0]
BACKBONE = {"type": "GeNASBackbone", "arch": CODE, "init_channels": 4}


def randomized(seed: int) -> nn.Module:
    backbone = MODELS.build(dict(BACKBONE))
    generator = torch.Generator().manual_seed(seed)
    for value in backbone.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return backbone


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return randomized(1)


def initialised(**init_cfg: Any) -> dict[str, Tensor]:
    backbone = MODELS.build({**BACKBONE, "init_cfg": init_cfg})
    backbone.init_weights()
    return backbone.state_dict()


def assert_same(found: dict[str, Tensor], source: nn.Module) -> None:
    expected = source.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit, "mmengine.Pretrained", "mmseg.Pretrained"])
def test_every_spelling_loads(kind, source, tmp_path):
    torch.save(source.network.state_dict(), tmp_path / "weights.pth")
    assert_same(initialised(type=kind, checkpoint=str(tmp_path / "weights.pth")), source)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        initialised(type=kind, checkpoint=str(tmp_path / "none.pth"))


def test_a_configuration_in_pure_python_loads(source, tmp_path):
    torch.save(source.network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.py").write_text(
        "from mmengine.config import read_base\n"
        "from mmengine.model import PretrainedInit\n"
        "from mmseg_backbones import GeNASBackbone\n"
        f"backbone = dict(type=GeNASBackbone, arch={CODE}, init_channels=4,\n"
        f"    init_cfg=dict(type=PretrainedInit, checkpoint={str(tmp_path / 'weights.pth')!r}))\n"
    )
    backbone = MODELS.build(Config.fromfile(tmp_path / "config.py", lazy_import=True).backbone)
    backbone.init_weights()
    assert_same(backbone.state_dict(), source)


def segmentor(source: nn.Module) -> nn.Module:
    """As a segmentor has its parts: only names and tensors count."""
    head = nn.ModuleDict({"conv_seg": nn.Conv2d(4, 2, 1)})
    return nn.ModuleDict({"backbone": source, "decode_head": head})


WRAPPERS = {
    "plain": lambda model: model.state_dict(),
    "module": lambda model: {f"module.{name}": value for name, value in model.state_dict().items()},
    "compiled": lambda model: torch.compile(model).state_dict(),
    "both": lambda model: {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()},
    "averaged": lambda model: AveragedModel(model).state_dict(),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["backbone", "backbone.", "backbone.network."])
def test_the_backbone_of_a_whole_segmentor_loads_by_its_prefix(wrapper, prefix, source, tmp_path):
    content = {"meta": {"iter": np.int64(3)}, "state_dict": WRAPPERS[wrapper](segmentor(source))}
    torch.save(content, tmp_path / "ITER_3.PTH")
    for kind in ("Pretrained", PretrainedInit):
        assert_same(initialised(type=kind, checkpoint=str(tmp_path / "ITER_3.PTH"), prefix=prefix), source)


def test_a_prefix_that_the_file_has_itself_counts(source, tmp_path):
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    assert_same(initialised(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix="module."), source)


def test_what_does_not_land_is_an_error(source, tmp_path):
    torch.save(segmentor(source).state_dict(), tmp_path / "whole.pth")
    with pytest.raises(RuntimeError, match=r"left over \(\./decode_head\.conv_seg\.weight"):
        initialised(type="mmengine.Pretrained", checkpoint=str(tmp_path / "whole.pth"))
    with pytest.raises(CheckpointError, match=r"whole\.pth has nothing under the prefix 'neck\.'; it has: backbone\."):
        initialised(type="Pretrained", checkpoint=str(tmp_path / "whole.pth"), prefix="neck")
    with pytest.raises(ValueError, match="has checkpoint, prefix, map_location, got prefx"):
        initialised(type="Pretrained", checkpoint=str(tmp_path / "whole.pth"), prefx="backbone")
    with pytest.raises(ValueError, match="needs checkpoint=FILE"):
        initialised(type=PretrainedInit)


def test_other_initialisations_are_mmengines(source):
    state = initialised(type="mmengine.Constant", layer="Conv2d", val=0.25)
    assert (state["network.stem0.0.weight"] == 0.25).all()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_with_an_address_is_downloaded_and_read_as_data(source, address, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.save(source.network.state_dict(), tmp_path / "site" / "weights.pth")
    assert_same(initialised(type="Pretrained", checkpoint=f"{address}/weights.pth"), source)
    # The second time it is there.
    (tmp_path / "site" / "weights.pth").unlink()
    assert_same(initialised(type="Pretrained", checkpoint=f"{address}/weights.pth"), source)


@pytest.mark.parametrize("wrapper", ["plain", "module", "compiled", "both"])
def test_a_whole_segmentor_loads_as_mmengine_loads_it(wrapper, source, tmp_path, caplog):
    model = segmentor(randomized(2))
    saved = segmentor(source)
    torch.save({"meta": {}, "state_dict": WRAPPERS[wrapper](saved)}, tmp_path / "iter_3.pth")
    load_checkpoint(model, str(tmp_path / "iter_3.pth"), map_location="cpu")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.state_dict().items())
