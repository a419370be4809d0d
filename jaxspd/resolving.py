"""From what a user asked for to what a family will run."""

import logging
import math
from dataclasses import asdict, fields
from pathlib import Path

from jaxspd.errors import UsageError
from jaxspd.request import Request, SamplingParams
from jaxspd.sampling.solvers import SOLVERS, default_solver
from jaxspd.spectral.plan import MODES
from jaxspd.spectral.spectrum import Spectrum
from jaxspd.speed import at_speed

log = logging.getLogger("jaxspd")


def resolve(family, params: SamplingParams) -> Request:
    """The request that `family` will run for `params`, with its defaults filled in.

    If the family rounds sizes, or if the user gave none, height and width are rounded down, with a warning.
    Raises UsageError if the family cannot do it.
    """
    if isinstance(params, Request):
        return params
    params = at_speed(family, params)
    scheduler = params.scheduler or default_solver(family.scheduler)
    if scheduler not in SOLVERS:
        raise UsageError(f"unknown scheduler {scheduler!r}; use one of {', '.join(sorted(SOLVERS))}")
    guidance = family.default_guidance if params.guidance_scale is None else params.guidance_scale
    if not math.isfinite(guidance):
        raise UsageError(f"guidance_scale must be a finite number, not {guidance:g}")
    if params.negative_prompt and not family.guided(guidance):
        cure = "raise guidance_scale above 1 or leave it out" if family.guided(math.inf) else "leave it out"
        raise UsageError(f"{family.title} reads no negative prompt at guidance scale {guidance:g}; {cure}")
    negative = params.negative_prompt
    if family.guided(guidance) and negative is None:
        negative = family.default_negative_prompt
    grid = params.progressive_grid or next(iter(family.expansions))
    if grid not in family.expansions:
        raise UsageError(f"{family.title} has no {grid!r} grid to grow; use {' or '.join(family.expansions)}")
    if params.progressive_scales is not None and params.progressive_levels is not None:
        raise UsageError("give progressive_levels or progressive_scales, not both")
    levels = params.progressive_levels
    if params.progressive_scales is None and levels is None:
        levels = 1
    delta = params.progressive_delta
    if params.progressive_sigmas is None:
        delta = 0.01 if delta is None else delta
    elif delta is not None or params.spectrum is not None:
        raise UsageError("progressive_sigmas replace progressive_delta and spectrum; leave those out")
    if params.progressive_shift not in ("full", "stage"):
        raise UsageError(f"unknown progressive_shift {params.progressive_shift!r}; use full or stage")
    static = params.flow_shift is not None or not family.scheduler.get("use_dynamic_shifting")
    if params.progressive_shift == "stage" and static:
        raise UsageError("the noise levels do not depend on the picture's size; leave progressive_shift out")
    noise_levels = params.noise_levels or next(iter(family.noise_levels), None)
    if noise_levels and not family.noise_levels:
        raise UsageError(f"{family.title} has no noise levels to choose from; leave noise_levels out")
    if noise_levels and noise_levels not in family.noise_levels:
        known = " or ".join(family.noise_levels)
        raise UsageError(f"{family.title} has no noise levels {noise_levels!r}; use {known}")
    spectrum = params.spectrum
    if isinstance(spectrum, str):
        # The picture's parameters hold the file's contents, not its path.
        spectrum = asdict(Spectrum.from_file(Path(spectrum)))
    if (params.max_sequence_length or 0) > family.text_tokens:
        raise UsageError(
            f"{family.title} reads at most {family.text_tokens} tokens of text; lower max_sequence_length"
        )
    height, width = pixel_size(family, params)
    given = {item.name: getattr(params, item.name) for item in fields(params)}
    decided = dict(
        speed=None,  # the parameters that it sets are here
        progressive_mode=params.progressive_mode or "fullres",
        progressive_history=params.progressive_history or "forget",
        progressive_grid=grid,
        progressive_levels=levels,
        progressive_delta=delta,
        spectrum=spectrum,
        noise_levels=noise_levels,
        num_inference_steps=params.num_inference_steps or family.default_steps,
        guidance_scale=guidance,
        guidance_scale_2=second_guidance(family, params),
        negative_prompt=negative,
        scheduler=scheduler,
        num_frames=frames(family, params),
        fps=params.fps or family.default_fps,
        height=height,
        width=width,
    )
    return Request(**given | decided)


def second_guidance(family, params: SamplingParams) -> float | None:
    """The guidance scale of the second of two transformers, or None if there is only one.

    It is `guidance_scale_2`, or else `guidance_scale`, or else the family's default. Raises UsageError if
    `guidance_scale_2` is given and there is only one transformer.
    """
    given = params.guidance_scale_2
    if len(family.transformers) == 1:
        if given is not None:
            raise UsageError(f"{family.title} has one transformer; leave guidance_scale_2 out")
        return None
    if given is None:
        given = family.default_guidance_2 if params.guidance_scale is None else params.guidance_scale
    if not math.isfinite(given):
        raise UsageError(f"guidance_scale_2 must be a finite number, not {given:g}")
    return given


def used_levels(params: SamplingParams) -> int:
    """How many times the grid is halved: 0 in the mode `fullres`, and if scales are given.

    Raises UsageError for an unknown mode and a negative number of levels.
    """
    mode = "fullres" if params.progressive_mode is None else params.progressive_mode
    if mode not in MODES:
        raise UsageError(f"unknown progressive_mode {mode!r}; use one of {', '.join(MODES)}")
    levels = 1 if params.progressive_levels is None else params.progressive_levels
    if levels < 0:
        raise UsageError(f"progressive_levels must be 0 or more, not {levels}")
    return 0 if mode == "fullres" or params.progressive_scales else levels


def pixel_size(family, params: SamplingParams) -> tuple[int, int]:
    """Height and width in pixels for which all stages' grids exist. Raises UsageError for impossible ones."""
    levels = used_levels(params)
    default_height, default_width = family.default_size
    height, width = params.height or default_height, params.width or default_width
    smallest = family.pixel_multiple
    most = 0
    while smallest << (most + 1) <= min(height, width):
        most += 1
    if levels > most and min(height, width) >= smallest:
        raise UsageError(
            f"progressive_levels {levels} is too many for {width}×{height} pixels; use at most {most}"
        )
    multiple = smallest << levels
    if height % multiple == width % multiple == 0:
        return height, width
    needs = (
        f"{family.title} with {levels} progressive level{'s' * (levels != 1)} needs height and width in "
        f"multiples of {multiple}"
    )
    asked = params.height or params.width
    if (family.aligns_size or not asked) and min(height, width) >= multiple:
        aligned = height // multiple * multiple, width // multiple * multiple
        log.warning("%s: %d by %d becomes %d by %d", needs, height, width, *aligned)
        return aligned
    nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    raise UsageError(f"{needs}; the nearest to {height} by {width} is {nearest[0]} by {nearest[1]}")


def frames(family, params: SamplingParams) -> int:
    """The number of a video's frames, or 1 for a picture. Raises UsageError if the family cannot make it."""
    asked = params.num_frames or family.default_frames
    if family.default_fps is None:
        if asked != 1 or params.fps:
            raise UsageError(f"{family.title} makes pictures; leave num_frames and fps out")
        return 1
    unit = family.frames_per_latent
    if (asked - 1) % unit:
        nearest = (asked - 1 + unit // 2) // unit * unit + 1  # the larger one if two are as near
        raise UsageError(
            f"{family.title} makes {unit}k + 1 frames; the nearest num_frames to {asked} is {nearest}"
        )
    return asked
