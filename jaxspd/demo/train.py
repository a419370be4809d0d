"""Trains the demo's transformer with jaxspd's own Flax model.

    python -m jaxspd.demo.train --data DIR --checkpoint DIR --minutes 75

`--data` is what `jaxspd.demo.train_data` wrote. Every step sees the latents at full, half and quarter
resolution, the coarser ones being their low DCT frequencies at unchanged amplitude: exactly what the
staged sampler hands the transformer before it grows the grid (arXiv 2605.18736).
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from convert.checkpoint import write_component
from convert.flux1 import RULES
from convert.loader import flat_parameters
from jaxspd.models.flux1 import Flux1Config, Flux1Transformer
from jaxspd.models.packing import pack, unpack

CONFIG = Flux1Config(
    in_channels=64,
    num_layers=3,
    num_single_layers=6,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    axes_dims_rope=(4, 14, 14),
)
# Halvings of the grid, pictures of each in a step, and the shift of their σ: a coarse grid is only
# ever used at high noise, so that is where its lessons are.
GRIDS = ((0, 8, 1.0), (1, 8, 2.0), (2, 4, 2.5))
EMPTY_PROMPT_SHARE = 0.05


def low_frequencies(latents: jax.Array, halvings: int) -> jax.Array:
    """`latents` `[B, C, H, W]` on a grid `2**halvings` times coarser, constants kept constant."""
    height, width = (n >> halvings for n in latents.shape[-2:])
    spectrum = jax.scipy.fft.dctn(latents, axes=(-2, -1), norm="ortho")[..., :height, :width]
    return jax.scipy.fft.idctn(spectrum, axes=(-2, -1), norm="ortho") / 2**halvings


def loss_at(graph, parameters, latents, text, pooled, halvings, shift, key) -> jax.Array:
    """Flow-matching loss on one grid: mean of (v - (ε - x_0))² with σ drawn shifted by `shift`."""
    clean = low_frequencies(latents, halvings) if halvings else latents
    noise_key, sigma_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, clean.shape)
    batch = len(clean)
    # One σ from each of `batch` equal slices, so that every step sees all noise levels.
    uniform = (jnp.arange(batch) + jax.random.uniform(sigma_key, (batch,))) / batch
    sigma = jnp.exp(shift) * uniform / (1 + (jnp.exp(shift) - 1) * uniform)
    weight = sigma[:, None, None, None]
    noisy = (1 - weight) * clean + weight * noise
    height, width = clean.shape[-2:]
    grid = (height // 2, width // 2)
    velocity = nnx.merge(graph, parameters)(pack(noisy), grid, text, pooled, sigma)
    return jnp.mean((unpack(velocity, grid) - (noise - clean)) ** 2)


def muon_axes(parameters):
    """Which axes of each parameter Muon takes as a matrix: those of the blocks' weights."""

    def axes(path, value):
        names = [str(getattr(key, "key", key)) for key in path]
        inside = names[0] in ("double_blocks", "single_blocks") and "weight" in names
        if not inside or any("modulation" in name for name in names):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)

    return jax.tree.map_with_path(axes, parameters)


def batches(data: Path, seed: int):
    """Endless (latents, text, pooled) batches with the sizes of GRIDS joined, shuffled."""
    latents = np.load(data / "latents.npy", mmap_mode="r")
    text, pooled = np.load(data / "t5.npy"), np.load(data / "clip.npy")
    caption = np.load(data / "caption_index.npy")
    rng = np.random.default_rng(seed)
    size = sum(count for _, count, _ in GRIDS)
    while True:
        order = rng.permutation(len(latents))
        for start in range(0, len(order) - size + 1, size):
            rows = np.sort(order[start : start + size])
            rng.shuffle(rows)
            # Row 0 is the empty prompt: some pictures come without their caption.
            named = np.where(rng.random(size) < EMPTY_PROMPT_SHARE, 0, caption[rows])
            yield (
                latents[rows].astype(np.float32),
                text[named].astype(np.float32),
                pooled[named].astype(np.float32),
            )


def train(data: Path, checkpoint: Path, minutes: float, peak_rate: float, seed: int) -> None:
    model = Flux1Transformer(CONFIG, rngs=nnx.Rngs(seed))
    # As DiT (arXiv 2212.09748): gates and the output start at zero, each block as the identity.
    for modulation in (
        model.double_blocks.image_modulation,
        model.double_blocks.text_modulation,
        model.single_blocks.modulation,
        model.modulation_out,
    ):
        weight = modulation.linear.weight
        weight.set_value(jax.tree.map(jnp.zeros_like, weight.get_value()))
    model.out.weight[...] = jnp.zeros_like(model.out.weight[...])
    graph, parameters = nnx.split(model)

    # The rate is an argument: its schedule follows the clock, so that training ends when it should.
    def optimizer(rate):
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.contrib.muon(
                rate,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=muon_axes,
                weight_decay=0.01,
            ),
        )

    rate_of = optax.inject_hyperparams(optimizer)(rate=0.0)
    state = rate_of.init(parameters)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(parameters, average, state, batch, key, rate, decay):
        def loss(parameters):
            losses, start = [], 0
            for (halvings, count, shift), k in zip(GRIDS, jax.random.split(key, len(GRIDS)), strict=True):
                part = (array[start : start + count] for array in batch)
                losses.append(loss_at(graph, parameters, *part, halvings, shift, k))
                start += count
            weights = jnp.array([1.0, 0.5, 0.15])
            return jnp.dot(jnp.stack(losses), weights), jnp.stack(losses)

        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
        state.hyperparams["rate"] = rate
        update, state = rate_of.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, update)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, parameters)
        return parameters, average, state, losses

    average = jax.tree.map(jnp.copy, parameters)
    key = jax.random.key(seed)
    begin = saved = time.monotonic()
    recent = []
    for i, batch in enumerate(batches(data, seed)):
        done = (time.monotonic() - begin) / (60 * minutes)
        if done >= 1:
            break
        rate = peak_rate * min(1, (i + 1) / 50) * min(1, 2 * (1 - done))
        decay = min(0.998, (i + 1) / (i + 20))
        parameters, average, state, losses = step(
            parameters, average, state, batch, jax.random.fold_in(key, i), rate, decay
        )
        recent.append(losses)
        if i % 50 == 49:
            means = np.mean(jax.device_get(recent), axis=0)
            print(f"step {i + 1}  {done:4.0%}  loss {np.round(means, 4)}", flush=True)
            recent = []
        if time.monotonic() - saved > 600:
            save(average, checkpoint)
            saved = time.monotonic()
    save(average, checkpoint)


def save(parameters, checkpoint: Path) -> None:
    """Writes `transformer/` in the official layout, weights in float16."""
    write_component(
        checkpoint / "transformer",
        "FluxTransformer2DModel",
        asdict(CONFIG),
        RULES,
        flat_parameters(parameters),
        np.float16,
    )
    print(f"saved {checkpoint / 'transformer'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.checkpoint, args.minutes, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
