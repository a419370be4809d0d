"""Running an autoencoder: programs compiled once a shape, by chunks, in tiles where memory asks for it."""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.vae import tiles
from jaxspd.target import Target

log = logging.getLogger("jaxspd")
# Bytes that a program may take where the device does not tell how much it has.
BUDGET = 8 * 2**30
# So many of the programs used last are kept.
RECENT = 32


@dataclass(frozen=True)
class Programs:
    """What works on one tile. `later` takes the place of `first` for every chunk but the first of a video."""

    first: jax.stages.Compiled
    later: jax.stages.Compiled | None

    @property
    def bytes(self) -> int:
        """The most that either takes: parameters, input, output, what is carried, and all between."""
        return max(program_bytes(program) for program in (self.first, self.later) if program is not None)


class Coder:
    """Encodes and decodes with one autoencoder, one sample after the other.

    There is one program for a picture; two for a video, of its first chunk and of any other, so that its
    length compiles nothing. A program whose memory, by the compiler's account, exceeds the budget is never
    run: the map is halved into tiles until it fits, and tiles are blended where they overlap. Tiles are close
    to the whole, not equal: norms and attention see a tile only. Whatever fits is done as a whole.
    """

    def __init__(
        self,
        autoencoder: nnx.Module,
        parameters: nnx.State,
        budget: int | None = None,
        target: Target | None = None,
    ):
        """`autoencoder` may be abstract, `parameters` fill it; they may be put in and taken out between uses.
        `budget` is in bytes, parameters included; by default what is free on the device of `target`, or
        `BUDGET` where that does not tell.
        """
        self.graph, _ = nnx.split(autoencoder)
        self.parameters, self.config = parameters, autoencoder.config
        self.budget, self.target = budget, target or Target()
        self.compiled_programs = 0
        self._programs: OrderedDict[Any, jax.stages.Compiled] = OrderedDict()

    @property
    def room(self) -> int:
        """Bytes that a program may take, with the parameters."""
        return self._free_bytes() if self.budget is None else self.budget

    def decode(self, latents: np.ndarray, splits: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels `[B, (T,) H, W, 3]`, float32 in [-1, 1], of raw latents `[B, C, (t,) h, w]`.

        `splits` are the tiles from top to bottom and from left to right, instead of what memory asks for.
        UsageError where memory suffices for no tile.
        """
        maps = np.moveaxis(np.asarray(latents), 1, -1)
        return np.clip(np.stack([self._run("decode", one[None], splits) for one in maps]), -1, 1)

    def encode(self, pixels: np.ndarray, splits: tuple[int, int] | None = None) -> np.ndarray:
        """Raw latents `[B, C, (t,) h, w]`, float32, the posterior's mode, of pixels `[B, (T,) H, W, 3]` in
        [-1, 1]; otherwise as `decode`. UsageError for a size that does not divide into latents.
        """
        pixels, config = np.asarray(pixels), self.config
        height, width = pixels.shape[-3:-1]
        if height % config.scale or width % config.scale:
            raise UsageError(
                f"{width}×{height} pixels do not divide into latents; use multiples of {config.scale}"
            )
        if pixels.ndim == 5 and (pixels.shape[1] - 1) % config.frames_per_latent:
            raise UsageError(
                f"{pixels.shape[1]} frames do not divide into latents; use one more than a multiple of "
                f"{config.frames_per_latent}"
            )
        return np.moveaxis(np.stack([self._run("encode", one[None], splits) for one in pixels]), -1, 1)

    def normalise(self, latents: np.ndarray) -> np.ndarray:
        """Raw latents as the transformer knows them, float32; of FLUX.2's kind patchified too."""
        return np.asarray(nnx.merge(self.graph, self.parameters).normalise(latents))

    def denormalise(self, latents: np.ndarray) -> np.ndarray:
        """The transformer's latents as `decode` wants them: `normalise`'s reverse."""
        return np.asarray(nnx.merge(self.graph, self.parameters).denormalise(latents))

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Compiles what decodes the transformer's latents of `shape` at once."""
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        raw = jax.eval_shape(
            lambda parameters, x: nnx.merge(self.graph, parameters).denormalise(x), self.parameters, latents
        )
        _, channels, *sizes = raw.shape
        self._compile("decode", (1, *sizes, channels), (1, 1))

    def fits(self, way: str, shape: tuple[int, ...]) -> bool:
        """Whether maps of `shape`, `[1, (T,) H, W, C]`, go through at once. Compiles what would be run."""
        return self._compile(way, shape, (1, 1)).bytes <= self.room

    def plan(self, way: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Into how many tiles, from top to bottom and from left to right, maps of `shape` are split to `way`:
        "decode", or "encode". A shape is `[1, (T,) H, W, C]`. Compiles what will be run.
        """
        lengths = self._latents(way, shape)
        fixed, room, splits = parameter_bytes(self.parameters), self.room, (1, 1)
        while (needed := self._compile(way, shape, splits).bytes) > room:
            each = (needed - fixed) / _area(lengths, splits)
            # Memory goes with the area, so what cannot fit is passed over without being compiled.
            while needed > room:
                splits = _halved(lengths, splits)
                if splits is None:
                    raise UsageError(
                        f"to {way} even the smallest tile, the VAE needs {needed / 2**30:.1f} GB of memory, "
                        f"of which {room / 2**30:.1f} GB are free; free some more"
                    )
                needed = fixed + each * _area(lengths, splits)
        if splits != (1, 1):
            log.info("to %s in %.1f GB, the VAE works in %d×%d tiles", way, room / 2**30, *splits)
        return splits

    def _free_bytes(self) -> int:
        """Bytes that are free on the device, with the parameters' own; `BUDGET` where it does not tell."""
        stats = self.target.device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return BUDGET
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) + parameter_bytes(self.parameters)

    def _latents(self, way: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width in latents of maps of `shape`."""
        unit = 1 if way == "decode" else self.config.scale
        return shape[-3] // unit, shape[-2] // unit

    def _run(self, way: str, maps: np.ndarray, splits: tuple[int, int] | None) -> np.ndarray:
        """What one sample's `maps` `[1, (T,) H, W, C]` become, without the batch."""
        splits = splits or self.plan(way, maps.shape)
        programs = self._compile(way, maps.shape, splits)
        lengths, scale = self._latents(way, maps.shape), self.config.scale
        before, after = (1, scale) if way == "decode" else (scale, 1)
        sizes = [*map(tiles.tile_length, lengths, splits)]
        fades = [*map(tiles.weights, lengths, splits, (after, after))]
        begins = [*map(tiles.starts, lengths, splits)]
        whole = None
        for row, column in product(*map(range, splits)):
            corner = begins[0][row], begins[1][column]
            tile = maps[_window(corner, sizes, before)]
            weight = fades[0][row][:, None, None] * fades[1][column][:, None]
            done = 0
            for piece in self._pieces(programs, way, tile):
                if whole is None:
                    frames = () if piece.ndim == 4 else (self._length(way, maps.shape[1]),)
                    whole = np.zeros((*frames, *(n * after for n in lengths), piece.shape[-1]), np.float32)
                place = whole[_window(corner, sizes, after)]
                if piece.ndim == 5:
                    place = place[done : done + piece.shape[1]]
                    done += piece.shape[1]
                place += weight * piece[0]
        return whole

    def _length(self, way: str, count: int) -> int:
        """Frames of as many latent frames, or the reverse."""
        each = self.config.frames_per_latent
        return 1 + (count - 1) * each if way == "decode" else 1 + (count - 1) // each

    def _pieces(self, programs: Programs, way: str, tile: np.ndarray) -> Iterator[np.ndarray]:
        """What the chunks of a tile become, one after the other."""
        size = 1 if way == "decode" or tile.ndim == 4 else self.config.frames_per_latent
        first = tile if tile.ndim == 4 else tile[:, :1]
        piece, state = programs.first(self.parameters, first)
        for begin in range(1, tile.shape[1] if tile.ndim == 5 else 0, size):
            # The next chunk is under way while the host deals with this one.
            ahead, state = programs.later(self.parameters, tile[:, begin : begin + size], state)
            yield np.asarray(piece)
            piece = ahead
        yield np.asarray(piece)

    def _compile(self, way: str, shape: tuple[int, ...], splits: tuple[int, int]) -> Programs:
        """The programs for one of the tiles that maps of `shape` are split into."""
        unit = 1 if way == "decode" else self.config.scale
        lengths = map(tiles.tile_length, self._latents(way, shape), splits)
        size = tuple(unit * length for length in lengths)
        video = len(shape) == 5
        # Of the only chunk nothing is carried on: it may take several times the memory of all else.
        whole = not video or shape[1] == 1
        key = way, size, shape[-1]

        def code(parameters, maps, *state):
            autoencoder = nnx.merge(self.graph, parameters)
            if way == "encode":
                out = autoencoder.encode(maps, *state)
            else:
                out = autoencoder.decode(jnp.moveaxis(maps, -1, 1), *state)
            out, state = out if video else (out, ())
            state = () if whole else state
            return out if way == "decode" else jnp.moveaxis(out, 1, -1), state

        def chunk(frames: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *[frames] * video, *size, shape[-1]), jnp.float32)

        def lowered(*arguments, **options) -> jax.stages.Lowered:
            with self.target.tracing():
                return jax.jit(code, keep_unused=True, **options).lower(*self.target.abstract(arguments))

        jobs, first, later = {}, (*key, "only" if whole else "first"), (*key, "later")
        if first not in self._programs:
            jobs[first] = lowered(self.parameters, chunk(1))
        if not whole and later not in self._programs:
            _, state = jax.eval_shape(code, self.parameters, chunk(1))
            frames = 1 if way == "decode" else self.config.frames_per_latent
            # What is carried is written over.
            jobs[later] = lowered(self.parameters, chunk(frames), state, donate_argnums=2)
        if jobs:
            with ThreadPoolExecutor(len(jobs)) as pool:
                compiled = list(pool.map(lambda job: job.compile(), jobs.values()))
            self._programs.update(zip(jobs, compiled, strict=True))
            self.compiled_programs += len(jobs)
        used = [first] if whole else [first, later]
        for one in used:
            self._programs.move_to_end(one)
        while len(self._programs) > RECENT:
            self._programs.popitem(last=False)
        return Programs(self._programs[first], None if whole else self._programs[later])


def _area(lengths: tuple[int, int], splits: tuple[int, int]) -> int:
    """Latents of one tile."""
    height, width = map(tiles.tile_length, lengths, splits)
    return height * width


def _halved(lengths: tuple[int, int], splits: tuple[int, int]) -> tuple[int, int] | None:
    """Twice as many tiles, along the longer of their edges that can be halved; None where none can."""
    rows, columns = splits
    height, width = map(tiles.tile_length, lengths, splits)
    by_length = [(2 * rows, columns), (rows, 2 * columns)]
    by_length = by_length if height > width else by_length[::-1]
    possible = (more for more in by_length if all(map(tiles.can_split, lengths, more)))
    return next(possible, None)


def _window(corner: tuple[int, int], sizes: list[int], unit: int) -> tuple:
    """The index of a tile in maps `[…, H, W, C]`, `unit` points to a latent."""
    spans = (slice(unit * begin, unit * (begin + size)) for begin, size in zip(corner, sizes, strict=True))
    return (..., *spans, slice(None))


def program_bytes(program: jax.stages.Compiled) -> int:
    """The memory that a program takes, by the compiler's account; what it writes over counts once."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def parameter_bytes(parameters: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters))
