"""Gotta Go Fast: its Brownian paths, its formulas, what it counts, and what rejection does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import kstest

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.solvers import (
    FreshNoise,
    GottaGoFast,
    NoiseSource,
    RecordedNoise,
    SampleNoise,
    Solution,
    solve,
)
from cldsde.solvers.gotta_go_fast import _Path
from probes import Recording, generator, initial, start, untouchable
from score import exact

FAMILIES: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
}
MODES = ("bridge", "fresh")

every_family = pytest.mark.parametrize("name", list(FAMILIES))
every_mode = pytest.mark.parametrize("mode", MODES)
may_fail = pytest.mark.filterwarnings("ignore:the solve failed")


def ends(eps: float = 0.1, T: float = 1.0) -> torch.Tensor:
    return torch.tensor([T, eps], dtype=torch.float64)


def run(
    sde: LinearSDE,
    score: Any,
    state: torch.Tensor,
    times: torch.Tensor | None = None,
    *,
    noise: NoiseSource | None = None,
    denoise: bool = False,
    **options: Any,
) -> Solution:
    process = ReverseProcess(sde, score)
    source = FreshNoise(generator(0)) if noise is None else noise
    where = ends() if times is None else times
    # Looser than the defaults: a run takes a few dozen attempts.
    options = {"rtol": 0.1, "atol": 0.05, **options}
    return solve(process, GottaGoFast(**options), state, where, noise=source, denoise=denoise)


def gaussian(mean: float = 0.3, variance: float = 0.25) -> GaussianMixture:
    return GaussianMixture([1.0], [[mean]], [[[variance]]])


class NoNoise(NoiseSource):
    """Zeros: what is left is an ordinary differential equation."""

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        return z.new_zeros(len(z), rows, *z.shape[2:])


def over(path: _Path, h: torch.Tensor) -> torch.Tensor:
    """The increment over the next h of each sample."""
    return path.increment(path.weights(h))


def keep(path: _Path, going: torch.Tensor) -> None:
    """Keep the samples that are going."""
    path.keep(going.nonzero().flatten())
    path.on_device = [x[going] for x in path.on_device]


class TestPath:
    """The Brownian path is one path, however it is walked."""

    def test_what_was_seen_is_met_again(self) -> None:
        # Times are multiples of 2^-12, so that they are exact.
        n, rows, unit = 16, 2, 2.0**-12
        g = generator(1)
        path = _Path(torch.zeros(n, 1, 3, dtype=torch.float64), rows, FreshNoise(g))
        at = torch.zeros(n, dtype=torch.float64)
        walked = torch.zeros(n, rows, 3, dtype=torch.float64)
        seen: list[dict[float, torch.Tensor]] = [{} for _ in range(n)]
        met = 0
        for _ in range(300):
            h = unit * torch.randint(1, 400, (n,), generator=g).to(torch.float64)
            for i in range(n):
                ahead = [p for p in seen[i] if p > at[i]]
                if ahead and torch.rand((), generator=g) < 0.5:
                    choice = int(torch.randint(len(ahead), (), generator=g))
                    h[i] = ahead[choice] - float(at[i])
            increment = over(path, h)
            accept = torch.rand(n, generator=g) < 0.4
            for i in range(n):
                point, value = float(at[i] + h[i]), walked[i] + increment[i]
                if point in seen[i]:
                    met += 1
                    # Differences and sums of at most 300 numbers of size sqrt(30).
                    assert torch.allclose(value, seen[i][point], rtol=0, atol=1e-12)
                seen[i][point] = value
            walked = torch.where(accept[:, None, None], walked + increment, walked)
            at = torch.where(accept, at + h, at)
            path.settle(accept, keep_rejected=True)
        assert met > 500

    def test_parts_sum_to_the_rejected_increment(self) -> None:
        # Lengths differ between samples and are not exact here.
        g = generator(2)
        path = _Path(torch.zeros(5, 2, 2, dtype=torch.float64), 1, FreshNoise(g))
        whole = torch.rand(5, generator=g, dtype=torch.float64) + 0.1
        shares = torch.rand(5, 7, generator=g, dtype=torch.float64)
        shares /= shares.sum(1, keepdim=True)
        rejected = over(path, whole)
        path.settle(torch.zeros(5, dtype=torch.bool), keep_rejected=True)
        total = torch.zeros_like(rejected)
        for share in shares.T:
            total += over(path, share * whole)
            path.settle(torch.ones(5, dtype=torch.bool), keep_rejected=True)
        # Lengths sum to the whole but for a few roundings, 1e-15; over what is left the path moves
        # by its root.
        assert torch.allclose(total, rejected, rtol=0, atol=5 * math.sqrt(1e-15))

    @staticmethod
    def adversary(*, keep_rejected: bool, n: int = 8000) -> torch.Tensor:
        """Increments over four quarters, walked by one who declines what is large."""
        g = generator(3)
        path = _Path(torch.zeros(n, 1, dtype=torch.float64), 2, FreshNoise(g))
        at = torch.zeros(n, dtype=torch.float64)
        cells = torch.zeros(n, 4, 2, dtype=torch.float64)
        alive = torch.arange(n)
        while len(alive):
            exponent = torch.randint(0, 6, (len(alive),), generator=g)
            h = 2.0 ** -exponent.to(torch.float64)
            increment = over(path, h)
            cell = (4 * at).floor()
            fits = at + h <= (cell + 1) / 4
            accept = fits & ((increment.abs().amax(1) < 0.8 * h.sqrt()) | (exponent == 5))
            moved = increment * accept.unsqueeze(1)
            cells[alive, cell.to(torch.int64)] += moved
            at = torch.where(accept, at + h, at)
            path.settle(accept, keep_rejected=keep_rejected)
            going = at < 1
            alive, at = alive[going], at[going]
            keep(path, going)
        return cells

    def test_increments_are_independent_normals_whatever_is_declined(self) -> None:
        increments = 2 * self.adversary(keep_rejected=True).flatten(1)
        n, eye = len(increments), torch.eye(8, dtype=torch.float64)
        # 4.5 standard errors: covariances 1/sqrt(n), variances sqrt(2) of that, means 1/sqrt(n).
        error = (increments.T @ increments / n - eye).abs()
        assert bool((error <= 4.5 * (1 + 0.42 * eye) / math.sqrt(n)).all())
        assert float(increments.mean(0).abs().max()) <= 4.5 / math.sqrt(n)
        assert min(kstest(column, "norm").pvalue for column in increments.T.numpy()) > 1e-4
        # Squares are uncorrelated, too: no pace of one quarter shows in the size of the next.
        squares = (increments.square() - 1) / math.sqrt(2)
        # Products of squares have unit variance where they are independent.
        error = (squares.T @ squares / n)[~eye.bool()].abs()
        assert float(error.max()) <= 4.5 / math.sqrt(n)

    def test_forgetting_what_is_declined_shortens_them(self) -> None:
        # The test above can fail.
        increments = 2 * self.adversary(keep_rejected=False).flatten(1)
        n = len(increments)
        assert float(increments.var(0).max()) < 1 - 20 * math.sqrt(2 / n)

    def test_each_sample_has_its_length(self) -> None:
        h = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 7.0], dtype=torch.float64)
        draws = torch.randn(4, 5, 2, 3, generator=generator(4), dtype=torch.float64)
        path = _Path(torch.zeros(5, 1, 3, dtype=torch.float64), 2, RecordedNoise(list(draws)))
        expected = h.sqrt()[:, None, None] * draws[0]
        assert torch.allclose(over(path, h), expected, rtol=1e-14, atol=0)
        # Kept where rejected; over a third of it the bridge, and past its end fresh numbers.
        accept = torch.tensor([True, False, False, False, True])
        path.settle(accept, keep_rejected=True)
        longer = h * torch.tensor([1.0, 1 / 3, 2.0, 1.0, 0.5], dtype=torch.float64)
        found = over(path, longer)
        root = h.sqrt()[:, None, None]
        assert torch.allclose(found[0], root[0] * draws[2, 0], rtol=1e-14, atol=0)
        assert torch.allclose(
            found[1], expected[1] / 3 + math.sqrt(2) / 3 * root[1] * draws[3, 1], rtol=1e-13, atol=0
        )
        assert torch.allclose(found[2], expected[2] + root[2] * draws[2, 2], rtol=1e-13, atol=1e-15)
        assert torch.equal(found[3], expected[3])
        assert torch.allclose(found[4], math.sqrt(0.5) * root[4] * draws[2, 4], rtol=1e-14, atol=0)

    def test_those_that_stay_are_not_changed_by_those_that_leave(self) -> None:
        like = torch.zeros(4, 1, 2, dtype=torch.float64)
        going = torch.tensor([True, False, True, False])
        one = _Path(like, 1, SampleNoise([1, 2, 3, 4]))
        other = _Path(like, 1, SampleNoise([1, 2, 3, 4]))
        g = generator(5)
        left = torch.ones(4, dtype=torch.bool)
        for attempt in range(12):
            h = torch.rand(4, generator=g, dtype=torch.float64) + 0.01
            accept = torch.rand(4, generator=g) < 0.5
            a, b = over(one, h), over(other, h[left])
            assert torch.equal(a[left], b)
            one.settle(accept, keep_rejected=True)
            other.settle(accept[left], keep_rejected=True)
            if attempt == 5:
                left = going
                keep(other, going)

    def test_what_is_over_is_not_stored(self) -> None:
        g = generator(6)
        path = _Path(torch.zeros(8, 1, dtype=torch.float64), 1, FreshNoise(g))
        for _ in range(200):
            over(path, torch.rand(8, generator=g, dtype=torch.float64) + 0.01)
            path.settle(torch.rand(8, generator=g) < 0.6, keep_rejected=True)
            # Two pieces per attempt; a piece lasts as long as rejections in a row do, 0.4^k.
            assert path._pieces.shape[1] == path._lengths.shape[1] <= 40


def ten_bits(h: float) -> float:
    """The step length that a solver takes for h: rounded down to ten bits."""
    mantissa, exponent = math.frexp(h)
    return math.ldexp(math.floor(mantissa * 1024) / 1024, exponent)


class Reference:
    """The method for one sample, with lists, in the letters of the paper."""

    def __init__(self, sde: LinearSDE, score: Any, mode: str, draws: list[torch.Tensor]) -> None:
        self.sde, self.score, self.mode, self.draws = sde, score, mode, iter(draws)
        self.future: list[tuple[float, torch.Tensor]] = []
        self.errors: list[float] = []
        self.times: list[float] = []

    def increment(self, h: float) -> tuple[list[tuple[float, torch.Tensor]], torch.Tensor]:
        fresh, bridge = next(self.draws)[0], next(self.draws)[0]
        pieces: list[tuple[float, torch.Tensor]] = []
        left = h
        while self.future and left > 1e-12 * h:
            length, w = self.future.pop(0)
            if length > left + 1e-12 * h:
                part = left / length * w + math.sqrt(left * (length - left) / length) * bridge
                self.future.insert(0, (length - left, w - part))
                length, w = left, part
            pieces.append((length, w))
            left -= length
        if left > 1e-12 * h:
            pieces.append((left, math.sqrt(left) * fresh))
        return pieces, torch.stack([w for _, w in pieces]).sum(0)

    def slope(self, z: torch.Tensor, t: float) -> torch.Tensor:
        F, G = self.sde.drift(t), self.sde.diffusion(t)
        s = torch.zeros_like(z)
        s[list(self.sde.driven)] = self.score(z[None], torch.tensor([t], dtype=torch.float64))[0]
        return G @ G.T @ s - F @ z

    def __call__(
        self,
        z: torch.Tensor,
        t: float,
        end: float,
        *,
        rtol: float,
        atol: list[float],
        safety: float = 0.9,
        exponent: float = 0.9,
        first_step: float = 0.01,
        most: int = 100_000,
    ) -> torch.Tensor:
        tolerance = torch.tensor(atol, dtype=torch.float64).unsqueeze(1)
        h, before = min(ten_bits(first_step), t - end), z
        while t > end and 2 * len(self.errors) + 2 <= most:
            u = end if h >= t - end else t - h
            pieces, W = self.increment(h)
            K1 = h * self.slope(z, t) + self.sde.diffusion(t) @ W
            low = z + K1
            K2 = h * self.slope(low, u) + self.sde.diffusion(u) @ W
            scale = torch.maximum(tolerance, rtol * torch.maximum(low.abs(), before.abs()))
            error = float((0.5 * (K2 - K1) / scale).square().mean().sqrt())
            self.times += [t, u]
            self.errors.append(error)
            if error <= 1:
                z, before, t = z + 0.5 * (K1 + K2), low, u
            elif self.mode == "bridge":
                self.future = pieces + self.future
            else:
                self.future = []
            factor = min(5.0, max(0.2, safety * max(error, 1e-10) ** -exponent))
            h = min(t - end, ten_bits(h * factor))
        return z


class TestFormulas:
    """What is done is what is written."""

    @pytest.mark.parametrize("name", ["CLD", "VP"])
    def test_one_attempt_by_hand(self, name: str) -> None:
        sde = FAMILIES[name]()
        z = start(sde, (3, 2))
        W = torch.randn(3, 1, 2, generator=generator(1), dtype=torch.float64)
        t, u = 0.8, 0.7
        h = t - u
        noise = RecordedNoise([W, torch.zeros_like(W)])

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -z[:, -1:] * (1 + t[:, None, None])

        if name == "VP":

            def move(z: torch.Tensor, t: float) -> torch.Tensor:
                beta = 0.1 + 19.9 * t
                return h * beta * (z / 2 - z * (1 + t)) + math.sqrt(beta * h) * W

        else:
            # beta = 4, M = 1/4, Gamma = 1: x moves back by 16 v, v by -4 x - 16 v and 8 s.
            def move(z: torch.Tensor, t: float) -> torch.Tensor:
                x, v = z[:, :1], z[:, 1:]
                kick = h * (4 * x + 16 * v - 8 * v * (1 + t)) + math.sqrt(8 * h) * W
                return torch.cat([-h * 16 * v, kick], dim=1)

        K1 = move(z, t)
        K2 = move(z + K1, u)
        recorded = Recording(score)
        found = run(sde, recorded, z, ends(u, t), noise=noise, rtol=1e6, first_step=5.0, max_nfev=2)
        assert found.success
        assert found.nfev == 2
        assert found.stats["attempts"] == 1
        assert torch.allclose(found.state, z + 0.5 * (K1 + K2), rtol=1e-13, atol=1e-13)
        assert torch.allclose(recorded.states[1], z + K1, rtol=1e-13, atol=1e-13)
        assert [float(x[0]) for x in recorded.times] == [t, u]

    @every_mode
    @every_family
    def test_a_whole_run_by_hand(self, name: str, mode: str) -> None:
        sde = FAMILIES[name]()
        score, z = exact.mixture().score(sde), start(sde, (1, 2))
        G = sde.diffusion(0.5)
        draws = list(
            torch.randn(4000, 1, G.shape[-1], 2, generator=generator(2), dtype=torch.float64)
        )
        atol = [0.05 * (1 + i) for i in range(sde.components)]
        options: dict[str, Any] = {"safety": 0.8, "exponent": 0.7, "rtol": 0.1}
        reference = Reference(sde, score, mode, draws)
        expected = reference(z[0], 1.0, 0.1, atol=atol, **options)
        recorded = Recording(score)
        found = run(
            sde,
            recorded,
            z,
            noise=RecordedNoise(draws),
            atol=atol,
            noise_on_reject=mode,
            **options,
        )
        assert found.success
        assert found.stats["attempts"] == len(reference.errors)
        assert found.stats["rejections"] == sum(e > 1 for e in reference.errors) > 0
        times = torch.tensor(reference.times, dtype=torch.float64)
        # Rounding, 1e-16, grown along a few hundred steps; step lengths feel it through the error.
        assert torch.allclose(torch.cat(recorded.times), times, rtol=0, atol=1e-9)
        assert torch.allclose(found.state[0], expected, rtol=1e-8, atol=1e-8)

    @may_fail
    @pytest.mark.parametrize("name", ["CLD", "VP"])
    @pytest.mark.parametrize("factor", [1 - 1e-9, 1 + 1e-9])
    def test_a_step_is_accepted_where_the_error_is_at_most_one(
        self, name: str, factor: float
    ) -> None:
        sde = FAMILIES[name]()
        z, score = start(sde, (1, 2)), exact.mixture().score(sde)
        W = torch.randn(2, 1, 1, 2, generator=generator(3), dtype=torch.float64)
        probe = Reference(sde, score, "bridge", list(W))
        unit = [1.0] * sde.components
        stepped = probe(z[0], 1.0, 0.9, rtol=1e-200, atol=unit, first_step=0.05, most=2)
        # The error falls as 1/atol; atol times it gives 1.
        found = run(
            sde,
            score,
            z,
            ends(0.9),
            noise=RecordedNoise(list(W)),
            rtol=1e-200,
            atol=probe.errors[0] * factor,
            first_step=0.05,
            max_nfev=2,
        )
        assert not found.success
        assert found.stats["rejections"] == (factor < 1)
        if factor < 1:
            assert torch.equal(found.state, z)
        elif probe.errors[0] <= 1:
            assert torch.allclose(found.state[0], stepped, rtol=1e-12, atol=1e-12)
        else:
            assert not torch.equal(found.state, z)

    def test_denoising_is_the_data_prediction_and_counts_one_evaluation(self) -> None:
        sde = CLD()
        process, state = ReverseProcess(sde, exact.mixture().score(sde)), start(sde)
        plain = run(sde, process.score, state)
        denoised = run(sde, process.score, state, denoise=True)
        assert torch.equal(plain.data, plain.state[:, 0])
        assert torch.equal(denoised.state, plain.state)
        expected = process.data_prediction(denoised.state, 0.1)
        assert torch.allclose(denoised.data, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(denoised.stats["nfev"], plain.stats["nfev"] + 1)


class TestLaw:
    """Samples have the law they should have, within what steps of such a length allow."""

    @staticmethod
    def size(mode: str, rtol: float, atol: float, n: int, seed: int = 1) -> tuple[float, float]:
        """E|x| at t = 1e-3, in units of the exact value, and its standard error."""
        sde, v, eps = VPSDE(), 0.05**2, 1e-3
        data = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[v]], [[v]]])
        g = generator(seed)
        found = run(
            sde,
            data.score(sde),
            sde.prior.sample((n, 1), generator=g, dtype=torch.float32),
            ends(eps),
            noise=FreshNoise(g),
            rtol=rtol,
            atol=atol,
            noise_on_reject=mode,
        )
        assert found.success
        # Modes lie 20 standard deviations from zero: E|x| is the mean of one.
        exact_size = float(sde.marginal(eps).mean)
        x = found.state.double().abs() / exact_size
        return float(x.mean()), float(x.std()) / math.sqrt(n)

    def test_with_the_bridge_modes_lie_where_they_are(self) -> None:
        mean, error = self.size("bridge", 0.05, 0.01, 40_000)
        # Of the steps' length 5e-4, measured against a tolerance a fifth of this; see below.
        assert abs(mean - 1) <= 4 * error + 5e-4

    def test_fresh_noise_moves_them(self) -> None:
        mean, error = self.size("fresh", 0.05, 0.01, 10_000)
        assert mean - 1 > 10 * error
        assert 0.007 < mean - 1 < 0.02

    @pytest.mark.slow
    def test_what_the_bridge_leaves_goes_with_the_tolerance_and_fresh_noise_does_not(self) -> None:
        coarse, one = self.size("bridge", 0.05, 0.01, 200_000)
        fine, other = self.size("bridge", 0.01, 0.002, 200_000, seed=2)
        assert abs(fine - 1) <= 4 * other + 1e-4
        assert abs(coarse - fine) <= 4 * math.hypot(one, other) + 5e-4
        fresh, error = self.size("fresh", 0.01, 0.002, 200_000)
        assert fresh - 1 > 0.01 > 20 * error

    @every_family
    def test_gaussian_data(self, name: str) -> None:
        sde, n, eps = FAMILIES[name](), 2000, 0.1
        g = generator(4)
        law = sde.marginal(ends(eps), initial(sde))
        means = 0.3 * law.mean[..., 0]
        noise = torch.randn(n, sde.components, 1, generator=g, dtype=torch.float64)
        state = means[0, :, None] + law.root[0] @ noise
        atol = [0.01] * sde.components
        found = run(
            sde, gaussian().score(sde), state, ends(eps), noise=FreshNoise(g), rtol=0.02, atol=atol
        )
        assert found.success
        # In units of the standard deviation along each axis; 4.5 standard errors, and a part in 50
        # for tolerances of that size.
        white = torch.linalg.solve_triangular(
            law.root[1], found.state - means[1, :, None], upper=False
        )[..., 0]
        assert float(white.mean(0).abs().max()) <= 4.5 / math.sqrt(n) + 0.02
        cov = white.T @ white / n - torch.eye(sde.components, dtype=torch.float64)
        assert float(cov.abs().max()) <= 4.5 * math.sqrt(2 / n) + 0.04

    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_errors_go_with_the_tolerance(self, name: str) -> None:
        # Without noise, to which a solution to 1e-10 is known.
        sde, eps = FAMILIES[name](), 1e-2
        score, state = gaussian().score(sde), start(sde, (1, 1))

        def velocity(t: float, flat: Any) -> Any:
            z = torch.from_numpy(flat).reshape(state.shape)
            return ReverseProcess(sde, score).drift(z, t).numpy().ravel()

        expected = solve_ivp(
            velocity, (1.0, eps), state.numpy().ravel(), "DOP853", rtol=1e-11, atol=1e-11
        ).y[:, -1]
        errors, counts = [], []
        for tolerance in (1e-2, 1e-4):
            found = run(
                sde,
                score,
                state,
                ends(eps),
                noise=NoNoise(),
                rtol=tolerance,
                atol=tolerance,
                exponent=0.5,
            )
            assert found.success
            errors.append(float((found.state.flatten() - torch.from_numpy(expected)).abs().max()))
            counts.append(found.nfev)
        # The estimate is of order h^2, and so is the error of improved Euler: a hundredth. Steps
        # are ten times as many. Either by a factor of 4.
        assert errors[1] <= errors[0] / 25
        assert 2.5 <= counts[1] / counts[0] <= 40


class TestCounts:
    """What is counted, and where the score is asked."""

    @every_mode
    def test_evaluations_are_those_that_each_sample_saw(self, mode: str) -> None:
        sde = VESDE(0.05, 20.0)
        inner = exact.mixture().score(sde)

        class Marked(NoNoise):
            def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
                draw = torch.randn(len(z), rows, *z.shape[2:], generator=g, dtype=z.dtype)
                draw[..., 2] = 0
                return draw

        # The last axis stands still and holds the sample's number.
        g = generator(7)
        recorded = Recording(
            lambda z, t: torch.cat([inner(z[..., :2], t), torch.zeros_like(z[..., :1])], dim=-1)
        )
        label = torch.arange(6, dtype=torch.float64)[:, None, None]
        scale = torch.logspace(0, 2, 6, dtype=torch.float64)[:, None, None]
        state = torch.cat([start(sde, (6, 2)) * scale, label], dim=-1)
        found = run(sde, recorded, state, noise=Marked(), noise_on_reject=mode)
        seen = Counter(i for z in recorded.states for i in z[:, 0, 2].tolist())
        assert found.success
        assert found.stats["nfev"].dtype == torch.int64
        assert found.stats["nfev"].tolist() == [seen[i] for i in range(6)]
        assert found.nfev == max(seen.values()) == 2 * found.stats["attempts"]
        assert found.stats["rejections"] > 0
        assert len(set(seen.values())) > 1

    @every_family
    def test_times_lie_within_the_ends_and_both_are_met(self, name: str) -> None:
        sde = FAMILIES[name]()
        recorded = Recording(exact.mixture().score(sde))
        found = run(sde, recorded, start(sde), ends(0.013, 0.97))
        asked = torch.cat(recorded.times)
        assert found.success
        assert float(asked.max()) == 0.97
        assert float(asked.min()) == 0.013
        assert asked.dtype == torch.float64

    @may_fail
    @pytest.mark.parametrize("most", [2, 3, 7, 20])
    def test_no_sample_is_asked_more_often_than_allowed(self, most: int) -> None:
        sde = CLD()
        recorded = Recording(exact.mixture().score(sde))
        found = run(sde, recorded, start(sde), max_nfev=most)
        assert not found.success
        assert found.status == 1
        assert f"max_nfev: {most}" in found.message
        assert len(recorded.states) == found.nfev == most - most % 2
        assert found.state.isfinite().all()
        assert torch.equal(found.data, found.state[:, 0])

    @may_fail
    def test_enough_evaluations_are_enough(self) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde)
        needed = run(sde, score, state)
        again = run(sde, score, state, max_nfev=needed.nfev)
        assert again.success
        assert torch.equal(again.state, needed.state)
        assert not run(sde, score, state, max_nfev=needed.nfev - 1).success

    @every_family
    def test_a_first_step_longer_than_the_interval_is_cut(self, name: str) -> None:
        sde = FAMILIES[name]()
        recorded = Recording(exact.mixture().score(sde))
        found = run(sde, recorded, start(sde), first_step=100.0)
        assert found.success
        assert found.stats["rejections"] > 0
        assert recorded.times[1].tolist() == [0.1] * 3

    def test_a_loose_tolerance_takes_fewer_evaluations(self) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde)
        counts = [run(sde, score, state, rtol=r, atol=r).nfev for r in (0.3, 0.1, 0.03)]
        assert counts[0] < counts[1] < counts[2]


class TestSamples:
    """Each sample goes at its own pace, whatever the others do."""

    @every_mode
    @every_family
    def test_a_sample_does_not_depend_on_its_batch(self, name: str, mode: str) -> None:
        sde = FAMILIES[name]()
        score, state = exact.mixture().score(sde), start(sde)
        state[1] *= 3
        options: dict[str, Any] = {"rtol": 0.05, "noise_on_reject": mode}
        together = run(sde, score, state, noise=SampleNoise([4, 5, 6]), **options)
        alone = [
            run(sde, score, state[i : i + 1], noise=SampleNoise([4 + i]), **options)
            for i in range(3)
        ]
        found = torch.cat([one.state for one in alone])
        # Sums in batches of other sizes differ by rounding, 1e-16, which grows along the way.
        assert torch.allclose(together.state, found, rtol=1e-9, atol=1e-9)
        assert together.stats["nfev"].tolist() == [one.nfev for one in alone]
        assert len({one.nfev for one in alone}) > 1

    def test_so_it_is_in_single_precision(self) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde, dtype=torch.float32)
        together = run(sde, score, state, noise=SampleNoise([4, 5, 6]), rtol=0.05)
        for i in range(3):
            alone = run(sde, score, state[i : i + 1], noise=SampleNoise([4 + i]), rtol=0.05)
            assert torch.allclose(together.state[i], alone.state[0], rtol=1e-5, atol=1e-5)

    def test_the_order_of_samples_does_not_matter(self) -> None:
        sde, order = CLD(), [2, 0, 3, 1]
        score, state = exact.mixture().score(sde), start(sde, (4, 2))
        one = run(sde, score, state, noise=SampleNoise([0, 1, 2, 3]))
        other = run(sde, score, state[order], noise=SampleNoise(order))
        assert torch.allclose(one.state[order], other.state, rtol=1e-9, atol=1e-9)
        assert torch.equal(one.stats["nfev"][order], other.stats["nfev"])

    @every_mode
    def test_a_seed_gives_the_same_bits(self, mode: str) -> None:
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde)
        first, again, other = (
            run(sde, score, state, noise=FreshNoise(generator(s)), noise_on_reject=mode)
            for s in (1, 1, 2)
        )
        assert torch.equal(first.state, again.state)
        assert first.stats["attempts"] == again.stats["attempts"]
        assert not torch.equal(first.state, other.state)

    def test_the_state_is_not_changed_and_shapes_are_kept(self) -> None:
        sde = CLD()
        score = GaussianMixture([1.0], [[0.3, 0.3]], [torch.eye(2).tolist()]).score(sde)
        state = start(sde, (2, 1, 2))
        before = state.clone()
        found = run(sde, score, state)
        assert torch.equal(state, before)
        assert found.state.shape == (2, 2, 1, 2)
        assert found.data.shape == (2, 1, 2)
        assert torch.equal(run(sde, score, state.flatten(2)).state, found.state.flatten(2))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_data_may_be_numbers(self, dtype: torch.dtype) -> None:
        sde = VESDE(0.05, 20.0)
        state = start(sde, (5,), dtype)

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -z / (0.25 + (0.05 * 400**t) ** 2).unsqueeze(1).to(z)

        found = run(sde, score, state)
        assert found.success
        assert found.state.shape == (5, 1)
        assert found.data.shape == (5,)
        assert found.state.dtype == dtype

    @every_family
    def test_single_precision_agrees_with_double(self, name: str) -> None:
        # Not with the bridge: where the path was seen its parts move with the root of a length.
        sde = FAMILIES[name]()
        score, state = exact.mixture().score(sde), start(sde, dtype=torch.float32)
        found, expected = (
            run(sde, score, z, noise=SampleNoise([4, 5, 6]), noise_on_reject="fresh")
            for z in (state, state.double())
        )
        assert found.success
        assert found.state.dtype == found.data.dtype == torch.float32
        # Single-precision rounding, 6e-8, along some hundred steps that feel it.
        assert torch.allclose(found.state.double(), expected.state, rtol=1e-3, atol=1e-3)

    @every_family
    def test_an_empty_batch_arrives(self, name: str) -> None:
        sde = FAMILIES[name]()
        found = run(sde, untouchable, start(sde)[:0])
        assert found.success
        assert found.nfev == 0
        assert found.state.shape == (0, sde.components, 2)
        assert found.stats["nfev"].shape == (0,)


@may_fail
class TestEndings:
    """What cannot go on says so."""

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("since", [1.0, 0.5])
    @every_mode
    def test_a_score_that_is_not_finite_is_reported(
        self, mode: str, value: float, since: float
    ) -> None:
        sde = CLD()

        def sick(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.where((t <= since)[:, None, None], value, -4 * z[:, 1:])

        found = run(sde, sick, start(sde), rtol=0.1, atol=0.1, noise_on_reject=mode)
        assert not found.success
        assert "the score is not finite" in found.message
        assert found.state.isfinite().all()
        assert found.nfev < 4000

    def test_a_trial_step_out_of_the_domain_is_repeated_shorter(self) -> None:
        sde = CLD()
        inner = exact.mixture().score(sde)
        calls = [1.0, math.nan]

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return inner(z, t) * (calls.pop(0) if calls else 1.0)

        recorded = Recording(score)
        found = run(sde, recorded, start(sde))
        assert found.success
        # A fifth of the first step.
        again = 1 - ten_bits(0.2 * ten_bits(0.01))
        assert torch.allclose(
            recorded.times[3], torch.tensor(again, dtype=torch.float64), rtol=1e-14, atol=0
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tolerances_out_of_reach_end(self, dtype: torch.dtype) -> None:
        sde = CLD()
        found = run(
            sde,
            exact.mixture().score(sde),
            start(sde, dtype=dtype),
            rtol=1e-30,
            atol=1e-30,
            max_nfev=300,
        )
        assert not found.success
        assert "max_nfev" in found.message or "cannot be met" in found.message
        assert found.nfev <= 300

    def test_a_step_that_ends_just_above_the_end_is_no_underflow(self) -> None:
        # Nothing moves without noise, so steps grow fivefold from 0.01.
        sde, eps = VESDE(0.05, 20.0), torch.finfo(torch.float64).eps
        state = torch.ones(1, 1, 1, dtype=torch.float64)
        for roundings in range(-20, 21):
            times = ends(1 - 0.01 - 0.05 + roundings * eps / 2)
            assert run(sde, lambda z, t: torch.zeros_like(z), state, times, noise=NoNoise()).success

    @pytest.mark.parametrize("end", [0.0, 1e-8])
    def test_the_end_may_be_zero(self, end: float) -> None:
        sde = CLD()
        found = run(sde, lambda z, t: -4 * z[:, 1:], start(sde), ends(end), rtol=0.1, atol=0.1)
        assert found.success


class TestOptions:
    """Options that are taken and refused."""

    @every_family
    def test_a_tolerance_for_each_component(self, name: str) -> None:
        sde = FAMILIES[name]()
        score, state = exact.mixture().score(sde), start(sde)
        one = run(sde, score, state, rtol=0.1, atol=0.02)
        same = run(sde, score, state, rtol=0.1, atol=[0.02] * sde.components)
        single = run(sde, score, state, rtol=0.1, atol=(0.02,))
        assert torch.equal(one.state, same.state)
        assert torch.equal(one.state, single.state)

    def test_each_component_has_its_own(self) -> None:
        # The position alone is looked at where the velocity may be anything.
        sde = CLD()
        score, state = exact.mixture().score(sde), start(sde)
        counts = [
            run(sde, score, state, atol=atol).stats["attempts"]
            for atol in ((0.01, 0.01), (0.01, 1e6), (1e6, 1e6))
        ]
        assert counts[0] > counts[1] > counts[2]

    @pytest.mark.parametrize("count", [0, 3])
    def test_tolerances_of_another_number(self, count: int) -> None:
        with pytest.raises(ValueError, match="atol must be a number or one for each of the 2"):
            run(CLD(), untouchable, start(CLD()), atol=[0.01] * count)

    @pytest.mark.parametrize("option", ["rtol", "atol", "first_step"])
    @pytest.mark.parametrize("value", [0.0, -1e-5, math.nan, math.inf])
    def test_numbers_that_are_not_positive(self, option: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{option} must be finite and positive"):
            GottaGoFast(**{option: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_tolerances_of_components_that_are_not_positive(self, value: float) -> None:
        with pytest.raises(ValueError, match="atol must be finite and positive"):
            GottaGoFast(atol=[0.01, value])

    @pytest.mark.parametrize("option", ["safety", "exponent"])
    @pytest.mark.parametrize("value", [0.0, -0.5, 1.1, math.nan])
    def test_factors_that_are_out_of_range(self, option: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{option} must lie in"):
            GottaGoFast(**{option: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [1, 0, -3])
    def test_less_than_one_attempt(self, value: int) -> None:
        with pytest.raises(ValueError, match="max_nfev must be"):
            GottaGoFast(max_nfev=value)

    @pytest.mark.parametrize("option", ["rtol", "safety", "exponent", "first_step", "max_nfev"])
    @pytest.mark.parametrize("value", ["1", None, True])
    def test_options_that_are_no_numbers(self, option: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{option} must be a real number"):
            GottaGoFast(**{option: value})

    @pytest.mark.parametrize("value", ["0.01", True, ["a"]])
    def test_tolerances_that_are_no_numbers(self, value: Any) -> None:
        with pytest.raises(TypeError, match="atol must be a"):
            GottaGoFast(atol=value)

    @pytest.mark.parametrize("value", ["Bridge", "", None, True])
    def test_unknown_ways_after_a_rejection(self, value: Any) -> None:
        with pytest.raises(ValueError, match="noise_on_reject must be one of 'bridge', 'fresh'"):
            GottaGoFast(noise_on_reject=value)

    def test_options_without_a_name(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            GottaGoFast(0.01)  # type: ignore[misc]

    def test_solvers_are_values(self) -> None:
        one, other = GottaGoFast(atol=[0.01, 0.02]), GottaGoFast(atol=(0.01, 0.02))
        assert one == other
        assert hash(one) == hash(other)
        assert one.facts.nfe_per_step == 2
        assert one.facts.weak_order is None
        assert one.facts.ode_order is None

    @pytest.mark.parametrize("rows", [2, 3])
    def test_scores_of_another_shape(self, rows: int) -> None:
        with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 2\)"):
            run(CLD(), lambda z, t: torch.zeros(3, rows, 2), start(CLD()))
