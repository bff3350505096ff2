"""Folders of image files: layouts, formats and sizes, lazy reading, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from genas_plugins.datasets import DiskImages, ImageTensors, load_search_data

Image = pytest.importorskip("PIL.Image", reason="Pillow writes and reads the image files of these tests")
torchvision = pytest.importorskip("torchvision", reason="torchvision is what these tests compare with")


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
    write_image(tmp_path / "train" / "bee" / "1.png", seed=1, width=width, height=height)
    data = load_search_data("image_folder", root=tmp_path, image_size=12)
    transforms = torchvision.transforms
    with Image.open(tmp_path / "train" / "ant" / "0.png") as image:
        expected = transforms.Compose([transforms.Resize(12), transforms.CenterCrop(12), transforms.PILToTensor()])(
            image
        )
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
    write_image(tmp_path / "train" / "bee" / "0.png", seed=0, width=4, height=4)
    data = load_search_data("image_folder", root=tmp_path)
    colours = torch.cat([data.train.images, data.validation.images])[:, :, 2, 2].int()
    assert len(colours) == len(names) + 3 and data.num_classes == 2
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
    for name in ("ant", "bee"):
        write_image(tmp_path / "train" / name / "0.png", seed=0, width=8, height=6)
    with pytest.raises(ValueError, match=r"8x6.*not square.*data\.image_size"):
        load_search_data("image_folder", root=tmp_path)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train", ("ant", "bee"), per_class=2)
    write_folder(tmp_path / "test", ("ant", "cow"), per_class=2)
    with pytest.raises(ValueError, match=r"\['bee'\].*\['cow'\]"):
        load_search_data("image_folder", root=tmp_path)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_missing_cifar_beside_image_files_suggests_the_image_folder(below, tmp_path):
    write_folder(tmp_path / below, per_class=1)
    with pytest.raises(FileNotFoundError, match="name='image_folder'"):
        load_search_data("cifar10", root=tmp_path)
