"""`Splitting`: each word is its letters, written anew in numpy, and of weak order 1.

The reference uses none of the package's kernels. With F = beta(t) A, G G^T = beta(t) Q, a diagonal
stationary covariance S and the clock B of a letter's part of the step, the letters are

    O: the law of dz = -Q S^-1 z / 2 dB + Q^1/2 dw, by matrix exponentials,
    A: x += B [(Q S^-1 / 2 - A) z + Q s]_x,       B: v += B [(Q S^-1 / 2 - A) z + Q s]_v.

With Gaussian data the score is s = C(t)^-1 (m(t) - z), so that a step acts on the columns of a
matrix: those of the state at its start, of the constant, and of its noise.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag, expm

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    MixedScore,
    ReverseProcess,
    Schedule,
    SubVPSDE,
    solvers,
)
from cldsde.solvers import Splitting
from cldsde.solvers.authoring import Memory
from cldsde.validation import propagate_moments
from probes import Recording, generator, known_score, no_waiting, start, untouchable
from score import exact
from score.exact import Constant

Array = np.ndarray[Any, np.dtype[np.float64]]

MEAN, VARIANCE = 0.3, 0.25
DATA = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])


class Clock(NamedTuple):
    """The integral of a rate from 0 to t."""

    integral: Callable[[float], float]

    def __call__(self, s: float, t: float) -> float:
        return self.integral(t) - self.integral(s)


def linear(low: float, high: float) -> Clock:
    return Clock(lambda t: low * t + (high - low) * t**2 / 2)


def wave(t: torch.Tensor) -> torch.Tensor:
    return 1 + 6 * torch.sin(3 * t) ** 2


WAVE = Clock(lambda t: 4 * t - math.sin(6 * t) / 2)

JUMP = 0.37


def jump() -> Schedule:
    """A rate of 1 up to a time within a step, and of 9 from there on."""
    return Schedule(
        lambda t: torch.where(t < JUMP, 1.0, 9.0).to(t),
        lambda s, t: (t - s) + 8 * (t.clamp_min(JUMP) - s.clamp_min(JUMP)),
    )


JUMPING = Clock(lambda t: t + 8 * max(t - JUMP, 0.0))


class Exact(NamedTuple):
    """A process of position and velocity in numpy; diagonals of Q, S and of z_0's covariance."""

    A: Array
    Q: Array
    S: Array
    auxiliary: Array
    clock: Clock

    @property
    def driven(self) -> list[int]:
        return [i for i in (0, 1) if self.Q[i] > 0]

    def law(self, t: float) -> tuple[Array, Array]:
        """Mean and covariance for the Gaussian data."""
        psi, S = expm(self.A * self.clock(0.0, t)), np.diag(self.S)
        initial = np.diag(self.auxiliary) + np.diag([VARIANCE, 0.0])
        return psi[:, 0] * MEAN, S - psi @ (S - initial) @ psi.T


def langevin(clock: Clock, mass: float = 0.25, friction: float = 1.0) -> Exact:
    return Exact(
        np.array([[0.0, 1 / mass], [-1.0, -friction / mass]]),
        np.array([0.0, 2 * friction]),
        np.array([1.0, mass]),
        np.array([0.0, 0.04 * mass]),
        clock,
    )


def phase_space(clock: Clock, gamma: float, nu: float, mass: float) -> Exact:
    return Exact(
        np.array([[-gamma / 2, 0.5 / mass], [-0.5, -nu / 2]]),
        np.array([gamma, mass * nu]),
        np.array([1.0, mass]),
        np.array([0.0, 0.04 * mass]),
        clock,
    )


PROCESSES: dict[str, Callable[[], tuple[LinearSDE, Exact]]] = {
    "CLD": lambda: (CLD(), langevin(linear(4.0, 4.0))),
    "CLD, heavy": lambda: (
        CLD(beta=3.0, mass=0.6, friction=0.9),
        langevin(linear(3.0, 3.0), 0.6, 0.9),
    ),
    "CLD, linear": lambda: (
        CLD(beta=(0.5, 7.5), mass=0.4, friction=1.7),
        langevin(linear(0.5, 7.5), 0.4, 1.7),
    ),
    "CLD, wave": lambda: (CLD(beta=Schedule(wave)), langevin(WAVE)),
    "CLD, jump": lambda: (CLD(beta=jump()), langevin(JUMPING)),
    "PSLD": lambda: (PSLD(), phase_space(linear(8.0, 8.0), 0.01, 4.01, 0.25)),
    "PSLD, linear": lambda: (
        PSLD(beta=(1.0, 14.0), gamma=0.7, nu=3.0, mass=0.4),
        phase_space(linear(1.0, 14.0), 0.7, 3.0, 0.4),
    ),
    "PSLD, noise in the data": lambda: (
        PSLD(gamma=4.0, nu=0.0),
        phase_space(linear(8.0, 8.0), 4.0, 0.0, 0.25),
    ),
}
WORDS = ["OBA", "BAO", "OBAB", "BAOAB", "OABAO", "BOAOB", "ABOBAOB"]
VARIANTS: list[dict[str, Any]] = [
    {"shared_score": shared, "score_time": at}
    for shared in (False, True)
    for at in ("start", "end")
]


def _name(options: Any) -> str | None:
    if not isinstance(options, dict):
        return None
    return f"{'shared' if options['shared_score'] else 'own'}, {options['score_time']}"


every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_word = pytest.mark.parametrize("word", WORDS)
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=_name)


def parts(word: str, t: float, u: float) -> list[tuple[str, float, float]]:
    """Letters with the noisier and the less noisy end of their part of the step from t to u."""
    result = []
    for place, letter in enumerate(word):
        n, m = word.count(letter), word[:place].count(letter)
        result.append((letter, t + (u - t) * m / n, t + (u - t) * (m + 1) / n))
    return result


def asked(
    word: str,
    exact: Exact,
    times: Array,
    shared_score: bool = False,
    score_time: str = "start",
) -> list[float]:
    """Times at which the score is asked, in order."""
    result: list[float] = []
    letters = {"AB"[i] for i in exact.driven}
    for t, u in itertools.pairwise(times):
        if shared_score:
            result.append(t if score_time == "start" else u)
        else:
            asking = [part for part in parts(word, t, u) if part[0] in letters]
            result += [late if score_time == "start" else early for _, late, early in asking]
    return result


def ornstein_uhlenbeck(exact: Exact, clock: float) -> tuple[Array, Array]:
    """Mean map and covariance of O, by one exponential (Van Loan 1978)."""
    pull = -0.5 * exact.Q / exact.S
    both = expm(
        np.block([[np.diag(-pull), np.diag(exact.Q)], [np.zeros((2, 2)), np.diag(pull)]]) * clock
    )
    mean: Array = both[2:, 2:].T
    covariance: Array = mean @ both[:2, 2:]
    return mean, covariance


def propagate(
    exact: Exact, word: str, times: Array, shared_score: bool, score_time: str
) -> tuple[Array, Array]:
    """Moments at the end of the grid, from the exact ones at its start."""
    mean, covariance = exact.law(times[0])
    force = np.diag(0.5 * exact.Q / exact.S) - exact.A
    for t, u in itertools.pairwise(times):
        z = np.eye(2, 3)  # columns: state at t, constant, noise
        columns: list[Array] = []
        pull: Array | None = None
        for letter, late, early in parts(word, t, u):
            clock = exact.clock(early, late)
            if letter == "O":
                move, spread = ornstein_uhlenbeck(exact, clock)
                assert abs(spread[0, 1]) <= 1e-15
                z = np.hstack([move @ z, np.sqrt(np.diag(np.diag(spread)))])
                columns.append(spread)
                continue
            row = "AB".index(letter)
            slope = (force @ z)[row]
            if row in exact.driven:
                if pull is None or not shared_score:
                    begin, end = (t, u) if shared_score else (late, early)
                    m, C = exact.law(begin if score_time == "start" else end)
                    away = -z
                    away[:, 2] += m
                    pull = np.linalg.solve(C, away)
                # Columns of noise that came after the score was asked are none of its own.
                pull = np.hstack([pull, np.zeros((2, z.shape[1] - pull.shape[1]))])
                slope = slope + exact.Q[row] * pull[row]
            z = z.copy()
            z[row] += clock * slope
        mean = z[:, :2] @ mean + z[:, 2]
        whole = block_diag(covariance, np.eye(2 * len(columns)))
        covariance = np.delete(z, 2, axis=1) @ whole @ np.delete(z, 2, axis=1).T
    return mean, covariance


def moments(solver: Splitting, name: str, times: torch.Tensor) -> tuple[Array, Array]:
    """What the solver makes of the exact moments."""
    sde, exact = PROCESSES[name]()
    mean, covariance = exact.law(float(times[0]))
    m, C = propagate_moments(
        ReverseProcess(sde, DATA.score(sde)),
        solver,
        times,
        torch.from_numpy(mean)[:, None],
        torch.from_numpy(covariance),
    )
    return m[:, 0].numpy(), C.numpy()


def difference(found: tuple[Array, Array], expected: tuple[Array, Array]) -> float:
    """Largest difference of a moment, beside the size of the covariance."""
    size = max(1.0, float(abs(expected[1]).max()))
    return max(float(abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / size


GRID = solvers.root_times(1.0, 0.05, 6)


class TestLetters:
    """Moments are those of the letters, one after another."""

    @every_word
    @every_variant
    @every_process
    def test_a_word_is_its_letters(self, name: str, options: dict[str, Any], word: str) -> None:
        found = moments(Splitting(scheme=word, **options), name, GRID)
        expected = propagate(PROCESSES[name]()[1], word, GRID.numpy(), **options)
        assert difference(found, expected) <= 1e-11

    @every_process
    def test_one_long_step_is_its_letters(self, name: str) -> None:
        # A clock of 4 or more: the friction is far from its first order.
        times = torch.tensor([1.0, 0.05], dtype=torch.float64)
        for word, options in itertools.product(WORDS, VARIANTS):
            found = moments(Splitting(scheme=word, **options), name, times)
            expected = propagate(PROCESSES[name]()[1], word, times.numpy(), **options)
            assert difference(found, expected) <= 1e-11

    @pytest.mark.parametrize("name", ["CLD", "PSLD, linear"])
    def test_the_options_matter(self, name: str) -> None:
        # Otherwise agreement with the letters would say little. A score that serves one letter
        # only is its own.
        exact = PROCESSES[name]()[1]
        results = [
            moments(Splitting(scheme=word, **options), name, GRID)
            for word, options in itertools.product(WORDS, VARIANTS)
            if not options["shared_score"] or len(asked(word, exact, GRID[:2].numpy())) > 1
        ]
        assert len(results) == 2 * len(WORDS) + 2 * (len(WORDS) if name != "CLD" else 4)
        for one, other in itertools.combinations(results, 2):
            assert difference(one, other) > 1e-4

    @every_word
    @pytest.mark.parametrize("at", [0.2, 0.3, 0.62, 0.95])
    def test_drift_and_noise_have_one_clock_wherever_the_rate_jumps(
        self, word: str, at: float
    ) -> None:
        # Letters whose part of the step the jump divides.
        times = torch.tensor([1.0, 0.1], dtype=torch.float64)
        clock = Clock(lambda t: 3 * t + 5 * max(t - at, 0.0))
        beta = Schedule(
            lambda t: torch.where(t < at, 3.0, 8.0).to(t),
            lambda s, t: 3 * (t - s) + 5 * (t.clamp_min(at) - s.clamp_min(at)),
        )
        sde, dense = PSLD(beta, gamma=0.7), phase_space(clock, 0.7, 4.01, 0.25)
        mean, covariance = dense.law(1.0)
        m, C = propagate_moments(
            ReverseProcess(sde, DATA.score(sde)),
            Splitting(scheme=word),
            times,
            torch.from_numpy(mean)[:, None],
            torch.from_numpy(covariance),
        )
        expected = propagate(dense, word, times.numpy(), **VARIANTS[0])
        assert difference((m[:, 0].numpy(), C.numpy()), expected) <= 1e-11

    @pytest.mark.parametrize("name", ["CLD, linear", "CLD, wave", "PSLD, linear"])
    @pytest.mark.parametrize("word", ["OBAB", "BAOAB", "BOAOB"])
    def test_a_letter_on_the_part_of_another_would_be_seen(self, name: str, word: str) -> None:
        class Wrong(Splitting):
            """Its second B acts on the clock, and at the times, of the first."""

            def _parts(self, times: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
                right = super()._parts(times)
                first = next(part for part in right if part[0] == "B")
                return [first if part[0] == "B" else part for part in right]

        expected = propagate(PROCESSES[name]()[1], word, GRID.numpy(), **VARIANTS[0])
        assert difference(moments(Splitting(scheme=word), name, GRID), expected) <= 1e-11
        assert difference(moments(Wrong(scheme=word), name, GRID), expected) > 1e-3


@functools.cache
def error(solver: Splitting, name: str, n: int) -> float:
    # A norm that is smooth in the steps: the largest entry is not, where it changes places.
    mean, covariance = PROCESSES[name]()[1].law(0.05)
    m, C = moments(solver, name, solvers.root_times(1.0, 0.05, n))
    return float(np.hypot(np.linalg.norm(m - mean), np.linalg.norm(C - covariance)))


def order(solver: Splitting, name: str, coarse: int = 100) -> float:
    """Slope of the error between ``coarse`` and twice as many steps."""
    return math.log2(error(solver, name, coarse) / error(solver, name, 2 * coarse))


# With errors c h (1 + d h + ...) the slope is 1 + d h / (2 log 2): a quarter leaves room for the
# second term, and a declaration that is off by a half is more than a quarter away.
CLOSE = 0.25
# A word with one B is the same with its own scores and with a shared one.
ORDERS = [
    ("CLD", options, word)
    for options, word in itertools.product(VARIANTS, WORDS)
    if not options["shared_score"] or word.count("B") > 1
]
ORDERS += [("PSLD", VARIANTS[0], word) for word in WORDS]
ORDERS += [("PSLD", options, "OBAB") for options in VARIANTS[1:]]
ORDERS += [("CLD, linear", VARIANTS[0], word) for word in WORDS]


class TestOrders:
    """Halving the steps halves the error in law."""

    @pytest.mark.parametrize(("name", "options", "word"), ORDERS, ids=_name)
    def test_the_order_is_that_of_the_declaration(
        self, name: str, options: dict[str, Any], word: str
    ) -> None:
        solver = Splitting(scheme=word, **options)
        declared, slope = solver.facts.weak_order, order(solver, name)
        assert declared is not None
        assert solver.facts.strong_order is solver.facts.ode_order is None
        assert abs(slope - declared) < CLOSE
        for wrong in (-0.5, 0.5):
            assert abs(slope - declared - wrong) > CLOSE

    def test_on_gaussian_data_sscs_is_more_accurate_with_as_many_evaluations(self) -> None:
        # As the solver's documentation says, of every word with one evaluation a step.
        sde, exact = PROCESSES["CLD"]()
        for n in (50, 100):
            times = solvers.root_times(1.0, 0.05, n)
            mean, covariance = exact.law(1.0)
            m, C = propagate_moments(
                ReverseProcess(sde, DATA.score(sde)),
                solvers.SSCS(),
                times,
                torch.from_numpy(mean)[:, None],
                torch.from_numpy(covariance),
            )
            mean, covariance = exact.law(0.05)
            away = np.hypot(
                np.linalg.norm(m[:, 0].numpy() - mean), np.linalg.norm(C.numpy() - covariance)
            )
            for word in WORDS:
                for options in VARIANTS[2:]:
                    assert error(Splitting(scheme=word, **options), "CLD", n) > away


class Counting(solvers.NoiseSource):
    """Fresh normals; remembers how many rows were asked for."""

    def __init__(self) -> None:
        self.fresh, self.rows = solvers.FreshNoise(generator()), []

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        self.rows.append(rows)
        return self.fresh.normal(z, rows)


class TestCounting:
    """Evaluations of the score and draws of noise: their number, and their times."""

    @pytest.mark.parametrize("denoise", [True, False])
    @every_variant
    @every_process
    def test_evaluations_are_counted_and_stay_in_the_interval(
        self, name: str, options: dict[str, Any], denoise: bool
    ) -> None:
        sde, dense = PROCESSES[name]()
        times = solvers.root_times(0.9, 1e-2, 3)
        for word in WORDS:
            score = Recording(exact.mixture().score(sde))
            process, solver = ReverseProcess(sde, score), Splitting(scheme=word, **options)
            solution = solvers.solve(
                process, solver, start(sde), times, generator=generator(), denoise=denoise
            )
            assert solution.success
            each = len([c for c in word if c in {"AB"[i] for i in dense.driven}])
            each = 1 if options["shared_score"] else each
            assert solution.nfev == score.calls == 3 * each + denoise
            expected = asked(word, dense, times.numpy(), **options)
            expected += times[-1:].tolist() if denoise else []
            found = [t[0].item() for t in score.times]
            # A rounding of the time each: of its parts, and none at the ends of a step.
            assert np.allclose(found, expected, rtol=0, atol=4e-16)
            assert min(found) >= 1e-2
            assert max(found) <= 0.9
            if options["shared_score"]:
                assert found == expected
            for t in score.times:
                assert t.shape == (3,)
                assert (t == t[0]).all()

    @pytest.mark.parametrize("score_time", ["start", "end"])
    def test_scores_at_one_end_of_a_part_are_not_asked_at_the_other(self, score_time: Any) -> None:
        sde, n = CLD(), 4
        score = Recording(exact.mixture().score(sde))
        times = solvers.root_times(1.0, 0.05, n)
        solver = Splitting(scheme="BAOAB", score_time=score_time)
        solvers.solve(ReverseProcess(sde, score), solver, start(sde), times)
        found = [t[0].item() for t in score.times]
        middles = [(t + u) / 2 for t, u in itertools.pairwise(times.tolist())]
        ends = times[:-1] if score_time == "start" else times[1:]
        expected = sorted([*ends.tolist(), *middles], reverse=True)
        assert np.allclose(found, expected, rtol=0, atol=4e-16)

    @every_word
    def test_the_declared_number_is_that_of_cld(self, word: str) -> None:
        assert Splitting(scheme=word).facts.nfe_per_step == word.count("B")
        assert Splitting(scheme=word, shared_score=True).facts.nfe_per_step == 1

    @every_word
    @pytest.mark.parametrize("name", ["CLD", "PSLD", "PSLD, noise in the data"])
    def test_noise_is_drawn_by_o_alone_for_the_driven_components(
        self, name: str, word: str
    ) -> None:
        sde, dense = PROCESSES[name]()
        noise = Counting()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        solvers.solve(process, Splitting(scheme=word), start(sde), GRID, noise=noise)
        assert noise.rows == [len(dense.driven)] * (word.count("O") * 6)


def correlated_noise() -> LinearSDE:
    """Unit stationary covariance, and noises of position and velocity that are one."""
    return LinearSDE.from_matrices([[-0.5, 0.5], [-1.5, -0.5]], [[1.0], [1.0]])


def correlated_law() -> LinearSDE:
    """Noises that are independent and a stationary covariance that is not diagonal."""
    Q_root = np.diag([2**0.5, 1.0])
    A = -0.5 * Q_root @ Q_root.T @ np.linalg.inv([[1.0, 0.5], [0.5, 1.0]])
    return LinearSDE.from_matrices(torch.from_numpy(A), torch.from_numpy(Q_root))


class TestRefusals:
    """What is refused, before anything is evaluated."""

    @pytest.mark.parametrize(
        "make",
        [
            VPSDE,
            VESDE,
            SubVPSDE,
            HOLD,
            lambda: LinearSDE.from_matrices([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]]),
            lambda: LinearSDE.from_functions(
                lambda t: [[0.0, 1.0], [-1.0, -1.0]], lambda t: [[0.0], [1.0]]
            ),
        ],
        ids=["VP", "VE", "sub-VP", "HOLD", "free", "functions"],
    )
    def test_processes_that_have_no_velocity_or_no_stationary_law(self, make: Any) -> None:
        sde = make()
        process = ReverseProcess(sde, untouchable)
        other = "SSCS" if sde.stationary_reversal else "StochasticHeun"
        message = (
            r"Splitting needs a process of position and velocity with a stationary distribution; "
            rf".* has {sde.components} components.*Use {other}$"
        )
        with pytest.raises(ValueError, match=message):
            solvers.solve(process, Splitting(), start(sde), GRID)

    def test_processes_whose_stationary_law_has_no_density(self) -> None:
        # The position has no noise and comes to rest.
        sde = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]], 3.0)
        assert sde.stationary_covariance is not None
        assert sde.stationary_covariance[0, 0] == 0
        process = ReverseProcess(sde, untouchable)
        state = torch.zeros(3, 2, 2, dtype=torch.float64)
        for options in VARIANTS:
            with pytest.raises(ValueError, match=r"with a stationary distribution; .* and none"):
                solvers.solve(process, Splitting(**options), state, GRID)

    @pytest.mark.parametrize(
        "make", [correlated_noise, correlated_law, lambda: CLD(position_noise=0.3)]
    )
    def test_processes_whose_components_are_correlated(self, make: Any) -> None:
        sde = make()
        assert sde.stationary_covariance is not None
        process = ReverseProcess(sde, untouchable)
        with pytest.raises(ValueError, match=r"independent noises .* correlated ones\. Use SSCS"):
            solvers.solve(process, Splitting(), start(sde), GRID)

    def test_the_correlations_of_these_tests(self) -> None:
        for make, S in ((correlated_noise, np.eye(2)), (correlated_law, [[1.0, 0.5], [0.5, 1.0]])):
            assert np.allclose(make().stationary_covariance, S, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "scheme", ["", "OB", "OXAB", "oba", "OBA ", "O", 3, None, ["O", "B", "A"], b"OBA"]
    )
    def test_words_without_their_letters(self, scheme: Any) -> None:
        with pytest.raises(ValueError, match="scheme must contain each of the letters"):
            Splitting(scheme=scheme)

    @pytest.mark.parametrize("score_time", ["", "middle", "End", None, 0.5, True])
    def test_unknown_times_of_the_score(self, score_time: Any) -> None:
        with pytest.raises(ValueError, match="score_time must be one of 'start', 'end'; got"):
            Splitting(score_time=score_time)

    @pytest.mark.parametrize("shared_score", [1, 0, None, "yes", 1.0, torch.tensor(True)], ids=str)
    def test_a_shared_score_is_true_or_false(self, shared_score: Any) -> None:
        with pytest.raises(TypeError, match="shared_score must be True or False; got"):
            Splitting(shared_score=shared_score)

    def test_unknown_and_positional_options(self) -> None:
        wrong: Any = Splitting
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrong(steps=3)
        with pytest.raises(TypeError, match="positional"):
            wrong("OBA")

    @every_variant
    @pytest.mark.parametrize("shape", [(3, 2, 2), (3, 1, 1), (3, 2)])
    def test_scores_of_another_shape(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        process = ReverseProcess(CLD(), lambda z, t: torch.zeros(shape))
        with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 2\).*got"):
            solvers.solve(process, Splitting(**options), start(CLD()), GRID)


class TestSteps:
    """Bits, types, shapes, and no waiting."""

    @staticmethod
    def run(
        name: str, word: str, options: dict[str, Any], state: torch.Tensor, seed: int = 0
    ) -> torch.Tensor:
        sde, _ = PROCESSES[name]()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        solver = Splitting(scheme=word, **options)
        solution = solvers.solve(process, solver, state, GRID, generator=generator(seed))
        assert solution.success
        return solution.state

    @every_variant
    @every_process
    def test_one_seed_gives_the_same_bits(self, name: str, options: dict[str, Any]) -> None:
        state = start(PROCESSES[name]()[0])
        before = state.clone()
        for word in ("OBA", "BAOAB"):
            first = self.run(name, word, options, state)
            assert torch.equal(first, self.run(name, word, options, state))
            # No sample keeps a number.
            assert (first != self.run(name, word, options, state, seed=1)).all()
        assert torch.equal(state, before)

    @pytest.mark.parametrize("kind", ["mixture", "mixed", "plain"])
    @every_variant
    @pytest.mark.parametrize("name", ["CLD", "CLD, linear", "PSLD", "PSLD, noise in the data"])
    def test_a_step_waits_for_no_value(
        self, name: str, options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde = PROCESSES[name]()[0]
        score: Any = exact.mixture().score(sde)
        if kind == "mixed":
            score = MixedScore(Constant(sde), sde, torch.zeros(()), torch.ones(()))
        elif kind == "plain":
            score = lambda z, t: -z[:, list(sde.driven)]  # noqa: E731
        process = ReverseProcess(sde, score)
        for word in WORDS:
            z, solver = start(sde), Splitting(scheme=word, **options)
            known = known_score(process, solver, GRID, z)
            tables, noise = solver.prepare(process, GRID), solvers.FreshNoise(generator())
            with no_waiting(monkeypatch), torch.no_grad():
                memory: Memory = ()
                for i in range(len(GRID) - 1):
                    z, memory = solver.step(z, memory, tables, i, known, noise)
                    assert memory == ()
            assert z.isfinite().all()

    @every_variant
    @pytest.mark.parametrize("name", ["CLD", "PSLD"])
    def test_networks_are_sampled_in_their_precision(
        self, name: str, options: dict[str, Any]
    ) -> None:
        sde = PROCESSES[name]()[0]
        score = MixedScore(Constant(sde, 0.1), sde, torch.zeros(()), torch.ones(()))
        for word, dtype in itertools.product(WORDS, (torch.float32, torch.float64)):
            z = start(sde, (3, 1, 4, 4), dtype)
            solution = solvers.solve(
                ReverseProcess(sde, score),
                Splitting(scheme=word, **options),
                z,
                GRID,
                generator=generator(),
                denoise=True,
            )
            assert solution.success
            assert solution.state.dtype == solution.data.dtype == dtype
            assert solution.state.shape == z.shape
            assert solution.data.shape == (3, 1, 4, 4)

    @every_variant
    @pytest.mark.parametrize("name", ["CLD", "PSLD"])
    def test_single_precision_agrees_with_double(self, name: str, options: dict[str, Any]) -> None:
        sde = PROCESSES[name]()[0]
        process, z = ReverseProcess(sde, DATA.score(sde)), start(sde, (8, 1), torch.float32)
        draws = [torch.randn(8, len(sde.driven), 1, generator=generator(i)) for i in range(12)]
        for word in ("OBAB", "BAOAB", "OABAO"):
            found, expected = (
                solvers.solve(
                    process,
                    Splitting(scheme=word, **options),
                    z.to(dtype),
                    GRID,
                    noise=solvers.RecordedNoise(draws),
                ).state
                for dtype in (torch.float32, torch.float64)
            )
            # Six steps with a rounding of 6e-8 in each letter; a score's slope, 1 / variance of
            # some 1e-2, times a step and the friction, some 10, grows what was lost before.
            assert (found.double() - expected).abs().max() <= 1e-5 * max(
                1.0, float(expected.abs().max())
            )

    @pytest.mark.parametrize("axes", [(1, 8, 8), (4, 16)])
    @every_variant
    @pytest.mark.parametrize("name", ["CLD", "PSLD"])
    def test_several_data_axes_equal_flattened_ones(
        self, name: str, options: dict[str, Any], axes: tuple[int, ...]
    ) -> None:
        sde = PROCESSES[name]()[0]
        eye = 0.1 * torch.eye(64, dtype=torch.float64)
        means = torch.linspace(-1, 1, 64, dtype=torch.float64)
        data = GaussianMixture([1, 1], torch.stack([means, -means]), torch.stack([eye, eye]))
        process, flat = ReverseProcess(sde, data.score(sde)), start(sde, (3, 64))
        for word in ("OBAB", "BAOAB"):
            solver = Splitting(scheme=word, **options)
            one, several = (
                solvers.solve(process, solver, z, GRID, generator=generator()).state
                for z in (flat, flat.reshape(3, 2, *axes))
            )
            assert torch.equal(several.flatten(2), one)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_variant
    @every_process
    def test_streams_of_samples_give_the_same_bits_in_any_batch(
        self, name: str, options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        sde, seeds = PROCESSES[name]()[0], [11, 3, 2**31, 0, 5]
        driven = list(sde.driven)
        process = ReverseProcess(sde, lambda z, t: -(z[:, driven] + 0.1 * z[:, driven].sin()))

        def sample(word: str, chosen: list[int]) -> torch.Tensor:
            noise = solvers.SampleNoise([seeds[i] for i in chosen])
            state = noise.start(sde, (3, 5), dtype=dtype)
            solver = Splitting(scheme=word, **options)
            return solvers.solve(process, solver, state, GRID, noise=noise).state

        for word in ("OBA", "OBAB", "OABAO"):
            together = sample(word, [0, 1, 2, 3, 4])
            for chosen in ([2], [4, 0], [4, 3, 2, 1, 0], [1, 3, 1]):
                assert torch.equal(sample(word, chosen), together[chosen])
            assert all((together[i] != together[j]).all() for i in range(5) for j in range(i))

    def test_states_on_the_grid_are_those_of_shorter_solves(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, exact.mixture().score(sde))
        seen: list[tuple[int, float]] = []
        solution = solvers.solve(
            process,
            Splitting(),
            start(sde),
            GRID,
            generator=generator(),
            t_eval=GRID,
            callback=lambda step, t, z: seen.append((step, t)),
        )
        assert seen == list(enumerate(GRID.tolist()))[1:]
        for i in range(1, len(GRID)):
            shorter = solvers.solve(
                process, Splitting(), start(sde), GRID[: i + 1], generator=generator()
            )
            # Tables of fewer times round alike but for vectorised exponentials.
            assert torch.allclose(solution.y[i], shorter.state, rtol=0, atol=1e-11)

    def test_solvers_are_frozen_values(self) -> None:
        assert Splitting() == Splitting(scheme="OBAB", shared_score=False, score_time="start")
        assert hash(Splitting()) == hash(Splitting())
        assert Splitting() != Splitting(shared_score=True)
        frozen: Any = Splitting()
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.scheme = "OBA"
