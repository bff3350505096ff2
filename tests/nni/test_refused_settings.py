"""What no training and no search can use is refused when it is read, and not after an hour."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genas_plugins.datasets import ImageTensors
from genas_plugins.experiment.config import ConfigError, load
from genas_plugins.scoring import CombinedScore
from genas_plugins.search import Evolution, InFlight
from genas_plugins.spaces import DartsSearchSpace
from nni_strategy import CombinedEvaluator, GeNAS
from nni_strategy.training import SupernetModule, TrainBatches, supernet_evaluator

IMAGES = ImageTensors(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"))
THREE = (0.5, 0.5, 0.5)
# At the edges of what searches use.
USED = (
    "seed=9223372036854775807",
    "training.gradient_clip=0",
    "training.momentum=0",
    "training.weight_decay=0",
    "training.learning_rate=1",
    "training.learning_rate=5e-2",
    "training.devices=auto",
    "training.devices=8",
    "training.threads=16",
    "training.accelerator=gpu",
    "training.num_workers=64",
    "training.batch_size=1",
    "data.crop_padding=0",
    "score.alpha=0",
    "score.alpha=16",
    "score.gamma=1024",
    "score.sigmas=[1e-6, 5e-6, 1e-5]",
    "score.sigmas=[1, 2]",
    "score.recalibration_images=0",
    "score.batch_size=1",
    "search.population=1000",
    "search.generations=1000",
    "search.in_flight=64",
    "search.in_flight=null",
    "search.mutants=0",
    "space.init_channels=128",
    "space.num_cells=20",
)


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=.inf",
        'training.learning_rate="٣"',
        "training.momentum=.nan",
        "training.momentum=-1",
        "training.momentum=1.5",
        "training.weight_decay=-1",
        "training.weight_decay=.nan",
        "training.gradient_clip=.nan",
        "training.gradient_clip=-1",
        "training.num_workers=-1",
        "training.devices=0",
        "data.crop_padding=-1",
        "score.alpha=.inf",
        "score.gamma=.inf",
        "score.batch_size=0",
        "score.sigmas=[1e300,1e308]",
        'score.sigmas=["0.1","0.2"]',
        "search.population=1000000000000",
        "search.in_flight=1000000000",
        "seed=18446744073709551616",
        "space.num_cells=1000000000",
        # Of the same kinds.
        "seed=-1",
        "seed=9223372036854775808",
        "training.accelerator=gpuu",
        "training.devices=-2",
        "training.threads=0",
        "training.learning_rate=1e30",
        'training.learning_rate="0.1"',
        'training.learning_rate=" 1e-3 "',
        "training.momentum=1",
        "training.epochs=1000000000000000",
        "training.batch_size=1000000000000",
        "training.weight_decay=.inf",
        "training.num_workers=100000000",
        "data.image_size=-3",
        "data.validation_images=0",
        "data.crop_padding=1000000000",
        "score.draws=1000000000000",
        "score.hessian_directions=1000000000",
        "score.gamma_accuracy=.inf",
        "score.recalibration_images=99999999999999999999",
        "score.recalibration_momentum=.nan",
        "score.sigmas=[1e-320,1e-310]",
        "score.sigmas=[0.1,0.10000000000000002]",
        "search.mutation_probability=.nan",
        "search.generations=1000000000000",
        "search.parents=" + "9" * 400,
        "space.init_channels=1000000000000",
        "search={population: 60, generations: 2, population: 70}",
    ],
)
def test_a_file_that_says_so_is_refused_when_it_is_read(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("quickstart_digits", [override])
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    # The setting is named.
    assert override.partition("=")[0].split(".")[-1].removeprefix("recalibration_") in message


@pytest.mark.parametrize("override", USED)
def test_what_searches_use_is_taken(override: str) -> None:
    load("quickstart_digits", [override])


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}\n", "---\n"])
def test_an_empty_configuration_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    for overrides in ([], ["seed=1"]):
        with pytest.raises(ConfigError, match=r"mine\.yaml must hold keys and values, got (None|\{\})"):
            load(tmp_path / "mine.yaml", overrides)


def evolution(**settings: Any) -> Evolution:
    return Evolution(DartsSearchSpace(), **settings)


def batches(batch_size: Any = 4, mean: Any = THREE, std: Any = THREE, **settings: Any) -> TrainBatches:
    return TrainBatches(IMAGES, batch_size, mean, std, **settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (GeNAS, {"alpha": math.inf}),
        (GeNAS, {"device": "cudaa"}),
        (GeNAS, {"seed": 2**64}),
        (GeNAS, {"recalibration_images": 8.5}),
        (GeNAS, {"validation_images": math.nan}),
        (GeNAS, {"in_flight": 10**9}),
        (GeNAS, {"in_flight": 2.5}),
        (GeNAS, {"population": 10**12}),
        (evolution, {"population": 50.5}),
        (evolution, {"mutation_probability": True}),
        (evolution, {"max_tries": math.nan}),
        (evolution, {"seed": 1.5}),
        (CombinedScore, {"draws": 1.5}),
        (CombinedScore, {"sigmas": ("0.1", "0.2")}),
        (CombinedScore, {"relative": "no"}),
        (CombinedScore, {"gamma": math.inf}),
        (CombinedScore, {"gamma": "16"}),
        (batches, {"crop_padding": -1}),
        (batches, {"std": (0.0, 1.0, 1.0)}),
        (batches, {"mean": (math.nan, 0.0, 0.0)}),
        (batches, {"num_workers": -1}),
        (batches, {"batch_size": 2.5}),
        (batches, {"seed": -1}),
        (SupernetModule, {"epochs": 0}),
        (SupernetModule, {"epochs": 1, "learning_rate": math.inf}),
        (SupernetModule, {"epochs": 1, "momentum": 1.5}),
        (SupernetModule, {"epochs": 1, "weight_decay": -1.0}),
        (InFlight, {"count": 10**9}),
        (InFlight, {"count": "2"}),
        (InFlight, {"threads": 0}),
    ],
)
def test_python_refuses_it_too(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        make(**settings)
    name = next(reversed(settings))
    assert {"count": "in_flight"}.get(name, name) in str(raised.value)


@pytest.mark.parametrize("gradient_clip", [math.nan, -1.0])
def test_a_gradient_that_cannot_be_clipped(gradient_clip: float) -> None:
    with pytest.raises(ValueError, match=r"gradient_clip must be at least 0, got (nan|-1\.0)"):
        supernet_evaluator(None, 1, gradient_clip=gradient_clip)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 2**33, 2**63 - 1])
def test_batches_have_an_order_for_every_seed(seed: int) -> None:
    (images, labels), *_ = batches(seed=seed, batch_size=8)
    assert images.shape == (8, 3, 8, 8) and sorted(labels.tolist()) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"name": "digits"}}, "has its own data"),
        ({"batch_size": 8}, "has its own batch_size"),
        ({"device": "cudaa"}, "device must be cpu, cuda"),
        ({"seed": -1}, "seed must not be negative"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_an_evaluator_of_a_run_folder(settings: dict[str, Any], words: str, finished: Any) -> None:
    with pytest.raises(ValueError, match=words):
        CombinedEvaluator(finished.path, **settings)


def test_an_evaluator_of_a_checkpoint(finished: Any, tmp_path: Path) -> None:
    checkpoint = finished.path / "supernet.ckpt"
    for data in ({"nmae": "digits"}, {"name": "digits", "rot": "x"}, ["digits"]):
        with pytest.raises(TypeError, match="data holds a name and any of root, download, image_size"):
            CombinedEvaluator(checkpoint, data=data)
    with pytest.raises(FileNotFoundError, match="weights before training"):
        CombinedEvaluator(checkpoint, data={"name": "digits"}, initial=tmp_path / "nothing")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CombinedEvaluator(checkpoint, data={"name": "digits"}, batch_size=0)


def test_what_lightning_refuses_while_it_trains_is_one_sentence(genas: Any, tmp_path: Path) -> None:
    # A setting that Lightning looks at only then, in place of one that we forgot.
    before = "import nni_strategy.run as run\nkept = run.supernet_evaluator\n"
    before += "run.supernet_evaluator = lambda *a, **k: kept(*a, **{**k, 'gradient_clip_algorithm': 'value'})\n"
    before += (
        "import pytorch_lightning as pl\nfrom pytorch_lightning.utilities.exceptions import MisconfigurationException"
    )
    before += "\ndef refuse(self, *a, **k): raise MisconfigurationException('not\\nthis')\n"
    before += "pl.LightningModule.configure_gradient_clipping = refuse\n"
    refused = genas.search(tmp_path / "run", before=before).wait()
    assert refused.error == "training: not this"
