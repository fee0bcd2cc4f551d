"""Gotta Go Fast: its Brownian path, its formulas, its distribution, and how it ends."""

import math

import pytest
import torch
from scipy.stats import kstest

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, ReverseProcess
from cldsde.solvers import FreshNoise, GottaGoFast, RecordedNoise, solve
from cldsde.solvers.gotta_go_fast import _Path
from probes import Recording, generator, start, untouchable
from score import cases

PROCESSES = {"VP": VPSDE(), "VE": VESDE(0.05, 20.0), "CLD": CLD(), "PSLD": PSLD(), "HOLD": HOLD()}
GAUSSIAN = GaussianMixture([1.0], [[0.3]], [[[0.25]]])

SUM = 1e-12  # float64 sums of some 150 numbers of size 5
RERUN = 1e-9  # rounding, 1e-16, that grows along some hundred steps whose lengths feel it

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_mode = pytest.mark.parametrize("mode", ["bridge", "fresh"])
may_fail = pytest.mark.filterwarnings("ignore:the solve failed")


def ends(eps=0.1, T=1.0):
    return torch.tensor([T, eps], dtype=torch.float64)


def run(sde, score, state, times=None, *, noise=None, **options):
    """A solve of a few dozen attempts; the defaults are stricter."""
    solver = GottaGoFast(**{"rtol": 0.1, "atol": 0.05, **options})
    times = ends() if times is None else times
    noise = FreshNoise(generator()) if noise is None else noise
    return solve(ReverseProcess(sde, score), solver, state, times, noise=noise)


def over(path, h):
    """The increment over the next h of each sample."""
    return path.increment(path.weights(h))


class TestPath:
    """The Brownian path is one path, however it is walked."""

    def test_increments_to_a_known_point_are_those_seen_before(self):
        # Times are multiples of 2^-12, so that they are exact.
        n, unit, met = 8, 2.0**-12, 0
        g = generator(1)
        path = _Path(torch.zeros(n, 1, 3, dtype=torch.float64), 2, FreshNoise(g))
        at = torch.zeros(n, dtype=torch.float64)
        walked = torch.zeros(n, 2, 3, dtype=torch.float64)
        seen = [{} for _ in range(n)]
        for _ in range(150):
            h = unit * torch.randint(1, 400, (n,), generator=g).double()
            for i in range(n):
                ahead = [p for p in seen[i] if p > at[i]]
                if ahead and torch.rand((), generator=g) < 0.5:
                    h[i] = ahead[int(torch.randint(len(ahead), (), generator=g))] - float(at[i])
            increment = over(path, h)
            for i in range(n):
                point, value = float(at[i] + h[i]), walked[i] + increment[i]
                if point in seen[i]:
                    met += 1
                    assert torch.allclose(value, seen[i][point], rtol=0, atol=SUM)
                seen[i][point] = value
            accept = torch.rand(n, generator=g) < 0.4
            walked = torch.where(accept[:, None, None], walked + increment, walked)
            at = torch.where(accept, at + h, at)
            path.settle(accept, keep_rejected=True)
            # Two pieces per attempt; a piece lasts as long as rejections in a row do, 0.6^k.
            assert path._pieces.shape[1] == path._lengths.shape[1] <= 40
        assert met > 100

    def test_parts_sum_to_the_rejected_increment(self):
        # Lengths differ between samples and are not exact here.
        g = generator(2)
        path = _Path(torch.zeros(5, 2, 2, dtype=torch.float64), 1, FreshNoise(g))
        whole = torch.rand(5, generator=g, dtype=torch.float64) + 0.1
        shares = torch.rand(5, 7, generator=g, dtype=torch.float64)
        rejected = over(path, whole)
        path.settle(torch.zeros(5, dtype=torch.bool), keep_rejected=True)
        total = torch.zeros_like(rejected)
        for share in (shares / shares.sum(1, keepdim=True)).T:
            total += over(path, share * whole)
            path.settle(torch.ones(5, dtype=torch.bool), keep_rejected=True)
        # Lengths sum to the whole but for roundings of 1e-15; the path moves by their root.
        assert torch.allclose(total, rejected, rtol=0, atol=5 * math.sqrt(1e-15))

    def test_increments_are_independent_normals_whatever_is_rejected(self):
        # Over four quarters, walked by samples that reject steps with large noise.
        n, g = 3000, generator(3)
        path = _Path(torch.zeros(n, 1, dtype=torch.float64), 2, FreshNoise(g))
        at = torch.zeros(n, dtype=torch.float64)
        cells = torch.zeros(n, 4, 2, dtype=torch.float64)
        alive = torch.arange(n)
        while len(alive):
            exponent = torch.randint(0, 6, (len(alive),), generator=g)
            h = 2.0 ** -exponent.double()
            increment = over(path, h)
            cell = (4 * at).floor()
            small = (increment.abs().amax(1) < 0.8 * h.sqrt()) | (exponent == 5)
            accept = (at + h <= (cell + 1) / 4) & small
            cells[alive, cell.long()] += increment * accept.unsqueeze(1)
            at = torch.where(accept, at + h, at)
            path.settle(accept, keep_rejected=True)
            stays = at < 1
            alive, at = alive[stays], at[stays]
            path.keep(stays.nonzero().flatten())
            path.on_device = [x[stays] for x in path.on_device]
        increments, eye = 2 * cells.flatten(1), torch.eye(8, dtype=torch.float64)
        # 4.5 standard errors: covariances 1/sqrt(n), variances sqrt(2) of that, means 1/sqrt(n).
        most = 4.5 / math.sqrt(n)
        assert ((increments.T @ increments / n - eye).abs() <= most * (1 + 0.42 * eye)).all()
        assert increments.mean(0).abs().max() <= most
        assert min(kstest(column, "norm").pvalue for column in increments.T.numpy()) > 1e-4
        # Squares are uncorrelated, too: the size of an increment does not depend on the others.
        squares = (increments.square() - 1) / math.sqrt(2)
        assert (squares.T @ squares / n)[~eye.bool()].abs().max() <= most


def ten_bits(h):
    """The step length that the solver takes for h: rounded down to ten bits."""
    mantissa, exponent = math.frexp(h)
    return math.ldexp(math.floor(mantissa * 1024) / 1024, exponent)


class Reference:
    """The method for one sample, with lists, in the letters of the paper."""

    def __init__(self, sde, score, mode, draws):
        self.sde, self.score, self.mode, self.draws = sde, score, mode, iter(draws)
        self.future, self.errors, self.times = [], [], []

    def increment(self, h):
        fresh, bridge = next(self.draws)[0], next(self.draws)[0]
        pieces, left = [], h
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

    def slope(self, z, t):
        F, G = self.sde.drift(t), self.sde.diffusion(t)
        s = torch.zeros_like(z)
        s[list(self.sde.driven)] = self.score(z[None], torch.tensor([t], dtype=torch.float64))[0]
        return G @ G.T @ s - F @ z

    def __call__(
        self, z, t, end, *, rtol, atol, safety=0.9, exponent=0.9, first_step=0.01, most=10**5
    ):
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
            else:
                self.future = pieces + self.future if self.mode == "bridge" else []
            factor = min(5.0, max(0.2, safety * max(error, 1e-10) ** -exponent))
            h = min(t - end, ten_bits(h * factor))
        return z


class TestFormulas:
    @every_mode
    @every_process
    def test_a_run_is_the_published_algorithm(self, name, mode):
        sde = PROCESSES[name]
        score, z = cases.mixture().score(sde), start(sde, (1, 2))
        shape = (4000, 1, sde.diffusion(0.5).shape[-1], 2)
        draws = list(torch.randn(shape, generator=generator(2), dtype=torch.float64))
        options = {"safety": 0.8, "exponent": 0.7, "rtol": 0.1, "first_step": 0.02}
        options["atol"] = [0.05 * (1 + i) for i in range(sde.components)]
        reference = Reference(sde, score, mode, draws)
        expected = reference(z[0], 1.0, 0.1, **options)
        recorded = Recording(score)
        found = run(sde, recorded, z, noise=RecordedNoise(draws), noise_on_reject=mode, **options)
        assert found.success
        assert found.stats["attempts"] == len(reference.errors)
        assert found.stats["rejections"] == sum(e > 1 for e in reference.errors) > 0
        times = torch.tensor(reference.times, dtype=torch.float64)
        assert torch.allclose(torch.cat(recorded.times), times, rtol=0, atol=RERUN)
        assert torch.allclose(found.state[0], expected, rtol=0, atol=10 * RERUN)

    @may_fail
    @pytest.mark.parametrize("name", ["CLD", "VP"])
    def test_a_step_is_accepted_if_the_error_is_at_most_one(self, name):
        sde = PROCESSES[name]
        z, score = start(sde, (1, 2)), cases.mixture().score(sde)
        W = list(torch.randn(2, 1, 1, 2, generator=generator(3), dtype=torch.float64))
        options = {"rtol": 1e-200, "first_step": 0.05}
        probe = Reference(sde, score, "bridge", W)
        probe(z[0], 1.0, 0.9, atol=[1.0] * sde.components, most=2, **options)
        for factor, rejections in ((1 - 1e-9, 1), (1 + 1e-9, 0)):
            # The error falls as 1/atol, and this atol times it gives 1.
            options |= {"atol": probe.errors[0] * factor, "max_nfev": 2}
            found = run(sde, score, z, ends(0.9), noise=RecordedNoise(W), **options)
            assert found.stats["rejections"] == rejections
            assert torch.equal(found.state, z) == rejections


class TestDistribution:
    """Samples have their distribution, within what steps of such a length allow."""

    @staticmethod
    def size(mode, rtol, atol, n, seed=1):
        """E|x| at t = 1e-3, in units of the exact value, and its standard error."""
        sde, v, eps = VPSDE(), 0.05**2, 1e-3
        data = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[v]], [[v]]])
        g = generator(seed)
        state = sde.prior.sample((n, 1), generator=g, dtype=torch.float32)
        options = {"rtol": rtol, "atol": atol, "noise_on_reject": mode}
        found = run(sde, data.score(sde), state, ends(eps), noise=FreshNoise(g), **options)
        assert found.success
        # Modes lie 20 standard deviations from zero: E|x| is the mean of one.
        x = found.state.double().abs() / float(sde.marginal(eps).mean)
        return float(x.mean()), float(x.std()) / math.sqrt(n)

    def test_the_bridge_leaves_modes_in_place_and_fresh_noise_moves_them(self):
        mean, error = self.size("bridge", 0.05, 0.01, 5000)
        # A bias of 5e-4 for steps of this length, measured with a tolerance a fifth of this; below.
        assert abs(mean - 1) <= 4 * error + 5e-4
        mean, error = self.size("fresh", 0.05, 0.01, 5000)
        assert 0.007 < mean - 1 < 0.02
        assert mean - 1 > 10 * error

    @pytest.mark.slow
    def test_the_bridge_s_bias_falls_with_the_tolerance_and_that_of_fresh_noise_does_not(self):
        coarse, one = self.size("bridge", 0.05, 0.01, 200_000)
        fine, other = self.size("bridge", 0.01, 0.002, 200_000, seed=2)
        assert abs(fine - 1) <= 4 * other + 1e-4
        assert abs(coarse - fine) <= 4 * math.hypot(one, other) + 5e-4
        fresh, error = self.size("fresh", 0.01, 0.002, 200_000)
        assert fresh - 1 > 0.01 > 20 * error


class TestEnds:
    def test_a_trial_step_out_of_the_domain_is_repeated_with_a_fifth_of_its_length(self):
        inner, factors = cases.mixture().score(CLD()), [1.0, math.nan]
        recorded = Recording(lambda z, t: inner(z, t) * (factors.pop(0) if factors else 1.0))
        assert run(CLD(), recorded, start(CLD())).success
        again = 1 - ten_bits(0.2 * ten_bits(0.01))
        assert recorded.times[3].tolist() == pytest.approx([again] * 3, rel=1e-14)

    @pytest.mark.parametrize("end", [0.0, 1e-8])
    def test_the_end_may_be_zero(self, end):
        assert run(CLD(), lambda z, t: -4 * z[:, 1:], start(CLD()), ends(end), atol=0.1).success


REJECTED = [
    *[({k: 0.0}, f"{k} must be finite and positive") for k in ("rtol", "atol", "first_step")],
    *[({"atol": [0.01, x]}, "atol must be finite and positive") for x in (0.0, math.nan)],
    *[({k: x}, f"{k} must lie in") for k in ("safety", "exponent") for x in (0.0, 1.1)],
    ({"max_nfev": 1}, "max_nfev must be finite and at least 2"),
    *[({k: "1"}, f"{k} must be a real") for k in ("rtol", "safety", "exponent", "first_step")],
    ({"max_nfev": None}, "max_nfev must be a real number"),
    *[({"atol": x}, "atol must be a") for x in ("0.01", None, True, ["a"])],
    *[({"noise_on_reject": x}, "must be one of 'bridge', 'fresh'") for x in ("Bridge", None)],
]


class TestOptions:
    @pytest.mark.parametrize(("options", "message"), REJECTED, ids=str)
    def test_bad_options_are_rejected(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            GottaGoFast(**options)

    @pytest.mark.parametrize("count", [0, 3])
    def test_tolerances_for_another_number_of_components_are_rejected(self, count):
        with pytest.raises(ValueError, match="atol must be a number or one for each of the 2"):
            run(CLD(), untouchable, start(CLD()), atol=[0.01] * count)

    def test_sequences_of_tolerances_are_values(self):
        one, other = GottaGoFast(atol=[0.01, 0.02]), GottaGoFast(atol=(0.01, 0.02))
        assert one == other
        assert hash(one) == hash(other)

    def test_it_declares_two_evaluations_per_attempt_and_no_order(self):
        facts = GottaGoFast().facts
        assert facts.nfe_per_step == 2
        assert facts.weak_order is facts.strong_order is facts.ode_order is None
