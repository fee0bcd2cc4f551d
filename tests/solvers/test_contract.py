"""The contract of every named solver, on every process that it applies to.

Elsewhere: plans and calls of the score in test_plan.py, devices and waiting in test_device.py,
callbacks and failures in test_solve.py, orders in test_orders.py.
"""

import copy
import functools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import probes
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, ReverseProcess, solvers
from cldsde.solvers import SampleNoise
from cldsde.solvers.authoring import GridSolver
from probes import Recording, Smooth, few_examples, generator, noting, start, untouchable
from strategies import dtypes, shapes
from tolerances import rounding

SOLVERS = probes.named_solvers()
PROCESSES = {"VP": VPSDE(0.5, 5.0), "VE": VESDE(0.05, 5.0), "CLD": CLD(1.0)}
PROCESSES |= {"PSLD": PSLD(2.0), "HOLD": HOLD(1.0)}
# One step length for the batch: torchdiffeq knows no other.
SHARED = "torchdiffeq-dopri5"
SEEDS = [3, 1, 4, 15]
END = 0.05
GRID = solvers.root_times(1.0, END, 5)
KEPT = GRID[[0, 2, 5]]


def applies(method, name):
    """Whether a solver applies to a process, as its documentation says."""
    components, stationary = PROCESSES[name].components, PROCESSES[name].stationary_covariance
    if method.startswith("edm"):
        return components == 1
    if method.startswith("splitting"):  # position and velocity
        return components == 2 and stationary is not None
    return not method.startswith("sscs") or stationary is not None


def home(method):
    """A process that the solver applies to."""
    return "VP" if method.startswith("edm") else "CLD"


CASES = [(method, name) for method in SOLVERS for name in PROCESSES if applies(method, name)]
every_case = pytest.mark.parametrize(("method", "name"), CASES)
every_solver = pytest.mark.parametrize("method", list(SOLVERS))


@functools.cache
def process_of(name):
    return ReverseProcess(PROCESSES[name], Smooth(PROCESSES[name]))


@functools.cache
def plan_of(method, name):
    return solvers.plan(process_of(name), SOLVERS[method], GRID)


def solve(method, name, state, **options):
    """A solve that succeeds; each sample has its own noise unless a generator is given."""
    if "generator" not in options:
        options = {"noise": SampleNoise(SEEDS[: len(state)]), **options}
    solution = plan_of(method, name).solve(state, **options)
    assert solution.success
    return solution


class Run:
    """One solve, and the arguments of its score."""

    def __init__(self, method, name):
        process = process_of(name)
        self.state = start(process.sde, (4, 2))
        self.before = self.state.clone()
        self.score = Recording(process.score)
        self.plan = plan_of(method, name).with_score(self.score)
        self.solution = self.plan.solve(self.state, noise=SampleNoise(SEEDS), denoise=True)


run = functools.cache(Run)


def close(found, expected):
    """Whether two results agree to rounding, relative to the largest number.

    Five steps of these problems, which contract, end within 40 eps of each other.
    """
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = rounding(256, max(1.0, size), found.dtype)
    return torch.allclose(found.to(expected), expected, rtol=0, atol=tolerance)


def same(method, found, expected):
    """Equal bits; to rounding for adaptive solvers, which sum errors in the order of the axes."""
    return (close if SOLVERS[method].facts.adaptive else torch.equal)(found, expected)


@pytest.mark.covering
@every_case
def test_evaluations_are_counted_and_lie_between_the_ends(method, name):
    one, solver = run(method, name), SOLVERS[method]
    times, counts = one.score.times, one.solution.stats["nfev"]
    assert len(times) == one.solution.nfev == int(counts.max())
    for own, count in zip(torch.stack(times, 1), counts.tolist(), strict=True):
        assert (own[count - 1 :] == END).all()  # of a sample that has arrived
    assert {t.dtype for t in times} == {torch.float64}
    assert [t for t in torch.cat(times).tolist() if not END <= t <= 1] == []
    assert all(t.shape == (len(z),) for t, z in zip(times, one.score.states, strict=True))
    assert (times[-1] == END).all()  # of the data prediction
    announced = solver.evaluation_times(one.plan.process, GRID)
    if solver.facts.adaptive:
        assert announced is one.plan.nfev is None
        return
    assert [t[0].item() for t in times[:-1]] == announced.tolist()
    assert (counts == len(announced) + 1).all()
    assert one.plan.nfev == len(announced)
    # A letter evaluates the score if noise reaches its component.
    if not (method.startswith("splitting") and len(PROCESSES[name].driven) == 2):
        assert len(announced) == solver.facts.nfe_per_step * (len(GRID) - 1)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("method", "name"), [case for case in CASES if SOLVERS[case[0]].facts.score_at_start]
)
def test_declared_evaluations_are_at_the_start_of_each_step(method, name):
    """Callers that evaluate a network once per step rely on it."""
    one, calls = run(method, name), []
    solve(method, name, one.state, callback=noting(calls))
    # The last evaluation is the data prediction at the end.
    assert [t[0].item() for t in one.score.times] == GRID.tolist()
    at_starts = [one.state, *(z for _, _, z in calls)]
    assert all(map(torch.equal, one.score.states, at_starts))


@pytest.mark.covering
@every_case
def test_arguments_and_seen_states_are_unchanged(method, name):
    one = run(method, name)
    assert torch.equal(one.state, one.before)
    for given_state, copied in zip(one.score.given, one.score.states, strict=True):
        assert torch.equal(given_state, copied)


@every_solver
def test_a_score_may_write_to_its_argument(method):
    process, state = process_of(home(method)), start(PROCESSES[home(method)])
    before = state.clone()

    def score(z, t):
        value = process.score(z, t)
        z.zero_()
        return value

    plan_of(method, home(method)).with_score(score).solve(state, generator=generator(), warn=False)
    assert torch.equal(state, before)


@pytest.mark.covering
@every_case
def test_denoising_is_the_data_prediction(method, name):
    one = run(method, name)
    assert close(one.solution.data, one.plan.process.data_prediction(one.solution.state, END))
    plain = solve(method, name, one.state)
    assert torch.equal(plain.state, one.solution.state)
    assert torch.equal(plain.data, plain.state[:, 0])
    assert torch.equal(plain.stats["nfev"] + 1, one.solution.stats["nfev"])


@pytest.mark.one_in(2)
@few_examples
@given(batch=st.integers(0, 3), axes=shapes(side=3), dtype=dtypes())
@every_solver
def test_results_are_of_the_kind_of_the_state_and_data_axes_are_alike(method, batch, axes, dtype):
    name = home(method)
    state = start(PROCESSES[name], (batch, *axes), dtype)
    solution = solve(method, name, state, generator=generator(), t_eval=KEPT, denoise=True)
    assert solution.state.shape == state.shape
    assert solution.y.shape == (3, *state.shape)
    assert solution.data.shape == (batch, *axes)
    assert solution.stats["nfev"].shape == solution.stats["success"].shape == (batch,)
    assert {x.dtype for x in (solution.state, solution.data, solution.y)} == {dtype}
    assert torch.equal(solution.t, KEPT)
    flat = state.reshape(*state.shape[:2], math.prod(axes))
    other = solve(method, name, flat, generator=generator(), t_eval=KEPT, denoise=True)
    assert same(method, solution.y.reshape(other.y.shape), other.y)
    assert same(method, solution.data.reshape(other.data.shape), other.data)


@few_examples
@given(chosen=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@pytest.mark.parametrize("method", [method for method in SOLVERS if method != SHARED])
def test_a_sample_is_the_same_in_any_batch(method, chosen):
    name = home(method)
    one = run(method, name)
    noise = SampleNoise([SEEDS[i] for i in chosen])
    other = solve(method, name, one.state[chosen], noise=noise, denoise=True)
    assert torch.equal(other.stats["nfev"], one.solution.stats["nfev"][chosen])
    assert same(method, other.state, one.solution.state[chosen])
    assert same(method, other.data, one.solution.data[chosen])


@pytest.mark.covering
@every_case
def test_a_seed_fixes_the_bits_and_noise_matters_if_declared(method, name):
    state, before = start(PROCESSES[name]), torch.random.get_rng_state()
    seeds = (1, 1, 2)
    one, again, other = (solve(method, name, state, generator=generator(x)).state for x in seeds)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again)
    if SOLVERS[method].facts.ode_order is not None:
        assert torch.equal(one, other)
    else:
        assert (one[:, 0] != other[:, 0]).all()  # no sample keeps a number


@every_solver
def test_single_precision_agrees_with_double_and_autocast_changes_nothing(method):
    name = home(method)
    one = run(method, name)
    single = solve(method, name, one.state.float(), denoise=True)
    assert close(single.data, one.solution.data)
    with torch.autocast("cpu", torch.bfloat16):
        lower = solve(method, name, one.state.float(), denoise=True)
    assert torch.equal(lower.data, single.data)


# Churning adds noise that depends on the number of steps.
@pytest.mark.parametrize("method", [x for x in SOLVERS if x != "edm-heun-churn"])
def test_states_are_those_of_solves_that_end_at_their_times(method):
    name, calls = home(method), []
    solver, state = SOLVERS[method].on_grid(), start(PROCESSES[name])
    whole = solve(method, name, state, t_eval=KEPT, callback=noting(calls))
    assert torch.equal(whole.y[0], state)
    assert torch.equal(whole.y[2], whole.state)
    assert torch.equal(calls[-1][2], whole.state)
    noise = SampleNoise(SEEDS[:3])
    shorter = solvers.solve(process_of(name), solver, state, GRID[:3], noise=noise)
    if method != SHARED:  # whose steps are interpolated
        assert close(shorter.state, whole.y[1])
    if isinstance(solver, GridSolver):
        assert [call[:2] for call in calls] == list(enumerate(GRID.tolist()))[1:]
        assert torch.equal(calls[1][2], whole.y[1])
        if solver == SOLVERS[method]:
            assert torch.equal(solve(method, name, state).state, whole.state)


@every_solver
def test_one_sample_without_a_finite_score_fails_alone(method):
    process, state = process_of(home(method)), start(PROCESSES[home(method)])
    state[1] += 1e6

    def score(z, t):
        lost = (z.abs() > 1e5).flatten(1).any(1).reshape(-1, *(1,) * (z.ndim - 1))
        return torch.where(lost, math.nan, process.score(z, t))

    plan = plan_of(method, home(method)).with_score(score)
    options = {"denoise": True, "t_eval": GRID[[0, -1]]}
    with pytest.warns(solvers.SolveWarning, match="the solve failed") as caught:
        solution = plan.solve(state, noise=SampleNoise(SEEDS[:3]), **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert solution.status == 1
    with pytest.raises(FloatingPointError):
        solution.raise_for_failure()
    assert torch.equal(solution.y[0], state)
    assert solution.y[1, 1].isnan().all()
    assert not solution.stats["success"][1]
    if method != SHARED:
        others = [0, 2]
        assert solution.stats["success"].tolist() == [True, False, True]
        noise = SampleNoise([SEEDS[i] for i in others])
        alone = solve(method, home(method), state[others], noise=noise, **options)
        assert close(solution.data[others], alone.data)
        assert close(solution.y[:, others], alone.y)
        assert torch.equal(solution.stats["nfev"][others], alone.stats["nfev"])


GAUSSIAN_STEPS = {"euler-maruyama", "exponential-euler", "reverse-diffusion", "ancestral"}
GAUSSIAN_STEPS |= {"multistep-1-sde", "multistep-2-sde"}


@every_solver
def test_paths_have_a_density_if_steps_are_gaussian_and_otherwise_it_is_rejected(method):
    plan, state = plan_of(method, home(method)), start(PROCESSES[home(method)], (3, 2, 2))
    density = functools.partial(solve, method, home(method), log_prob=True)
    gaussian = plan.solver.noise_roots(plan.tables) is not None
    assert gaussian == (method in GAUSSIAN_STEPS), "GAUSSIAN_STEPS lists solvers with noise_roots"
    if gaussian:
        found = density(state).log_prob
        assert found.isfinite().all()
        assert close(found, density(state.flatten(2)).log_prob)
    else:
        with pytest.raises(ValueError, match=r"log_prob must be False for .* whose steps"):
            density(state)


class Memory(TorchDispatchMode):
    """Bytes of all tensors that are made while it is entered: now, and at the peak."""

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                storage = made.untyped_storage()
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


# The state, a stage or the prediction before, and the next state; Heun's method in EDM holds two
# slopes, and multistep methods of order 3 or with corrector more predictions.
# A flow holds its slopes and eight states. The number of Gotta Go Fast is measured: it holds the
# increments of steps that it rejected.
STATES = dict.fromkeys(["multistep-3", "multistep-3-sde", "multistep-2-corrector"], 4)
STATES |= {"multistep-3-corrector": 5}
STATES |= {"edm-heun": 4, "edm-heun-churn": 4, "gotta-go-fast": 14}
STATES |= {"probability-flow-bosh3": 12, "probability-flow": 15, "probability-flow-dopri8": 21}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", [name for name in SOLVERS if not name.startswith("torch")])
def test_a_solve_holds_few_states(method):
    sde = PROCESSES["VP" if method.startswith("multistep") else home(method)]
    rows = len(sde.driven)
    process = ReverseProcess(sde, lambda z, t: z.new_zeros(len(z), rows, *z.shape[2:]))
    state = torch.zeros(8, sde.components, 8000)
    for steps in (3, 6):
        plan = solvers.plan(process, SOLVERS[method], solvers.root_times(1.0, 1e-3, steps))
        with Memory() as memory:
            plan.solve(state, generator=generator())
        # Besides the score's result. Tables and numbers per sample are a hundredth of a state.
        states = memory.peak / (state.numel() * 4) - rows / sde.components
        assert states <= STATES.get(method, 3) + 0.01


# Ten times the errors of third derivatives, h² = 1e-10, and of rounding over h, 1e-16 / 1e-7.
DIFFERENCES = 1e-8


@pytest.mark.one_in(2)
@every_solver
def test_gradients_are_finite_differences_and_not_recorded_by_default(method):
    process, solver = copy.deepcopy(process_of(home(method))), SOLVERS[method]
    if solver.facts.adaptive and method != "gotta-go-fast":
        # The derivative of step lengths that follow the state is left out.
        solver = solver.with_step(0.1)
    plan, score = solvers.plan(process, solver, GRID), process.score.function
    state = start(process.sde, (2, 2))
    weights = torch.randn(2, 2, generator=generator(5), dtype=torch.float64)
    along = torch.randn(state.shape, generator=generator(6), dtype=torch.float64)

    def value(z):
        noise = SampleNoise(SEEDS[:2])
        data = plan.solve(z, noise=noise, denoise="step", differentiable=True).data
        return (weights * data).sum()

    z = state.clone().requires_grad_()
    by_state, by_slope = torch.autograd.grad(value(z), [z, score.slope])
    # GGF's step lengths have ten bits: they jump, the less likely the smaller the change.
    h = 1e-7 if method == "gotta-go-fast" else 1e-5
    with torch.no_grad():
        assert not plan.solve(z, noise=SampleNoise(SEEDS[:2]), differentiable=True).y.requires_grad
        steps = [float(value(state + s * h * along)) for s in (1, -1)]
        slopes = []
        for change in (h, -2 * h):
            score.slope.add_(change)
            slopes.append(float(value(state)))
        score.slope.add_(h)
    assert not plan.solve(state, noise=SampleNoise(SEEDS[:2])).state.requires_grad
    for found, (more, less) in ((float((by_state * along).sum()), steps), (by_slope, slopes)):
        difference = (more - less) / (2 * h)
        assert abs(float(found) - difference) <= DIFFERENCES * (1 + abs(difference))
        assert abs(difference) > 1e-5


def bad(message, error=ValueError, **change):
    name = probes.name_of_case(next(iter(change.items())))[:60]
    return pytest.param(change, error, message, id=name)


STATE = start(CLD())
NO_TIMES = [[], [0.5, 0.5], [1.0, 0.01], [1.5]]


@pytest.mark.covering
@pytest.mark.parametrize("method", ["euler-maruyama", "sscs", "gotta-go-fast", "probability-flow"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        bad("state must", state=torch.zeros(3, 1, 2)),
        bad("state must", TypeError, state=torch.zeros(3, 2, 2, dtype=torch.int64)),
        bad("state must be finite", state=STATE * math.nan),
        bad(r"pass differentiable=True, or state\.detach", state=STATE.clone().requires_grad_()),
        bad("at least 2 decreasing times", times=torch.ones(1)),
        bad(r"got 0\.5 before 0\.5", times=torch.tensor([1.0, 0.5, 0.5, 0.1])),
        bad("times must lie in", times=torch.tensor([1.5, math.nan])),
        bad("times must be a tensor", TypeError, times=[1.0, 0.5]),
        bad("process must be a ReverseProcess; got", TypeError, process=CLD()),
        bad("solver must be .*parentheses", TypeError, solver=solvers.SSCS),
        bad("noise must be", TypeError, noise=42),
        bad("generator must be", TypeError, generator=42),
        bad("alternatives; got both", noise=solvers.FreshNoise(), generator=generator()),
        bad("one seed per sample, 3; got 7 seeds", noise=SampleNoise(range(7))),
        bad("denoise must be True, False or 'step'", denoise="full"),
        *(bad("times must end above 0", times=GRID - END, denoise=x) for x in (True, "step")),
        bad("callback must be callable", TypeError, callback=3),
        *(bad("t_eval must", t_eval=torch.tensor(x)) for x in NO_TIMES),
    ],
)
def test_bad_arguments_raise_before_the_score_is_evaluated(method, change, error, message):
    process = ReverseProcess(CLD(), untouchable)
    arguments = {"process": process, "solver": SOLVERS[method], "state": STATE, "times": GRID}
    with pytest.raises(error, match=message):
        solvers.solve(**(arguments | change))


@every_solver
def test_increasing_grids_and_times_off_the_grid_are_taken_as_declared(method):
    facts, state = SOLVERS[method].facts, start(PROCESSES[home(method)])
    process = ReverseProcess(PROCESSES[home(method)], untouchable)
    if facts.encodes:
        assert solvers.plan(process, SOLVERS[method], GRID.flip(0)).times[0] == END
    else:
        why = "stochastic" if facts.ode_order is None else "for decreasing grids only"
        with pytest.raises(ValueError, match=f"times must decrease for .*, which is {why}"):
            solvers.plan(process, SOLVERS[method], GRID.flip(0))
    if facts.adaptive:
        assert solve(method, home(method), state, t_eval=GRID[1:2] + 1e-3).y.isfinite().all()
    else:
        with pytest.raises(ValueError, match="t_eval must be times of the grid"):
            solvers.plan(process, SOLVERS[method], GRID).solve(state, t_eval=GRID[1:2] + 1e-15)


@every_solver
def test_bad_scores_are_rejected(method):
    process = ReverseProcess(PROCESSES[home(method)], lambda z, t: z.repeat(1, 2, 1))
    with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 2\).*got"):
        solvers.solve(process, SOLVERS[method], start(process.sde), GRID)


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in SOLVERS for n in PROCESSES if not applies(m, n)]
)
def test_processes_that_a_solver_does_not_apply_to_are_rejected(method, name):
    sde, kind = PROCESSES[name], type(SOLVERS[method]).__name__
    other = "StochasticHeun" if sde.stationary_covariance is None else "SSCS"
    use = "ExponentialMultistep" if kind == "EDMHeun" else other
    message = rf"^{kind} needs a process .* has ({sde.components}|none)\b.*\. Use {use}\b"
    with pytest.raises(ValueError, match=message):
        solvers.plan(ReverseProcess(sde, untouchable), SOLVERS[method], GRID)
