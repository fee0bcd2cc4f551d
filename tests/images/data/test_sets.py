"""Data sets are what their sources say, split into a training and a held-out part."""

from __future__ import annotations

import bz2
import pickle
import struct
import sys
from inspect import Parameter, signature

import numpy as np
import pytest
import torch

from cldsde.images.data import DATA_SETS, digits, fashion_mnist, image_folder, torchvision_set
from cldsde.images.schema import checked_options
from image_data import STEMS, idx, random_bytes, save, whole, write_fashion
from probes import generator

torchvision = pytest.importorskip("torchvision")


def test_digits_are_scikit_learns_split_by_a_permutation():
    from sklearn.datasets import load_digits

    source = load_digits()
    order = torch.randperm(1797, generator=generator(3))
    parts = digits(held_out=0.2, seed=3)
    for part, rows in ((parts.held_out, order[:359]), (parts.train, order[359:])):
        assert np.array_equal(whole(part)[:, 0].numpy(), source.images[rows])
        assert np.array_equal(part.labels.numpy(), source.target[rows])
        assert (part.shape, part.levels, part.classes) == ((1, 8, 8), 17, 10)
        assert part.class_names == tuple("0123456789")


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_number_held_out_is_a_number_of_images(count):
    data = digits(held_out=count)
    assert len(data.train) == 1797 - count
    assert data.held_out is None if count == 0 else len(data.held_out) == count


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"held_out": -0.1}, ValueError),
        ({"held_out": 1.5}, ValueError),
        ({"held_out": float("nan")}, ValueError),
        ({"held_out": float("inf")}, ValueError),
        ({"held_out": "0.2"}, ValueError),
        ({"held_out": 1e-6}, ValueError),
        ({"held_out": 1797}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 0.5}, ValueError),
    ],
)
def test_an_impossible_split_is_rejected(options, error):
    with pytest.raises(error, match=next(iter(options))):
        digits(**options)


def test_torchvisions_idx_files_are_the_same_images(tmp_path):
    arrays = write_fashion(tmp_path / "FashionMNIST" / "raw", zipped=False)
    data = torchvision_set(name="FashionMNIST", path=tmp_path)
    own = fashion_mnist(path=tmp_path / "FashionMNIST" / "raw")
    for part, same, (pixels, labels) in zip(data, own, arrays, strict=True):
        assert np.array_equal(whole(part)[:, 0].numpy(), pixels)
        assert np.array_equal(part.labels.numpy(), labels)
        assert part.class_names == same.class_names


def test_cifar10s_pickles_are_read_as_torchvision_shows_them(tmp_path, monkeypatch):
    source = torchvision.datasets.CIFAR10
    folder = tmp_path / source.base_folder
    folder.mkdir()
    for number, (name, _) in enumerate(source.train_list + source.test_list):
        content = {
            "data": random_bytes(3, 3072, seed=number),
            "labels": random_bytes(3, levels=10, seed=number).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    # The published checksums are of the published files.
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[name, None] for name, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})

    data = torchvision_set(name="CIFAR10", path=str(tmp_path))
    assert (len(data.train), len(data.held_out)) == (15, 3)
    assert data.train.class_names == tuple(meta["label_names"])
    for part, train in ((data.train, True), (data.held_out, False)):
        shown = source(str(tmp_path), train=train)
        for i, (image, label) in enumerate(shown):
            pixels = np.asarray(image).transpose(2, 0, 1)
            assert np.array_equal(part.load(torch.tensor([i]))[0].numpy(), pixels)
            assert part.labels[i] == label


def test_stl10_keeps_channels_first_and_labels_from_zero(tmp_path, monkeypatch):
    source = torchvision.datasets.STL10
    folder = tmp_path / source.base_folder
    folder.mkdir()
    for name, _ in source.train_list + source.test_list:
        size = (2,) if name.endswith("y.bin") else (2, 3, 96, 96)
        pixels = random_bytes(*size, levels=9) + 1
        (folder / name).write_bytes(pixels.tobytes())
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[name, None] for name, _ in getattr(source, part)])
    data = torchvision_set(name="STL10", path=tmp_path)
    stored = np.fromfile(folder / "train_X.bin", np.uint8).reshape(2, 3, 96, 96)  # by columns
    assert np.array_equal(whole(data.train).numpy(), stored.swapaxes(2, 3))
    assert np.array_equal(data.train.labels + 1, np.fromfile(folder / "train_y.bin", np.uint8))


def test_svhns_ten_is_zero(tmp_path, monkeypatch):
    from scipy.io import savemat

    source = torchvision.datasets.SVHN
    files = {part: [url, name, None] for part, (url, name, _) in source.split_list.items()}
    monkeypatch.setattr(source, "split_list", files)
    pixels, labels = random_bytes(32, 32, 3, 10), np.arange(1, 11, dtype=np.uint8)[:, None]
    for part in ("train", "test"):
        savemat(tmp_path / files[part][1], {"X": pixels, "y": labels})
    train = torchvision_set(name="SVHN", path=tmp_path).train
    assert np.array_equal(whole(train).numpy(), np.moveaxis(pixels, (3, 2), (0, 1)))
    assert train.labels.tolist() == [*range(1, 10), 0]
    assert (train.classes, train.class_names) == (10, None)


def test_of_qmnists_labels_the_class_is_kept(tmp_path):
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    details = np.arange(32, dtype=">i4").reshape(4, 8) % 10
    for part in ("train", "test"):
        (folder / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(random_bytes(4, 28, 28)))
        content = struct.pack(">BBBB2I", 0, 0, 12, 2, 4, 8) + details.astype(">i4").tobytes()
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(content)
    train = torchvision_set(name="QMNIST", path=tmp_path).train
    assert np.array_equal(whole(train)[:, 0].numpy(), random_bytes(4, 28, 28))
    assert train.labels.tolist() == details[:, 0].tolist()


def test_usps_is_read_from_its_text(tmp_path):
    line = "10 " + " ".join(f"{i + 1}:{-1 if i % 2 else 1}" for i in range(256)) + "\n"
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(line.encode()))
    held_out = torchvision_set(name="USPS", path=tmp_path).held_out
    assert whole(held_out).flatten().tolist() == [255, 0] * 128
    assert held_out.labels.tolist() == [9]


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "SVHN", "STL10", "USPS"])
def test_a_missing_set_names_folder_and_option(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is not in {tmp_path}.*download=True"):
        torchvision_set(name=name, path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cut_file_of_a_set_is_named(tmp_path):
    write_fashion(tmp_path / "MNIST" / "raw", zipped=False)
    file = tmp_path / "MNIST" / "raw" / STEMS["train"][0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=r"MNIST is not in .* or is damaged there"):
        torchvision_set(name="MNIST", path=tmp_path)


def test_an_unknown_set_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"name: must be 'CIFAR10', .* or 'USPS'; got 'ImageNet'"):
        torchvision_set(name="ImageNet", path=tmp_path)


def test_without_torchvision_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        torchvision_set(name="MNIST", path=tmp_path)


def test_a_folder_is_split_at_random(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i // 5}" / f"{i}.png", np.full((2, 2), i, np.uint8))
    data = image_folder(path=tmp_path, size=2, channels=1, classes=True, held_out=0.3, seed=1)
    order = torch.randperm(10, generator=generator(1))
    for part, rows in ((data.held_out, order[:3]), (data.train, order[3:])):
        assert torch.equal(whole(part)[:, 0, 0, 0].long(), rows)
        assert torch.equal(part.labels, rows // 5)
        assert part.classes == 2


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_becomes_options_of_a_configuration(name):
    make = DATA_SETS[name]
    parameters = signature(make).parameters.values()
    assert {parameter.kind for parameter in parameters} == {Parameter.KEYWORD_ONLY}
    given = {"path": "folder", "size": 32, "name": "MNIST"}
    options = {p.name: given[p.name] for p in parameters if p.default is Parameter.empty}
    options |= {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    assert checked_options(make, options) == options
