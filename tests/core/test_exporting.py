"""ONNX files compute what PyTorch computes, or do not appear."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genas_plugins import ZOO, CellNetwork, Genotype, SuperNet
from genas_plugins.checkpoints import save_network, save_supernet
from genas_plugins.datasets._listing import images_below
from genas_plugins.experiment import config
from genas_plugins.exporting import ExportError, export_onnx
from genas_plugins.exporting.subnets import open_subnet
from genas_plugins.nasbench201 import NasBench201Architecture, NasBench201SuperNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def small(seed: int = 0, scale: float = 1.0) -> nn.Module:
    """A convolution of stride 2, normalised by odd statistics, and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def run(path: Path, images: Tensor) -> list[Tensor]:
    """What onnxruntime itself makes of a file, without our session."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


def inputs(path: Path) -> list[Any]:
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    return [each.dim_param or each.dim_value for each in shape.dim]


def test_the_file_computes_what_the_network_computes_in_evaluation_mode(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small().train()
    handlers = list(logging.getLogger().handlers)
    found = export_onnx(model, tmp_path / "n.onnx", 16, metadata={"genotype": "1 2 3"})
    assert model.training and logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")
    x = drawn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "n.onnx", x)[0], model.eval()(x))
    assert inputs(tmp_path / "n.onnx") == [1, 3, 16, 16]
    assert found.outputs == ("logits",) and found.difference < 1e-5 and found.fidelity is None
    assert found.size == (tmp_path / "n.onnx").stat().st_size
    stored = onnx.load(tmp_path / "n.onnx")
    assert {each.key: each.value for each in stored.metadata_props} == {"genotype": "1 2 3"}
    # What no operator uses other runtimes would look for.
    assert [(each.domain, each.version) for each in stored.opset_import] == [("", 18)]


def test_nodes_of_one_input(tmp_path: Path) -> None:
    model = CellNetwork(ZOO["fairdarts_b_c10"].genotype, 2, 3, 5, stem="cifar")
    export_onnx(model, tmp_path / "n.onnx", 16)
    x = drawn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "n.onnx", x)[0], model.eval()(x))


def test_batch_height_and_width_may_be_free(tmp_path: Path) -> None:
    model = small().eval()
    export_onnx(model, tmp_path / "n.onnx", (40, 48), dynamic_batch=True, dynamic_size=True)
    assert inputs(tmp_path / "n.onnx") == ["batch", 3, "height", "width"]
    for shape in ((5, 3, 33, 90), (2, 3, 64, 64)):
        with torch.no_grad():
            torch.testing.assert_close(run(tmp_path / "n.onnx", drawn(*shape))[0], model(drawn(*shape)))


class Two(nn.Module):
    """Several outputs, one of them an input of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.first(x)
        return [y, self.second(y)]


def test_several_outputs_have_names(tmp_path: Path) -> None:
    model = Two()
    assert export_onnx(model, tmp_path / "a.onnx", 8, channels=1).outputs == ("features_0", "features_1")
    named = export_onnx(model, tmp_path / "b.onnx", 8, channels=1, output_names=["half", "quarter"])
    assert named.outputs == ("half", "quarter")
    with torch.no_grad():
        for ours, theirs in zip(run(tmp_path / "b.onnx", drawn(1, 1, 8, 8)), model(drawn(1, 1, 8, 8)), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_int8_is_near_and_smaller_weights(tmp_path: Path) -> None:
    model = small().eval()
    batches = [drawn(4, 3, 16, 16, seed=seed) for seed in range(4)]
    found = export_onnx(model, tmp_path / "n.onnx", 16, dynamic_batch=True, calibration=iter(batches))
    images = torch.cat(batches)
    with torch.no_grad():
        expected = model(images)
    outputs = run(tmp_path / "n.onnx", images)[0]
    # By hand what the report says.
    error = float((outputs - expected).norm() / expected.norm())
    assert found.fidelity is not None and found.fidelity.images == 16
    assert found.fidelity.error == pytest.approx(error, rel=1e-4) and 0 < error < 0.05
    assert found.fidelity.agreement == float((outputs.argmax(1) == expected.argmax(1)).float().mean())
    kinds = {each.data_type for each in onnx.load(tmp_path / "n.onnx").graph.initializer if len(each.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}


class Outlier(nn.Module):
    """Its output is a channel of which int8 leaves nothing, because another is ten thousand times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        self.first.weight.data = torch.tensor([[1e4] * 3, [1.0] * 3]).view(2, 3, 1, 1)
        self.second.weight.data = torch.tensor([[0.0, 1.0]]).view(1, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).flatten(1)


def test_int8_that_lost_the_outputs_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"In int8 the outputs are \d+% away .* at most 25% are kept"):
        export_onnx(Outlier(), tmp_path / "n.onnx", 4, calibration=[drawn(4, 3, 4, 4)])
    assert list(tmp_path.iterdir()) == []


class Another(nn.Module):
    """Computes something else in the file than in PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1.01 if torch.compiler.is_exporting() else 1.0)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"computes something else .* logits of images \(1, 3, 8, 8\).*0\.01.*not kept"
    ):
        export_onnx(Another(), tmp_path / "n.onnx", 8)
    assert list(tmp_path.iterdir()) == []


class Sized(nn.Module):
    """Takes images whose height is divisible by 32."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[2] % 32 == 0)
        return x.mean((2, 3))


class Fixed(nn.Module):
    """Takes images of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((1, 2))


def test_what_torch_cannot_export_is_one_sentence(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(ExportError, match=r"torch .* cannot export Branch"):
        export_onnx(Branch(), tmp_path / "n.onnx", 8)
    told = r".*multiples of 32 only, .* each size that you need"
    with pytest.raises(ExportError, match=r"Sized does not take images \(1, 3, 71, 83\)" + told):
        export_onnx(Sized(), tmp_path / "n.onnx", 64, dynamic_size=True)
    with pytest.raises(ExportError, match=r"cannot export Branch with free height and width" + told):
        export_onnx(Branch(), tmp_path / "n.onnx", 64, dynamic_size=True)
    # Which torch exports all the same, with a width that is not free.
    with pytest.raises(ExportError, match=r"Fixed does not take images \(1, 3, 96, 128\)" + told):
        export_onnx(Fixed(), tmp_path / "n.onnx", 64, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "n.pt"}, ValueError, r"exported as \.onnx, got the file name 'n\.pt'"),
        ({"path": "taken.onnx"}, FileExistsError, r"taken\.onnx exists: name another file"),
        ({"path": "none/n.onnx"}, FileNotFoundError, r"none does not exist"),
        ({"image_size": 0}, ValueError, r"1 to 16,384 pixels, got \(0, 0\)"),
        ({"image_size": 32, "dynamic_size": True}, ValueError, r"33 to 16,384 pixels, got \(32, 32\)"),
        ({"model": small().double()}, ValueError, r"float64.*model\.float\(\)\.cpu\(\)"),
        ({"model": SuperNet(10, 4, 3)}, TypeError, r"SuperNet has no network of its own: pass model\.subnet"),
        ({"output_names": ["a", "b"]}, ValueError, r"1 outputs, which \('a', 'b'\) do not name"),
        ({"calibration": []}, ValueError, r"Calibration needs images, and there are none"),
        ({"calibration": [torch.zeros(2, 3, 9, 8)]}, ValueError, r"\(N, 3, 8, 8\), got \(2, 3, 9, 8\)"),
        ({"model": nn.Sequential(nn.Flatten(), nn.LSTM(192, 4))}, TypeError, r"expected a tensor or several"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "taken.onnx").write_bytes(b"mine")
    given = {"model": small(), "path": "n.onnx", "image_size": 8, **arguments}
    with pytest.raises(error, match=message):
        export_onnx(given.pop("model"), tmp_path / given.pop("path"), given.pop("image_size"), **given)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("taken.onnx", b"mine")]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small()
    model[5].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite: its weights are damaged"):
        export_onnx(model, tmp_path / "n.onnx", 8)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_sentence_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"^{name} is needed for exporting to ONNX .*'genas-plugins\[export\]'\.$"):
        export_onnx(small(), tmp_path / "n.onnx", 8)


# ------------------------------------------------------------------------------------------------------ supernets


GENOTYPE = ZOO["genas_flatness_c10"].genotype


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a search, as one that has come to its end."""

    def write(supernet: nn.Module, **space: Any) -> Path:
        folder = tmp_path / "search"
        folder.mkdir()
        experiment = {"data": {"name": "digits", "image_size": 16}, "space": space}
        (folder / "config.yaml").write_text(config.dump(config.parse(experiment)))
        (folder / "history.jsonl").write_text("")
        torch.save({"state_dict": supernet.state_dict()}, folder / "supernet.ckpt")
        return folder

    return write


def test_the_best_of_a_search_is_exported_with_the_weights_of_its_supernet(
    search: Callable[..., Path], tmp_path: Path
) -> None:
    supernet = SuperNet(10, init_channels=4, num_cells=3)
    folder = search(supernet, init_channels=4, num_cells=3)
    GENOTYPE.save(folder / "genotype.json")
    found = open_subnet(folder)
    assert (found.architecture, found.image_size) == (str(GENOTYPE), 16)
    export_onnx(found.model, tmp_path / "n.onnx", found.image_size)
    x = drawn(1, 3, 16, 16)
    with torch.no_grad():
        # Along the path in the supernet itself.
        torch.testing.assert_close(run(tmp_path / "n.onnx", x)[0], supernet.eval()(x, GENOTYPE))
    other = open_subnet(folder / "supernet.ckpt", "darts_v2_c10")
    assert other.architecture == str(ZOO["darts_v2_c10"].genotype)


def test_networks_of_other_spaces_are_exported_too(search: Callable[..., Path], tmp_path: Path) -> None:
    supernet = NasBench201SuperNet(init_channels=4, cells_per_stage=1)
    folder = search(supernet, name="nasbench201", init_channels=4, cells_per_stage=1)
    text = "|nor_conv_3x3~0|+|skip_connect~0|avg_pool_3x3~1|+|none~0|nor_conv_1x1~1|skip_connect~2|"
    with pytest.raises(FileNotFoundError, match=r"neither genotype\.json nor architecture\.json.*--genotype"):
        open_subnet(folder)
    (folder / "architecture.json").write_text(json.dumps({"architecture": text}))
    found = open_subnet(folder)
    assert found.architecture == text
    export_onnx(found.model, tmp_path / "n.onnx", 16)
    x = drawn(1, 3, 16, 16)
    with torch.no_grad():
        expected = supernet.eval()(x, NasBench201Architecture.from_string(text))
        torch.testing.assert_close(run(tmp_path / "n.onnx", x)[0], expected)
    (folder / "architecture.json").write_text("{}")
    with pytest.raises(ValueError, match=r"architecture\.json holds no architecture of this search"):
        open_subnet(folder)


def test_the_file_of_a_supernet_has_the_size_of_its_stem(tmp_path: Path) -> None:
    for stem, size in (("cifar", 32), ("imagenet", 224)):
        path = save_supernet(SuperNet(10, 4, 3, stem=stem), tmp_path / f"{stem}.safetensors")
        found = open_subnet(path, str(GENOTYPE))
        assert (found.image_size, found.run) == (size, None)
    with pytest.raises(FileNotFoundError, match=r"name an architecture with --genotype"):
        open_subnet(path)


def test_a_fixed_network_is_no_supernet(tmp_path: Path) -> None:
    path = save_network(CellNetwork(GENOTYPE, 4, 3, 10), tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="holds a fixed network, no supernet"):
        open_subnet(path, str(Genotype.from_code(GENOTYPE.code)))


def test_images_of_a_folder_and_of_those_inside_it(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a.webp", ".hidden/3.png", "b/notes.txt", "b/.4.png", "c/d/5.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(Path(path).relative_to(tmp_path)) for path in images_below(tmp_path)]
    assert found == ["a.webp", "b/1.JPG", "b/2.png", "c/d/5.tiff"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"empty holds no images .*but notes\.txt"):
        images_below(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="There is no folder of images"):
        images_below(tmp_path / "none")
