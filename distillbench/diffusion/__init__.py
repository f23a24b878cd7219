"""The mathematics every diffusion method stands on: schedules, denoisers, solvers, derivatives. No training here."""

from .base import Schedule, broadcast
from .denoiser import PREDICTIONS, Denoiser, Prediction
from .derivatives import finite_difference, jvp, time_derivative
from .schedules import EDM, SCHEDULES, Flow, Trig, VPCosine, VPLinear, VPTable, from_config, get_schedule, match_scale, match_time
from .solvers import SOLVERS, ddim, dpmpp_2m, euler, evaluations, evaluations_per_step, few_step, heun, jump, time_grid

__all__ = [
    "EDM", "PREDICTIONS", "SCHEDULES", "SOLVERS", "Denoiser", "Flow", "Prediction", "Schedule", "Trig", "VPCosine", "VPLinear", "VPTable",
    "broadcast", "ddim", "dpmpp_2m", "euler", "evaluations", "evaluations_per_step", "few_step", "finite_difference", "from_config",
    "get_schedule", "heun", "jump", "jvp", "match_scale", "match_time", "time_derivative", "time_grid",
]  # fmt: skip
