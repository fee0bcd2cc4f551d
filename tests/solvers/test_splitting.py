"""`Splitting`: each word is its letters, written again in numpy.

Here F = beta(t) A, G G^T = beta(t) Q, and the stationary covariance S is diagonal. With the clock
B of a letter's part of the step, the letters are

    O: the distribution of dz = -Q S^-1 z / 2 dB + Q^1/2 dw, by matrix exponentials,
    A: x += B [(Q S^-1 / 2 - A) z + Q s]_x,       B: v += B [(Q S^-1 / 2 - A) z + Q s]_v.

With Gaussian data the score is s = C(t)^-1 (m(t) - z). A step then acts on the columns of a matrix,
which belong to the state at its start, to the constant, and to its noise.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, expm, solve_continuous_lyapunov

from cldsde import CLD, PSLD, Schedule, solvers
from cldsde.solvers import Splitting
from gaussian_data import moments
from probes import WORDS
from references import cld, dense, psld
from references.kernels import Clock
from tolerances import KERNEL

# PSLD with a rate of 1 up to t = 0.62, and of 0 from there on.
JUMP = 0.62
JUMPING = Schedule(
    lambda t: torch.where(t < JUMP, 1.0, 0.0).to(t),
    lambda s, t: t.clamp_max(JUMP) - s.clamp_max(JUMP),
)
STEPWISE = Clock(
    lambda t: np.where(t < JUMP, 1.0, 0.0), lambda s, t: np.minimum(t, JUMP) - np.minimum(s, JUMP)
)
GENERAL = {"beta": (1.0, 14.0), "gamma": 0.7, "nu": 3.0, "mass": 0.4}
PROCESSES = {
    "CLD, linear": (CLD((0.5, 7.5), 0.4, 1.7), dense(cld((0.5, 7.5), 0.4, 1.7))),
    "PSLD, linear": (PSLD(**GENERAL), dense(psld(**GENERAL))),
    "PSLD, noise in the data": (PSLD(gamma=4.0, nu=0.0), dense(psld(gamma=4.0, nu=0.0))),
    "jump": (PSLD(JUMPING, 0.7), dense(psld(gamma=0.7))._replace(clock=STEPWISE)),
}


def parts(word, t, u):
    """Letters with the noisier and the less noisy end of their part of the step from t to u."""
    result = []
    for place, letter in enumerate(word):
        n, m = word.count(letter), word[:place].count(letter)
        result.append((letter, t + (u - t) * m / n, t + (u - t) * (m + 1) / n))
    return result


def driven(exact):
    return {"AB"[i] for i in (0, 1) if exact.Q[i, i] > 0}


def evaluated(word, exact, times, shared_score, score_time):
    """Times at which the score is evaluated, in order."""
    late = score_time == "start"
    result = []
    for t, u in itertools.pairwise(times):
        own = [part[1:] for part in parts(word, t, u) if part[0] in driven(exact)]
        result += [ends[0 if late else 1] for ends in ([(t, u)] if shared_score else own)]
    return result


def propagate(exact, word, times, shared_score, score_time):
    """Moments at the end of the grid, from the exact ones at its start."""
    mean, covariance = exact.mean(times[0]), exact.covariance(times[0])
    stationary = np.diag(solve_continuous_lyapunov(exact.A, -exact.Q))
    pull = np.diag(0.5 * np.diag(exact.Q) / stationary)
    at = iter(evaluated(word, exact, times, shared_score, score_time))
    for t, u in itertools.pairwise(times):
        z = np.eye(2, 3)  # columns: state at t, constant, noise
        columns, score = [], None
        for letter, late, early in parts(word, t, u):
            clock = exact.clock.integral(early, late)
            if letter == "O":
                # Van Loan (1978).
                both = expm(np.block([[pull, exact.Q], [np.zeros((2, 2)), -pull.T]]) * clock)
                move = both[2:, 2:].T
                spread = move @ both[:2, 2:]
                z = np.hstack([move @ z, np.sqrt(np.diag(np.diag(spread)))])
                columns.append(spread)
                continue
            row = "AB".index(letter)
            slope = ((pull - exact.A) @ z)[row]
            if letter in driven(exact):
                if score is None or not shared_score:
                    when = next(at)
                    away = -z
                    away[:, 2] += exact.mean(when)
                    score = np.linalg.solve(exact.covariance(when), away)
                # Columns of noise that came after the score's evaluation are none of its own.
                score = np.hstack([score, np.zeros((2, z.shape[1] - score.shape[1]))])
                slope = slope + exact.Q[row, row] * score[row]
            z = z.copy()
            z[row] += clock * slope
        mean = z[:, :2] @ mean + z[:, 2]
        whole = block_diag(covariance, np.eye(2 * len(columns)))
        covariance = np.delete(z, 2, axis=1) @ whole @ np.delete(z, 2, axis=1).T
    return mean, covariance


@pytest.mark.one_in(7)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("name", PROCESSES)
def test_moments_are_those_of_the_letters(name, shared, at):
    options = {"shared_score": shared, "score_time": at}
    times = solvers.uniform_times(1.0, 0.05, 1 if "jump" in name else 3)
    for word in WORDS:
        found = moments(Splitting(scheme=word, **options), PROCESSES[name], times)
        expected = propagate(PROCESSES[name][1], word, times.numpy(), **options)
        for a, b in zip(found, expected, strict=True):
            # The score divides kernels by a variance.
            assert abs(a - b).max() <= 10 * KERNEL * max(1.0, abs(expected[1]).max()), word
