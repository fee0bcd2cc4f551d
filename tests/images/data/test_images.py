"""Images are found by row number; parts that do not fit together are rejected."""

from __future__ import annotations

import pytest
import torch

from cldsde.images.data import ArrayImages, Subset
from image_data import PIXELS, random_bytes, whole


def test_rows_are_loaded_in_any_order_and_again():
    pixels = torch.from_numpy(random_bytes(7, 2, 3, 4))
    images = ArrayImages(pixels)
    rows = torch.tensor([6, 0, 0, 3])
    assert torch.equal(images.load(rows), torch.stack([pixels[i] for i in (6, 0, 0, 3)]))
    assert images.load(rows[:0]).shape == (0, 2, 3, 4)
    assert (len(images), images.shape, images.levels, images.labels) == (7, (2, 3, 4), 256, None)
    before = pixels.clone()
    images.load(torch.arange(7)).fill_(9)
    assert torch.equal(whole(images), before)


@pytest.mark.parametrize("row", [-1, 7, 2**40])
def test_a_row_out_of_range_is_an_index_error(row):
    images = ArrayImages(torch.from_numpy(random_bytes(7, 1, 2, 2)))
    for source in (images, Subset(images, torch.arange(7))):
        with pytest.raises(IndexError, match=f"rows must lie in 0 … 6; got .*{row}"):
            source.load(torch.tensor([3, row]))
    with pytest.raises(IndexError, match=rf"rows must lie in 0 … 6; got \[{row}\]"):
        Subset(images, torch.tensor([row]))


@pytest.mark.parametrize(
    "rows", [[0], torch.tensor([0.0]), torch.tensor([True]), torch.tensor([[0]]), 0]
)
def test_rows_of_another_type_or_shape_are_rejected(rows):
    with pytest.raises(TypeError, match="rows must be an int64 tensor"):
        ArrayImages(PIXELS).load(rows)


@pytest.mark.parametrize(
    ("pixels", "options", "error", "message"),
    [
        (
            PIXELS.float(),
            {},
            TypeError,
            "images must be a uint8 tensor on the CPU; got torch.float32",
        ),
        (PIXELS[:, 0], {}, ValueError, r"images must have shape \(N, C, H, W\)"),
        (PIXELS[:0], {}, ValueError, "images must hold at least 1 images; got 0"),
        (PIXELS + 17, {"levels": 17}, ValueError, "values in 0 … 16; got 17"),
        (PIXELS, {"levels": 1}, ValueError, "levels: must be .* got 1"),
        (PIXELS, {"levels": 257}, ValueError, "levels: must be .* got 257"),
        (PIXELS, {"levels": 16.0}, ValueError, "levels: must be"),
        (PIXELS, {"labels": torch.zeros(3)}, TypeError, "labels must be a tensor of integers"),
        (PIXELS, {"labels": torch.arange(2)}, ValueError, r"labels must have shape \(3,\)"),
        (PIXELS, {"labels": torch.arange(3) - 1}, ValueError, r"labels must lie in .* -1 to 1"),
        (PIXELS, {"labels": torch.arange(3), "classes": 2}, ValueError, "0 … 1; got 0 to 2"),
        (PIXELS, {"labels": torch.arange(3), "classes": ["a"]}, ValueError, "0 … 0; got 0 to 2"),
        (PIXELS, {"classes": "ab"}, ValueError, "classes: must be a valid integer or a list"),
        (PIXELS, {"classes": 2}, ValueError, "classes needs labels"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(pixels, options, error, message):
    with pytest.raises(error, match=message):
        ArrayImages(pixels, **options)


def test_a_subset_keeps_rows_with_their_labels_and_all_classes():
    pixels = torch.from_numpy(random_bytes(5, 1, 2, 2, levels=4))
    images = ArrayImages(
        pixels, levels=4, labels=torch.tensor([0, 1, 2, 1, 0]), classes=["a", "b", "c"]
    )
    part = Subset(images, torch.tensor([4, 1, 0]))
    assert torch.equal(whole(part), pixels[[4, 1, 0]])
    assert part.labels.tolist() == [0, 1, 0]
    assert (part.levels, part.classes, part.class_names) == (4, 3, ("a", "b", "c"))
