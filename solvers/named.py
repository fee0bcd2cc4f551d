"""Registry of solvers by name, for the command line and for configurations."""

from __future__ import annotations

from cldsde.messages import imported, in_words, nearest

from .base import Solver, check_solver
from .edm_heun import EDMHeun
from .euler_maruyama import EulerMaruyama
from .exponential_euler import ExponentialEuler
from .exponential_multistep import ExponentialMultistep
from .gotta_go_fast import GottaGoFast
from .predictor_corrector import Ancestral, PredictorCorrector, ReverseDiffusion
from .probability_flow import ProbabilityFlow
from .splitting import Splitting
from .sscs import SSCS
from .stochastic_heun import StochasticHeun
from .with_torchdiffeq import TorchDiffEq
from .with_torchsde import TorchSDE

_SHORT = {"em": "euler-maruyama", "multistep": "multistep-2-sde"}


def named_solvers() -> dict[str, Solver]:
    """Registry of solvers: instances with their usual options, by the names used in commands."""
    multistep = ExponentialMultistep
    return {
        "euler-maruyama": EulerMaruyama(),
        "stochastic-heun": StochasticHeun(),
        "exponential-euler": ExponentialEuler(),
        "sscs": SSCS(),
        "sscs-midpoint": SSCS(score_step="midpoint"),
        "sscs-gaussian": SSCS(score_step="gaussian"),
        **{
            f"splitting-{word.lower()}": Splitting(scheme=word)
            for word in ("OBA", "BAO", "OBAB", "BAOAB", "OABAO")
        },
        "splitting-obab-shared": Splitting(scheme="OBAB", shared_score=True),
        "reverse-diffusion": ReverseDiffusion(),
        "ancestral": Ancestral(),
        "predictor-corrector": PredictorCorrector(),
        **{f"multistep-{n}-sde": multistep(order=n, stochasticity=1.0) for n in (1, 2, 3)},
        **{f"multistep-{n}": multistep(order=n) for n in (1, 2, 3)},
        **{f"multistep-{n}-corrector": multistep(order=n, corrector=True) for n in (1, 2, 3)},
        "multistep-2-noise": multistep(order=2, prediction="noise"),
        "edm-heun": EDMHeun(),
        "edm-heun-churn": EDMHeun(churn=10.0),
        # With step lengths per sample, an image depends on its seed alone.
        "probability-flow": ProbabilityFlow(pace="sample"),
        "probability-flow-bosh3": ProbabilityFlow(method="bosh3", pace="sample"),
        "probability-flow-dopri8": ProbabilityFlow(method="dopri8", pace="sample"),
        "gotta-go-fast": GottaGoFast(),
        "torchsde-euler": TorchSDE(method="euler"),
        "torchsde-srk": TorchSDE(method="srk"),
        "torchdiffeq-rk4": TorchDiffEq(method="rk4"),
        "torchdiffeq-dopri5": TorchDiffEq(method="dopri5"),
    }


def canonical_name(name: str) -> str:
    """Expand the short names ``em`` and ``multistep``; return any other name unchanged."""
    return _SHORT.get(name, name)


def find_solver(name: str, *others: str) -> Solver:
    """Look up a solver by name, or import a user's solver; raise ValueError if there is none.

    Parameters
    ----------
    name
        A name in `named_solvers`, ``em`` for ``euler-maruyama``, ``multistep`` for
        ``multistep-2-sde``, or ``module:ClassName`` of a solver that needs no arguments.
    others
        Further names that the caller accepts, for the error.
    """
    if ":" not in name:
        known = named_solvers()
        if canonical_name(name) not in known:
            allowed = ", ".join([*others, *known])
            msg = f"solver must be module:ClassName or one of {allowed}; got {name!r}"
            raise ValueError(msg + nearest(name, [*others, *known, *_SHORT]))
        return known[canonical_name(name)]
    found = imported(name)
    try:
        solver: object = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:
        msg = f"solver {name!r} cannot be made without arguments ({in_words(error)})"
        raise ValueError(msg) from error
    try:
        return check_solver(solver, f"solver {name!r}")
    except TypeError as error:
        raise ValueError(str(error)) from None
