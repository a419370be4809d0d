"""Running an autoencoder: programs are compiled once per shape, work on chunks, and use tiles if memory is
short.
"""

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
from jaxspd.target import Target, spread_rows

log = logging.getLogger("jaxspd")
# Bytes that a program may take if the device does not tell how much memory it has.
BUDGET = 8 * 2**30
# Number of recently used programs that are kept.
RECENT = 32


@dataclass(frozen=True)
class Programs:
    """The compiled programs for one tile. `later` is for every chunk of a video except the first."""

    first: jax.stages.Compiled
    later: jax.stages.Compiled | None

    @property
    def bytes(self) -> int:
        """The larger memory need of the two programs: parameters, input, output, carried state and
        temporaries.
        """
        return max(program_bytes(program) for program in (self.first, self.later) if program is not None)


class Coder:
    """Encodes and decodes with one autoencoder, one sample at a time.

    A picture needs one program. A video needs two, for its first chunk and for all others, so a new length
    compiles nothing. A program whose memory, by the compiler's account, exceeds the budget is never run: the
    map is halved into tiles until a tile fits. Tiles are blended where they overlap. Their result is close to
    that of the whole map, but not equal: norms and attention see one tile only. Whatever fits is not split.
    """

    def __init__(
        self,
        autoencoder: Any,
        parameters: nnx.State,
        budget: int | None = None,
        target: Target | None = None,
    ):
        """`autoencoder` may be abstract; `parameters` fill it. They may be replaced between uses.

        `budget` is in bytes and includes the parameters. By default it is the free memory of the device of
        `target`, or `BUDGET` if the device does not tell.
        """
        self.graph, _ = nnx.split(autoencoder)
        self.parameters, self.config = parameters, autoencoder.config
        self.budget, self.target = budget, target or Target()
        self.compiled_programs = 0
        self._programs: OrderedDict[Any, jax.stages.Compiled] = OrderedDict()

    @property
    def room(self) -> int:
        """Bytes that a program may take, parameters included."""
        return self._free_bytes() if self.budget is None else self.budget

    def decode(self, latents: np.ndarray, splits: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels `[B, (T,) H, W, 3]`, float32 in [-1, 1], of raw latents `[B, C, (t,) h, w]`.

        `splits` are the numbers of tiles from top to bottom and from left to right; by default memory
        decides. Raises UsageError if memory is too small for the smallest tile.
        """
        maps = np.moveaxis(np.asarray(latents), 1, -1)
        return np.clip(np.stack([self._run("decode", one[None], splits) for one in maps]), -1, 1)

    def encode(self, pixels: np.ndarray, splits: tuple[int, int] | None = None) -> np.ndarray:
        """Raw latents `[B, C, (t,) h, w]`, float32, of pixels `[B, (T,) H, W, 3]` in [-1, 1]: the posterior's
        mode.

        `splits` and memory are as for `decode`. Raises UsageError if the size does not divide into latents.
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

    def _merged(self, parameters: nnx.State) -> Any:
        """The autoencoder with its parameters: a class of `image` or of `video`."""
        return nnx.merge(self.graph, parameters)

    def normalise(self, latents: np.ndarray) -> np.ndarray:
        """Raw latents in the transformer's scale, float32. FLUX.2's are patchified too."""
        return np.asarray(self._merged(self.parameters).normalise(latents))

    def denormalise(self, latents: np.ndarray) -> np.ndarray:
        """The transformer's latents as raw latents for `decode`: the reverse of `normalise`."""
        return np.asarray(self._merged(self.parameters).denormalise(latents))

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Compiles the programs that decode the transformer's latents of `shape` without tiles."""
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        raw = jax.eval_shape(
            lambda parameters, x: self._merged(parameters).denormalise(x), self.parameters, latents
        )
        _, channels, *sizes = raw.shape
        self._compile("decode", (1, *sizes, channels), (1, 1))

    def fits(self, way: str, shape: tuple[int, ...]) -> bool:
        """Whether maps of `shape`, `[1, (T,) H, W, C]`, fit without tiles. Compiles the programs to find
        out.
        """
        return self._compile(way, shape, (1, 1)).bytes <= self.room

    def plan(self, way: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The numbers of tiles, from top to bottom and from left to right, into which maps are split.

        `way` is "decode" or "encode", `shape` is `[1, (T,) H, W, C]`. Compiles the programs that will run.
        Raises UsageError if memory is too small for the smallest tile.
        """
        lengths = self._latents(way, shape)
        fixed, room, splits = parameter_bytes(self.parameters), self.room, (1, 1)
        needed: float
        while (needed := self._compile(way, shape, splits).bytes) > room:
            each = (needed - fixed) / _area(lengths, splits)
            # Memory grows with the area, so splits that cannot fit are skipped without being compiled.
            while needed > room:
                smaller = _halved(lengths, splits)
                if smaller is None:
                    raise UsageError(
                        f"to {way} even the smallest tile, the VAE needs {needed / 2**30:.1f} GB of memory, "
                        f"of which {room / 2**30:.1f} GB are free; free some more"
                    )
                splits = smaller
                needed = fixed + each * _area(lengths, splits)
        if splits != (1, 1):
            log.info("to %s in %.1f GB, the VAE works in %d×%d tiles", way, room / 2**30, *splits)
        return splits

    def _free_bytes(self) -> int:
        """Free bytes on the device plus those of the parameters; `BUDGET` if the device does not tell."""
        stats = self.target.device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return BUDGET
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) + parameter_bytes(self.parameters)

    def _latents(self, way: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width in latents of maps of `shape`."""
        unit = 1 if way == "decode" else self.config.scale
        return shape[-3] // unit, shape[-2] // unit

    def _run(self, way: str, maps: np.ndarray, splits: tuple[int, int] | None) -> np.ndarray:
        """The result for one sample's `maps` `[1, (T,) H, W, C]`, without the batch axis."""
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
        assert whole is not None, "every tile has a piece"
        return whole

    def _length(self, way: str, count: int) -> int:
        """The number of frames for `count` latent frames, or the reverse."""
        each = self.config.frames_per_latent
        return 1 + (count - 1) * each if way == "decode" else 1 + (count - 1) // each

    def _pieces(self, programs: Programs, way: str, tile: np.ndarray) -> Iterator[np.ndarray]:
        """The results for the chunks of a tile, in order."""
        size = 1 if way == "decode" or tile.ndim == 4 else self.config.frames_per_latent
        first = tile if tile.ndim == 4 else tile[:, :1]
        piece, state = programs.first(self.parameters, first)
        for begin in range(1, tile.shape[1] if tile.ndim == 5 else 0, size):
            assert programs.later is not None, "a tile of several chunks has a program for the later ones"
            # The device works on the next chunk while the host handles this one.
            ahead, state = programs.later(self.parameters, tile[:, begin : begin + size], state)
            yield np.asarray(piece)
            piece = ahead
        yield np.asarray(piece)

    def _by_rows(self, maps: Any) -> Any:
        """A tree of abstract maps, where they lie between programs."""
        rows = self.target.rows
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows(a.shape)), maps)

    def _compile(self, way: str, shape: tuple[int, ...], splits: tuple[int, int]) -> Programs:
        """The programs for one of the tiles into which maps of `shape` are split."""
        unit = 1 if way == "decode" else self.config.scale
        lengths = map(tiles.tile_length, self._latents(way, shape), splits)
        size = tuple(unit * length for length in lengths)
        video = len(shape) == 5
        # A single chunk carries nothing on: its state may need several times the memory of all else.
        whole = not video or shape[1] == 1
        key = way, size, shape[-1]

        def code(parameters, maps, *state):
            autoencoder, maps = self._merged(parameters), spread_rows(maps)
            if way == "encode":
                out = autoencoder.encode(maps, *state)
            else:
                out = autoencoder.decode(jnp.moveaxis(maps, -1, 1), *state)
            out, state = out if video else (out, ())
            state = () if whole else state
            return out if way == "decode" else jnp.moveaxis(out, 1, -1), state

        def chunk(frames: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *[frames] * video, *size, shape[-1]), jnp.float32)

        def lowered(frames: int, *state: Any, **options) -> jax.stages.Lowered:
            arguments = *self.target.abstract((self.parameters, chunk(frames))), *self._by_rows(state)
            places = jax.tree.map(lambda a: a.sharding, self._by_rows(jax.eval_shape(code, *arguments)))
            with self.target.tracing():
                made = jax.jit(code, keep_unused=True, out_shardings=places, **options)
                return made.lower(*arguments)

        jobs, first, later = {}, (*key, "only" if whole else "first"), (*key, "later")
        if first not in self._programs:
            jobs[first] = lowered(1)
        if not whole and later not in self._programs:
            _, state = jax.eval_shape(code, self.parameters, chunk(1))
            frames = 1 if way == "decode" else self.config.frames_per_latent
            # The carried state is overwritten.
            jobs[later] = lowered(frames, state, donate_argnums=2)
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
    """The area of one tile, in latents."""
    height, width = map(tiles.tile_length, lengths, splits)
    return height * width


def _halved(lengths: tuple[int, int], splits: tuple[int, int]) -> tuple[int, int] | None:
    """The splits with twice as many tiles, by the longer edge of a tile that can be halved; None if neither
    can.
    """
    rows, columns = splits
    height, width = map(tiles.tile_length, lengths, splits)
    by_length = [(2 * rows, columns), (rows, 2 * columns)]
    by_length = by_length if height > width else by_length[::-1]
    possible = (more for more in by_length if all(map(tiles.can_split, lengths, more)))
    return next(possible, None)


def _window(corner: tuple[int, int], sizes: list[int], unit: int) -> tuple:
    """The index of a tile in maps `[…, H, W, C]` with `unit` points per latent."""
    spans = (slice(unit * begin, unit * (begin + size)) for begin, size in zip(corner, sizes, strict=True))
    return (..., *spans, slice(None))


def program_bytes(program: jax.stages.Compiled) -> int:
    """The memory that a program needs, by the compiler's account. An input that is overwritten counts
    once.
    """
    m: Any = program.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def parameter_bytes(parameters: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters))
