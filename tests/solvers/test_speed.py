"""What solvers cost, in units of what a loop written by hand costs, and of states in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from by_hand import euler_maruyama, sscs
from cldsde import CLD, HOLD, PSLD, VPSDE, GaussianMixture, ReverseProcess, solvers
from cldsde.solvers.authoring import Solver
from interleaved import interleave, ratio
from problems import free, linear

SDE = CLD()
GAUSSIAN = GaussianMixture([1.0], [[0.3, -0.2]], [[[0.25, 0.1], [0.1, 0.16]]])
MULTISTEP = solvers.ExponentialMultistep
READERS = {"increments": solvers.EulerMaruyama(), "integrals": solvers.ExponentialEuler()}


def check_ratio(rivals: dict[str, Callable[[], object]], most: float) -> None:
    """Fail where the first takes more than so many times as long as the other.

    Of medians of interleaved rounds, the best of three attempts; some 1.3 times what is usual is no
    noise.
    """
    found = []
    first, other = rivals
    for _ in range(3):
        seconds = interleave(rivals, 5)
        found.append(ratio(seconds[first], seconds[other]))
        if found[-1] <= most:
            return
    pytest.fail(f"ratios {found}; at most {most} was expected")


def normals(shape: tuple[int, ...], draws: int) -> Callable[[], None]:
    """Draws that are not kept: memory that is new takes half as long besides."""
    generator = torch.Generator()

    def draw() -> None:
        for _ in range(draws):
            torch.randn(shape, generator=generator)

    return draw


class TestLoops:
    """Time of solvers in units of that of what one would write or use without them."""

    @pytest.mark.parametrize(
        ("solver", "loop"),
        [(solvers.EulerMaruyama(), euler_maruyama), (solvers.SSCS(), sscs)],
        ids=["EM", "SSCS"],
    )
    def test_a_step_costs_little_more_than_one_by_hand(self, solver: Solver, loop: Any) -> None:
        start = SDE.prior.sample((4096, 2), generator=torch.Generator().manual_seed(0))
        times = solvers.uniform_times(SDE.T, 1e-3, 200)
        score = linear(SDE, 2)
        process = ReverseProcess(SDE, score)
        generator = torch.Generator().manual_seed(1)
        rivals = {
            "cldsde": lambda: solvers.solve(process, solver, start, times, generator=generator),
            "by hand": lambda: loop(score, start, times, generator),
        }
        check_ratio(rivals, 1.6)

    def test_steps_of_images_cost_little_more_than_their_normals(self) -> None:
        shape, steps = (3, 32, 32), 200
        start = SDE.prior.sample((16, *shape), generator=torch.Generator().manual_seed(0))
        times = solvers.uniform_times(SDE.T, 1e-3, steps)
        process, generator = ReverseProcess(SDE, free(SDE)), torch.Generator()
        em = solvers.EulerMaruyama()
        rivals = {
            "step": lambda: solvers.solve(process, em, start, times, generator=generator),
            "normals": normals((16, 1, *shape), steps),
        }
        check_ratio(rivals, 1.7)

    @pytest.mark.parametrize(
        ("kind", "most"), [("samples", 1.6), ("increments", 3.0), ("integrals", 3.5)]
    )
    def test_noise_costs_little_more_than_fresh_normals(self, kind: str, most: float) -> None:
        shape, draws = (3, 32, 32), 64
        z, times = torch.zeros(16, 2, *shape), solvers.uniform_times(SDE.T, 1e-3, draws)
        process = ReverseProcess(SDE, free(SDE))
        source = solvers.SampleNoise(range(16))
        rows = 2 if kind == "integrals" else 1

        def draw() -> None:
            noise: solvers.NoiseSource = source
            if kind != "samples":
                path = solvers.BrownianPath(SDE, times, (16, *shape), integrals=kind == "integrals")
                noise = path.along(SDE, times, lambda: READERS[kind].path_noise(process, times))
            for _ in range(draws):
                noise.normal(z, rows)

        rivals = {
            "noise": draw,
            "normals": normals((16, rows, *shape), draws),
        }
        check_ratio(rivals, most)

    # Roundings of 30 steps; and of Van Loan's covariances, whose entries are h³ of their terms.
    @pytest.mark.parametrize(
        ("loop", "solver", "atol"),
        [(euler_maruyama, solvers.EulerMaruyama(), 1e-11), (sscs, solvers.SSCS(), 1e-9)],
        ids=["EM", "SSCS"],
    )
    def test_the_loops_by_hand_are_the_solvers(
        self, loop: Any, solver: Solver, atol: float
    ) -> None:
        start = SDE.prior.sample((50, 2), dtype=torch.float64)
        times = solvers.uniform_times(SDE.T, 1e-3, 30)
        score = GAUSSIAN.score(SDE)
        by_hand = loop(score, start, times, torch.Generator().manual_seed(1))
        ours = solvers.solve(
            ReverseProcess(SDE, score),
            solver,
            start,
            times,
            generator=torch.Generator().manual_seed(1),
        )
        assert torch.allclose(by_hand, ours.state, rtol=0, atol=atol)


class Memory(TorchDispatchMode):
    """Follows the memory of all tensors that are made while it is entered, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and not any(made is x for x in given):
                self._follow(made, known)
        return result

    def _follow(self, made: torch.Tensor, known: set[int]) -> None:
        storage = made.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where not in self._holders:
            if where in known:
                return  # a view of what was there before
            self._holders[where] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[where] += 1
        weakref.finalize(made, self._release, where, size)

    def _release(self, where: int, size: int) -> None:
        self._holders[where] -= 1
        if not self._holders[where]:
            del self._holders[where]
            self.now -= size


class TestMemory:
    """States that a solve holds at a time, beside the caller's and what the score returned."""

    # The state, a stage, the prediction before or the noise, and the next state.
    @pytest.mark.parametrize("steps", [3, 40])
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    @pytest.mark.parametrize(
        ("solver", "states"),
        [
            (solvers.EulerMaruyama(), 3),
            (solvers.SSCS(), 3),
            (solvers.SSCS(merge=False), 3),
            (solvers.SSCS(score_step="midpoint"), 3),
            (solvers.StochasticHeun(), 3),
            (solvers.ExponentialEuler(), 3),
            (solvers.ReverseDiffusion(), 3),
            (solvers.Ancestral(), 3),
            (solvers.PredictorCorrector(solvers.ReverseDiffusion(), solvers.Langevin()), 3),
            (MULTISTEP(order=2, stochasticity=1.0), 3),
            # A prediction more for each order, two for a corrector.
            (MULTISTEP(order=3, stochasticity=1.0), 4),
            (MULTISTEP(order=2, stochasticity=1.0, corrector=True), 5),
            (MULTISTEP(order=3, stochasticity=1.0, corrector=True), 6),
        ],
        ids=repr,
    )
    def test_a_solve_holds_few_states_whatever_the_number_of_steps(
        self, solver: Solver, states: int, make: Any, steps: int
    ) -> None:
        sde = make()
        rows = len(sde.driven)
        process = ReverseProcess(sde, lambda z, t: z.new_zeros(len(z), rows, *z.shape[2:]))
        start = torch.zeros(8, sde.components, 8000)
        times = solvers.root_times(sde.T, 1e-3, steps)
        with Memory() as memory:
            solvers.solve(process, solver, start, times)
        # Tables and numbers a sample are a hundredth of a state.
        assert memory.peak / (start.numel() * 4) <= states + rows / sde.components + 0.01

    @pytest.mark.parametrize("batch", [40_000, 40_001])  # samples that share products, or do not
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    @pytest.mark.parametrize("solver", [solvers.EulerMaruyama(), solvers.SSCS()], ids=repr)
    def test_an_exact_score_keeps_no_state(self, solver: Solver, make: Any, batch: int) -> None:
        sde = make()
        data = GaussianMixture([1.0], torch.zeros(1, 8), torch.eye(8).unsqueeze(0))
        process = ReverseProcess(sde, data.score(sde))
        start = torch.zeros(batch, sde.components, 8)
        with Memory() as memory:
            solvers.solve(process, solver, start, solvers.root_times(sde.T, 1e-3, 5))
        rows = len(sde.driven)
        assert memory.peak / (start.numel() * 4) <= 3 + rows / sde.components + 0.02
