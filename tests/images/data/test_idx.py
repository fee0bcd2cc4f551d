"""Fashion-MNIST is what its files hold, and a damaged file is named."""

from __future__ import annotations

import gzip
from itertools import product

import numpy as np
import pytest

from cldsde.images.data import channel_statistics, fashion_mnist
from image_data import STEMS, cubic_weights, idx, random_bytes, whole, write_fashion


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_plain_and_compressed(tmp_path, zipped):
    arrays = write_fashion(tmp_path, zipped=zipped)
    for part, (pixels, labels) in zip(fashion_mnist(path=str(tmp_path)), arrays, strict=True):
        assert np.array_equal(whole(part)[:, 0].numpy(), pixels)
        assert np.array_equal(part.labels.numpy(), labels)
        assert part.classes == 10
        assert part.class_names[9] == "Ankle boot"


def test_32_pixels_are_28_with_a_black_frame(tmp_path):
    ((pixels, _), _) = write_fashion(tmp_path, zipped=True)
    train = fashion_mnist(path=tmp_path, size=32).train
    assert np.array_equal(whole(train)[:, 0].numpy(), np.pad(pixels, ((0, 0), (2, 2), (2, 2))))


def test_16_pixels_are_28_under_a_widened_cubic(tmp_path):
    ((pixels, _), _) = write_fashion(tmp_path, zipped=True)
    small = whole(fashion_mnist(path=tmp_path, size=16).train)[:, 0].numpy()
    weights = cubic_weights(28, 16)
    exact = (weights @ pixels @ weights.T).clip(0, 255)
    # Half of a level of rounding, and float32's of numbers up to 255.
    assert np.abs(small - exact).max() < 0.5 + 1e-3


TRAIN_IMAGES, TRAIN_LABELS = (f"{stem}.gz" for stem in STEMS["train"])
T10K_LABELS = f"{STEMS['t10k'][1]}.gz"


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        (TRAIN_IMAGES, lambda b: b"\0\0\x0d\x03" + b[4:], "must be an IDX file"),
        (TRAIN_IMAGES, lambda b: b"\0\0\x08\x01" + b[4:], "must be an IDX file"),
        (T10K_LABELS, lambda b: b"", "must be an IDX file"),
        (T10K_LABELS, lambda b: b[:6], "got 6 bytes that begin"),
        (TRAIN_IMAGES, lambda b: b[:-1], "N × 28 × 28 bytes; got 9423 bytes"),
        (TRAIN_IMAGES, lambda b: b + b"\0", "N × 28 × 28 bytes; got 9425 bytes"),
        (
            TRAIN_IMAGES,
            lambda b: idx(random_bytes(12, 27, 28)),
            "N × 28 × 28 bytes; .* 0000000c 0000001b",
        ),
        (TRAIN_LABELS, lambda b: idx(random_bytes(11, levels=10)), "12 images; got 11 labels"),
        (T10K_LABELS, lambda b: b[:-1] + b"\x0a", "0 … 9 .* up to 10"),
        (TRAIN_IMAGES, None, "cannot be read: .*end-of-stream"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, alter, message):
    write_fashion(tmp_path, zipped=True)
    file = tmp_path / name
    if alter is None:
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.write_bytes(gzip.compress(alter(gzip.decompress(file.read_bytes()))))
    with pytest.raises(ValueError, match=f"{name[:-3]}.*{message}"):
        fashion_mnist(path=tmp_path)


def test_no_byte_of_a_compressed_file_can_change_unnoticed(tmp_path):
    write_fashion(tmp_path, zipped=True, counts=(2, 1))
    file = tmp_path / TRAIN_LABELS
    content = file.read_bytes()
    padded = len(content) - 9  # the last byte before checksum and size may have unused bits
    for where, bit in product({*range(10, len(content))} - {padded}, (0, 7)):
        changed = bytearray(content)
        changed[where] ^= 1 << bit
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=TRAIN_LABELS):
            fashion_mnist(path=tmp_path)


def test_a_missing_idx_file_and_a_missing_folder_are_named(tmp_path):
    write_fashion(tmp_path, zipped=True)
    (tmp_path / TRAIN_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match="neither train-labels-idx1-ubyte nor"):
        fashion_mnist(path=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path must be a folder; got .*nowhere"):
        fashion_mnist(path=tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        fashion_mnist(path=tmp_path / TRAIN_IMAGES)
    with pytest.raises(ValueError, match="size: must be 16, 28 or 32; got 64"):
        fashion_mnist(path=tmp_path / "nowhere", size=64)


def test_fashion_mnist_is_found_by_the_environment(tmp_path, monkeypatch):
    write_fashion(tmp_path / "a" / "fashion-mnist", zipped=True, counts=(2, 1))
    write_fashion(tmp_path / "b" / "cldsde" / "fashion-mnist", zipped=False, counts=(3, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("CLDSDE_DATA", str(tmp_path / "a"))
    assert len(fashion_mnist().train) == 2
    monkeypatch.setenv("CLDSDE_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr("cldsde.images.data.idx._DEBIAN", tmp_path / "nowhere")
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
