"""Which images a loss is the mean of, and other losses than cross-entropy, against PyTorch's of the images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genas_plugins.correlation import Setting, measure_raw
from genas_plugins.datasets import ImageTensors
from genas_plugins.scoring import CombinedScore, accuracy, flatness, mean_loss, top_eigenvectors
from genas_plugins.scoring.data import TensorBatches
from genas_plugins.scoring.flatness import perturbed_image_losses, perturbed_losses

SIGMAS = (0.01, 0.03, 0.06)


def network(outputs: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, outputs))


def images_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 3, 4, 4, generator=generator), torch.randint(6, (20,), generator=generator)


def marked(label: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Batches in which every third image has a label that stands for none, and those of the others alone."""
    images, labels = images_and_labels()
    labels[::3] = label
    known = labels != label
    whole = list(zip(images.split(8), labels.split(8), strict=True))
    return whole, list(zip(images[known].split(8), labels[known].split(8), strict=True))


MEASURES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "mean loss": mean_loss,
    "flatness": lambda model, batches: list(flatness(model, batches, SIGMAS).losses),
    "accuracy": lambda model, batches: [accuracy(model, batches).top1, accuracy(model, batches).top5],
    "image losses": lambda model, batches: perturbed_image_losses(model, batches, SIGMAS)[0].flatten().tolist(),
    "eigenvalue": lambda model, batches: top_eigenvectors(model, batches).values[0],
    "raw": lambda model, batches: [
        measure_raw(model, [Setting(name="a", score=CombinedScore(metric="accuracy"))], batches)["statistics"][
            "cumulative"
        ][name]
        for name in ("loss", "top1", "top5")
    ],
}


@pytest.mark.parametrize("label", [-100, 255])
@pytest.mark.parametrize("name", MEASURES)
def test_images_without_a_label_do_not_count(name: str, label: int) -> None:
    whole, known = marked(label)
    assert MEASURES[name](network(), whole) == pytest.approx(MEASURES[name](network(), known), abs=1e-6)


def test_a_class_of_the_number_255_counts() -> None:
    images, labels = images_and_labels()
    labels[::3] = 255
    model = network(300)
    expected = F.cross_entropy(model(images), labels).item()
    assert mean_loss(model, [(images, labels)]) == pytest.approx(expected, abs=1e-6)


def test_a_loss_that_is_asked_for_gets_all_labels() -> None:
    whole, _ = marked(-100)
    model = network()
    # PyTorch's own gives 0 for what it ignores.
    total = sum(F.cross_entropy(model(images), labels, reduction="sum").item() for images, labels in whole)
    assert mean_loss(model, whole, F.cross_entropy) == pytest.approx(total / 20, abs=1e-6)


@pytest.mark.parametrize("measure", [mean_loss, accuracy, top_eigenvectors], ids=["loss", "accuracy", "Hessian"])
def test_without_any_label_there_is_no_mean(measure: Callable[..., Any]) -> None:
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match="No image has a label: -100 and 255"):
        measure(network(), [(images, torch.full_like(labels, -100))])


@pytest.mark.parametrize("measure", [mean_loss, accuracy, top_eigenvectors], ids=["loss", "accuracy", "Hessian"])
def test_labels_of_other_classes_are_refused(measure: Callable[..., Any]) -> None:
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match=f"{int((labels == 5).sum())} images have a label that is no class"):
        measure(network(5), [(images, labels)])


def test_tensor_batches_of_other_classes_are_refused_with_both_numbers() -> None:
    pixels = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    data = ImageTensors(pixels, torch.arange(6), tuple("abcdef"))
    batches = TensorBatches(data, 4, (0.5,) * 3, (0.25,) * 3)
    for measure in (mean_loss, accuracy):
        with pytest.raises(ValueError, match=r"label 5 \(of 6 classes\), and the network has 5"):
            measure(network(5), batches)


def binary(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return F.binary_cross_entropy_with_logits(model(images), labels).item()


@pytest.mark.parametrize("form", ["function", "module", "rows", "mean"])
def test_another_loss_is_its_mean_over_all_images(form: str) -> None:
    images, _ = images_and_labels()
    labels = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)).round()
    loss: Any = {
        "function": F.binary_cross_entropy_with_logits,
        "module": nn.BCEWithLogitsLoss(),
        "rows": lambda outputs, wanted: F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1),
        "mean": lambda outputs, wanted: F.binary_cross_entropy_with_logits(outputs, wanted),
    }[form]
    # Batches of 8, 8 and 4: a mean of their means would be another number.
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    expected = binary(network(), images, labels)
    assert mean_loss(network(), batches, loss) == pytest.approx(expected, abs=1e-6)
    noisy = perturbed_losses(network(), batches, (1e-7, 2e-7), loss=loss)[0]
    assert noisy == pytest.approx([expected, expected], abs=1e-4)
    if form == "module":
        assert loss.reduction == "mean"


def test_a_loss_of_each_image_is_needed_where_images_are_counted() -> None:
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match="one number an image is needed"):
        perturbed_image_losses(network(), [(images, labels)], SIGMAS, loss=lambda a, b: F.cross_entropy(a, b))


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (6, torch.rand(20, 6), r"labels \(20, 6\) of float32: pass the loss that is meant as loss="),
        (6, torch.rand(20), r"labels \(20,\) of float32"),
        (1, torch.zeros(20, dtype=torch.int64), "the network has 1 output, for which it is 0"),
    ],
)
def test_what_is_no_classification_is_refused(outputs: int, labels: Tensor, message: str) -> None:
    images, _ = images_and_labels()
    for measure in (mean_loss, accuracy):
        with pytest.raises(ValueError, match=message):
            measure(network(outputs), [(images, labels)])


def test_what_is_no_loss_is_refused() -> None:
    images, labels = images_and_labels()
    with pytest.raises(TypeError, match="loss must be a function"):
        mean_loss(network(), [(images, labels)], "mse")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="The loss must be a tensor, got float"):
        mean_loss(network(), [(images, labels)], lambda outputs, wanted: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="gives 3 numbers for 20 images"):
        mean_loss(network(), [(images, labels)], lambda outputs, wanted: outputs[:3, 0])
