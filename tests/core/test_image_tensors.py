"""Images in memory: what the container accepts, its statistics, and resizing as torchvision does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genas_plugins.datasets import ImageTensors
from genas_plugins.datasets._tensors import channel_statistics, resized

torchvision = pytest.importorskip("torchvision", reason="torchvision is what these tests compare with")


def tensors(count: int = 12, classes: int = 3, size: int = 4) -> ImageTensors:
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    names = tuple(f"c{index}" for index in range(classes))
    return ImageTensors(images, torch.arange(count) % classes, names)


def test_subset_keeps_the_order_that_was_asked_for():
    data = tensors()
    part = data.subset([7, 0, 3])
    assert len(part) == 3 and part.labels.tolist() == [1, 0, 0]
    assert torch.equal(part.images, data.images[[7, 0, 3]])
    with pytest.raises(IndexError):
        data.subset([12])


def test_random_labels_are_uniform_seeded_and_leave_the_images_alone():
    data = ImageTensors(torch.zeros(6000, 3, 1, 1, dtype=torch.uint8), torch.zeros(6000).long(), ("a", "b", "c"))
    before = torch.random.get_rng_state()
    first, again, other = data.random_labels(1), data.random_labels(1), data.random_labels(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.images is data.images and not data.labels.any()
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    # Chi-square with two degrees of freedom exceeds 13.8 once in a thousand seeds.
    counts = torch.bincount(first.labels, minlength=3).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 13.8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, TypeError, "uint8.*float32"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, TypeError, "ndarray"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, TypeError, "int64.*int32"),
        ({"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, ValueError, r"\(2, 1, 4, 4\)"),
        ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, ValueError, r"\(0, 3, 4, 4\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(2,\).*\(3,\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "one device.*meta"),
        ({"labels": torch.tensor([0, 2])}, ValueError, r"0\.\.1.*0\.\.2"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"-1\.\.0"),
    ],
)
def test_bad_tensors_are_refused(change, error, message):
    good = {
        "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
        "class_names": ("a", "b"),
    }
    with pytest.raises(error, match=message):
        ImageTensors(**{**good, **change})


def test_statistics_match_numpy():
    images = tensors(2500, size=5).images
    mean, std = channel_statistics(images)
    scaled = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_a_constant_channel_gets_a_deviation_of_one():
    images = tensors().images
    images[:, 1] = 51
    mean, std = channel_statistics(images)
    assert mean[1] == pytest.approx(0.2) and std[1] == 1.0 and std[0] < 0.5


def test_resizing_matches_torchvision():
    data = tensors(5, size=9)
    expected = torchvision.transforms.functional.resize(data.images, [4, 4], antialias=True)
    assert torch.equal(resized(data, 4).images, expected)
    assert resized(data, 9) is data and resized(data, None) is data
