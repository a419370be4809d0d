"""The grids that a picture grows through, coarsest first."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from jaxspd.errors import UsageError


@dataclass(frozen=True)
class Level:
    """One resolution of the latents.

    `latent` is its grid `(h, w)`. `scale` is c, the side's ratio to the full grid's. `nyquist` is the highest
    frequency ω that the grid is taken to hold, in cycles per image.
    """

    latent: tuple[int, int]
    scale: float
    nyquist: float


def halvings(latent: tuple[int, int], levels: int) -> list[Level]:
    """Levels for the full grid `latent` `(H, W)` and `levels` successive halvings of it, coarsest first.

    The grids are `(H // 2^k, W // 2^k)`, and ω is `min(h, w) // 2` of each. Both are integer divisions, as in
    the published stage splits. Raises UsageError for a negative number of levels and for too many.
    """
    if levels < 0:
        raise UsageError(f"progressive levels must be 0 or more, not {levels}")
    grids = [(latent[0] >> k, latent[1] >> k) for k in range(levels, -1, -1)]
    if min(grids[0]) < 2:
        most = int(math.log2(min(latent))) - 1
        raise UsageError(
            f"{levels} progressive levels are too many for a {latent[0]}×{latent[1]} latent grid; "
            f"use at most {most}"
        )
    return [Level(grid, 2.0 ** (i - levels), min(grid) // 2) for i, grid in enumerate(grids)]


def at_scales(latent: tuple[int, int], scales: Sequence[float], multiple: int = 1) -> list[Level]:
    """A level for each of `scales`, which increase from above 0 to 1, on the full grid `latent` `(H, W)`.

    Sides are rounded to multiples of `multiple`. ω is `c·min(H, W) / 2`, where c is the scale as asked,
    whatever the rounding did to the grid. Raises UsageError for other scales, and if two give one grid.
    """
    if not scales or scales[-1] != 1 or scales[0] <= 0:
        raise UsageError("progressive scales must be above 0 and end in 1")
    if any(a >= b for a, b in itertools.pairwise(scales)):
        raise UsageError("progressive scales must increase")
    levels = []
    for scale in scales:
        height, width = (max(1, round(scale * n / multiple)) * multiple for n in latent)
        levels.append(Level((height, width), float(scale), scale * min(latent) / 2))
    if any(a.latent == b.latent for a, b in itertools.pairwise(levels)):
        raise UsageError("two progressive scales give the same latent grid; drop one of them")
    return levels


def parse_scales(texts: Sequence[str], height: int) -> list[float]:
    """Reads scales from decimals (`0.5`) and fractions (`2/3`).

    If any is above 1, all are heights in pixels, and the last must be `height`. Raises UsageError for others.
    """
    values = []
    for text in texts:
        try:
            if "e" in text.lower():  # Fraction("1e999999999") would take for ever
                raise ValueError
            values.append(Fraction(text))
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"cannot read the progressive scale {text!r}; use a decimal, a fraction or a height in pixels"
            ) from None
    if max(values, default=0) > 1:
        if values[-1] != height:
            raise UsageError(
                f"progressive scales in pixels must end in the picture's height, {height}, not {texts[-1]}"
            )
        values = [value / height for value in values]
    return [float(value) for value in values]
