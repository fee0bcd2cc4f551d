"""`TorchSDE`: each step is one of torchsde's, and their orders are those for additive noise."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torchsde

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, ReverseProcess
from cldsde.solvers import (
    BrownianPath,
    EulerMaruyama,
    RecordedNoise,
    StochasticHeun,
    TorchSDE,
    as_torchsde,
    root_times,
    solve,
    uniform_times,
)
from cldsde.validation import propagate_moments
from probes import Recording, generator, start, untouchable
from references import cld, dense, hold, psld, ve, vp

DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
PROCESSES = {
    "VP": (VPSDE(0.1, 8.0), dense(vp(0.1, 8.0))),
    "VE": (VESDE(0.1, 5.0), dense(ve(0.1, 5.0))),
    "CLD": (CLD((1.0, 7.0)), dense(cld((1.0, 7.0)))),
    "PSLD": (PSLD(), dense(psld())),
    "HOLD": (HOLD(), dense(hold())),
}
# Calculus, weak and strong order for additive noise, and evaluations per step.
METHODS = {
    "euler": ("ito", 1, 1, 1),
    "milstein": ("ito", 1, 1, 1),
    "srk": ("ito", 2, 1.5, 3),
    "heun": ("stratonovich", 2, 1, 2),
    "euler_heun": ("stratonovich", 1, 1, 1),
    "midpoint": ("stratonovich", 1, 1, 2),
}
GRID = root_times(1.0, 0.05, 9)
# Rounding of nine steps, and of two ways to the coefficients.
ROUNDING = 1e-12
CLOSE = 0.25  # slopes near their limit; a declaration that is off by a half is further away

every_process = pytest.mark.parametrize("name", list(PROCESSES))
every_method = pytest.mark.parametrize("method", list(METHODS))
but_milstein = pytest.mark.parametrize("method", [m for m in METHODS if m != "milstein"])


def process_of(name):
    sde = PROCESSES[name][0]
    return ReverseProcess(sde, Recording(DATA.score(sde)))


def normals(method, name, steps=9):
    columns = PROCESSES[name][1].Q_root.shape[1] * (2 if method == "srk" else 1)
    return list(torch.randn(steps, 4, columns, 1, generator=generator(3), dtype=torch.float64))


def close(found, expected):
    assert (found - expected).abs().max() <= ROUNDING * (1 + expected.abs().max())


class Increments:
    """One step's increment of W and its integral U as torchsde's Brownian motion, (B, m)."""

    levy_area_approximation = "space-time"

    def __init__(self, W, U):
        self.W, self.U, self.shape = W, U, W.shape

    def __call__(self, s, t, *, return_U=False):
        return (self.W, self.U) if return_U else self.W


class TestSteps:
    @every_process
    @every_method
    def test_steps_are_those_of_sdeint(self, method, name):
        process, draws = process_of(name), normals(method, name)
        z, noise = start(process.sde, (4, 1)), RecordedNoise(draws)
        found = solve(process, TorchSDE(method=method), z, GRID, noise=noise, t_eval=GRID)
        calls, times = process.score.calls, torch.cat(process.score.times)
        assert found.nfev == calls == 9 * METHODS[method][3]
        assert times.max() == 1.0
        assert times.min() >= GRID[-1]
        form = as_torchsde(process, (1,), calculus=METHODS[method][0])
        m = PROCESSES[name][1].Q_root.shape[1]
        for i, xi in enumerate(draws):
            s = form.clock(GRID[i : i + 2])
            h = float(s[1] - s[0])
            W = math.sqrt(h) * xi[:, :m, 0]
            U = h * (W / 2 + math.sqrt(h / 12) * xi[:, m:, 0]) if method == "srk" else None
            # A step of 2 is cut at the end.
            options = {"bm": Increments(W, U), "method": method, "dt": 2.0}
            z = form.unpack(torchsde.sdeint(form, form.pack(z), s, **options)[-1])
            close(found.y[i + 1], z)

    @pytest.mark.parametrize(
        ("method", "same", "name"),
        [
            ("euler", EulerMaruyama(), "CLD"),
            ("milstein", EulerMaruyama(), "VE"),
            ("heun", StochasticHeun(), "PSLD"),  # whose rate is constant
        ],
    )
    def test_some_methods_are_solvers_of_the_package(self, method, same, name):
        draws = normals(method, name)
        found, expected = (
            solve(process_of(name), solver, start(PROCESSES[name][0], (4, 1)), GRID, noise=noise)
            for solver, noise in (
                (TorchSDE(method=method), RecordedNoise(draws)),
                (same, RecordedNoise(draws)),
            )
        )
        close(found.state, expected.state)

    @pytest.mark.parametrize("method", [m for m in METHODS if m != "srk"])
    def test_the_increments_of_a_path_are_its_noise(self, method):
        sde, solver = PROCESSES["PSLD"][0], TorchSDE(method=method)
        path = BrownianPath(sde, GRID, (4, 1), generator=generator(), dtype=torch.float64)
        steps = itertools.pairwise(GRID.tolist())
        draws = [path.increment(u, t) / math.sqrt(t - u) for t, u in steps]
        found, expected = (
            solve(process_of("PSLD"), solver, start(sde, (4, 1)), GRID, noise=noise)
            for noise in (path, RecordedNoise(draws))
        )
        close(found.state, expected.state)

    def test_the_normals_of_srk_are_independent(self):
        # ΔW and U = ∫(τ - u) dw of a step have the covariance h, h^2/2, h^3/3.
        normals = TorchSDE(method="srk").path_noise(process_of("VP"), GRID)
        h = -GRID.diff()
        moments = torch.stack([h, h**2 / 2, h**2 / 2, h**3 / 3], dim=1).reshape(-1, 2, 2)
        rows = torch.cat([normals.increment, normals.time_integral], dim=2)
        close(rows @ moments @ rows.mT, torch.eye(2).expand(9, 2, 2))

    def test_a_path_without_its_integrals_is_rejected(self):
        sde = PROCESSES["CLD"][0]
        path = BrownianPath(sde, GRID, (4, 1), generator=generator())
        process, state = ReverseProcess(sde, untouchable), start(sde, (4, 1))
        with pytest.raises(ValueError, match="noise must not be a BrownianPath"):
            solve(process, TorchSDE(method="srk"), state, GRID, noise=path)

    def test_gradients_are_finite_differences(self):
        sde, strength, h = PROCESSES["CLD"][0], torch.tensor(1.3, dtype=torch.float64), 1e-5

        def end(strength):
            process = ReverseProcess(sde, lambda z, t: -strength * z[:, 1:] + z[:, :1].sin())
            noise, solver = RecordedNoise(normals("srk", "CLD")), TorchSDE(method="srk")
            state = start(sde, (4, 1))
            return solve(process, solver, state, GRID, noise=noise, differentiable=True).state.sum()

        (found,) = torch.autograd.grad(end(strength.requires_grad_()), strength)
        expected = (end(strength.detach() + h) - end(strength.detach() - h)) / (2 * h)
        # h^2 = 1e-10 times third derivatives, which grow over nine steps.
        assert float(found) == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("method", ["reversible_heun", "log_ode", "adjoint", "Euler", None])
    def test_unknown_methods_are_rejected(self, method):
        with pytest.raises(ValueError, match="method must be one of 'euler', 'milstein', 'srk'"):
            TorchSDE(method=method)


class TestOrders:
    @every_method
    def test_they_are_declared(self, method):
        facts = TorchSDE(method=method).facts
        declared = (facts.weak_order, facts.strong_order, facts.nfe_per_step)
        assert declared == METHODS[method][1:]

    @pytest.mark.parametrize("name", ["VE", "CLD", "HOLD"])
    @but_milstein
    def test_the_weak_order_on_gaussian_data(self, method, name):
        exact, errors = PROCESSES[name][1], []
        begin = torch.from_numpy(exact.mean(1.0))[:, None], torch.from_numpy(exact.covariance(1.0))
        for n in (160, 320):
            process = ReverseProcess(PROCESSES[name][0], DATA.score(PROCESSES[name][0]))
            grid = uniform_times(1.0, 0.05, n)
            m, C = propagate_moments(process, TorchSDE(method=method), grid, *begin)
            off = (m[:, 0].numpy() - exact.mean(0.05), C.numpy() - exact.covariance(0.05))
            # A norm that is smooth in the steps.
            errors.append(math.hypot(*map(np.linalg.norm, off)))
        # The inner stage of "midpoint" has half the variance of its time, which costs an order
        # only if the score is nonlinear.
        expected = 2 if method == "midpoint" else METHODS[method][1]
        assert abs(math.log2(errors[0] / errors[1]) - expected) < CLOSE

    FINEST, SAMPLES = 1024, 1000

    @classmethod
    @functools.cache
    def end(cls, method, n):
        """Ends on VP with data of two modes, of one Brownian path on all grids."""
        h, stride = 0.45 / cls.FINEST, cls.FINEST // n
        xi = np.random.default_rng(2).standard_normal((2, cls.FINEST, cls.SAMPLES))
        W = math.sqrt(h) * xi[0]
        U = h * (W / 2 + math.sqrt(h / 12) * xi[1])
        W, U = W.reshape(n, stride, -1), U.reshape(n, stride, -1)
        # An increment adds to the integral for the rest of the step.
        rest = h * np.arange(stride - 1, -1, -1)[:, None]
        W, U = W.sum(1), (U + rest * W).sum(1)
        sde, times, solver = VPSDE(4.0, 4.0), uniform_times(0.5, 0.05, n), TorchSDE(method=method)
        modes = GaussianMixture([0.4, 0.6], [[-1.0], [0.7]], [[[0.09]]] * 2)
        process = ReverseProcess(sde, modes.score(sde))
        normals = solver.path_noise(process, times)
        draws = normals.increment @ torch.from_numpy(W)[:, None]
        if method == "srk":
            draws = draws + normals.time_integral @ torch.from_numpy(U)[:, None]
        state = torch.randn(cls.SAMPLES, 1, 1, generator=generator(), dtype=torch.float64)
        noise = RecordedNoise(list(draws.transpose(1, 2)[..., None]))
        return solve(process, solver, 0.8 * state, times, noise=noise).state

    @but_milstein
    def test_the_strong_order_on_data_of_two_modes(self, method):
        fine, steps = self.end("srk", self.FINEST), (32, 64, 128)
        errors = [float((self.end(method, n) - fine).square().mean().sqrt()) for n in steps]
        slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert abs(slope - METHODS[method][2]) < CLOSE
