"""Imputation: known data come back, independent data are unchanged, the rest is conditional."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from cldsde import CLD, HOLD, VESDE, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.images.sample.observed import grey_basis
from cldsde.linear.blocks import apply_blocks
from cldsde.solvers import EulerMaruyama, Imputation, RecordedNoise
from probes import generator, no_waiting
from tolerances import standard_error, standard_error_of_variance

PROCESSES = {"VP": VPSDE(), "VE": VESDE(0.05, 20.0), "CLD": CLD(), "HOLD": HOLD()}
CRITICAL = PROCESSES["CLD"]
SSCS, Multistep = solvers.SSCS(), solvers.ExponentialMultistep
# Solvers with the number of normals that each draws per step.
SOLVERS = {
    "EM": (EulerMaruyama(), 1),
    "SSCS": (SSCS, 2),
    "Heun": (solvers.StochasticHeun(), 1),
    "multistep": (Multistep(order=2, stochasticity=1.0), 1),
    "multistep flow": (Multistep(order=2), 0),
}
# SSCS needs a stationary distribution, which VE has not.
PAIRS = [(f, s) for f in PROCESSES for s in SOLVERS if (f, s) != ("VE", "SSCS")]
GRID = solvers.quadratic_times(1.0, 1e-2, 6)
TO_ZERO = solvers.uniform_times(1.0, 0.0, 5)  # not for multistep solvers
IMAGE = (3, 2, 4)
KNOWN = torch.randn(IMAGE, generator=generator(1), dtype=torch.float64)
MASK = torch.rand(IMAGE, generator=generator(2)) < 0.5
GREY, BASIS = torch.tensor([True, False, False])[:, None, None], grey_basis()
FEW = 1e-14  # rounding of sums of a few numbers of size 1
STEPS = 1e-12  # the same, carried along by a few steps


def gaussian(sde, variance=0.25, mean=0.3):
    """Score of independent pixels, each of which says nothing about the others."""
    pixel = GaussianMixture([1.0], [[mean]], [[[variance]]]).score(sde)

    def score(z, t):
        pixels = z.flatten(2).transpose(1, 2)
        each = pixel(pixels.reshape(-1, z.shape[1], 1), t[:1].expand(pixels[..., 0].numel()))
        return each.reshape(*pixels.shape[:2], -1).transpose(1, 2).reshape(len(z), -1, *z.shape[2:])

    return score


def correlated(sde):
    """A process of two pixels N(0, 0.25) with correlation 0.8."""
    score = GaussianMixture([1.0], [[0.0, 0.0]], [[[0.25, 0.2], [0.2, 0.25]]]).score(sde)
    return ReverseProcess(
        sde, lambda z, t: score(z.flatten(2), t).reshape(len(z), -1, *z.shape[2:])
    )


def prior(sde, batch=2, shape=IMAGE):
    return sde.prior.sample((batch, *shape), generator=generator(3), dtype=torch.float64)


def sample(solver, sde=CRITICAL, state=None, times=GRID, **options):
    state = prior(sde) if state is None else state
    if "noise" not in options:
        options["generator"] = generator()
    return solvers.solve(ReverseProcess(sde, gaussian(sde)), solver, state, times, **options)


class Remembered(solvers.NoiseSource):
    """Fresh normals, and a record of them."""

    def __init__(self):
        self.source, self.draws = solvers.FreshNoise(generator(4)), []

    def normal(self, z, rows):
        self.draws.append(self.source.normal(z, rows))
        return self.draws[-1]


class NoNoise(solvers.NoiseSource):
    """Zeros: if all is linear, the state is its mean."""

    def normal(self, z, rows):
        return z.new_zeros(len(z), rows, *z.shape[2:])


def noisy(sde, t, xi, known=KNOWN):
    """Known data at a time, with the given normals."""
    kernel, z0 = sde.marginal(t), torch.zeros_like(xi)
    z0[:, 0] = known
    return apply_blocks(kernel.mean, z0) + apply_blocks(kernel.root, xi)


def close(found, expected, size):
    torch.testing.assert_close(found, expected, rtol=0, atol=size)


def test_data_may_have_a_single_axis():
    known, mask = KNOWN.flatten(), MASK.flatten()
    state = prior(CRITICAL, shape=known.shape)
    data = sample(Imputation(SSCS, known, mask), state=state, times=TO_ZERO).data
    assert torch.equal(data[:, mask], known[mask].expand(2, -1))


class TestKnownPart:
    @pytest.mark.parametrize(("family", "name"), PAIRS)
    def test_it_has_its_distribution_and_the_rest_has_the_solver_s_bits(self, family, name):
        sde, noise, (solver, per_step) = PROCESSES[family], Remembered(), SOLVERS[name]
        found = sample(Imputation(solver, KNOWN, MASK), sde, noise=noise, denoise=True)
        expected = noisy(sde, GRID[-1], noise.draws[-1])
        # Up to 20 times as large for VE.
        close(found.state[..., MASK], expected[..., MASK], 20 * FEW)
        # One draw for the start, then for each step and after it for the known part.
        own = [draw for i, draw in enumerate(noise.draws[1:]) if i % (per_step + 1) < per_step]
        assert len(noise.draws) == 1 + (per_step + 1) * (len(GRID) - 1)
        alone = sample(solver.on_grid(), sde, noise=RecordedNoise(own), denoise=True)
        assert torch.equal(found.data[:, ~MASK], alone.data[:, ~MASK])
        assert torch.equal(found.state[..., ~MASK], alone.state[..., ~MASK])
        assert found.nfev == alone.nfev

    @pytest.mark.parametrize("name", ["EM", "SSCS", "Heun"])
    @pytest.mark.parametrize("known", [KNOWN, torch.stack([KNOWN, -KNOWN])], ids=["one", "each"])
    @pytest.mark.parametrize("mask", [MASK, torch.tensor(True)], ids=["some", "all"])
    def test_it_comes_back_exactly_if_the_grid_ends_at_the_data(self, name, known, mask):
        data = sample(Imputation(SOLVERS[name][0], known, mask), times=TO_ZERO).data
        mask, known = mask.expand(data.shape), known.expand(data.shape)
        assert torch.equal(data[mask], known[mask])
        assert (data[~mask] != known[~mask]).all()

    def test_the_start_and_each_state_are_replaced_before_they_are_used(self):
        seen, states, noise, score = [], [], Remembered(), gaussian(CRITICAL)
        process = ReverseProcess(CRITICAL, lambda z, t: seen.append(z.clone()) or score(z, t))
        imputation, keep = (
            Imputation(EulerMaruyama(), KNOWN, MASK),
            lambda n, t, z: states.append(z.clone()),
        )
        solvers.solve(process, imputation, prior(CRITICAL), GRID, noise=noise, callback=keep)
        assert torch.equal(seen[0][..., ~MASK], prior(CRITICAL)[..., ~MASK])
        for i, state in enumerate([seen[0], *states]):
            expected = noisy(CRITICAL, GRID[i], noise.draws[2 * i])
            close(state[..., MASK], expected[..., MASK], FEW)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_impose_puts_it_in_place_and_leaves_the_rest(self, dtype):
        data = torch.randn(2, *IMAGE, dtype=dtype, generator=generator())
        imposed = Imputation(SSCS, KNOWN, MASK).impose(data)
        assert torch.equal(imposed[:, MASK], KNOWN[MASK].to(dtype).expand(2, -1))
        assert torch.equal(imposed[:, ~MASK], data[:, ~MASK])

    @pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 2, 2, 2)])
    def test_data_of_any_shape_with_a_mask_per_sample(self, shape):
        known = torch.randn(2, *shape, generator=generator(4), dtype=torch.float64)
        mask = torch.rand(2, *shape, generator=generator(5)) < 0.5
        imputation = Imputation(SSCS, known, mask)
        data = sample(imputation, state=prior(CRITICAL, 2, shape)).data
        found = imputation.impose(data)
        assert torch.equal(found[mask], known[mask])
        assert torch.equal(found[~mask], data[~mask])
        # At most 16 standard normals.
        kernel = CRITICAL.marginal(GRID[-1])
        assert ((data - kernel.mean[0, 0] * known)[mask] / kernel.root[0, 0]).abs().max() < 5


class TestRest:
    @pytest.mark.parametrize("basis", [None, BASIS], ids=["pixels", "grey"])
    @pytest.mark.parametrize("name", list(SOLVERS))
    def test_if_nothing_is_known_samples_are_the_solver_s(self, name, basis):
        solver, _ = SOLVERS[name]
        imputation = Imputation(solver, KNOWN, torch.tensor(False), basis)
        assert torch.equal(sample(imputation).state, sample(solver.on_grid()).state)

    @pytest.mark.parametrize("resample", [1, 3])
    def test_a_sample_does_not_depend_on_its_batch(self, resample):
        process = ReverseProcess(CRITICAL, lambda z, t: -z[:, 1:])
        known = torch.randn(3, *IMAGE, generator=generator(5))

        def images(seeds):
            noise = solvers.SampleNoise(seeds)
            imputation = Imputation(SSCS, known[seeds], GREY, BASIS, resample=resample, jump=2)
            state = noise.start(CRITICAL, IMAGE)
            return solvers.solve(process, imputation, state, GRID, noise=noise).data

        assert torch.equal(images([0, 1, 2])[[1]], images([1]))

    # Not Euler–Maruyama for CLD, whose terms of first and second order nearly cancel.
    @pytest.mark.parametrize(
        ("family", "solver"),
        [("VP", EulerMaruyama()), ("CLD", SSCS)],
        ids=["VP", "CLD"],
    )
    def test_the_mean_of_correlated_data_has_its_limit(self, family, solver):
        # In the limit of many steps the known mean is always ψ_t x, and the mean of the rest
        # follows the reverse drift. Without noise, states are means.
        sde, x, end = PROCESSES[family], 0.7, 1e-3
        process = correlated(sde)

        def slope(t, y):
            z = torch.from_numpy(y).reshape(1, -1, 1, 1, 2).clone()
            z[..., 0] = sde.marginal(t).mean[:, 0, None, None] * x
            return process.drift(z, t).flatten().numpy()

        state = torch.zeros(1, sde.components, 1, 1, 2, dtype=torch.float64)
        limit = solve_ivp(slope, (1.0, end), state.flatten(), "DOP853", rtol=1e-5).y[1, -1]
        known, first = torch.tensor([[[x, 0.0]]]).double(), torch.tensor([True, False])
        errors = []
        for steps in (40, 80):
            grid = solvers.quadratic_times(1.0, end, steps)
            imputation = Imputation(solver, known, first)
            data = solvers.solve(process, imputation, state, grid, noise=NoNoise()).data
            errors.append(abs(data[0, 0, 0, 1].item() - limit))
        # First order: twice the steps, half the error, and a term of second order that is a fifth
        # of it at most here.
        assert errors[1] < 0.6 * errors[0]
        assert errors[1] < 0.01 * x
        # The limit is not the conditional mean, 0.8 x.
        assert 0.6 < limit / (0.8 * x) < 0.65

    def test_repeated_steps_lead_to_the_conditional_distribution(self):
        sde, x, n = PROCESSES["VP"], 0.7, 1000
        known, first = torch.tensor([[[x, 0.0]]]).double(), torch.tensor([True, False])
        imputation = Imputation(SSCS, known, first, resample=10, jump=1)
        grid, state = solvers.quadratic_times(1.0, 1e-3, 50), prior(sde, n, (1, 1, 2))
        found = solvers.solve(correlated(sde), imputation, state, grid, generator=generator())
        assert found.nfev == 500
        data, variance = found.data[..., 1], 0.25 * (1 - 0.8**2)
        # Computed exactly: 1.046 of the conditional variance, and 0.952 of the mean.
        error = standard_error_of_variance(1.046 * variance, n)
        assert data.var().item() == pytest.approx(1.046 * variance, abs=error)
        error = standard_error(math.sqrt(1.046 * variance), n)
        assert data.mean().item() == pytest.approx(0.952 * 0.8 * x, abs=error)


class TestBasis:
    """Known coordinates in a basis of the channels."""

    def test_the_grey_basis_is_orthonormal_and_starts_with_grey(self):
        close(BASIS @ BASIS.mT, torch.eye(3, dtype=torch.float64), FEW)
        close(BASIS[0], torch.full((3,), 3**-0.5, dtype=torch.float64), FEW)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["EM", "SSCS", "Heun"])
    def test_a_known_grey_is_kept(self, name, dtype):
        imputation = Imputation(SOLVERS[name][0], KNOWN, GREY, BASIS)
        data = sample(imputation, state=prior(CRITICAL).to(dtype), times=TO_ZERO).data
        # Rounding in units of the state's size, over a dozen operations.
        size = 12 * torch.finfo(dtype).eps * float(data.abs().max())
        close(data.mean(1), KNOWN.mean(0).to(dtype).expand(2, -1, -1), size)
        assert (data - KNOWN.to(dtype)).abs().max() > 0.1

    def test_impose_changes_the_known_coordinates_alone(self):
        data = torch.randn(2, *IMAGE, dtype=torch.float64, generator=generator())
        imposed = Imputation(SSCS, KNOWN, GREY, BASIS).impose(data)
        before, after, known = (
            torch.einsum("ij,...jhw->...ihw", BASIS, x) for x in (data, imposed, KNOWN)
        )
        close(after[:, 1:], before[:, 1:], FEW)
        close(after[:, 0], known[0].expand(2, -1, -1), FEW)

    def test_only_the_grey_of_the_known_image_matters(self):
        grey = KNOWN.mean(0, keepdim=True).expand(IMAGE)
        first, second = (
            sample(Imputation(SSCS, known, GREY, BASIS)).data for known in (KNOWN, grey)
        )
        close(first, second, STEPS)

    @pytest.mark.parametrize("name", list(SOLVERS))
    def test_colours_independent_of_the_grey_are_the_solver_s(self, name):
        # Independent Gaussian channels of one variance are independent in each basis.
        noise, (solver, per_step) = Remembered(), SOLVERS[name]
        found = sample(Imputation(solver, KNOWN, GREY, BASIS), noise=noise).data
        own = [draw for i, draw in enumerate(noise.draws[1:]) if i % (per_step + 1) < per_step]
        alone = sample(solver.on_grid(), noise=RecordedNoise(own)).data
        colours = (torch.einsum("ij,bjhw->bihw", BASIS[1:], x) for x in (found, alone))
        close(*colours, STEPS)


class TestSolver:
    def test_its_repr_is_one_line_of_facts(self):
        assert repr(Imputation(EulerMaruyama(), KNOWN, GREY, BASIS)) == (
            "Imputation(solver=EulerMaruyama(), known=(3, 2, 4), mask=(3, 1, 1), basis=(3, 3), "
            "resample=1, jump=10)"
        )

    def test_it_claims_no_order(self):
        facts = Imputation(solvers.StochasticHeun(), KNOWN, MASK, resample=3).facts
        assert facts.weak_order is facts.strong_order is facts.ode_order is None
        assert facts.state_on_grid
        assert facts.nfe_per_step == 6

    @pytest.mark.parametrize("jump", [1, 4, 10])
    @pytest.mark.parametrize("resample", [1, 3])
    @pytest.mark.parametrize("name", ["SSCS", "Heun"])
    def test_the_score_is_evaluated_at_the_announced_times(self, name, resample, jump):
        times, score, solver = [], gaussian(CRITICAL), SOLVERS[name][0]
        process = ReverseProcess(CRITICAL, lambda z, t: times.append(t[0].item()) or score(z, t))
        imputation = Imputation(solver, KNOWN, MASK, resample=resample, jump=jump)
        found = solvers.solve(process, imputation, prior(CRITICAL), GRID, generator=generator())
        once = solver.on_grid().evaluation_times(process, GRID).reshape(6, -1).tolist()
        groups = [once[i : i + jump] for i in range(0, 6, jump)]
        assert times == [t for group in groups for step in group * resample for t in step]
        assert times == imputation.evaluation_times(process, GRID).tolist()
        assert found.nfev == len(times) == imputation.facts.nfe_per_step * 6

    def test_the_way_back_is_the_forward_process(self):
        inner, noise = EulerMaruyama(), Remembered()
        imputation = Imputation(inner, KNOWN, torch.tensor(False), resample=2, jump=6)
        found = sample(imputation, noise=noise).state
        assert len(noise.draws) == 13
        there = sample(inner, noise=RecordedNoise(noise.draws[:6])).state
        back = CRITICAL.transition(GRID[-1], GRID[0])
        state = apply_blocks(back.mean, there) + apply_blocks(back.root, noise.draws[6])
        again = sample(inner, state=state, noise=RecordedNoise(noise.draws[7:])).state
        close(found, again, STEPS)

    @pytest.mark.parametrize("basis", [None, BASIS], ids=["pixels", "grey"])
    def test_a_step_waits_for_no_value(self, basis, monkeypatch):
        process, score = ReverseProcess(CRITICAL, lambda z, t: -z[:, 1:]), lambda z, j: -z[:, 1:]
        imputation = Imputation(SSCS, KNOWN, GREY, basis, resample=2, jump=1)
        tables, z = imputation.prepare(process, GRID), prior(CRITICAL)
        with no_waiting(monkeypatch), torch.no_grad():
            for i in range(2):
                noise = solvers.FreshNoise(generator())
                z, _ = imputation.step(z, (), tables, i, score, noise)

    def test_gradients_pass_through(self):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        process = ReverseProcess(PROCESSES["VP"], lambda z, t: shift - z)
        imputation = Imputation(EulerMaruyama(), KNOWN, GREY, BASIS)
        options = {"generator": generator(), "differentiable": True}
        data = solvers.solve(process, imputation, prior(process.sde), GRID, **options).data
        (gradient,) = torch.autograd.grad(data.square().sum(), shift)
        assert gradient.isfinite()


NO_STATE = "solver must have a state at each grid time"
FLOAT = "must be a floating-point tensor"
ORTHONORMAL = "basis must be orthonormal"


class TestRejected:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"solver": solvers.GottaGoFast()}, ValueError, NO_STATE),
            ({"solver": solvers.SSCS}, TypeError, "write it with parentheses"),
            ({"solver": Multistep(order=2, corrector=True)}, ValueError, NO_STATE),
            ({"known": KNOWN.tolist()}, TypeError, f"known {FLOAT}"),
            ({"known": MASK}, TypeError, f"known {FLOAT}; got torch.bool"),
            ({"known": KNOWN[0, 0, 0]}, ValueError, r"known must have shape \(\*D\) or"),
            ({"known": KNOWN / 0}, ValueError, "known must be finite"),
            ({"mask": MASK.double()}, TypeError, "mask must be a boolean tensor.*float64"),
            ({"mask": True}, TypeError, "mask must be a boolean tensor.*bool"),
            ({"mask": MASK[:2]}, ValueError, r"mask must broadcast with known, \(3, 2, 4\)"),
            ({"mask": MASK[None]}, ValueError, r"mask must broadcast with known, \(3, 2, 4\)"),
            ({"basis": [[1.0]]}, TypeError, f"basis {FLOAT}"),
            ({"basis": torch.eye(4)}, ValueError, r"basis must be \(C, C\).*got \(4, 4\)"),
            ({"basis": 1.001 * torch.eye(3)}, ValueError, f"{ORTHONORMAL}.*0.002"),
            ({"basis": torch.eye(3) * math.nan}, ValueError, ORTHONORMAL),
            ({"resample": 0}, ValueError, "resample must be at least 1; got 0"),
            ({"resample": 1.5}, TypeError, "resample must be an integer; got 1.5"),
            ({"jump": 0}, ValueError, "jump must be at least 1; got 0"),
        ],
    )
    def test_arguments_that_do_not_fit(self, change, error, message):
        with pytest.raises(error, match=message):
            Imputation(**{"solver": SSCS, "known": KNOWN, "mask": MASK, **change})

    def test_a_basis_in_single_precision_is_accepted(self):
        Imputation(SSCS, KNOWN, GREY, BASIS.float())

    @pytest.mark.parametrize(
        ("known", "shape"),
        [(KNOWN, (3, 4, 2)), (KNOWN.expand(3, *IMAGE), IMAGE), (KNOWN[None], IMAGE)],
    )
    def test_states_of_other_images(self, known, shape):
        imputation = Imputation(SSCS, known, torch.tensor(True))
        with pytest.raises(ValueError, match="state must hold data of the shape of known"):
            sample(imputation, state=prior(CRITICAL, 2, shape))
        with pytest.raises(ValueError, match="data must hold data of the shape of known"):
            imputation.impose(torch.zeros(2, *shape))

    def test_solves_that_do_not_fit(self):
        vp, ve = PROCESSES["VP"], PROCESSES["VE"]
        path = solvers.BrownianPath(vp, GRID, (2, *IMAGE), generator=generator())
        with pytest.raises(ValueError, match="does not draw increments or integrals"):
            sample(Imputation(EulerMaruyama(), KNOWN, MASK), vp, noise=path)
        with pytest.raises(ValueError, match="one-step solver if resample is above 1"):
            sample(Imputation(Multistep(order=2), KNOWN, MASK, resample=2, jump=1), vp)
        with pytest.raises(ValueError, match="SSCS needs a process with a stationary distribution"):
            sample(Imputation(SSCS, KNOWN, MASK), ve)
