"""Reference problems: processes and data with exact scores, densities and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cldsde.errors import require
from cldsde.linear import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, RectifiedFlow, SubVPSDE
from cldsde.linear.checks import as_number, check_between, check_positive, one_of
from cldsde.linear.sde import check_process
from cldsde.messages import Named
from cldsde.score import GaussianMixture, ReverseProcess

_ORDERS = ("ODE order", "weak order", "strong order")
_OTHERS = ("NFE per step", "distribution", "work and precision", "bias", "error at 100 steps")


@dataclass(frozen=True, eq=False)
class Problem:
    """Reference problem: the reverse process from T to ε, for data with an exact score.

    Raises a TypeError if an argument has the wrong type, and a ValueError if not
    0 < end < start ≤ 1, a kind of check is unknown, or orders fall.

    Parameters
    ----------
    name, sde, data
        Name in reports, forward process, and distribution of the data.
    end
        ε, the time at which errors are measured.
    start
        Time at which solvers start, from the exact distribution.
    checks
        Kinds of checks that a validation makes on the problem: see ``kind`` of
        ``cldsde.validation.checks.Check``.
    quick
        Whether it belongs to a quick validation.
    ode_orders, quick_ode_orders
        Declared ODE orders that the problem can measure: above the first number and at most the
        second. A quick validation measures each order on few problems.
    """

    name: str
    sde: LinearSDE
    data: GaussianMixture
    end: float = 0.05
    start: float = 1.0
    _: KW_ONLY
    checks: Collection[str] = _ORDERS
    quick: bool = False
    # With Gaussian data the range between pre-asymptotic errors and rounding is too small for
    # orders above 5.
    ode_orders: tuple[float, float] = (0, 5)
    quick_ode_orders: tuple[float, float] = (0, 0)

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_process(self.sde)
        for name, kind in (("name", str), ("data", GaussianMixture), ("quick", bool)):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {value!r}")
        if not check_positive(self.end, "end") < check_between(self.start, 0, 1, "start"):
            raise ValueError(f"end must be below start, {self.start}; got {self.end}")
        if isinstance(self.checks, str) or not isinstance(self.checks, Collection):
            raise TypeError(f"checks must be a collection of kinds; got {self.checks!r}")
        for check in self.checks:
            one_of(check, _ORDERS + _OTHERS, "checks")
        for name in ("ode_orders", "quick_ode_orders"):
            value = getattr(self, name)
            if not (isinstance(value, Sequence) and len(value) == 2):
                raise TypeError(f"{name} must be two numbers; got {value!r}")
            check_between(value[0], 0, as_number(value[1], name), name)

    @property
    def gaussian(self) -> bool:
        """Whether the data are one Gaussian, so that the score is affine."""
        return len(self.data.weights) == 1

    @property
    def exact(self) -> bool:
        """Whether distributions, flows and paths are known: Gaussian data of one dimension."""
        return self.gaussian and self.dimension == 1

    @property
    def dimension(self) -> int:
        """Number of entries of a data point."""
        return self.data.dimension

    @cached_property
    def process(self) -> ReverseProcess:
        """The reverse process with the exact score."""
        return ReverseProcess(self.sde, self.data.score(self.sde))

    def sample(self, n: int, generator: torch.Generator, *, at: float | None = None) -> Tensor:
        """Draw states ``(n, k, D)`` float64 from the exact distribution at a time; None: start."""
        x = self.data.sample(n, generator=generator, dtype=torch.float64)
        z = self.sde.augment(x, generator=generator)
        kernel = self.sde.transition(0.0, self.start if at is None else at)
        return kernel.sample(z, generator=generator)


def forward_processes() -> dict[str, Callable[[], LinearSDE]]:
    """Processes of every kind, by name, whose kernels a validation checks."""
    return {
        "VP": VPSDE,
        "sub-VP": SubVPSDE,
        "VE": VESDE,
        "rectified flow": RectifiedFlow,
        "CLD, critical": CLD,
        "CLD, underdamped": lambda: CLD(friction=0.3),
        "CLD, overdamped": lambda: CLD(friction=3.0),
        "CLD, linear schedule": lambda: CLD(beta=(1.0, 7.0)),
        "CLD, position noise": lambda: CLD(position_noise=0.3),
        "PSLD": PSLD,
        "HOLD": HOLD,
        "four components": _four_components,
        "non-commuting": _non_commuting,
    }


def problems() -> dict[str, Problem]:
    """Reference problems, by name.

    They are Gaussian data N(0.3, 0.25) under each family of processes, and mixtures in one and two
    dimensions. Two problems end near the data, where the score is stiff. In "CLD, rotation"
    covariances are stationary and the probability flow makes six turns at an increasing rate.
    Errors of any order are then well above rounding at steps that resolve it.
    """
    gaussian = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    stationary = GaussianMixture([1.0], [[0.3]], [[[1.0]]])
    two_points = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.05**2]]] * 2)
    three_modes = GaussianMixture([0.5, 0.2, 0.3], [[-1.0], [0.2], [1.2]], [[[0.35**2]]] * 3)
    vp, cld, flow = VPSDE(0.1, 8.0), CLD(), RectifiedFlow()
    slow = ("weak order", "strong order")  # flows of general processes take minutes
    measured = (*_ORDERS, "NFE per step", "work and precision")
    plain: dict[str, Any] = {"checks": measured, "quick": True, "quick_ode_orders": (0, 4)}
    modes: dict[str, Any] = {"checks": ("distribution", *_ORDERS), "ode_orders": (0, math.inf)}
    above = (5, math.inf)
    cases = [
        Problem("VP", vp, gaussian, **plain),
        Problem("sub-VP", SubVPSDE(0.1, 8.0), gaussian),
        # Order 5 shows on long flows, with numbers of steps that are too large for others.
        Problem("VE", VESDE(0.1, 5.0), gaussian, quick=True, quick_ode_orders=(4, 5)),
        Problem("CLD", cld, gaussian, **plain),
        Problem("CLD, linear schedule", CLD(beta=(1.0, 7.0)), gaussian, quick=True),
        Problem("CLD, underdamped", CLD(friction=0.3), gaussian),
        Problem("CLD, overdamped", CLD(friction=3.0), gaussian),
        Problem("PSLD", PSLD(), gaussian),
        Problem("HOLD", HOLD(), gaussian),
        Problem("four components", _four_components(), gaussian, checks=slow),
        Problem("non-commuting", _non_commuting(), gaussian, checks=slow),
        Problem("rectified flow", flow, gaussian, start=0.95, quick=True),
        Problem("rectified flow, three modes", flow, three_modes, start=0.95, **modes),
        Problem("CLD, stiff end", cld, gaussian, end=1e-3, checks=("error at 100 steps",)),
        Problem(
            "CLD, rotation",
            CLD(beta=(10.0, 30.0), velocity_scale=1.0),
            stationary,
            checks=("ODE order",),
            quick=True,
            ode_orders=above,
            quick_ode_orders=above,
        ),
        Problem("VP, two points", vp, two_points, end=1e-3, checks=("bias",), quick=True),
        Problem("CLD, three modes", cld, three_modes, **modes),
        Problem("VP, three modes", vp, three_modes, **modes, quick=True, quick_ode_orders=(0, 4)),
        Problem(
            "CLD, ring",
            cld,
            _ring(),
            end=1e-2,
            checks=("distribution", "work and precision"),
            quick=True,
        ),
        Problem("VP, ring", vp, _ring(), end=1e-2, checks=("distribution",), quick=True),
    ]
    return Named({case.name: case for case in cases})


def _ring() -> GaussianMixture:
    """Eight modes in two dimensions, whose centres have unit variance in each coordinate."""
    angle = torch.arange(8, dtype=torch.float64, device="cpu") * math.pi / 4
    means = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture([1.0] * 8, means, 0.04 * torch.eye(2, device="cpu").expand(8, 2, 2))


def _four_components() -> LinearSDE:
    """A stable A = −(D + R) with full noise, from fixed random numbers."""
    draw = torch.randn(
        2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4), device="cpu"
    )
    root = draw[0].tril() / 2 + torch.eye(4, dtype=torch.float64, device="cpu")
    skew = draw[1] - draw[1].T
    A = -(root @ root.T / 2 + skew)
    return LinearSDE.from_matrices(A, root, schedule=2.0)


def _non_commuting() -> LinearSDE:
    """F rotates with time, so that it does not commute with itself."""

    def drift(t: Tensor) -> Tensor:
        angle = 3 * t
        turn = torch.stack(
            [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
        )
        return turn @ torch.diag(t.new_tensor([-0.5, -4.0])) @ turn.T

    def diffusion(t: Tensor) -> Tensor:
        zero = torch.zeros_like(t)
        return torch.stack([torch.stack([1 + t, zero]), torch.stack([t, 1 - t / 2])])

    return LinearSDE.from_functions(drift, diffusion)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a SettingError for a problem that does not exist."""
    for name in names:
        msg = f"must be one of {', '.join(map(repr, known))}; got {name!r}"
        require(name in known, "problem", msg)


def check_problem(problem: object) -> None:
    """Raise TypeError unless ``problem`` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, such as problems()['CLD']; got {problem!r}")
