"""Arguments of schedules, processes, kernels and posteriors that are rejected by name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, Schedule
from cldsde.linear import TimeChangedDynamics
from cldsde.linear.random import standard_normal
from probes import generator, tensor, untouchable

Row = tuple[type[Exception], str, Callable[[], object]]
NAN, INF, ONE = math.nan, math.inf, [[1.0]]


def each(error: type[Exception], message: str, function: Any, *values: Any) -> list[Row]:
    """A row for each value of the function's argument."""
    return [(error, message, partial(function, value)) for value in values]


SCHEDULES: list[Row] = [
    *each(ValueError, "beta", Schedule.of, -1.0, NAN, (-1.0, 1.0), (1.0, -1e-9), (0.0, 0.0)),
    *each(TypeError, "number, a pair", Schedule.of, "12", None, (1.0, 2.0, 3.0)),
    *each(TypeError, r"as Schedule\(rate\) for a function", Schedule.of, torch.exp),
    *each(ValueError, "offset must be finite", Schedule.cosine, -1e-9),
    *each(ValueError, "stop must lie", partial(Schedule.cosine, 0.1), 0, 1, NAN),
    *each(
        ValueError, r"finite and not negative on .*; got inf at t = 0", Schedule, lambda t: 1 / t
    ),
    *each(ValueError, r"shape \(1025,\), as its argument has; got", Schedule, lambda t: t.sum()),
    *each(TypeError, "rate must be a function of times", Schedule, 3.0),
    *each(TypeError, "integral must be a function of two", partial(Schedule, torch.ones_like), 3.0),
    *each(ValueError, "accept a tensor", Schedule, lambda t: torch.tensor(math.exp(t))),
    *each(ValueError, "Pass integral", Schedule, lambda t: torch.exp(-((1e3 * (t - 0.5)) ** 2))),
    (
        *(ValueError, r"rate .*1\.5; got 1\.50003"),
        lambda: Schedule(lambda t: 1 + t, lambda s, t: 1.00002 * (t - s) * (1 + (s + t) / 2)),
    ),
]

POSITIVE = [(CLD, "mass friction beta"), (PSLD, "mass beta"), (VESDE, "sigma_min")]
POSITIVE += [(HOLD, "friction inverse_mass beta")]
NOT_NEGATIVE = [(CLD, "velocity_scale position_noise"), (PSLD, "gamma nu velocity_scale")]
NOT_NEGATIVE += [(HOLD, "auxiliary_scale")]
matrices, table = LinearSDE.from_matrices, VPSDE.from_alphas_cumprod
mass = partial(CLD, 4.0)


class Bare(LinearSDE):
    """A process that does not call the constructor of its base."""

    def __init__(self):
        pass


class Longer(LinearSDE):
    T = 2.0


def start(covariance: Any) -> LinearSDE:
    return matrices([[0, 1], [-1, -1]], [[0], [1]], initial_covariance=covariance)


PROCESSES: list[Row] = [
    *(
        (ValueError, f"{name} must be finite and {words}; got", partial(process, **{name: -1.0}))
        for words, named in (("positive", POSITIVE), ("at least 0", NOT_NEGATIVE))
        for process, names in named
        for name in names.split()
    ),
    *each(
        ValueError, "mass must be finite and positive", mass, 0.0, INF, tensor(NAN).requires_grad_()
    ),
    *each(TypeError, r"mass must be a real number.*; got ", mass, torch.ones(2), "1"),
    *each(ValueError, "beta", VPSDE, -1.0),
    *each(ValueError, "sigma_max", partial(VESDE, 1.0), 1.0, NAN),
    (ValueError, "coupling", lambda: HOLD(coupling=0.0)),
    (ValueError, r"gamma \+ nu", lambda: PSLD(gamma=0.0, nu=0.0)),
    (ValueError, "A must be square", lambda: matrices([[1.0, 2.0]], ONE)),
    (TypeError, "A must be a matrix of real", lambda: matrices("A", ONE)),
    (ValueError, "Q_root must be a matrix of shape 1 × any", lambda: matrices(ONE, ONE + ONE)),
    (ValueError, "Q_root must be finite", lambda: matrices(ONE, [[INF]])),
    (ValueError, "Q_root must have a nonzero entry", lambda: matrices(ONE, [[0.0]])),
    *each(TypeError, "dynamics must be a Dynamics.* got list", LinearSDE, ONE),
    *each(TypeError, "table must be a sequence of real", table, ["a"]),
    *each(ValueError, "got 0.95 after 0.9 at index 1", table, [0.9, 0.95]),
    *each(ValueError, "at index 1", table, [0.5, -0.1], [0.5, NAN]),
    *each(ValueError, "one axis", table, [[0.5, 0.1]]),
    *each(ValueError, r"must be a matrix of shape 2 × 2; got shape \(1, 1\)", start, ONE),
    *each(ValueError, "must be positive semi-definite", start, [[1.0, 2.0], [2.0, 1.0]]),
    *each(ValueError, "must be symmetric", partial(CLD().marginal, 0.5), [[1.0, 0.5], [0.0, 1.0]]),
    (TypeError, "sde must be initialised; Bare", lambda: ReverseProcess(Bare(), untouchable)),
    *each(ValueError, "Longer sets 2.0. Resc", Longer, TimeChangedDynamics([[-1.0]], ONE)),
    (OverflowError, "overflows float64", lambda: CLD(beta=1e308).transition(0.0, 1.0)),
]

DIVERGES = "nearly diverges or varies .* near t = "
FUNCTIONS: list[tuple[Any, Any, str]] = [
    (lambda t: [[-1.0, 0.0]], lambda t: ONE, "drift must .*square"),
    (lambda t: -1.0, lambda t: ONE, "drift must .*one matrix per time"),
    (lambda t: [[-1.0]], lambda t: ONE + ONE, "diffusion must .*as many rows"),
    (lambda t: [[-1.0]], lambda t: [[1 / (1 - t)]], "diffusion must be finite.*t = 1"),
    (lambda t: [[-1.0]], lambda t: [[0.0]], "diffusion must have a nonzero entry"),
    (lambda t: [[-1 / (1 + 1e-7 - t)]], lambda t: ONE, DIVERGES + r"0\.99999"),
    (lambda t: ONE, lambda t: [[1 / (abs(t - 0.3).sqrt() + 1e-9)]], DIVERGES + r"0\.(3|29)"),
    (lambda t: [[torch.sin(1e6 * t)]], lambda t: ONE, DIVERGES + "0"),
]
INTERPOLANTS: list[tuple[Any, Any, str]] = [
    (lambda t: 1 - t, lambda t: 0.1 * (1 - t) ** 2 + 0 * t, "noise must be positive"),
    (lambda t: 1 / (1 - t), lambda t: t, "signal must be finite on .0, 1.; got inf at t"),
    (lambda t: torch.cos(3 * t), lambda t: t, "signal must be positive before t = 1"),
    (lambda t: 0.9 - t / 2, lambda t: t, "signal must be 1 at t = 0.*got 0.9"),
    (lambda t: 1 - t / 2, lambda t: t - 0.1, "noise must be not negative; got -0.1"),
    (lambda t: 1 + 0 * t, lambda t: t * (1.5 - t), "α/σ that decreases"),
    (lambda t: 1 - t, lambda t: t.float(), "noise must return float64"),
    (lambda t: 1 - t, lambda t: torch.where(t < 0.31, t, 2 * t - 0.31), "smooth near"),
    (lambda t: 1 - t, lambda t: torch.from_numpy(t.numpy()), "noise must consist of torch's"),
]
from_functions, from_signal_noise = LinearSDE.from_functions, LinearSDE.from_signal_noise
OF_TIME: list[Row] = [
    *((ValueError, words, partial(from_functions, F, G)) for F, G, words in FUNCTIONS),
    *((ValueError, words, partial(from_signal_noise, a, s)) for a, s, words in INTERPOLANTS),
]

sde = CLD()
posterior, flow = sde.posterior, partial(sde.posterior, stochasticity=0.0)
TWO_TIMES: list[Any] = [sde.transition, sde.transition_matrix, posterior]
AT_START = "must be above 0: .* has no density at "
NUMBER = "must be a floating-point tensor or a real number"
unreached = matrices([[-0.5, 0], [0, -2]], [[0], [1]])


def at_level(stochasticity: Any) -> object:
    return posterior(tensor([0.1, 0.2]), 0.5, stochasticity=stochasticity)


TIMES: list[Row] = [
    *each(ValueError, r"t must lie in \[0, 1\]", sde.marginal, 1 + 1e-9, tensor([0.5, -1e-9]), NAN),
    *each(TypeError, f"t {NUMBER}", sde.marginal, torch.tensor(1), "0.5", True),
    *(
        (ValueError, message, partial(function, *times))
        for function in TWO_TIMES
        for message, *times in (
            (r"t must lie in \[0, 1\]", 0.0, 2.0),
            (r"s must lie in \[0, 1\]; got NaN", NAN, 1.0),
            (r"s = 0\.5, t = 0\.2\. Pass the earlier time", 0.5, 0.2),
            (r"broadcast; .*\(2,\) and \(3,\)", torch.zeros(2), torch.ones(3)),
        )
    ),
    *each(ValueError, AT_START + "t = 0", sde.probability_flow_root, 0.0),
    *each(ValueError, AT_START + "t = 0", partial(flow, 0.0), tensor([0.5, 0.0])),
    *each(ValueError, "^the .* no density at t = 0.5, .* later", unreached.kappa, 0.5),
    (ValueError, AT_START + "s = 0", lambda: posterior(0.0, 0.5, stochasticity=0.5)),
    *each(TypeError, "stochasticity must be ", at_level, None, torch.tensor([1, 2])),
    *each(ValueError, "stochasticity must be finite", at_level, NAN, tensor([-1e-9])),
    *each(ValueError, "stochasticity must broadcast", at_level, torch.ones(3)),
]

z, x = torch.zeros(3, 2, 4), torch.zeros(2, 1)
step, one = sde.transition(0.1, 0.4), posterior(0.1, 0.5)
DRAWING = [partial(sde.prior.sample, (2, 1)), partial(sde.augment, x), partial(sde.perturb, x, 2.0)]
DRAWING += [partial(step.perturb, z), partial(one.sample, z, z)]


def draw_six(source: Any) -> object:
    return standard_normal((6, 3), generator=source, dtype=torch.float32, device="cpu")


GENERATOR = r"torch\.Generator.* or None; got"
NO_DATA: list[Any] = [torch.zeros(2, dtype=torch.int64), torch.tensor(0.0), 1.0]
STATES: list[Row] = [
    *each(ValueError, r"shape \(B, 2, \*D\)", step.perturb, torch.zeros(3, 3, 1), torch.zeros(2)),
    *each(TypeError, r"shape \(B, 2, \*D\)", step.perturb, z.long(), [[0.0, 0.0]]),
    *each(ValueError, r"one time or for \(3,\) times", sde.marginal(tensor([0.5] * 4)).perturb, z),
    *each(ValueError, r"shape must be the shape .* of a batch", sde.prior.sample, (), 4),
    (ValueError, "z_s and z_t must have one shape", lambda: one.log_prob(z[:1], z, z)),
    (ValueError, "no density", lambda: sde.transition(0.5, 0.5).log_prob(z, z)),
    *each(TypeError, "data must be a floating-point tensor", sde.augment, *NO_DATA),
    (ValueError, "'data' or 'all'; got 'no'", lambda: sde.perturb(x, 0.5, conditioning="no")),
    # `sde.perturb` is called with a time that the kernel would reject.
    *((TypeError, GENERATOR, partial(draw, generator=[generator(), None])) for draw in DRAWING),
    *each(TypeError, GENERATOR, draw_six, 3),
    *each(ValueError, "length divides the batch", draw_six, [], [generator()] * 4),
]

ROWS = [*SCHEDULES, *PROCESSES, *OF_TIME, *TIMES, *STATES]


@pytest.mark.parametrize(("error", "message", "call"), ROWS, ids=[row[1] for row in ROWS])
def test_wrong_arguments_are_rejected(error, message, call):
    with pytest.raises(error, match=message):
        call()
