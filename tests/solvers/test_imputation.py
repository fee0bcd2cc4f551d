"""Imputation: known data come back, what they say nothing about stays, and what the rest is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, HOLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess, solvers
from cldsde.images.sample.observed import grey_basis
from cldsde.linear.blocks import apply_blocks
from cldsde.solvers import Imputation
from cldsde.solvers.authoring import Solver
from probes import generator, no_waiting

FAMILIES: dict[str, Any] = {"VP": VPSDE, "VE": lambda: VESDE(0.05, 20.0), "CLD": CLD, "HOLD": HOLD}
# Solvers with the normals a step that they draw.
SOLVERS: dict[str, tuple[Solver, int]] = {
    "EM": (solvers.EulerMaruyama(), 1),
    "SSCS": (solvers.SSCS(), 2),
    "Heun": (solvers.StochasticHeun(), 1),
    "multistep": (solvers.ExponentialMultistep(order=2, stochasticity=1.0), 1),
    "multistep flow": (solvers.ExponentialMultistep(order=2), 0),
}
TO_ZERO = ["EM", "SSCS", "Heun"]  # whose grids may end at t = 0
# SSCS needs a stationary law, which VE has not.
PAIRS = [(f, s) for f in FAMILIES for s in SOLVERS if (f, s) != ("VE", "SSCS")]
GRID = solvers.quadratic_times(1.0, 1e-2, 6)
IMAGE = (3, 2, 4)
KNOWN = torch.randn(IMAGE, generator=generator(1), dtype=torch.float64)
MASK = torch.rand(IMAGE, generator=generator(2)) < 0.5
FIRST = torch.tensor([True, False])
GREY = torch.tensor([True, False, False])[:, None, None]

every_solver = pytest.mark.parametrize("name", list(SOLVERS))


def independent(sde: LinearSDE) -> Any:
    """Score of independent pixels N(0.3, 0.25): what one of them is has no part in the others."""
    law = GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde)

    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pixels = z.flatten(2).transpose(1, 2)
        each = law(pixels.reshape(-1, z.shape[1], 1), t[:1].expand(pixels[..., 0].numel()))
        return each.reshape(*pixels.shape[:2], -1).transpose(1, 2).reshape(len(z), -1, *z.shape[2:])

    return score


def correlated(sde: LinearSDE) -> Any:
    """Score of two pixels N(0, 0.25) of correlation 0.8."""
    law = GaussianMixture([1.0], [[0.0, 0.0]], [[[0.25, 0.2], [0.2, 0.25]]]).score(sde)
    return lambda z, t: law(z.flatten(2), t).reshape(len(z), -1, *z.shape[2:])


def prior(sde: LinearSDE, batch: int = 2, shape: Any = IMAGE) -> torch.Tensor:
    return sde.prior.sample((batch, *shape), generator=generator(3), dtype=torch.float64)


class Recorded(solvers.NoiseSource):
    """Fresh normals, remembered."""

    def __init__(self) -> None:
        self.source, self.draws = solvers.FreshNoise(generator(4)), []

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        self.draws.append(self.source.normal(z, rows))
        return self.draws[-1]


class Nothing(solvers.NoiseSource):
    """Zeros: where all is linear the state is its mean."""

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        return z.new_zeros(len(z), rows, *z.shape[2:])


class TestKnownPart:
    """What is known."""

    @pytest.mark.parametrize(("family", "name"), PAIRS)
    def test_it_is_drawn_from_its_law_given_the_data(self, family, name):
        sde, noise = FAMILIES[family](), Recorded()
        process = ReverseProcess(sde, independent(sde))
        solver, _ = SOLVERS[name]
        imputation = Imputation(solver, KNOWN, MASK)
        state = solvers.solve(process, imputation, prior(sde), GRID, noise=noise).state
        law, z0 = sde.marginal(GRID[-1]), torch.zeros_like(state)
        z0[:, 0] = KNOWN
        drawn = apply_blocks(law.mean, z0) + apply_blocks(law.root, noise.draws[-1])
        # Rounding of sums of a few numbers of order the noise of VE, 20.
        torch.testing.assert_close(state[..., MASK], drawn[..., MASK], rtol=0, atol=1e-13)

    @pytest.mark.parametrize("name", TO_ZERO)
    def test_it_comes_back_exactly_where_the_grid_ends_at_the_data(self, name):
        sde = CLD()
        process, grid = ReverseProcess(sde, independent(sde)), solvers.uniform_times(1.0, 0.0, 5)
        imputation = Imputation(SOLVERS[name][0], KNOWN, MASK)
        solution = solvers.solve(process, imputation, prior(sde), grid, generator=generator())
        assert torch.equal(solution.data[:, MASK], KNOWN[MASK].expand(2, -1))
        assert not torch.equal(solution.data[:, ~MASK], KNOWN[~MASK].expand(2, -1))

    def test_all_of_an_image_may_be_known(self):
        sde = CLD()
        process, grid = ReverseProcess(sde, independent(sde)), solvers.uniform_times(1.0, 0.0, 5)
        imputation = Imputation(solvers.SSCS(), KNOWN, torch.tensor(True))
        data = solvers.solve(process, imputation, prior(sde), grid, generator=generator()).data
        assert torch.equal(data, KNOWN.expand(2, *IMAGE))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_impose_puts_it_in_place_and_leaves_the_rest(self, dtype):
        data = torch.randn(2, *IMAGE, dtype=dtype)
        imposed = Imputation(solvers.SSCS(), KNOWN, MASK).impose(data)
        assert torch.equal(imposed[:, MASK], KNOWN[MASK].to(dtype).expand(2, -1))
        assert torch.equal(imposed[:, ~MASK], data[:, ~MASK])

    def test_the_start_is_replaced_before_the_score_sees_it(self):
        sde, seen = CLD(), []
        score = independent(sde)
        process = ReverseProcess(sde, lambda z, t: seen.append(z.clone()) or score(z, t))
        noise, start = Recorded(), prior(sde)
        imputation = Imputation(solvers.EulerMaruyama(), KNOWN, MASK)
        solvers.solve(process, imputation, start, GRID, noise=noise)
        law, z0 = sde.marginal(1.0), torch.zeros_like(start)
        z0[:, 0] = KNOWN
        drawn = apply_blocks(law.mean, z0) + apply_blocks(law.root, noise.draws[0])
        # Rounding of sums of two numbers of order 1.
        torch.testing.assert_close(seen[0][..., MASK], drawn[..., MASK], rtol=0, atol=1e-14)
        assert torch.equal(seen[0][..., ~MASK], start[..., ~MASK])

    def test_each_sample_may_have_its_own(self):
        sde, known = CLD(), torch.stack([KNOWN, -KNOWN])
        process, grid = ReverseProcess(sde, independent(sde)), solvers.uniform_times(1.0, 0.0, 5)
        imputation = Imputation(solvers.SSCS(), known, MASK)
        data = solvers.solve(process, imputation, prior(sde), grid, generator=generator()).data
        assert torch.equal(data[:, MASK], known[:, MASK])


class TestRest:
    """What is unknown."""

    @pytest.mark.parametrize(("family", "name"), PAIRS)
    def test_what_the_known_part_says_nothing_about_has_the_solver_s_bits(self, family, name):
        sde = FAMILIES[family]()
        process, noise = ReverseProcess(sde, independent(sde)), Recorded()
        solver, per_step = SOLVERS[name]
        imputation = Imputation(solver, KNOWN, MASK)
        got = solvers.solve(process, imputation, prior(sde), GRID, noise=noise, denoise=True)
        # Drawn in turn: for the start, then for each step and what replaces after it.
        own = [draw for i, draw in enumerate(noise.draws[1:]) if i % (per_step + 1) < per_step]
        assert len(noise.draws) == 1 + (per_step + 1) * (len(GRID) - 1)
        alone = solvers.solve(
            process,
            solver.on_grid(),
            prior(sde),
            GRID,
            noise=solvers.RecordedNoise(own),
            denoise=True,
        )
        assert torch.equal(got.data[:, ~MASK], alone.data[:, ~MASK])
        assert torch.equal(got.state[..., ~MASK], alone.state[..., ~MASK])
        assert got.nfev == alone.nfev

    @pytest.mark.parametrize("basis", [None, grey_basis()])
    @every_solver
    def test_where_nothing_is_known_the_samples_are_the_solver_s(self, name, basis):
        sde = CLD()
        process = ReverseProcess(sde, independent(sde))
        solver, _ = SOLVERS[name]
        imputation = Imputation(solver, KNOWN, torch.tensor(False), basis)
        got, wanted = (
            solvers.solve(process, s, prior(sde), GRID, generator=generator()).state
            for s in (imputation, solver.on_grid())
        )
        assert torch.equal(got, wanted)

    @pytest.mark.parametrize("resample", [1, 3])
    def test_a_sample_does_not_depend_on_its_batch(self, resample):
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:])
        known = torch.randn(3, *IMAGE, generator=generator(5))

        def images(seeds: list[int]) -> torch.Tensor:
            noise = solvers.SampleNoise(seeds)
            imputation = Imputation(
                solvers.SSCS(), known[seeds], GREY, grey_basis(), resample=resample, jump=2
            )
            start = noise.start(sde, IMAGE)
            return solvers.solve(process, imputation, start, GRID, noise=noise).data

        assert torch.equal(images([0, 1, 2])[[1]], images([1]))

    # Not Euler–Maruyama for CLD, whose terms of first and second order nearly cancel.
    @pytest.mark.parametrize(
        ("family", "solver"),
        [
            ("VP", solvers.EulerMaruyama()),
            ("VP", solvers.SSCS()),
            ("CLD", solvers.SSCS()),
        ],
        ids=["VP-EM", "VP-SSCS", "CLD-SSCS"],
    )
    def test_the_mean_of_what_is_correlated_goes_to_that_of_infinitely_many_steps(
        self, family, solver
    ):
        # In the limit the known part's mean is always ψ_t x, and that of the rest follows the
        # reverse drift. Noise is zero: what is compared are means.
        sde, x = FAMILIES[family](), 0.7
        process, end = ReverseProcess(sde, correlated(sde)), 1e-3

        def with_known(state: torch.Tensor, t: float) -> torch.Tensor:
            z = state.clone()
            z[..., 0] = sde.marginal(t).mean[:, 0, None, None] * x
            return z

        def slope(t: float, y: Any) -> Any:
            z = with_known(torch.from_numpy(y).reshape(1, -1, 1, 1, 2), t)
            return process.drift(z, t).flatten().numpy()

        y = torch.zeros(2 * sde.components, dtype=torch.float64).numpy()
        limit = solve_ivp(slope, (1.0, end), y, rtol=1e-6, atol=1e-8).y[1, -1]

        imputation = Imputation(solver, torch.tensor([[[x, 0.0]]]).double(), FIRST)
        start, errors = torch.zeros(1, sde.components, 1, 1, 2, dtype=torch.float64), []
        for steps in (60, 120):
            grid = solvers.quadratic_times(1.0, end, steps)
            data = solvers.solve(process, imputation, start, grid, noise=Nothing()).data
            errors.append(abs(data[0, 0, 0, 1].item() - limit))
        # Of first order: twice the steps, half the error, to a term of second order that is a
        # fifth of it at most here.
        assert errors[1] < 0.6 * errors[0]
        assert errors[1] < 0.01 * x
        # And that is not the conditional mean, 0.8 x.
        assert 0.6 < limit / (0.8 * x) < 0.65

    @pytest.mark.parametrize(
        ("family", "resample", "jump", "within"),
        # Computed without noise, hence exactly: 0.94 and 0.97 of the way.
        [("VP", 10, 1, 0.1), ("CLD", 20, 5, 0.1)],
    )
    def test_repeated_steps_bring_the_mean_near_the_conditional_one(
        self, family, resample, jump, within
    ):
        sde, x = FAMILIES[family](), 0.7
        process = ReverseProcess(sde, correlated(sde))
        start = torch.zeros(1, sde.components, 1, 1, 2, dtype=torch.float64)
        grid, known = solvers.quadratic_times(1.0, 1e-3, 25), torch.tensor([[[x, 0.0]]]).double()

        def mean(resample: int) -> float:
            imputation = Imputation(solvers.SSCS(), known, FIRST, resample=resample, jump=jump)
            solution = solvers.solve(process, imputation, start, grid, noise=Nothing())
            assert solution.nfev == 25 * resample
            return float(solution.data[0, 0, 0, 1])

        once, often = (abs(mean(r) / (0.8 * x) - 1) for r in (1, resample))
        assert often < within
        assert often < 0.3 * once

    def test_repetitions_leave_the_variance_of_the_conditional_law(self):
        sde, x, n = VPSDE(), 0.7, 4000
        process = ReverseProcess(sde, correlated(sde))
        imputation = Imputation(
            solvers.SSCS(), torch.tensor([[[x, 0.0]]]).double(), FIRST, resample=10, jump=1
        )
        grid = solvers.quadratic_times(1.0, 1e-3, 50)
        start = prior(sde, n, (1, 1, 2))
        data = solvers.solve(process, imputation, start, grid, generator=generator()).data[..., 1]
        variance = 0.25 * (1 - 0.8**2)
        # Computed exactly: 1.046 of it and 0.952 of the mean; four standard errors of n samples.
        assert data.var().item() / variance == pytest.approx(
            1.046, abs=4 * 1.046 * math.sqrt(2 / n)
        )
        error = 4 * math.sqrt(1.046 * variance / n)
        assert data.mean().item() == pytest.approx(0.952 * 0.8 * x, abs=error)


class TestBasis:
    """What is known in a basis of the channels."""

    def test_the_grey_basis_is_orthonormal_and_starts_with_grey(self):
        basis = grey_basis()
        eye = torch.eye(3, dtype=torch.float64)
        # Rounding of products of three numbers below 1.
        torch.testing.assert_close(basis @ basis.mT, eye, rtol=0, atol=1e-15)
        torch.testing.assert_close(basis[0], torch.full((3,), 3**-0.5).double())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", TO_ZERO)
    def test_a_known_grey_is_kept(self, name, dtype):
        sde = CLD()
        process, grid = ReverseProcess(sde, independent(sde)), solvers.uniform_times(1.0, 0.0, 5)
        imputation = Imputation(SOLVERS[name][0], KNOWN, GREY, grey_basis())
        start = prior(sde).to(dtype)
        data = solvers.solve(process, imputation, start, grid, generator=generator()).data
        eps = torch.finfo(dtype).eps
        # Rounding in units of the state's size, over a dozen operations.
        wanted = KNOWN.mean(0).to(dtype).expand(2, -1, -1)
        torch.testing.assert_close(data.mean(1), wanted, rtol=0, atol=12 * eps * data.abs().max())
        assert (data - KNOWN.to(dtype)).abs().max() > 0.1

    def test_impose_changes_the_known_coordinates_alone(self):
        data, basis = torch.randn(2, *IMAGE, dtype=torch.float64), grey_basis()
        imposed = Imputation(solvers.SSCS(), KNOWN, GREY, basis).impose(data)
        before, after, known = (
            torch.einsum("ij,...jhw->...ihw", basis, x) for x in (data, imposed, KNOWN)
        )
        # Rounding of sums of three numbers of order 1.
        torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=4e-15)
        torch.testing.assert_close(after[:, 0], known[0].expand(2, -1, -1), rtol=0, atol=4e-15)

    def test_only_the_grey_of_the_known_image_is_looked_at(self):
        sde = CLD()
        process = ReverseProcess(sde, independent(sde))
        grey = KNOWN.mean(0, keepdim=True).expand(IMAGE)
        first, second = (
            solvers.solve(
                process,
                Imputation(solvers.SSCS(), known, GREY, grey_basis()),
                prior(sde),
                GRID,
                generator=generator(),
            ).data
            for known in (KNOWN, grey)
        )
        # Rounding, carried along by a few contracting steps.
        torch.testing.assert_close(first, second, rtol=0, atol=1e-13)

    @every_solver
    def test_colours_that_the_grey_says_nothing_about_are_the_solver_s(self, name):
        # Independent Gaussian channels of one variance are independent in each basis.
        sde, noise = CLD(), Recorded()
        process, (solver, per_step) = ReverseProcess(sde, independent(sde)), SOLVERS[name]
        imputation = Imputation(solver, KNOWN, GREY, grey_basis())
        got = solvers.solve(process, imputation, prior(sde), GRID, noise=noise).data
        own = [draw for i, draw in enumerate(noise.draws[1:]) if i % (per_step + 1) < per_step]
        alone = solvers.solve(
            process, solver.on_grid(), prior(sde), GRID, noise=solvers.RecordedNoise(own)
        ).data
        colours = grey_basis()[1:]
        # Rounding, carried along by a few steps.
        torch.testing.assert_close(
            torch.einsum("ij,bjhw->bihw", colours, got),
            torch.einsum("ij,bjhw->bihw", colours, alone),
            rtol=0,
            atol=1e-12,
        )


class TestSolver:
    """It is a solver like any other."""

    def test_its_repr_is_one_line_of_facts(self):
        imputation = Imputation(solvers.EulerMaruyama(), KNOWN, GREY, grey_basis())
        assert repr(imputation) == (
            "Imputation(solver=EulerMaruyama(), known=(3, 2, 4), mask=(3, 1, 1), basis=(3, 3), "
            "resample=1, jump=10)"
        )

    def test_it_claims_no_order(self):
        facts = Imputation(solvers.StochasticHeun(), KNOWN, MASK).facts
        assert (facts.weak_order, facts.strong_order, facts.ode_order) == (None, None, None)
        assert facts.state_on_grid
        assert facts.nfe_per_step == 2
        assert Imputation(solvers.SSCS(), KNOWN, MASK, resample=3).facts.nfe_per_step == 3

    @pytest.mark.parametrize("jump", [1, 2, 4, 10])
    @pytest.mark.parametrize("resample", [1, 2, 3])
    @pytest.mark.parametrize("solver", [solvers.SSCS(), solvers.StochasticHeun()], ids=repr)
    def test_the_score_is_asked_when_it_says(self, solver, resample, jump):
        sde, asked = CLD(), []
        score = independent(sde)
        process = ReverseProcess(sde, lambda z, t: asked.append(t[0].item()) or score(z, t))
        imputation = Imputation(solver, KNOWN, MASK, resample=resample, jump=jump)
        solution = solvers.solve(process, imputation, prior(sde), GRID, generator=generator())
        assert asked == imputation.evaluation_times(process, GRID).tolist()
        assert solution.nfev == imputation.facts.nfe_per_step * (len(GRID) - 1)
        alone = solver.on_grid().evaluation_times(process, GRID).tolist()
        if jump == 10 or resample == 1:
            assert asked == alone * resample
        assert sorted(set(asked)) == sorted(set(alone))

    def test_the_way_back_is_that_of_the_forward_process(self):
        # Nothing known, nothing asked: the solver stays where it is.
        sde, noise = CLD(), Recorded()
        process = ReverseProcess(sde, independent(sde))
        inner = solvers.EulerMaruyama()
        imputation = Imputation(inner, KNOWN, torch.tensor(False), resample=2, jump=6)
        got = solvers.solve(process, imputation, prior(sde), GRID, noise=noise).state
        assert len(noise.draws) == 13
        there = solvers.solve(
            process, inner, prior(sde), GRID, noise=solvers.RecordedNoise(noise.draws[:6])
        ).state
        back = sde.transition(GRID[-1], GRID[0])
        start = apply_blocks(back.mean, there) + apply_blocks(back.root, noise.draws[6])
        again = solvers.solve(
            process, inner, start, GRID, noise=solvers.RecordedNoise(noise.draws[7:])
        ).state
        # Rounding of two ways to the same sums, carried along by six steps.
        torch.testing.assert_close(got, again, rtol=1e-12, atol=1e-12)

    def test_a_callback_sees_known_data_replaced(self):
        sde, states = CLD(), []
        process = ReverseProcess(sde, independent(sde))
        imputation, noise = Imputation(solvers.SSCS(), KNOWN, MASK), Recorded()
        solvers.solve(
            process,
            imputation,
            prior(sde),
            GRID,
            noise=noise,
            callback=lambda step, t, z: states.append(z.clone()),
        )
        for step, state in enumerate(states, start=1):
            law, z0 = sde.marginal(GRID[step]), torch.zeros_like(state)
            z0[:, 0] = KNOWN
            drawn = apply_blocks(law.mean, z0) + apply_blocks(law.root, noise.draws[3 * step])
            # Rounding of sums of two numbers of order 1.
            torch.testing.assert_close(state[..., MASK], drawn[..., MASK], rtol=0, atol=1e-14)

    @pytest.mark.parametrize("basis", [None, grey_basis()])
    def test_a_step_waits_for_no_value(self, basis, monkeypatch):
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:])
        imputation = Imputation(solvers.SSCS(), KNOWN, GREY, basis, resample=2, jump=1)
        tables, z = imputation.prepare(process, GRID), prior(sde)
        with no_waiting(monkeypatch), torch.no_grad():
            for i in range(2):
                z, _ = imputation.step(
                    z, (), tables, i, lambda z, j: -z[:, 1:], solvers.FreshNoise(generator())
                )

    def test_gradients_pass_through(self):
        sde, shift = VPSDE(), torch.zeros((), dtype=torch.float64, requires_grad=True)
        process = ReverseProcess(sde, lambda z, t: shift - z)
        data = solvers.solve(
            process,
            Imputation(solvers.EulerMaruyama(), KNOWN, GREY, grey_basis()),
            prior(sde),
            GRID,
            generator=generator(),
            differentiable=True,
        ).data
        data.square().sum().backward()
        assert shift.grad is not None
        assert shift.grad.isfinite()

    def test_a_path_of_brownian_motion_is_refused(self):
        sde = VPSDE()
        process = ReverseProcess(sde, independent(sde))
        path = solvers.BrownianPath(sde, GRID, (2, *IMAGE), generator=generator())
        with pytest.raises(ValueError, match="does not draw increments or integrals"):
            solvers.solve(
                process,
                Imputation(solvers.EulerMaruyama(), KNOWN, MASK),
                prior(sde),
                GRID,
                noise=path,
            )


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 2, 2, 2)])
def test_data_of_any_shape_are_imputed(shape):
    """A mask per sample, and known data per sample, for vectors, tables and volumes."""
    sde = CLD()
    process = ReverseProcess(sde, independent(sde))
    known = torch.randn(2, *shape, generator=generator(4), dtype=torch.float64)
    mask = torch.rand(2, *shape, generator=generator(5)) < 0.5
    imputation = Imputation(solvers.SSCS(), known, mask)
    start = prior(sde, 2, shape)
    solution = solvers.solve(process, imputation, start, GRID, generator=generator(0))
    found = imputation.impose(solution.data)
    assert torch.equal(found[mask], known[mask])
    assert torch.equal(found[~mask], solution.data[~mask])
    # The kernel at the end: mean ψx and standard deviation L_00, of all that is known.
    law = sde.marginal(GRID[-1])
    off = (solution.data - law.mean[0, 0] * known)[mask] / law.root[0, 0]
    assert off.abs().max() < 5  # at most 16 standard normals


class TestRefusals:
    """What does not fit together is refused before anything is sampled."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"solver": solvers.GottaGoFast()}, ValueError, "must have a state at each grid time"),
            ({"solver": solvers.SSCS}, TypeError, "write it with parentheses"),
            (
                {"solver": solvers.ExponentialMultistep(order=2, corrector=True)},
                ValueError,
                "solver must have a state at each grid time",
            ),
            ({"known": KNOWN.tolist()}, TypeError, "known must be a floating-point tensor"),
            ({"known": MASK}, TypeError, "known must be a floating-point tensor; got torch.bool"),
            ({"known": KNOWN[0, 0, 0]}, ValueError, r"known must have shape \(\*D\) or"),
            ({"known": KNOWN * math.nan}, ValueError, "known must be finite"),
            ({"known": KNOWN / 0}, ValueError, "known must be finite"),
            ({"mask": MASK.double()}, TypeError, "mask must be a boolean tensor.*float64"),
            ({"mask": True}, TypeError, "mask must be a boolean tensor.*bool"),
            ({"mask": MASK[:2]}, ValueError, r"mask must broadcast with known, \(3, 2, 4\)"),
            ({"mask": MASK[None]}, ValueError, r"mask must broadcast with known, \(3, 2, 4\)"),
            ({"basis": [[1.0]]}, TypeError, "basis must be a floating-point tensor"),
            ({"basis": torch.eye(4)}, ValueError, r"basis must be \(C, C\).*got \(4, 4\)"),
            ({"basis": 1.001 * torch.eye(3)}, ValueError, "basis must be orthonormal.*0.002"),
            ({"basis": torch.eye(3) * math.nan}, ValueError, "basis must be orthonormal"),
            ({"resample": 0}, ValueError, "resample must be at least 1; got 0"),
            ({"resample": 1.5}, TypeError, "resample must be an integer; got 1.5"),
            ({"jump": 0}, ValueError, "jump must be at least 1; got 0"),
        ],
    )
    def test_an_argument_that_does_not_fit_is_refused(self, change, error, message):
        arguments = {"solver": solvers.SSCS(), "known": KNOWN, "mask": MASK, **change}
        with pytest.raises(error, match=message):
            Imputation(**arguments)

    def test_a_basis_in_single_precision_is_one(self):
        Imputation(solvers.SSCS(), KNOWN, GREY, grey_basis().float())

    @pytest.mark.parametrize(
        ("known", "shape"),
        [(KNOWN, (3, 4, 2)), (KNOWN.expand(3, *IMAGE), IMAGE), (KNOWN[None], IMAGE)],
    )
    def test_a_state_of_other_images_is_refused(self, known, shape):
        sde = CLD()
        process = ReverseProcess(sde, independent(sde))
        imputation = Imputation(solvers.SSCS(), known, torch.tensor(True))
        with pytest.raises(ValueError, match="state must hold data of the shape of known"):
            solvers.solve(process, imputation, prior(sde, 2, shape), GRID)
        with pytest.raises(ValueError, match="data must hold data of the shape of known"):
            imputation.impose(torch.zeros(2, *shape))

    def test_steps_that_remember_cannot_be_repeated(self):
        sde = VPSDE()
        imputation = Imputation(
            solvers.ExponentialMultistep(order=2), KNOWN, MASK, resample=2, jump=1
        )
        with pytest.raises(ValueError, match="one-step solver if resample is above 1"):
            solvers.solve(ReverseProcess(sde, independent(sde)), imputation, prior(sde), GRID)

    def test_a_process_that_the_solver_does_not_apply_to_is_refused(self):
        sde = VESDE(0.05, 20.0)
        with pytest.raises(ValueError, match="SSCS needs a process with a stationary distribution"):
            solvers.solve(
                ReverseProcess(sde, independent(sde)),
                Imputation(solvers.SSCS(), KNOWN, MASK),
                prior(sde),
                GRID,
            )
