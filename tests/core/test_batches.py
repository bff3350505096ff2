"""Device-resident batches: exact normalisation, every image once, limits that share memory."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from genas_plugins.datasets import ImageTensors
from genas_plugins.scoring import accuracy, flatness, mean_loss, recalibrate_batchnorm
from genas_plugins.scoring.data import SMALLEST_BATCH, TensorBatches, over_batches, sum_over_batches
from genas_plugins.scoring.flatness import perturbed_image_losses, perturbed_losses

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def data() -> ImageTensors:
    """Images in which every channel takes each of the 256 values."""
    rng = np.random.default_rng(0)
    images = np.stack([rng.permutation(np.repeat(np.arange(256), 7)) for _ in range(3)]).astype(np.uint8)
    images = images.reshape(3, 28, 8, 8).transpose(1, 0, 2, 3)
    return ImageTensors(torch.from_numpy(images.copy()), torch.arange(28) % 5, tuple("abcde"))


def normalised(data: ImageTensors) -> np.ndarray:
    mean, std = (np.array(row).reshape(1, 3, 1, 1) for row in (MEAN, STD))
    return (data.images.numpy().astype(np.float64) / 255 - mean) / std


def joined(batches: TensorBatches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # Values reach 2.6 in size: a few units in the last place of float32 and float64.
        (torch.float32, 5e-7),
        (torch.float64, 1e-14),
        # Half a unit in the last place of a value between 2 and 4.
        (torch.float16, 2**-10 + 1e-6),
        (torch.bfloat16, 2**-7 + 1e-6),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_normalisation_is_exact_to_the_dtype(data, dtype, tolerance, channels_last):
    batches = TensorBatches(data, 10, MEAN, STD, dtype=dtype, channels_last=channels_last)
    images = joined(batches)
    assert images.dtype == dtype
    np.testing.assert_allclose(images.double().numpy(), normalised(data), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10, 10, 8]), (14, [14, 14]), (100, [28]), (1, [1] * 28)])
def test_every_image_comes_once_in_order_and_the_last_batch_may_be_smaller(data, batch_size, sizes):
    batches = TensorBatches(data, batch_size, MEAN, STD)
    assert len(batches) == len(sizes) and batches.num_images == 28
    for _ in range(2):
        seen = list(batches)
        assert [len(images) for images, _ in seen] == sizes
        assert torch.equal(torch.cat([labels for _, labels in seen]), data.labels)
        assert all(labels.dtype == torch.int64 for _, labels in seen)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_the_one_asked_for(data, channels_last):
    images, _ = next(iter(TensorBatches(data, 4, MEAN, STD, channels_last=channels_last)))
    assert images.shape == (4, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_a_batch_that_is_changed_does_not_change_the_data(data):
    batches = TensorBatches(data, 28, MEAN, STD)
    before = joined(batches)
    for images, _ in batches:
        images.zero_()
    assert torch.equal(joined(batches), before)


def test_limit_is_a_view_of_the_first_images(data):
    batches = TensorBatches(data, 10, MEAN, STD)
    view = batches.limit(13)
    assert (view.num_images, len(view), batches.num_images) == (13, 2, 28)
    assert torch.equal(joined(view), joined(batches)[:13])
    assert view._images.untyped_storage().data_ptr() == batches._images.untyped_storage().data_ptr()
    assert view._labels.untyped_storage().data_ptr() == batches._labels.untyped_storage().data_ptr()
    assert view.limit(5).num_images == 5


@pytest.mark.parametrize(("wanted", "message"), [(29, "28.*29"), (0, "28.*0")])
def test_a_limit_beyond_the_data_is_refused(data, wanted, message):
    with pytest.raises(ValueError, match=message):
        TensorBatches(data, 10, MEAN, STD).limit(wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size.*0"),
        ({"std": (0.2, 0.0, 0.2)}, ValueError, "std must be larger than 0"),
        ({"std": (0.2, 0.2)}, ValueError, "std must be three"),
        ({"mean": (0.5,)}, ValueError, "mean must be three"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "mean must be three finite"),
        ({"dtype": torch.uint8}, ValueError, "floating dtype.*uint8"),
        ({"data": [1, 2]}, TypeError, "ImageTensors.*list"),
    ],
)
def test_bad_arguments_are_refused(data, change, error, message):
    with pytest.raises(error, match=message):
        TensorBatches(**{"data": data, "batch_size": 4, "mean": MEAN, "std": STD, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_appear_on_the_device(data):
    batches = TensorBatches(data, 10, MEAN, STD, device="cuda")
    images, labels = next(iter(batches))
    assert images.is_cuda and labels.is_cuda
    np.testing.assert_allclose(joined(batches).double().cpu().numpy(), normalised(data), rtol=0, atol=5e-7)


class SmallMemory(nn.Module):
    """Has room for so many images. Logits are the mean of each colour, after batch normalisation, and a weight."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []
        self.norm = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(x)} images")
        return self.norm(x).mean((2, 3)) * self.weight


@pytest.fixture
def many() -> ImageTensors:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (150, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return ImageTensors(images, torch.arange(150) % 3, ("a", "b", "c"))


def test_batches_that_do_not_fit_are_halved_for_good_and_said_once(many, caplog):
    small, large = SmallMemory(room=40), SmallMemory(room=150)
    batches, whole = TensorBatches(many, 1000, MEAN, STD), TensorBatches(many, 150, MEAN, STD)
    with caplog.at_level(logging.WARNING):
        found = flatness(small, batches, (1e-2, 2e-2, 3e-2))
    # All images are 150, so that halves of 1,000 that are the same batch again are not tried.
    assert small.sizes == [150, 75, *[37, 37, 37, 37, 2] * 3]
    assert batches.batch_size == 37
    assert [record.getMessage() for record in caplog.records] == [
        "A batch of 150 images does not fit the memory; from now on it is 75.",
        "A batch of 75 images does not fit the memory; from now on it is 37.",
    ]
    # Neither the noise nor the first images are counted twice.
    expected = flatness(large, whole, (1e-2, 2e-2, 3e-2))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    caplog.clear()
    assert mean_loss(small, batches) == pytest.approx(mean_loss(large, whole), rel=1e-6)
    assert accuracy(small, batches) == accuracy(large, whole)
    assert max(small.sizes[2:]) == 37 and not caplog.records


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_a_library_without_memory_is_as_good_as_pytorch_without(many, words):
    batches = TensorBatches(many, 150, MEAN, STD)

    def measure(images, labels):
        if len(images) > 80:
            raise RuntimeError(words)
        return len(images)

    assert over_batches(batches, measure) == [75, 75]


def test_other_errors_are_not_taken_for_a_full_memory(many):
    def measure(images, labels):
        raise RuntimeError("CUDA error: device-side assert triggered")

    batches = TensorBatches(many, 150, MEAN, STD)
    with pytest.raises(RuntimeError, match="device-side assert"):
        over_batches(batches, measure)
    assert batches.batch_size == 150


def test_two_that_run_out_of_memory_together_halve_once(many, caplog):
    batches = TensorBatches(many, 128, MEAN, STD)
    meeting = threading.Barrier(2, timeout=30)

    def measure(images, labels):
        if len(images) > 64:
            meeting.wait()
            raise torch.OutOfMemoryError("no room for both")
        return len(images)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: over_batches(batches, measure), range(2))) == [[64, 64, 22]] * 2
    assert batches.batch_size == 64 and len(caplog.records) == 1


def test_losses_of_each_image_are_whole_where_the_memory_runs_out_between_two_sigmas(many):
    class Shrinking(SmallMemory):
        def forward(self, x):
            self.room = 200 if len(self.sizes) < 2 else 40
            return super().forward(x)

    model, batches = Shrinking(room=200), TensorBatches(many, 64, MEAN, STD)
    generator = torch.Generator().manual_seed(3)
    rows, sums = perturbed_image_losses(model, batches, (0.1, 0.2), generator=generator)
    assert batches.batch_size == 32 and sums.shape == (1, 2, len(batches))
    expected = perturbed_losses(
        SmallMemory(room=200), TensorBatches(many, 32, MEAN, STD), (0.1, 0.2), generator=generator.manual_seed(3)
    )
    assert (sums.sum(2) / len(many.labels)).tolist() == [pytest.approx(expected[0], rel=1e-12)]
    assert rows.mean(2).tolist() == [pytest.approx(expected[0], rel=1e-5)]


def test_a_part_of_the_images_shares_the_batch_size(many):
    batches = TensorBatches(many, 100, MEAN, STD)
    part = batches.limit(90)
    assert part.halve() and (part.batch_size, batches.batch_size) == (45, 45)
    assert batches.halve() and (part.batch_size, batches.batch_size) == (22, 22)
    assert [len(labels) for _, labels in part] == [22, 22, 22, 22, 2]


def test_what_does_not_fit_in_the_smallest_batch_is_an_error(many):
    model, batches = SmallMemory(room=SMALLEST_BATCH - 1), TensorBatches(many, 128, MEAN, STD)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError, match=f"no room for {SMALLEST_BATCH} images"):
        mean_loss(model, batches)
    assert model.sizes == [128, 64, 32, 16] and batches.batch_size == SMALLEST_BATCH
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_of_others_are_not_halved_nor_those_of_a_recalibration(many):
    model = SmallMemory(room=10)
    with pytest.raises(torch.OutOfMemoryError):
        sum_over_batches(list(TensorBatches(many, 64, MEAN, STD)), lambda x, _: model(x).sum())
    batches = TensorBatches(many, 64, MEAN, STD)
    with pytest.raises(torch.OutOfMemoryError):
        recalibrate_batchnorm(model, batches)
    assert model.sizes == [64, 64] and batches.batch_size == 64


def test_other_errors_are_not_taken_for_a_lack_of_memory(many):
    batches = TensorBatches(many, 64, MEAN, STD)
    with pytest.raises(RuntimeError, match="shapes"):
        sum_over_batches(batches, lambda x, _: x.sum() / torch.zeros(1) @ torch.zeros(2, 2))
    assert batches.batch_size == 64
