"""The solvers by the names that users give them."""

from jaxspd.errors import UsageError
from jaxspd.sampling.euler import euler
from jaxspd.sampling.forecast import forecasting
from jaxspd.sampling.solver import Solver
from jaxspd.sampling.unipc import unipc

SOLVERS: dict[str, Solver] = {"euler": euler, "unipc": unipc}
# Which of them a scheduler class of diffusers stands for.
CLASSES = {"FlowMatchEulerDiscreteScheduler": "euler", "UniPCMultistepScheduler": "unipc"}


def default_solver(config: dict) -> str:
    """The solver's name that a checkpoint's `scheduler_config.json` asks for."""
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UsageError(f"scheduler_config.json names {name}; jaxspd has {', '.join(sorted(CLASSES))}")
    return CLASSES[name]


def solver_of(request) -> Solver:
    """The solver that a resolved request asks for, which forecasts where it is to."""
    solver = SOLVERS[request.scheduler]
    return solver if request.forecast is None else forecasting(solver)
