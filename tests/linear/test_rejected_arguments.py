"""Arguments of schedules, processes, kernels and posteriors that are rejected by name."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, Schedule, SubVPSDE
from cldsde.linear import Gaussian, TimeChangedDynamics
from cldsde.linear.random import standard_normal
from probes import generator, tensor, untouchable

Call = Callable[[], object]


def calls(functions: Any, *columns: Any, **keywords: Any) -> list[Call]:
    """Calls of each function with all combinations of the arguments in the columns."""
    count = len(columns)
    return [
        partial(function, *values[:count], **dict(zip(keywords, values[count:], strict=True)))
        for function in (functions if isinstance(functions, list) else [functions])
        for values in itertools.product(*columns, *keywords.values())
    ]


NAN, INF, ONE = math.nan, math.inf, [[1.0]]
NO_NUMBERS = [-1.0, NAN, INF]
# Error, message, calls.
Rows = list[tuple[type[Exception], str, list[Call]]]

NOT_RATES = [0.0, *NO_NUMBERS, (-1.0, 1.0), (1.0, -1e-9), (0.0, 0.0), (1.0, NAN)]
NO_SCHEDULES = ["linear", "12", None, (1.0, 2.0, 3.0), (1.0,), {}, 1j]
NEGATIVE: list[Any] = [lambda t: (t - 0.5) ** 2 - 1e-4, lambda t: 1 - 1.001 * t]
NEGATIVE += [lambda t: torch.sqrt(t - 0.1), lambda t: 1 / t]
SHAPELESS: list[Any] = [lambda t: 3.0, lambda t: t.sum(), lambda t: t[:, None]]
NARROW: list[Any] = [lambda t: torch.exp(-(((t - 0.5) / 1e-3) ** 2))]
WRONG_INTEGRAL: list[Any] = [lambda s, t: 1.00002 * (t - s) * (1 + (s + t) / 2)]
SCHEDULES: Rows = [
    (ValueError, "beta", calls(Schedule.of, NOT_RATES)),
    (TypeError, "number, a pair", calls(Schedule.of, NO_SCHEDULES)),
    (TypeError, r"as Schedule\(rate\) for a function", calls(Schedule.of, [torch.exp])),
    (ValueError, "offset must be finite", calls(Schedule.cosine, [-1e-9, NAN])),
    (ValueError, "stop must lie", calls(Schedule.cosine, [0.1], [0, -0.5, 1, NAN])),
    (ValueError, r"finite and not negative on .*; got .* at t = ", calls(Schedule, NEGATIVE)),
    (ValueError, r"shape \(1025,\), as its argument has; got", calls(Schedule, SHAPELESS)),
    (TypeError, "rate must be a function of times", calls(Schedule, [3.0, (1, 2), None])),
    (TypeError, "integral must be a function of two", calls(Schedule, [torch.ones_like], [3.0])),
    (ValueError, "accept a tensor", calls(Schedule, [lambda t: torch.tensor(math.exp(t))])),
    (ValueError, "Pass integral", calls(Schedule, NARROW)),
    (ValueError, r"rate .*1\.5; got 1\.50003", calls(Schedule, [lambda t: 1 + t], WRONG_INTEGRAL)),
]

POSITIVE = [(CLD, "mass friction beta"), (PSLD, "mass beta"), (VESDE, "sigma_min")]
POSITIVE += [(HOLD, "friction inverse_mass beta")]
NOT_NEGATIVE = [(CLD, "velocity_scale position_noise"), (PSLD, "gamma nu velocity_scale")]
NOT_NEGATIVE += [(HOLD, "auxiliary_scale")]
NO_MASSES = [torch.ones(2), torch.tensor(1j), torch.empty(0), "1", None]
LEARNT = [tensor(x).requires_grad_() for x in (-1.0, NAN)]
matrices, table = LinearSDE.from_matrices, VPSDE.from_alphas_cumprod
COVARIANCES = [
    ([[1.0]], r"initial_covariance must be a matrix of shape 2 × 2; got shape \(1, 1\)"),
    ([[1.0, 0.5], [0.0, 1.0]], "must be symmetric"),
    ([[1.0, 2.0], [2.0, 1.0]], "must be positive semi-definite"),
    ([[-1.0, 0.0], [0.0, 1.0]], "must be positive semi-definite"),
    ([[NAN, 0.0], [0.0, 1.0]], "must be finite"),
]
OF_START: list[Any] = [partial(matrices, [[0, 1], [-1, -1]], [[0], [1]])]
OF_START += [partial(CLD().marginal, 0.5), partial(CLD().posterior, 0.1, 0.5)]


class Bare(LinearSDE):
    """A process that does not call the constructor of its base."""

    def __init__(self):
        pass


class Longer(LinearSDE):
    T = 2.0


PROCESSES: Rows = [
    *(
        (ValueError, f"{name} must be finite and {words}; got", calls(process, **{name: values}))
        for words, rows, values in (
            ("positive", POSITIVE, [0.0, *NO_NUMBERS]),
            ("at least 0", NOT_NEGATIVE, NO_NUMBERS),
        )
        for process, names in rows
        for name in names.split()
    ),
    (ValueError, "beta", calls([VPSDE, SubVPSDE], beta_min=NO_NUMBERS)),
    (ValueError, "beta", calls([VPSDE, SubVPSDE], beta_max=NO_NUMBERS)),
    (ValueError, "sigma_max", calls(VESDE, sigma_min=[1.0], sigma_max=[1.0, 0.5, NAN, -1])),
    (ValueError, "coupling", calls(HOLD, coupling=[0.0, NAN, INF])),
    (ValueError, r"gamma \+ nu", calls(PSLD, gamma=[0.0], nu=[0.0])),
    (TypeError, r"mass must be a real number.*; got ", calls(CLD, mass=NO_MASSES)),
    (ValueError, "mass must be finite and positive", calls(CLD, mass=LEARNT)),
    (ValueError, "A must be square", calls(matrices, [[[1.0, 2.0]]], [ONE])),
    (ValueError, "A must be a matrix", calls(matrices, [[1.0], torch.zeros(0, 0)], [ONE])),
    (ValueError, "A must be finite", calls(matrices, [[[NAN]]], [ONE])),
    (ValueError, "Q_root must be a matrix of shape 1 × any", calls(matrices, [ONE], [ONE + ONE])),
    (ValueError, "Q_root must be a matrix", calls(matrices, [ONE], [[1.0]])),
    (ValueError, "Q_root must be finite", calls(matrices, [ONE], [[[INF]]])),
    (ValueError, "Q_root must have a nonzero entry", calls(matrices, [ONE], [[[0.0]]])),
    (TypeError, "A must be a matrix of real", calls(matrices, ["A"], [ONE])),
    (TypeError, "dynamics must be a Dynamics.* got list", calls(LinearSDE, [ONE])),
    (TypeError, "table must be a sequence of real", calls(table, [["a"]])),
    (ValueError, "got 0.95 after 0.9 at index 1", calls(table, [[0.9, 0.95]])),
    (ValueError, "got 1 after 1 at index 0", calls(table, [[1.0, 0.5]])),
    (ValueError, "at index 1", calls(table, [[0.5, -0.1], [0.5, NAN]])),
    (ValueError, "one axis", calls(table, [[[0.5, 0.1]]])),
    *((ValueError, words, calls(OF_START, initial_covariance=[x])) for x, words in COVARIANCES),
    (TypeError, "sde must be initialised; Bare", calls(ReverseProcess, [Bare()], [untouchable])),
    (ValueError, "Longer sets 2.0. Resc", calls(Longer, [TimeChangedDynamics([[-1.0]], ONE)])),
    (OverflowError, "overflows float64", calls(CLD(beta=1e308).transition, [0.0], [1.0])),
]


class Cubed(torch.autograd.Function):
    """A function without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t**3


DIVERGES = "nearly diverges or varies .* near t = "
FUNCTIONS: list[tuple[Any, Any, str]] = [
    (lambda t: [[-1.0, 0.0]], lambda t: ONE, "drift must .*square"),
    (lambda t: -1.0, lambda t: ONE, "drift must .*one matrix per time"),
    (lambda t: [[-1.0]], lambda t: 1.0, "diffusion must .*one matrix per time"),
    (lambda t: [[-1.0]], lambda t: ONE + ONE, "diffusion must .*as many rows"),
    (lambda t: [[NAN]], lambda t: ONE, "drift must be finite.*t = 0"),
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
    (lambda t: 1.0, lambda t: t, "signal must return float64 of the shape"),
    (lambda t: 1 - t, lambda t: t.float(), "noise must return float64"),
    (lambda t: 1 - t, lambda t: torch.where(t < 0.31, t, 2 * t - 0.31), "smooth near"),
    (lambda t: 1 - t, math.sqrt, "noise must accept a tensor of times"),
    (lambda t: 1 - t, Cubed.apply, "noise must consist of torch's operations"),
]
from_functions, from_signal_noise = LinearSDE.from_functions, LinearSDE.from_signal_noise
OF_TIME: Rows = [
    *((ValueError, words, calls(from_functions, [F], [G])) for F, G, words in FUNCTIONS),
    *((ValueError, words, calls(from_signal_noise, [a], [s])) for a, s, words in INTERPOLANTS),
    (TypeError, r"signal must be .* of times; got 0\.5", calls(from_signal_noise, [0.5], [abs])),
]

OUTSIDE = [where for t in (-1e-9, 1 + 1e-9, NAN, -INF) for where in (t, tensor([0.5, t]))]
NO_TIMES = [torch.tensor(1), torch.tensor([True]), torch.tensor(0.5j), "0.5", None, True, [0.5]]
sde, sub_vp = CLD(), SubVPSDE()
posterior, flow = sde.posterior, partial(sde.posterior, stochasticity=0.0)
ONE_TIME = [f for p in (sub_vp, sde) for f in (p.drift, p.diffusion, p.marginal)]
TWO_TIMES: list[Any] = [sde.transition, sde.transition_matrix, posterior, flow, sub_vp.transition]
AT_START = "must be above 0: .* has no density at "
NUMBER = "must be a floating-point tensor or a real number"
PAIR = torch.zeros(2), torch.ones(3)
unreached, UNREACHED = matrices([[-0.5, 0], [0, -2]], [[0], [1]]), [0.5, tensor([0.5, 0.0])]
LEVEL, at_level = "stochasticity must be ", partial(posterior, 0.1, 0.5)
NO_LEVELS: list[Any] = [None, "1", True, torch.tensor(1), torch.tensor([1, 2])]
BROADCAST = partial(posterior, tensor([0.1, 0.2]), 0.5)
TIMES: Rows = [
    (ValueError, r"t must lie in \[0, 1\]", calls(ONE_TIME, OUTSIDE)),
    (ValueError, r"t must lie in \[0, 1\]", calls(TWO_TIMES, [0.0], OUTSIDE)),
    (ValueError, r"s must lie in \[0, 1\]", calls(TWO_TIMES, OUTSIDE, [1.0])),
    (ValueError, r"s must lie in \[0, 1\]; got NaN", calls(sde.transition, [NAN], [1.0])),
    (TypeError, f"t {NUMBER}", calls([sde.marginal, sde.probability_flow_root], NO_TIMES)),
    (TypeError, f"s {NUMBER}", calls(TWO_TIMES, NO_TIMES, [1.0])),
    (ValueError, r"s = 0\.5, t = 0\.2\. Pass the earlier time", calls(TWO_TIMES, [0.5], [0.2])),
    (ValueError, "s must not be later", calls(TWO_TIMES, [tensor([0.1, 0.6])], [0.5])),
    (ValueError, r"broadcast; .*\(2,\) and \(3,\)", calls(TWO_TIMES, PAIR[:1], PAIR[1:])),
    (ValueError, AT_START + "t = 0", calls(sde.probability_flow_root, [0.0])),
    (ValueError, AT_START + "t = 0", calls([posterior, flow], [0.0], [0.0, tensor([0.5, 0.0])])),
    (ValueError, "^the .* no density at t = 0.5, .* later", calls(unreached.log_snr, UNREACHED)),
    (ValueError, AT_START + "s = 0", calls(posterior, [0.0], [0.5], stochasticity=[0.0, 0.5, 2.0])),
    (TypeError, LEVEL, calls(at_level, stochasticity=NO_LEVELS)),
    (ValueError, LEVEL + "finite", calls(at_level, stochasticity=[NAN, INF, tensor([-1e-9])])),
    (ValueError, "stochasticity must broadcast", calls(BROADCAST, stochasticity=[torch.ones(3)])),
]

z, x = torch.zeros(3, 2, 4), torch.zeros(2, 1)
step, prior, one = sde.transition(0.1, 0.4), sde.prior, posterior(0.1, 0.5)
SINGULAR = [sde.transition(0.5, 0.5), sde.marginal(0.0)]
ALL: list[Any] = [sde.marginal(torch.full(times, 0.5)) for times in ((4,), (1, 3), (3, 1))]
SEVERAL = [f for several in ALL for f in (several.perturb, partial(several.log_prob, z))]
SEVERAL += [partial(posterior(0.1, tensor([0.5, 0.6])).mean, z)]
NO_DATA: list[Any] = [torch.zeros(2, dtype=torch.int64), [0.0], torch.tensor(0.0), 1.0]
SHAPES = [torch.zeros(shape) for shape in ((1, 2, 4), (3, 3, 4), (3, 2), (3, 2, 5))]
DRAWING = [partial(prior.sample, (2, 1)), partial(sde.augment, x), partial(sde.perturb, x, 0.5)]
DRAWING += [partial(step.perturb, z), partial(one.sample, z, z)]
DRAWING += [partial(sde.perturb, x, 2.0)]  # before a kernel is computed, which rejects the time
NO_GENERATORS: list[Any] = [3, "0", 1.0, [3], [torch.Generator(), None]]
UNEVEN = [[generator(i) for i in range(count)] for count in (0, 4)]
EMPTY = [f.log_prob for f in (flow(0.1, 0.5), flow(0.4, 0.4), posterior(0.4, 0.4))]
DATA, NO_GENERATOR = "data must be a floating-point tensor", r"torch\.Generator.* or None; got"
NO_BATCHES = [partial(sde.perturb, x, torch.ones(3)), partial(sde.perturb, x, x)]
CONDITIONINGS: Any = {"conditioning": ["data", "all"]}
OF_STATES = [step.perturb, prior.log_prob, partial(step.log_prob, z_s=z)]
uneven_draw = partial(standard_normal, (6, 3), dtype=torch.float32, device="cpu")
STATES: Rows = [
    (ValueError, r"shape \(B, 2, \*D\)", calls(OF_STATES, [torch.zeros(3, 3, 1), torch.zeros(2)])),
    (TypeError, r"shape \(B, 2, \*D\)", calls(OF_STATES, [z.long(), [[0.0, 0.0]]])),
    (ValueError, "shape", calls(step.log_prob, [z], [torch.zeros(3, 2, 2)])),
    (ValueError, r"one time or for \(3,\) times", calls(SEVERAL, [z])),
    (ValueError, r"shape must be the shape .* of a batch", calls(prior.sample, [(), 4, None])),
    (ValueError, r"z_t must have shape \(B, 2, ", calls(one.sample, [z[:, :1]], [z])),
    (ValueError, r"z_0 must have shape \(B, 2, ", calls(one.mean, [z], [z[:, :1]])),
    (ValueError, "z_t and z_0 must have one shape", calls(one.mean, [z], [z[:1], z[..., :3]])),
    (TypeError, "z_t must be a floating", calls(one.mean, [z.long()], [z])),
    (ValueError, "z_s", calls(one.log_prob, SHAPES, [z], [z])),
    (ValueError, "no density", calls([k.log_prob for k in SINGULAR], [z], [z])),
    (ValueError, "no density", calls(Gaussian(torch.zeros(2, 2).double()).log_prob, [z])),
    (ValueError, "no density", calls(EMPTY, [z], [z], [z])),
    (TypeError, DATA, calls(sde.augment, NO_DATA)),
    (TypeError, DATA, calls(sde.perturb, NO_DATA, [0.5])),
    (ValueError, r"one time or for \(2,\) times", calls(NO_BATCHES, **CONDITIONINGS)),
    (ValueError, "'data' or 'all'; got 'no'", calls(sde.perturb, [x], [0.5], conditioning=["no"])),
    (TypeError, NO_GENERATOR, calls(DRAWING, generator=NO_GENERATORS)),
    (ValueError, "length divides the batch", calls(uneven_draw, generator=UNEVEN)),
]

ROWS = [*SCHEDULES, *PROCESSES, *OF_TIME, *TIMES, *STATES]


@pytest.mark.parametrize(("error", "message", "calls"), ROWS, ids=[row[1] for row in ROWS])
def test_wrong_arguments_are_rejected(error, message, calls):
    for call in calls:
        with pytest.raises(error, match=message):
            call()
