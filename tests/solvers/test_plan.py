"""`plan`: tables once, the score called, one plan for any batch; and what a solve refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from cldsde import (
    CLD,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    MixedScore,
    ReverseProcess,
    solvers,
)
from cldsde.score import Conversion
from cldsde.solvers.authoring import GridSolver, Solver
from probes import generator, start, untouchable

# Few attempts are as good a test as many.
SOLVERS: dict[str, Any] = {
    name: dataclasses.replace(solver, rtol=0.05, atol=0.05) if solver.facts.adaptive else solver
    for name, solver in solvers.named_solvers().items()
}
ON_GRID = [name for name, solver in SOLVERS.items() if isinstance(solver, GridSolver)]
GRID = solvers.root_times(1.0, 0.05, 5)

every_solver = pytest.mark.parametrize("name", list(SOLVERS))
every_grid_solver = pytest.mark.parametrize("name", ON_GRID)


class Network(nn.Module):
    """A smooth network with a parameter for data of any shape."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.outputs = len(sde.driven)
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, inputs: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        outputs = inputs.shape[1] * self.outputs // 2 if self.outputs > 1 else 2
        return torch.tanh(self.slope * inputs[:, -outputs:] + 0.1 * clock[:, None])


def sde_for(name: str) -> LinearSDE:
    return VPSDE() if name.startswith("edm") else CLD()


def mixed(sde: LinearSDE, kind: type[MixedScore] = MixedScore) -> MixedScore:
    return kind(Network(sde), sde, torch.tensor(0.3), torch.tensor(0.5))


def mixture(sde: LinearSDE) -> Any:
    data = GaussianMixture(
        [0.4, 0.6], [[-1.0, 0.3], [0.8, 0.0]], 0.1 * torch.eye(2).expand(2, 2, 2)
    )
    return data.score(sde)


def plain(sde: LinearSDE) -> Any:
    driven = list(sde.driven)
    return lambda z, t: -(1 + t[:, None, None] * z[:, driven].cos()) * z[:, driven]


SCORES: dict[str, Callable[[LinearSDE], Any]] = {"mixture": mixture, "mixed": mixed, "plain": plain}
every_score = pytest.mark.parametrize("score", list(SCORES))

TABLES = [
    *((LinearSDE, name) for name in ("marginal", "transition", "transition_matrix", "posterior")),
    *((LinearSDE, name) for name in ("noise_root", "drift", "diffusion", "log_snr")),
    (Conversion, "at"),
]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of what tables are made of."""
    calls: Counter[str] = Counter()

    def counting(name: str, method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return method(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in TABLES:
            method = owner.__dict__[name]
            if isinstance(method, classmethod):
                patch.setattr(owner, name, counting(name, getattr(owner, name)))
            else:
                patch.setattr(owner, name, counting(name, method))
        yield calls


class TestTables:
    """What depends on process, solver and grid is computed once."""

    @every_score
    @every_grid_solver
    def test_a_second_solve_computes_none(
        self, name: str, score: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sde = sde_for(name)
        sampler = solvers.plan(ReverseProcess(sde, SCORES[score](sde)), SOLVERS[name], GRID)

        def solve(batch: int, seed: int, dtype: torch.dtype, **options: Any) -> None:
            state = start(sde, (batch, 2), dtype)
            sampler.solve(state, generator=generator(seed), **options)

        with counted(monkeypatch) as calls:
            solvers.plan(sampler.process, SOLVERS[name], GRID)
        assert calls
        wanted: list[dict[str, Any]] = [{}, {"denoise": True}, {"denoise": "step"}]
        wanted += [{"t_eval": GRID[1:]}, {"callback": lambda *_: None}]
        for options in wanted:
            solve(3, 0, torch.float32, **options)
        with counted(monkeypatch) as calls:
            for options in wanted:
                solve(5, 1, torch.float32, **options)
        assert not calls
        with counted(monkeypatch) as calls:
            solve(5, 1, torch.float64, denoise=True)
        # A score of the package makes its own table again for another dtype, at the times of the
        # grid and at the last time.
        assert set(calls) <= {"marginal"}
        assert calls.total() == (0 if score == "plain" else 2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_solver
    def test_a_plan_gives_the_bits_of_solve(self, name: str, dtype: torch.dtype) -> None:
        sde = sde_for(name)
        process = ReverseProcess(sde, mixture(sde))
        sampler = solvers.plan(process, SOLVERS[name], GRID)
        for batch in (4, 3):
            state = start(sde, (batch, 2), dtype)
            options: dict[str, Any] = {"denoise": True}
            planned = sampler.solve(state, generator=generator(1), **options)
            alone = solvers.solve(
                process, SOLVERS[name], state, GRID, generator=generator(1), **options
            )
            assert torch.equal(planned.state, alone.state)
            assert torch.equal(planned.data, alone.data)
            assert planned.nfev == alone.nfev

    @every_solver
    def test_a_plan_knows_its_evaluations(self, name: str) -> None:
        sde, solver = sde_for(name), SOLVERS[name]
        sampler = solvers.plan(ReverseProcess(sde, plain(sde)), solver, GRID.float())
        assert sampler.times.dtype == torch.float64
        assert torch.equal(sampler.times, GRID.float().double())
        found = sampler.solve(start(sde)).nfev
        assert sampler.nfev == (None if solver.facts.adaptive else found)
        assert "tables" not in repr(sampler)

    def test_what_makes_no_plan_is_refused(self) -> None:
        process: Any = ReverseProcess(CLD(), untouchable)
        with pytest.raises(TypeError, match="process must be a ReverseProcess"):
            solvers.plan(CLD(), solvers.SSCS(), GRID)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="write it with parentheses"):
            solvers.plan(process, solvers.SSCS, GRID)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="times must decrease"):
            solvers.plan(process, solvers.SSCS(), GRID.flip(0))
        with pytest.raises(ValueError, match="EDMHeun needs a process of one component"):
            solvers.plan(process, solvers.EDMHeun(), GRID)


class Guided(MixedScore):
    """A subclass with a forward of its own."""

    def forward(self, z: torch.Tensor, t: Any, **options: Any) -> torch.Tensor:
        return 1.2 * super().forward(z, t, **options) - 0.1 * z[:, list(self.sde.driven)]


class Wrapped(nn.Module):
    """A module that calls another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 1.1 * self.model(z, t)


def with_hook(sde: LinearSDE) -> nn.Module:
    model = mixed(sde)
    model.register_forward_hook(lambda module, args, output: 1.1 * output)
    return model


def with_hook_on_state(sde: LinearSDE) -> nn.Module:
    model = mixed(sde)
    model.register_forward_pre_hook(lambda module, args: (1.05 * args[0], *args[1:]))
    return model


def with_hook_on_time(sde: LinearSDE) -> nn.Module:
    model = mixed(sde)
    model.register_forward_pre_hook(lambda module, args: (args[0], 0.9 * args[1]))
    return model


def compiled(sde: LinearSDE) -> Any:
    return torch.compile(Wrapped(mixed(sde)), backend="eager")


# What each makes of the score of an untouched model.
CHANGES: dict[str, tuple[Callable[[LinearSDE], Any], Callable[..., torch.Tensor]]] = {
    "subclass": (
        lambda sde: mixed(sde, Guided),
        lambda model, z, t: 1.2 * model(z, t) - 0.1 * z[:, list(model.sde.driven)],
    ),
    "forward hook": (with_hook, lambda model, z, t: 1.1 * model(z, t)),
    "pre-hook on the state": (with_hook_on_state, lambda model, z, t: model(1.05 * z, t)),
    "pre-hook on the time": (with_hook_on_time, lambda model, z, t: model(z, 0.9 * t)),
    "wrapper": (lambda sde: Wrapped(mixed(sde)), lambda model, z, t: 1.1 * model(z, t)),
    "compiled": (compiled, lambda model, z, t: 1.1 * model(z, t)),
}


class TestCalls:
    """The score is called, so that what is done to a module acts."""

    @pytest.mark.parametrize("change", list(CHANGES))
    @every_solver
    def test_changes_of_a_model_change_samples_as_they_change_calls(
        self, name: str, change: str
    ) -> None:
        sde = sde_for(name)
        make, meaning = CHANGES[change]
        model, untouched = make(sde), mixed(sde)
        state = start(sde)

        def sample(score: Any) -> torch.Tensor:
            process = ReverseProcess(sde, score)
            return solvers.solve(
                process, SOLVERS[name], state, GRID, generator=generator(), denoise=True
            ).data

        found = sample(model)
        assert torch.equal(found, sample(lambda z, t: meaning(untouched, z, t)))
        assert not torch.allclose(found, sample(untouched), rtol=0, atol=1e-3)

    @every_solver
    def test_a_plan_follows_a_model_whose_state_is_loaded(self, name: str) -> None:
        sde = sde_for(name)
        model = mixed(sde)
        other = MixedScore(Network(sde), sde, torch.tensor(-0.1), torch.tensor(1.5))
        sampler = solvers.plan(ReverseProcess(sde, model), SOLVERS[name], GRID)
        state = start(sde)
        before = sampler.solve(state, generator=generator()).state
        model.load_state_dict(other.state_dict())
        after = sampler.solve(state, generator=generator()).state
        expected = solvers.solve(
            ReverseProcess(sde, other), SOLVERS[name], state, GRID, generator=generator()
        ).state
        assert torch.equal(after, expected)
        assert not torch.allclose(after, before, rtol=0, atol=1e-3)

    @pytest.mark.parametrize(
        ("without", "planned"), [(torch.no_grad, "before"), (torch.inference_mode, "within")]
    )
    @every_score
    @every_solver
    def test_a_plan_used_without_gradients_serves_with_them(
        self, name: str, score: str, without: Any, planned: str
    ) -> None:
        sde = sde_for(name)
        process = ReverseProcess(sde, SCORES[score](sde))

        def gradient(sampler: solvers.Plan) -> torch.Tensor:
            z = start(sde).requires_grad_()
            solution = sampler.solve(
                z, generator=generator(), denoise=True, differentiable=True, t_eval=GRID[1:]
            )
            (found,) = torch.autograd.grad(solution.data.sum() + solution.y.sum(), z)
            return found

        if planned == "before":
            sampler = solvers.plan(process, SOLVERS[name], GRID)
        with without():
            if planned == "within":
                sampler = solvers.plan(process, SOLVERS[name], GRID.clone())
            sampler.solve(start(sde), generator=generator(), denoise=True, t_eval=GRID[1:])
        expected = gradient(solvers.plan(process, SOLVERS[name], GRID))
        assert torch.equal(gradient(sampler), expected)
        assert expected.isfinite().all()


def returning(made: Callable[[torch.Tensor], Any]) -> Solver:
    """A solver whose step returns what is made of its state."""

    class Made(solvers.EulerMaruyama):
        def step(self, z: torch.Tensor, *rest: Any) -> Any:
            return made(super().step(z, *rest)[0])

    return Made()


class TestFailures:
    """What goes wrong is said."""

    @pytest.mark.parametrize("planned", [False, True])
    @pytest.mark.parametrize(
        "solver",
        [
            solvers.EulerMaruyama(),
            solvers.ProbabilityFlow(),
            solvers.ProbabilityFlow(pace="sample"),
            solvers.GottaGoFast(),
            solvers.TorchDiffEq(),
        ],
        ids=repr,
    )
    def test_a_failed_solve_warns_once_and_can_be_made_an_error(
        self, solver: Solver, planned: bool
    ) -> None:
        sde = CLD()
        process = ReverseProcess(sde, lambda z, t: torch.full_like(z[:, 1:], torch.nan))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if planned:
                solution = solvers.plan(process, solver, GRID).solve(
                    start(sde), t_eval=GRID[[2, 5]]
                )
            else:
                solution = solvers.solve(process, solver, start(sde), GRID, t_eval=GRID[[2, 5]])
        (warning,) = caught
        assert warning.category is solvers.SolveWarning
        assert str(warning.message) == f"the solve failed: {solution.message}"
        assert solution.status == 1
        with pytest.raises(FloatingPointError) as error:
            solution.raise_for_failure()
        assert str(error.value) == solution.message

    def test_a_solve_that_does_not_fail_is_returned(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, plain(sde))
        solution = solvers.solve(process, solvers.SSCS(), start(sde), GRID)
        assert solution.raise_for_failure() is solution
        stopped = solvers.solve(
            process, solvers.SSCS(), start(sde), GRID, callback=lambda step, t, z: True
        )
        assert stopped.status == 2
        assert stopped.raise_for_failure() is stopped

    @every_solver
    def test_states_that_want_gradients_which_are_not_recorded_are_refused(self, name: str) -> None:
        sde = sde_for(name)
        state = start(sde).requires_grad_()
        sampler = solvers.plan(ReverseProcess(sde, untouchable), SOLVERS[name], GRID)
        with pytest.raises(ValueError, match=r"pass differentiable=True, or state\.detach\(\)"):
            sampler.solve(state)

    @pytest.mark.parametrize(
        ("made", "error", "got"),
        [
            (lambda z: (z[:1], ()), ValueError, r".*\(1, 2, 2\)"),
            (lambda z: (z[:, :1], ()), ValueError, r".*\(3, 1, 2\)"),
            (lambda z: (z.float(), ()), ValueError, ".*float32"),
            (lambda z: (z.to("meta"), ()), ValueError, ".*meta"),
            (lambda z: (None, ()), (TypeError, ValueError), "NoneType"),
            (lambda z: z, TypeError, "Tensor"),
            (lambda z: (z, None), TypeError, ""),
            (lambda z: (z, [z]), TypeError, ""),
            (lambda z: (z, (), ()), TypeError, ""),
            (lambda z: None, TypeError, "NoneType"),
        ],
    )
    def test_steps_that_return_something_else_are_refused(
        self, made: Any, error: Any, got: str
    ) -> None:
        sde = CLD()
        process = ReverseProcess(sde, plain(sde))
        with pytest.raises(error, match=rf"Made\.step must return .*; got {got}"):
            solvers.solve(process, returning(made), start(sde), GRID)

    @every_solver
    def test_scores_on_another_device_are_refused(self, name: str) -> None:
        sde = sde_for(name)
        driven = list(sde.driven)
        process = ReverseProcess(sde, lambda z, t: z[:, driven].to("meta"))
        with pytest.raises(ValueError, match="on the state's device, cpu; got meta"):
            solvers.solve(process, SOLVERS[name], start(sde), GRID)
