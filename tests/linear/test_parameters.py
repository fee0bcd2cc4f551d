"""Parameters of processes: tensors of every precision, public attributes, representations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, Schedule, SubVPSDE
from cldsde.linear import TimeChangedDynamics

PARAMETERS: dict[str, tuple[Any, tuple[str, ...], tuple[float, ...]]] = {
    "VP": (VPSDE, ("beta_min", "beta_max"), (0.3, 15.1)),
    "sub-VP": (SubVPSDE, ("beta_min", "beta_max"), (0.3, 15.1)),
    "VE": (VESDE, ("sigma_min", "sigma_max"), (0.03, 33.3)),
    "CLD": (CLD, ("beta", "mass", "friction", "velocity_scale"), (3.3, 0.3, 1.1, 0.07)),
    "PSLD": (PSLD, ("beta", "gamma", "nu", "mass", "velocity_scale"), (7.7, 0.1, 4.3, 0.3, 0.07)),
    "HOLD": (
        HOLD,
        ("beta", "coupling", "friction", "inverse_mass", "auxiliary_scale"),
        (3.3, 2.7, 5.1, 1.3, 0.07),
    ),
    "constant": (Schedule.constant, ("beta",), (3.3,)),
    "linear": (Schedule.linear, ("start", "end"), (0.3, 15.1)),
    "cosine": (Schedule.cosine, ("offset", "stop"), (0.013, 0.93)),
    "geometric": (Schedule.geometric, ("sigma_min", "sigma_max"), (0.03, 33.3)),
}
every_declaration = pytest.mark.parametrize("name", list(PARAMETERS))
processes = pytest.mark.parametrize("name", ["VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD"])


def laws(made: LinearSDE | Schedule) -> list[torch.Tensor]:
    sde = VPSDE(schedule=made) if isinstance(made, Schedule) else made
    kernel, step = sde.marginal(torch.tensor([1e-3, 0.7])), sde.transition(0.2, 0.9)
    return [kernel.mean, kernel.root, step.mean, step.root, sde.prior.root]


@every_declaration
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_of_one_element_are_the_numbers_they_hold(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    make, names, values = PARAMETERS[name]
    given = {n: torch.full(shape, x, dtype=dtype) for n, x in zip(names, values, strict=True)}
    ours = laws(make(**given))
    theirs = laws(make(**{n: x.item() for n, x in given.items()}))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float64
        # Powers and logarithms of torch and of Python may differ in the last place, which the
        # condition numbers of the kernels, below 100 here, amplify.
        assert torch.allclose(one, other, rtol=100 * 2.2e-16, atol=1e-16)


@every_declaration
def test_gradients_reach_parameters_in_single_precision(name: str) -> None:
    make, names, values = PARAMETERS[name]

    def slopes(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [torch.tensor(x).to(dtype).requires_grad_() for x in values]
        made = make(**dict(zip(names, leaves, strict=True)))
        total = sum(law.sum() for law in laws(made))
        return list(torch.autograd.grad(total, leaves))

    for single, double in zip(slopes(torch.float32), slopes(torch.float64), strict=True):
        assert single.dtype == torch.float32
        # The gradient is rounded once, to single precision.
        assert single.item() == pytest.approx(double.item(), rel=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_that_is_learnt_in_place_counts_as_it_is(dtype: torch.dtype) -> None:
    rate = torch.tensor(4.0, dtype=dtype)
    sde = VPSDE(beta_max=rate)
    rate.fill_(8.0)
    assert torch.equal(sde.marginal(0.5).mean, VPSDE(beta_max=8.0).marginal(0.5).mean)


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(1j), torch.empty(0), "1", None])
def test_what_is_no_number_is_no_parameter(value: Any) -> None:
    with pytest.raises(TypeError, match=r"mass must be a real number.*; got "):
        CLD(mass=value)


@processes
def test_parameters_are_attributes(name: str) -> None:
    make, names, values = PARAMETERS[name]
    sde = make(**dict(zip(names, values, strict=True)))
    assert [getattr(sde, n) for n in names] == list(values)
    learnt = make(**{n: torch.tensor(x) for n, x in zip(names, values, strict=True)})
    found = [float(getattr(learnt, n)) for n in names]
    # Single precision.
    assert found == pytest.approx(values, rel=6e-8)


def named_rate(t: torch.Tensor) -> torch.Tensor:
    return 1 + t


def named_drift(t: torch.Tensor) -> list[list[float]]:
    return [[-1.0]]


def named_diffusion(t: torch.Tensor) -> list[list[float]]:
    return [[1.0]]


class Overdamped(LinearSDE):
    """A process of a user's own, with one parameter that it keeps and one that it does not."""

    def __init__(self, stiffness: float, rate: float = 1.0) -> None:
        self.stiffness = stiffness
        super().__init__(TimeChangedDynamics([[-stiffness]], [[1.0]], rate))


REPRESENTATIONS: dict[str, Callable[[], object]] = {
    "VPSDE(beta_min=0.1, beta_max=20.0)": VPSDE,
    "VPSDE(schedule=Schedule.cosine(0.008, 0.9946))": lambda: VPSDE(schedule=Schedule.cosine()),
    "SubVPSDE(beta_min=0.1, beta_max=20.0)": SubVPSDE,
    "VESDE(sigma_min=0.01, sigma_max=50.0)": VESDE,
    "CLD(beta=4.0, mass=0.25, friction=1.0, velocity_scale=0.04, position_noise=0.0)": CLD,
    "CLD(beta=(0.1, 20.0), mass=0.3, friction=1.0, velocity_scale=0.04, position_noise=0.0)": (
        lambda: CLD(beta=(0.1, 20.0), mass=torch.tensor(0.3))
    ),
    "PSLD(beta=8.0, gamma=0.01, nu=4.01, mass=0.25, velocity_scale=0.04)": PSLD,
    (
        "HOLD(beta=4.0, coupling=2.82843, friction=5.19615, inverse_mass=1.0, auxiliary_scale=0.04)"
    ): HOLD,
    (
        "LinearSDE(TimeChangedDynamics(A=[[-0.5]], Q_root=[[1.0]], "
        "schedule=Schedule.linear(0.1, 20.0)), initial_covariance=[[0.01]])"
    ): lambda: LinearSDE.from_matrices([[-0.5]], [[1.0]], (0.1, 20.0), initial_covariance=[[0.01]]),
    (
        "LinearSDE(FunctionDynamics(drift=<function named_drift>, "
        "diffusion=<function named_diffusion>))"
    ): lambda: LinearSDE.from_functions(named_drift, named_diffusion),
    "Overdamped(stiffness=2.0)": lambda: Overdamped(2.0),
    "Schedule.constant(4.0)": lambda: Schedule.of(4.0),
    "Schedule.linear(0.1, 20.0)": lambda: Schedule.linear(0.1, 20.0),
    "Schedule.geometric(0.1, 2.0)": lambda: Schedule.geometric(0.1, torch.tensor(2.0)),
    "Schedule(rate=<function named_rate>)": lambda: Schedule(named_rate),
    "Gaussian(covariance=[[1.0, 0.0], [0.0, 0.25]])": lambda: CLD().prior,
    "Kernel(components=2, times=(3,))": lambda: CLD().marginal(torch.full((3,), 0.5)),
}


@pytest.mark.parametrize("text", list(REPRESENTATIONS))
def test_representations_show_the_parameters_in_one_line(text: str) -> None:
    assert repr(REPRESENTATIONS[text]()) == text


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))]
)
@pytest.mark.parametrize("text", list(REPRESENTATIONS))
def test_copies_have_the_same_representation(text: str, duplicate: Any) -> None:
    made = REPRESENTATIONS[text]()
    assert repr(duplicate(made)) == text


def test_another_end_of_time_is_rejected() -> None:
    class Longer(LinearSDE):
        T = 2.0

    class LongerOne(Overdamped):
        def __init__(self) -> None:
            self.T = 2.0  # type: ignore[misc]
            super().__init__(1.0)

    with pytest.raises(ValueError, match=r"T must be 1.*; Longer sets 2\.0\. Rescale the schedule"):
        Longer(TimeChangedDynamics([[-1.0]], [[1.0]]))
    with pytest.raises(ValueError, match=r"T must be 1.*; LongerOne sets 2\.0"):
        LongerOne()
