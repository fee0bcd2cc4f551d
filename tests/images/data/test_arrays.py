"""Images in memory and in array files: rows, layouts, labels, and files that cannot be read."""

import numpy as np
import pytest
import torch

from cldsde.images.data import ArrayImages, array_file
from image_data import PIXELS, random_bytes, whole
from probes import generator


def test_rows_are_loaded_in_any_order_and_again():
    pixels = torch.from_numpy(random_bytes(7, 2, 3, 4))
    images, rows = ArrayImages(pixels), torch.tensor([6, 0, 0, 3])
    assert torch.equal(images.load(rows), pixels[rows])
    assert (len(images), images.shape, images.levels, images.labels) == (7, (2, 3, 4), 256, None)
    before = pixels.clone()
    images.load(torch.arange(7)).fill_(9)
    assert torch.equal(whole(images), before)


def test_a_subset_keeps_rows_with_their_labels_and_all_classes():
    pixels, labels = torch.from_numpy(random_bytes(5, 1, 2, 2, levels=4)), torch.arange(5) % 3
    images = ArrayImages(pixels, levels=4, labels=labels, classes=["a", "b", "c"])
    part = images.subset(torch.tensor([4, 1, 0]))
    assert torch.equal(whole(part), pixels[[4, 1, 0]])
    assert part.labels.tolist() == [1, 1, 0]
    assert (part.levels, part.classes, part.class_names) == (4, 3, ("a", "b", "c"))


COUNT = torch.arange(3)


@pytest.mark.parametrize(
    ("pixels", "options", "error", "message"),
    [
        (PIXELS.int(), {}, TypeError, "images must be a uint8 or float tensor on the CPU; got tor"),
        (PIXELS.float() - 1, {"levels": (0, 1)}, ValueError, "in their range, 0 to 1; got -1 to"),
        (PIXELS, {"levels": (0, 1)}, TypeError, "images must be a floating-point tensor; got"),
        (PIXELS[:0], {}, ValueError, "images must hold at least 1 images; got 0"),
        (PIXELS.float(), {"levels": (1, 1)}, ValueError, "levels: must .* rise from the first"),
        (PIXELS[:, 0], {}, ValueError, r"images must have shape \(N, C, H, W\)"),
        (PIXELS, {"labels": torch.zeros(3)}, TypeError, "labels must be a tensor of integers"),
        (PIXELS, {"labels": COUNT[:2]}, ValueError, r"labels must have shape \(3,\)"),
        (PIXELS, {"labels": COUNT - 1}, ValueError, r"labels must lie in .* -1 to 1"),
        (PIXELS, {"labels": COUNT, "classes": 2}, ValueError, "0 … 1; got 0 to 2"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(pixels, options, error, message):
    with pytest.raises(error, match=message):
        ArrayImages(pixels, **options)


@pytest.mark.parametrize(
    ("layout", "shape", "axes"),
    [
        ("auto", (10, 3, 5, 6), "nchw"),
        ("auto", (10, 5, 6, 1), "nhwc"),
        ("auto", (10, 5, 6), "nhw"),
        ("NHW", (10, 5, 3), "nhw"),
        ("NHWC", (10, 3, 5, 3), "nhwc"),
        ("NCHW", (10, 2, 5, 6), "nchw"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_are_read_in_every_layout(tmp_path, shape, layout, axes, kind):
    pixels = random_bytes(*shape)
    file = tmp_path / f"images.{kind}"
    np.save(file, pixels) if kind == "npy" else np.savez_compressed(file, pixels)
    data = array_file(path=file, layout=layout, held_out=3)
    order = torch.randperm(10, generator=generator()).numpy()
    want = np.einsum(f"{axes}->{'nchw' if 'c' in axes else 'nhw'}", pixels)
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
    archive, file, own = (tmp_path / name for name in ("a.npz", "a.npy", "b.npy"))
    np.savez(archive, pictures=pixels, kinds=labels)
    np.save(file, pixels)
    np.save(own, labels)
    order = torch.randperm(10, generator=generator()).numpy()
    for path, names in (
        (archive, {"images": "pictures", "labels": "kinds"}),
        (str(file), {"labels": str(own)}),
    ):
        data = array_file(path=path, **names)
        assert np.array_equal(data.train.labels.numpy(), labels[order[1:]])
        assert data.held_out.classes == 3


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_damaged_arrays_and_pickles_are_named(tmp_path, kind):
    file, write = tmp_path / f"a.{kind}", np.save if kind == "npy" else np.savez
    write(file, np.array([None] * 3), allow_pickle=True)
    damaged = [(file.read_bytes(), ".*(Python objects|allow_pickle=False)")]
    write(file, random_bytes(10, 8, 8))
    content = file.read_bytes()
    damaged += [(content[:-300], ""), (b"no array", "")]
    if kind == "npz":
        damaged.append((content[:400] + bytes([content[400] ^ 1]) + content[401:], ".*CRC"))
    for damage, message in damaged:
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"a\.{kind} cannot be read{message}"):
            array_file(path=file)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("floats.npy", {}, TypeError, "must hold images of uint8, .* value_range; got float64"),
        ("a.npy", {"value_range": [0, 1]}, TypeError, r"a\.npy must hold .* got uint8"),
        ("a.npy", {"layout": "NHWC"}, ValueError, "layout NHWC must have 4 axes"),
        ("a.npy", {"labels": "floats.npy"}, ValueError, r"labels must be integers .*\(10,\)"),
        ("a.npy", {"labels": "kinds"}, FileNotFoundError, r"labels must be a \.npy"),
        ("a.npy", {"images": "kinds"}, ValueError, r"images names an array of a \.npz"),
        ("two.npz", {}, ValueError, "images must name .* for 2 arrays of .* holds a and b"),
        ("two.npz", {"labels": "c"}, ValueError, "labels must be an array of .*: a or b; got"),
        ("none.npy", {}, ValueError, "at least one image"),
        ("nowhere.npy", {}, FileNotFoundError, r"path must be a file; got .*nowhere\.npy"),
    ],
)
def test_files_and_options_that_do_not_fit_are_rejected(
    tmp_path, monkeypatch, name, options, error, message
):
    monkeypatch.chdir(tmp_path)
    pixels = random_bytes(10, 4, 4)
    np.save("a.npy", pixels)
    np.save("floats.npy", np.zeros((10, 4, 4)))
    np.save("none.npy", pixels[:0])
    np.savez("two.npz", a=pixels, b=pixels)
    with pytest.raises(error, match=message):
        array_file(path=name, **options)


def test_a_mapped_file_is_not_changed(tmp_path):
    np.save(tmp_path / "a.npy", random_bytes(10, 4, 4))
    before = (tmp_path / "a.npy").read_bytes()
    whole(array_file(path=tmp_path / "a.npy").train).zero_()
    assert (tmp_path / "a.npy").read_bytes() == before
