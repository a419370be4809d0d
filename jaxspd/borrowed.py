"""What is said where a model grows by another model's power spectrum."""

from jaxspd.request import Request
from jaxspd.spectral.plan import Plan


def borrowed_spectrum(family, request: Request, plan: Plan) -> str:
    """One line where another model's power spectrum decides when the grid of `plan` grows; otherwise empty.

    Nobody has published a spectrum of such a `family`. The line is empty where one was measured for the
    checkpoint, and where `request` gives a spectrum or the noise levels at which the grid grows.
    """
    given = request.spectrum is not None or request.progressive_sigmas is not None
    if given or not plan.levels or family.spectrum is not family.borrowed_spectrum:
        return ""
    return (
        f"{family.title} grows by FLUX.1's power spectrum, since nobody has published its own; "
        "`jaxspd calibrate` measures it"
    )
