"""mmcv-lite, mmengine's checkpoints and mmseg's own tools."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.utils.dl_utils import mmcv_full_available

from genas_plugins.files import packaged_configs
from mmseg_backbones._distributions import OPERATIONS
from mmseg_backbones.compatibility import stand_in_for_mmcv_ops, supply_find_loader
from mmseg_backbones.synthetic import CLASSES, PALETTE, draw_scene, write_scenes

QUICKSTART = packaged_configs("mmseg", ".py")["deeplabv3_genas-flatness-c100-d8_1xb8-600_quickstart_synthetic"]


def test_a_compiled_operation_says_what_is_missing() -> None:
    operations = pytest.importorskip("mmcv.ops")
    if hasattr(sys.modules["mmcv._ext"], "__file__"):
        pytest.skip("mmcv has its compiled operations here")
    with pytest.raises(RuntimeError, match=r"nms is one of mmcv's compiled operations, which \S*mmcv") as missing:
        operations.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.5]), 0.5)
    assert_commands_are_documented(str(missing.value).partition("compiler: ")[2])


def assert_commands_are_documented(line: str) -> None:
    """The commands of a message, joined by &&, stand in the document one below the other, in this order."""
    document = (Path(__file__).parents[2] / "docs" / "mmseg.md").read_text(encoding="utf-8")
    assert "```bash\n" + line.replace(" && ", "\n") + "\n```" in document


@pytest.mark.parametrize("distribution", OPERATIONS)
def test_the_commands_that_compile_mmcv_are_those_of_the_document(distribution: str) -> None:
    assert_commands_are_documented(OPERATIONS[distribution])


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mmcv's compiled operations are looked for first."""
    import mmcv

    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path), *mmcv.__path__])
    monkeypatch.setattr(mmcv, "_ext", None, raising=False)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    return tmp_path / "_ext.py"


def test_operations_of_a_full_mmcv_are_not_touched(extension: Path) -> None:
    extension.write_text("def nms(): return 'compiled'")
    for _ in range(2):
        assert stand_in_for_mmcv_ops() is False
        assert sys.modules["mmcv._ext"].__file__ == str(extension)
    assert importlib.import_module("mmcv._ext").nms() == "compiled"


def test_operations_that_were_compiled_for_another_pytorch_are_not_replaced(extension: Path) -> None:
    extension.write_text("raise ImportError('undefined symbol: _ZN3c106detail')")
    with pytest.raises(ImportError, match=r"do not fit PyTorch \S+ \(undefined symbol.*compile them again: pip "):
        stand_in_for_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_without_them_there_is_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert stand_in_for_mmcv_ops() is True
    assert sys.modules["mmcv._ext"].__spec__.name == "mmcv._ext"
    assert stand_in_for_mmcv_ops() is False


def test_without_find_loader_operations_are_looked_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on Python 3.14, where it is gone and nothing is to be taken away.
    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    callers = [importlib.import_module(name) for name in ("mmengine.utils.dl_utils.misc", "mmcv.utils.ext_loader")]
    for module in callers:
        monkeypatch.setattr(module, "pkgutil", pkgutil)
        with pytest.raises(AttributeError, match="find_loader"):
            module.pkgutil.find_loader("mmcv._ext")
    supply_find_loader()
    compiled = hasattr(sys.modules["mmcv._ext"], "__file__")
    assert [mmcv_full_available(), callers[1].check_ops_exist()] == [compiled, compiled]
    assert callers[0].pkgutil.find_loader("json") is importlib.util.find_spec("json").loader
    # Others find the standard library as it is.
    assert not hasattr(pkgutil, "find_loader")


def test_checkpoints_of_mmengine_load_as_data(tmp_path: Path) -> None:
    history = HistoryBuffer([1.5, 2.5], [1, 1])
    saved = {"meta": {"iter": 3}, "message_hub": {"log_scalars": {"train/loss": history, "value": np.float64(2.0)}}}
    torch.save(saved, tmp_path / "iter_3.pth")
    loaded = torch.load(tmp_path / "iter_3.pth", weights_only=True)
    assert loaded["message_hub"]["log_scalars"]["train/loss"].mean() == 2.0
    assert loaded["message_hub"]["log_scalars"]["value"] == 2.0


def test_scenes_are_exact_and_disjoint(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", training=3, validation=2, size=64, seed=1)
    assert sorted(path.name for path in (folder / "masks" / "train").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    again = draw_scene(np.random.default_rng((1, False, 0)), 64, False)
    image, mask = again
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
    assert set(np.unique(mask)) <= set(range(len(CLASSES)))
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(folder / "images" / "train" / "0000.png")), image)
    assert np.array_equal(np.asarray(Image.open(folder / "masks" / "train" / "0000.png")), mask)
    # The sky is above, the lawn below.
    assert mask[0, 0] in (0, 4) and mask[-1].max() in (1, 2)
    with pytest.raises(FileExistsError, match="has scenes already"):
        write_scenes(folder)


def test_the_quickstart_names_the_classes_of_the_scenes() -> None:
    meta = Config.fromfile(QUICKSTART).train_dataloader.dataset.metainfo
    assert tuple(meta.classes) == CLASSES
    assert tuple(map(tuple, meta.palette)) == PALETTE


# What mmseg's tools import.
MODULES = ("mmseg_backbones", "mmseg.apis", "mmseg.models", "mmseg.datasets", "mmseg.engine", "mmengine.runner")


@pytest.fixture(scope="module")
def start(warm: Callable[..., Any]) -> Callable[..., Any]:
    """Starts one of mmseg's tools."""
    quietly = "import warnings; warnings.simplefilter('ignore')\n"
    # As in the fixture of conftest.py.
    quietly += "import functools, mmengine.config.utils as utils; utils.load = functools.cache(utils.load)"

    def command(name: str, folder: Path, *arguments: Any) -> Any:
        return warm(*MODULES).python("-m", f"mmseg_backbones.{name}", *arguments, folder=folder, before=quietly)

    return command


@pytest.fixture(scope="module")
def trained(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A small training that was killed and resumed: its folder, its options, and what the second run printed."""
    folder = tmp_path_factory.mktemp("trained")
    write_scenes(folder / "data" / "synthetic", training=4, validation=2, size=64)
    options = ["train_dataloader.batch_size=2", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]
    options += ["train_dataloader.persistent_workers=False", "val_dataloader.persistent_workers=False"]
    options += ["train_cfg.max_iters=6", "train_cfg.val_interval=6", "default_hooks.checkpoint.interval=2"]
    options += ["default_hooks.logger.interval=1", "model.backbone.init_channels=2", "model.decode_head.in_channels=32"]
    options += ["model.auxiliary_head.in_channels=16", "default_hooks.visualization.draw=False"]
    options = ["--work-dir", "work", "--cfg-options", *options]
    running = start("train", folder, QUICKSTART, *options)
    latest = folder / "work" / "last_checkpoint"
    # mmengine opens the file before it writes the name.
    ended = running.wait(until=lambda: latest.exists() and bool(latest.read_text()))
    assert ended is None, ended
    running.signal(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    assert not (folder / "work" / "iter_6.pth").exists(), "the run ended before it was killed"
    done = start("train", folder, QUICKSTART, "--resume", *options).wait()
    assert done.status == 0, done.stderr[-2000:]
    return folder, options, done.stdout + done.stderr


def test_a_killed_training_is_resumed_by_mmsegs_own_tool(trained: tuple[Path, list[str], str]) -> None:
    folder, _, output = trained
    assert "resumed epoch" in output and "Iter(train) [6/6]" in output
    assert "Iter(train) [1/6]" not in output
    assert "mIoU" in output
    assert (folder / "work" / "iter_6.pth").exists()


def test_it_needs_no_other_host(warm: Callable[..., Any], tmp_path: Path) -> None:
    names = "{name.partition('.')[0] for name in sys.modules}"
    done = warm(*MODULES)(f"import sys\nprint({names} & {{'mmseg_backbones', 'detectron2', 'nni'}})", folder=tmp_path)
    assert (done.status, done.stdout) == (0, "{'mmseg_backbones'}\n")


def test_a_checkpoint_is_tested_at_several_scales_and_flips(
    trained: tuple[Path, list[str], str], start: Callable[..., Any]
) -> None:
    folder, options, _ = trained
    said = []
    for flags in ([], ["--tta"]):
        changes = [option.replace("val_dataloader", "test_dataloader") for option in options]
        done = start("test", folder, QUICKSTART, "work/iter_6.pth", *flags, *changes).wait()
        assert done.status == 0, done.stderr[-2000:]
        said.append(done.stdout + done.stderr)
    assert all("Iter(test) [2/2]" in output and "mIoU" in output for output in said)
    assert "SegTTAModel" in said[1] and "SegTTAModel" not in said[0].split("tta_model")[0]


def test_a_checkpoint_serves_mmsegs_inference(trained: tuple[Path, list[str], str]) -> None:
    from mmseg.apis import inference_model, init_model

    folder, options, _ = trained
    changes = dict(option.split("=") for option in options[3:] if option.startswith("model."))
    changes = {name: int(value) for name, value in changes.items()}
    model = init_model(str(QUICKSTART), str(folder / "work" / "iter_6.pth"), device="cpu", cfg_options=changes)
    assert tuple(model.dataset_meta["classes"]) == CLASSES
    saved = torch.load(folder / "work" / "iter_6.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    image = draw_scene(np.random.default_rng(0), 97, True)[0]
    assert inference_model(model, image).pred_sem_seg.data.shape == (1, 97, 97)
