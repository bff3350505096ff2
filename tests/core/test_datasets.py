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

from genas_plugins.datasets import DATASETS, ImageTensors, load_search_data
from genas_plugins.datasets._imagenet16 import load_array_pickle

torchvision = pytest.importorskip("torchvision", reason="torchvision is what these tests compare with")


def identities(*parts: ImageTensors) -> list[bytes]:
    return [image.numpy().tobytes() for part in parts for image in part.images]


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
