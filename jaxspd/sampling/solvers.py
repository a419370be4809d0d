"""The solvers, by the names that users choose them by."""

from jaxspd.errors import UsageError
from jaxspd.sampling.euler import euler
from jaxspd.sampling.forecast import forecasting
from jaxspd.sampling.solver import Solver
from jaxspd.sampling.unipc import unipc

SOLVERS: dict[str, Solver] = {"euler": euler, "unipc": unipc}
# The solver that each scheduler class of diffusers is.
CLASSES = {"FlowMatchEulerDiscreteScheduler": "euler", "UniPCMultistepScheduler": "unipc"}


def default_solver(config: dict) -> str:
    """The name of the solver that a checkpoint's `scheduler_config.json` asks for.

    Raises UsageError for a scheduler class that `CLASSES` lacks.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UsageError(f"scheduler_config.json names {name}; jaxspd has {', '.join(sorted(CLASSES))}")
    return CLASSES[name]


def solver_of(request) -> Solver:
    """The solver that a resolved request asks for, with a `forecast` if steps are to be forecast."""
    solver = SOLVERS[request.scheduler]
    return solver if request.forecast is None else forecasting(solver)
