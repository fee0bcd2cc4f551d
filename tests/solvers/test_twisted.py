"""The twisted particle sampler, against exact posteriors of mixtures."""

import math

import numpy as np
import pytest
import torch

from cldsde import CLD, PSLD, VPSDE, GaussianMixture, Observation, ReverseProcess, solvers
from cldsde.solvers.twisted import PosteriorSamples, _systematic
from probes import generator
from references import wide_mixture
from tolerances import order_of, rounding, standard_error, standard_error_of_variance

BATCHES = 1e-9  # matrix products of other batch sizes round otherwise; it grows along the steps


def gaussian():
    """One Gaussian, for which the twist is exact, and an observation of two of three numbers."""
    covariance = [[1.0, 0.6, 0.2], [0.6, 1.0, 0.5], [0.2, 0.5, 0.8]]
    data = GaussianMixture([1.0], [[0.3, -0.2, 0.0]], [covariance])
    mask = torch.tensor([True, False, True])
    return data, Observation.mask(mask, torch.tensor([1.0, 0.0, -0.5]).double(), 0.2)


def sample(data, seen, sde=None, *, steps=40, **options):
    sde = CLD() if sde is None else sde
    sharper = Observation(seen.forward, seen.y, seen.noise_std / 3, seen.shape)
    end = sharper.end_time(sde, seen.shape)  # it leaves the data a noise of s/10
    times, process = solvers.root_times(1.0, end, steps), ReverseProcess(sde, data.score(sde))
    return solvers.sample_posterior(process, seen, times, **{"dtype": torch.float64, **options})


def check_evidence(found, data, seen, bias=0.01):
    """Three standard errors, and the step's error of second order."""
    error = found.log_evidence - data.log_evidence(seen)
    assert abs(error) < 3 * found.log_evidence_std + bias
    # At the end, and whenever N particles are resampled, the relative variance of their weights is
    # about 1, and adds 1/N. Twice the root, as eight runs give the spread to a third.
    few = len(found.samples) / len(found.ess) / 2
    times = 1 + int((found.ess[:, :-1] < few).sum(1).max())
    assert found.log_evidence_std < 2 * math.sqrt(times / len(found.samples))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sde", [VPSDE(), CLD(), PSLD()], ids=lambda sde: type(sde).__name__)
def test_moments_and_evidence_of_gaussian_data_are_exact(sde):
    data, seen = gaussian()
    found = sample(data, seen, sde, particles=500, seed=range(8))
    posterior = data.condition(seen)
    x, w = found.samples, found.weights
    mean = w @ x
    inverse = torch.linalg.inv(torch.linalg.cholesky(posterior.covariances[0]))
    # Four standard errors of 4000 samples, 4 sqrt(3/4000) = 0.11 in units of the posterior; and
    # 1 % for the noise that is left in the data component, s/10.
    assert (inverse @ (mean - posterior.means[0])).norm() < 0.12
    covariance = inverse @ ((x - mean) * w.unsqueeze(1)).mT @ (x - mean) @ inverse.mT
    tolerance = standard_error_of_variance(1.0, float(1 / w.square().sum())) + 0.01
    assert (covariance - torch.eye(3)).abs().max() < tolerance
    check_evidence(found, data, seen)


def test_the_evidence_of_a_mixture_is_within_its_error():
    found = sample(*wide_mixture(), particles=300, seed=range(10))
    # The error of 40 steps is 0.03, as runs of 2,000 particles show.
    check_evidence(found, *wide_mixture(), bias=0.03)


def test_runs_do_not_depend_on_the_other_seeds_and_chunks():
    options = {"particles": 20, "steps": 10}
    together = sample(*wide_mixture(), seed=[3, 4, 5], **options)
    for chunk in (None, np.int64(7)):
        alone = sample(*wide_mixture(), seed=[4], chunk=chunk, **options)
        close = {"rtol": BATCHES, "atol": BATCHES}
        torch.testing.assert_close(together.samples[20:40], alone.samples, **close)
        torch.testing.assert_close(together.log_weights[20:40], alone.log_weights, **close)
    mean = together.log_weights.logsumexp(0) - math.log(60)
    assert float(mean) == pytest.approx(together.log_evidence, rel=rounding(64), abs=0)


@pytest.mark.parametrize("seed", [4, np.int64(4), torch.tensor([4]), np.array([4]), range(4, 5)])
def test_one_run_has_a_seed_or_a_sequence_of_one(seed):
    expected, found = (
        sample(*wide_mixture(), steps=3, particles=4, seed=x).samples for x in ([4], seed)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"method": "pigdm"}, {"gradient": False}, {"denoise": True}])
def test_options_keep_the_evidence(options):
    found = sample(*gaussian(), particles=300, seed=range(8), **options)
    check_evidence(found, *gaussian())


def test_denoised_samples_are_posterior_means_of_the_states():
    (data, seen), sde = gaussian(), VPSDE()
    z, mean = (sample(data, seen, sde, seed=[0], denoise=x).samples for x in (False, True))
    end = solvers.times_of_kappa(sde, -math.log(0.1 * seen.noise_std))
    exact = data.condition(seen).score(sde).data_prediction(z[:, None], end)
    assert (mean - exact).abs().max() <= rounding(64)  # a solve of three equations, and its score


def test_resampled_particles_have_equal_weights():
    found = sample(*wide_mixture(), particles=400, seed=[0])
    drawn = found.resample(4000, generator=generator())
    assert drawn.shape == (4000, 8)
    # Systematic resampling rounds the share of each particle up or down, with a variance of 1/4 at
    # most. Independent draws would have a standard error of 1 / sqrt(4000) = 0.016.
    error = (drawn.mean(0) - found.weights @ found.samples) / found.samples.std(0)
    assert error.abs().max() < standard_error(0.5, 400) * 400 / 4000


def test_resampled_particles_have_a_random_order():
    """Numbered particles of equal weight: each is drawn twice, in no order."""
    numbers = torch.arange(1000.0).unsqueeze(1)
    found = PosteriorSamples(numbers, torch.zeros(1000).double(), 0.0, 0.0, torch.zeros(1, 1), 1)
    drawn, again = (found.resample(2000, generator=generator()).flatten() for _ in range(2))
    assert torch.equal(drawn, again)
    assert torch.equal(drawn.sort().values, numbers.flatten().repeat_interleave(2))
    # The first half is drawn without replacement from all 2000, which divides the standard error
    # of 1000 independent uniform draws by the root of 2.
    deviation = 1000 / math.sqrt(12 * 2)
    assert abs(float(drawn[:1000].mean()) - 499.5) < standard_error(deviation, 1000)
    with pytest.raises(TypeError, match=r"n must be an integer; got 2\.5"):
        found.resample(2.5)


def test_systematic_resampling_has_no_bias():
    weights, counts = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.zeros(3)
    for u in torch.linspace(0.005, 0.995, 100, dtype=torch.float64):
        counts += torch.bincount(_systematic(weights, u.reshape(1, 1), 4)[0], minlength=3)
    # The integral over u by a sum of 100, whose jumps are half an interval off.
    assert (counts / 400 - weights[0]).abs().max() <= order_of(1 / 100, 1, 0.5)


@pytest.mark.parametrize(
    ("dtype", "noise", "method"),
    [
        *((torch.float32, 1e-4, method) for method in ("moments", "pigdm")),
        (torch.bfloat16, 0.1, "moments"),
    ],
)
def test_equal_rows_and_low_precision_give_finite_samples(dtype, noise, method):
    seen = Observation.matrix([[1.0, 1.0, 0.0]] * 3, torch.zeros(3), noise_std=noise)
    found = sample(gaussian()[0], seen, steps=3, method=method, dtype=dtype)
    assert found.samples.dtype == dtype
    assert found.samples.isfinite().all()
