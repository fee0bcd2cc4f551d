"""Posteriors and the family around them, and the root that the probability flow carries.

Errors are measured in the units in which a posterior acts: Phi multiplies deviations of size L_t
and its result is compared with L_s. Single entries of Phi and differences of them may be far
less accurate than that: at t = 2 s, say, one entry of HOLD's Phi vanishes to leading order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from cldsde.linear.posterior import Posterior
from linear import reference
from strategies import StableProcess, intervals, stable_process, stable_processes

EPS = torch.finfo(torch.float64).eps

# A transition over a clock B comes from |A| B doublings, at most a few hundred roundings here; the
# posterior adds a triangularisation and two solves. Measured: 5e-14, where |A| B = 200.
TOLERANCE = 2e-13
# The family is integrated until halving the panels changes nothing by 1e-12. Measured: 3e-15.
FAMILY_TOLERANCE = 1e-12

ALL_NOISE = stable_process(14, 4, "chain")
PROCESSES: dict[str, tuple[LinearSDE, reference.Reference]] = {
    "VP": (VPSDE(), reference.vp()),
    "sub-VP": (SubVPSDE(), reference.sub_vp()),
    "VE": (VESDE(), reference.ve()),
    "CLD": (CLD(), reference.cld()),
    "CLD, linear": (CLD(beta=(0.1, 20.0)), reference.cld((0.1, 20.0))),
    "CLD, underdamped": (CLD(friction=0.5), reference.cld(friction=0.5)),
    "CLD, overdamped": (CLD(friction=2.0), reference.cld(friction=2.0)),
    "CLD, position noise": (CLD(position_noise=0.1), reference.cld(position_noise=0.1)),
    "PSLD": (PSLD(), reference.psld()),
    "HOLD": (HOLD(), reference.hold()),
    "four components": (
        ALL_NOISE.sde(3.0),
        reference.from_matrices(ALL_NOISE.A, ALL_NOISE.Q_root, reference.constant_clock(3.0)),
    ),
}
INITIALS = ["own", "zero", "data"]

GAPS = [1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 0.6, 1.0]
STARTS = [0.0, 1e-8, 1e-4, 0.3]
PAIRS = [(s, s + gap) for s in STARTS for gap in GAPS if s + gap <= 1]
PAIRS += [(1 - gap, 1.0) for gap in (1e-8, 1e-4, 1e-1)]


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def initial_covariance(kind: str, components: int) -> torch.Tensor | None:
    """None (the process's own), zeros, or data of variance 0.1225 and a little of the rest."""
    if kind == "own":
        return None
    sigma = torch.zeros(components, components, dtype=torch.float64)
    if kind == "data":
        sigma[0, 0] = 0.1225
        sigma.diagonal()[1:] = 0.04
    return sigma


class Exact(NamedTuple):
    """What a posterior should be, as float64 tensors rounded once; leading axis: the pairs."""

    state: torch.Tensor
    initial: torch.Tensor
    covariance: torch.Tensor
    root: torch.Tensor
    """Zero column where a component of z_s is known."""
    earlier_mean: torch.Tensor
    later_mean: torch.Tensor
    earlier: torch.Tensor
    later: torch.Tensor


def exact_law(state: Any, earlier: reference.Law, later: reference.Law) -> list[Any]:
    """The members of `Exact`, from Phi and the two marginals, as mpmath matrices."""
    covariance = earlier.covariance - state * later.covariance * state.T
    covariance = (covariance + covariance.T) / 2
    # What is left of a known component is a difference of equal numbers of some 110 digits.
    for i in range(covariance.rows):
        if covariance[i, i] <= earlier.covariance[i, i] * mp.mpf(10) ** -60:
            covariance[i, :] = mp.zeros(1, covariance.rows)
            covariance[:, i] = mp.zeros(covariance.rows, 1)
    return [
        state,
        earlier.mean - state * later.mean,
        covariance,
        reference.cholesky(covariance),
        earlier.mean,
        later.mean,
        earlier.root,
        later.root,
    ]


def stack(laws: Sequence[Sequence[Any]]) -> Exact:
    parts = zip(*laws, strict=True)
    return Exact(
        *(torch.stack([tensor([[*map(float, r)] for r in m.tolist()]) for m in p]) for p in parts)
    )


@functools.cache
def exact_posteriors(name: str, kind: str) -> Exact:
    """K = Sigma_s Psi^T Sigma_t^-1 and P = Sigma_s - K Sigma_t K^T, for all PAIRS."""
    sde, exact = PROCESSES[name]
    sigma = initial_covariance(kind, sde.components)
    laws = []
    for s, t in PAIRS:
        with mp.workdps(reference.DIGITS):
            earlier, later = exact.marginal(s, sigma), exact.marginal(t, sigma)
            psi = exact.transition(s, t).mean
            state = (mp.inverse(later.covariance) * psi * earlier.covariance).T
            laws.append(exact_law(state, earlier, later))
    return stack(laws)


def rows(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1)


def ratio(error: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Largest error over its scale; 0 / 0 is 0."""
    return (error / torch.where(scale > 0, scale, 1e-300)).amax()


def state_error(state: torch.Tensor, expected: torch.Tensor, exact: Exact) -> torch.Tensor:
    """Rows of (Phi - K) L_t, relative to those of L_s and of |K| |L_t|, whose sum may cancel."""
    scale = rows(exact.earlier) + rows(expected.abs() @ exact.later.abs())
    return ratio(rows((state - expected) @ exact.later), scale)


def covariance_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Errors of covariances in units of the standard deviations, as errors of correlations."""
    deviation = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    return ratio((actual - expected).abs(), deviation.unsqueeze(-1) * deviation.unsqueeze(-2))


def errors(law: Posterior, exact: Exact) -> dict[str, float]:
    # The root is unique, and good entry by entry of its diagonal, where z_s has a density.
    diagonal = exact.root.diagonal(dim1=-2, dim2=-1)
    regular = (diagonal > 0).all(-1)
    root, expected = law.root[regular], exact.root[regular]
    differences = (root - expected).diagonal(dim1=-2, dim2=-1)
    # An error of Phi is one of L_s E L_t^-1 with a small E, and Psi(t, 0) in units of L_t is large.
    whitened = torch.linalg.solve_triangular(exact.later, exact.later_mean, upper=False)
    scale = rows(exact.earlier_mean) + rows(exact.state.abs() @ exact.later_mean.abs())
    scale = scale + rows(exact.earlier) * torch.linalg.matrix_norm(whitened).unsqueeze(-1)
    found = {
        "state": state_error(law.state, exact.state, exact),
        "initial": ratio(rows(law.initial - exact.initial), scale),
        "covariance": covariance_error(law.covariance, exact.covariance),
    }
    if bool(diagonal[regular].numel()):
        found["root"] = ratio(rows(root - expected), rows(expected))
        found["diagonal of root"] = ratio(differences.abs(), diagonal[regular])
    return {name: float(error) for name, error in found.items()}


def assert_agrees(law: Posterior, exact: Exact, tolerance: float) -> None:
    for value in (law.state, law.initial, law.root):
        assert value.dtype == torch.float64
        assert value.shape == exact.state.shape
        assert value.isfinite().all()
    assert torch.equal(law.root, law.root.tril())
    assert (law.root.diagonal(dim1=-2, dim2=-1) >= 0).all()
    found = errors(law, exact)
    assert all(error <= tolerance for error in found.values()), found


# The Bayesian posterior ------------------------------------------------------------------------


@pytest.mark.parametrize("initial", INITIALS)
@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_posterior_agrees_with_bayes_rule_in_many_digits(name: str, initial: str) -> None:
    sde, _ = PROCESSES[name]
    s, t = tensor(PAIRS).unbind(-1)
    sigma = initial_covariance(initial, sde.components)
    law = sde.posterior(s, t, initial_covariance=sigma)
    assert_agrees(law, exact_posteriors(name, initial), TOLERANCE)


def test_one_component_has_the_closed_form_of_ddpm() -> None:
    # Ho, Jain and Abbeel 2020, eq. 7, with alpha-bar(t) = m(t)^2 and beta = 1 - m(t, s)^2.
    # A dozen roundings; the two differences 1 - m^2 lose a factor of six at s = 0.1.
    sde = VPSDE()
    m_s, m_t = (float(sde.marginal(t).mean) for t in (0.1, 0.2))
    a = float(sde.transition(0.1, 0.2).mean)
    law = sde.posterior(0.1, 0.2)
    assert law.state.item() == pytest.approx(a * (1 - m_s**2) / (1 - m_t**2), rel=256 * EPS)
    assert law.initial.item() == pytest.approx(m_s * (1 - a**2) / (1 - m_t**2), rel=256 * EPS)
    variance = (1 - m_s**2) / (1 - m_t**2) * (1 - a**2)
    assert law.covariance.item() == pytest.approx(variance, rel=256 * EPS)


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("initial", ["own", "zero"])
def test_at_the_start_of_a_known_state_nothing_is_left_to_chance(name: str, initial: str) -> None:
    sde, _ = PROCESSES[name]
    known = (
        sde.marginal(0.0, initial_covariance(initial, sde.components)).covariance.diagonal() == 0
    )
    sigma = initial_covariance(initial, sde.components)
    law = sde.posterior(0.0, 0.3, initial_covariance=sigma)
    assert not law.state[known].any()
    assert not law.root[known].any()
    assert torch.equal(law.initial[known], torch.eye(sde.components).double()[known])


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_an_empty_step_changes_nothing(name: str, stochasticity: float) -> None:
    # Of the identity only what |Phi| |L_t| measures is good; the clocks are zero, so that it is
    # one solve with L_t and one product.
    sde, _ = PROCESSES[name]
    law = sde.posterior(0.4, 0.4, stochasticity=stochasticity)
    root = sde.marginal(0.4).root
    eye = torch.eye(sde.components, dtype=torch.float64)
    assert ratio(rows((law.state - eye) @ root), rows(root)) <= 64 * EPS
    assert law.root.abs().max() <= 1e-100
    with pytest.raises(ValueError, match="no density"):
        law.log_prob(*torch.zeros(3, 1, sde.components, dtype=torch.float64))


# The family ------------------------------------------------------------------------------------


def scalar_family(name: str, stochasticity: float, pairs: Sequence[tuple[float, float]]) -> Exact:
    """k = 1: Phi = (sigma_s / sigma_t) e^{-lambda^2 H}, H the gain of log(mean / sigma)."""
    exact = PROCESSES[name][1]
    laws = []
    for s, t in pairs:
        with mp.workdps(reference.DIGITS):
            earlier, later = exact.marginal(s), exact.marginal(t)
            H = mp.log(earlier.mean[0] / earlier.root[0]) - mp.log(later.mean[0] / later.root[0])
            decay = mp.exp(-(mp.mpf(stochasticity) ** 2) * H)
            law = exact_law(mp.matrix([[earlier.root[0] / later.root[0] * decay]]), earlier, later)
            variance = earlier.covariance[0] * -mp.expm1(-2 * mp.mpf(stochasticity) ** 2 * H)
            law[2:4] = mp.matrix([[variance]]), mp.matrix([[mp.sqrt(variance)]])
            laws.append(law)
    return stack(laws)


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, math.nextafter(1.0, 0.0), 1.0, 2.0])
@pytest.mark.parametrize("name", ["VP", "sub-VP", "VE"])
def test_one_component_has_the_closed_form_of_ddim(name: str, stochasticity: float) -> None:
    sde, _ = PROCESSES[name]
    pairs = [*STEPS, (1e-8, 1e-8 + 1e-8), (1e-8, 1e-4), (1e-3, 1.0), (1 - 1e-8, 1.0)]
    s, t = tensor(pairs).unbind(-1)
    law = sde.posterior(s, t, stochasticity=stochasticity)
    assert_agrees(law, scalar_family(name, stochasticity, pairs), FAMILY_TOLERANCE)


def taylor_family(
    exact: reference.Homogeneous,
    rate: float,
    span: tuple[float, float],
    stochasticity: float,
    sigma: Any,
) -> Exact:
    """Phi from the power series of z' = (F + (1 + lambda^2)/2 G G^T Sigma^-1) z, re-expanded.

    Every expansion reaches a quarter of the way to t = 0, where Sigma is nearly singular.
    """
    with mp.workdps(70):
        s, time = map(mp.mpf, span)
        F, Q = exact.drift * mp.mpf(rate), exact.noise * mp.mpf(rate)
        Q_half = Q * (1 + mp.mpf(stochasticity) ** 2) / 2
        state = mp.eye(F.rows)
        while time > s:
            h = min(time / 4, mp.mpf("0.05"), time - s)
            cov = [exact.marginal(time, sigma).covariance]
            inverse, series = [mp.inverse(cov[0])], [state]
            small = 0
            while small < 3:
                n = len(series) - 1
                gain = F * cov[n]
                gain = gain + gain.T + (Q if n == 0 else 0 * Q)
                cov.append(gain * -h / (n + 1))
                rest, pull = mp.zeros(F.rows, F.rows), mp.zeros(F.rows, F.rows)
                for j in range(n + 1):
                    rest += cov[j + 1] * inverse[n - j]
                    pull += inverse[j] * series[n - j]
                series.append((F * series[n] + Q_half * pull) * -h / (n + 1))
                inverse.append(-inverse[0] * rest)
                size = mp.mnorm(series[-1], "f") / mp.mnorm(state, "f")
                small = small + 1 if size < mp.mpf(10) ** -45 else 0
            state = sum(series[1:], series[0])
            time -= h
        earlier, later = exact.marginal(span[0], sigma), exact.marginal(span[1], sigma)
        return stack([exact_law(state, earlier, later)])


# Panels are even in log time: a linear clock of 20 needs hundreds, and is left out here.
FAMILIES = [name for name in PROCESSES if name != "CLD, linear"]
STEPS = [(1e-8, 2e-8), (1e-4, 1.01e-4), (1e-3, 0.01), (0.3, 0.30001), (0.3, 1.0)]
RATES = {"PSLD": 8.0}  # of the others: 4
FAMILY = [
    ("CLD", "own", (1e-8, 2e-8), 0.3),
    ("CLD", "zero", (1e-3, 5e-3), 0.0),
    ("CLD", "data", (0.3, 0.3001), 2.0),
    ("CLD, underdamped", "data", (0.3, 0.5), 2.0),
    ("CLD, overdamped", "own", (0.3, 0.5), 0.3),
    ("CLD, position noise", "own", (1e-3, 1.01e-3), 0.3),
    ("PSLD", "own", (0.3, 0.5), 0.0),
    ("PSLD", "zero", (1e-8, 2e-8), 2.0),
    ("HOLD", "own", (1e-8, 2e-8), 0.3),
    ("HOLD", "zero", (0.3, 0.31), 2.0),
    ("HOLD", "data", (1e-3, 1.01e-3), 0.0),
    ("HOLD", "own", (0.999, 1.0), 0.3),
]


@pytest.mark.parametrize(("name", "initial", "span", "stochasticity"), FAMILY)
def test_the_family_agrees_with_the_power_series_of_its_equation(
    name: str, initial: str, span: tuple[float, float], stochasticity: float
) -> None:
    sde, exact = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    expected = taylor_family(exact, RATES.get(name, 4.0), span, stochasticity, sigma)
    if stochasticity == 0:  # known; the series leaves 1e-45
        expected = expected._replace(
            covariance=torch.zeros_like(expected.state), root=torch.zeros_like(expected.state)
        )
    law = sde.posterior(
        *tensor(span)[:, None], stochasticity=stochasticity, initial_covariance=sigma
    )
    assert_agrees(law, expected, FAMILY_TOLERANCE)


def residual(law: Posterior, earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """Largest entry of Phi Sigma_t Phi^T + P - Sigma_s, relative to what rounding Phi does to it.

    In float64 from the roots: no covariance is subtracted before the last step.
    """
    moved = law.state @ later
    scale = rows(earlier) + rows(law.state.abs() @ later.abs())
    sizes = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    error = moved @ moved.mT + law.covariance - earlier @ earlier.mT
    return (error.abs() / sizes).amax()


@pytest.mark.parametrize("initial", ["own", "data"])
@pytest.mark.parametrize("stochasticity", [0.0, 2.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_member_keeps_the_marginal_law(name: str, stochasticity: float, initial: str) -> None:
    sde, _ = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    s, t = tensor([(0.0, 0.1), *STEPS] if initial == "data" else STEPS).unbind(-1)
    law = sde.posterior(s, t, stochasticity=stochasticity, initial_covariance=sigma)
    earlier, later = sde.marginal(s, sigma), sde.marginal(t, sigma)
    assert residual(law, earlier.root, later.root) <= FAMILY_TOLERANCE
    scale = rows(earlier.mean) + rows(law.state.abs() @ later.mean.abs())
    error = law.initial + law.state @ later.mean - earlier.mean
    assert ratio(rows(error), scale) <= FAMILY_TOLERANCE


@given(
    stable_processes(),
    intervals(),
    st.sampled_from([0.0, 0.5, 1.0, 1.5]),
)
def test_every_member_keeps_the_marginal_law_of_random_processes(
    process: StableProcess, where: tuple[float, ...], stochasticity: float
) -> None:
    # Coordinates of a random process are not graded like its noise: the root loses the condition
    # of the stationary law, which is below 1e3 here.
    sde = process.sde(3.0)
    sigma = 0.1 * torch.eye(process.components, dtype=torch.float64)
    s, t = (tensor(x) for x in where)
    law = sde.posterior(s, t, stochasticity=stochasticity, initial_covariance=sigma)
    error = residual(law, sde.marginal(s, sigma).root, sde.marginal(t, sigma).root)
    assert error <= FAMILY_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_approaches_the_posterior(name: str) -> None:
    # Two algorithms, one law: the one is exact, the other converged to 1e-12.
    sde, _ = PROCESSES[name]
    s, t = tensor(STEPS).unbind(-1)
    bayes = sde.posterior(s, t)
    near = sde.posterior(s, t, stochasticity=math.nextafter(1.0, 2.0))
    scale = rows(sde.marginal(s).root)
    scale = scale + rows(bayes.state.abs() @ sde.marginal(t).root.abs())
    error = rows((near.state - bayes.state) @ sde.marginal(t).root)
    assert ratio(error, scale) <= FAMILY_TOLERANCE
    assert ratio(rows(near.root - bayes.root), rows(bayes.root)) <= FAMILY_TOLERANCE
    diagonals = [law.root.diagonal(dim1=-2, dim2=-1) for law in (near, bayes)]
    assert ratio((diagonals[0] - diagonals[1]).abs(), diagonals[1]) <= FAMILY_TOLERANCE


TRIPLES = [(1e-8, 3e-8, 1e-7), (1e-4, 1.001e-4, 1e-3), (0.1, 0.5, 0.50001), (0.3, 0.6, 1.0)]


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_are_one(name: str, stochasticity: float) -> None:
    sde, _ = PROCESSES[name]
    s, r, t = tensor(TRIPLES).unbind(-1)
    first = sde.posterior(r, t, stochasticity=stochasticity)
    second = sde.posterior(s, r, stochasticity=stochasticity)
    whole = sde.posterior(s, t, stochasticity=stochasticity)
    middle, later = sde.marginal(r).root, sde.marginal(t).root
    # Rounding of the first Phi is multiplied by the second, as is that of its root.
    scale = rows(sde.marginal(s).root)
    scale = scale + rows(second.state.abs() @ first.state.abs() @ later.abs())
    scale = scale + rows(second.state.abs() @ middle.abs())
    error = rows((second.state @ first.state - whole.state) @ later)
    assert ratio(error, scale) <= FAMILY_TOLERANCE
    initial = second.state @ first.initial + second.initial
    sizes = rows(second.state.abs() @ sde.marginal(r).mean.abs()) + rows(sde.marginal(s).mean)
    sizes = sizes + rows(second.state.abs() @ first.state.abs() @ sde.marginal(t).mean.abs())
    assert ratio(rows(initial - whole.initial), sizes) <= FAMILY_TOLERANCE
    moved = second.state @ first.root
    error = (moved @ moved.mT + second.covariance - whole.covariance).abs()
    assert ratio(error, scale.unsqueeze(-1) * scale.unsqueeze(-2)) <= FAMILY_TOLERANCE


# The root of the probability flow --------------------------------------------------------------

FLOW_TIMES = [0.03, 0.6, 1.0]


@pytest.mark.parametrize("initial", ["own", "data"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_flow_root_is_a_root_of_the_marginal_covariance(name: str, initial: str) -> None:
    # L times a rotation that is orthogonal to rounding.
    sde, _ = PROCESSES[name]
    sigma, t = initial_covariance(initial, sde.components), tensor([1e-3, *FLOW_TIMES])
    R = sde.probability_flow_root(t, sigma)
    expected = sde.marginal(t, sigma).covariance
    assert R.shape == expected.shape
    assert covariance_error(R @ R.mT, expected) <= 32 * EPS
    assert torch.allclose(
        R[-1], sde.marginal(t, sigma).root[-1], rtol=0, atol=8 * EPS * R[-1].abs().max()
    )


@pytest.mark.parametrize("initial", ["own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_flow_root_carries_deviations_along_the_flow(name: str, initial: str) -> None:
    # Phi_0(s, t) R_t = R_s.
    sde, _ = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    s, t = tensor(FLOW_TIMES[:-1]), tensor(FLOW_TIMES[1:])
    flow = sde.posterior(s, t, stochasticity=0.0, initial_covariance=sigma)
    R_s, R_t = sde.probability_flow_root(s, sigma), sde.probability_flow_root(t, sigma)
    scale = rows(R_s) + rows(flow.state.abs() @ R_t.abs())
    assert ratio(rows(flow.state @ R_t - R_s), scale) <= FAMILY_TOLERANCE


@pytest.mark.parametrize(
    ("name", "mass", "initial"),
    [
        ("CLD", 0.25, "own"),
        ("CLD, underdamped", 0.25, "data"),
        ("CLD, overdamped", 0.25, "own"),
    ],
)
def test_the_flow_of_cld_turns_at_a_known_rate(name: str, mass: float, initial: str) -> None:
    # R = L [[cos a, sin a], [-sin a, cos a]] with a' = beta / M L_vv / L_xx.
    sde, exact = PROCESSES[name]
    sigma, times = initial_covariance(initial, 2), [1e-3, 0.1, 0.6]
    R, L = sde.probability_flow_root(tensor(times), sigma), sde.marginal(tensor(times), sigma).root
    turn = torch.linalg.solve_triangular(L, R, upper=False)
    angles = torch.atan2(turn[:, 0, 1], turn[:, 0, 0]).tolist()
    assert torch.allclose(turn[:, 0, 1], -turn[:, 1, 0], rtol=0, atol=1e-12)

    def rate(log_time: float) -> float:
        root = exact.marginal(math.exp(log_time), sigma).root
        return math.exp(log_time) * 4 / mass * float(root[1, 1] / root[0, 0])

    x, weights = np.polynomial.legendre.leggauss(12)
    for i in range(len(times) - 1):
        # Panels of length one in log time, on which the rate is a smooth function.
        ends = np.linspace(math.log(times[i]), math.log(times[i + 1]), 6)
        half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
        nodes = middle[:, None] + half[:, None] * x
        values = np.array([[rate(node) for node in row] for row in nodes])
        angle = (half[:, None] * weights * values).sum()
        error = math.remainder(angles[i + 1] - angles[i] - float(angle), 2 * math.pi)
        assert abs(error) <= 1e-11


@pytest.mark.parametrize("initial", ["own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_point_on_the_flow_solves_the_probability_flow_equation(name: str, initial: str) -> None:
    # z = Psi z_0 + R c and z' = F z + 1/2 G G^T Sigma^-1 (z - Psi z_0). Central differences of
    # order 4 with h = t / 500: an error of h^4 z^(5) / 30, that is (1/500)^4 / 30 times (angle by
    # which a factor e in time turns, below 12)^5, and 1e-12 / h of rounding.
    sde, _ = PROCESSES[name]
    sigma, t = initial_covariance(initial, sde.components), tensor([0.03, 0.4])
    c = torch.linspace(-1.0, 1.4, sde.components, dtype=torch.float64).unsqueeze(-1)
    z_0 = torch.linspace(0.7, -0.4, sde.components, dtype=torch.float64).unsqueeze(-1)
    h = t / 500
    offsets, weights = tensor([-2.0, -1.0, 1.0, 2.0]), tensor([1.0, -8.0, 8.0, -1.0]) / 12
    points = t.unsqueeze(-1) + h.unsqueeze(-1) * offsets

    def position(times: torch.Tensor) -> torch.Tensor:
        law = sde.marginal(times, sigma)
        return (law.mean @ z_0 + sde.probability_flow_root(times, sigma) @ c).squeeze(-1)

    slope = torch.einsum("tnk,n->tk", position(points), weights) / h.unsqueeze(-1)
    z, law = position(t).unsqueeze(-1), sde.marginal(t, sigma)
    G = sde.diffusion(t)
    score = -torch.cholesky_solve(sde.probability_flow_root(t, sigma) @ c, law.root)
    expected = (sde.drift(t) @ z - 0.5 * G @ (G.mT @ score)).squeeze(-1)
    scale = rows(law.root) / t.unsqueeze(-1) + expected.abs()
    rounding = 64 * EPS * position(t).abs() / h.unsqueeze(-1)
    assert ((slope - expected).abs() <= 1e-5 * scale + rounding).all()


# Sampling and densities ------------------------------------------------------------------------

NAMES = ["VP", "CLD", "PSLD", "HOLD", "four components"]


def normals(components: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The noise of a seed: draws of the law without mean and with the identity for root."""
    zero, eye = torch.zeros(components, components).double(), torch.eye(components).double()
    states = torch.zeros(shape[0], components, *shape[1:], dtype=torch.float64)
    law = Posterior(zero, zero, eye)
    return law.sample(states, states, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_is_linear_in_both_states(name: str) -> None:
    sde, _ = PROCESSES[name]
    k = sde.components
    law = sde.posterior(0.2, 0.5)
    unit, zero = torch.eye(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
    assert torch.equal(law.mean(unit, zero).mT, law.state)
    assert torch.equal(law.mean(zero, unit).mT, law.initial)


@pytest.mark.parametrize("times", [0.5, [0.3, 0.5, 1.0]])
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_mean_plus_the_root_times_normals(name: str, times: Any) -> None:
    sde, _ = PROCESSES[name]
    k = sde.components
    law = sde.posterior(0.2, tensor(times))
    z_t, z_0 = normals(k, (3, 2, 4), seed=1), normals(k, (3, 2, 4), seed=2)
    noise = normals(k, (3, 2, 4), seed=3)
    sample = law.sample(z_t, z_0, generator=torch.Generator().manual_seed(3))
    state, initial, root = (m.expand(3, k, k) for m in (law.state, law.initial, law.root))
    expected = torch.einsum("bij,bj...->bi...", state, z_t)
    expected += torch.einsum("bij,bj...->bi...", initial, z_0)
    expected += torch.einsum("bij,bj...->bi...", root, noise)
    assert sample.shape == z_t.shape
    # Sums of at most twelve terms, the largest of which exceed a hundred.
    assert torch.allclose(sample, expected, rtol=0, atol=1e-12)


def test_the_noise_of_a_sample_is_standard_normal() -> None:
    # Five standard deviations of the mean (1e-3 each) and of the second moments.
    noise = normals(3, (1000, 1000), seed=0).transpose(0, 1).flatten(1)
    assert noise.mean(-1).abs().max() <= 5e-3
    assert (noise @ noise.mT / noise.shape[1] - torch.eye(3)).abs().max() <= 5e-3 * math.sqrt(2)


def test_a_generator_decides_the_sample() -> None:
    law = CLD().posterior(0.2, 0.5)
    z = torch.zeros(4, 2, 3)
    first, same, other = (
        law.sample(z, z, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_and_densities_keep_the_type_of_the_state(dtype: torch.dtype) -> None:
    law = CLD().posterior(0.2, tensor([0.5, 0.6]))
    z_t, z_0 = normals(2, (2, 5), seed=1), normals(2, (2, 5), seed=2)
    z_s = law.sample(z_t, z_0, generator=torch.Generator().manual_seed(0))
    z_t, z_0, z_s = (z.to(dtype) for z in (z_t, z_0, z_s))
    assert law.sample(z_t, z_0).dtype == dtype
    assert law.log_prob(z_s, z_t, z_0).dtype == dtype
    double = [z.double() for z in (z_s, z_t, z_0)]
    # float32 rounds a whitened residual by 1e-7 |L_P^-1| |z|, about 1e-5.
    assert torch.allclose(law.mean(z_t, z_0).double(), law.mean(*double[1:]), atol=1e-5)
    assert torch.allclose(law.log_prob(z_s, z_t, z_0).double(), law.log_prob(*double), rtol=1e-3)


@pytest.mark.parametrize("initial", INITIALS)
@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_density_is_that_of_bayes_rule(name: str, initial: str) -> None:
    # log p(z_s | z_t, z_0) = log p(z_t | z_s) + log p(z_s | z_0) - log p(z_t | z_0). The terms
    # are at most a few hundred here, and 1e-13 times the condition of the roots, 1e3, of them.
    sde, _ = PROCESSES[name]
    sigma = initial_covariance(initial, sde.components)
    s, t = tensor([0.2, 0.2, 0.05]), tensor([0.5, 0.3, 1.0])
    z_0 = normals(sde.components, (3, 2), seed=1)
    noise = normals(sde.components, (3, 2), seed=2), normals(sde.components, (3, 2), seed=3)
    earlier, later, step = sde.marginal(s, sigma), sde.marginal(t, sigma), sde.transition(s, t)
    z_s = earlier.mean @ z_0 + earlier.root @ noise[0]
    z_t = step.mean @ z_s + step.root @ noise[1]
    law = sde.posterior(s, t, initial_covariance=sigma)
    found = law.log_prob(z_s, z_t, z_0)
    expected = step.log_prob(z_t, z_s) + earlier.log_prob(z_s, z_0) - later.log_prob(z_t, z_0)
    assert found.shape == (3,)
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 1.0])
def test_times_broadcast(stochasticity: float) -> None:
    # The number of doublings and of panels is that of the longest step: other roundings.
    sde, s, t = HOLD(), tensor([[0.1], [0.2], [0.4]]), tensor([0.4, 0.5, 0.7, 1.0])
    law = sde.posterior(s, t, stochasticity=stochasticity)
    for value in (law.state, law.initial, law.root, law.covariance):
        assert value.shape == (3, 4, 3, 3)
    for i in range(3):
        for j in range(4):
            one = sde.posterior(float(s[i]), float(t[j]), stochasticity=stochasticity)
            assert one.state.shape == (3, 3)
            assert torch.allclose(one.state, law.state[i, j], rtol=0, atol=1e-11)
            assert torch.allclose(one.initial, law.initial[i, j], rtol=0, atol=1e-11)
            assert torch.allclose(one.root, law.root[i, j], rtol=0, atol=1e-11)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_no_times_give_no_laws(stochasticity: float) -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert CLD().posterior(empty, empty, stochasticity=stochasticity).state.shape == (0, 2, 2)
    assert CLD().probability_flow_root(empty).shape == (0, 2, 2)


def test_times_of_single_precision_are_taken_as_they_are() -> None:
    t = torch.tensor([0.1, 0.7])
    law, same = CLD().posterior(0.05, t), CLD().posterior(0.05, t.double())
    assert law.state.dtype == torch.float64
    assert torch.equal(law.state, same.state)
    assert torch.equal(law.root, same.root)


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
@pytest.mark.parametrize(
    ("s", "t", "message"),
    [
        (0.5, 0.4, r"s must not be later than t; got s = 0\.5, t = 0\.4"),
        (tensor([0.1, 0.6]), 0.5, "s must not be later than t"),
        (math.nan, 0.5, r"s must lie in \[0, 1\]; got NaN"),
        (0.1, math.nan, r"t must lie in \[0, 1\]; got NaN"),
        (-0.1, 0.5, r"s must lie in \[0, 1\]"),
        (0.5, 1.1, r"t must lie in \[0, 1\]"),
        (0.5, tensor([0.9, math.inf]), r"t must lie in \[0, 1\]"),
        (0.0, 0.0, "distribution given the start has no density at t = 0"),
        (0.0, tensor([0.5, 0.0]), "distribution given the start has no density at t = 0"),
        (tensor([0.1, 0.2]), tensor([0.5, 0.6, 0.7]), "s and t must broadcast"),
    ],
)
def test_times_that_make_no_step_are_refused(
    s: Any, t: Any, message: str, stochasticity: float
) -> None:
    with pytest.raises(ValueError, match=message):
        CLD().posterior(s, t, stochasticity=stochasticity)


@pytest.mark.parametrize("time", ["0.5", None, True, torch.tensor(1)])
def test_times_that_are_no_numbers_are_refused(time: Any) -> None:
    with pytest.raises(TypeError, match="s must be a floating-point tensor or a real number"):
        CLD().posterior(time, 0.5)
    with pytest.raises(TypeError, match="t must be a floating-point tensor or a real number"):
        CLD().probability_flow_root(time)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("initial", ["own", "zero"])
def test_a_start_without_density_serves_the_posterior_only(
    initial: str, stochasticity: float
) -> None:
    sigma = initial_covariance(initial, 2)
    with pytest.raises(ValueError, match="distribution given the start has no density at s = 0"):
        CLD().posterior(0.0, 0.5, stochasticity=stochasticity, initial_covariance=sigma)
    with pytest.raises(ValueError, match="distribution given the start has no density at t = 0"):
        CLD().probability_flow_root(0.0, sigma)


@pytest.mark.parametrize("stochasticity", [-1e-9, -1.0, math.nan, math.inf])
def test_stochasticity_is_at_least_zero(stochasticity: float) -> None:
    with pytest.raises(ValueError, match="stochasticity must be finite and at least 0"):
        CLD().posterior(0.1, 0.5, stochasticity=stochasticity)


@pytest.mark.parametrize("stochasticity", [None, "1", True, torch.tensor(1)])
def test_stochasticity_is_a_number(stochasticity: Any) -> None:
    with pytest.raises(
        TypeError, match=r"stochasticity must be a (real number|floating-point tensor)"
    ):
        CLD().posterior(0.1, 0.5, stochasticity=stochasticity)


def test_stochasticity_may_vary_with_the_step() -> None:
    sde, s, t = CLD(), torch.tensor([0.3, 0.1, 0.01]), torch.tensor([0.5, 0.2, 0.03])
    levels = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    together = sde.posterior(s.double(), t.double(), stochasticity=levels)
    for i, level in enumerate(levels.tolist()):
        alone = sde.posterior(s[i].double(), t[i].double(), stochasticity=level)
        # The collocation's tolerance.
        assert torch.allclose(together.state[i], alone.state, rtol=0, atol=1e-12)
        assert torch.allclose(together.root[i], alone.root, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="stochasticity must broadcast"):
        sde.posterior(s.double(), t.double(), stochasticity=levels[:2])


@pytest.mark.parametrize(
    "sigma", [[[1.0]], [[1.0, 0.5], [0.4, 1.0]], [[1.0, 2.0], [2.0, 1.0]], [[math.nan, 0], [0, 1]]]
)
def test_what_is_no_initial_covariance_is_refused(sigma: Any) -> None:
    with pytest.raises(ValueError, match="initial_covariance"):
        CLD().posterior(0.1, 0.5, initial_covariance=sigma)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_a_component_that_noise_does_not_reach_has_no_posterior(stochasticity: float) -> None:
    sde = LinearSDE.from_matrices([[-1.0, 0.0], [1.0, -1.0]], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="noise reaches every component"):
        sde.posterior(0.1, 0.5, stochasticity=stochasticity)
    with pytest.raises(ValueError, match="noise reaches every component"):
        sde.probability_flow_root(0.5)
    # Spread of its own serves as well.
    sigma = torch.eye(2, dtype=torch.float64)
    law = sde.posterior(0.1, 0.5, stochasticity=stochasticity, initial_covariance=sigma)
    roots = [sde.marginal(t, sigma).root for t in (0.1, 0.5)]
    assert residual(law, *roots) <= FAMILY_TOLERANCE


def test_states_of_another_shape_are_refused() -> None:
    law, z = CLD().posterior(0.1, 0.5), torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match=r"z_t must have shape \(B, 2, \*D\)"):
        law.sample(torch.zeros(3, 3, 4), z)
    with pytest.raises(ValueError, match=r"z_0 must have shape \(B, 2, \*D\)"):
        law.mean(z, torch.zeros(3, 1, 4))
    with pytest.raises(ValueError, match="z_t and z_0 must have one shape"):
        law.mean(z, torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="z_t and z_0 must have one shape"):
        law.mean(z, torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="z_t must be a floating-point tensor"):
        law.mean(torch.zeros(3, 2, 4, dtype=torch.int64), z)
    with pytest.raises(ValueError, match=r"for one time or for \(3,\) times"):
        CLD().posterior(0.1, tensor([0.5, 0.6])).mean(z, z)


@pytest.mark.parametrize("shape", [(1, 2, 4), (3, 3, 4), (3, 2), (3, 2, 5), (2, 4)])
def test_densities_are_asked_for_states_of_the_shape_of_the_others(shape: Any) -> None:
    law, z = CLD().posterior(0.1, 0.5), torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="z_s"):
        law.log_prob(torch.zeros(shape), z, z)


def test_the_flow_has_no_density() -> None:
    z = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="no density"):
        CLD().posterior(0.1, 0.5, stochasticity=0.0).log_prob(z, z, z)


# Gradients -------------------------------------------------------------------------------------

INITIAL = tensor([[0.3, 0.05], [0.05, 0.2]])


def oscillator(friction: torch.Tensor) -> LinearSDE:
    return LinearSDE.from_matrices(
        [[0.0, 4.0], [-1.0, -friction]], [[0.0], [1.4]], (0.5, 3.0), stationary_covariance=None
    )


def is_short(sde: LinearSDE, s: float, t: float, sigma: torch.Tensor) -> bool:
    """Whether noise of the step is below the spread at s: the form that `bayes` takes."""
    step = sde.transition(s, t)
    X = torch.linalg.solve(step.mean, step.root)
    Y = torch.linalg.solve_triangular(sde.marginal(s, sigma).root, X, upper=False)
    return float(Y.square().sum()) <= 1


@pytest.mark.parametrize(
    ("s", "t", "stochasticity", "short"),
    [
        (0.4, 0.41, 1.0, True),
        (0.1, 0.9, 1.0, False),
        (0.4, 0.41, 0.5, True),
        (0.4, 0.6, 0.5, False),
        (0.4, 0.6, 0.0, False),
    ],
)
@pytest.mark.parametrize("initial", ["zero", "full"])
def test_posteriors_are_differentiable(
    s: float, t: float, stochasticity: float, short: bool, initial: str
) -> None:
    sigma = INITIAL if initial == "full" else torch.zeros(2, 2, dtype=torch.float64)
    assert is_short(oscillator(tensor(4.0)), s, t, sigma) == short

    def posterior(friction, s, t):
        law = oscillator(friction).posterior(
            s, t, stochasticity=stochasticity, initial_covariance=sigma
        )
        return (law.state, law.initial, law.root) if stochasticity else (law.state, law.initial)

    arguments = tuple(tensor(x).requires_grad_() for x in (4.0, s, t))
    assert torch.autograd.gradcheck(posterior, arguments, eps=1e-6)


@pytest.mark.parametrize("stochasticity", [0.5, 1.0])
def test_posteriors_are_differentiable_at_a_regular_start(stochasticity: float) -> None:
    def posterior(friction, t):
        law = oscillator(friction).posterior(
            0.0, t, stochasticity=stochasticity, initial_covariance=INITIAL
        )
        return law.state[1], law.root[1]

    arguments = tuple(tensor(x).requires_grad_() for x in (4.0, 0.02))
    assert torch.autograd.gradcheck(posterior, arguments, eps=1e-6)


@pytest.mark.parametrize("name", ["own", "zero"])
@pytest.mark.parametrize("stochasticity", [0.5, 1.0])
def test_gradients_are_finite_at_a_singular_start_and_over_empty_steps(
    name: str, stochasticity: float
) -> None:
    friction = tensor(4.0).requires_grad_()
    s = tensor([0.0 if stochasticity == 1 else 0.1, 0.3, 0.4]).requires_grad_()
    t = tensor([0.5, 0.3, 0.9]).requires_grad_()
    sigma = torch.zeros(2, 2, dtype=torch.float64)
    sigma[1, 1] = 0.01 if name == "own" else 0.0
    law = oscillator(friction).posterior(
        s, t, stochasticity=stochasticity, initial_covariance=sigma
    )
    (law.state.sum() + law.initial.sum() + law.root.sum()).backward()
    for leaf in (friction, s, t):
        assert leaf.grad.isfinite().all()


def test_the_flow_root_is_differentiable() -> None:
    def root(friction, t):
        return oscillator(friction).probability_flow_root(t)

    arguments = (tensor(4.0).requires_grad_(), tensor([0.2, 0.9]).requires_grad_())
    assert torch.autograd.gradcheck(root, arguments, eps=1e-6)


# Other clocks ----------------------------------------------------------------------------------


def test_a_posterior_of_the_cosine_schedule() -> None:
    sde = CLD(beta=Schedule.cosine())
    s, t = tensor([1e-3, 0.2, 0.9]), tensor([0.01, 0.7, 1.0])
    roots = sde.marginal(s).root, sde.marginal(t).root
    for stochasticity in (0.0, 0.5, 1.0):
        law = sde.posterior(s, t, stochasticity=stochasticity)
        assert residual(law, *roots) <= FAMILY_TOLERANCE


def test_a_posterior_of_matrices_that_are_functions() -> None:
    # A(t) and the clock of one process, given either way; functions promise 1e-10.
    constant = LinearSDE.from_matrices([[0.0, 4.0], [-1.0, -4.0]], [[0.0], [1.4]], 3.0)
    A, Q_root = 3 * tensor([[0.0, 4.0], [-1.0, -4.0]]), math.sqrt(3) * tensor([[0.0], [1.4]])
    functions = LinearSDE.from_functions(lambda t: A + 0 * t, lambda t: Q_root + 0 * t)
    for stochasticity in (0.0, 0.5, 1.0):
        one, other = (
            sde.posterior(0.2, 0.5, stochasticity=stochasticity) for sde in (constant, functions)
        )
        assert torch.allclose(one.state, other.state, rtol=0, atol=1e-9)
        assert torch.allclose(one.root, other.root, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "sde",
    [
        CLD(friction=5.0),
        CLD(friction=20.0),
        CLD(beta=(4.0, 40.0), friction=2.0),
        CLD(beta=400.0),
        VPSDE(beta_max=4000.0),
        LinearSDE.from_matrices([[-1.0, 0.5], [-0.3, -100.0]], [[1.0], [1.0]]),
    ],
    ids=repr,
)
def test_a_step_over_which_everything_decays_has_a_posterior(sde: LinearSDE) -> None:
    # Psi is singular in float64, and has no inverse.
    s = torch.linspace(0.01, 0.99, 32, dtype=torch.float64)
    law = sde.posterior(s, 1.0)
    prior = sde.marginal(s)
    later = sde.marginal(1.0).covariance
    kept = law.state @ later @ law.state.mT + law.covariance
    size = prior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (kept - prior.covariance).abs() / (size.unsqueeze(-1) * size.unsqueeze(-2))
    # Products of two factors with unit rows, and the exponential's own condition number ||A|| B,
    # which for beta linear in t is at most the largest ||F||.
    condition = float(sde.drift(torch.tensor([0.0, 1.0]).double()).abs().sum(1).max())
    assert error.max() <= (100 + 4 * condition) * torch.finfo(torch.float64).eps
    assert torch.isfinite(law.initial).all()


def test_a_regular_start_has_a_family_at_time_zero() -> None:
    sde, t = VESDE(), torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    s = torch.tensor([0.0, 0.0, 0.2], dtype=torch.float64)
    law = sde.posterior(s, t, stochasticity=0.5)
    assert law.state[0].item() == 1.0
    assert law.root[0].item() == 0.0
    for i in (1, 2):
        alone = sde.posterior(s[i], t[i], stochasticity=0.5)
        # The collocation's tolerance.
        assert torch.allclose(law.state[i], alone.state, rtol=1e-12, atol=0)


def test_equal_times_keep_derivatives_of_their_own() -> None:
    t = torch.tensor([0.3, 0.3, 0.6], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(CLD().probability_flow_root, t)
    alone = torch.autograd.functional.jacobian(CLD().probability_flow_root, t[:1])[0, ..., 0]
    for i in (0, 1):
        # A root at one time depends on that time alone, to the accuracy of the collocation.
        assert torch.allclose(jacobian[i, ..., i], alone, rtol=0, atol=1e-9)
        assert jacobian[i, ..., 1 - i].abs().max() <= 1e-9
