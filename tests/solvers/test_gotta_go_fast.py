"""Gotta Go Fast: its formulas, and how it ends."""

import math

import pytest
import torch

from cldsde import CLD, ReverseProcess
from cldsde.solvers import FreshNoise, GottaGoFast, RecordedNoise, solve
from probes import Recording, generator, noting, start, tensor
from score import cases
from tolerances import rounding

RERUN = 1e-9  # rounding, 1e-16, that grows along some hundred steps whose lengths feel it


def run(sde, score, state, end=0.1, *, noise=None, **options):
    """A solve of a few dozen attempts; the defaults are stricter."""
    solver = GottaGoFast(**{"rtol": 0.1, "atol": 0.05, **options})
    times, noise = tensor([1.0, end]), FreshNoise(generator()) if noise is None else noise
    return solve(ReverseProcess(sde, score), solver, state, times, noise=noise)


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

    def __call__(self, z, t, end, *, rtol, atol, safety, exponent, first_step):
        tolerance = torch.tensor(atol, dtype=torch.float64).unsqueeze(1)
        h, before = min(ten_bits(first_step), t - end), z
        while t > end:
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


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("name", "mode"), [*((x, "bridge") for x in cases.COMMON), ("CLD", "fresh"), ("VE", "fresh")]
)
def test_a_run_is_the_published_algorithm(name, mode):
    sde = cases.COMMON[name]
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
    assert (torch.cat(recorded.times) - times).abs().max() <= RERUN
    assert (found.state[0] - expected).abs().max() <= 10 * RERUN


@pytest.mark.parametrize("mode", ["bridge", "fresh"])
def test_a_requested_time_shortens_a_step_and_changes_the_path_from_it_on(mode):
    sde, state = CLD(), start(CLD())
    solver = GottaGoFast(rtol=0.1, atol=0.05, noise_on_reject=mode)
    process = ReverseProcess(sde, cases.mixture().score(sde))

    def solved(end, *wanted):
        times, noise = tensor([1.0, end]), FreshNoise(generator())
        calls, t_eval = [], tensor([1.0, *wanted, end])
        found = solve(
            process, solver, state, times, noise=noise, t_eval=t_eval, callback=noting(calls)
        )
        assert found.success
        return found.y, calls

    found, calls = solved(0.1, 0.7123, 0.4)
    assert torch.equal(found[1], solved(0.7123)[0][-1])
    assert torch.equal(found[2], solved(0.4, 0.7123)[0][-1])
    plain, others = solved(0.1)
    assert torch.equal(plain[0], found[0])
    assert (found[3] != plain[1]).all()
    # Attempts are the same until one would pass the time; those before t = 0.8 are shorter.
    early = [i for i, (_, t, _) in enumerate(others) if (t > 0.8).all()]
    assert len(early) > 5
    assert all(torch.equal(calls[i][2], others[i][2]) for i in early)


def test_a_trial_step_out_of_the_domain_is_repeated_with_a_fifth_of_its_length():
    inner, factors = cases.mixture().score(CLD()), [1.0, math.nan]
    recorded = Recording(lambda z, t: inner(z, t) * (factors.pop(0) if factors else 1.0))
    assert run(CLD(), recorded, start(CLD()), end=0.9).success
    again = 1 - ten_bits(0.2 * ten_bits(0.01))
    assert recorded.times[3].tolist() == pytest.approx([again] * 3, rel=rounding(), abs=0)


@pytest.mark.parametrize("end", [0.0, 1e-8])
def test_the_end_may_be_zero(end):
    assert run(CLD(), lambda z, t: -4 * z[:, 1:], start(CLD()), end, atol=0.1).success
