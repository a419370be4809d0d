"""The notice for a model that grows by another model's power spectrum."""

from jaxspd.request import Request
from jaxspd.spectral.plan import Plan


def borrowed_spectrum(family, request: Request, plan: Plan) -> str:
    """One line if another model's power spectrum decides when the grid of `plan` grows, or else an empty one.

    Nobody has published a spectrum of such a `family`. The line is empty if a spectrum was measured for the
    checkpoint, or if `request` gives a spectrum or the noise levels at which the grid grows.
    """
    given = request.spectrum is not None or request.progressive_sigmas is not None
    if given or not plan.levels or family.spectrum is not family.borrowed_spectrum:
        return ""
    return (
        f"{family.title} grows by FLUX.1's power spectrum, since nobody has published its own; "
        "`jaxspd calibrate` measures it"
    )
