"""Bytes become numbers in [−1, 1] and come back, and their statistics are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cldsde.images.data import ArrayImages, augment, channel_statistics, to_levels, to_unit
from cldsde.images.data.pixels import as_bytes
from image_data import random_bytes
from probes import generator
from tolerances import EPS32, rounding

BYTES = torch.full((1, 1, 2, 2), 17, dtype=torch.uint8)


@pytest.mark.parametrize("levels", [2, 3, 16, 17, 255, 256])
def test_every_level_comes_back(levels):
    x = torch.arange(levels, dtype=torch.uint8)
    unit = to_unit(x, levels)
    assert unit.dtype == torch.float32
    assert (unit[0], unit[-1]) == (-1, 1)
    assert (unit - (2 * x.double() / (levels - 1) - 1)).abs().max() <= EPS32
    assert torch.equal(to_levels(unit, levels), x)
    half = torch.linspace(-1, 1, 999).to(torch.float16)
    assert torch.equal(to_levels(half, levels), to_levels(half.double(), levels))
    many = x.repeat(200).reshape(1, 1, 1, -1)
    spread = augment(many, levels, flip=False, dequantise=True, generator=generator())
    assert torch.equal(to_levels(spread, levels, dequantised=True), many)


@given(
    values=st_numpy.arrays(np.float64, 20, elements=st.floats(allow_nan=False)),
    levels=st.integers(2, 256),
)
def test_numbers_go_to_the_nearest_level(values, levels):
    got = to_levels(torch.from_numpy(values), levels)
    assert got.dtype == torch.uint8
    scale = 2 * np.arange(levels) / (levels - 1) - 1
    clamped = np.clip(values, -1, 1)
    nearest = np.abs(scale - clamped[:, None]).min(1)
    # Ties go either way; distances carry the rounding of numbers of size 1.
    assert (np.abs(scale[got.numpy()] - clamped) <= nearest + rounding(4)).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_levels(torch.tensor([0.0, torch.nan])), ValueError, "numbers; got 1 NaN of 2"),
        (lambda: to_levels(BYTES), TypeError, "images must be a floating-point tensor"),
        (lambda: to_unit(torch.zeros(1)), TypeError, "images must be a uint8 tensor"),
        (lambda: to_unit(BYTES, 17), ValueError, "values in 0 … 16; got 17"),
        (lambda: channel_statistics(ArrayImages(BYTES), per="x"), ValueError, "per: must be 'scal"),
    ],
)
def test_images_of_another_kind_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("flip", [False, True])
def test_draws_are_the_flips_and_then_the_bins(flip):
    x = torch.from_numpy(random_bytes(6, 2, 3, 4, levels=17))
    source = generator(5)
    mirrored = torch.rand(6, generator=source) < 0.5 if flip else torch.zeros(6)
    uniform = torch.rand(x.shape, generator=source)
    want = torch.stack([a.flip(-1) if b else a for a, b in zip(x, mirrored, strict=True)])
    want = 2 * (want + uniform) / 17 - 1
    out = augment(x, 17, flip=flip, dequantise=True, generator=generator(5))
    assert torch.allclose(out, want, atol=rounding(3, dtype=torch.float32), rtol=0)


AXES = {"scalar": (0, 1, 2, 3), "channel": (0, 2, 3), "pixel": (0,)}


@pytest.mark.parametrize("per", AXES)
@pytest.mark.parametrize(("levels", "dequantise"), [(17, False), (256, False), (256, True)])
def test_statistics_are_those_of_the_whole_array(per, levels, dequantise, monkeypatch):
    """Of dequantised images they are expectations: of bins' centres, and their variance more."""
    pixels = random_bytes(50, 3, 4, 5, levels=levels)
    images = ArrayImages(torch.from_numpy(pixels), levels=levels)
    # 8 chunks, the last one not full.
    monkeypatch.setattr("cldsde.images.data.images.CHUNK", 7 * 60)
    found = channel_statistics(images, per=per, dequantise=dequantise)
    x = pixels.astype(np.longdouble)
    unit = (2 * x + 1) / levels - 1 if dequantise else 2 * x / (levels - 1) - 1
    within = (2 / levels) ** 2 / 12 if dequantise else 0
    shape = {"scalar": (), "channel": (3, 1, 1), "pixel": (3, 4, 5)}[per]
    wanted = unit.mean(AXES[per]), unit.var(AXES[per]) + within
    for got, exact in zip(found, wanted, strict=True):
        assert (got.dtype, tuple(got.shape)) == (torch.float64, shape)
        want = exact.reshape(shape).astype(float)
        np.testing.assert_allclose(got.numpy(), want, rtol=rounding(4), atol=rounding(0.1))


def test_numbers_of_a_range_become_minus_one_to_one_and_are_not_rounded():
    ends = (-3.0, 5.0)
    x = torch.tensor([-3.0, 1.0, 1.1, 5.0])
    unit = to_unit(x, ends)
    # Four operations of numbers up to 8, divided by 4.
    close = {"rtol": 0, "atol": rounding(4, 2, torch.float32)}
    torch.testing.assert_close(unit, torch.tensor([-1.0, 0.0, 0.025, 1.0]), **close)
    torch.testing.assert_close(to_levels(unit, ends), x, rtol=0, atol=4 * close["atol"])
    assert to_levels(torch.tensor([-9.0, 9.0]), ends).tolist() == [-3, 5]
    assert as_bytes(x, ends).tolist() == [0, 128, 131, 255]  # 127.5 and 130.7 are rounded
    for wrong in (torch.tensor([5.1]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="images must have values in their range, -3 to 5"):
            to_unit(wrong, ends)


@pytest.mark.parametrize("per", AXES)
def test_statistics_of_numbers_do_not_cancel(per, monkeypatch):
    """The mean is 10⁴ times the standard deviation."""
    x = 1e4 + np.random.default_rng(0).normal(size=(50, 5, 4, 5)).astype(np.float32)
    images = ArrayImages(torch.from_numpy(x), levels=(0, 2e4))
    monkeypatch.setattr("cldsde.images.data.images.CHUNK", 7 * 100)
    found = channel_statistics(images, per=per)
    unit = x.astype(np.longdouble) / 1e4 - 1
    for got, exact in zip(found, (unit.mean(AXES[per]), unit.var(AXES[per])), strict=True):
        want = exact.reshape(got.shape).astype(float)
        # Deviations from the mean are known to 10⁴ eps of their size.
        np.testing.assert_allclose(got.numpy(), want, rtol=rounding(4, 1e4), atol=rounding(4))


def test_random_parts_are_resized_to_the_size_of_the_image():
    n, ends = 16, (0.0, 15.0)
    ramp = torch.arange(n).float()
    x = torch.stack([ramp.expand(n, n), ramp.expand(n, n).T]).expand(300, 2, n, n)
    options = {"flip": False, "dequantise": False}
    found = 7.5 * (augment(x, ends, crop=0.75, generator=generator(), **options) + 1)
    slopes = [found[:, 0].diff(dim=-1)[:, 8, 8], found[:, 1].diff(dim=-2)[:, 8, 8]]
    sides = n * torch.stack(slopes)
    # Bicubic weights of single precision sum to 1 up to rounding, on numbers up to 15.
    close = rounding(64, 15, torch.float32)
    assert float((sides - sides.round()).abs().max()) < n * close
    assert torch.equal(sides[0].round(), sides[1].round())  # parts keep the shape
    sides = sides[0].round()
    assert sorted(sides.unique().tolist()) == [*range(12, 17)]
    corners = [(found[:, i, 8, 8] + found[:, i, 7, 7]) / 2 - (sides - 1) / 2 for i in range(2)]
    for corner in corners:
        assert float((corner - corner.round()).abs().max()) < close
        assert bool(((corner.round() >= 0) & (corner.round() <= n - sides)).all())
    assert not torch.equal(*corners)
    levels = augment(x.to(torch.uint8), 16, crop=0.75, generator=generator(), **options)
    assert float((7.5 * (levels + 1) - found).abs().max()) < 0.5 + close  # rounded to levels


def test_the_ends_of_a_range_are_those_of_float32():
    ends = (0.0, 0.1)  # 0.1 is larger in float32
    images = to_levels(torch.ones(2, 1, 8, 8), ends)
    assert torch.equal(to_levels(to_unit(images, ends), ends), images)
