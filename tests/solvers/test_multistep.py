"""`ExponentialMultistep`: exact on point data and polynomials, and methods that it contains.

On data that are one point x0 the distribution at t is N(psi x0, Sigma), and the process of
stochasticity l

    dz = [F z + (1 + l^2)/2 G G^T Sigma^-1 (z - psi x0)] dt + l G dw

is linear. A made-up data prediction p(t) in place of x0 keeps it linear: an ODE solver then gives
the exact answer, whatever the polynomials' weights.
"""

import functools
import itertools
import math

import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.solvers import ExponentialMultistep as Multistep
from cldsde.solvers import RecordedNoise
from cldsde.validation import propagate_moments
from probes import generator, name_of_case, start, untouchable
from score import cases

PROCESSES = {
    "VP": VPSDE(0.1, 8.0),
    "VE": VESDE(0.1, 5.0),
    "CLD": CLD(),
    "CLD, linear": CLD((1.0, 7.0)),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
}
ONE = GaussianMixture([1.0], [[0.7]], [[[0.0]]])
MODES = GaussianMixture(
    [0.3, 0.3, 0.4], [[-1.0, 0.2], [0.8, 0.8], [0.4, -1.0]], [[[0.04, 0.0], [0.0, 0.09]]] * 3
)
GRID = solvers.root_times(1.0, 0.05, 5)


def level(t):
    """A stochasticity that is 1.5 early and 0 late."""
    return 1.5 * (t > 0.4)


PUBLISHED = {"variable": "log_snr", "weights": "published"}
VARIANTS = [
    {"order": k, "corrector": c, "stochasticity": x}
    for k in (1, 2, 3)
    for c in (False, True)
    for x in (0.0, 0.5, 1.0, level)
    if x != 0.5 or k == 3
]
VARIANTS += [{"order": k, "prediction": "noise"} for k in (1, 2, 3)]
VARIANTS += [
    {"order": k, "corrector": True, "variable": "log_snr", "stochasticity": x}
    for k in (1, 2, 3)
    for x in (0.0, 1.0)
]
VARIANTS += [{"order": k, "corrector": True, **PUBLISHED} for k in (1, 2)]


def linear_flow(sde, predicted, z, ends, stochasticity=0.0, tolerance=1e-12):
    """The mean path of the linear process with a given data prediction, in x = log t."""
    pull = (1 + stochasticity**2) / 2

    def slope(x, flat):
        t = math.exp(x)
        kernel, G = sde.marginal(t), sde.diffusion(t)
        state = torch.from_numpy(flat).reshape(sde.components, -1)
        away = torch.linalg.solve(kernel.covariance, state - kernel.mean[:, :1] * predicted(t))
        return (t * (sde.drift(t) @ state + pull * G @ G.mT @ away)).flatten().numpy()

    begin = z.movedim(0, -1).flatten().numpy()
    times = [math.log(t) for t in ends]
    options = {"method": "DOP853", "rtol": tolerance, "atol": 0.1 * tolerance}
    end = torch.from_numpy(solve_ivp(slope, times, begin, **options).y[:, -1])
    return end.reshape(sde.components, *z.shape[2:], len(z)).movedim(-1, 0)


class TestPoint:
    """Data that are one point."""

    # The covariance of HOLD given the data grades like t^2, t^4, t^6: below 1e-2 its inverse and
    # the reference's is of little use.
    @pytest.mark.parametrize(
        ("name", "steps", "end"),
        [("VP", 5, 1e-3), ("CLD, linear", 1, 1e-3), ("PSLD", 5, 1e-3), ("HOLD", 1, 1e-2)],
    )
    @pytest.mark.parametrize("options", VARIANTS, ids=name_of_case)
    def test_the_distribution_given_the_point_is_kept(self, options, name, steps, end):
        sde = PROCESSES[name]
        if "prediction" in options:
            # Polynomials through the noise invert a root at every step, whose condition squares
            # the rounding: one step, and not near the data.
            steps, end = 1, 0.3
        first, last = sde.marginal(1.0), sde.marginal(end)
        mean, covariance = propagate_moments(
            ReverseProcess(sde, ONE.score(sde)),
            Multistep(**options),
            solvers.root_times(1.0, end, steps),
            0.7 * first.mean[:, :1],
            first.covariance,
        )
        spread = last.covariance.diagonal().sqrt()
        # Rounding of the score, in units of the spread; each step may add its own.
        size = 100 * steps * cases.score_rounding(sde, end)
        assert ((mean - 0.7 * last.mean[:, :1]).abs()[:, 0] <= size * (spread + 1)).all()
        assert ((covariance - last.covariance).abs() <= size * torch.outer(spread, spread)).all()


class TestPolynomials:
    """Weights of the predictions."""

    @pytest.mark.parametrize(
        ("stochasticity", "corrector"), [(0.0, False), (0.5, True), (1.0, False)]
    )
    @pytest.mark.parametrize(
        ("name", "order"),
        [("VP", 1), ("VP", 2), ("VP", 3), ("CLD, linear", 2), ("CLD, linear", 3), ("HOLD", 3)],
    )
    def test_a_polynomial_prediction_is_integrated_exactly(
        self, name, order, corrector, stochasticity
    ):
        sde = PROCESSES[name]

        def predicted(t):
            return sum(c * t**j for j, c in enumerate([0.5, -1.5, 2.0][:order]))

        def score(z, t):
            kernel = sde.marginal(float(t[0]))
            away = z - kernel.mean[:, :1] * predicted(float(t[0]))
            return -torch.linalg.solve(kernel.covariance, away)[:, list(sde.driven)]

        solver = Multistep(order=order, corrector=corrector, stochasticity=stochasticity)
        process, z = ReverseProcess(sde, score), start(sde)
        times = solvers.quadratic_times(1.0, 0.3, 6)
        noise = torch.zeros(3, sde.components, 2, dtype=torch.float64)

        def run(grid):
            return solvers.solve(process, solver, z, grid, noise=RecordedNoise([noise] * 6)).state

        # The first steps know fewer predictions than the degree needs; those after are exact.
        known = run(times[: order + 1])
        ends = float(times[order]), float(times[-1])
        expected = linear_flow(sde, predicted, known, ends, stochasticity)
        # The reference's error, 1e-12 per step, grown along the way.
        size = max(1.0, float(expected.abs().max()), float(known.abs().max()))
        assert (run(times) - expected).abs().max() <= 1e-9 * size

    @pytest.mark.parametrize("name", ["VE", "CLD, linear", "HOLD"])
    @pytest.mark.parametrize("variable", ["time", "log_snr"])
    @pytest.mark.parametrize("stochasticity", [0.0, 1.0, level])
    def test_weights_of_any_order_sum_to_the_weight_of_a_constant(
        self, name, variable, stochasticity
    ):
        process = ReverseProcess(PROCESSES[name], lambda z, t: z)
        times = solvers.root_times(1.0, 0.01, 7)
        options = {"corrector": True, "variable": variable, "stochasticity": stochasticity}
        prepared = [Multistep(order=k, **options).prepare(process, times) for k in (1, 2, 3)]
        for i, (count, tables) in itertools.product(range(7), enumerate(prepared, 1)):
            constant = torch.tensor(prepared[0].weights[i][0], dtype=torch.float64)
            for table, more in ((tables.weights, 0), (tables.corrector, 1)):
                blocks = torch.tensor(table[i], dtype=torch.float64)
                assert len(blocks) == min(count, i + 1) + more
                # A few roundings.
                assert (blocks.sum(0) - constant).abs().max() <= 1e-14 * blocks.abs().max()


class TestDiffusers:
    """With one component it does the same as the schedulers of the library diffusers."""

    N = 9
    SDE = VPSDE(0.1, 8.0)
    TIMES = solvers.root_times(1.0, 0.02, N)

    @pytest.fixture
    def setting(self):
        kernel = self.SDE.marginal(self.TIMES)
        alpha, sigma = kernel.mean[:, 0, 0], kernel.root[:, 0, 0]
        draws = torch.randn(self.N, 6, 1, 2, generator=generator(3), dtype=torch.float64)
        return pytest.importorskip("diffusers"), alpha, sigma / alpha, list(draws)

    def prediction(self, x, i):
        return MODES.posterior_mean(self.SDE, x.unsqueeze(1), float(self.TIMES[i]))

    def check(self, x, draws, **options):
        process, z = ReverseProcess(self.SDE, MODES.score(self.SDE)), start(self.SDE, (6, 2))
        noise = RecordedNoise(draws)
        found = solvers.solve(process, Multistep(**options), z, self.TIMES, noise=noise).data
        # Both in float64; scores and predictions convert with an error of some 1e-13, which the
        # prediction's slope between the modes may raise.
        assert x.dtype == torch.float64
        assert torch.allclose(found, x, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("stochasticity", [0.0, 1.0])
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("midpoint", {"order": 1}),
            ("midpoint", {"order": 2, **PUBLISHED}),
            ("heun", {"order": 2, "variable": "log_snr"}),
        ],
    )
    def test_dpm_solver(self, setting, kind, options, stochasticity):
        diffusers, _, sigma, draws = setting
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=options["order"],
            algorithm_type="sde-dpmsolver++" if stochasticity else "dpmsolver++",
            solver_type=kind,
            prediction_type="sample",
            lower_order_final=False,
        )
        scheduler.set_timesteps(self.N)
        scheduler.sigmas = sigma
        # Its `step` rounds the state to single precision; the formulas that it chooses do not.
        first = scheduler.dpm_solver_first_order_update
        second = scheduler.multistep_dpm_solver_second_order_update
        x, outputs = start(self.SDE, (6, 2))[:, 0], []
        for i in range(self.N):
            scheduler._step_index = i
            outputs.append(self.prediction(x, i))
            noise = draws[i][:, 0]
            if options["order"] == 1 or i == 0:
                x = first(outputs[-1], sample=x, noise=noise)
            else:
                x = second(outputs, sample=x, noise=noise)
        self.check(x, draws, **options, stochasticity=stochasticity)

    @pytest.mark.parametrize("order", [1, 2])
    def test_unipc(self, setting, order):
        diffusers, _, sigma, draws = setting
        scheduler = diffusers.UniPCMultistepScheduler(
            solver_order=order,
            solver_type="bh2",
            prediction_type="sample",
            lower_order_final=False,
        )
        scheduler.set_timesteps(self.N)
        scheduler.sigmas, scheduler.timesteps = sigma, torch.arange(self.N)
        x = start(self.SDE, (6, 2))[:, 0]
        for i in range(self.N):
            x = scheduler.step(self.prediction(x, i), i, x).prev_sample
        self.check(x, draws, order=order, corrector=True, **PUBLISHED)


@pytest.mark.parametrize(("radius", "deviation"), [(1.0, 0.1), (2**0.5, 0.2)])
def test_twenty_evaluations_reach_a_hundredth_on_a_ring_of_modes(radius, deviation):
    # Under CLD; between two modes the flow is unstable, so that a few of the samples dominate.
    angle, end = torch.arange(8, dtype=torch.float64) * math.pi / 4, 1e-3
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    covariance = deviation**2 * torch.eye(2, dtype=torch.float64)
    sde = CLD()
    score = GaussianMixture([1.0] * 8, means, covariance.expand(8, 2, 2)).score(sde)
    process, z = ReverseProcess(sde, score), start(sde, (500, 2))

    def slope(x, flat):
        state = torch.from_numpy(flat).reshape(z.shape)
        return math.exp(x) * process.probability_flow(state, math.exp(x)).flatten().numpy()

    options = {"method": "DOP853", "rtol": 1e-6, "atol": 1e-7}
    reference = solve_ivp(slope, [0.0, math.log(end)], z.flatten().numpy(), **options)
    expected = torch.from_numpy(reference.y[:, -1]).reshape(z.shape)[:, 0]

    def rms(grid):
        solver = Multistep(order=3, corrector=True)
        found = solvers.solve(process, solver, z, grid(1.0, end, 20)).data
        return (found - expected).square().mean().sqrt()

    error = rms(functools.partial(solvers.logistic_times, sde))
    assert error < 1e-2
    assert error < rms(solvers.root_times) / 1.5


class TestRejected:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *[({"order": x}, "order must be 1, 2 or 3; got") for x in (0, 4, "2", 1.5, 2.0)],
            ({"prediction": "score"}, "prediction must be one of"),
            ({"variable": "t"}, "variable must be one of"),
            ({"weights": "approximate"}, "weights must be one of"),
            ({"stochasticity": -0.1}, "stochasticity must be finite and at least 0"),
            ({"stochasticity": math.inf}, "stochasticity must be finite and at least 0"),
            ({"stochasticity": "1"}, "stochasticity must be a real number"),
            ({"prediction": "noise", "stochasticity": 0.5}, "which is deterministic"),
            ({"prediction": "noise", "stochasticity": level}, "which is deterministic"),
            ({"weights": "published"}, "needs variable='log_snr'"),
            ({"weights": "published", "variable": "time"}, "needs variable='log_snr'"),
            ({**PUBLISHED, "order": 3}, "order 1 or 2"),
        ],
        ids=name_of_case,
    )
    def test_bad_options(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            Multistep(**options)

    @pytest.mark.parametrize(
        "function",
        [lambda t: -t, lambda t: t / 0, lambda t: t[:-1], lambda t: t[None], lambda t: 1],
    )
    def test_stochasticity_that_is_not_one_number_per_time(self, function):
        process, solver = ReverseProcess(CLD(), untouchable), Multistep(stochasticity=function)
        with pytest.raises(ValueError, match="one finite number ≥ 0 per time"):
            solvers.solve(process, solver, start(CLD()), GRID)

    @pytest.mark.parametrize("name", list(PROCESSES))
    def test_a_grid_that_ends_at_the_data(self, name):
        process = ReverseProcess(PROCESSES[name], untouchable)
        for options in ({}, {"prediction": "noise"}, {"stochasticity": 1.0}):
            with pytest.raises(ValueError, match=r"must end above 0 .* denoise=True"):
                solvers.plan(process, Multistep(**options), solvers.root_times(1.0, 0.0, 4))

    @pytest.mark.parametrize("prediction", ["data", "noise"])
    def test_a_time_at_which_an_underdamped_process_hides_the_data(self, prediction):
        sde = CLD(friction=0.4)
        t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
        kernel = sde.marginal(t)
        weight = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, 1, 0]
        lost = float(t[(weight[1:] * weight[:-1] < 0).nonzero().flatten()[0]])
        times = torch.tensor([1.0, lost, 0.01], dtype=torch.float64)
        with pytest.raises(ValueError, match="does not determine x_0"):
            solvers.plan(ReverseProcess(sde, untouchable), Multistep(prediction=prediction), times)


class TestStochasticity:
    @staticmethod
    def end(solver, sde, **options):
        process = ReverseProcess(sde, MODES.score(sde))
        return solvers.solve(process, solver, start(sde), GRID, **options).state

    @pytest.mark.parametrize("x", [0, lambda t: 0.0 * t])
    def test_without_it_no_noise_is_drawn(self, x):
        self.end(Multistep(stochasticity=x), CLD(), noise=RecordedNoise([]))

    @pytest.mark.parametrize("x", [0.5, 1.0])
    @pytest.mark.parametrize("order", [1, 3])
    def test_constant_functions_are_numbers(self, order, x):
        found, expected = (
            self.end(Multistep(order=order, stochasticity=value), CLD(), generator=generator())
            for value in (lambda t: torch.full_like(t, x), x)
        )
        # A family of stochasticities by its ODE, to 1e-10 per step, or Bayes' rule for 1.
        assert torch.allclose(found, expected, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", list(PROCESSES))
    def test_at_one_the_first_order_is_ancestral_sampling(self, name):
        one, other = (
            self.end(solver, PROCESSES[name], generator=generator())
            for solver in (solvers.Ancestral(), Multistep(order=1, stochasticity=1.0))
        )
        # Two ways to the posterior, whose gain loses three digits.
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
