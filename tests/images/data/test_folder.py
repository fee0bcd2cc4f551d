"""Folders hand out the images of their files, and name the file that they cannot read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde.images.data import FolderImages
from image_data import cubic_weights, random_bytes, save, whole


def only(folder: Path, **options) -> np.ndarray:
    """The only image of a folder, (C, H, W)."""
    (image,) = whole(FolderImages(folder, **options)).numpy()
    return image


def test_files_are_ordered_by_name_in_any_order_of_the_file_system(tmp_path, monkeypatch):
    names = ["b.png", "a/2.PNG", "a/10.png", "B.jpg", "a.bmp", "é.png", "z/y/x.webp"]
    for i, name in enumerate(names):
        save(tmp_path / name, np.full((4, 4), i, np.uint8))
    for name in (".hidden.png", "a/._2.PNG", ".trash/c.png", "notes.txt", "a/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    ordered = ["B.jpg", "a/10.png", "a/2.PNG", "a.bmp", "b.png", "z/y/x.webp", "é.png"]
    walk = os.walk

    def backwards(*arguments, **options):
        for place, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield place, folders, sorted(files, reverse=True)

    for listing in (walk, backwards):
        monkeypatch.setattr(os, "walk", listing)
        images = FolderImages(tmp_path, size=4, channels=1)
        assert [file.relative_to(tmp_path).as_posix() for file in images.files] == ordered
    # JPEG keeps a constant grey, WebP does to a level or two.
    values = whole(images)[:, 0, 0, 0].int().tolist()
    assert values == pytest.approx([names.index(name) for name in ordered], abs=2)
    assert images.labels is None


def test_composed_and_decomposed_names_sort_alike(tmp_path):
    for form, folder in (("\u00e9", "composed"), ("e\u0301", "split")):
        for name in ("f", form, "e"):
            save(tmp_path / folder / f"{name}.png", np.zeros((2, 2), np.uint8))
        files = FolderImages(tmp_path / folder, size=2).files
        assert [file.stem for file in files] == ["e", "f", form]


def test_subfolders_are_classes(tmp_path):
    for i, name in enumerate(["dog/1.png", "cat/x/2.png", "dog/0.png", "cat/1.png"]):
        save(tmp_path / name, np.full((2, 2), i, np.uint8))
    images = FolderImages(tmp_path, size=2, channels=1, classes=True)
    assert (images.class_names, images.classes) == (("cat", "dog"), 2)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert whole(images)[:, 0, 0, 0].tolist() == [3, 1, 2, 0]
    save(tmp_path / "stray.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"stray\.png belongs to no class"):
        FolderImages(tmp_path, size=2, classes=True)
    (tmp_path / "stray.png").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is a class without an image"):
        FolderImages(tmp_path, size=2, classes=True)


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "there" / "1.png", np.zeros((2, 2), np.uint8))
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file.png").symlink_to(tmp_path / "there" / "1.png")
    (folder / "folder").symlink_to(tmp_path / "there")
    files = FolderImages(folder, size=2).files
    assert [file.relative_to(folder).as_posix() for file in files] == ["file.png", "folder/1.png"]
    (tmp_path / "there" / "back").symlink_to(folder)
    for classes in (False, True):
        place = tmp_path if classes else folder
        with pytest.raises(ValueError, match=r"(back|folder) is a link to a folder that it l"):
            FolderImages(place, size=2, classes=classes)
    (tmp_path / "there" / "back").unlink()
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded"):
        FolderImages(folder, size=2)


def test_folders_without_images_are_rejected(tmp_path):
    def assert_rejected(message, error=ValueError, name="", **options):
        with pytest.raises(error, match=message):
            FolderImages(tmp_path / name, size=2, **options)

    assert_rejected(r"holds no image; files that end in \.bmp, .* count")
    (tmp_path / "notes.txt").write_text("no image")
    for classes in (False, True):
        assert_rejected("holds no image", classes=classes)
    assert_rejected("path must be a folder; got .*does not exist", FileNotFoundError, "nowhere")
    assert_rejected("path must be a folder", NotADirectoryError, "notes.txt")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 0}, ValueError),
        ({"size": 2.0}, ValueError),
        ({"size": 2, "channels": 4}, ValueError),
        ({"size": 2, "workers": 0}, ValueError),
    ],
)
def test_options_are_checked_before_the_folder_is_read(options, error):
    with pytest.raises(error, match=list(options)[-1]):
        FolderImages("nowhere", **options)


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp", "bad.tif"])
@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_file_that_is_no_image_is_named_when_the_folder_is_opened(tmp_path, name, content):
    save(tmp_path / "good.png", np.zeros((2, 2), np.uint8))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be decoded as an image"):
        FolderImages(tmp_path, size=2)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.bmp", "cut.webp", "cut.tif"])
def test_a_file_that_is_cut_is_named_at_the_latest_when_it_is_loaded(tmp_path, name):
    save(tmp_path / "good.png", random_bytes(64, 64, 3))
    save(tmp_path / name, random_bytes(64, 64, 3))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=f"{name} cannot be decoded as an image"):
        whole(FolderImages(tmp_path, size=8))
    if name in ("cut.png", "cut.jpg", "cut.bmp"):  # whose headers are whole
        images = FolderImages(tmp_path, size=8)
        good = [file.name for file in images.files].index("good.png")
        assert images.load(torch.tensor([good])).shape == (1, 3, 8, 8)


def test_a_wrong_checksum_and_a_vanished_file_are_named(tmp_path):
    file = tmp_path / "a.png"
    save(file, random_bytes(16, 16))
    images = FolderImages(tmp_path, size=16)
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        whole(images)
    file.unlink()
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded as an image: .*No such file"):
        whole(images)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (6, 9), (9, 6), (6, 7), (1, 5)])
def test_the_central_square_is_cut_out(tmp_path, height, width):
    pixels = random_bytes(height, width, 3)
    save(tmp_path / "a.png", pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    assert np.array_equal(only(tmp_path, size=side), square.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [5, 16, 40, 100])
def test_the_square_is_resized_by_a_widened_cubic(tmp_path, size):
    pixels = random_bytes(40, 60, 3)
    save(tmp_path / "a.png", pixels)
    got = only(tmp_path, size=size)
    square = pixels[:, 10:50]
    pillow = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(pillow).transpose(2, 0, 1))
    # Pillow rounds and clamps after rows and again after columns; its weights have 22 bits, so
    # that a tie may go the other way.
    weights = cubic_weights(40, size)
    rows = np.einsum("ji,hic->hjc", weights, square).round().clip(0, 255)
    both = np.einsum("jh,hic->jic", weights, rows).round().clip(0, 255)
    assert np.abs(both.transpose(2, 0, 1) - got).max() <= 1
    assert np.mean(both.transpose(2, 0, 1) == got) > 0.98


def test_transparent_images_are_laid_over_white(tmp_path):
    colour = random_bytes(4, 4, 3)
    alpha = np.array([0, 255, 128, 64] * 4, np.uint8).reshape(4, 4, 1)
    save(tmp_path / "a.png", np.concatenate([colour, alpha], -1))
    over = (colour * (alpha / 255) + 255 * (1 - alpha / 255)).transpose(2, 0, 1)
    got = only(tmp_path, size=4)
    assert np.abs(got - over).max() <= 1
    assert np.array_equal(got[:, :, 1], colour[:, 1].T)
    assert (got[:, :, 0] == 255).all()


def test_palettes_are_looked_up_and_their_transparency_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image = image.resize((2, 2))
    image.save(tmp_path / "a.png")
    assert only(tmp_path, size=2)[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    image.save(tmp_path / "a.png", transparency=1)
    assert only(tmp_path, size=2)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_becomes_three_equal_channels_and_colour_grey(tmp_path):
    grey = random_bytes(3, 3)
    save(tmp_path / "a.png", grey)
    assert np.array_equal(only(tmp_path, size=3), np.stack([grey] * 3))
    assert np.array_equal(only(tmp_path, size=3, channels=1), grey[None])
    colour = random_bytes(3, 3, 3)
    save(tmp_path / "a.png", colour)
    luma = colour @ np.array([0.299, 0.587, 0.114])  # Rec. 601
    assert np.abs(only(tmp_path, size=3, channels=1)[0] - luma).max() <= 0.51


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path, suffix, channels):
    deep = np.array([[0, 128, 129], [257, 32768, 65406], [65407, 65535, 400]], np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    want = np.rint(deep / 257)
    assert np.array_equal(only(tmp_path, size=3, channels=channels), [want] * channels)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_scale_are_rejected(tmp_path, dtype):
    Image.fromarray(np.zeros((2, 2), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be decoded.*mode [IF]; 8 bits"):
        FolderImages(tmp_path, size=2)


def test_cmyk_and_bilevel_images_become_rgb(tmp_path):
    save(tmp_path / "a.tif", np.full((4, 4, 3), (200, 100, 50), np.uint8), "CMYK")
    assert only(tmp_path, size=4)[:, 0, 0].tolist() == [200, 100, 50]
    (tmp_path / "a.tif").unlink()
    save(tmp_path / "a.jpg", np.full((8, 8, 3), (200, 100, 50), np.uint8), "CMYK", quality=95)
    assert only(tmp_path, size=8)[:, 0, 0].tolist() == pytest.approx([200, 100, 50], abs=4)
    (tmp_path / "a.jpg").unlink()
    Image.fromarray(np.array([[True, False], [False, True]])).save(tmp_path / "a.png")
    assert only(tmp_path, size=2, channels=1).tolist() == [[[255, 0], [0, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_applied(tmp_path, orientation):
    upright = random_bytes(3, 3)
    # A camera stores the inverse of the operation that the tag names (EXIF 2.3, 4.6.4).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(only(tmp_path, size=3, channels=1)[0], upright)


def test_the_first_of_several_frames_counts(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert not only(tmp_path, size=4).any()


def test_threads_and_pickling_change_nothing(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.jpg", random_bytes(20, 30, 3, seed=i))
    rows = torch.tensor([8, 0, 0, 5, 3, 1, 2])
    one, many = (FolderImages(tmp_path, size=8, workers=n) for n in (1, 7))
    for images in (many, pickle.loads(pickle.dumps(many))):
        assert torch.equal(images.load(rows), one.load(rows))
