"""One small search on real images in each space of NNI's hub that has a supernet, and one with all kinds of choices."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import nni
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.hub.pytorch import (
    DARTS,
    ENAS,
    PNAS,
    AmoebaNet,
    AutoFormer,
    MobileNetV3Space,
    NasBench101,
    NasBench201,
    NASNet,
    ProxylessNAS,
    ShuffleNetSpace,
)
from nni.nas.nn.pytorch import (
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableConvTranspose2d,
    MutableLayerNorm,
    MutableLinear,
    MutableModule,
    MutableMultiheadAttention,
    Repeat,
)
from nni.nas.space import RawFormatModelSpace
from torch import Tensor, nn

from genas_plugins.datasets import load_search_data
from genas_plugins.scoring import recalibrate_batchnorm
from genas_plugins.scoring.data import TensorBatches
from nni_strategy import FlatnessEvaluator, GeNAS, fixed_network
from nni_strategy.evaluators import CombinedEvaluator
from nni_strategy.samples import SampleSpace, fix_path
from nni_strategy.training import supernet_evaluator

IMAGES: dict[str, Any] = {
    "name": "digits",
    "train_images": 64,
    "validation_images": 64,
    "test_images": 32,
    "recalibration_images": 32,
}
SMALL: dict[str, Any] = {
    "population": 4,
    "generations": 1,
    "parents": 2,
    "mutants": 1,
    "crossovers": 1,
    "validation_images": 32,
    "recalibration_images": 32,
}
# Half of the official widths of a stage, and the one stage that may have more than one block.
MOBILE: dict[str, Any] = {"base_widths": (8, 8, 8, 8, 8, 8, 8, 16, 16), "depth_range": (1, 2), "dropout_rate": 0.2}


class Everything(ModelSpace):
    """Every kind of choice that NNI's supernets know, on channels, kernels, groups, strides, features and depths."""

    def __init__(self) -> None:
        super().__init__()
        width, kernel = nni.choice("width", [4, 8]), nni.choice("kernel", [3, 5])
        self.stem = MutableConv2d(3, width, kernel, nni.choice("stride", [1, 2]), kernel // 2, bias=False)
        self.norm = MutableBatchNorm2d(width, eps=nni.choice("eps", [1e-5, 1e-2]))
        self.grouped = MutableConv2d(width, width, 3, padding=1, groups=nni.choice("groups", [1, 2, 4]))
        self.depthwise = MutableConv2d(width, width, nni.choice("long", [(1, 5), (5, 1)]), padding="same", groups=width)
        self.wide = MutableConv2d(width, 8, 1)
        self.layer = LayerChoice(
            {"conv": nn.Conv2d(8, 8, 1), "nested": LayerChoice([nn.Identity(), nn.Dropout(0.5)], label="inner")},
            label="layer",
        )
        self.inputs = InputChoice(3, n_chosen=2, reduction="mean", label="inputs")
        self.blocks = Repeat(
            lambda index: nn.Sequential(
                MutableConv2d(8, 8, nni.choice(f"k{index}", [1, 3]), padding="same"), nn.ReLU()
            ),
            (0, 2),
            label="depth",
        )
        features = nni.choice("features", [6, 12])
        self.project = MutableLinear(8, features)
        self.layer_norm = MutableLayerNorm(features)
        self.classifier = MutableLinear(features, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.wide(x + self.grouped(x) + self.depthwise(x))
        x = self.inputs([x, self.layer(x), self.blocks(x)])
        return self.classifier(self.layer_norm(self.project(x.mean((2, 3)))))


SPACES: dict[str, tuple[Callable[[], ModelSpace], int, str]] = {
    "Everything": (Everything, 16, "angle+flatness"),
    "NasBench201": (lambda: NasBench201(4, 1, 10), 16, "accuracy+flatness"),
    "DARTS": (lambda: DARTS(width=4, num_cells=3, drop_path_prob=0.2), 16, "angle+flatness"),
    "ENAS": (lambda: ENAS(width=4, num_cells=3), 16, "flatness"),
    "MobileNetV3Space": (lambda: MobileNetV3Space(10, **MOBILE), 32, "angle+accuracy"),
    "AutoFormer": (
        lambda: AutoFormer((8, 16), (2.0, 3.0), (1, 2), (1, 2), img_size=16, patch_size=8, num_labels=10),
        16,
        "angle+flatness",
    ),
}
# Seconds each: more of what the others are.
MORE: dict[str, tuple[Callable[[], ModelSpace], int, str]] = {
    "ProxylessNAS": (lambda: ProxylessNAS(10, base_widths=(8,) * 9), 32, "angle"),
    "ShuffleNetSpace": (lambda: ShuffleNetSpace(10, channel_search=True), 32, "accuracy"),
    "NASNet": (lambda: NASNet(width=4, num_cells=3), 16, "angle+flatness"),
    "AmoebaNet": (lambda: AmoebaNet(width=4, num_cells=3), 16, "angle+accuracy"),
    "PNAS": (lambda: PNAS(width=4, num_cells=3), 16, "accuracy+flatness"),
    # Stages of one cell and of two: where the supernet has a layer that NNI's fixed network does not.
    "DARTS, widths and depths": (lambda: DARTS(width=(4, 8), num_cells=(3, 4, 6)), 16, "angle+flatness"),
}
EVERY = [*SPACES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def searched(space: ModelSpace, size: int, metric: str, folder: Path, **settings: Any) -> GeNAS:
    """A strategy at the end of a search on images of handwritten digits."""
    strategy = GeNAS(metric=metric, **{**SMALL, **settings})
    evaluator = supernet_evaluator(
        load_search_data(**IMAGES, image_size=size),
        epochs=1,
        batch_size=32,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    return strategy


def record_of(strategy: GeNAS, model: Any) -> Any:
    """What the search has measured of a model; records are plain data, without tuples."""
    sample = json.loads(json.dumps(model.sample))
    (record,) = (record for record in strategy.records if record["candidate"] == sample)
    return record


@pytest.mark.parametrize("name", EVERY)
def test_a_search_ends_in_models_that_compute_what_the_supernet_does(name: str, tmp_path: Path) -> None:
    build, size, metric = (SPACES | MORE)[name]
    torch.manual_seed(0)
    strategy = searched(build(), size, metric, tmp_path)
    assert [record["status"] for record in strategy.records] == ["ok"] * 4
    assert all(math.isfinite(record["score"]) for record in strategy.records)
    validation = strategy.scorer.validation
    images, labels = next(iter(validation))
    kept = {key: value.clone() for key, value in strategy.supernet.state_dict().items()}
    supernet = strategy.supernet.eval()
    models = list(strategy.list_models(limit=2))
    assert len(models) == 2
    for model in models:
        state = torch.get_rng_state()
        network = model.executable_model().eval()
        assert torch.equal(state, torch.get_rng_state())
        fix_path(supernet.modules(), model.sample)
        with torch.no_grad():
            logits = supernet(images)
            torch.testing.assert_close(network(images), logits, rtol=0, atol=1e-6)
        assert logits.std() > 0

        # With statistics of its own it is what the search has scored.
        record = record_of(strategy, model)
        recalibrate_batchnorm(network, strategy.scorer.recalibration)
        if "top1" in record:
            with torch.no_grad():
                hits = [(network.eval()(x).argmax(1) == y).float() for x, y in validation]
            assert torch.cat(hits).mean().item() == pytest.approx(record["top1"])

        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        F.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
        moved = [not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)]
        # Weights behind an operation that is zero have no gradient.
        assert sum(moved) > len(moved) / 2
    assert all(torch.equal(value, kept[key]) for key, value in supernet.state_dict().items())


class Own(ModelSpace):
    """A layer of the test's, and a choice beside it."""

    layer: ClassVar[Callable[[], nn.Module]]

    def __init__(self) -> None:
        super().__init__()
        self.layer = type(self).layer()
        self.choice = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)], label="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x).mean((2, 3))


def own(layer: Callable[[], nn.Module]) -> Callable[[], ModelSpace]:
    return type("Own", (Own,), {"layer": staticmethod(layer)})


class Dangling(MutableModule):
    def __init__(self) -> None:
        super().__init__()
        self.add_mutable(nni.choice("dangling", [1, 2]))


class AtTheRoot(Own):
    layer = nn.Identity

    def __init__(self) -> None:
        super().__init__()
        self.scale = nni.choice("scale", [1, 2])
        self.add_mutable(self.scale)


class TwoInputs(Own):
    layer = nn.Identity

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class NoChoice(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)))


def small_nasbench101() -> ModelSpace:
    return NasBench101(8, num_stacks=1, num_modules_per_stack=1)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (small_nasbench101, "NasBench101 cannot be turned into a weight-sharing supernet.*has dangling mutables"),
        (own(Dangling), "Own cannot be turned .* Module `layer` of type `Dangling` has dangling mutables"),
        (own(lambda: MutableConvTranspose2d(3, 4, nni.choice("k", [1, 3]))), "`MutableConvTranspose2d` has dangling"),
        (own(lambda: InputChoice(3, n_chosen=2, reduction="none", label="i")), "choice of sum/mean/concat reduction"),
        (own(lambda: InputChoice(3, n_chosen=None, label="i")), "n_chosen is None is not supported"),
        (own(lambda: MutableBatchNorm2d(4, eps=nni.uniform("eps", 0.0, 1.0))), "not a categorical distribution"),
        (own(lambda: MutableLayerNorm(nni.choice("s", [(4,), (4, 4)]))), r"as many dimensions each, got \[\(4,\), \(4"),
        (own(lambda: MutableMultiheadAttention(4, 2, kdim=nni.choice("k", [2, 4]))), "attention layer has a choice of"),
        (AtTheRoot, "AtTheRoot adds choices to itself .* no layer of its supernet follows.*: scale"),
        (TwoInputs, r"TwoInputs.forward takes \(x.*, mask.*\).*, and candidates are measured on images alone"),
        (NoChoice, "NoChoice has no choices left to search"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(build: Callable[[], ModelSpace], sentence: str) -> None:
    with warnings.catch_warnings(), pytest.raises((TypeError, ValueError), match=sentence):
        warnings.simplefilter("ignore")
        GeNAS().mutate_model(build())


def test_an_unmutated_space_is_scored_with_a_checkpoint_of_its_supernet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {**IMAGES, "image_size": 16, "validation_images": 32}
    images = load_search_data(**data)
    # The images of a loader of training images are augmented.
    plain = TensorBatches(images.recalibration, 32, images.mean, images.std)
    strategy = searched(Everything(), 16, "angle+flatness", tmp_path, recalibration_batches=plain)
    torch.save(strategy.supernet.state_dict(), tmp_path / "supernet.pt")
    torch.save(strategy.supernet.state_dict() | strategy.paths.initial, tmp_path / "initial.pt")
    space = Everything()
    common = {"data": data, "space": space, "device": "cpu", "batch_size": 32}
    best = next(strategy.list_models(limit=1))
    record = record_of(strategy, best)
    measured = FlatnessEvaluator(tmp_path / "supernet.pt", **common).measure(best.sample)
    assert measured.score == pytest.approx(record["flatness"], rel=1e-5)
    assert not any(hasattr(module, "_sampled") for module in space.modules())
    combined = CombinedEvaluator(tmp_path / "supernet.pt", "angle", **common, initial=tmp_path / "initial.pt")
    assert combined.measure(best.sample).score == pytest.approx(record["angle"])


def test_a_budget_holds_in_a_space_of_somebodys_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = GeNAS().mutate_model(Everything())
    samples = SampleSpace(space)
    rng = np.random.default_rng(0)
    drawn = [samples.to_sample(samples.sample(rng)) for _ in range(40)]
    sizes = sorted(sum(p.numel() for p in fixed_network(space, sample).parameters()) for sample in drawn)
    most = sizes[len(sizes) // 2]
    assert sizes[0] < most < sizes[-1]
    strategy = searched(Everything(), 16, "flatness", tmp_path, constraints={"params": (None, most)}, population=6)
    assert len(strategy.records) == 6
    for model in strategy.list_models():
        network = model.executable_model()
        assert sum(parameter.numel() for parameter in network.parameters()) <= most
