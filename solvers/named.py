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
from .published import ddim, ddpm, deis, dpm_solver_pp, sa_solver, unipc
from .splitting import Splitting
from .sscs import SSCS
from .stochastic_heun import StochasticHeun
from .with_torchdiffeq import TorchDiffEq
from .with_torchsde import TorchSDE

# The schedulers of diffusers have order 2 by default.
_SHORT = {
    "em": "euler-maruyama",
    "multistep": "multistep-2-sde",
    "dpm-solver++": "dpm-solver++-2",
    "dpm-solver++-sde": "dpm-solver++-2-sde",
    "dpmpp_2m": "dpm-solver++-2",
    "dpmpp_2m_sde": "dpm-solver++-2-sde",
    "dpmpp_3m_sde": "dpm-solver++-3-sde",
    "euler_ancestral": "ddpm",
    "unipc": "unipc-2",
    "deis": "deis-2",
    "sa-solver": "sa-solver-2",
}


def named_solvers() -> dict[str, Solver]:
    """Registry of solvers: instances with their usual options, by the names used in commands."""
    return validated_solvers() | published_solvers()


def published_solvers() -> dict[str, Solver]:
    """Settings of `ExponentialMultistep` that equal published methods, by the methods' names."""
    orders = (1, 2, 3)
    return {
        "ddim": ddim(),
        "ddpm": ddpm(),
        **{f"dpm-solver++-{n}": dpm_solver_pp(n) for n in orders},
        **{f"dpm-solver++-{n}-sde": dpm_solver_pp(n, sde=True) for n in orders},
        **{f"unipc-{n}": unipc(n) for n in orders},
        **{f"deis-{n}": deis(n) for n in orders},
        **{f"sa-solver-{n}": sa_solver(n) for n in orders},
    }


def validated_solvers() -> dict[str, Solver]:
    """Named solvers that a validation checks by default; published ones are tested elsewhere."""
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
    """Name of a solver in `named_solvers`, for other names of it and for any case of letters.

    Names of code, ``module:ClassName``, are returned as they are.
    """
    return name if ":" in name else _SHORT.get(name.lower(), name.lower())


def find_solver(name: str, *others: str) -> Solver:
    """Look up a solver by name, or import a user's solver; raise ValueError if there is none.

    Parameters
    ----------
    name
        A name in `named_solvers` in any case; another name of such a solver, as ``em`` for
        ``euler-maruyama`` or ``dpmpp_2m`` for ``dpm-solver++-2``; or ``module:ClassName`` of a
        solver that needs no arguments.
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
