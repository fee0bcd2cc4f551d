"""Pictures are read alike from folders, zip archives and saved data sets."""

import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cldsde.images.data import FolderImages, pictures
from cldsde.images.data.pictures import fitted
from image_data import random_bytes, save, whole

NAMES = ["cat/1.png", "cat/x/2.png", "dog/0.png"]


@pytest.fixture
def pets(tmp_path):
    for i, name in enumerate(NAMES):
        save(tmp_path / "pets" / name, random_bytes(9, 12, 3, seed=i))
    return tmp_path / "pets"


def archive(pets, outer="", **more):
    file = pets.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as target:
        for name in reversed(NAMES):
            target.write(pets / name, f"{outer}{name}")
        for name, content in more.items():
            target.writestr(name, content)
    return file


@pytest.mark.parametrize("outer", ["", "a/b/"])
def test_an_archive_holds_the_pictures_of_its_folder(pets, outer):
    extra = {"__MACOSX/cat/._1.png": "x", f"{outer}notes.txt": "x", "folder/": ""}
    images, folder = (
        FolderImages(path, size=8, classes=True)
        for path in (archive(pets, outer, **(extra if outer else {})), pets)
    )
    assert torch.equal(whole(images), whole(folder))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1]
    assert torch.equal(whole(pickle.loads(pickle.dumps(images))), whole(folder))


def test_archives_that_cannot_be_read_are_named(pets):
    file = archive(pets)
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pets\.zip, dog/0\.png cannot be decoded .*CRC"):
        FolderImages(file, size=8)
    assert len(FolderImages(file, size=8, skip_damaged=True)) == 2
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"pets\.zip cannot be read as a zip archive"):
        FolderImages(file, size=8)


def test_the_cache_of_an_archive_follows_its_content(pets, monkeypatch, tmp_path):
    options = {"size": 8, "cache": str(tmp_path / "kept")}
    for i in range(2):
        save(pets / NAMES[0], random_bytes(9, 12, 3, seed=i))
        images = FolderImages(archive(pets), **options)
        images.keep_decoded()
        assert torch.equal(whole(images), whole(FolderImages(pets, size=8, cache=None)))
    assert len([*(tmp_path / "kept").glob("*.rows")]) == 2


@pytest.fixture
def saved(pets):
    datasets = pytest.importorskip("datasets")
    features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])}
    columns = {"photo": [str(pets / name) for name in NAMES], "kind": [1, 1, 0]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.save_to_disk(pets.with_name("saved"))
    datasets.DatasetDict(a=table, b=table.remove_columns("kind")).save_to_disk(
        pets.with_name("splits")
    )
    return pets.with_name("saved")


def test_a_saved_data_set_holds_the_pictures_of_its_rows(pets, saved):
    images = FolderImages(saved, size=8, classes=True)
    assert torch.equal(whole(images), whole(FolderImages(pets, size=8)))
    assert images.class_names == ("dog", "cat")
    assert images.labels.tolist() == [1, 1, 0]
    assert FolderImages(saved, size=8).labels is None
    assert torch.equal(whole(pickle.loads(pickle.dumps(images))), whole(images))
    assert len(FolderImages(saved.with_name("splits") / "b", size=8)) == 3


def test_saved_data_sets_that_do_not_fit_are_named(saved, monkeypatch):
    splits = saved.with_name("splits")
    with pytest.raises(ValueError, match=r"path must name the folder of a split in .*: a or b"):
        FolderImages(splits, size=8)
    with pytest.raises(ValueError, match=r"one column of classes \(ClassLabel\); it has 0 among"):
        FolderImages(splits / "b", size=8, classes=True)
    (saved / "state.json").write_text("{")
    pictures._table.cache_clear()
    with pytest.raises(ValueError, match="saved cannot be loaded by datasets"):
        FolderImages(saved, size=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the library datasets, .* pip install datasets"):
        FolderImages(saved, size=8)


def test_the_central_part_of_a_picture_has_the_shape_of_the_images():
    image = Image.fromarray(random_bytes(9, 12))
    found = np.asarray(fitted(image, 6, 4))
    assert found.shape == (6, 4)
    assert np.array_equal(fitted(image.crop((3, 0, 9, 9)), 9, 6), np.asarray(image)[:, 3:9])
    assert np.array_equal(fitted(image, 3, 12), np.asarray(image)[3:6])
