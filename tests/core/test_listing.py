"""What of a folder is read, what is left out and named, and pictures that are small files and large images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from genas_plugins.datasets import load_search_data
from genas_plugins.datasets._images import ImageReader, bounded_aspect, check_headers, open_image
from genas_plugins.datasets._listing import class_folders, list_images

Image = pytest.importorskip("PIL.Image", reason="Pillow writes and reads the image files of these tests")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee")):
        for number in range(6):
            picture(tmp_path / "set" / name / f"{number}.png", 10 * label + number)
    return tmp_path / "set"


def listed(root: Path, **options):
    folders = class_folders(root)
    return list_images(root, folders, tuple(folders), **options)


def test_all_that_is_left_out_is_counted_and_named(root, caplog):
    picture(root / "ant" / "extra" / "deep" / "nested.jpg")
    picture(root / "loose.png")
    (root / "bee" / "film.gif").write_bytes(b"GIF89a")
    (root / "bee" / "notes.txt").write_text("")
    (root / "bee" / "link.png").symlink_to(root / "nowhere.png")
    (root / "gone").symlink_to(root / "nowhere")
    os.mkfifo(root / "ant" / "pipe.png")
    (root / "ant" / "._0.png").write_bytes(b"macOS")
    listing = listed(root)
    assert len(listing.samples) == 12 and listing.class_names == ("ant", "bee")
    with caplog.at_level(logging.INFO):
        listing.log()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    # 12 pictures; of the others film, notes and pipe are of other kinds.
    assert "19 files, 12 used as images of 2 classes (.png 12), 7 left out" in message
    assert "): ant/pipe.png, bee/film.gif, bee/notes.txt" in message
    assert all(kind in message for kind in ("3 of other kinds", ".gif 1", ".txt 1"))
    assert "2 links that lead nowhere: bee/link.png, gone" in message
    assert "1 images in folders inside class folders: ant/extra/deep/nested.jpg" in message
    assert "1 images beside the class folders: loose.png" in message


def test_nothing_left_out_is_said_quietly(root, caplog):
    with caplog.at_level(logging.INFO):
        listed(root).log()
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "12 files, 12 used as images of 2 classes (.png 12), none left out" in caplog.text


def test_the_search_reports_it(root, caplog):
    (root / "bee" / "link.png").symlink_to(root / "nowhere.png")
    load_search_data("image_folder", root=root)
    assert "1 links that lead nowhere: bee/link.png" in caplog.text


@pytest.mark.parametrize("below", ["", "train"])
def test_a_single_class_is_refused(below, tmp_path):
    for number in range(6):
        picture(tmp_path / below / "only" / f"{number}.png", number)
    with pytest.raises(ValueError, match=r"has 1 class folder \(only\), expected at least two.*one level too"):
        load_search_data("image_folder", root=tmp_path)


def test_nested_class_folders_are_refused_with_what_is_in_them(tmp_path):
    for name in ("n01", "n02"):
        picture(tmp_path / "train" / name / "images" / "0.jpg")
    with pytest.raises(ValueError, match=r"n01 holds 1 images in folders inside class folders: images/0\.jpg"):
        load_search_data("image_folder", root=tmp_path)


def test_a_class_of_dangling_links_or_unknown_files_says_so(root):
    (root / "cow").mkdir()
    (root / "cow" / "0.png").symlink_to(root / "nowhere")
    (root / "cow" / "1.heic").touch()
    with pytest.raises(
        ValueError, match=r"cow holds 1 of other kinds \(\.heic 1\): 1\.heic; 1 links that lead nowhere"
    ):
        listed(root)


def test_names_are_printed_without_control_characters_and_shortened(root):
    (root / "ant" / "bell\x07\x1b[31m.txt").touch()
    (root / "ant" / ("x" * 250 + ".gif")).touch()
    text = listed(root).describe()
    assert text.isprintable() and "bell\\x07\\x1b[31m.txt" in text
    assert len(text) < 800


def test_all_unreadable_files_are_counted_at_once(root):
    for number in range(4):
        (root / "bee" / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"Cannot read the image .*bee/0\.png.*So are 3 more of 12 \(1\.png, 2\.png"):
        load_search_data("image_folder", root=root)
    with pytest.raises(ValueError, match=r"bee/3\.png"):
        check_headers([str(root / "bee" / "3.png")])


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 60_000)])
def test_a_thin_picture_takes_little_memory(size, tmp_path, warm):
    """Enlarged before it is cropped it would have 224 x 4,480,000 pixels, 3 GB."""
    path = tmp_path / "thin.png"
    Image.new("1", size, 1).save(path)
    assert path.stat().st_size < 4000
    code = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30));"
        "from genas_plugins.datasets._images import ImageReader;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "pixels = ImageReader(224, resize=True).read(sys.argv[1]);"
        "print(pixels.shape, pixels.min(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = warm("torch")(code, path, folder=tmp_path)
    assert result.status == 0, result.stderr
    shape, grown = result.stdout.rsplit(" ", 1)
    assert shape == "(3, 224, 224) 255"
    # KiB.
    assert int(grown) < 100_000


def test_of_a_thin_picture_the_middle_is_read(tmp_path):
    pixels = np.zeros((4, 400, 3), dtype=np.uint8)
    pixels[:, 198:202] = 200
    Image.fromarray(pixels).save(tmp_path / "thin.png")
    # Of 400 columns the middle four are those of a centre crop.
    assert (ImageReader(4, resize=True).read(str(tmp_path / "thin.png")) == 200).all()


@pytest.mark.parametrize("size", [(16, 1), (1, 16), (160, 10), (7, 7), (31, 2)])
def test_other_pictures_are_not_touched(size):
    image = Image.new("RGB", size)
    assert bounded_aspect(image).size == size


@pytest.mark.parametrize("size", [(17, 1), (1, 1000), (9999, 3)])
def test_the_longer_side_is_bounded(size):
    found = bounded_aspect(Image.new("RGB", size)).size
    assert min(found) == min(size) and max(found) == 16 * min(size)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, or with some bytes changed."""
    changed = bytearray(data[: rng.integers(8, len(data))] if rng.random() < 0.4 else data)
    for position in rng.integers(0, len(changed), rng.integers(1, 12)):
        changed[position] = rng.integers(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # of Pillow, which says what it skips
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp", "bmp", "ppm"])
def test_damage_anywhere_is_a_sentence_that_names_the_file(suffix, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / f"whole.{suffix}"
    picture(path, size=(24, 24))
    data = path.read_bytes()
    for number in range(150):
        path.write_bytes(damaged(data, rng))
        for read in (open_image, lambda path: check_headers([path])):
            try:
                read(str(path))
            except ValueError as error:
                assert f"whole.{suffix}" in str(error) and len(str(error)) < 600, number
