"""Procedural landscapes with captions: the data the demo checkpoint is trained on.

A picture is drawn from back to front (sky, sun or moon, clouds, ridges, ground) with analytic edge coverage,
so it is anti-aliased without drawing at a higher resolution. The given NumPy generator alone determines it.
Images in this module are float32 [H, W, 3] in [0, 1], with row 0 on top. Lengths along x and y are fractions
of the picture's side.

    cd bench && python -m training.landscapes --out drawings --count 1000

This writes pictures as PNG files, each named by its seed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TIMES = ("dawn", "noon", "golden hour", "night")
GROUNDS = ("lake", "meadow")


@dataclass(frozen=True)
class Scene:
    """The attributes of a picture."""

    time: str
    ground: str
    snow: bool


@dataclass(frozen=True)
class Palette:
    """Colours of one time of day, RGB in [0, 1]."""

    sky: tuple  # zenith, middle, horizon
    cloud: tuple  # lit side, shaded side
    light: tuple  # colour of direct light on land
    ambient: tuple  # colour of light in the shade
    disc: tuple  # sun or moon
    glow: float  # strength of the halo around the disc


PALETTES = {
    "dawn": Palette(
        sky=((0.40, 0.44, 0.72), (0.83, 0.64, 0.78), (1.00, 0.82, 0.78)),
        cloud=((1.00, 0.80, 0.82), (0.62, 0.54, 0.74)),
        light=(1.00, 0.76, 0.78),
        ambient=(0.40, 0.38, 0.58),
        disc=(1.00, 0.95, 0.90),
        glow=0.45,
    ),
    "noon": Palette(
        sky=((0.13, 0.38, 0.78), (0.36, 0.62, 0.92), (0.76, 0.88, 0.97)),
        cloud=((1.00, 1.00, 1.00), (0.72, 0.79, 0.89)),
        light=(1.04, 1.02, 0.96),
        ambient=(0.46, 0.54, 0.66),
        disc=(1.00, 1.00, 0.94),
        glow=0.35,
    ),
    "golden hour": Palette(
        sky=((0.33, 0.36, 0.52), (0.94, 0.58, 0.27), (1.00, 0.80, 0.36)),
        cloud=((1.00, 0.72, 0.36), (0.62, 0.36, 0.34)),
        light=(1.08, 0.72, 0.36),
        ambient=(0.42, 0.29, 0.32),
        disc=(1.00, 0.93, 0.66),
        glow=0.65,
    ),
    "night": Palette(
        sky=((0.015, 0.025, 0.085), (0.04, 0.075, 0.19), (0.11, 0.18, 0.34)),
        cloud=((0.24, 0.30, 0.45), (0.05, 0.08, 0.17)),
        light=(0.52, 0.62, 0.86),
        ambient=(0.13, 0.18, 0.33),
        disc=(0.96, 0.96, 0.88),
        glow=0.30,
    ),
}


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with independent, uniformly drawn attributes."""
    return Scene(TIMES[rng.integers(4)], GROUNDS[rng.integers(2)], bool(rng.integers(2)))


def sample(seed: int, size: int = 256) -> tuple[np.ndarray, str, Scene]:
    """The picture uint8 [size, size, 3], the caption and the scene of an integer seed."""
    scene, text, rng = describe(seed)
    return draw(scene, rng, size), text, scene


def describe(seed: int) -> tuple[Scene, str, np.random.Generator]:
    """The scene and caption of an integer seed, and the generator that draws its picture."""
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    return scene, caption(scene, rng), rng


def _smoothstep(low, high, value):
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _noise2d(rng, size, slope, stretch=1.0):
    """Periodic noise [size, size] of unit variance, with an amplitude proportional to frequency**-slope.

    ``stretch`` > 1 elongates the features along x.
    """
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(size).astype(np.float32)[None] * stretch
    radius = np.sqrt(fx * fx + fy * fy)
    radius[0, 0] = 1
    gain = radius**-slope
    gain[0, 0] = 0
    wave = rng.standard_normal((2, *gain.shape), dtype=np.float32) * gain
    noise = np.fft.irfft2(wave[0] + 1j * wave[1], s=(size, size))
    return noise / noise.std()


def _noise1d(rng, length, slope, lowest=1):
    """Periodic noise [length] of unit variance, from frequency ``lowest`` on, with an amplitude proportional
    to frequency**-slope.
    """
    k = np.arange(length // 2 + 1, dtype=np.float32)
    gain = np.where(k >= lowest, np.maximum(k, 1) ** -slope, 0)
    phase = rng.random(k.shape) * 2 * np.pi
    noise = np.fft.irfft(gain * np.exp(1j * phase), length).astype(np.float32)
    return noise / noise.std()


def _mix(image, colour, alpha):
    """Blends ``colour`` (RGB or image) over ``image`` with ``alpha`` [H, W] or scalar, in place."""
    alpha = np.asarray(alpha, np.float32)
    image += (np.asarray(colour, np.float32) - image) * (alpha[..., None] if alpha.ndim else alpha)


def _coverage(crest, size):
    """The share of each pixel [size, size] that lies below ``crest`` (y of each sub-column [4 * size])."""
    crest = crest.astype(np.float32) * size
    first, last = max(int(crest.min()), 0), min(int(crest.max()) + 1, size)
    cover = np.zeros((size, size), np.float32)
    cover[last:] = 1
    # Every sub-column has its own coverage, so steep spikes (trees) are smooth too.
    rows = np.arange(first, last, dtype=np.float32)[:, None] + 1
    for k in range(4):
        cover[first:last] += np.clip(rows - crest[None, k::4], 0, 1) / 4
    return cover


def _sky(rng, palette, size, horizon):
    y = np.linspace(0, 1, size, dtype=np.float32) / horizon
    stops = np.asarray(palette.sky, np.float32) * rng.uniform(0.94, 1.05, (3, 1))
    rows = np.stack([np.interp(y**0.9, (0.0, 0.55, 1.0), stops[:, c]) for c in range(3)], -1)
    return np.repeat(rows[:, None].astype(np.float32), size, 1)


def _light(image, rng, palette, scene, xs, ys, horizon):
    """Adds the sun or the moon (and stars) to the sky; returns its x."""
    size = len(image)
    sun_x = rng.uniform(0.12, 0.88)
    if scene.time in ("dawn", "golden hour"):
        sun_y, radius = horizon - rng.uniform(0.17, 0.34), rng.uniform(0.025, 0.034)
    else:
        sun_y, radius = rng.uniform(0.08, 0.2), rng.uniform(0.026, 0.038)
    if scene.time == "night":
        count = int(rng.integers(90, 190))
        sy = (rng.random(count) * horizon * size).astype(int)
        sx = rng.integers(0, size, count)
        image[sy, sx] += (rng.random(count) ** 3 * 0.75 + 0.15)[:, None] * np.array([0.9, 0.95, 1])
        big = slice(0, count // 9)
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            image[np.clip(sy[big] + dy, 0, size - 1), (sx[big] + dx) % size] += 0.17
    distance = np.sqrt((xs - sun_x) ** 2 + (ys - sun_y) ** 2)
    halo = palette.glow * (np.exp(-distance / 0.16) * 0.75 + np.exp(-distance / 0.045) * 0.6)
    _mix(image, palette.disc, np.minimum(halo, 0.9))
    disc = np.clip((radius - distance) * size + 0.5, 0, 1)
    face = np.ones_like(disc)
    if scene.time == "night":  # maria on the moon
        face -= 0.16 * np.clip(np.sin(90 * xs + 2) * np.sin(70 * ys + 60 * xs), 0, 1)
    _mix(image, np.asarray(palette.disc, np.float32) * face[..., None], disc)
    return sun_x


def _clouds(image, rng, palette, xs, ys, horizon, sun_x):
    size = len(image)
    noise = _noise2d(rng, size, 1.75, stretch=rng.uniform(2.0, 3.2))
    step = max(1, size // 85)
    toward = 1.0 if sun_x > 0.5 else -1.0
    relief = noise - np.roll(noise, (-step, -int(toward) * step), (0, 1))
    amount = rng.uniform(-0.2, 1.1)
    cover = _smoothstep(amount, amount + 1.1, noise) * _smoothstep(1.1, 0.75, ys / horizon) * 0.9
    lit = np.clip(0.55 + 0.9 * relief, 0, 1)[..., None]
    bright, shade = (np.asarray(c, np.float32) for c in palette.cloud)
    _mix(image, shade + (bright - shade) * lit, cover)


def _ridge_line(rng, length, height, roughness):
    """The height [length] of a crest above its base: broad peaks with rough detail."""
    x = np.linspace(0, 1, length, dtype=np.float32)
    crest = np.zeros(length, np.float32)
    for _ in range(int(rng.integers(3, 6))):
        centre, width = rng.uniform(-0.05, 1.05), rng.uniform(0.16, 0.4)
        peak = rng.uniform(0.55, 1.0) * np.maximum(1 - np.abs(x - centre) / width, 0) ** 1.15
        crest = np.maximum(crest, peak)
    return height * (0.22 + 0.78 * crest + roughness * _noise1d(rng, length, 1.25, 2))


def _mountains(canvas, rng, palette, scene, all_ys, horizon, sun_x, haze, layers):
    """Draws ridges from far to near. The light comes from the sun's side."""
    size = len(canvas)
    light = np.asarray(palette.light, np.float32)
    ambient = np.asarray(palette.ambient, np.float32)
    side = 1.0 if sun_x > 0.5 else -1.0
    columns = np.arange(size)
    tops = np.linspace(rng.uniform(0.36, 0.44), rng.uniform(0.13, 0.2), layers)
    last = int((horizon + 0.06) * size)  # a meadow may dip below the horizon
    for layer, top in enumerate(tops):
        near = layer / max(layers - 1, 1)
        height = _ridge_line(rng, 4 * size, top, 0.07 - 0.02 * near)
        rows = slice(max(int((horizon - height.max()) * size), 0), last)
        image, ys = canvas[rows], all_ys[rows]
        cover = _coverage(horizon - height, size)[rows]
        crest = height.reshape(size, 4).mean(1)
        texture = _noise2d(rng, size, 1.6)[rows]
        depth = np.maximum(ys - (horizon - crest[None]), 0)  # below the crest
        # Faces have the crest's slope, read at a column that drifts further away down the slope. So spurs run
        # down from every peak.
        kernel = np.hanning(size // 14 + 3)
        slope = np.convolve(np.pad(np.gradient(crest) * size, len(kernel), "edge"), kernel, "same")
        slope = (slope / kernel.sum())[len(kernel) : -len(kernel)].astype(np.float32)
        wander = (texture * (0.006 + 0.16 * depth) * size).astype(np.int32)
        facing = -side * slope[np.clip(columns[None] + wander, 0, size - 1)]
        rough = texture - np.roll(texture, int(side), 1)
        lit = 1 / (1 + np.exp(-(2.6 * facing + 1.3 * rough)))
        shade = ambient + (light - ambient) * lit[..., None]
        rock = np.array([0.47, 0.44, 0.43], np.float32) * rng.uniform(0.9, 1.1)
        green = np.array([0.26, 0.37, 0.20], np.float32) * rng.uniform(0.85, 1.1)
        below = depth + 0.018 * texture
        albedo = np.empty_like(image)
        albedo[:] = rock
        _mix(albedo, green, _smoothstep(0.3 * top, 0.75 * top, below) * (0.55 + 0.4 * near))
        albedo *= 1 + 0.07 * texture[..., None]
        if scene.snow:
            line = top * rng.uniform(0.42, 0.6)
            # Snow depends on the altitude, with less of it on faces in the shade.
            altitude = horizon - ys + 0.02 * texture
            cap = _smoothstep(line - 0.022, line + 0.022, altitude + 0.018 * (lit - 0.5))
            cap = np.maximum(cap, _smoothstep(0.075, 0.03, below) * (0.95 - 0.2 * near))
            _mix(albedo, (1.0, 1.0, 1.02), cap * 0.97)
            _whiten(shade, cap * 0.5)
        colour = albedo * shade
        fade = haze * (1 - near) * 0.42 + 0.3 * _smoothstep(0.3 * top, 1.15 * top, depth)
        _mix(colour, _horizon_colour(palette), fade)
        _mix(image, colour, cover)


def _whiten(shade, amount):
    """Removes colour, in place, from light that falls on snow, which the eye sees as white."""
    _mix(shade, shade.max(-1, keepdims=True), amount)


def _horizon_colour(palette):
    _, middle, horizon = (np.asarray(c, np.float32) for c in palette.sky)
    return 0.35 * middle + 0.65 * horizon * 0.93


def _trees(image, rng, palette, ys, horizon):
    """Draws a dark belt of conifers along a part of the far edge of the ground."""
    size = len(image)
    x = np.arange(4 * size, dtype=np.float32) / (4 * size)
    belt = np.clip(0.35 + 0.75 * _noise1d(rng, 4 * size, 1.6), 0, 1.5)
    tops = np.zeros(4 * size, np.float32)
    for spacing in (0.011, 0.017):
        cell = np.floor(x / spacing).astype(int)
        heights = rng.uniform(0.45, 1.0, cell[-1] + 1).astype(np.float32)
        saw = 1 - np.abs(x / spacing - cell - 0.5) * 1.7
        tops = np.maximum(tops, heights[cell] * saw)
    tall = rng.uniform(0.022, 0.042)
    crest = horizon + 0.006 - tall * belt * tops - 0.012 * belt
    light = 0.45 * np.asarray(palette.light) + 0.55 * np.asarray(palette.ambient)
    colour = np.array([0.13, 0.22, 0.13]) * light * 1.1
    _mix(image, colour.astype(np.float32), _coverage(crest, size) * (ys < horizon + 0.01))


def _lake(image, rng, palette, xs, ys, horizon, sun_x):
    """Draws water below the horizon that mirrors the picture above it."""
    size = len(image)
    first = round(horizon * size)
    water = ys[first:] - horizon  # [rows, 1], grows toward the viewer
    ripple = _noise2d(rng, size, 1.5, stretch=6.0)[first:]
    calm = rng.uniform(0.5, 1.1)
    source = first - 1 - (water * size) * 1.02 + ripple * calm * (0.5 + 14 * water)
    source = np.clip(source, 0, first - 1.001)
    low = source.astype(np.int32)
    part = (source - low)[..., None]
    columns = np.arange(size)[None]
    mirror = image[low, columns] * (1 - part) + image[low + 1, columns] * part
    tint = np.array([0.10, 0.26, 0.40], np.float32) * (np.asarray(palette.ambient, np.float32) * 0.9 + 0.05)
    _mix(mirror, tint, np.broadcast_to(0.24 + 0.85 * water, ripple.shape))
    mirror *= 0.92 + 0.035 * ripple[..., None] * np.minimum(1, 0.3 + 5 * water)[..., None]
    spread = np.exp(-(((xs - sun_x) / (0.035 + 0.25 * water)) ** 2))
    _mix(mirror, palette.disc, spread * _smoothstep(0.5, 2.0, ripple) * palette.glow * 0.75)
    shore = np.exp(-water * size / 1.2)
    _mix(mirror, _horizon_colour(palette), np.broadcast_to(0.35 * shore, ripple.shape))
    image[first:] = mirror


def _meadow(image, rng, palette, scene, ys, horizon):
    """Draws rolling grass, with flowers in summer and patches of snow in winter."""
    size = len(image)
    crest = horizon + 0.012 * _noise1d(rng, 4 * size, 2.0)
    cover = _coverage(crest, size)
    first = max(int((horizon - 0.06) * size), 0)
    down = np.clip(ys[first:] - horizon, 0.004, None)
    # Perspective: the ground's texture is read at columns x / z and rows 1 / z.
    patch = _noise2d(rng, size, 2.0)
    zoom = 0.09 / (down + 0.03)
    column = ((np.arange(size)[None] - size / 2) * (0.25 + zoom) + size / 2).astype(np.int32) % size
    row = (zoom * size * 0.9).astype(np.int32) % size
    patch = patch[row, column]
    # The texture shows tufts, not single blades: a small decoder could not carry noise down to the pixel.
    blades = _noise2d(rng, size, 1.25, stretch=0.4)[first:]
    near = np.clip(down / 0.3, 0, 1)
    light = np.asarray(palette.light, np.float32)
    ambient = np.asarray(palette.ambient, np.float32)
    lit = np.clip(0.68 + 0.13 * patch + 0.11 * blades * (0.35 + 0.65 * near), 0, 1.2)
    grass = np.empty((*patch.shape, 3), np.float32)
    grass[:] = np.array([0.37, 0.58, 0.17], np.float32) * rng.uniform(0.9, 1.1)
    _mix(grass, (0.17, 0.38, 0.11), _smoothstep(-0.6, 1.6, patch) * 0.8)
    _mix(grass, (0.62, 0.62, 0.24), _smoothstep(0.3, 1.8, -patch) * 0.45)
    snow_light = None
    if scene.snow:
        drift = patch + 0.18 * blades - rng.uniform(-0.2, 0.3)
        cap = _smoothstep(-0.5, 0.5, drift) * (0.9 + 0.04 * blades)
        _mix(grass, (0.97, 0.98, 1.0), cap)
        snow_light = cap * 0.5
    elif rng.random() < 0.75:
        _flowers(grass, rng, int(rng.integers(60, 190)), ys[first, 0], horizon)
    shade = ambient + (light - ambient) * lit[..., None]
    if snow_light is not None:
        _whiten(shade, snow_light)
    colour = grass * shade
    veil = np.broadcast_to(0.38 * np.exp(-down / 0.05), patch.shape)
    _mix(colour, _horizon_colour(palette), veil)
    colour *= (1.04 - 0.25 * near**2)[..., None]
    _mix(image[first:], colour, cover[first:])


def _flowers(grass, rng, count, top, horizon):
    size = grass.shape[1]
    hues = np.array([[1, 0.98, 0.95], [1, 0.84, 0.2], [0.9, 0.3, 0.35], [0.66, 0.5, 0.9]])
    hue = hues[rng.integers(4, size=2)]
    down = 0.02 + (1 - horizon - 0.03) * rng.random(count) ** 0.8
    for at, x in zip(down, rng.random(count), strict=True):
        radius = 0.6 + 4.5 * at
        cy, cx = (horizon + at - top) * size, x * size
        y0, y1 = max(int(cy - radius - 1), 0), min(int(cy + radius + 2), len(grass))
        x0, x1 = max(int(cx - radius - 1), 0), min(int(cx + radius + 2), size)
        if y0 >= y1 or x0 >= x1:
            continue
        gy, gx = np.ogrid[y0:y1, x0:x1]
        disc = np.clip(radius + 0.5 - np.hypot((gy - cy) * 1.3, gx - cx), 0, 1)
        _mix(grass[y0:y1, x0:x1], hue[rng.integers(2)] * rng.uniform(0.85, 1.1), disc * 0.85)


def draw(scene: Scene, rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Draws ``scene``; returns uint8 [size, size, 3]."""
    palette = PALETTES[scene.time]
    ys = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    xs = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None]
    horizon = rng.uniform(0.58, 0.66)
    image = _sky(rng, palette, size, horizon)
    sun_x = _light(image, rng, palette, scene, xs, ys, horizon)
    _clouds(image, rng, palette, xs, ys, horizon, sun_x)
    haze = rng.uniform(0.75, 1.1)
    layers = int(rng.integers(2, 4))
    _mountains(image, rng, palette, scene, ys, horizon, sun_x, haze, layers)
    _trees(image, rng, palette, ys, horizon)
    if scene.ground == "lake":
        _lake(image, rng, palette, xs, ys, horizon, sun_x)
    else:
        _meadow(image, rng, palette, scene, ys, horizon)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


_TIME_WORDS = {
    "dawn": ("at dawn", "at sunrise"),
    "noon": ("at noon", "at midday", "under the midday sun"),
    "golden hour": ("at golden hour", "at sunset"),
    "night": ("at night", "under the moon"),
}
_GROUND_WORDS = {
    "lake": ("mountain lake", "alpine lake"),
    "meadow": ("mountain meadow", "green meadow", "grassy meadow"),
}
_SNOW_WORDS = {
    True: (" with snow", " with snowy peaks"),
    False: ("", " in summer", " without snow"),
}
_ADJECTIVES = ("serene", "quiet", "wide", "peaceful", "lonely", "beautiful")
_OPENINGS = ("", "", "", "a photo of ", "a view of ")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in one of many wordings, e.g. "a serene mountain lake at golden hour with
    snow".
    """

    def pick(words):
        return words[rng.integers(len(words))]

    time, ground = pick(_TIME_WORDS[scene.time]), pick(_GROUND_WORDS[scene.ground])
    adjective = pick(_ADJECTIVES) + " " if rng.random() < 0.75 else ""
    if scene.snow and rng.random() < 0.2:
        return f"{pick(_OPENINGS)}snow-capped mountains and {_article(adjective + ground)} {time}"
    return f"{pick(_OPENINGS)}{_article(adjective + ground)} {time}{pick(_SNOW_WORDS[scene.snow])}"


def _article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_TIME_KEYS = (
    ("dawn", ("dawn", "sunrise")),
    ("noon", ("noon", "midday")),
    ("golden hour", ("golden hour", "sunset")),
    ("night", ("night", "moon")),
)


def parse(text: str) -> Scene:
    """The scene that a caption describes. Raises ValueError if an attribute is missing."""
    lower = text.lower()
    times = [time for time, keys in _TIME_KEYS if any(key in lower for key in keys)]
    grounds = [ground for ground in GROUNDS if ground in lower]
    # No wording contains another ("at noon", "under the moon"), so exactly one match is expected.
    if len(times) != 1 or len(grounds) != 1:
        raise ValueError(f"cannot read a scene from {text!r}")
    return Scene(times[0], grounds[0], "snow" in lower and "without snow" not in lower)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, args.first_seed + args.count):
        Image.fromarray(sample(seed)[0]).save(args.out / f"{seed:06d}.png")


if __name__ == "__main__":
    main()
