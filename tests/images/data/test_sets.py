"""Data sets are what their sources say, split into a training and a held-out part."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from scipy.io import savemat
from sklearn.datasets import load_digits

from cldsde.images import data as sets
from cldsde.images.data import channel_statistics, digits, fashion_mnist, torchvision_set
from image_data import STEMS, cubic_weights, idx, random_bytes, save, whole, write_fashion
from probes import generator
from tolerances import rounding


def test_digits_are_scikit_learns_split_by_a_permutation():
    source = load_digits()
    order = torch.randperm(1797, generator=generator(3))
    parts = digits(held_out=0.2, seed=3)
    for part, rows in ((parts.held_out, order[:359]), (parts.train, order[359:])):
        assert np.array_equal(whole(part)[:, 0].numpy(), source.images[rows])
        assert np.array_equal(part.labels.numpy(), source.target[rows])
        assert (part.shape, part.levels, part.classes) == ((1, 8, 8), 17, 10)
        assert part.class_names == tuple("0123456789")
    for count in (0, 1, 100):
        data = digits(held_out=count)
        assert len(data.train) == 1797 - count
        assert data.held_out is None if count == 0 else len(data.held_out) == count


@pytest.mark.parametrize(
    ("key", "value"), [("held_out", -0.1), ("held_out", 1.5), ("held_out", 1e-6), ("seed", -1)]
)
def test_an_impossible_split_is_rejected(key, value):
    with pytest.raises(ValueError, match=key):
        digits(**{key: value})


def test_compressed_idx_files_are_read(tmp_path):
    arrays = write_fashion(tmp_path, zipped=True)
    for part, array in zip(fashion_mnist(path=str(tmp_path)), arrays, strict=True):
        assert_holds(part, *array)
        assert part.class_names[9] == "Ankle boot"


def test_32_pixels_have_a_black_frame_and_16_are_28_under_a_widened_cubic(tmp_path):
    ((pixels, _), _) = write_fashion(tmp_path, zipped=True)
    large, small = (
        whole(fashion_mnist(path=tmp_path, size=size).train)[:, 0].numpy() for size in (32, 16)
    )
    assert np.array_equal(large, np.pad(pixels, ((0, 0), (2, 2), (2, 2))))
    weights = cubic_weights(28, 16)
    exact = (weights @ pixels @ weights.T).clip(0, 255)
    nearest = 0.5 + rounding(2 * 28, 255, torch.float32)  # sums over rows and columns
    assert np.abs(small - exact).max() < nearest


TRAIN_IMAGES, TRAIN_LABELS = (f"{stem}.gz" for stem in STEMS["train"])
T10K_LABELS = f"{STEMS['t10k'][1]}.gz"


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        (TRAIN_IMAGES, lambda b: b"\0\0\x0d\x03" + b[4:], "must be an IDX file"),
        (TRAIN_IMAGES, lambda b: b[:-1], "× 28 × 28 bytes; got 9423 bytes"),
        (TRAIN_IMAGES, lambda b: idx(random_bytes(12, 27, 28)), "28 bytes; .* 0000000c 0000001b"),
        (TRAIN_IMAGES, None, "cannot be read: .*end-of-stream"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, alter, message):
    write_fashion(tmp_path, zipped=True)
    content = (tmp_path / name).read_bytes()
    damaged = gzip.compress(alter(gzip.decompress(content))) if alter else content[:-20]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name[:-3]}.*{message}"):
        fashion_mnist(path=tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write_fashion(tmp_path, zipped=True)
    (tmp_path / TRAIN_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match="neither train-labels-idx1-ubyte nor"):
        fashion_mnist(path=tmp_path)


def test_fashion_mnist_is_found_by_the_environment(tmp_path, monkeypatch):
    write_fashion(tmp_path / "a" / "fashion-mnist", zipped=True, counts=(2, 1))
    write_fashion(tmp_path / "b" / "cldsde" / "fashion-mnist", zipped=False, counts=(3, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("CLDSDE_DATA", str(tmp_path / "a"))
    assert len(fashion_mnist().train) == 2
    monkeypatch.setenv("CLDSDE_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("cldsde.images.data.sets._DEBIAN", tmp_path / "nowhere")
    assert len(fashion_mnist().train) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"apt install dataset-fashion-mnist.*download"):
        fashion_mnist()


def test_the_published_fashion_mnist():
    try:
        data = fashion_mnist()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert (len(data.train), len(data.held_out)) == (60000, 10000)
    assert data.train.shape == data.held_out.shape == (1, 28, 28)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.held_out.labels.bincount().tolist() == [1000] * 10
    assert data.train.labels[0] == 9
    mean, variance = channel_statistics(data.train, per="scalar")
    # Mean and standard deviation as published, to four digits, on the scale [0, 1].
    assert round((float(mean) + 1) / 2, 4) == 0.2860
    assert round(float(variance.sqrt()) / 2, 4) == 0.3530


def assert_holds(part, pixels, labels):
    assert np.array_equal(whole(part)[:, 0].numpy(), pixels)
    assert np.array_equal(part.labels.numpy(), labels)


def test_torchvisions_idx_files_are_the_same_images(tmp_path):
    arrays = write_fashion(tmp_path / "FashionMNIST" / "raw", zipped=False)
    data = torchvision_set(name="FashionMNIST", path=tmp_path)
    own = fashion_mnist(path=tmp_path / "FashionMNIST" / "raw")
    for part, same, array in zip(data, own, arrays, strict=True):
        assert_holds(part, *array)
        assert_holds(same, *array)
        assert part.class_names == same.class_names


def test_cifar10s_pickles_are_read_as_torchvision_shows_them(tmp_path, monkeypatch):
    source = torchvision.datasets.CIFAR10
    folder = tmp_path / source.base_folder
    folder.mkdir()
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    for seed, (name, _) in enumerate(source.train_list + source.test_list):
        labels = random_bytes(3, levels=10, seed=seed).tolist()
        content = {"data": random_bytes(3, 3072, seed=seed), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(source, "_check_integrity", lambda _: True)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    data = torchvision_set(name="CIFAR10", path=str(tmp_path))
    assert (len(data.train), len(data.held_out)) == (15, 3)
    assert data.train.class_names == tuple(meta["label_names"])
    pictures, labels = zip(*source(str(tmp_path)), strict=True)
    assert np.array_equal(whole(data.train).numpy(), np.stack(pictures).transpose(0, 3, 1, 2))
    assert data.train.labels.tolist() == list(labels)


def test_svhns_ten_is_zero(tmp_path, monkeypatch):
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
    content = struct.pack(">BBBB2I", 0, 0, 12, 2, 4, 8) + details.astype(">i4").tobytes()
    for part in ("train", "test"):
        (folder / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(random_bytes(4, 28, 28)))
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(content)
    train = torchvision_set(name="QMNIST", path=tmp_path).train
    assert_holds(train, random_bytes(4, 28, 28), details[:, 0])


def test_a_missing_set_names_folder_and_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"CIFAR10 is not in {tmp_path}.*download=True"):
        torchvision_set(name="CIFAR10", path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_split_at_random(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i // 5}" / f"{i}.png", np.full((2, 2), i, np.uint8))
    data = sets.image_folder(path=tmp_path, size=2, channels=1, classes=True, held_out=0.3, seed=1)
    order = torch.randperm(10, generator=generator(1))
    for part, rows in ((data.held_out, order[:3]), (data.train, order[3:])):
        assert torch.equal(whole(part)[:, 0, 0, 0].long(), rows)
        assert torch.equal(part.labels, rows // 5)
        assert part.classes == 2
