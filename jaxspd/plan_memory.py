"""Counts the memory that a request takes on an accelerator, before anything is compiled or downloaded.

The sizes of activations are those that XLA's compilers for GPUs gave for each model (`bench/devices.py`).
Weights and activations are in bfloat16, as they are on accelerators.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.components.text_encoder import KINDS, TextPart, without_table
from jaxspd.models.vae import VaeConfig, abstract_autoencoder
from jaxspd.models.vae.coder import parameter_bytes
from jaxspd.request import Request
from jaxspd.sampling.solvers import solver_of
from jaxspd.spectral.plan import Plan

DTYPE = jnp.bfloat16
# How many streamed layers are on the device: one that runs, and the next one, which is on its way.
STREAMED_LAYERS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: the transformer's weights, and the peak of each phase, weights included.

    Text encoders are streamed, guidance runs both prompts in one forward, and the VAE decodes without tiles.
    If memory is short, two forwards and tiles take less.
    """

    weights: int
    encode_peak: int
    denoise_peak: int
    decode_peak: int


def plan_memory(family, request: Request, plan: Plan) -> Memory:
    """The memory that `plan`, made from the resolved `request`, takes on a device."""
    weights = weight_bytes(family.abstract_transformer(DTYPE), family.streamed)
    samples = 1 + family.guided(request.guidance_scale)
    leading = family.leading(request.num_frames)
    solver = solver_of(request)
    denoise = 0
    for stage in plan.stages:
        latents = jax.ShapeDtypeStruct((1, *leading, *stage.latent), jnp.float32)
        held = parameter_bytes((latents, jax.eval_shape(solver.init, latents)))
        layer = round(jnp.dtype(DTYPE).itemsize * family.live_channels(stage.tokens))
        denoise = max(denoise, held + samples * layer)
    encode = max((encode_bytes(family, asked, samples) for asked in family.texts), default=0)
    decode = decode_bytes(family, leading, plan.stages[-1].latent)
    return Memory(weights, weights + encode, weights + denoise, weights + decode)


def memory_line(memory: Memory) -> str:
    """The memory in one line for people to read, in GB of 10⁹ bytes."""
    names = {"encoding": memory.encode_peak, "denoising": memory.denoise_peak, "decoding": memory.decode_peak}
    peaks = ", ".join(f"{peak / 1e9:.2f} {phase}" for phase, peak in names.items())
    weights = f"{memory.weights / 1e9:.2f} GB of weights"
    return f"on a GPU or TPU, in bfloat16: {weights}; with them at most {peaks}"


def weight_bytes(model: nnx.Module, streamed: bool) -> int:
    """The bytes of a model's weights on the device. Of a `streamed` model's layers, only two count."""
    layers: dict[tuple, int] = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        # A layer's path contains its number.
        numbers = [place for place, part in enumerate(path) if isinstance(part, int)]
        layer = path[: numbers[0] + 1] if numbers else ()
        layers[layer] = layers.get(layer, 0) + parameter_bytes(parameter)
    return layers.pop((), 0) + (STREAMED_LAYERS * max(layers.values()) if streamed else sum(layers.values()))


def encode_bytes(family, asked: TextPart, texts: int) -> int:
    """The bytes that a text encoder takes while it reads `texts` texts at once, with streamed layers."""
    config_class, kind = KINDS[asked.kind]
    config: Any = config_class.from_folder(family.folder / asked.part) if family.folder else asked.published
    model = without_table(kind(config, asked.states), DTYPE)
    # The attention's scores are in float32, and exist before and after the softmax.
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    scores = 2 * 4 * heads * asked.tokens**2
    return weight_bytes(model, streamed=True) + texts * scores


def decode_bytes(family, leading: tuple[int, ...], latent: tuple[int, int]) -> int:
    """The bytes that the VAE takes, weights included, for a whole picture or a chunk of a video.

    The result is 0 for a VAE that is not in `models/vae/`.
    """
    vae, dtype = family.vae, family.vae_dtype or DTYPE
    if not isinstance(vae, VaeConfig):
        return 0
    weights = parameter_bytes(nnx.state(abstract_autoencoder(vae, dtype)))
    frames = vae.frames_per_latent if len(leading) > 1 and leading[-1] > 1 else 1
    pixels = frames * latent[0] * latent[1] * family.pixels_per_latent**2
    return weights + round(pixels * vae.live_channels(frames) * jnp.dtype(dtype).itemsize)
