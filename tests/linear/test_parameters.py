"""Parameters of processes: tensors, attributes, representations, gradients.

`torch.autograd.gradcheck` compares with central differences of step 1e-6 in float64, whose own
error is about 1e-10 of the function's third derivative plus 1e-10 of rounding; its tolerances are
torch's defaults, 1e-5 absolute and 1e-3 relative.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from cldsde.linear import panels, schedule, series
from probes import tensor
from references.interpolants import INTERPOLANTS
from tolerances import rounding

PARAMETERS: dict[str, tuple[Any, str, tuple[float, ...]]] = {
    "VP": (VPSDE, "beta_min beta_max", (0.3, 15.1)),
    "sub-VP": (SubVPSDE, "beta_min beta_max", (0.3, 15.1)),
    "VE": (VESDE, "sigma_min sigma_max", (0.03, 33.3)),
    "CLD": (CLD, "beta mass friction velocity_scale", (3.3, 0.3, 1.1, 0.07)),
    "CLD, position noise": (CLD, "mass position_noise", (0.25, 0.3)),
    "PSLD": (PSLD, "beta gamma nu mass velocity_scale", (7.7, 0.1, 4.3, 0.3, 0.07)),
    "HOLD": (HOLD, "beta coupling friction inverse_mass", (3.3, 2.7, 5.1, 1.3)),
    "HOLD, auxiliary": (HOLD, "auxiliary_scale", (0.07,)),
    "linear": (Schedule.linear, "start end", (0.3, 15.1)),
    "cosine": (Schedule.cosine, "offset stop", (0.013, 0.93)),
    "geometric": (Schedule.geometric, "sigma_min sigma_max", (0.03, 33.3)),
}


def declared(name: str, values: Any) -> Any:
    make, names, _ = PARAMETERS[name]
    return make(**dict(zip(names.split(), values, strict=True)))


def kernels(made: LinearSDE | Schedule) -> list[torch.Tensor]:
    sde = VPSDE(schedule=made) if isinstance(made, Schedule) else made
    kernel, step = sde.marginal(torch.tensor([1e-3, 0.2, 0.7])), sde.transition(0.2, 0.9)
    return [kernel.mean, kernel.root, step.mean, step.root, sde.prior.root]


def check_gradients(function, *values):
    """Along random directions in all inputs and outputs, which takes a pass per output."""
    leaves = [torch.as_tensor(x).double().clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", list(PARAMETERS))
def test_processes_of_tensors_are_those_of_numbers_and_differentiable(name):
    def function(*values):
        # torch's fast mode confuses outputs if some have no gradient.
        return tuple(x for x in kernels(declared(name, values)) if x.requires_grad)

    values = PARAMETERS[name][2]
    check_gradients(function, *values)
    tensors = [torch.full((1, 1), x, dtype=torch.float16) for x in values]
    pair = [kernels(declared(name, x)) for x in (tensors, [x.item() for x in tensors])]
    for one, other in zip(*pair, strict=True):
        # Powers and logarithms of torch and of Python may differ in the last place, which the
        # condition numbers of the kernels, below 100 here, amplify.
        assert torch.allclose(one, other, rtol=rounding(1, 100), atol=rounding(1))


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


def oscillator(friction):
    drift = [[0.0, 4.0], [-1.0, -friction]]
    return LinearSDE.from_matrices(drift, Q_ROOT, (0.5, 3.0), stationary_covariance=None)


def posterior(stochasticity, sigma):
    def function(friction, s, t):
        options = {"stochasticity": stochasticity, "initial_covariance": sigma}
        found = oscillator(friction).posterior(s, t, **options)
        return (found.state, found.initial, *([found.root] if stochasticity else []))

    return function


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
    *((covariance, upper) for upper in ([0.3, 0.05, 0.2], [0.01, 0.0, 0.01])),
    *((of_functions, s, t, 10.0) for s, t in ((0.1, 0.9), (0.49, 0.51))),
    *((of_signal, 1.3), (of_table, [0.9, 0.5, 0.2, 0.01])),
    *((posterior(level, sigma), 4.0, s, t) for s, t, level, sigma in STEPS),
    (lambda friction, t: oscillator(friction).probability_flow_root(t), 4.0, [0.2, 0.9]),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_and_posteriors_are_differentiable(case):
    check_gradients(*case)


def test_gradients_are_finite_if_the_distribution_is_singular():
    leaves = [x.clone().requires_grad_() for x in (A, Q_ROOT, tensor([0.0, 0.5]))]
    variance = tensor([0.0, 0.01]).requires_grad_()
    kernel = LinearSDE.from_matrices(*leaves[:2], 4.0).marginal(leaves[2], variance.diag())
    (kernel.mean.sum() + kernel.root.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in (*leaves, variance))


@pytest.mark.parametrize(("stochasticity", "start"), [(0.5, 0.1), (1.0, 0.0)])
def test_gradients_are_finite_at_a_singular_start_and_over_empty_steps(stochasticity, start):
    leaves = [tensor(x).requires_grad_() for x in (4.0, [start, 0.3, 0.4], [0.5, 0.3, 0.9])]
    sum(x.sum() for x in posterior(stochasticity, ZERO)(*leaves)).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


PROCESSES = [
    lambda x: CLD(mass=x),
    lambda x: VPSDE(schedule=Schedule(lambda t: x * (1 + t))),
    lambda x: LinearSDE.from_functions(lambda t: [[-x * (1 + t)]], lambda t: [[1.0]]),
]


@pytest.mark.parametrize("make", PROCESSES)
def test_constants_that_inference_mode_computed_first_serve_training(make):
    def total(x):
        sde = make(x)
        parts = [*kernels(sde), sde.transition(0.1, 0.9 * x).root, sde.probability_flow_root(0.5)]
        return sum(part.sum() for part in parts)

    for module in (panels, schedule, series):
        for constant in vars(module).values():
            if hasattr(constant, "cache_clear"):
                constant.cache_clear()
    with torch.inference_mode():
        total(tensor(1.0))
    x = tensor(1.0).requires_grad_()
    torch.autograd.grad(total(x), x)


def of_mass(mass):
    return CLD(mass=mass).transition(0.3, 0.7).root.sum()


def of_later_time(t):
    return CLD().posterior(0.3, t, stochasticity=0.5).root.sum()


@pytest.mark.parametrize(("function", "at"), [(of_mass, 0.25), (of_later_time, 0.7)])
def test_transforms_of_torch_func_have_the_gradients_of_autograd(function, at):
    x = tensor(at)
    series.legendre_matrices.cache_clear()  # so that a transform calls it first
    found = torch.func.grad(function)(x), torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    # The same derivatives in other orders: some 600 roundings.
    for gradient in found:
        assert float(gradient) == pytest.approx(float(expected), rel=rounding(64, 10), abs=0)


def named_rate(t: torch.Tensor) -> torch.Tensor:
    return 1 + t


def named_matrix(t: torch.Tensor) -> list[list[float]]:
    return [[-math.exp(float(t))]]


COPIED: list[tuple[Any, str]] = [
    (VPSDE(schedule=Schedule.cosine()), "VPSDE(schedule=Schedule.cosine(0.008, 0.9946))"),
    (LinearSDE.from_matrices([[-0.5]], [[1.0]]), "LinearSDE(TimeChangedDynamics(A=[[-0.5]], Q_r"),
    (LinearSDE.from_functions(named_matrix, named_matrix), "drift=<function named_matrix>"),
    (Schedule(named_rate), "Schedule(rate=<function named_rate>)"),
    (CLD().marginal(torch.full((3,), 0.5)), "Kernel(components=2, times=(3,))"),
    *((INTERPOLANTS[name][0], "") for name in ("cosine", "table")),
]


@pytest.mark.parametrize(("made", "text"), COPIED)
def test_copies_and_pickles_have_the_same_parameters_and_kernels(made, text):
    assert text in repr(made)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(copied) == repr(made)
        if isinstance(made, LinearSDE):
            assert torch.equal(copied.marginal(0.3).root, made.marginal(0.3).root)
