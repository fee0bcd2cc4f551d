"""Linear SDEs with small blocks: schedules, transition kernels, and the processes of the field."""

from cldsde.linear.dynamics import TimeChangedDynamics
from cldsde.linear.identity import same_process
from cldsde.linear.interpolants import CosineVP, RectifiedFlow
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
    "CosineVP",
    "Gaussian",
    "Kernel",
    "LinearSDE",
    "Posterior",
    "RectifiedFlow",
    "Schedule",
    "SubVPSDE",
    "TimeChangedDynamics",
    "same_process",
]
