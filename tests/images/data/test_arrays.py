"""Arrays are read in every layout, and a file that cannot be read is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cldsde.images.data import array_file
from image_data import random_bytes, whole
from probes import generator


@pytest.mark.parametrize(
    ("shape", "layout", "axes"),
    [
        ((10, 5, 6), "auto", "NHW"),
        ((10, 5, 6, 3), "auto", "NHWC"),
        ((10, 5, 6, 1), "auto", "NHWC"),
        ((10, 3, 5, 6), "auto", "NCHW"),
        ((10, 1, 5, 6), "auto", "NCHW"),
        ((10, 3, 5, 3), "NHWC", "NHWC"),
        ((10, 3, 5, 3), "NCHW", "NCHW"),
        ((10, 5, 3), "NHW", "NHW"),
        ((10, 2, 5, 6), "NCHW", "NCHW"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_are_read_in_every_layout(tmp_path, shape, layout, axes, kind):
    pixels = random_bytes(*shape)
    file = tmp_path / f"images.{kind}"
    np.save(file, pixels) if kind == "npy" else np.savez_compressed(file, pixels)
    data = array_file(path=file, layout=layout, held_out=3)
    order = torch.randperm(10, generator=generator()).numpy()
    want = np.einsum(f"{axes.lower()}->{''.join(a for a in 'nchw' if a in axes.lower())}", pixels)
    want = want.reshape(10, -1, *want.shape[-2:])
    assert np.array_equal(whole(data.held_out).numpy(), want[order[:3]])
    assert np.array_equal(whole(data.train).numpy(), want[order[3:]])


@pytest.mark.parametrize("shape", [(10, 3, 5, 3), (10, 5, 6, 2), (10, 5, 3), (3, 5, 6), (10, 5)])
def test_ambiguous_shapes_are_rejected(tmp_path, shape):
    np.save(tmp_path / "a.npy", random_bytes(*shape))
    with pytest.raises(ValueError, match="layout must be given, as NHW, NHWC or NCHW"):
        array_file(path=tmp_path / "a.npy")


def test_labels_come_from_the_archive_or_another_file(tmp_path):
    pixels, labels = random_bytes(10, 4, 4), random_bytes(10, levels=3).astype(np.int32)
    np.savez(tmp_path / "a.npz", pictures=pixels, kinds=labels)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", labels)
    order = torch.randperm(10, generator=generator()).numpy()
    for options in (
        {"path": tmp_path / "a.npz", "labels": "kinds"},
        {"path": tmp_path / "a.npz", "images": "pictures", "labels": "kinds"},
        {"path": str(tmp_path / "a.npy"), "labels": str(tmp_path / "b.npy")},
    ):
        data = array_file(**options)
        assert np.array_equal(data.train.labels.numpy(), labels[order[1:]])
        assert data.held_out.classes == 3


class Unpickled:
    """Fails if it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("an array was unpickled",))


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_damaged_arrays_and_pickles_are_named(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    write = np.save if kind == "npy" else np.savez

    def assert_rejected(message="", error=ValueError):
        with pytest.raises(error, match=rf"a\.{kind} cannot be read{message}"):
            array_file(path=file)

    write(file, random_bytes(10, 8, 8))
    content = file.read_bytes()
    file.write_bytes(content[:-300])
    assert_rejected()
    if kind == "npz":
        file.write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
        assert_rejected(".*CRC")
    file.write_bytes(b"no array")
    assert_rejected()
    write(file, np.array([Unpickled()] * 3, dtype=object), allow_pickle=True)
    assert_rejected()


TEN = {"a": (10, 4, 4)}


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({}, {}, "images must name"),
        ({"a": (10, 4, 4), "b": (10, 4, 4)}, {}, "for 2 arrays of .* holds a and b"),
        ({"a": (10,)}, {}, "images must name .* 0 arrays"),
        (TEN, {"images": "b"}, "images must be an array of .*: a; got"),
        (TEN, {"labels": "b"}, "labels must be an array of .*: a; got"),
        ({**TEN, "l": (9,)}, {"labels": "l"}, r"labels must be .*\(10,\)"),
        (TEN, {"levels": 16}, "values in 0 … 15"),
        (TEN, {"layout": "NHWC"}, "layout NHWC must have 4 axes"),
        (TEN, {"layout": "HWC"}, "layout: must be 'auto', 'NHW'"),
        ({"a": (0, 4, 4)}, {}, "at least one image"),
    ],
)
def test_arrays_that_do_not_fit_are_rejected(tmp_path, arrays, options, message):
    named = {name: random_bytes(*shape) for name, shape in arrays.items()}
    np.savez(tmp_path / "a.npz", **named)
    with pytest.raises(ValueError, match=message):
        array_file(path=tmp_path / "a.npz", **options)


def test_other_files_and_types_are_rejected(tmp_path):
    def assert_rejected(message, error=ValueError, name="a.npy", **options):
        with pytest.raises(error, match=message):
            array_file(path=tmp_path / name, **options)

    np.save(tmp_path / "a.npy", random_bytes(10, 4, 4) / 255)
    np.save(tmp_path / "b.npy", np.zeros(10))
    assert_rejected(r"a\.npy must hold images of uint8; got float64", TypeError)
    np.save(tmp_path / "a.npy", random_bytes(10, 4, 4))
    assert_rejected("labels must be integers", labels=str(tmp_path / "b.npy"))
    assert_rejected(r"labels must be a \.npy", FileNotFoundError, labels="kinds")
    assert_rejected(r"images names an array of a \.npz", images="kinds")
    message = r"path must be a file; got .*nowhere\.npy"
    assert_rejected(message, FileNotFoundError, "nowhere.npy")


def test_a_mapped_file_is_not_changed(tmp_path):
    np.save(tmp_path / "a.npy", random_bytes(10, 4, 4))
    before = (tmp_path / "a.npy").read_bytes()
    whole(array_file(path=tmp_path / "a.npy").train).zero_()
    assert (tmp_path / "a.npy").read_bytes() == before
