"""From a request and a family to the plan that will run."""

import itertools
from dataclasses import replace

import numpy as np

from jaxspd.errors import UsageError
from jaxspd.request import Request, SamplingParams
from jaxspd.resolving import resolve, used_levels
from jaxspd.sampling.forecast import forecasting_plan
from jaxspd.sampling.turns import divided_plan
from jaxspd.spectral.levels import Level, at_scales, halvings, parse_scales
from jaxspd.spectral.plan import Plan, activation_thresholds, make_plan
from jaxspd.spectral.spectrum import Spectrum

# This is 28 times the largest published videos. The activations of more tokens would fill any card.
MOST_TOKENS = 2**21


def reading(family, params: SamplingParams):
    """`family` with the number of text tokens that `params` asks for."""
    return replace(family, text_tokens=params.max_sequence_length or family.text_tokens)


def plan_request(family, params: SamplingParams) -> Plan:
    """The plan for `params`, resolved or not, on `family`. Raises UsageError if there is none."""
    request = resolve(family, params)
    leading = family.leading(request.num_frames)

    def tokens(grid: tuple[int, int]) -> int:
        return family.tokens((*leading, *grid))

    levels = grids(family, request)
    sizes = [tokens(level.latent) for level in levels]
    if sizes[-1] > MOST_TOKENS:
        raise UsageError(
            f"{request.width}×{request.height} pixels"
            + (f" in {request.num_frames} frames" if request.num_frames > 1 else "")
            + f" are {sizes[-1]} tokens for {family.title}; the most is {MOST_TOKENS}"
        )
    if request.progressive_shift == "full":
        sizes = sizes[-1:] * len(sizes)
    schedules = [schedule(family, request, size) for size in sizes]
    for sigmas in schedules:
        if not sigmas[0] > sigmas[1] or not np.all(np.diff(sigmas) <= 0):
            raise UsageError(
                f"the noise levels of {request.num_inference_steps} steps at {request.width}×"
                f"{request.height} pixels do not fall; use fewer steps, or a smaller height and width"
            )
    plan = make_plan(
        levels,
        schedules,
        thresholds(family, request, levels),
        mode=request.progressive_mode,
        tokens=tokens,
        transform=request.progressive_transform,
        delta=request.progressive_delta,
        respace=request.progressive_respace,
        noise=request.progressive_noise,
        history=request.progressive_history,
    )
    if len(family.transformers) > 1:
        plan = divided_plan(plan, family.is_second)
    return forecasting_plan(plan, request.forecast)


def schedule(family, request: Request, tokens: int) -> np.ndarray:
    """σ `[steps + 1]` for `request`, if the full grid has `tokens` tokens."""
    kind = {"noise_levels": request.noise_levels} if family.noise_levels else {}
    return family.sigmas(request.num_inference_steps, tokens, request.flow_shift, **kind)


def grids(family, request: Request) -> list[Level]:
    """The levels that `request` asks for, coarsest first."""
    latent = request.height // family.pixels_per_latent, request.width // family.pixels_per_latent
    if request.progressive_scales is None:
        return halvings(latent, used_levels(request))
    scales = parse_scales(request.progressive_scales, request.height)
    levels = at_scales(latent, scales, family.pixel_multiple // family.pixels_per_latent)
    return levels[-1:] if request.progressive_mode == "fullres" else levels


def thresholds(family, request: Request, levels: list[Level]) -> list[float]:
    """The σ at which the grid grows: the given ones, or those that follow from δ and the power spectrum.

    Raises UsageError for a wrong number of given ones, or ones that do not decrease between 1 and 0.
    """
    sigmas = request.progressive_sigmas
    if sigmas is None:
        spectrum = family.spectrum
        if request.spectrum is not None:
            spectrum = Spectrum.from_mapping(request.spectrum, "the spectrum given")
        assert request.progressive_delta is not None, "it has a default where no levels are given"
        return activation_thresholds(levels, spectrum, request.progressive_delta)
    if request.progressive_mode == "fullres":
        return []
    if len(sigmas) != len(levels) - 1:
        raise UsageError(
            f"progressive_sigmas needs a noise level for each change of resolution, {len(levels) - 1} in "
            f"all, not {len(sigmas)}"
        )
    if not all(a > b for a, b in itertools.pairwise([1, *sigmas, 0])):
        raise UsageError("progressive_sigmas must lie between 0 and 1 and decrease")
    return sigmas
