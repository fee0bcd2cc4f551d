"""The twisted particle sampler, against exact posteriors of mixtures."""

import math

import pytest
import torch

from cldsde import CLD, PSLD, VPSDE, GaussianMixture, Observation, ReverseProcess, solvers
from cldsde.solvers.twisted import _systematic
from references import wide_mixture


def _gaussian():
    """One Gaussian, for which the twist is exact, and an observation of two of three numbers."""
    covariance = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, 0.5], [0.2, 0.5, 0.8]])
    data = GaussianMixture([1.0], [[0.3, -0.2, 0.0]], [covariance.tolist()])
    mask = torch.tensor([True, False, True])
    return data, Observation.mask(mask, torch.tensor([1.0, 0.0, -0.5]).double(), 0.2)


def _sample(data, seen, sde=None, *, steps=40, **options):
    sde = CLD() if sde is None else sde
    end = float(solvers.times_of_log_snr(sde, -math.log(0.1 * seen.noise_std)))
    end = min(end, seen.end_time(sde, seen.shape))
    options = {"dtype": torch.float64, **options}
    return solvers.sample_posterior(
        ReverseProcess(sde, data.score(sde)), seen, solvers.root_times(sde.T, end, steps), **options
    )


@pytest.mark.parametrize("sde", [VPSDE(), CLD(), PSLD()], ids=lambda sde: type(sde).__name__)
def test_moments_and_evidence_of_gaussian_data_are_exact(sde):
    data, seen = _gaussian()
    found = _sample(data, seen, sde, particles=500, seeds=range(8))
    posterior = data.condition(seen)
    x, w = found.samples, found.weights
    mean = w @ x
    covariance = ((x - mean) * w.unsqueeze(1)).mT @ (x - mean)
    # Four standard errors of 4000 samples, 4 sqrt(3/4000) = 0.11 in units of the posterior; and
    # 1 % for the noise that is left in the state, σ = s/10.
    root = torch.linalg.cholesky(posterior.covariances[0])
    white = torch.linalg.solve_triangular(root, (mean - posterior.means[0])[:, None], upper=False)
    assert float(white.norm()) < 0.12
    inverse = torch.linalg.inv(root)
    torch.testing.assert_close(
        inverse @ covariance @ inverse.mT, torch.eye(3).double(), rtol=0, atol=0.2
    )
    # What is left beside sampling is the step's error of second order.
    error = found.log_evidence - data.log_evidence(seen)
    assert abs(error) < 3 * found.log_evidence_std + 0.01
    assert found.log_evidence_std < 0.05


def test_log_weights_of_an_exact_twist_narrow_with_the_steps():
    data, seen = _gaussian()
    variance = []
    for steps in (40, 160):
        found = _sample(data, seen, particles=2000, seeds=[0], steps=steps, threshold=0.0)
        variance.append(float(found.log_weights.var()))
        assert found.ess.shape == (1, steps + 1)
        assert found.nfev == steps + 1
        assert math.isnan(found.log_evidence_std)
    # The twist is p(y | z) itself. A step's weight errs by O(h) without bias, the sum of n steps by
    # n h² = h in variance: a quarter at four times the steps, but for terms of higher order.
    assert 3 < variance[0] / variance[1] < 6


def test_the_error_of_the_evidence_falls_with_the_root_of_the_particles():
    data, seen = _gaussian()
    errors = [
        _sample(data, seen, particles=k, seeds=range(100), steps=40).log_evidence_std
        for k in (30, 270)
    ]
    # 3 = √9; a standard deviation of 100 runs is known to 7 %, of skewed weights to about 15 %.
    assert 2 < errors[0] / errors[1] < 4.5


def test_the_evidence_of_a_mixture_is_within_its_error():
    data, seen = wide_mixture()
    found = _sample(data, seen, particles=500, seeds=range(10))
    # The error of 40 steps is 0.03, as runs of 2,000 particles show.
    error = found.log_evidence - data.log_evidence(seen)
    assert abs(error) < 3 * found.log_evidence_std + 0.03


def test_weights_put_calls_together():
    data, seen = wide_mixture()
    together = _sample(data, seen, particles=20, seeds=[3, 4, 5], steps=10)
    alone = _sample(data, seen, particles=20, seeds=[4], steps=10)
    # Matrix products of other batch sizes may add in another order.
    torch.testing.assert_close(together.samples[20:40], alone.samples, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.log_weights[20:40], alone.log_weights, rtol=1e-9, atol=1e-9)
    mean = together.log_weights.logsumexp(0) - math.log(60)
    assert math.isclose(float(mean), together.log_evidence, rel_tol=1e-12)


def test_chunks_do_not_change_the_samples():
    data, seen = wide_mixture()
    whole = _sample(data, seen, particles=30, seeds=[1], steps=10)
    parts = _sample(data, seen, particles=30, seeds=[1], steps=10, chunk=7)
    torch.testing.assert_close(whole.samples, parts.samples, rtol=1e-9, atol=1e-9)


def test_a_solve_in_inference_mode_is_the_same():
    data, seen = wide_mixture()
    expected = _sample(data, seen, particles=10, seeds=[1], steps=5)
    with torch.inference_mode():
        found = _sample(data, seen, particles=10, seeds=[1], steps=5)
    assert torch.equal(found.samples, expected.samples)


@pytest.mark.parametrize("options", [{"method": "pigdm"}, {"gradient": False}, {"denoise": True}])
def test_options_keep_the_evidence(options):
    data, seen = _gaussian()
    found = _sample(data, seen, particles=500, seeds=range(8), **options)
    error = found.log_evidence - data.log_evidence(seen)
    assert abs(error) < 3 * found.log_evidence_std + 0.01


def test_a_start_below_the_prior_is_that_of_the_data():
    data, seen = _gaussian()
    sde = VPSDE()
    process = ReverseProcess(sde, data.score(sde))
    end = seen.end_time(sde, (3,)) / 4
    times = solvers.root_times(0.8, end, 40)
    found = solvers.sample_posterior(
        process, seen, times, particles=500, seeds=range(8), dtype=torch.float64
    )
    # At t = 0.8 the data hold exp(-6.5) of the variance: as good as none.
    error = found.log_evidence - data.log_evidence(seen)
    assert abs(error) < 3 * found.log_evidence_std + 0.02


def test_resampled_particles_have_equal_weights():
    data, seen = wide_mixture()
    found = _sample(data, seen, particles=400, seeds=[0])
    drawn = found.resample(4000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 8)
    # Systematic resampling takes each particle the rounded number of its share.
    spread = found.samples.std(0)
    error = (drawn.mean(0) - found.weights @ found.samples) / spread
    assert float(error.abs().max()) < 0.05


def test_systematic_resampling_is_without_bias():
    weights = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    counts = torch.zeros(3)
    for u in torch.linspace(0.005, 0.995, 100, dtype=torch.float64):
        chosen = _systematic(weights, u.reshape(1, 1), 4)
        counts += torch.bincount(chosen[0], minlength=3)
    torch.testing.assert_close(counts / 400, weights[0].float(), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles must be an integer"),
        ({"chunk": 0}, "chunk must be an integer"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"method": "dps"}, "method must be one of"),
        ({"seeds": [1], "generator": torch.Generator()}, "alternatives"),
        ({"seeds": [-1]}, "seeds must be integers"),
        ({"shape": (4,)}, "numbers; got data"),
        ({"data_variance": 0}, "data_variance must be"),
    ],
)
def test_bad_options_are_errors_before_sampling(options, message):
    data, seen = wide_mixture()
    with pytest.raises(ValueError, match=message):
        _sample(_Untouched(data), seen, **options)


class _Untouched:
    """Data whose score must not be evaluated."""

    def __init__(self, data):
        self.data = data

    def score(self, sde):
        def score(z, t):
            pytest.fail("the score was evaluated")

        return score


def test_an_end_that_is_too_late_says_which_to_take():
    data, seen = wide_mixture()
    sde = CLD()
    latest = seen.end_time(sde, (8,))
    process = ReverseProcess(sde, _Untouched(data).score(sde))
    times = solvers.root_times(1.0, 2 * latest, 10)
    with pytest.raises(ValueError, match=f"times must end at {latest:.3g} or earlier"):
        solvers.sample_posterior(process, seen, times)


def test_no_noise_and_an_unknown_shape_are_errors():
    data, seen = wide_mixture()
    process = ReverseProcess(CLD(), _Untouched(data).score(CLD()))
    times = solvers.root_times(1.0, 1e-3, 10)
    with pytest.raises(ValueError, match="noise_std must be positive"):
        solvers.sample_posterior(process, Observation(seen.forward, seen.y, 0.0), times, shape=(8,))
    with pytest.raises(ValueError, match="shape must be given"):
        solvers.sample_posterior(process, Observation(seen.forward, seen.y, 0.1), times)


def test_a_score_that_is_not_finite_is_an_error():
    _, seen = wide_mixture()
    process = ReverseProcess(VPSDE(), lambda z, t: z * math.nan)
    times = solvers.root_times(1.0, 1e-4, 10)
    with pytest.raises(FloatingPointError, match="no particle of run 0"):
        solvers.sample_posterior(process, seen, times)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two modes", "wide modes", "narrow modes"])
def test_four_thousand_particles_reach_the_posterior(name):
    from cldsde.validation import posterior_error, posterior_methods, posterior_problems

    sde = VPSDE()
    start = float(solvers.times_of_log_snr(sde, -2.5))

    def twisted(process, observation, times, n, g):
        grid = solvers.logistic_times(sde, start, float(times[-1]), len(times) - 1)
        return posterior_methods()["twisted"].sampler(process, observation, grid, n, g)

    problem = posterior_problems(0.1)[name]
    found = posterior_error(twisted, problem, sde=sde, samples=4000, steps=50, repeats=8)
    # On "wide modes" 12 runs gave a distance of 1.08 ± 0.08 and a mode error of 0.022 ± 0.003.
    assert found.distance <= 2
    assert found.mode_error <= 0.03
