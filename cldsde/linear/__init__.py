"""Linear SDEs with small blocks: schedules, transition kernels, and the processes of the field."""

from cldsde.linear.dynamics import Dynamics, TimeChangedDynamics
from cldsde.linear.function_dynamics import FunctionDynamics
from cldsde.linear.interpolants import CosineVP, RectifiedFlow
from cldsde.linear.kernel import Gaussian, Kernel
from cldsde.linear.posterior import Posterior
from cldsde.linear.processes import CLD, HOLD, PSLD, VESDE, VPSDE, SubVPSDE
from cldsde.linear.schedule import Schedule
from cldsde.linear.sde import LinearSDE
from cldsde.linear.signal_noise import SignalNoiseDynamics

__all__ = [
    "CLD",
    "HOLD",
    "PSLD",
    "VESDE",
    "VPSDE",
    "CosineVP",
    "Dynamics",
    "FunctionDynamics",
    "Gaussian",
    "Kernel",
    "LinearSDE",
    "Posterior",
    "RectifiedFlow",
    "Schedule",
    "SignalNoiseDynamics",
    "SubVPSDE",
    "TimeChangedDynamics",
]
