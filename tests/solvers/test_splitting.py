"""`Splitting`: each word is its letters, written again in numpy, and of weak order 1.

Here F = beta(t) A, G G^T = beta(t) Q, and the stationary covariance S is diagonal. With the clock
B of a letter's part of the step, the letters are

    O: the distribution of dz = -Q S^-1 z / 2 dB + Q^1/2 dw, by matrix exponentials,
    A: x += B [(Q S^-1 / 2 - A) z + Q s]_x,       B: v += B [(Q S^-1 / 2 - A) z + Q s]_v.

With Gaussian data the score is s = C(t)^-1 (m(t) - z). A step then acts on the columns of a matrix,
which belong to the state at its start, to the constant, and to its noise.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, expm, solve_continuous_lyapunov

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    ReverseProcess,
    Schedule,
    solvers,
)
from cldsde.solvers import Splitting
from cldsde.validation import propagate_moments
from probes import Recording, start, untouchable
from references import cld, dense, psld
from references.kernels import Clock

DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
WAVE = Clock(
    lambda t: 1 + 6 * np.sin(3 * t) ** 2,
    lambda s, t: 4 * (t - s) - (np.sin(6 * t) - np.sin(6 * s)) / 2,
)


def jump(at):
    """A rate of 1 up to a time, and of 9 from there on; as a schedule, and for the reference."""
    schedule = Schedule(
        lambda t: torch.where(t < at, 1.0, 9.0).to(t),
        lambda s, t: (t - s) + 8 * (t.clamp_min(at) - s.clamp_min(at)),
    )
    both = lambda s, t: (t - s) + 8 * (np.maximum(t, at) - np.maximum(s, at))  # noqa: E731
    return schedule, Clock(lambda t: np.where(t < at, 1.0, 9.0), both)


GENERAL = {"beta": (1.0, 14.0), "gamma": 0.7, "nu": 3.0, "mass": 0.4}
PROCESSES = {
    "CLD": (CLD(), dense(cld())),
    "CLD, linear": (CLD((0.5, 7.5), 0.4, 1.7), dense(cld((0.5, 7.5), 0.4, 1.7))),
    "CLD, wave": (
        CLD(Schedule(lambda t: 1 + 6 * torch.sin(3 * t) ** 2)),
        dense(cld())._replace(clock=WAVE),
    ),
    "PSLD": (PSLD(), dense(psld())),
    "PSLD, linear": (PSLD(**GENERAL), dense(psld(**GENERAL))),
    "PSLD, noise in the data": (PSLD(gamma=4.0, nu=0.0), dense(psld(gamma=4.0, nu=0.0))),
}
# Jumps divide the part of the step of each letter once.
for at in (0.2, 0.37, 0.62, 0.95):
    schedule, clock = jump(at)
    PROCESSES[f"jump at {at}"] = PSLD(schedule, 0.7), dense(psld(gamma=0.7))._replace(clock=clock)

WORDS = ["OBA", "BAO", "OBAB", "BAOAB", "OABAO", "BOAOB", "ABOBAOB"]
VARIANTS = [
    {"shared_score": shared, "score_time": at}
    for shared in (False, True)
    for at in ("start", "end")
]
LONG, GRID = solvers.uniform_times(1.0, 0.05, 1), solvers.root_times(1.0, 0.05, 6)
KERNELS = 1e-11  # the package's kernels promise 1e-12, and the score divides by a variance

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_word = pytest.mark.parametrize("word", WORDS)
every_variant = pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda x: "-".join(map(str, x.values()))
)


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


def moments(solver, name, times):
    """Moments of the solver at the end of the grid, from the exact ones at its start."""
    sde, exact = PROCESSES[name]
    t = float(times[0])
    start = torch.from_numpy(exact.mean(t))[:, None], torch.from_numpy(exact.covariance(t))
    process = ReverseProcess(sde, DATA.score(sde))
    m, C = propagate_moments(process, solver, times, *start)
    return m[:, 0].numpy(), C.numpy()


class TestLetters:
    @every_variant
    @every_process
    def test_moments_are_those_of_the_letters(self, name, options):
        for word, times in itertools.product(WORDS, (LONG, GRID)):
            found = moments(Splitting(scheme=word, **options), name, times)
            expected = propagate(PROCESSES[name][1], word, times.numpy(), **options)
            size = max(1.0, abs(expected[1]).max())
            for a, b in zip(found, expected, strict=True):
                assert abs(a - b).max() <= KERNELS * size, word

    @every_variant
    @pytest.mark.parametrize("name", ["CLD", "PSLD", "PSLD, noise in the data"])
    def test_scores_and_noise_are_counted_and_in_their_places(self, name, options):
        sde, exact = PROCESSES[name]
        times, drawn = solvers.root_times(0.9, 1e-2, 3), []
        fresh = solvers.FreshNoise(torch.Generator().manual_seed(0))

        class Counting(solvers.NoiseSource):
            def normal(self, z, rows):
                drawn.append(rows)
                return fresh.normal(z, rows)

        for word in WORDS:
            score, solver = Recording(DATA.score(sde)), Splitting(scheme=word, **options)
            process, state = ReverseProcess(sde, score), start(sde, (3, 1))
            found = solvers.solve(process, solver, state, times, noise=Counting())
            expected = evaluated(word, exact, times.numpy(), **options)
            assert found.nfev == score.calls == len(expected)
            # A rounding of each part's time, and none at the ends of a step.
            seen = [t[0].item() for t in score.times]
            assert seen == pytest.approx(expected, rel=0, abs=4e-16)
            assert options["shared_score"] <= (seen == expected)
            assert 1e-2 <= min(seen) <= max(seen) <= 0.9
            assert drawn == [len(driven(exact))] * (3 * word.count("O"))
            drawn.clear()

    @every_word
    def test_the_declared_number_of_evaluations_is_that_of_cld(self, word):
        assert Splitting(scheme=word).facts.nfe_per_step == word.count("B")
        assert Splitting(scheme=word, shared_score=True).facts.nfe_per_step == 1


@functools.cache
def error(solver, name, n):
    # A norm that is smooth in the steps: the largest entry is not, when it changes places.
    m, C = moments(solver, name, solvers.root_times(1.0, 0.05, n))
    exact = PROCESSES[name][1]
    return math.hypot(
        np.linalg.norm(m - exact.mean(0.05)), np.linalg.norm(C - exact.covariance(0.05))
    )


ORDERS = [("CLD", VARIANTS[0], word) for word in WORDS]
ORDERS += [(name, options, "OBAB") for name in ("CLD", "PSLD") for options in VARIANTS[1:]]


class TestOrders:
    @pytest.mark.parametrize(("name", "options", "word"), ORDERS, ids=str)
    def test_the_order_is_the_declared_one(self, name, options, word):
        solver = Splitting(scheme=word, **options)
        slope = math.log2(error(solver, name, 100) / error(solver, name, 200))
        # With errors c h (1 + d h + ...) the slope is 1 + d h / (2 log 2): a quarter leaves room,
        # and a declaration that is off by a half is further away.
        assert abs(slope - solver.facts.weak_order) < 0.25
        assert solver.facts.strong_order is solver.facts.ode_order is None

    def test_on_gaussian_data_sscs_is_more_accurate_with_as_many_evaluations(self):
        # As the documentation says of every word with one evaluation per step.
        for word, options in itertools.product(WORDS, VARIANTS[2:]):
            solver = Splitting(scheme=word, **options)
            assert error(solver, "CLD", 50) > error(solvers.SSCS(), "CLD", 50)


def constant(A, Q_root, beta=1.0):
    return LinearSDE.from_matrices(A, Q_root, beta)


# Independent noises with a stationary covariance [[1, 1/2], [1/2, 1]].
OBLIQUE = -0.5 * np.diag([2.0, 1.0]) @ np.linalg.inv([[1.0, 0.5], [0.5, 1.0]])
NONE = r"needs a process of position and velocity with a stationary distribution; .* has {} comp"
CORRELATED = r"independent noises .* correlated ones\. Use SSCS"


class TestRejected:
    @pytest.mark.parametrize(
        ("sde", "message"),
        [
            (VPSDE(), NONE.format(1) + ".*Use SSCS$"),
            (VESDE(), NONE.format(1) + ".*Use StochasticHeun$"),
            (HOLD(), NONE.format(3) + ".*Use SSCS$"),
            (constant([[0, 1], [0, 0]], [[0], [1]]), NONE.format(2) + ".*Use StochasticHeun$"),
            # The position has no noise and comes to rest.
            (constant([[-1, 0], [0, -1]], [[0], [1]], 3.0), NONE.format(2) + ".* and none"),
            (CLD(position_noise=0.3), CORRELATED),
            # A unit stationary covariance, and noises of position and velocity that are one.
            (constant([[-0.5, 0.5], [-1.5, -0.5]], [[1], [1]]), CORRELATED),
            (constant(OBLIQUE.tolist(), [[2**0.5, 0], [0, 1]]), CORRELATED),
        ],
    )
    def test_processes_that_do_not_split(self, sde, message):
        process, state = (
            ReverseProcess(sde, untouchable),
            torch.zeros(3, sde.components, 1).double(),
        )
        with pytest.raises(ValueError, match=message):
            solvers.solve(process, Splitting(), state, GRID)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *[
                ({"scheme": x}, "scheme must contain each of the letters")
                for x in ("", "OB", "OXAB", "oba", "OBA ", 3, ["O", "B", "A"])
            ],
            *[
                ({"score_time": x}, "score_time must be one of 'start', 'end'; got")
                for x in ("middle", "End", None)
            ],
            *[({"shared_score": x}, "must be True or False; got") for x in (1, None, "yes")],
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            Splitting(**options)
