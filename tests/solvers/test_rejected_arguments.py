"""Arguments that grids, noise sources, solves and samplers reject, by name.

Bad options of solvers are rows of test_options.py, bad arguments of any solve of test_contract.py.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

import cldsde
from cldsde import CLD, HOLD, VPSDE, LinearSDE, Observation, ReverseProcess, solvers
from cldsde.solvers import BrownianPath, GottaGoFast, Imputation, PredictorCorrector, SampleNoise
from cldsde.solvers import ExponentialMultistep as Multistep
from probes import Own, Smooth, hidden_times, start, untouchable
from references import wide_mixture
from score.cases import UNDERDAMPED
from solvers.test_settings import LAMBDAS, LEVELS, settings
from tolerances import EPS

NAN, INF, T, V = math.nan, math.inf, TypeError, ValueError
SDE, EM, SSCS = CLD(), solvers.EulerMaruyama(), solvers.SSCS()
GRID = solvers.root_times(1.0, 0.05, 4)
UP, TO_ZERO = GRID.flip(0), solvers.root_times(1.0, 0.0, 10)
HIDING = torch.tensor([1.0, hidden_times(UNDERDAMPED)[0], 0.01], dtype=torch.float64)


def bad(error, message, call, *values):
    """Rows of one function of one argument."""
    return [(partial(call, value), error, message) for value in values]


def plan(solver, sde=SDE, times=GRID):
    return solvers.plan(ReverseProcess(sde, untouchable), solver, times)


def solve(solver=EM, sde=SDE, score=untouchable, state=None, **options):
    state = start(sde) if state is None else state
    return solvers.solve(ReverseProcess(sde, score), solver, state, **{"times": GRID, **options})


# Grids.
FLOW, kappa_times = cldsde.RectifiedFlow(), partial(solvers.kappa_times, sde=SDE)
inverse = partial(solvers.times_of_kappa, SDE)
CASES = [
    *bad(V, "n must be at least 1; got", partial(solvers.root_times, 1.0, 1e-3), 0),
    *bad(T, "n must be an integer", partial(kappa_times, 1.0, 1e-3), 2.0),
    *bad(V, r"eps must lie in \[0, T\) with", partial(solvers.root_times, 1.0, n=9), 1.0, -1e-9),
    *bad(V, "T must be finite", partial(solvers.uniform_times, eps=1e-3, n=9), 0.0, NAN, INF),
    (lambda: kappa_times(1.0, 1 - 4 * EPS, 1000), V, "1000 steps .* below the resolution"),
    (lambda: solvers.logistic_times(1.0, 1e-3, 9, rate=0.0, sde=SDE), V, "rate must be finite"),
    (lambda: solvers.karras_times(1.0, 1e-3, 9, -7.0, sde=SDE), V, "rho must be finite"),
    (lambda: kappa_times(1.0, 0.0, 9), V, "eps must be above 0"),
    (lambda: solvers.kappa_times(1.0, 1e-3, 5, sde=FLOW), V, "T must be a time with a finite"),
    (lambda: solvers.karras_times(1.0, 1e-3, 9), T, "argument: 'sde'"),
    (lambda: solvers.kappa_times(1.0, 0.1, 1, sde="CLD"), T, "sde must be a LinearSDE; got str"),
    (lambda: SDE.kappa(0.0), V, "no density at t = 0"),
    *bad(T, "kappa must be a number", inverse, "3", [[1.0], [2.0, 3.0]]),
    (lambda: inverse(NAN), V, "kappa must not be NaN"),
    *bad(V, "eps", lambda ends: inverse(1.0, *ends), (0.5, 0.6), (1.0, 0.0)),
]

# Noise.
PATH = BrownianPath(SDE, GRID, (3, 2), dtype=torch.float64)
SHORT = BrownianPath(SDE, GRID, (3, 2), integrals=False, dtype=torch.float64)
NEEDS, OUTSIDE = "needs a BrownianPath with integrals=True", "an interval of the path must have"
ENDS = [(0.005, 0.5), (0.5, 1.001), (0.5, 0.5)]


def draw(noise):
    return solve(score=Smooth(SDE), state=start(SDE).float(), noise=noise)


def replay(*shapes):
    return draw(solvers.RecordedNoise([torch.zeros(shape) for shape in shapes]))


CASES += [
    (lambda: BrownianPath(SDE, GRID[:1], (3,)), V, r"times must be a tensor \(n \+ 1,\)"),
    (lambda: BrownianPath(SDE, GRID[[0, 2, 1]], (3,)), V, "times must increase or decrease"),
    (lambda: BrownianPath(SDE, GRID, ()), V, "shape must be"),
    *bad(V, OUTSIDE, lambda ends: PATH.increment(*ends), *ENDS),
    (lambda: solve(times=torch.tensor([1.0, 0.5, 0.001]), noise=PATH), V, OUTSIDE),
    (lambda: solve(sde=CLD(5), noise=PATH), V, r"noise must be a BrownianPath of CLD\(beta=5"),
    (lambda: solve(solvers.ExponentialEuler(), noise=SHORT), V, NEEDS),
    (lambda: PATH.normal(start(SDE), 1), RuntimeError, r"pass it to solve\(\.\.\., n"),
    (lambda: solve(state=start(SDE, (3, 1)), noise=PATH), V, "noise must have shape"),
    (lambda: draw(Own(torch.zeros(1, 1, 2))), V, r"shape \(3, 1, 2\) on cpu; got \(1, 1, 2\)"),
    (lambda: draw(Own(None)), T, "tensor of torch.float32; got NoneType"),
    (lambda: replay(*[(3, 1, 2)] * 3), V, r"shape \(3, 1, 2\).*; got 3 recorded draws"),
    (lambda: replay((3, 2, 2)), V, r"shape \(3, 1, 2\).*; got \(3, 2, 2\)"),
    (lambda: SampleNoise([1, 2]).normal(torch.zeros(3, 1, 4), 1), V, "per sample, 3; got 2 seeds"),
    *bad(V, r"seeds must be integers in \[0, 2³²\)", SampleNoise, [], [3, -1], [2**32]),
    *bad(T, r"seeds must be integers in", SampleNoise, [1, 1.5], [1, True]),
]

# Solves of some solvers.
OBLIQUE = -0.5 * np.diag([2.0, 1.0]) @ np.linalg.inv([[1.0, 0.5], [0.5, 1.0]])
CORRELATED = r"independent noises .* correlated ones\. Use SSCS"
NOT_LEVELS = [lambda t: -t, lambda t: t / 0, lambda t: t[:-1]]
CLOSE = torch.tensor([1.0, 1.0 - EPS / 2, 0.1], dtype=torch.float64)
SNR_STEPS, ONE = Multistep(variable="kappa"), solvers.root_times(1.0, 0.05, 7)
ANCESTRAL, CHURNED = solvers.Ancestral(), PredictorCorrector(solvers.EDMHeun(churn=1.5))
NOISY = Multistep(prediction="noise")


def encode(times=UP, **options):
    return solve(Multistep(), VPSDE(), times=times, **options)


def split(A, Q_root):
    return plan(solvers.Splitting(), LinearSDE.from_matrices(A, Q_root))


def made(result):
    class Made(solvers.EulerMaruyama):
        def step(self, z, *rest):
            return result(super().step(z, *rest)[0])

    return solve(Made(), score=Smooth(SDE))


CASES += [
    (lambda: plan(SNR_STEPS, cldsde.CosineVP(), ONE), V, "reach t = 1 with variable='kappa'"),
    (lambda: plan(SNR_STEPS, VPSDE(0.01, 0.02), CLOSE), V, "variable must be 'time' for this grid"),
    (lambda: split([[0, 1], [0, 0]], [[0], [1]]), V, r"2 components .* Use StochasticHeun$"),
    (lambda: split([[-1, 0], [0, -1]], [[0], [1]]), V, "2 components and no such distribution"),
    # Independent noises with a stationary covariance [[1, 1/2], [1/2, 1]].
    (lambda: split(OBLIQUE.tolist(), [[2**0.5, 0], [0, 1]]), V, CORRELATED),
    (lambda: solvers.TorchDiffEq(method="rk4").with_step(0.1), V, "method must be adaptive"),
    (lambda: encode(denoise=True), V, "denoise must be False for an increasing grid"),
    (lambda: encode(t_eval=GRID), V, "t_eval must run in the direction of times"),
    (lambda: encode(UP - 0.05), V, r"times must start above 0 .* draw states at"),
    (lambda: solve(GottaGoFast(atol=[0.01] * 3)), V, "atol must be a number or"),
    *bad(V, "one finite number ≥ 0 per", lambda f: plan(Multistep(stochasticity=f)), *NOT_LEVELS),
    (lambda: plan(Multistep(), SDE, TO_ZERO), V, r"must end above 0 .* denoise=True"),
    *bad(V, "not determine x_0", lambda x: plan(x, UNDERDAMPED, HIDING), Multistep(), NOISY),
    (lambda: solve(SSCS, UNDERDAMPED, times=HIDING[:2], denoise=True), V, "not determine x_0"),
    (lambda: plan(CHURNED, VPSDE(), TO_ZERO), V, "takes 19 evaluations in 10 steps. A grid"),
    (lambda: solve(ANCESTRAL, VPSDE(), times=TO_ZERO, log_prob=True), V, "to 0 adds no noise"),
    (lambda: made(lambda z: (z[:1], ())), V, r"Made\.step must return .*; got .*\(1, 2, 2\)"),
    (lambda: solve(score=lambda z, t: None), T, "score must return a real floating-point tensor"),
    (lambda: solve(score=lambda z, t: z[:, :1].to("meta")), V, "device, cpu; got meta"),
    (lambda: made(lambda z: z), T, r"Made\.step must .*; got Tensor"),
]

# Imputation.
IMAGE = (3, 2, 4)
KNOWN, MASK = torch.ones(IMAGE, dtype=torch.float64), torch.ones(IMAGE, dtype=torch.bool)
NO_STATE, FLOAT = "solver must have a state at each grid time", "must be a floating-point tensor"
BROADCAST, OTHER = r"mask must broadcast with known, \(3, 2, 4\)", "must hold data of the shape"
TWICE = Imputation(Multistep(order=2), KNOWN, MASK, resample=2, jump=1)


def impute(solver=SSCS, known=KNOWN, mask=MASK, **options):
    return Imputation(solver, known, mask, **options)


def imputed(imputation, shape=IMAGE, **options):
    return solve(imputation, state=start(SDE, (2, *shape)), **options)


CASES += [
    *bad(V, NO_STATE, impute, GottaGoFast(), Multistep(order=2, corrector=True)),
    (lambda: impute(known=MASK), T, f"known {FLOAT}"),
    (lambda: impute(known=KNOWN[0, 0, 0]), V, r"known must have shape \(\*D\) or"),
    (lambda: impute(known=KNOWN * INF), V, "known must be finite"),
    (lambda: impute(mask=MASK.double()), T, "mask must be a boolean tensor"),
    *bad(V, BROADCAST, lambda x: impute(mask=x), MASK[:2], MASK[None]),
    (lambda: impute(basis=[[1.0]]), T, f"basis {FLOAT}"),
    (lambda: impute(basis=torch.eye(4)), V, r"basis must be \(C, C\).*got \(4, 4\)"),
    (lambda: impute(basis=1.001 * torch.eye(3)), V, "basis must be orthonormal"),
    (lambda: impute(resample=0), V, "resample must be at least 1; got 0"),
    (lambda: imputed(impute(), shape=(3, 4, 2)), V, f"state {OTHER}"),
    (lambda: impute().impose(torch.zeros(2, 3, 4, 2)), V, f"data {OTHER}"),
    (lambda: imputed(TWICE, score=lambda z, t: -z[:, 1:]), V, "one-step solver if resample is"),
]

# Samplers in one call.
LATE = torch.tensor([1.0, 0.5, 0.1])
IDENTITY = cldsde.DenoiserScore(lambda u, sigma: u, HOLD(), noise_levels=(50.0, 80.0))
_, SEEN = wide_mixture()
LATEST = SEEN.end_time(SDE, (8,))


def sample(sde=None, score=untouchable, shape=(2, 3), **options):
    return cldsde.sample(VPSDE() if sde is None else sde, score, shape, **options)


def posterior(seen=SEEN, end=LATEST, score=untouchable, **options):
    times = solvers.root_times(1.0, end, 5)
    return solvers.sample_posterior(ReverseProcess(SDE, score), seen, times, **options)


def rows(count):
    return Observation(SEEN.forward, SEEN.y.expand(count, -1), SEEN.noise_std, SEEN.shape)


def noisy(std):
    return Observation(SEEN.forward, SEEN.y, std)


CASES += [
    *bad(V, r"shape must be \(B, \*D\)", lambda x: sample(shape=x), (3,), 3),
    (lambda: sample(shape=(0, 2)), V, "shape must be at least 1"),
    (lambda: sample(nfe=1), V, "too few for a step.*increase nfe to at least 2"),
    (lambda: sample(dtype=torch.int64), T, "dtype must be a floating-point type"),
    *bad(V, "device must be one that", lambda x: sample(device=x), "cuda:99", "gpu"),
    (lambda: sample(solver=solvers.SSCS), T, "solver must be a solver"),
    (lambda: sample(times=GRID.flip(0)), V, "times must decrease, from the noise to the data"),
    (
        lambda: sample(score=lambda x, t: x[:, 0]),
        V,
        r"got \(2, 3\) for states.*wrap it: DenoiserScore",
    ),
    (lambda: sample(score=None), T, "score must be a callable"),
    # The reason of the solver that was to be taken, for a flow that cannot start at t = 1.
    (lambda: sample(FLOW, times=LATE), V, "without a data prediction of its own"),
    (lambda: sample(score=lambda z, t: z * NAN, nfe=4), FloatingPointError, "not finite"),
    # HOLD reaches σ = 22 only.
    (lambda: sample(HOLD(), IDENTITY), V, "range of times .* is empty"),
    (lambda: posterior(threshold=1.5), V, "threshold must lie in"),
    (lambda: posterior(method="dps"), V, "method must be one of"),
    (lambda: posterior(seed=[1], generator=torch.Generator()), V, "alternatives"),
    # 32 rows are as many as particles of all runs.
    *bad(V, "one y for all part", lambda n: posterior(rows(n), seed=[1, 2]), 1, 2, 16, 32, 33),
    *bad(V, r"^seed must be integers in \[0, 2³²\)", lambda x: posterior(seed=x), -1, [], [2**32]),
    *bad(T, "^seed must be ", lambda x: posterior(seed=x), 1.5, True, [True], "1"),
    (lambda: posterior(shape=(4,)), V, "numbers; got data"),
    (lambda: posterior(dtype=torch.float8_e5m2), T, "dtype must be a floating-point type"),
    (lambda: posterior(score=lambda z, t: z[:, 1:] * NAN), ArithmeticError, "no particle of run"),
    (lambda: posterior(end=2 * LATEST), V, f"times must end at {LATEST:.3g} or earlier"),
    (lambda: posterior(noisy(0.0), 1e-3, shape=(8,)), V, "noise_std must be positive"),
    (lambda: posterior(noisy(0.1), 1e-3), V, "shape must be given"),
]

# Settings of samplers, and the search for them.
SAMPLED, made_of = ReverseProcess(VPSDE(), untouchable), partial(settings, SDE)
UNORDERED = [LEVELS[:1], (*LEVELS[:4], 0.5), (*LEVELS[:4], NAN)]


def fit(process=SAMPLED, **changes):
    how = {"shape": (3,), "nfe": 2, "samples": 4, "distance": len, "budget": 10**4} | changes
    return solvers.fit_sampler(process, **how)


CASES += [
    *bad(V, "kappa must be two or more incr.* finite", lambda x: made_of(kappa=x), *UNORDERED),
    (lambda: made_of(stochasticity=LAMBDAS[:3]), V, "one λ for each of 4 steps; got 3"),
    (lambda: made_of(stochasticity=(-0.1, 1, 1, 1)), V, "one finite λ ≥ 0 for each of 4 κ"),
    (lambda: made_of(order=4), V, "order must be 1, 2 or 3"),
    (lambda: made_of(kappa=3), T, "kappa must be"),
    (lambda: made_of(corrector=1), T, "corrector must be"),
    (lambda: sample(settings=made_of()), V, "for this process, VPSDE.*; got settings for CLD"),
    (
        lambda: sample(settings=settings(VPSDE(), kappa=(-7.0, *LEVELS[1:]))),
        V,
        r"reaches, from -5\.0.* to 11\.\d+; got \(-7",
    ),
    (lambda: sample(SDE, settings=made_of(), solver=SSCS), V, "solver and times must be None wit"),
    (lambda: sample(settings="fast"), T, "settings must be a SamplerSettings; got str"),
    *bad(V, "kappa must be increasing", lambda x: solvers.LevelNoise(x, x), (0.0, 0.0), ()),
    (lambda: solvers.LevelNoise((0.0, 1.0), (1.0,)), V, "must be one finite λ ≥ 0 for each of 2 κ"),
    (lambda: fit(ReverseProcess(UNDERDAMPED, untouchable), nfe=20), V, "is sampled by SSCS"),
    (lambda: fit(samples=0), V, "samples must be"),
    *bad(V, r"shape must be \(\*D\)", lambda x: solvers.recommend(SDE, 5, shape=x), (), 3),
    (lambda: solvers.recommend(SDE, 1), V, "1 evaluation is too few for a step"),
    (lambda: solvers.recommend(UNDERDAMPED, 20), V, "is sampled by SSCS"),
    (lambda: solvers.recommend(SAMPLED, 5, guidance=True), V, "guidance must be left out for a"),
    (lambda: solvers.recommend(SAMPLED, 5, levels=(0.1, 9)), V, "levels must be left out for a"),
    (lambda: solvers.recommend(SDE, 5, levels=(9, 0.1)), V, "levels must be two increasing"),
    (lambda: solvers.recommend(SDE, 5, shape=(2.5,)), T, "shape must be"),
    (lambda: sample(solver="unipc2"), V, "solver must be module:ClassName or one of"),
    (lambda: fit(budget=40), V, "budget must be at least 408, for 51 tries of 8 network"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_bad_arguments_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()
