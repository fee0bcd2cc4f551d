"""`TorchSDE`: each step is one of torchsde's, and its normals are independent."""

import math

import pytest
import torch
import torchsde

from cldsde import solvers
from cldsde.solvers import RecordedNoise, TorchSDE, solve
from gaussian_data import PROCESSES, reverse
from probes import Recording, normals, start
from tolerances import KERNEL

# Calculus of each method.
METHODS = dict.fromkeys(("euler", "milstein", "srk"), "ito")
METHODS |= dict.fromkeys(("heun", "euler_heun", "midpoint"), "stratonovich")
GRID = solvers.root_times(1.0, 0.05, 9)


def close(found, expected):
    # Nine steps whose coefficients are computed in two ways.
    assert (found - expected).abs().max() <= KERNEL * (1 + expected.abs().max())


class Increments:
    """One step's increment of W and its integral U as torchsde's Brownian motion, (B, m)."""

    levy_area_approximation = "space-time"

    def __init__(self, W, U):
        self.W, self.U, self.shape = W, U, W.shape

    def __call__(self, s, t, *, return_U=False):
        return (self.W, self.U) if return_U else self.W


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["VE", "CLD, linear", "PSLD", "HOLD"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_sdeint(method, name):
    process, solver = reverse(name, Recording), TorchSDE(method=method)
    m = PROCESSES[name][1].Q_root.shape[1]
    draws = list(normals(3, 9, 4, 2 * m if method == "srk" else m, 1))
    z, noise = start(process.sde, (4, 1)), RecordedNoise(draws)
    found = solve(process, solver, z, GRID, noise=noise, t_eval=GRID)
    times = torch.cat(process.score.function.times)
    assert found.nfev == process.score.function.calls == 9 * solver.facts.nfe_per_step
    assert (times.max(), times.min() >= GRID[-1]) == (1.0, True)
    form = solvers.as_torchsde(process, (1,), calculus=METHODS[method])
    for i, xi in enumerate(draws):
        s = form.clock(GRID[i : i + 2])
        h = float(s[1] - s[0])
        W = math.sqrt(h) * xi[:, :m, 0]
        U = h * (W / 2 + math.sqrt(h / 12) * xi[:, m:, 0]) if method == "srk" else None
        # A step of 2 is cut at the end.
        options = {"bm": Increments(W, U), "method": method, "dt": 2.0}
        z = form.unpack(torchsde.sdeint(form, form.pack(z), s, **options)[-1])
        close(found.y[i + 1], z)


def test_the_normals_of_srk_are_independent():
    # ΔW and U = ∫(τ - u) dw of a step have the covariance h, h^2/2, h^3/3.
    found, h = TorchSDE(method="srk").path_noise(reverse("VP"), GRID), -GRID.diff()
    moments = torch.stack([h, h**2 / 2, h**2 / 2, h**3 / 3], dim=1).reshape(-1, 2, 2)
    rows = torch.cat([found.increment, found.time_integral], dim=2)
    close(rows @ moments @ rows.mT, torch.eye(2).expand(9, 2, 2))
