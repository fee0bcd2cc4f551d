"""Picture files are opened with care on every route."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from PIL import Image

from cldsde.images.data import FolderImages
from cldsde.images.data.pictures import read_picture
from cldsde.images.data.samples import load_samples
from cldsde.images.figures import is_whole_picture
from cldsde.images.sample.observed import _read
from image_data import random_bytes, save

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


ROUTES = {
    "data": lambda file: FolderImages(file.parent, size=8),
    "samples": lambda file: load_samples(file.parent),
    "known": lambda file: _read(file, 3, "known"),
    "mask": lambda file: _read(file, 1, "mask"),
    "one": read_picture,
}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


@every_route
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


def test_damaged_pictures_are_not_whole(tmp_path):
    save(tmp_path / "x.png", random_bytes(16, 16))
    assert is_whole_picture(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[:-20])
    assert not is_whole_picture(tmp_path / "x.png")
    assert not is_whole_picture(tmp_path / "y.png")


def test_every_damaged_file_is_named_and_can_be_skipped(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", random_bytes(16, 16, seed=i))
    for i in (1, 3):
        content = bytearray((tmp_path / f"{i}.png").read_bytes())
        content[content.index(b"IDAT") + 20] ^= 0x10
        (tmp_path / f"{i}.png").write_bytes(content)
    (tmp_path / "notes.txt").write_text("text")
    images = FolderImages(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"1\.png cannot .*nor can 1 others: .*3\.png"):
        images.load(torch.arange(4))
    rest = FolderImages(tmp_path, size=8, skip_damaged=True)
    assert [file.name for file in rest.files] == ["0.png", "2.png"]
    assert rest.load(torch.arange(2)).shape == (2, 3, 8, 8)
    assert [reason.rpartition("/")[2][:5] for reason in rest.skipped[:2]] == ["1.png", "3.png"]
    assert rest.skipped[2] == "1 files that end in .txt"
