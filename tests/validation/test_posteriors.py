"""The measurement of posterior samplers: exact ones pass, wrong ones are found."""

import math
import statistics
import sys

import pytest
import torch
from torch import distributions

from cldsde import CLD, PSLD, VPSDE, Observation
from cldsde.validation import calibration_ranks, posterior_error, posterior_problems
from cldsde.validation.order_estimate import Verdict
from cldsde.validation.posterior_methods import posterior_methods
from cldsde.validation.posterior_suite import PosteriorReport, planted_samplers, posterior_runs
from tolerances import rounding

NAMES = list(posterior_problems())
RARE = 1e-3  # a p-value that one of a thousand seeds falls below; seeds are fixed


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_posterior_has_the_density_of_bayes_rule(name):
    problem = posterior_problems(0.3)[name]
    g = torch.Generator().manual_seed(0)
    x = problem.posterior.sample(5, generator=g, dtype=torch.float64)
    normal = distributions.MultivariateNormal

    def log_density(mixture):
        parts = normal(mixture.means, mixture.covariances)
        weights = distributions.Categorical(mixture.weights)
        return distributions.MixtureSameFamily(weights, parts).log_prob(x)

    seen = problem.observation
    likelihood = normal(seen.forward(x), 0.09 * torch.eye(len(seen.y)).double()).log_prob(seen.y)
    expected = log_density(problem.data) + likelihood - problem.data.log_evidence(seen)
    # Log-densities of up to 64 numbers below 100, of covariances with condition numbers below 1e5.
    bound = rounding(64, 100 * 1e5)
    assert (log_density(problem.posterior) - expected).abs().max() <= bound


@pytest.mark.one_in(6)
@pytest.mark.parametrize("sde", [CLD(), VPSDE(), PSLD()], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_exact_guidance_is_the_posterior_within_sampling_error(sde, name):
    problem = posterior_problems(0.1)[name]
    found = posterior_error("exact", problem, sde=sde, samples=1000, repeats=3)
    # Of a distance that is all sampling error, three standard errors.
    assert found.distance - 3 * found.distance_std <= 1.3
    assert found.verdict is Verdict.PASS


def test_standard_errors_are_of_the_mean_over_repetitions(monkeypatch):
    rows = torch.tensor([[1.0, 8.0, 3.0, 2.0], [2.0, 4.0, 5.0, 2.0], [6.0, 3.0, 1.0, 5.0]]).double()
    measured = iter(rows.tolist())
    # The package has a function of the module's name.
    module = sys.modules["cldsde.validation.posterior_error"]
    monkeypatch.setattr(module._Measure, "__call__", lambda *_: next(measured))
    found = posterior_error("exact", posterior_problems()["mask"], samples=100, steps=2, repeats=3)
    for i, name in enumerate(("distance", "mode_error", "mean_error", "spread_error")):
        values = rows[:, i].tolist()
        expected = statistics.mean(values), statistics.stdev(values) / math.sqrt(3)
        own = getattr(found, name), getattr(found, f"{name}_std")
        assert own == pytest.approx(expected, rel=rounding(), abs=0)
    assert found.verdict is Verdict.FAIL  # for the weights, by three standard errors


@pytest.mark.slow
def test_moment_matching_is_exact_for_one_gaussian_only():
    problems = posterior_problems(0.1)
    gaussian = posterior_error("moments", problems["one Gaussian"], samples=500, repeats=2)
    assert gaussian.verdict is Verdict.PASS
    mixture = posterior_error("moments", problems["wide modes"], samples=500, repeats=2)
    assert mixture.verdict is None  # it claims nothing there
    assert mixture.mode_error > 0.1 + mixture.mode_floor


def test_a_sampler_that_returns_no_numbers_fails():
    broken = lambda *arguments: torch.full((100, 2), math.nan)  # noqa: E731
    found = posterior_error(broken, posterior_problems()["two modes"], samples=100, repeats=2)
    assert found.verdict is Verdict.FAIL
    assert len(PosteriorReport([found]).failures()) == 1


def test_the_exact_posterior_is_calibrated_and_a_wrong_one_is_not():
    problem = posterior_problems(0.3)["two modes"]

    def exact(process, observation, times, n, g):
        posterior = problem.data.condition(observation)
        return posterior.sample(n, generator=g, dtype=torch.float64)

    def wrong(process, observation, times, n, g):
        bolder = Observation(observation.forward, observation.y, 0.15)
        return exact(process, bolder, times, n, g)

    assert calibration_ranks(exact, problem, draws=200).p_value > RARE
    assert calibration_ranks(wrong, problem, draws=200).p_value < RARE


WRONG = [
    (posterior_error, {"samples": 10}, ValueError, "samples must be at least 100"),
    (posterior_error, {"repeats": 1}, ValueError, "repeats must be at least 2"),
    (posterior_error, {"method": lambda *a: torch.zeros(3)}, ValueError, "must return samples of"),
    (posterior_error, {"method": "exct"}, ValueError, "method must be one of 'exact'"),
    (posterior_error, {"steps": 1}, ValueError, "steps must be at least 2"),
    (posterior_error, {"problem": "mask"}, TypeError, "problem must be a PosteriorProblem"),
    (calibration_ranks, {"draws": 0}, ValueError, "draws must be at least 1; got 0"),
    (calibration_ranks, {"samples": 0}, ValueError, "samples must be at least 1; got 0"),
]


@pytest.mark.parametrize(("measure", "arguments", "error", "message"), WRONG)
def test_bad_arguments_are_named(measure, arguments, error, message):
    given = {"method": "exact", "problem": posterior_problems()["two modes"], **arguments}
    with pytest.raises(error, match=message):
        measure(**given)


def test_every_method_and_problem_is_measured():
    quick = posterior_runs(quick=True)
    methods, names, *_ = zip(*quick, strict=True)
    assert set(methods) == {*posterior_methods(), *planted_samplers()}
    assert set(names) == set(NAMES)
    assert {noise for _, _, noise, _ in posterior_runs(quick=False)} == {1.0, 0.1, 0.01}
