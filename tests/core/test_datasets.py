"""Data sets: what is read, how it is split, and what is refused."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from genas_plugins.datasets import DATASETS, DiskImages, ImageTensors, load_search_data
from genas_plugins.datasets._imagenet16 import load_array_pickle
from genas_plugins.datasets._tensors import channel_statistics, resized

Image = pytest.importorskip("PIL.Image", reason="Pillow writes and reads the image files of these tests")
torchvision = pytest.importorskip("torchvision", reason="torchvision is what these tests compare with")


def tensors(count: int = 12, classes: int = 3, size: int = 4) -> ImageTensors:
    rng = np.random.default_rng(count)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    names = tuple(f"c{index}" for index in range(classes))
    return ImageTensors(images, torch.arange(count) % classes, names)


def identities(*parts: ImageTensors) -> list[bytes]:
    return [image.numpy().tobytes() for part in parts for image in part.images]


def write_image(path: Path, seed: int, width: int = 6, height: int = 6) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_folder(base: Path, classes: tuple[str, ...] = ("ant", "bee"), per_class: int = 10) -> None:
    for label, name in enumerate(classes):
        for index in range(per_class):
            write_image(base / name / f"{index:02d}.png", seed=1000 * label + index)


# --- the container ---


def test_subset_keeps_the_order_that_was_asked_for():
    data = tensors()
    part = data.subset([7, 0, 3])
    assert len(part) == 3 and part.labels.tolist() == [1, 0, 0]
    assert torch.equal(part.images, data.images[[7, 0, 3]])
    with pytest.raises(IndexError):
        data.subset([12])


def test_random_labels_are_uniform_seeded_and_leave_the_images_alone():
    data = ImageTensors(
        torch.zeros(6000, 3, 1, 1, dtype=torch.uint8), torch.zeros(6000).long(), ("a", "b", "c")
    )
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


# --- digits and the split ---


@pytest.fixture
def sklearn_digits():
    return pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the digits").load_digits()


def test_digits_are_split_into_disjoint_parts_that_make_up_the_whole(sklearn_digits):
    data = load_search_data("digits")
    expected = np.rint(sklearn_digits.images * 255 / 16).astype(np.uint8)
    every = np.repeat(expected[:, None], 3, axis=1)
    found = identities(data.train, data.validation, data.test)
    # Sorted lists of all images agree exactly if and only if no image was lost or used twice.
    assert sorted(found) == sorted(image.tobytes() for image in every)
    assert len(data.train) == len(data.validation)
    assert (data.num_classes, data.image_size, data.name) == (10, 8, "digits")
    truth = {image.tobytes(): int(label) for image, label in zip(every, sklearn_digits.target, strict=True)}
    for part in (data.train, data.validation, data.test):
        assert part.labels.tolist() == [truth[key] for key in identities(part)]


def test_the_test_part_of_digits_is_a_fifth_of_every_class(sklearn_digits):
    held = torch.bincount(load_search_data("digits").test.labels).numpy()
    assert np.abs(held - 0.2 * np.bincount(sklearn_digits.target)).max() <= 0.5


def test_the_seed_decides_the_split_and_no_global_generator_is_touched():
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    torch.manual_seed(1)
    first = load_search_data("digits", seed=3)
    torch.manual_seed(2)
    again = load_search_data("digits", seed=3)
    assert identities(first.train) == identities(again.train)
    assert identities(first.test) == identities(again.test)
    assert identities(first.train) != identities(load_search_data("digits", seed=4).train)
    assert np.random.get_state()[1].tolist() == states[1]
    torch.random.set_rng_state(states[0])
    load_search_data("digits", seed=3, random_labels=True)
    assert torch.equal(torch.random.get_rng_state(), states[0])


def test_caps_take_the_first_images_of_each_half():
    full = load_search_data("digits", seed=5)
    small = load_search_data(
        "digits", seed=5, train_images=40, validation_images=30, test_images=20, recalibration_images=10
    )
    assert identities(small.train) == identities(full.train)[:40]
    assert identities(small.validation) == identities(full.validation)[:30]
    assert identities(small.recalibration) == identities(full.train)[:10]
    assert len(small.test) == 20 and set(identities(small.test)) <= set(identities(full.test))


def test_train_fraction_is_the_share_of_the_train_half():
    data = load_search_data("digits", train_fraction=0.25)
    assert len(data.train) == round(0.25 * (len(data.train) + len(data.validation)))


def test_random_labels_change_the_train_labels_only():
    true = load_search_data("digits", train_images=400, recalibration_images=50)
    data = load_search_data("digits", train_images=400, recalibration_images=50, random_labels=True)
    assert torch.equal(data.train.images, true.train.images)
    # A random label agrees with the true one in a tenth of the images: 40 of 400, deviation 6.
    assert int((data.train.labels == true.train.labels).sum()) < 70
    for part in ("recalibration", "validation", "test"):
        assert torch.equal(getattr(data, part).labels, getattr(true, part).labels)


def test_statistics_are_those_of_the_train_half():
    data = load_search_data("digits", train_images=100)
    scaled = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_digits_can_be_resized():
    data = load_search_data("digits", image_size=12)
    assert data.image_size == 12 and data.train.images.shape[1:] == (3, 12, 12)


def test_recalibration_defaults_to_850_or_to_a_smaller_half(tmp_path):
    assert len(load_search_data("digits").recalibration) == 719
    assert len(load_search_data("digits", train_fraction=0.8).recalibration) == 850


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 720}, "720.*719"),
        ({"validation_images": 5000}, "5000.*719"),
        ({"test_images": 1000}, "1000.*359"),
        ({"recalibration_images": 850}, "850.*719"),
        ({"train_images": 20, "recalibration_images": 21}, "21.*20"),
        ({"train_images": 0}, "train_images must be at least 1"),
        ({"recalibration_images": 0}, "recalibration_images must be at least 1"),
        ({"train_fraction": 1.0}, "train_fraction.*1.0"),
        ({"train_fraction": 1e-6}, "one part empty"),
        ({"image_size": 0}, "image_size.*0"),
        ({"storage": "disk"}, "image_folder"),
        ({"storage": "tape"}, "'memory' or 'disk'.*'tape'"),
        ({"seed": -1}, "seed.*-1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_search_data("digits", **options)


def test_a_seed_that_is_not_an_integer_is_refused():
    with pytest.raises(TypeError, match=r"seed.*float"):
        load_search_data("digits", seed=0.5)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=", ".join(DATASETS)):
        load_search_data("mnist")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_data_set_of_files_needs_a_root(name):
    with pytest.raises(ValueError, match="needs root"):
        load_search_data(name)


@pytest.mark.parametrize("name", ["imagenet16-120", "image_folder"])
def test_what_cannot_be_downloaded_says_so(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_search_data(name, root=tmp_path, download=True)


# --- CIFAR ---


@pytest.fixture(params=["cifar10", "cifar100"])
def tiny_cifar(request, tmp_path, monkeypatch):
    """Write 20 training and 6 test images in the official format, and drop the official checksums."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[request.param]
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    key = "labels" if request.param == "cifar10" else "fine_labels"
    rows = {}
    for name, count in (("some_train", 20), ("some_test", 6)):
        rows[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": rows[name], key: [index % 2 for index in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "names").write_bytes(pickle.dumps({cls.meta["key"]: ["cat", "dog"]}))
    monkeypatch.setattr(cls, "train_list", [["some_train", None]])
    monkeypatch.setattr(cls, "test_list", [["some_test", None]])
    monkeypatch.setattr(cls, "meta", {"filename": "names", "key": cls.meta["key"], "md5": None})
    return request.param, folder, rows


def test_cifar_keeps_its_pixels_its_test_set_and_its_published_statistics(tiny_cifar):
    name, folder, rows = tiny_cifar
    data = load_search_data(name, root=folder.parent, recalibration_images=5)
    train_rows = sorted(row.tobytes() for row in rows["some_train"])
    assert sorted(identities(data.train, data.validation)) == train_rows
    assert identities(data.test) == [row.tobytes() for row in rows["some_test"]]
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1] and data.test.class_names == ("cat", "dog")
    published = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    }
    assert (data.mean, data.std) == published[name]


def test_an_incomplete_cifar_says_to_delete_and_download(tiny_cifar):
    name, folder, _ = tiny_cifar
    (folder / "some_test").unlink()
    with pytest.raises(ValueError, match=r"incomplete or damaged.*download=True"):
        load_search_data(name, root=folder.parent)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_cifar_names_the_folder_and_the_remedy(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10.*download=True.*data\.download: true") as caught:
        load_search_data(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value) and "image_folder" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_missing_cifar_beside_image_files_suggests_the_image_folder(below, tmp_path):
    write_folder(tmp_path / below, per_class=1)
    with pytest.raises(FileNotFoundError, match="name='image_folder'"):
        load_search_data("cifar10", root=tmp_path)


def test_a_failed_download_is_a_sentence(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(ConnectionError, match=r"could not be downloaded.*no route to host.*by hand"):
        load_search_data("cifar10", root=tmp_path, download=True)


# --- ImageNet16-120 ---


def write_imagenet16(root: Path, protocol: int = 2) -> dict[int, list[bytes]]:
    """Write the eleven files, labels 119..122 in turn; return the rows by label 119 and 120."""
    rng, rows = np.random.default_rng(0), {119: [], 120: []}
    for name in [f"train_data_batch_{number}" for number in range(1, 11)] + ["val_data"]:
        data = rng.integers(0, 256, (8, 768), dtype=np.uint8)
        labels = [119, 120, 121, 122] * 2
        (root / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=protocol))
        if name != "val_data":
            for row, label in zip(data, labels, strict=True):
                rows.setdefault(label, []).append(row.tobytes())
    return rows


def test_imagenet16_keeps_the_first_120_classes(tmp_path):
    rows = write_imagenet16(tmp_path)
    data = load_search_data("imagenet16-120", root=tmp_path, recalibration_images=8)
    found = identities(data.train, data.validation)
    labels = data.train.labels.tolist() + data.validation.labels.tolist()
    for label in (119, 120):
        mine = [row for row, number in zip(found, labels, strict=True) if number == label - 1]
        assert sorted(mine) == sorted(rows[label])
    assert len(found) == 40 and len(data.test) == 4
    assert (data.num_classes, data.image_size) == (120, 16)
    scaled = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, scaled.mean((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_of_numpy_is_read(protocol, tmp_path):
    content = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "number": np.int64(7), "labels": [1, 2]}
    (tmp_path / "file").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_array_pickle(tmp_path / "file")
    assert loaded["labels"] == [1, 2] and loaded["number"] == 7
    np.testing.assert_array_equal(loaded["data"], content["data"])


def test_both_spellings_of_numpy_core_are_read(tmp_path):
    stream = pickle.dumps(np.arange(4, dtype=np.uint8), protocol=0)
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    assert (old in stream) != (new in stream)
    for wanted in (old, new):
        (tmp_path / "file").write_bytes(stream.replace(old, wanted).replace(new, wanted))
        assert load_array_pickle(tmp_path / "file").tolist() == [0, 1, 2, 3]


def test_python_2_strings_are_read_as_latin1(tmp_path):
    # SHORT_BINSTRING of the two bytes 0xe9 0x00, as Python 2 wrote array buffers.
    (tmp_path / "file").write_bytes(b"\x80\x02U\x02\xe9\x00.")
    assert load_array_pickle(tmp_path / "file") == "\xe9\x00"


class _Toucher:
    """A pickle of this creates the file when it is loaded in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path):
    write_imagenet16(tmp_path)
    target = tmp_path / "touched"
    payload = pickle.dumps({"data": _Toucher(target), "labels": [1]})
    pickle.loads(payload)
    assert target.is_dir(), "the payload must work, or the test shows nothing"
    target.rmdir()
    (tmp_path / "train_data_batch_4").write_bytes(payload)
    with pytest.raises(ValueError, match=rf"train_data_batch_4.*{os.mkdir.__module__}\.mkdir.*not run"):
        load_search_data("imagenet16-120", root=tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
        # A dotted name would reach os through an admitted module's attributes.
        (b"\x80\x04\x8c\x05numpy\x8c\x0bf2py.os.abc\x93.", r"numpy\.f2py\.os\.abc"),
        (b"c_codecs\nencode\n(Va\nVrot13\ntR.", "codec 'rot13'"),
        (b"", "refused"),
        (b"\xff\xd8\xff\xe0 not a pickle", "refused"),
        (pickle.dumps({"data": np.zeros((2, 768), np.uint8)})[:-40], "refused"),
    ],
)
def test_other_streams_are_refused(stream, message, tmp_path):
    (tmp_path / "file").write_bytes(stream)
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        load_array_pickle(tmp_path / "file")
    assert "encodings.rot_13" not in set(sys.modules) - modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "dict with 'data' and 'labels'"),
        ({"data": np.zeros((2, 768), np.uint8)}, "dict with 'data' and 'labels'"),
        ({"data": np.zeros((2, 768)), "labels": [1, 2]}, "uint8.*float64"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}, r"\(n, 768\).*\(2, 3072\)"),
        ({"data": np.zeros((2, 768), np.uint8), "labels": [1]}, r"2 whole numbers.*\(1,\)"),
        ({"data": np.zeros((2, 768), np.uint8), "labels": [0, 1]}, "from 0"),
        ({"data": np.zeros((2, 768), np.uint8), "labels": [1.0, 2.0]}, "whole numbers.*float64"),
    ],
)
def test_files_of_another_content_are_refused(content, message, tmp_path):
    write_imagenet16(tmp_path)
    (tmp_path / "val_data").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"val_data.*{message}|{message}.*val_data"):
        load_search_data("imagenet16-120", root=tmp_path)


def test_missing_imagenet16_files_are_named(tmp_path):
    write_imagenet16(tmp_path)
    (tmp_path / "train_data_batch_10").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train_data_batch_10:") as caught:
        load_search_data("imagenet16-120", root=tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- image folders ---


def test_a_folder_with_train_and_test_is_read_exactly(tmp_path):
    write_folder(tmp_path / "train", per_class=6)
    write_folder(tmp_path / "test", per_class=2)
    data = load_search_data("image_folder", root=tmp_path)
    expected = {}
    for label, name in enumerate(("ant", "bee")):
        for path in (tmp_path / "train" / name).iterdir():
            expected[np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()] = label
    found = identities(data.train, data.validation)
    assert sorted(found) == sorted(expected)
    assert data.train.labels.tolist() == [expected[key] for key in identities(data.train)]
    assert (len(data.test), data.num_classes, data.image_size) == (4, 2, 6)
    assert data.test.class_names == ("ant", "bee")


@pytest.mark.parametrize(("folders", "count"), [(("val",), 2), (("val", "test"), 4), ((), None)])
def test_the_test_images_come_from_test_then_val_or_not_at_all(folders, count, tmp_path):
    write_folder(tmp_path / "train", per_class=2)
    for folder in folders:
        write_folder(tmp_path / folder, per_class={"val": 1, "test": 2}[folder])
    test = load_search_data("image_folder", root=tmp_path).test
    assert test is None if count is None else len(test) == count


def test_a_cap_on_a_test_set_that_is_not_there_is_refused(tmp_path):
    write_folder(tmp_path / "train", per_class=2)
    with pytest.raises(ValueError, match=r"test_images=3.*0 test images"):
        load_search_data("image_folder", root=tmp_path, test_images=3)


def test_without_train_a_tenth_of_every_class_is_held_out(tmp_path):
    write_folder(tmp_path, classes=("ant", "bee", "cow"), per_class=20)
    data = load_search_data("image_folder", root=tmp_path)
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert len(set(identities(data.train, data.validation, data.test))) == 60


def test_a_class_of_one_image_stays_out_of_the_holdout(tmp_path):
    write_folder(tmp_path, classes=("ant", "bee"), per_class=3)
    write_image(tmp_path / "cow" / "only.png", seed=5000)
    assert load_search_data("image_folder", root=tmp_path).test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(("width", "height"), [(31, 20), (20, 31), (9, 40), (12, 24), (5, 7)])
def test_other_sizes_are_resized_and_cropped_as_torchvision_does(width, height, tmp_path):
    write_image(tmp_path / "train" / "ant" / "0.png", seed=1, width=width, height=height)
    write_image(tmp_path / "train" / "ant" / "1.png", seed=1, width=width, height=height)
    data = load_search_data("image_folder", root=tmp_path, image_size=12)
    transforms = torchvision.transforms
    with Image.open(tmp_path / "train" / "ant" / "0.png") as image:
        expected = transforms.Compose(
            [transforms.Resize(12), transforms.CenterCrop(12), transforms.PILToTensor()]
        )(image)
    assert torch.equal(data.train.images[0], expected)


def test_formats_and_colour_modes_become_rgb(tmp_path):
    folder = tmp_path / "train" / "ant"
    folder.mkdir(parents=True)
    names = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "f.ppm", "g.tif", "h.tiff"]
    for name in names:
        Image.new("RGB", (4, 4), (200, 100, 50)).save(folder / name)
    Image.new("L", (4, 4), 90).save(folder / "i.png")
    Image.new("RGBA", (4, 4), (10, 20, 30, 255)).save(folder / "j.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "._a.jpg").write_bytes(b"left by an archive")
    (tmp_path / "train" / ".cache").mkdir()
    data = load_search_data("image_folder", root=tmp_path)
    colours = torch.cat([data.train.images, data.validation.images])[:, :, 2, 2].int()
    assert len(colours) == len(names) + 2 and data.num_classes == 1
    for expected, count in (((200, 100, 50), len(names)), ((90, 90, 90), 1), ((10, 20, 30), 1)):
        near = (colours - torch.tensor(expected)).abs().amax(1) <= 4
        assert int(near.sum()) == count


def test_disk_storage_decodes_the_same_train_half_lazily(tmp_path):
    write_folder(tmp_path / "train", per_class=8)
    options = {"root": tmp_path, "seed": 2, "image_size": 5, "recalibration_images": 6}
    memory = load_search_data("image_folder", **options)
    disk = load_search_data("image_folder", storage="disk", **options)
    assert isinstance(disk.train, DiskImages) and len(disk.train.samples) == len(disk.train) == 8
    revived = pickle.loads(pickle.dumps(disk.train))
    for index, (image, label) in enumerate(revived[position] for position in range(len(revived))):
        assert image.dtype == torch.uint8 and torch.equal(image, memory.train.images[index])
        assert label == int(memory.train.labels[index])
    assert identities(disk.validation) == identities(memory.validation)
    assert identities(disk.recalibration) == identities(memory.train)[:6]
    scaled = disk.recalibration.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(disk.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    with pytest.raises(IndexError):
        disk.train[8]


def test_disk_storage_takes_random_labels_too(tmp_path):
    write_folder(tmp_path / "train", per_class=40)
    options = {"root": tmp_path, "recalibration_images": 4}
    memory = load_search_data("image_folder", random_labels=True, **options)
    disk = load_search_data("image_folder", random_labels=True, storage="disk", **options)
    true = load_search_data("image_folder", storage="disk", **options)
    labels = [label for _, label in disk.train.samples]
    assert labels == memory.train.labels.tolist() != [label for _, label in true.train.samples]
    assert [path for path, _ in disk.train.samples] == [path for path, _ in true.train.samples]
    assert torch.equal(disk.recalibration.labels, true.recalibration.labels)


def test_disk_images_load_in_worker_processes(tmp_path):
    write_folder(tmp_path / "train", per_class=4)
    train = load_search_data("image_folder", root=tmp_path, storage="disk").train
    loader = torch.utils.data.DataLoader(train, batch_size=2, num_workers=1)
    images = torch.cat([batch for batch, _ in loader])
    assert torch.equal(images, train.load().images)


def test_disk_images_need_a_sample(tmp_path):
    write_folder(tmp_path / "train", per_class=2)
    train = load_search_data("image_folder", root=tmp_path, storage="disk").train
    with pytest.raises(ValueError, match="at least one"):
        train.subset([])


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_search_data("image_folder", root=tmp_path / "nowhere")


def test_a_root_without_class_folders_is_refused(tmp_path):
    write_image(tmp_path / "loose.png", seed=0)
    with pytest.raises(ValueError, match="no class folders"):
        load_search_data("image_folder", root=tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path, per_class=2)
    (tmp_path / "wasp").mkdir()
    with pytest.raises(ValueError, match=r"wasp.*no images"):
        load_search_data("image_folder", root=tmp_path)


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
@pytest.mark.parametrize("image_size", [None, 6])
def test_an_unreadable_image_is_named(content, image_size, tmp_path):
    write_folder(tmp_path / "train", per_class=3)
    (tmp_path / "train" / "bee" / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"Cannot read the image .*broken\.png"):
        load_search_data("image_folder", root=tmp_path, image_size=image_size)


def test_a_truncated_image_is_named(tmp_path):
    write_folder(tmp_path / "train", per_class=3)
    path = tmp_path / "train" / "ant" / "cut.bmp"
    write_image(path, seed=9, width=30, height=30)
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(ValueError, match=r"cut\.bmp"):
        load_search_data("image_folder", root=tmp_path, image_size=6)


def test_sixteen_bit_images_are_refused(tmp_path):
    write_folder(tmp_path / "train", per_class=2)
    Image.fromarray(np.full((6, 6), 3000, np.uint16)).save(tmp_path / "train" / "ant" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        load_search_data("image_folder", root=tmp_path)


def test_different_sizes_need_an_image_size(tmp_path):
    write_folder(tmp_path / "train", per_class=3)
    write_image(tmp_path / "train" / "bee" / "large.png", seed=9, width=8, height=8)
    with pytest.raises(ValueError, match=r"large\.png is 8x8.*6x6.*data\.image_size"):
        load_search_data("image_folder", root=tmp_path)
    assert load_search_data("image_folder", root=tmp_path, image_size=6).image_size == 6


def test_oblong_images_need_an_image_size(tmp_path):
    write_image(tmp_path / "train" / "ant" / "0.png", seed=0, width=8, height=6)
    with pytest.raises(ValueError, match=r"8x6.*not square.*data\.image_size"):
        load_search_data("image_folder", root=tmp_path)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train", ("ant", "bee"), per_class=2)
    write_folder(tmp_path / "test", ("ant", "cow"), per_class=2)
    with pytest.raises(ValueError, match=r"\['bee'\].*\['cow'\]"):
        load_search_data("image_folder", root=tmp_path)
