"""Linear SDEs with small blocks: schedules, transition kernels, and the processes of the field."""

from cldsde.linear.dynamics import Dynamics, TimeChangedDynamics
from cldsde.linear.function_dynamics import FunctionDynamics
from cldsde.linear.kernel import Gaussian, Kernel
from cldsde.linear.posterior import Posterior
from cldsde.linear.processes import CLD, HOLD, PSLD, VESDE, VPSDE, SubVPSDE
from cldsde.linear.schedule import Schedule
from cldsde.linear.sde import LinearSDE

__all__ = [
    "CLD",
    "HOLD",
    "PSLD",
    "VESDE",
    "VPSDE",
    "Dynamics",
    "FunctionDynamics",
    "Gaussian",
    "Kernel",
    "LinearSDE",
    "Posterior",
    "Schedule",
    "SubVPSDE",
    "TimeChangedDynamics",
]
