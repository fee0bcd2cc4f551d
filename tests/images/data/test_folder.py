"""Folders hand out the images of their files; picture files are opened with care on every route."""

import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde.images.data import FolderImages
from cldsde.images.data.pixels import load_samples
from cldsde.images.sample.observed import _read
from image_data import cubic_weights, random_bytes, save, whole

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
SMALL = np.zeros((2, 2), np.uint8)

# Errors of encoders and of rounding, in levels of 255.
WEBP = 2  # of a constant grey, of which JPEG is exact.
TRUNCATED = 1  # Pillow composes in integers, with a product rounded twice.
HALF = 0.51  # nearest level, from weights of 16 bits.


def only(folder: Path, **options) -> np.ndarray:
    """The only image of a folder, (C, H, W)."""
    (image,) = whole(FolderImages(folder, **options)).numpy()
    return image


def assert_no_image(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        whole(FolderImages(folder, **{"size": 2, **options}))


def test_files_are_ordered_by_their_composed_names_whatever_the_file_system(tmp_path):
    e, split = "\u00e8.png", "e\u0301.png"  # in the order of both composed
    names = ["b.png", "a/2.PNG", "a/10.png", "B.jpg", "a.bmp", split, "z/y.webp", e]
    ordered = ["B.jpg", "a/10.png", "a/2.PNG", "a.bmp", "b.png", "z/y.webp", e, split]
    for i, name in enumerate(names):
        save(tmp_path / name, np.full((4, 4), i, np.uint8))
    for name in (".hidden.png", "a/._2.PNG", ".trash/c.png", "notes.txt", "a/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    images = FolderImages(tmp_path, size=4, channels=1)
    assert [file.relative_to(tmp_path).as_posix() for file in images.files] == ordered
    values = whole(images)[:, 0, 0, 0].int().tolist()
    assert values == pytest.approx([names.index(name) for name in ordered], abs=WEBP)
    assert images.labels is None


def test_subfolders_are_classes(tmp_path):
    for i, name in enumerate(["dog/1.png", "cat/x/2.png", "dog/0.png", "cat/1.png"]):
        save(tmp_path / name, np.full((2, 2), i, np.uint8))
    images = FolderImages(tmp_path, size=2, channels=1, classes=True)
    assert (images.class_names, images.classes) == (("cat", "dog"), 2)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert whole(images)[:, 0, 0, 0].tolist() == [3, 1, 2, 0]
    save(tmp_path / "stray.png", SMALL)
    assert_no_image(tmp_path, r"stray\.png belongs to no class", classes=True)


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "there" / "1.png", SMALL)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file.png").symlink_to(tmp_path / "there" / "1.png")
    (folder / "folder").symlink_to(tmp_path / "there")
    files = FolderImages(folder, size=2).files
    assert [file.relative_to(folder).as_posix() for file in files] == ["file.png", "folder/1.png"]
    (tmp_path / "there" / "back").symlink_to(folder)
    assert_no_image(folder, r"back is a link to a folder that it l")
    (tmp_path / "there" / "back").unlink()
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert_no_image(folder, r"broken\.png cannot be decoded")


def test_paths_without_images_are_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    assert_no_image(tmp_path, r"holds no image; files that end in \.bmp, .* count")
    for name in ("nowhere", "notes.txt"):
        with pytest.raises(FileNotFoundError, match=rf"path must be a folder; got .*{name}"):
            FolderImages(tmp_path / name, size=2)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.bmp", "cut.webp", "cut.tif"])
def test_a_file_that_is_cut_is_named_at_the_latest_when_it_is_loaded(tmp_path, name):
    save(tmp_path / name, random_bytes(64, 64, 3))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    assert_no_image(tmp_path, f"{name} cannot be decoded as an image")


def test_every_damaged_or_vanished_file_is_named_and_can_be_skipped(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", random_bytes(16, 16, seed=i))
    content = bytearray((tmp_path / "1.png").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 0x10  # a bit that a checksum covers
    (tmp_path / "1.png").write_bytes(content)
    Image.open(tmp_path / "3.png").save(tmp_path / "3.png", exif=b"Exif\0\0no more than text")
    (tmp_path / "notes.txt").write_text("text")
    assert_no_image(tmp_path, r"1\.png cannot .*nor can .*3\.png")
    rest = FolderImages(tmp_path, size=8, skip_damaged=True)
    assert [file.name for file in rest.files] == ["0.png", "2.png"]
    assert [reason.rpartition("/")[2][:5] for reason in rest.skipped[:2]] == ["1.png", "3.png"]
    assert rest.skipped[2] == "1 files that end in '.txt'"
    rest.files[0].unlink()
    with pytest.raises(ValueError, match=r"0\.png cannot be decoded as an image: .*No such file"):
        whole(rest)


@pytest.mark.parametrize(("height", "width"), [(6, 9), (9, 6), (6, 7), (1, 5)])
def test_the_central_square_is_cut_out(tmp_path, height, width):
    pixels = random_bytes(height, width, 3)
    save(tmp_path / "a.png", pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    assert np.array_equal(only(tmp_path, size=side), square.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [5, 16, 100])
def test_the_square_is_resized_by_a_widened_cubic(tmp_path, size):
    pixels = random_bytes(40, 60, 3)
    save(tmp_path / "a.png", pixels)
    got = only(tmp_path, size=size)
    # Pillow rounds and clamps after rows and again after columns; its weights have 22 bits, so
    # that a tie may go the other way.
    weights = cubic_weights(40, size)
    rows = np.einsum("ji,hic->hjc", weights, pixels[:, 10:50]).round().clip(0, 255)
    both = np.einsum("jh,hic->jic", weights, rows).round().clip(0, 255)
    assert np.abs(both.transpose(2, 0, 1) - got).max() <= 1
    assert np.mean(both.transpose(2, 0, 1) == got) > 0.98


def test_transparent_images_are_laid_over_white(tmp_path):
    colour = random_bytes(4, 4, 3)
    alpha = np.array([0, 255, 128, 64] * 4, np.uint8).reshape(4, 4, 1)
    save(tmp_path / "a.png", np.concatenate([colour, alpha], -1))
    over = (colour * (alpha / 255) + 255 * (1 - alpha / 255)).transpose(2, 0, 1)
    got = only(tmp_path, size=4)
    assert np.abs(got - over).max() <= TRUNCATED
    assert np.array_equal(got[:, :, :2], over[:, :, :2])


GREY, COLOUR = random_bytes(3, 3), random_bytes(3, 3, 3)
LUMA = COLOUR @ [0.299, 0.587, 0.114]  # Rec. 601
DEEP = np.array([[0, 128, 129], [257, 32768, 65406], [65407, 65535, 400]], np.uint16)
FLAT = np.full((3, 8, 8), np.array([200, 100, 50])[:, None, None])
CMYK = Image.fromarray(FLAT.transpose(1, 2, 0).astype(np.uint8)).convert("CMYK")
BLACK, WHITE = (Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 255))
PALETTE = Image.fromarray(np.array([[0, 1]] * 2, np.uint8), "P")
PALETTE.putpalette([10, 20, 30, 40, 50, 60])
TRANSPARENT = np.transpose([[[10, 20, 30], [255, 255, 255]]] * 2, (2, 0, 1))


@pytest.mark.parametrize(
    ("image", "suffix", "options", "want", "error"),
    [
        (Image.fromarray(GREY), "png", {}, [GREY] * 3, 0),
        (Image.fromarray(COLOUR), "png", {}, [LUMA], HALF),
        (CMYK, "tif", {}, FLAT, 0),
        (Image.fromarray(GREY > 99), "png", {}, [255 * (GREY > 99)], 0),
        (Image.fromarray(DEEP), "png", {}, [np.rint(DEEP / 257)] * 3, 0),
        (PALETTE, "png", {"transparency": 1}, TRANSPARENT, 0),
        # The first of several frames counts.
        (BLACK, "gif", {"save_all": True, "append_images": [WHITE]}, np.zeros((1, 4, 4)), 0),
    ],
)
def test_every_mode_becomes_bytes_of_grey_or_colour(tmp_path, image, suffix, options, want, error):
    image.save(tmp_path / f"a.{suffix}", **options)
    got = only(tmp_path, size=image.size[0], channels=len(want))
    assert np.abs(got - np.asarray(want)).max() <= error


def test_pixels_of_unknown_scale_are_rejected(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "a.tif")
    assert_no_image(tmp_path, r"a\.tif cannot be decoded.*mode F; 8 bits")


# A camera stores the inverse of the operation that the tag 1, 2, … names (EXIF 2.3, 4.6.4): it
# reverses rows and columns, of the transposed picture from 5 on.
STORED = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_applied(tmp_path, orientation):
    exif, (rows, columns) = Image.Exif(), STORED[orientation - 1]
    exif[0x0112] = orientation
    stored = np.ascontiguousarray((GREY if orientation < 5 else GREY.T)[::rows, ::columns])
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(only(tmp_path, size=3, channels=1)[0], GREY)


def test_threads_and_pickling_change_nothing(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.jpg", random_bytes(20, 30, 3, seed=i))
    rows = torch.tensor([8, 0, 0, 5, 3, 1, 2])
    one, many = (FolderImages(tmp_path, size=8, workers=n) for n in (1, 7))
    for images in (many, pickle.loads(pickle.dumps(many))):
        assert torch.equal(images.load(rows), one.load(rows))


ROUTES = {
    "data": lambda file: FolderImages(file.parent, size=8),
    "samples": lambda file: load_samples(file.parent),
    "known": lambda file: _read(file, (3, 8, 8), "known"),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_postscript_bombs_and_pipes_are_rejected(tmp_path, monkeypatch, route):
    """No program is started, no memory is filled, and nothing is waited for."""
    file = tmp_path / "x.png"

    def assert_rejected(message):
        with pytest.raises(ValueError, match=rf"x\.png cannot be decoded{message}"):
            route(file)

    file.write_bytes(EPS)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    assert_rejected("")
    save(file, random_bytes(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_rejected(".*exceeds limit")
    if hasattr(os, "mkfifo"):
        file.unlink()
        os.mkfifo(file)
        assert_rejected(".*not a regular file")
