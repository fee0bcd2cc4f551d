"""Pictures are decoded once into a file of the cache, which trainings share."""

import os
import shutil
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from cldsde.images.data import FolderImages, channel_statistics
from cldsde.images.data import folder as decoded
from image_data import random_bytes, save, whole

COUNT = 70  # pictures; 64 are decoded at a time


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("CLDSDE_CACHE", str(tmp_path / "cache"))
    for i in range(COUNT):
        save(tmp_path / "photos" / f"{i:02d}.png", random_bytes(9, 12, 3, seed=i))
    return tmp_path / "photos"


@pytest.fixture
def decode(monkeypatch):
    """A spy on the decoder."""
    spy = mock.Mock(wraps=decoded._decode)
    monkeypatch.setattr(decoded, "_decode", spy)
    return spy


def files(folder, suffix):
    return sorted((folder.parent / "cache" / "decoded").glob(f"*.{suffix}"))


def test_pictures_are_decoded_once_and_an_interrupted_call_resumes(photos, decode, capsys):
    expected = whole(FolderImages(photos, size=8, cache=None))

    def interrupted(file, *_):
        if file.name == "66.png":
            raise KeyboardInterrupt
        return mock.DEFAULT

    decode.side_effect = interrupted
    with pytest.raises(KeyboardInterrupt):
        FolderImages(photos, size=8).keep_decoded(progress=True)
    assert "decoding" in capsys.readouterr().err
    decode.side_effect = None
    decode.reset_mock()
    images = FolderImages(photos, size=8).subset(torch.arange(2, COUNT))
    assert images.decodes_once
    images.keep_decoded()
    assert decode.call_count == COUNT - 64
    assert not images.decodes_once
    again = FolderImages(photos, size=8)
    assert torch.equal(whole(images), expected[2:])
    assert torch.equal(whole(again), expected)
    assert decode.call_count == COUNT - 64


@pytest.mark.parametrize("change", ["cut", "time", "decoder"])
def test_what_changed_or_was_cut_off_is_decoded_again(photos, decode, monkeypatch, change):
    FolderImages(photos, size=8).keep_decoded()
    [rows] = files(photos, "rows")
    if change == "cut":
        rows.write_bytes(rows.read_bytes()[:-1])
    elif change == "time":
        os.utime(photos / "03.png", ns=(1, 1))
    else:
        monkeypatch.setattr(PIL, "__version__", "0")
    decode.reset_mock()
    images = FolderImages(photos, size=8)
    images.keep_decoded()
    assert decode.call_count == COUNT
    assert torch.equal(whole(images), whole(FolderImages(photos, size=8, cache=None)))


@pytest.mark.parametrize("options", [{}, {"channels": 1, "bits": 16}])
def test_statistics_are_kept_with_the_pictures(photos, monkeypatch, options):
    rows = torch.arange(0, COUNT, 3)
    expected = channel_statistics(FolderImages(photos, size=8, cache=None, **options).subset(rows))
    images = FolderImages(photos, size=8, **options).subset(rows)
    images.keep_decoded()
    assert all(map(torch.equal, channel_statistics(images), expected))
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_mapped", lambda *_: pytest.fail("pictures were read"))
        assert all(map(torch.equal, channel_statistics(images), expected))
    for file in files(photos, "*.npy"):
        file.write_bytes(b"")
    assert torch.equal(channel_statistics(images)[0], expected[0])


def test_damaged_pictures_are_left_out_without_looking_again(photos, decode):
    for name in ("05.png", "66.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:-40])
    options = {"size": 8, "skip_damaged": True}
    expected = whole(FolderImages(photos, cache=None, **options))
    FolderImages(photos, **options).keep_decoded()
    assert decode.call_count == 2 * (COUNT - 2)
    again = FolderImages(photos, **options)
    assert torch.equal(whole(again), expected)
    assert len(again) == COUNT - 2
    assert [file.name for file in again.files[4:6]] == ["04.png", "06.png"]
    assert "05.png cannot be decoded" in again.skipped[0]
    assert decode.call_count == 2 * (COUNT - 2)
    with pytest.raises(ValueError, match=r"05\.png cannot .*; nor can .*66\.png"):
        FolderImages(photos, size=8)


@pytest.mark.parametrize(
    ("reason", "message"),
    [("limit", "data.options.cache_gib allows 1e-06"), ("full", "are free"), ("error", "No space")],
)
def test_pictures_that_cannot_be_kept_are_decoded_when_needed(
    photos, monkeypatch, capsys, reason, message
):
    if reason == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=9999))
    elif reason == "error":
        monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space")))
    images = FolderImages(photos, size=8, cache_gib=1e-6 if reason == "limit" else 1)
    images.keep_decoded()
    note = capsys.readouterr().err
    assert "note: decoded pictures cannot be kept in" in note
    assert message in note
    assert torch.equal(whole(images), whole(FolderImages(photos, size=8, cache=None)))
    assert not files(photos, "part")


def test_the_files_unused_for_the_longest_time_make_room(photos):
    size = COUNT * 3 * 64
    for side in (8, 4):
        FolderImages(photos, size=side).keep_decoded()
    first, second = sorted(files(photos, "rows"), key=lambda x: -x.stat().st_size)
    other = first.with_name("notes.txt")
    other.write_text("not ours")
    for file, seconds in ((first, 100), (second, 200)):
        for part in first.parent.glob(f"{file.stem}*"):
            os.utime(part, (seconds, seconds))
    FolderImages(photos, size=8).keep_decoded()  # used
    FolderImages(photos, size=6, cache_gib=1.6 * size / 2**30).keep_decoded()
    assert first.exists()
    assert not [*second.parent.glob(f"{second.stem}*")]
    assert other.exists()


def test_numbers_of_16_bit_pictures_are_kept(photos):
    numbers = np.random.default_rng(0).integers(0, 2**16, (2, 8, 8)).astype(np.uint16)
    for i, pixels in enumerate(numbers):
        save(photos / "16" / f"{i}.png", pixels)
    save(photos / "16" / "8.png", np.full((8, 8), 200, np.uint8))
    wide = np.zeros((16, 16), np.uint16)
    wide[8:] = 65535
    Image.fromarray(wide).save(photos / "16" / "9.tif")
    options = {"size": 8, "channels": 1, "bits": 16}
    for keep in (False, True):
        images = FolderImages(photos / "16", **options)
        if keep:
            images.keep_decoded()
        found = whole(images)
        assert (found.dtype, images.levels) == (torch.float32, (0.0, 65535.0))
        assert np.array_equal(found[:2, 0].numpy(), numbers.astype(np.float32))
        assert bool((found[2] == 200 * 257).all())  # 65535 = 257 · 255
        assert float(found.min()) == 0 < float(found[3, 0, 3, 0]) < float(found[3, 0, 4, 0])
        assert float(found.max()) == 65535
    with pytest.raises(ValueError, match="bits must be 8 for colours"):
        FolderImages(photos, size=8, bits=16)
