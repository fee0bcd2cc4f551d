"""Linear observations of data."""

import pytest
import torch

from cldsde import CLD, HOLD, VPSDE, GaussianMixture
from cldsde.score import Observation
from probes import generator
from tolerances import EPS32, rounding

INVERTED = 1e-6  # a time is found by inverting the noise level
POWERS = 1e-3  # the norm of the means is found by power iteration
SUMS = rounding(100, 48)  # sums of at most 48 products of unit size

MASK = torch.rand(2, 4, 6, generator=generator(0)) < 0.5
BLUR = torch.rand(3, 5, generator=generator(1), dtype=torch.float64)
MATRIX = torch.randn(7, 48, generator=generator(2), dtype=torch.float64)


def observations():
    return {
        "mask": Observation.mask(MASK, torch.zeros(2, 4, 6), 0.1),
        "matrix": Observation.matrix(MATRIX, torch.zeros(7), 0.1),
        "downsample": Observation.downsample(2, torch.zeros(2, 2, 3), 0.1),
        "blur": Observation.blur(BLUR, torch.zeros(2, 4, 6), 0.1),
        "callable": Observation(lambda x: x.flip(-1).cumsum(-1), torch.zeros(2, 4, 6), 0.1),
    }


@pytest.mark.parametrize("name", observations())
def test_adjoint_gram_and_dense_matrix_agree(name):
    seen = observations()[name]
    seen.check((2, 4, 6), dtype=torch.float64)
    g = generator(1)
    x = torch.randn(3, 2, 4, 6, generator=g, dtype=torch.float64)
    forward = seen.forward(x)
    v = torch.randn(forward.shape, generator=g, dtype=torch.float64)
    pulled = seen.adjoint(v, (2, 4, 6))
    left, right = ((a * b).flatten(1).sum(1) for a, b in ((forward, v), (x, pulled)))
    torch.testing.assert_close(left, right, rtol=SUMS, atol=SUMS)
    with torch.inference_mode():
        assert torch.equal(seen.adjoint(v, (2, 4, 6)), pulled)
    A = seen.dense((2, 4, 6))
    torch.testing.assert_close(seen.gram((2, 4, 6), v), A @ A.mT, rtol=SUMS, atol=SUMS)
    torch.testing.assert_close(x.flatten(1) @ A.mT, forward.flatten(1), rtol=SUMS, atol=SUMS)


def test_a_mean_over_blocks_is_average_pooling():
    x, seen = torch.randn(3, 2, 4, 6, generator=generator(0)), observations()["downsample"]
    expected = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(seen.forward(x), expected, rtol=0, atol=4 * EPS32)
    assert seen.shape == (2, 4, 6)
    series = Observation.downsample(4, torch.zeros(1, 5), 0.1)
    assert series.forward(torch.zeros(3, 1, 20)).shape == (3, 1, 5)


def test_at_the_end_time_the_data_component_has_less_noise_than_y():
    for sde in (VPSDE(), CLD(), HOLD()):
        seen = Observation.mask(torch.ones(3, dtype=torch.bool), torch.zeros(3), 0.2)
        kernel = sde.marginal(seen.end_time(sde, (3,)))
        ratio = float(kernel.root[0, 0] / kernel.mean[0, 0])
        assert ratio == pytest.approx(0.3 * 0.2, rel=INVERTED, abs=0)
        # Means of 16 numbers divide the noise by 4, and so the norm.
        means = Observation.downsample(4, torch.zeros(1, 2, 2), 0.2)
        kernel = sde.marginal(means.end_time(sde, (1, 8, 8)))
        ratio = float(kernel.root[0, 0] / kernel.mean[0, 0])
        assert ratio == pytest.approx(4 * 0.3 * 0.2, rel=POWERS, abs=0)
    # An underdamped position forgets the data, and then has some of them again.
    sde, seen = CLD(friction=0.05), Observation(lambda x: x, torch.zeros(3), 10.0)
    times = torch.linspace(0.01, seen.end_time(sde, (3,)), 100, dtype=torch.float64)
    kernel = sde.marginal(times)
    ratios = kernel.root[:, 0, 0] / kernel.mean[:, 0, 0]
    assert ratios.min() > 0
    assert ratios.max() < 0.3 * 10 * (1 + INVERTED)


def test_conditioning_without_noise_fixes_what_is_seen():
    data, y = GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.8], [0.8, 1.0]]]), torch.tensor([1.0])
    seen = Observation.matrix([[1.0, 0.0]], y, 0.0)
    y += 1  # the observation keeps values of its own
    found = data.condition(seen)
    assert found.means[0].tolist() == pytest.approx([1.0, 0.8], abs=rounding())
    assert found.covariances.flatten().tolist() == pytest.approx([0, 0, 0, 0.36], abs=rounding())
