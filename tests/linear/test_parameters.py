"""Parameters of processes: tensors, attributes, representations, gradients.

`torch.autograd.gradcheck` compares with central differences of step 1e-6 in float64, whose own
error is about 1e-10 of the function's third derivative plus 1e-10 of rounding; its tolerances are
torch's defaults, 1e-5 absolute and 1e-3 relative.
"""

import copy
import pickle
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, Schedule, SubVPSDE
from cldsde.linear.paths import NoisePath
from cldsde.linear.series import legendre_matrices
from cldsde.solvers import SSCS, solve, uniform_times
from probes import generator, tensor
from tolerances import EPS32, rounding

PARAMETERS: dict[str, tuple[Any, str, tuple[float, ...]]] = {
    "VP": (VPSDE, "beta_min beta_max", (0.3, 15.1)),
    "sub-VP": (SubVPSDE, "beta_min beta_max", (0.3, 15.1)),
    "VE": (VESDE, "sigma_min sigma_max", (0.03, 33.3)),
    "CLD": (CLD, "beta mass friction velocity_scale", (3.3, 0.3, 1.1, 0.07)),
    "CLD, position noise": (CLD, "mass position_noise", (0.25, 0.3)),
    "PSLD": (PSLD, "beta gamma nu mass velocity_scale", (7.7, 0.1, 4.3, 0.3, 0.07)),
    "HOLD": (HOLD, "beta coupling friction inverse_mass", (3.3, 2.7, 5.1, 1.3)),
    "HOLD, auxiliary": (HOLD, "auxiliary_scale", (0.07,)),
    "constant": (Schedule.constant, "beta", (3.3,)),
    "linear": (Schedule.linear, "start end", (0.3, 15.1)),
    "cosine": (Schedule.cosine, "offset stop", (0.013, 0.93)),
    "geometric": (Schedule.geometric, "sigma_min sigma_max", (0.03, 33.3)),
}
every_declaration = pytest.mark.parametrize("name", list(PARAMETERS))


def declared(name: str, values: Any) -> Any:
    make, names, _ = PARAMETERS[name]
    return make(**dict(zip(names.split(), values, strict=True)))


def kernels(made: LinearSDE | Schedule) -> list[torch.Tensor]:
    sde = VPSDE(schedule=made) if isinstance(made, Schedule) else made
    kernel, step = sde.marginal(torch.tensor([1e-3, 0.2, 0.7])), sde.transition(0.2, 0.9)
    return [kernel.mean, kernel.root, step.mean, step.root, sde.prior.root]


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float16, ()), (torch.float32, (1,)), (torch.float64, (1, 1))]
)
@every_declaration
def test_tensors_of_one_element_are_the_numbers_they_hold(name, dtype, shape):
    values = [torch.full(shape, x, dtype=dtype) for x in PARAMETERS[name][2]]
    ours, theirs = declared(name, values), declared(name, [x.item() for x in values])
    if isinstance(ours, LinearSDE):  # parameters are attributes
        for attribute, value in zip(PARAMETERS[name][1].split(), values, strict=True):
            assert float(getattr(ours, attribute)) == getattr(theirs, attribute) == value.item()
    for one, other in zip(kernels(ours), kernels(theirs), strict=True):
        assert one.dtype == torch.float64
        # Powers and logarithms of torch and of Python may differ in the last place, which the
        # condition numbers of the kernels, below 100 here, amplify.
        assert torch.allclose(one, other, rtol=rounding(1, 100), atol=rounding(1))


def check_gradients(function, *values):
    """Along random directions in all inputs and outputs, which takes a pass per output."""
    leaves = [torch.as_tensor(x).double().clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.one_in(3)
@every_declaration
def test_processes_are_differentiable_in_their_parameters(name):
    def function(*values):
        # torch's fast mode confuses outputs if some have no gradient.
        return tuple(x for x in kernels(declared(name, values)) if x.requires_grad)

    values = PARAMETERS[name][2]
    check_gradients(function, *values)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [torch.tensor(x).to(dtype).requires_grad_() for x in values]
        total = sum(kernel.sum() for kernel in function(*leaves))
        slopes.append(torch.autograd.grad(total, leaves))
    for single, double in zip(*slopes, strict=True):
        assert single.dtype == torch.float32
        # The gradient is rounded once, to single precision.
        assert single.item() == pytest.approx(double.item(), rel=EPS32, abs=0)


def update(leaf: torch.Tensor) -> None:
    with torch.no_grad():
        leaf.mul_(1.01)


LEARNT = [(name, word) for name, (_, words, _) in PARAMETERS.items() for word in words.split()]


@pytest.mark.parametrize(("name", "word"), LEARNT)
def test_an_updated_parameter_is_read_or_the_process_is_rejected(name, word):
    values = list(PARAMETERS[name][2])
    i = PARAMETERS[name][1].split().index(word)
    leaf = values[i] = torch.nn.Parameter(tensor(values[i]))
    made = declared(name, values)
    sde = VPSDE(schedule=made) if isinstance(made, Schedule) else made
    kernels(sde)
    update(leaf)
    if word in {"beta", "beta_min", "beta_max", "start", "end"}:
        for found, expected in zip(kernels(sde), kernels(declared(name, values)), strict=True):
            assert torch.equal(found, expected)
        return
    for use in (sde.marginal, sde.drift, lambda t: sde.prior, lambda t: sde.initial_covariance):
        with pytest.raises(RuntimeError, match=r"learnt parameters .* Make the process anew"):
            use(0.5)
    assert repr(sde)


def test_a_mass_is_learnt_by_processes_made_anew():
    mass = torch.nn.Parameter(tensor(0.3))
    steps, losses = torch.optim.SGD([mass], lr=0.01), []
    for _ in range(4):
        loss = (CLD(mass=mass).marginal(0.5).covariance[1, 1] - 0.2).square()
        losses.append(float(loss.detach()))
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses == sorted(set(losses), reverse=True)


# Computed from a parameter before the process, so that no process can follow it.
DERIVED = [
    lambda x: CLD(beta=2 * x),
    lambda x: LinearSDE.from_matrices([[-x]], [[1.0]]),
    lambda x: LinearSDE.from_matrices([[-1.0]], [[1.0]], prior_covariance=[[x]]),
    lambda x: VPSDE.from_alphas_cumprod(torch.stack([0.9 * x, 0.1 * x])),
    lambda x: LinearSDE.from_signal_noise(lambda t, y=x**2: torch.exp(-t * y), torch.sqrt),
]


@pytest.mark.parametrize("make", DERIVED)
def test_values_derived_from_an_updated_parameter_are_rejected(make):
    leaf = torch.nn.Parameter(tensor(0.9))
    sde = make(leaf)
    sde.marginal(0.5)
    update(leaf)
    with pytest.raises(RuntimeError, match=r"was 0\.9 and is 0\.909 now"):
        sde.marginal(0.5)


def test_the_path_of_a_process_with_an_updated_parameter_has_no_slopes():
    leaf, t = torch.nn.Parameter(tensor(0.03)), tensor([0.2, 0.7])
    path = NoisePath.of(VESDE(leaf))
    path.slopes(t)
    update(leaf)
    with pytest.raises(RuntimeError, match="Make the process anew"):
        path.slopes(t)


# Gradients of kernels and posteriors -----------------------------------------------------------

A, Q_ROOT = tensor([[0.0, 4.0], [-1.0, -4.0]]), tensor([[0.0], [1.4]])
FULL, ZERO = tensor([[0.3, 0.05], [0.05, 0.2]]), torch.zeros(2, 2, dtype=torch.float64)


def marginal(A, Q_root, start, end, t):
    sde = LinearSDE.from_matrices(A, Q_root, (start, end), stationary_covariance=None)
    kernel = sde.marginal(t, FULL)
    return kernel.mean, kernel.root


def covariance(upper):
    initial = upper[[0, 1, 1, 2]].reshape(2, 2)
    return LinearSDE.from_matrices(A, Q_ROOT, 4.0).marginal(0.1, initial).covariance


def transition(s, t):
    kernel = LinearSDE.from_matrices(A, Q_ROOT, (0.5, 3.0)).transition(s, t)
    return kernel.mean, kernel.root


def oscillator(friction):
    drift = [[0.0, 4.0], [-1.0, -friction]]
    return LinearSDE.from_matrices(drift, Q_ROOT, (0.5, 3.0), stationary_covariance=None)


def posterior(stochasticity, sigma):
    def function(friction, s, t):
        options = {"stochasticity": stochasticity, "initial_covariance": sigma}
        found = oscillator(friction).posterior(s, t, **options)
        return (found.state, found.initial, *([found.root] if stochasticity else []))

    return function


def regular_start(friction, t):
    found = oscillator(friction).posterior(0.0, t, initial_covariance=FULL)
    return found.state[1], found.root[1]


def of_functions(s, t, stiffness):
    def drift(u):
        return [[0.0, 8 * torch.cos(u)], [-stiffness * (1 + u), -20.0]]

    sde = LinearSDE.from_functions(drift, lambda u: [[0.0], [1 + torch.sin(3 * u)]])
    step = sde.transition(s, t)
    return step.mean, step.root


def of_signal(rate):
    sde = LinearSDE.from_signal_noise(lambda t: (1 - t) ** rate, lambda t: t**rate)
    # One by quadrature, one by differences.
    s, t = tensor([0.30, 0.30]), tensor([0.31, 1.0])
    return torch.cat([sde.transition(s, t).root.flatten(), sde.diffusion(s).flatten()])


def of_table(table):
    sde = VPSDE.from_alphas_cumprod(table)
    return sde.transition(tensor([0.0, 0.2, 0.4]), tensor([0.3, 0.9, 0.9])).root


# Over short and long steps, which take different forms of Bayes' rule.
STEPS = [(0.4, 0.41, 0.5, ZERO), (0.4, 0.6, 0.5, FULL), (0.4, 0.6, 0.0, ZERO)]
STEPS += [(s, t, 1.0, sigma) for s, t in ((0.4, 0.41), (0.1, 0.9)) for sigma in (ZERO, FULL)]
KERNELS = [
    (marginal, A, Q_ROOT, 0.5, 3.0, [1e-3, 0.2, 0.9]),
    (transition, [0.1, 0.5], [0.2, 0.9]),
    *((covariance, upper) for upper in ([0.3, 0.05, 0.2], [0.01, 0.0, 0.01])),
    *((of_functions, s, t, 10.0) for s, t in ((0.1, 0.9), (0.49, 0.51))),
    *((of_signal, 1.3), (of_table, [0.9, 0.5, 0.2, 0.01])),
]
POSTERIORS = [
    *((posterior(level, sigma), 4.0, s, t) for s, t, level, sigma in STEPS),
    (lambda friction, t: oscillator(friction).probability_flow_root(t), 4.0, [0.2, 0.9]),
    (regular_start, 4.0, 0.02),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_are_differentiable(case):
    check_gradients(*case)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", POSTERIORS)
def test_posteriors_are_differentiable(case):
    check_gradients(*case)


def test_gradients_are_finite_if_the_distribution_is_singular():
    leaves = [x.clone().requires_grad_() for x in (A, Q_ROOT, tensor([0.0, 0.5]))]
    variance = tensor([0.0, 0.01]).requires_grad_()
    kernel = LinearSDE.from_matrices(*leaves[:2], 4.0).marginal(leaves[2], variance.diag())
    (kernel.mean.sum() + kernel.root.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in (*leaves, variance))


@pytest.mark.parametrize("variance", [0.0, 0.01])
@pytest.mark.parametrize("stochasticity", [0.5, 1.0])
def test_gradients_are_finite_at_a_singular_start_and_over_empty_steps(variance, stochasticity):
    starts = [0.0 if stochasticity == 1 else 0.1, 0.3, 0.4]
    leaves = [tensor(x).requires_grad_() for x in (4.0, starts, [0.5, 0.3, 0.9])]
    found = posterior(stochasticity, tensor([0.0, variance]).diag())(*leaves)
    sum(x.sum() for x in found).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def of_mass(mass):
    return CLD(mass=mass).transition(0.3, 0.7).root.sum()


def of_later_time(t):
    return CLD().posterior(0.3, t, stochasticity=0.5).root.sum()


def of_score(scale):
    process, times = ReverseProcess(VPSDE(), lambda z, t: -scale * z), uniform_times(1.0, 0.05, 4)
    state = torch.ones(3, 1, 1, dtype=torch.float64)
    options = {"generator": generator(), "differentiable": True}
    return solve(process, SSCS(), state, times, **options).data.sum()


@pytest.mark.parametrize(("function", "at"), [(of_mass, 0.25), (of_later_time, 0.7), (of_score, 1)])
def test_transforms_of_torch_func_have_the_gradients_of_autograd(function, at):
    x = tensor(float(at))
    legendre_matrices.cache_clear()  # so that a transform calls it first
    found = torch.func.grad(function)(x), torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    # The same derivatives in other orders: some 600 roundings.
    for gradient in (*found, torch.func.jacrev(function)(x)):
        assert float(gradient) == pytest.approx(float(expected), rel=rounding(64, 10), abs=0)


def named_rate(t: torch.Tensor) -> torch.Tensor:
    return 1 + t


REPRESENTATIONS = [
    (VPSDE(schedule=Schedule.cosine()), "VPSDE(schedule=Schedule.cosine(0.008, 0.9946))"),
    (LinearSDE.from_matrices([[-0.5]], [[1.0]]), "LinearSDE(TimeChangedDynamics(A=[[-0.5]], Q_r"),
    (Schedule(named_rate), "Schedule(rate=<function named_rate>)"),
    (CLD().marginal(torch.full((3,), 0.5)), "Kernel(components=2, times=(3,))"),
]


@pytest.mark.parametrize(("made", "text"), REPRESENTATIONS)
def test_representations_show_the_parameters_and_survive_copies(made, text):
    assert text in repr(made)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(copied) == repr(made)
