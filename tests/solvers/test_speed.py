"""What solvers cost, in units of what a loop written by hand costs, and of states in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from by_hand import euler_maruyama, sscs
from cldsde import CLD, HOLD, PSLD, VPSDE, GaussianMixture, ReverseProcess, solvers
from interleaved import interleave, ratio

SDE = CLD()
GAUSSIAN = GaussianMixture([1.0], [[0.3, -0.2]], [[[0.25, 0.1], [0.1, 0.16]]])


class TestLoops:
    """Time of a step in units of that of a loop by hand; `benchmarks/` has the targets."""

    # Beside the loop by hand, either takes 1.1 times as long. A ratio of 1.3 times that is not
    # noise: of medians of interleaved rounds, the best of three attempts.
    @pytest.mark.parametrize(
        ("solver", "loop"),
        [(solvers.EulerMaruyama(), euler_maruyama), (solvers.SSCS(), sscs)],
        ids=["EM", "SSCS"],
    )
    def test_a_step_costs_little_more_than_one_by_hand(
        self, solver: solvers.Solver, loop: Any
    ) -> None:
        start = SDE.prior.sample((4096, 2), generator=torch.Generator().manual_seed(0))
        times = solvers.uniform_times(SDE.T, 1e-3, 200)
        score = GAUSSIAN.score(SDE)
        process = ReverseProcess(SDE, score)
        generator = torch.Generator().manual_seed(1)
        rivals = {
            "cldsde": lambda: solvers.solve(process, solver, start, times, generator=generator),
            "by hand": lambda: loop(score.tabulate(times[:-1], start), start, times, generator),
        }
        found = []
        for _ in range(3):
            seconds = interleave(rivals, 5)
            found.append(ratio(seconds["cldsde"], seconds["by hand"]))
            if found[-1] <= 1.45:
                return
        pytest.fail(f"ratios {found}; at most 1.45 was expected")

    @pytest.mark.parametrize(
        ("loop", "solver"),
        [(euler_maruyama, solvers.EulerMaruyama()), (sscs, solvers.SSCS())],
        ids=["EM", "SSCS"],
    )
    def test_the_loops_by_hand_are_the_solvers(self, loop: Any, solver: solvers.Solver) -> None:
        start = SDE.prior.sample((50, 2), dtype=torch.float64)
        times = solvers.uniform_times(SDE.T, 1e-3, 30)
        score = GAUSSIAN.score(SDE)
        by_hand = loop(
            score.tabulate(times[:-1], start), start, times, torch.Generator().manual_seed(1)
        )
        ours = solvers.solve(
            ReverseProcess(SDE, score),
            solver,
            start,
            times,
            generator=torch.Generator().manual_seed(1),
        )
        # Roundings of 30 steps, and of Van Loan's covariances, whose entries are h³ of their terms.
        assert torch.allclose(by_hand, ours.state, rtol=0, atol=1e-9)


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


class Zero:
    """A score of zeros, with a table or without."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, z: torch.Tensor, t: object) -> torch.Tensor:
        return z.new_zeros(len(z), self.rows, *z.shape[2:])


class TabulatedZero(Zero):
    def tabulate(self, times: torch.Tensor, like: torch.Tensor) -> Zero:
        return self


class TestMemory:
    """States that a solve holds at a time, beside the caller's and what the score returned."""

    # The state, its noise or the score's contiguous view of it, and the next state; midpoint and
    # Heun have a stage in between.
    @pytest.mark.parametrize("steps", [3, 40])
    @pytest.mark.parametrize("kind", [Zero, TabulatedZero])
    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    @pytest.mark.parametrize(
        ("solver", "states"),
        [
            (solvers.EulerMaruyama(), 3),
            (solvers.SSCS(), 3),
            (solvers.SSCS(score_step="midpoint"), 4),
            (solvers.StochasticHeun(), 4),
        ],
        ids=["EM", "SSCS", "SSCS, midpoint", "Heun"],
    )
    def test_a_solve_holds_few_states_whatever_the_number_of_steps(
        self, solver: solvers.Solver, states: int, make: Any, kind: type[Zero], steps: int
    ) -> None:
        sde = make()
        rows = len(sde.driven)
        process = ReverseProcess(sde, kind(rows))
        start = torch.zeros(8, sde.components, 8000)
        times = solvers.root_times(sde.T, 1e-3, steps)
        with Memory() as memory:
            solvers.solve(process, solver, start, times)
        # Tables and numbers a sample are a hundredth of a state.
        assert memory.peak / (start.numel() * 4) <= states + rows / sde.components + 0.01
