"""`plan` and `solve`: run a solver on a reverse process over a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from cldsde.linear.checks import as_grid_times, check_callable, check_state
from cldsde.linear.random import check_generator
from cldsde.messages import counted
from cldsde.score import Conversion, ReverseProcess, ScoreFunction
from cldsde.score.reverse import KnownScore, check_reverse_process
from cldsde.score.times import KnownTimes

from .base import Callback, Run, Solver, check_same_kind, check_solver
from .combine import Block, combine
from .noise import CheckedNoise, FreshNoise, NoiseSource
from .path_density import PathDensity
from .settings import SamplerSettings
from .solution import Solution, finished, finite_samples, warn_of_failure

Denoise = bool | Literal["step"]
_DIGITS = 10  # of numbers of a described plan


@dataclass(frozen=True, eq=False)
class Plan:
    """Precomputed solver: everything that depends on process, solver and grid alone.

    Create it with `plan`. A plan serves any number of batches, dtypes and devices.
    """

    process: ReverseProcess
    solver: Solver
    times: Tensor  #: The grid, ``(n + 1,)`` float64 on the CPU.
    denoise: Denoise  #: How ``solve`` computes the data unless it is told.
    settings: SamplerSettings | None  #: The settings that the plan was made from, if any.
    tables: Any = field(repr=False)  #: Result of ``solver.prepare``.
    _score_times: KnownTimes | None = field(repr=False)
    _denoisers: dict[Denoise, tuple[Block, Block, KnownTimes]] = field(
        default_factory=dict, repr=False
    )

    def solve(
        self,
        state: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: NoiseSource | None = None,
        denoise: Denoise | None = None,
        t_eval: Tensor | None = None,
        callback: Callback | None = None,
        differentiable: bool = False,
        log_prob: bool = False,
        progress: bool = False,
        warn: bool = True,
    ) -> Solution:
        """Integrate from ``times[0]`` to ``times[-1]``; see `solve` for errors and an example.

        Parameters
        ----------
        state
            Start ``(B, k, *D)``, floating point, e.g. ``sde.prior.sample(...)``; it is not changed.
        generator
            Source of the noise; the same seed gives the same bits on the same machine.
        noise
            A noise source in place of ``generator``.
        denoise
            How ``data`` is computed. None: as the plan's ``denoise`` says. False: the data
            component of the last state. True: the data prediction E[x_0 | z] at the last time.
            ``"step"``: one Euler step of the reverse SDE to time 0 without noise, as in published
            code. It removes no noise from data that no noise drives. Both cost one evaluation.
        t_eval
            Times of the requested states, in the grid's order: times of the grid or, for adaptive
            solvers, any times between its ends. None: the last state only. States are saved before
            any correction that a later step applies. Solvers that merge half-steps (`SSCS`) draw
            extra noise at each requested time, so requesting states changes the random path.
            `GottaGoFast` shortens a step that would pass a requested time, which changes the random
            path from that step on.
        callback
            Called after each step as ``callback(step, t, z)`` with the number of steps so far, the
            time and the state. It must not change the state, and must clone the state to keep it.
            Adaptive solvers call it after each attempted step; if each sample has its own time, t
            has shape ``(B,)``. Return True to stop the solve.
        differentiable
            Record gradients of the state and of the score's parameters. Coefficients of the process
            are constants. Memory then grows with the number of steps.
        log_prob
            Also return the log-density of the path given its start, `Solution.log_prob`, and of
            each step, ``Solution.log_probs``, for solvers whose steps add Gaussian noise last. With
            ``differentiable`` the path is fixed: gradients reach the score's parameters through the
            density alone. See the page "Fine-tune a sampler by reward".
        progress
            Show a progress bar on stderr for steps, or for samples that have arrived.
        warn
            Warn if the solve fails. If False, check `Solution.success`.
        """
        sde = self.process.sde
        if not bool(finite_samples(check_state(state, sde.components, "state")).all()):
            raise ValueError("state must be finite; it holds NaN or infinity")
        if state.requires_grad and torch.is_grad_enabled() and not differentiable:
            raise ValueError(
                "state requires gradients, and differentiable is False; pass differentiable=True, "
                "or state.detach()"
            )
        requested = _checked_stops(t_eval, self.times, any_time=self.solver.facts.adaptive)
        if callback is not None:
            check_callable(callback, "callback", "callable")
        density = self._density if log_prob else None
        source = _noise_source(generator, noise)
        final = self._denoiser(self.denoise if denoise is None else denoise)
        intermediate = callback is not None or bool((requested != self.times[-1]).any())
        used = self._on_grid if intermediate else self
        run = used._run(state, source, requested, callback, progress, density)
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
            done = used.solver.integrate(run)
            check_same_kind(done.state, state, f"{type(used.solver).__name__}.integrate")
            solution = finished(run, done, requested, final)
        if warn and solution.status == 1:
            warn_of_failure(solution.message)
        return solution

    def described(self) -> dict[str, Any]:
        """Everything that decides a sample beside network, process and seed, in JSON types.

        These are the settings, or the solver, the times and how it ends. Numbers are rounded to ten
        digits, so that machines agree on them.
        """
        if self.settings is not None:
            fields = self.settings.as_dict().items()
            return {k: _rounded(x) for k, x in fields if k not in {"process_name", "network"}}
        how = {"times": self.times.tolist(), "denoise": self.denoise}
        return {"solver": repr(self.solver), **_rounded(how)}

    def __str__(self) -> str:
        """The table of the settings, or the solver and its times in one line."""
        if self.settings is not None:
            return str(self.settings)
        first, last = self.times[[0, -1]].tolist()
        steps = "" if self.solver.facts.adaptive else f" in {counted(len(self.times) - 1, 'step')}"
        return f"{self.solver!r} from t = {first:.4g} to {last:.4g}{steps}"

    @property
    def nfev(self) -> int | None:
        """Score evaluations per sample, without ``denoise``; None for adaptive solvers."""
        known = self._score_times
        return None if known is None else int(self.process.score.evaluations(known.times).sum())

    def with_score(self, score: ScoreFunction) -> Plan:
        """The plan with the same tables for another score of its process, such as one class's.

        Raises a ValueError if the score cannot be evaluated at the plan's times.
        """
        other = replace(self, process=ReverseProcess(self.process.sde, score))
        other._check_times()
        return other

    def part(self, samples: slice, shape: Sequence[int]) -> Plan:
        """The plan for some samples of data ``(B, *D)``; see ``Score.part``."""
        score, solver = self.process.score.part(samples, shape), self.solver.part(samples, shape)
        if score is self.process.score and solver is self.solver:
            return self
        return replace(self, process=ReverseProcess(self.process.sde, score), solver=solver)

    @cached_property
    def _on_grid(self) -> Plan:
        """The plan without merged steps, which has a state at each grid time."""
        solver = self.solver.on_grid()
        if solver == self.solver:
            return self
        return plan(self.process, solver, self.times, denoise=self.denoise)

    @cached_property
    def _density(self) -> PathDensity:
        """Gaussian densities of the steps; raise ValueError if they have none."""
        roots = self.solver.noise_roots(self.tables)
        if roots is None:
            deterministic = self.solver.facts.ode_order is not None
            kind = "deterministic" if deterministic else "not Gaussian given the past"
            raise ValueError(
                f"log_prob must be False for {self.solver!r}, whose steps are {kind}. "
                "Use ExponentialMultistep with stochasticity > 0, order 1 or 2 and no corrector, "
                "EulerMaruyama, ExponentialEuler, Ancestral or ReverseDiffusion"
            )
        return PathDensity(roots, self.times)

    def _run(
        self,
        state: Tensor,
        source: NoiseSource,
        requested: Tensor,
        callback: Callback | None,
        progress: bool,
        density: PathDensity | None,
    ) -> Run:
        """Arguments of an integration that stops at the requested times."""
        solver, process, times = self.solver, self.process, self.times
        source = source.along(process.sde, times, lambda: solver.path_noise(process, times))
        source.check(state)
        later = requested[(requested != times[0]) & (requested != times[-1])]
        stops = torch.cat([later, times[-1:]])
        noise = CheckedNoise(source, keep=density is not None)
        tables, known = self.tables, self._score_times
        return Run(process, tables, known, state, times, stops, noise, callback, progress, density)

    def _check_times(self) -> None:
        """Raise ValueError if the score cannot be evaluated at a time of the solver."""
        known = self._score_times
        self.process.score.check_times(self.times[[0, -1]] if known is None else known.times)

    def _denoiser(self, denoise: Denoise) -> Callable[[Tensor], Tensor] | None:
        if denoise is False:
            return None
        if denoise is not True and not (isinstance(denoise, str) and denoise == "step"):
            raise ValueError(f"denoise must be True, False or 'step'; got {denoise!r}")
        if self.times[0] < self.times[-1]:
            raise ValueError(
                f"denoise must be False for an increasing grid, which encodes data; got {denoise!r}"
            )
        self.process.score.check_times(self.times[-1:])
        if denoise not in self._denoisers:
            sde, t = self.process.sde, self.times[-1]
            if float(t) == 0:
                raise ValueError(
                    f"times must end above 0 for denoise={denoise!r}: the distribution given x_0 "
                    "has no density at t = 0; take t > 0"
                )
            if denoise == "step":
                F, G = sde.drift(t), sde.diffusion(t)
                of_state = torch.eye(sde.components, dtype=torch.float64, device="cpu") - t * F
                of_score = t * (G @ G.mT)[:, list(sde.driven)]
            else:
                prediction = Conversion.at(sde, t, "score", "data")
                of_state, of_score = prediction.state, prediction.value
            blocks = of_state[:1].tolist(), of_score[:1].tolist()
            self._denoisers[denoise] = *blocks, KnownTimes(t.unsqueeze(0))
        state, score, known = self._denoisers[denoise]

        def final(z: Tensor) -> Tensor:
            return combine((state, z), (score, KnownScore(self.process, known, z)(z, 0)))[:, 0]

        return final


def _rounded(x: Any) -> Any:
    """JSON types with their real numbers rounded."""
    if isinstance(x, float):
        return float(f"{x:.{_DIGITS}g}")
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list | tuple) else x


def plan(
    process: ReverseProcess,
    solver: Solver | SamplerSettings,
    times: Tensor | None = None,
    *,
    denoise: Denoise | None = None,
) -> Plan:
    """Precompute everything that depends on process, solver and grid alone, for many solves.

    Call `Plan.solve` of the result for each batch. `SamplerSettings` replace solver, times and
    ``denoise``. ``denoise`` is what `Plan.solve` does by default; None: False. See `solve` for the
    other arguments and errors.
    """
    check_reverse_process(process)
    settings: SamplerSettings | None = None
    if isinstance(solver, SamplerSettings):
        if times is not None or denoise is not None:
            raise ValueError("times and denoise must be left out with settings, which have both")
        settings = solver
        solver, times, denoise = settings.solver, settings.times(process.sde), settings.denoise
    check_solver(solver)
    if times is None:
        raise TypeError("times must be a decreasing grid for a solver; got None")
    denoise = False if denoise is None else denoise
    # Leave inference mode, so that the plan's tensors can be used outside of it, too.
    with torch.inference_mode(False), torch.no_grad():
        grid = as_grid_times(times, "times").clone()
        if grid[0] < grid[-1] and not solver.facts.encodes:
            kind = "stochastic" if solver.facts.ode_order is None else "for decreasing grids only"
            raise ValueError(
                f"times must decrease for {solver!r}, which is {kind}; to encode data on an "
                "increasing grid take a deterministic solver: ExponentialMultistep(), "
                "ProbabilityFlow() or EDMHeun()"
            )
        tables = solver.prepare(process, grid)
        score_times = solver.evaluation_times(process, grid)
        known = None if score_times is None else KnownTimes(score_times)
        made = Plan(process, solver, grid, denoise, settings, tables, known)
        made._check_times()
        made._denoiser(denoise)
    return made


def solve(
    process: ReverseProcess,
    solver: Solver,
    state: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: NoiseSource | None = None,
    denoise: Denoise = False,
    t_eval: Tensor | None = None,
    callback: Callback | None = None,
    differentiable: bool = False,
    log_prob: bool = False,
    progress: bool = False,
    warn: bool = True,
) -> Solution:
    """Integrate a reverse process from ``times[0]`` down to ``times[-1]``, or encode data.

    On an increasing grid a deterministic solver follows the probability flow from states near the
    data up to the noise that maps to them. For several batches, create a `plan`: this function is
    ``plan(process, solver, times).solve(state, …)``.

    Parameters
    ----------
    process, solver
        The reverse process (forward SDE and score), and the method, e.g. ``EulerMaruyama()``.
    state
        Start ``(B, k, *D)``, floating point, e.g. ``sde.prior.sample(...)``; it is not changed.
    times
        Decreasing grid ``(n + 1,)`` in [0, T], e.g. ``quadratic_times(sde.T, 1e-3, 50)``; adaptive
        solvers use its two ends. Increasing, e.g. ``quadratic_times(sde.T, 1e-3, 50).flip(0)``, for
        deterministic solvers: `ExponentialMultistep`, `ProbabilityFlow` and `EDMHeun`.
    generator, noise, denoise, t_eval, callback, differentiable, log_prob, progress, warn
        See `Plan.solve`.

    Raises
    ------
    TypeError, ValueError
        All arguments are checked before the score is evaluated. An error is raised if

        - an argument has the wrong type;
        - the state does not fit the process, or the solver does not apply to it;
        - the grid neither decreases nor increases;
        - the grid increases, and the solver is stochastic or ``denoise`` is set;
        - ``log_prob`` is set and the solver's steps are not Gaussian;
        - ``t_eval`` is not on the grid;
        - both ``generator`` and ``noise`` are given.

    Warns
    -----
    SolveWarning
        If the solve fails. `Solution.raise_for_failure` raises an error instead.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> data = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    >>> g = torch.Generator().manual_seed(0)
    >>> times = solvers.quadratic_times(sde.T, 1e-3, 50)
    >>> start = sde.prior.sample((1000, 1), generator=g)
    >>> process = ReverseProcess(sde, data.score(sde))
    >>> solvers.solve(process, solvers.SSCS(), start, times, generator=g)
    Solution(success=True, nfev=50, state=(1000, 2, 1), message='reached the end of the grid')
    >>> solvers.solve(process, solvers.SSCS(), start, times, t_eval=times[::10]).y.shape
    torch.Size([6, 1000, 2, 1])
    """
    return plan(process, solver, times).solve(
        state,
        generator=generator,
        noise=noise,
        denoise=denoise,
        t_eval=t_eval,
        callback=callback,
        differentiable=differentiable,
        log_prob=log_prob,
        progress=progress,
        warn=warn,
    )


def _checked_stops(t_eval: Tensor | None, grid: Tensor, *, any_time: bool) -> Tensor:
    """Check the times of requested states, and return them as float64 on the CPU."""
    if t_eval is None:
        return grid[-1:]
    low, high = (float(x) for x in grid.aminmax())
    stops = as_grid_times(t_eval, "t_eval", high, least=1)
    if len(stops) > 1 and (stops[0] < stops[1]) != (grid[0] < grid[1]):
        msg = "t_eval must run in the direction of times; got the opposite: pass t_eval.flip(0)"
        raise ValueError(msg)
    outside = stops < low if any_time else ~torch.isin(stops, grid)
    if bool(outside.any()):
        allowed = f"lie in [{low:g}, {high:g}]" if any_time else "be times of the grid"
        hint = (
            "" if t_eval.dtype == torch.float64 else f"; its dtype is {t_eval.dtype}: use float64"
        )
        raise ValueError(f"t_eval must {allowed}; got {stops[outside].tolist()}{hint}")
    return stops


def _noise_source(generator: torch.Generator | None, noise: object) -> NoiseSource:
    check_generator(generator, several=False)
    if noise is None:
        return FreshNoise(generator)
    if not isinstance(noise, NoiseSource):
        msg = f"noise must be a NoiseSource, such as FreshNoise(generator); got {noise!r}"
        raise TypeError(msg)
    if generator is not None:
        raise ValueError("generator and noise are alternatives; got both")
    return noise
