"""Each shipped configuration is the paper's recipe, for the launcher and, as near as it comes, for timm's train.py."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.optim import create_optimizer_v2, optimizer_kwargs

import timm_models
from genas_plugins.darts.zoo import OFFICIAL, ZOO
from genas_plugins.files import packaged_configs
from timm_models.settings import Settings, from_options, read_config
from timm_models.train import main
from timm_models.training import Trainer, processes

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "timm").glob("*.yaml"))
IMAGENET = [path for path in CONFIGS if path.stem.endswith("_imagenet")]

# Options of timm's train.py and what their values are; the script is in timm's repository and not in its package.
TIMM_OPTIONS: dict[str, type] = {
    **dict.fromkeys(("model", "opt", "sched", "train_interpolation", "interpolation"), str),
    **dict.fromkeys(("num_classes", "img_size", "batch_size", "epochs", "warmup_epochs", "cooldown_epochs"), int),
    **dict.fromkeys(("workers", "seed"), int),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "clip_grad", "decay_rate", "warmup_lr", "min_lr"), float),
    **dict.fromkeys(("smoothing", "hflip", "color_jitter", "crop_pct"), float),
    **dict.fromkeys(("scale", "ratio", "mean", "std"), list),
    **dict.fromkeys(("opt_kwargs", "model_kwargs"), dict),
    **dict.fromkeys(("channels_last",), bool),
}

# Tables 2 and 3 of the paper: top-1 and top-5, where there is one, of the network of each file.
PAPER = {
    "genas_angle_c10": ("75.70", "92.45"),
    "genas_flatness_c10": ("75.95", "92.74"),
    "genas_angle_flatness_c10": ("76.06", "92.77"),
    "genas_angle_c100": ("75.00", "92.31"),
    "genas_flatness_c100": ("76.05", "92.64"),
    "genas_angle_flatness_c100": ("75.72", "92.46"),
    "rlnas_c10": ("75.7", "92.5"),
    "shapley_c10": ("75.7", None),
    "fairdarts_b_c10": ("75.1", "92.5"),
}


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", paths, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Finds a folder of images of so many classes, all the same image."""
    image = tmp_path_factory.mktemp("image") / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    content, made = image.read_bytes(), {}

    def find(classes: int) -> Path:
        if classes not in made:
            made[classes] = tmp_path_factory.mktemp("images")
            for split, count in (("train", max(1, 200 // classes)), ("val", 1)):
                for number in range(classes):
                    folder = made[classes] / split / f"n{number:04d}"
                    folder.mkdir(parents=True)
                    for image in range(count):
                        (folder / f"{image}.png").write_bytes(content)
        return made[classes]

    return find


@pytest.fixture(scope="module")
def trainer_of(folder_of: Callable[[int], Path]) -> Iterator[Callable[[Path], Trainer]]:
    """Builds what a configuration describes, with what cannot be had here replaced: images, device, workers.

    A batch to validate on is small, as its images are read.
    """

    @cache
    def build(config: Path) -> Trainer:
        keys = read_config(config)
        folder = str(folder_of(keys["num_classes"]))
        here_alone = {"data_dir": folder, "device": "cpu", "workers": 0, "validation_batch_size": 8}
        return Trainer(from_options(here_alone, keys), here)

    with processes("cpu") as here:
        yield build


def test_there_is_one_for_each_published_network() -> None:
    # All those of the paper whose genotype the authors publish with a checkpoint, and those of others' repositories
    # of which the paper has a figure.
    published = {name for name in ZOO if name.startswith("genas_")}
    published |= {name for name, entry in ZOO.items() if entry.source != OFFICIAL and "top1" in entry.paper}
    assert {path.stem.removesuffix("_imagenet") for path in IMAGENET} == published
    # Those of the package, which may be installed elsewhere, are these.
    packaged = {name: path.read_text() for name, path in packaged_configs("timm").items()}
    assert packaged == {path.stem: path.read_text() for path in CONFIGS}


@each(CONFIGS)
def test_the_launcher_takes_it_by_name(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # It gets as far as the images.
    assert main(["--config", config.stem, "--data-dir", "/nowhere", "--device", "cpu"]) == 1
    assert "/nowhere" in capsys.readouterr().err


@each(CONFIGS)
def test_timms_script_knows_every_key(config: Path) -> None:
    keys = yaml.safe_load(config.read_text())
    section = keys.pop("genas")
    assert set(section) <= set(Settings.__dataclass_fields__)
    # The script takes the values as YAML has them, unchecked: 3e-5 without a point would be text.
    assert {name: type(value) for name, value in keys.items()} == {name: TIMM_OPTIONS.get(name) for name in keys}
    assert all(isinstance(x, float) for name in ("scale", "ratio", "mean", "std") for x in keys.get(name, []))


@each(CONFIGS)
def test_it_trains_the_network_that_it_names(config: Path, trainer_of: Callable[[Path], Trainer]) -> None:
    trainer = trainer_of(config)
    settings = trainer.settings
    assert isinstance(trainer.model, timm_models.GenasNet)
    assert (trainer.model.auxiliary_head is not None) == (settings.auxiliary_weight > 0)
    assert len(trainer.loader) > 0 and trainer.epochs == settings.epochs
    assert trainer.passes * settings.batch_size == (settings.global_batch_size or settings.batch_size)
    assert trainer.model.classifier.out_features == settings.num_classes
    images, classes = next(iter(trainer.validation_loader))
    size = settings.img_size or 224
    assert images.shape[1:] == (3, size, size) and len(images) == len(classes)


@each(IMAGENET)
def test_its_name_and_its_figures(config: Path) -> None:
    name = config.stem.removesuffix("_imagenet")
    text = config.read_text()
    assert read_config(config)["model"] == name
    top1, top5 = re.search(r"top-1 ([\d.]+) %(?:, top-5 ([\d.]+) %)?\)", text).groups()
    assert (top1, top5) == PAPER[name]
    commands = [line for line in text.splitlines() if "torchrun" in line]
    assert len(commands) == 2 and all(f" --config {config.stem}" in line for line in commands)


@each(IMAGENET)
def test_it_is_the_recipe_of_the_paper(config: Path, trainer_of: Callable[[Path], Trainer]) -> None:
    trainer = trainer_of(config)
    settings = trainer.settings
    assert trainer.model.num_classes == 1000
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) > ZOO[settings.model].params

    # A batch of 1,024 on 8 processes, as in the paper, and on any other number that can make it.
    assert settings.accumulation(8) * 8 * settings.batch_size == 1024
    for count in (1, 2, 4, 8):
        assert settings.accumulation(count) * count * settings.batch_size == 1024
    assert trainer.epochs == 250

    (group,) = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is torch.optim.SGD
    assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.9, 0, False)
    assert group["weight_decay"] == 3e-5
    assert trainer.scheduler.base_values == [0.5]
    # All of them are decayed, those of batch normalisation and the biases too, and those of the auxiliary head.
    assert {id(parameter) for parameter in group["params"]} == {id(each) for each in trainer.model.parameters()}
    assert any(parameter.dim() == 1 for parameter in group["params"])

    assert trainer.task.auxiliary_weight == 0.4
    assert trainer.task.criterion.smoothing == pytest.approx(0.1)
    assert (settings.clip_grad, settings.clip_mode) == (5.0, "norm")
    assert settings.drop_path == 0 and trainer.model.drop_path_prob == 0 and settings.drop == 0
    assert not settings.model_ema and not settings.amp and settings.aa == "" and settings.reprob == 0

    # Pixels from 0 to 1 and no more; the loaders hold mean and deviation for pixels from 0 to 255.
    for loader in (trainer.loader, trainer.validation_loader):
        assert loader.mean.flatten().tolist() == [0.0] * 3
        assert loader.std.flatten().tolist() == [255.0] * 3


@each(IMAGENET)
def test_its_augmentation(config: Path, trainer_of: Callable[[Path], Trainer]) -> None:
    trainer = trainer_of(config)
    crop, lighting, flip, *rest = trainer.loader.dataset.transform.transforms
    assert type(crop).__name__ == "RandomResizedCropAndInterpolation"
    assert (tuple(crop.size), tuple(crop.scale), tuple(crop.ratio)) == ((224, 224), (0.08, 1.0), (1.0, 1.0))
    assert "bilinear" in str(crop)
    assert (type(lighting).__name__, lighting.std) == ("Lighting", 0.1)
    assert (type(flip).__name__, flip.p) == ("RandomHorizontalFlip", 0.5)
    # Nothing else changes the image: what follows makes a tensor of it, perhaps after a jitter of strength 0.
    *jitters, tensor = rest
    assert type(tensor).__name__ == "MaybePILToTensor"
    for jitter in jitters:
        assert type(jitter).__name__ == "ColorJitter"
        assert all(value is None for value in (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    resize, centre, *_ = trainer.validation_loader.dataset.transform.transforms
    assert (resize.size, "bilinear" in str(resize), tuple(centre.size)) == (256, True, (224, 224))


@each(IMAGENET)
def test_what_timms_script_optimizes_with(config: Path) -> None:
    keys = yaml.safe_load(config.read_text())
    with torch.device("meta"):
        model = timm.create_model(keys["model"], num_classes=keys["num_classes"])
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(Namespace(**keys)), **keys["opt_kwargs"])
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, False)
    assert group["weight_decay"] == 3e-5


def changed(settings: Settings) -> dict[str, Any]:
    """What a configuration changes, without what belongs to one network."""
    default = Settings()
    names = set(Settings.__dataclass_fields__) - {"model"}
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(default, name)}


def test_they_differ_in_the_network_only() -> None:
    first, *others = [changed(from_options({}, read_config(path))) for path in IMAGENET]
    assert all(other == first for other in others)
