"""Posteriors and the family around them, and the root that the probability flow carries.

Errors are measured in the units in which a posterior acts: Phi multiplies deviations of size L_t
and its result is compared with L_s. Single entries of Phi and differences of them may be far
less accurate than that: at t = 2 s, say, one entry of HOLD's Phi vanishes to leading order.
"""

import math
from collections import namedtuple
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import references
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE
from probes import generator, norm, normals, tensor
from references import Homogeneous, Reference, clock_of, initial_covariance
from references.interpolants import INTERPOLANTS
from references.kernels import array
from tolerances import rounding

# A transition over a clock B comes from |A| B doublings, at most a few hundred roundings here; the
# posterior adds a triangularisation and two solves. Measured: 5e-14, where |A| B = 200.
BAYES = 2e-13
# The family is integrated until halving the panels changes nothing by 1e-12. Measured: 3e-15.
FAMILY = 1e-12

A, Q_ROOT = torch.tensor([[0.0, 4.0], [-1.0, -4.0]]).double(), torch.tensor([[0.0], [2.5]]).double()
CHAIN = [[0.0, 0.4, 0.0, 0.0], [-1.4, 0.0, 1.2, 0.0], [0.0, -1.0, 0.0, 0.8], [0.0, 0.0, -1.7, -2.0]]
FOUR = tensor(CHAIN), tensor([[0.0], [0.0], [0.0], [1.5]])
PROCESSES: dict[str, tuple[LinearSDE, Reference]] = {
    "VP": (VPSDE(), references.vp()),
    "sub-VP": (SubVPSDE(), references.sub_vp()),
    "VE": (VESDE(), references.ve()),
    "CLD": (CLD(), references.cld()),
    "CLD, linear": (CLD(beta=(0.1, 20.0)), references.cld((0.1, 20.0))),
    "CLD, underdamped": (CLD(friction=0.5), references.cld(friction=0.5)),
    "CLD, overdamped": (CLD(friction=2.0), references.cld(friction=2.0)),
    "CLD, position noise": (CLD(position_noise=0.1), references.cld(position_noise=0.1)),
    "PSLD": (PSLD(), references.psld()),
    "HOLD": (HOLD(), references.hold()),
    "functions": (
        LinearSDE.from_functions(lambda t: 3 * A + 0 * t, lambda t: Q_ROOT + 0 * t),
        Homogeneous(3 * A, Q_ROOT, clock_of(1.0)),
    ),
    "four components": (LinearSDE.from_matrices(*FOUR), Homogeneous(*FOUR, clock_of(1.0))),
}

GAPS = [1e-8, 1e-5, 1e-2, 0.3, 1.0]
PAIRS = [(s, s + gap) for s in (0.0, 1e-8, 1e-4, 0.3) for gap in GAPS if s + gap <= 1]
PAIRS += [(1 - gap, 1.0) for gap in (1e-8, 1e-4, 1e-1)] + [(0.4, 0.4)]
STEPS = [(1e-8, 2e-8), (1e-4, 1.01e-4), (1e-3, 0.01), (0.3, 0.30001), (0.3, 1.0)]

# A posterior rounded once, for several pairs of times; a known component of z_s has no root.
Exact = namedtuple("Exact", "state initial covariance root earlier_mean later_mean earlier later")


def conditional(state: Any, earlier: Any, later: Any, covariance: Any = None) -> list[Any]:
    """The members of `Exact`, from Phi and the two marginals, as mpmath matrices."""
    if covariance is None:
        covariance = earlier.covariance - state * later.covariance * state.T
    covariance = (covariance + covariance.T) / 2
    # The rest of a known component is a difference of equal numbers of some 110 digits.
    for i in range(covariance.rows):
        if covariance[i, i] <= earlier.covariance[i, i] * mp.mpf(10) ** -60:
            covariance[i, :] = mp.zeros(1, covariance.rows)
            covariance[:, i] = mp.zeros(covariance.rows, 1)
    initial, root = earlier.mean - state * later.mean, references.cholesky(covariance)
    means_and_roots = earlier.mean, later.mean, earlier.root, later.root
    return [state, initial, covariance, root, *means_and_roots]


def rows(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1)


def ratio(error: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Largest error over its scale; 0 / 0 is 0."""
    return (error / torch.where(scale > 0, scale, 1e-300)).amax()


def covariance_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Errors of covariances in units of the standard deviations, as errors of correlations."""
    deviation = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    return ratio((actual - expected).abs(), deviation.unsqueeze(-1) * deviation.unsqueeze(-2))


def assert_agrees(found, exact, tolerance, condition=1.0):
    """Errors of a triangular root may grow by the condition of its rows."""
    for value in (found.state, found.initial, found.root):
        assert (value.dtype, value.shape) == (torch.float64, exact.state.shape)
    assert torch.equal(found.root, found.root.tril())
    # Rows of (Phi - K) L_t, relative to the rows of L_s and of |K| |L_t|, whose sum may cancel.
    scale = rows(exact.earlier) + rows(exact.state.abs() @ exact.later.abs())
    # An error of Phi is one of L_s E L_t^-1 with a small E, and Psi(t, 0) in units of L_t is large.
    whitened = torch.linalg.solve_triangular(exact.later, exact.later_mean, upper=False)
    sizes = rows(exact.earlier_mean) + rows(exact.state.abs() @ exact.later_mean.abs())
    sizes = sizes + rows(exact.earlier) * torch.linalg.matrix_norm(whitened).unsqueeze(-1)
    # The root is unique, and its diagonal good entry by entry, if z_s has a density.
    regular = (exact.root.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    error, root = (found.root - exact.root)[regular], exact.root[regular]
    assert (found.root.diagonal(dim1=-2, dim2=-1) >= 0).all()
    errors = {
        "state": ratio(rows((found.state - exact.state) @ exact.later), scale),
        "initial": ratio(rows(found.initial - exact.initial), sizes),
        "covariance": covariance_error(found.covariance, exact.covariance),
    }
    if regular.any():
        root = condition * root
        errors["root"] = ratio(rows(error), rows(root))
        errors["diagonal"] = ratio(*(x.diagonal(dim1=-2, dim2=-1) for x in (error.abs(), root)))
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.one_in(7)
@pytest.mark.parametrize("initial", ["own", "zero", "full"])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_posterior_agrees_with_bayes_rule_in_many_digits(name, initial):
    sde, exact = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    expected = []
    for s, t in PAIRS:
        with mp.workdps(references.DIGITS):
            earlier, later = exact.marginal(s, sigma), exact.marginal(t, sigma)
            psi = exact.transition(s, t).mean
            state = (mp.inverse(later.covariance) * psi * earlier.covariance).T
            expected.append(conditional(state, earlier, later))
    found = sde.posterior(*tensor(PAIRS).unbind(-1), initial_covariance=sigma)
    assert_agrees(found, Exact(*references.as_tensors(expected)), BAYES)


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, math.nextafter(1.0, 0.0), 1.0, 2.0])
@pytest.mark.parametrize("name", ["VP", "sub-VP", "VE", *INTERPOLANTS])
def test_one_component_has_the_closed_form_of_ddim(name, stochasticity):
    """Phi = (sigma_s / sigma_t) e^{-lambda^2 H}, H the gain of log(mean / sigma)."""
    sde, exact = (PROCESSES | INTERPOLANTS)[name]
    pairs = [*STEPS, (1e-8, 1e-4), (1e-3, 1.0), (1 - 1e-8, 1.0), (0.25 - 1e-9, 0.25 + 1e-9)]
    if exact.own[0] > 0:  # the start is regular
        pairs += [(0.0, 0.0), (0.0, 0.5)]
    expected = []
    for s, t in pairs:
        with mp.workdps(references.DIGITS):
            a, b = exact.marginal(s), exact.marginal(t)
            # e^{-H}, which is 0 if no signal is left at t.
            decay = b.mean[0] * a.root[0] / (a.mean[0] * b.root[0])
            decay **= mp.mpf(stochasticity) ** 2
            variance = a.covariance[0] * (1 - decay**2)
            state = mp.matrix([[a.root[0] / b.root[0] * decay]])
            expected.append(conditional(state, a, b, mp.matrix([[variance]])))
    found = sde.posterior(*tensor(pairs).unbind(-1), stochasticity=stochasticity)
    assert_agrees(found, Exact(*references.as_tensors(expected)), FAMILY)


def power_series(exact, span, stochasticity, sigma):
    """Phi of z' = (F + (1 + lambda^2)/2 G G^T Sigma^-1) z with a constant rate.

    Every expansion reaches a quarter of the way to t = 0, where Sigma is nearly singular.
    """
    with mp.workdps(70):
        s, time = map(mp.mpf, span)
        rate = exact.clock.rate(time)
        F, Q = array(exact.A * rate), array(exact.Q * rate)
        Q_half = Q * (1 + mp.mpf(stochasticity) ** 2) / 2
        zeros = 0 * F
        state = zeros + np.eye(len(F), dtype=int)
        while time > s:
            h = min(time / 4, mp.mpf("0.05"), time - s)
            covariance = exact.marginal(time, sigma).covariance
            cov, inverse, series = [array(covariance)], [array(mp.inverse(covariance))], [state]
            small = 0
            while small < 3:
                n = len(series) - 1
                gain = F @ cov[n]
                cov.append((gain + gain.T + (Q if n == 0 else zeros)) * -h / (n + 1))
                rest = sum((cov[j + 1] @ inverse[n - j] for j in range(n + 1)), zeros)
                pull = sum((inverse[j] @ series[n - j] for j in range(n + 1)), zeros)
                series.append((F @ series[n] + Q_half @ pull) * -h / (n + 1))
                inverse.append(-inverse[0] @ rest)
                size = abs(series[-1]).max() / abs(state).max()
                small = small + 1 if size < mp.mpf(10) ** -45 else 0
            state = sum(series[1:], series[0])
            time -= h
        return mp.matrix(state.tolist())


SERIES = [
    *(("CLD", "zero", (1e-3, 2e-3), 0.0), ("CLD", "full", (0.3, 0.3001), 2.0)),
    *(("CLD, underdamped", "full", (0.3, 0.5), 2.0), ("CLD, overdamped", "own", (0.3, 0.5), 0.3)),
    *(("CLD, position noise", "own", (1e-3, 1.01e-3), 0.3), ("PSLD", "own", (0.3, 0.5), 0.0)),
    *(("HOLD", "own", (1e-8, 2e-8), 0.3), ("HOLD", "zero", (0.3, 0.31), 2.0)),
    *(("HOLD", "full", (1e-3, 1.01e-3), 0.0), ("HOLD", "own", (0.4, 0.4), 0.3)),
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("name", "initial", "span", "stochasticity"), SERIES)
def test_the_family_agrees_with_its_power_series(name, initial, span, stochasticity):
    sde, exact = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    state = power_series(exact, span, stochasticity, sigma)
    with mp.workdps(references.DIGITS):
        marginals = [exact.marginal(time, sigma) for time in span]
        known = mp.zeros(sde.components, sde.components) if stochasticity == 0 else None
        expected = references.as_tensors([conditional(state, *marginals, known)])
    options = {"stochasticity": stochasticity, "initial_covariance": sigma}
    found = sde.posterior(*tensor(span)[:, None], **options)
    # The scaled rows of the noise root have a condition of 6.7 near t = 0.
    condition = 6.7 if (name, span) == ("HOLD", (1e-8, 2e-8)) else 1.0
    assert_agrees(found, Exact(*expected), FAMILY, condition)


# Panels are even in log time: a linear clock of 20 needs hundreds.
@pytest.mark.one_in(3)
@pytest.mark.parametrize("initial", ["own", "full"])
@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "CLD, linear"])
def test_the_flow_root_is_a_root_that_the_flow_carries(name, initial):
    sde, _ = PROCESSES[name]
    sigma, times = initial_covariance(initial, sde.components), tensor([1e-3, 0.03, 0.6, 1.0])
    R, marginal = sde.probability_flow_root(times, sigma), sde.marginal(times, sigma)
    # L times a rotation that is orthogonal to rounding.
    assert covariance_error(R @ R.mT, marginal.covariance) <= rounding(32)
    assert (R[-1] - marginal.root[-1]).abs().max() <= rounding(8, float(R[-1].abs().max()))
    # Phi_0(s, t) R_t = R_s.
    flow = sde.posterior(times[1:-1], times[2:], stochasticity=0.0, initial_covariance=sigma)
    scale = rows(R[1:-1]) + rows(flow.state.abs() @ R[2:].abs())
    assert ratio(rows(flow.state @ R[2:] - R[1:-1]), scale) <= FAMILY


def test_a_fast_flow_reaches_a_narrow_start():
    sde, sigma = CLD(beta=400.0, friction=0.01), 1e-6 * torch.eye(2, dtype=torch.float64)
    s, t = times = tensor([0.0, 0.5])
    R = sde.probability_flow_root(times, sigma)
    # Measured: 1 eps, and 40 without the Newton step, which makes the rotations orthogonal.
    assert covariance_error(R @ R.mT, sde.marginal(times, sigma).covariance) <= rounding()
    flow = sde.posterior(s, t, stochasticity=0.0, initial_covariance=sigma)
    assert norm(flow.state @ R[1] - R[0]) <= FAMILY * norm(R[0])


DECAYING = [CLD(beta=(4.0, 40.0), friction=2.0), VPSDE(beta_max=4000.0)]
DECAYING += [LinearSDE.from_matrices([[-1.0, 0.5], [-0.3, -100.0]], [[1.0], [1.0]])]


@pytest.mark.parametrize("sde", DECAYING, ids=repr)
def test_a_step_over_which_everything_decays_has_a_posterior(sde):
    # Psi is singular in float64, and has no inverse.
    s = torch.linspace(0.01, 0.99, 32, dtype=torch.float64)
    found, earlier = sde.posterior(s, 1.0), sde.marginal(s).covariance
    kept = found.state @ sde.marginal(1.0).covariance @ found.state.mT + found.covariance
    # Products of two factors with unit rows, and the exponential's own condition number ||A|| B.
    # For beta linear in t it is at most the largest ||F||.
    condition = float(sde.drift(tensor([0.0, 1.0])).abs().sum(1).max())
    assert covariance_error(kept, earlier) <= rounding(100 + 4 * condition)
    assert torch.isfinite(found.initial).all()


@pytest.mark.parametrize("stochasticity", [0.3, 1.0])
def test_times_broadcast(stochasticity):
    # The longest step decides the number of doublings and of panels: other roundings.
    sde, s, t = HOLD(), tensor([[0.1], [0.2], [0.4]]), tensor([0.4, 0.5, 0.7, 1.0])
    # The stochasticity may vary with the step.
    levels = torch.full((3, 4), stochasticity, dtype=torch.float64)
    found = sde.posterior(s, t, stochasticity=levels)
    for i, j in ((0, 0), (2, 0), (1, 3)):
        one = sde.posterior(s[i, 0], t[j], stochasticity=stochasticity)
        for name in ("state", "initial", "root"):
            together, alone = getattr(found, name), getattr(one, name)
            assert (together.shape, alone.shape) == ((3, 4, 3, 3), (3, 3))
            assert (together[i, j] - alone).abs().max() <= 10 * FAMILY
    empty = tensor([])
    assert CLD().posterior(empty, empty, stochasticity=stochasticity).state.shape == (0, 2, 2)
    assert CLD().probability_flow_root(empty).shape == (0, 2, 2)


@pytest.mark.parametrize("times", [0.5, [0.3, 0.5, 1.0]])
@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
def test_a_sample_is_the_mean_plus_the_root_times_normals(name, times):
    sde, _ = PROCESSES[name]
    k = sde.components
    found = sde.posterior(0.2, tensor(times))
    z_t, z_0, noise = (normals(seed, 3, k, 2, 4) for seed in (1, 2, 3))
    blocks = [x.expand(3, k, k) for x in (found.state, found.initial, found.root)]
    terms = zip(blocks, (z_t, z_0, noise), strict=True)
    first, second, third = (torch.einsum("bij,bj...->bi...", block, z) for block, z in terms)
    mean, sample = first + second, first + second + third
    # Sums of at most twelve terms below 400.
    bound = rounding(12, 400)
    assert (found.mean(z_t, z_0) - mean).abs().max() <= bound
    assert (found.sample(z_t, z_0, generator=generator(3)) - sample).abs().max() <= bound
    # The whitened distance has the condition of the root, below 1e3 here.
    normal = MultivariateNormal(torch.zeros(k).double(), scale_tril=blocks[2][:, None, None])
    expected = normal.log_prob(third.movedim(1, -1)).sum((-2, -1))
    assert (found.log_prob(sample, z_t, z_0) - expected).abs().max() <= rounding(100, 300 * 1e3)
    single = found.sample(z_t.float(), z_0.float(), generator=generator(3))
    assert single.dtype == found.log_prob(single, z_t.float(), z_0.float()).dtype == torch.float32


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_a_component_that_noise_does_not_reach_needs_a_spread_of_its_own(stochasticity):
    sde = LinearSDE.from_matrices([[-1.0, 0.0], [1.0, -1.0]], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="noise reaches every component"):
        sde.posterior(0.1, 0.5, stochasticity=stochasticity)
    sigma = torch.eye(2, dtype=torch.float64)
    found = sde.posterior(0.1, 0.5, stochasticity=stochasticity, initial_covariance=sigma)
    kept = found.state @ sde.marginal(0.5, sigma).covariance @ found.state.mT + found.covariance
    assert covariance_error(kept, sde.marginal(0.1, sigma).covariance) <= FAMILY
