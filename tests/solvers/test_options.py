"""Options: what is out of range is rejected by name, equal options are equal, facts follow them."""

import math

import pytest

from cldsde import solvers
from cldsde.solvers import SSCS, EDMHeun, GottaGoFast, ProbabilityFlow, Splitting, TorchDiffEq
from cldsde.solvers import ExponentialMultistep as Multistep
from probes import PUBLISHED, name_of_case

NO_RANGES = [(-0.1, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), [0.0, 1.0], (1.0,), "01"]
POSITIVE, REAL = "{} must be finite and positive", "{} must be a real number"
Corrected, Langevin, TorchSDE = solvers.PredictorCorrector, solvers.Langevin, solvers.TorchSDE
WITHOUT = [SSCS(), SSCS(score_step="midpoint"), Multistep(corrector=True)]
WITHOUT += [ProbabilityFlow(), GottaGoFast()]
# Solvers, options, values out of range or of another type, and the message; {} is the option.
BAD_VALUES = [
    (SSCS, "score_step", ["Euler", None, 1], "{} must be one of 'euler', 'midpoint', 'gaussian'"),
    (SSCS, "data_variance", [0.0, math.inf], POSITIVE),
    (EDMHeun, "churn", [-0.1, math.inf], "{} must be finite and at least 0; got"),
    (EDMHeun, "noise_scale", [0.0, -1.0], POSITIVE),
    (EDMHeun, "churn_range", NO_RANGES, r"{} must be \(S_min, S_max\) with 0 ≤ S_min ≤ S_max; got"),
    (Multistep, "order", [0, 4, "2", 1.5, 2.0], "{} must be 1, 2 or 3; got"),
    (Multistep, "prediction variable weights", ["t"], "{} must be one of"),
    (Multistep, "weights", ["published"], "needs variable='log_snr'"),
    (Multistep, "stochasticity", [-0.1, math.inf], "{} must be finite and at least 0"),
    (GottaGoFast, "rtol atol first_step", [0.0, math.nan], POSITIVE),
    (GottaGoFast, "atol", [[0.01, 0.0], [0.01, math.nan]], POSITIVE),
    (GottaGoFast, "safety exponent", [0.0, 1.1], "{} must lie in"),
    (GottaGoFast, "max_nfev", [1], "{} must be finite and at least 2"),
    (GottaGoFast, "noise_on_reject", ["Bridge", None], "{} must be one of 'bridge', 'fresh'"),
    (Langevin, "snr", [0.0, math.nan], POSITIVE),
    (Langevin, "steps", [0], "{} must be at least 1"),
    (Langevin, "norm", ["mean", None], "{} must be one of 'sample', 'batch'"),
    (ProbabilityFlow, "method", ["rk4", None], "{} must be one of 'bosh3', 'dopri5', 'dopri8'"),
    (ProbabilityFlow, "rtol atol first_step max_step", [0.0, -1.0], POSITIVE),
    (ProbabilityFlow, "max_nfev", [0], "{} must be"),
    (ProbabilityFlow, "pace", ["both"], "{} must be one of 'batch', 'sample'; got 'both'"),
    (Splitting, "scheme", ["", "OB", "OXAB", "oba", "OBA ", 3, ["O", "B", "A"]], "{} must contain"),
    (Splitting, "score_time", ["middle", "End", None], "{} must be one of 'start', 'end'; got"),
    (TorchDiffEq, "method", ["RK45", "explicit_adams", None], "{} must be one of 'dopri8'"),
    (TorchDiffEq, "rtol atol", [0.0], POSITIVE),
    (TorchDiffEq, "max_nfev", [0], "{} must be"),
    (TorchSDE, "method", ["log_ode", "Euler", None], "{} must be one of 'euler'"),
    (Corrected, "predictor", WITHOUT, "{} must have a state at each grid time"),
]
BAD_TYPES = [
    (EDMHeun, "churn noise_scale", ["1"], REAL),
    (Multistep, "stochasticity", ["1"], REAL),
    (GottaGoFast, "rtol safety exponent first_step max_nfev", ["1", None], REAL),
    (GottaGoFast, "atol", ["0.01", None, True, ["a"]], "{} must be a"),
    (ProbabilityFlow, "rtol atol max_nfev", ["1"], REAL),
    (Langevin, "steps", [1.0, None, True], "{} must be an integer"),
    (Splitting, "shared_score", [1, None, "yes"], "{} must be True or False; got"),
    (TorchDiffEq, "rtol atol max_nfev", ["1"], REAL),
    (Corrected, "predictor", [None, "EM", Langevin()], "{} must be a solver"),
    (Corrected, "corrector", [None, 0.16, Langevin, SSCS()], "{} must be a Langevin"),
]
CASES = [
    (make, {option: value}, error, message.replace("{}", option))
    for error, rows in ((ValueError, BAD_VALUES), (TypeError, BAD_TYPES))
    for make, options, values, message in rows
    for option in options.split()
    for value in values
]
CASES += [
    (TorchDiffEq, {"options": {key: 0.1, "first_step": 0.1}}, ValueError, f"must not set {key}, ")
    for key in ("step_t", "step_size", "grid_constructor", "dtype")
]
CASES += [
    (Multistep, {"prediction": "noise", "stochasticity": x}, ValueError, "which is deterministic")
    for x in (0.5, lambda t: -t)
]
CASES += [(Multistep, {**PUBLISHED, "order": 3}, ValueError, "order 1 or 2")]


@pytest.mark.parametrize(("make", "options", "error", "message"), CASES, ids=name_of_case)
def test_bad_options_are_rejected(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_solvers_of_equal_options_are_equal():
    assert {GottaGoFast(atol=[0.01, 0.02]): 1}[GottaGoFast(atol=(0.01, 0.02))] == 1
    one, same = (TorchDiffEq(options={"first_step": 0.1}) for _ in range(2))
    assert {one: 1}[same] == 1
    assert one != TorchDiffEq()
    assert GottaGoFast() == GottaGoFast(noise_on_reject="bridge")


# Methods of torchdiffeq with their evaluations per step and orders.
DIFFEQ = [("euler", 1, 1), ("midpoint", 2, 2), ("heun2", 2, 2), ("heun3", 3, 3), ("rk4", 4, 4)]
DIFFEQ += [("dopri8", 13, 8), ("dopri5", 6, 5), ("bosh3", 3, 3), ("fehlberg2", 2, 2)]
DIFFEQ += [("adaptive_heun", 1, 2)]
FLOWS = [("bosh3", 3, 3), ("dopri5", 6, 5), ("dopri8", 12, 8)]
# Evaluations per step, and weak, strong and ODE order; orders are measured in test_orders.py.
FACTS = [
    *((TorchSDE(method=x), 1, 1, 1, None) for x in ("euler", "milstein")),
    (TorchSDE(method="srk"), 3, 2, 1.5, None),
    (TorchSDE(method="heun"), 2, 2, 1, None),
    (TorchSDE(method="euler_heun"), 1, 1, 1, None),
    (TorchSDE(method="midpoint"), 2, 1, 1, None),
    *((TorchDiffEq(method=x), n, None, None, p) for x, n, p in DIFFEQ),
    *((ProbabilityFlow(method=x), n, None, None, p) for x, n, p in FLOWS),
    (GottaGoFast(), 2, None, None, None),
    (EDMHeun(noise_scale=0.9), 2, None, None, 2),  # there is no noise to scale
    *((EDMHeun(churn=5.0, noise_scale=x), 2, None, None, None) for x in (0.9, 1.0000001)),
    *((Splitting(scheme=x), x.count("B"), 1, None, None) for x in ("OBA", "BAOAB", "ABOBAOB")),
    (Splitting(scheme="ABOBAOB", shared_score=True), 1, 1, None, None),
    (Corrected(solvers.StochasticHeun(), Langevin(steps=3)), 5, None, None, None),
]


@pytest.mark.parametrize(("solver", "nfe", "weak", "strong", "ode"), FACTS, ids=name_of_case)
def test_declared_facts(solver, nfe, weak, strong, ode):
    facts = solver.facts
    declared = (facts.nfe_per_step, facts.weak_order, facts.strong_order, facts.ode_order)
    assert declared == (nfe, weak, strong, ode)
