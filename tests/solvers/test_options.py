"""Options: what is out of range is rejected by name, equal options are equal, facts follow them."""

import math

import pytest

from cldsde import solvers
from cldsde.solvers import (
    SSCS,
    EDMHeun,
    GottaGoFast,
    ProbabilityFlow,
    Splitting,
    TorchDiffEq,
    TorchSDE,
)
from cldsde.solvers import ExponentialMultistep as Multistep
from probes import name_of_case

POSITIVE, REAL = "{} must be finite and positive", "{} must be a real number"
Corrected, Langevin = solvers.PredictorCorrector, solvers.Langevin
BUDGETED = [GottaGoFast, ProbabilityFlow, TorchDiffEq]
WITHOUT = [SSCS(), Multistep(corrector=True), GottaGoFast()]
# Solvers, options, values out of range or of another type, and the message; {} is the option.
BAD_VALUES = [
    (SSCS, "score_step", ["Euler"], "{} must be one of 'euler', 'midpoint', 'gaussian'"),
    (SSCS, "data_variance", [0.0], POSITIVE),
    (EDMHeun, "churn", [-0.1, math.inf], "{} must be finite and at least 0; got"),
    (EDMHeun, "noise_scale", [0.0], POSITIVE),
    (EDMHeun, "churn_range", [(2.0, 1.0), (0.0, math.nan), (1.0,), "01"], r"{} must be \(S_min"),
    (Multistep, "order", [0, 4, 2.0], "{} must be 1, 2 or 3; got"),
    (Multistep, "prediction variable weights", ["t"], "{} must be one of"),
    (Multistep, "weights", ["published", "sa_solver"], "variable must be 'kappa' with {}"),
    (Multistep, "stochasticity", [-0.1], "{} must be finite and at least 0"),
    (GottaGoFast, "rtol atol first_step", [0.0, math.nan], POSITIVE),
    (GottaGoFast, "atol", [[0.01, 0.0]], POSITIVE),
    (GottaGoFast, "safety exponent", [0.0, 1.1], "{} must lie in"),
    (GottaGoFast, "max_nfev", [1], "{} must be at least 2; got 1"),
    (GottaGoFast, "noise_on_reject", ["Bridge"], "{} must be one of 'bridge', 'fresh'"),
    (Langevin, "snr", [0.0], POSITIVE),
    (Langevin, "steps", [0], "{} must be at least 1"),
    (Langevin, "norm", ["mean"], "{} must be one of 'sample', 'batch'"),
    (ProbabilityFlow, "method", ["rk4"], "{} must be one of 'bosh3', 'dopri5', 'dopri8'"),
    (ProbabilityFlow, "rtol atol first_step max_step", [0.0], POSITIVE),
    (ProbabilityFlow, "max_nfev", [0], "{} must be"),
    (ProbabilityFlow, "pace", ["both"], "{} must be one of 'batch', 'sample'; got 'both'"),
    (Splitting, "scheme", ["OB", "oba", 3], "{} must contain each of the letters"),
    (Splitting, "score_time", ["middle"], "{} must be one of 'start', 'end'; got"),
    (TorchDiffEq, "method", ["explicit_adams"], "{} must be one of 'dopri8'"),
    (TorchDiffEq, "rtol atol", [0.0], POSITIVE),
    (TorchDiffEq, "max_nfev", [0], "{} must be"),
    (TorchSDE, "method", ["log_ode"], "{} must be one of 'euler'"),
    (Corrected, "predictor", WITHOUT, "{} must have a state at each grid time"),
]
BAD_TYPES = [
    (GottaGoFast, "rtol", ["1"], REAL),
    (GottaGoFast, "atol", ["0.01", ["a"]], "{} must be a"),
    (Langevin, "steps", [1.0], "{} must be an integer"),
    *((x, "max_nfev", [2.5, 1e4, True], "{} must be an integer; got") for x in BUDGETED),
    (Splitting, "shared_score", [1], "{} must be True or False; got"),
    (Corrected, "corrector", [Langevin, SSCS()], "{} must be a Langevin"),
]
CASES = [
    (make, {option: value}, error, message.replace("{}", option))
    for error, rows in ((ValueError, BAD_VALUES), (TypeError, BAD_TYPES))
    for make, options, values, message in rows
    for option in options.split()
    for value in values
]
THIRD = {"variable": "kappa", "weights": "dpm_solver_3m"}
SA = {"variable": "kappa", "weights": "sa_solver"}
WITH_ORDER = solvers.dpm_solver_pp, solvers.unipc, solvers.deis, solvers.sa_solver
CASES += [
    (TorchDiffEq, {"options": {"step_t": 0.1}}, ValueError, "must not set step_t, "),
    (Multistep, {"prediction": "noise", "stochasticity": 0.5}, ValueError, "is deterministic"),
    (Multistep, {"prediction": "noise", "corrector": True}, ValueError, "corrector must be False"),
    (Multistep, {**THIRD, "order": 2}, ValueError, "needs order=3 and corrector=False"),
    (Multistep, {**THIRD, "order": 3, "corrector": True}, ValueError, "needs order=3 and"),
    (Multistep, {**SA, "prediction": "noise"}, ValueError, "prediction must be 'data' with"),
    *((make, {"order": 4}, ValueError, "order must be 1, 2 or 3") for make in WITH_ORDER),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), CASES, ids=name_of_case)
def test_bad_options_are_rejected(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_solvers_of_equal_options_are_equal():
    assert {GottaGoFast(atol=[0.01, 0.02]): 1}[GottaGoFast(atol=(0.01, 0.02))] == 1
    one, same = (TorchDiffEq(options={"first_step": 0.1}) for _ in range(2))
    assert {one: 1}[same] == 1


# Evaluations per step, and weak, strong and ODE order, of solvers whose orders no test measures or
# whose options change them; other orders are measured in test_orders.py.
FACTS = [
    (TorchSDE(method="milstein"), 1, 1, 1, None),
    (TorchSDE(method="srk"), 3, 2, 1.5, None),
    (TorchSDE(method="heun"), 2, 2, 1, None),
    *((TorchSDE(method=x), n, 1, 1, None) for x, n in (("euler_heun", 1), ("midpoint", 2))),
    (EDMHeun(noise_scale=0.9), 2, None, None, 2),  # there is no noise to scale
    (EDMHeun(churn=5.0, noise_scale=1.0000001), 2, None, None, None),
]


@pytest.mark.parametrize(("solver", "nfe", "weak", "strong", "ode"), FACTS, ids=name_of_case)
def test_declared_facts(solver, nfe, weak, strong, ode):
    facts = solver.facts
    declared = (facts.nfe_per_step, facts.weak_order, facts.strong_order, facts.ode_order)
    assert declared == (nfe, weak, strong, ode)
