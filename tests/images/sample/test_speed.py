"""Images of networks that are faster, by their precision, memory format or compilation."""

import numpy as np
import pytest

from cldsde.images.model import load_model
from cldsde.images.sample import ImageSampler, speed_up


def images(run, mode=None, *, channels_last=False, **options):
    model = load_model(run)
    speed_up(model, mode, channels_last=channels_last)
    # The last batch of seeds is smaller.
    sampler = ImageSampler.of(model, model.config.sampling, batch=3, **options)
    return np.int64(sampler.sample(range(3, 8)).images)


def test_half_precision_changes_images_by_its_rounding(digits_run):
    plain, half = (images(digits_run, precision=name) / 16 for name in ("fp32", "bf16"))
    # bfloat16 has eight bits; half of a level of 17 moves a few pixels.
    assert abs(plain - half).mean() < 2**-8


@pytest.mark.parametrize(
    "mode",
    [None, *(pytest.param(x, marks=pytest.mark.slow) for x in ("default", "reduce-overhead"))],
)
def test_images_of_faster_networks_are_the_same_up_to_rounding(digits_run, mode):
    fast = images(digits_run, mode, channels_last=True)
    # Rounding of single precision moves a number to the next level at most.
    assert abs(fast - images(digits_run)).max() <= 1
