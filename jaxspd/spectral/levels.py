"""The grids that a picture grows through, coarsest first."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from jaxspd.errors import UsageError


@dataclass(frozen=True)
class Level:
    """One resolution: latent grid `(h, w)`, its scale c of the full grid, and the highest frequency
    ω it is trusted with, in cycles per image (its Nyquist frequency).
    """

    latent: tuple[int, int]
    scale: float
    nyquist: float


def halvings(latent: tuple[int, int], levels: int) -> list[Level]:
    """The full grid and `levels` successive halvings of it.

    Grids are `H // 2^k`, and ω is `min(h, w) // 2` of each grid, both in integer division: the rule
    that the published stage splits follow.
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
    """Grids at any increasing `scales` that end in 1, their sides snapped to `multiple`.

    ω is `c·min(H, W) / 2`; the scale is kept as asked, whatever the snapping did to the grid.
    """
    if not scales or scales[-1] != 1 or scales[0] <= 0:
        raise UsageError("progressive scales must be above 0 and end in 1")
    if any(a >= b for a, b in itertools.pairwise(scales)):
        raise UsageError("progressive scales must increase")
    levels = []
    for scale in scales:
        grid = tuple(max(1, round(scale * n / multiple)) * multiple for n in latent)
        levels.append(Level(grid, float(scale), scale * min(latent) / 2))
    if any(a.latent == b.latent for a, b in itertools.pairwise(levels)):
        raise UsageError("two progressive scales give the same latent grid; drop one of them")
    return levels


def parse_scales(texts: Sequence[str], height: int) -> list[float]:
    """Scales of decimals (`0.5`), fractions (`2/3`) or, where any is above 1, heights in pixels of which
    the last is `height`.
    """
    values = []
    for text in texts:
        try:
            if "e" in text.lower():  # as in 1e999999999, which takes for ever to write out
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
