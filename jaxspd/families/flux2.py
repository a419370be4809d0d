"""FLUX.2 [dev], [klein] 4B and 9B, and the undistilled [klein] base models (Black Forest Labs, 2025)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.convert.checkpoint import read_json
from jaxspd.convert.flux2 import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import (
    FLUX1_SPECTRUM,
    BaseFamily,
    check_parts,
    read_spectrum,
    read_transformer_config,
)
from jaxspd.families.checks import SIDE, Autoencoder, TextPart
from jaxspd.families.configs import check_rope, read_flux2_autoencoder, read_scheduler
from jaxspd.models.flux2 import Flux2Config, Flux2Transformer
from jaxspd.models.packing import patchify, unpatchify
from jaxspd.sampling.schedule import empirical_shift, flow_match_sigmas, override_shift
from jaxspd.spectral.expansion import EXPANSION, Expansion, expand, share
from jaxspd.spectral.spectrum import Spectrum

# FLUX.1's, as placeholders: nobody has published a spectrum of FLUX.2's latents.
SPECTRUM = FLUX1_SPECTRUM
OFFICIAL_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
OFFICIAL_VAE = {"latent_channels": 32, "block_out_channels": [128, 256, 512, 512]}
KLEIN_4B = Flux2Config(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
# Hidden layers of the text encoder that are read, and what [dev] tells its own before the prompt.
DEV_LAYERS = (10, 20, 30)
KLEIN_LAYERS = (9, 18, 27)
DEV_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def expand_unpatchified(
    latents: jax.Array, noise: jax.Array, sigma: jax.Array, kappa: jax.Array, transform: str = "dct"
) -> jax.Array:
    """`spectral.expansion.expand` on the grid of latents beneath the patchified one: `[B, 4C, h, w]` to the
    grid of `noise` `[B, 4C, H, W]`.

    On the patchified grid the four latents of a patch are four channels and grow apart: each is centred
    on the patch's middle, half a fine latent from where it belongs. The latents stay normalised, so that
    their noise is white; that relies on the four having nearly the same statistics. When to grow is
    decided as for the patchified grid, by the published rule.
    """
    return patchify(expand(unpatchify(latents), unpatchify(noise), sigma, kappa, transform))


def share_unpatchified(
    noise: jax.Array, grids: Sequence[tuple[int, int]], transform: str = "dct"
) -> list[jax.Array]:
    """`spectral.expansion.share` on the grids of latents beneath the patchified `grids`."""
    beneath = [(2 * height, 2 * width) for height, width in grids]
    return [patchify(part) for part in share(unpatchify(noise), beneath, transform)]


@dataclass(frozen=True)
class Family(BaseFamily):
    """What the sampler and the generator need to know of a FLUX.2 checkpoint.

    Latents are the patchified ones, normalised: `[B, 128, h, w]`, a sixteenth of the picture's size. Without
    a folder it is FLUX.2 [klein] 4B as published, good for planning and counting.
    """

    name: ClassVar[str] = "flux2"
    title: ClassVar[str] = "FLUX.2"
    rules: ClassVar = RULES
    transformer: ClassVar = Flux2Transformer
    parts: ClassVar = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    weights: ClassVar = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}
    expansions: ClassVar = {
        "patchified": EXPANSION,
        "latent": Expansion(expand_unpatchified, share_unpatchified),
    }

    folder: Path | None = None
    config: Flux2Config = KLEIN_4B
    scheduler: dict = field(default_factory=lambda: OFFICIAL_SCHEDULER)
    vae: dict = field(default_factory=lambda: OFFICIAL_VAE)
    spectrum: Spectrum = SPECTRUM
    text_tokens: int = 512
    klein: bool = True
    distilled: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> "Family":
        """Reads the configuration of a pipeline folder in diffusers' layout; no weights."""
        check_parts(folder, cls.parts)
        index = read_json(folder / "model_index.json")
        klein = index["_class_name"] == "Flux2KleinPipeline"
        config, vae = read_transformer_config(folder, Flux2Config), read_flux2_autoencoder(folder)
        check_rope(folder, config.attention_head_dim, config.axes_dims_rope, 4)
        channels = 4 * vae["latent_channels"]
        if (config.in_channels, config.out_channels or config.in_channels, config.patch_size) != (
            channels,
            channels,
            1,
        ):
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels in patches of "
                f"{config.patch_size}, the VAE's latents patchify to {channels}; they do not belong together"
            )
        return cls(
            folder,
            config,
            read_scheduler(folder),
            vae,
            read_spectrum(folder, SPECTRUM),
            klein=klein,
            distilled=not klein or bool(index.get("is_distilled")),
        )

    # Defaults: those of the model cards.

    @property
    def default_steps(self) -> int:
        return 4 if self.klein and self.distilled else 50

    @property
    def default_guidance(self) -> float:
        return 1.0 if self.klein and self.distilled else 4.0

    default_size: ClassVar[tuple[int, int]] = (1024, 1024)

    # Geometry and schedule.

    latents_per_token: ClassVar[int] = 1

    def leading(self, frames: int) -> tuple[int, ...]:
        """The axes of latents between batch and grid."""
        return (4 * self.vae.get("latent_channels", 32),)

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** len(self.vae.get("block_out_channels", OFFICIAL_VAE["block_out_channels"]))

    @property
    def pixel_multiple(self) -> int:
        """What height and width must divide by on every grid: the VAE's factor times the patches'."""
        return self.pixels_per_latent

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]` for a picture of `tokens` at full resolution."""
        config = override_shift(self.scheduler, flow_shift)
        return flow_match_sigmas(config, steps, tokens, mu=empirical_shift(tokens, steps))

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one picture: matrix products and attention, text included."""
        c, both = self.config, tokens + self.text_tokens
        # Either kind of block: 4 D² around the attention, 3 D F in the gated MLP, 2 N D in attention itself.
        block = both * (4 * c.dim**2 + 3 * c.dim * c.mlp_dim + 2 * both * c.dim)
        edges = c.dim * (2 * tokens * c.in_channels + self.text_tokens * c.joint_attention_dim)
        return 2.0 * ((c.num_layers + c.num_single_layers) * block + edges + 18 * c.dim**2)

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: the others are distilled to need none."""
        return not self.distilled and guidance_scale > 1

    # The denoiser.

    def velocity_function(self, dtype):
        """`velocity(parameters, latents, sigma, conditioning)`, pure; latents `[B, 4C, H, W]`, σ a
        scalar, conditioning as `encode` and `condition` make it.
        """
        graph, _ = nnx.split(self.abstract_transformer(dtype))

        def velocity(parameters, latents, sigma, conditioning):
            grid = latents.shape[-2:]
            tokens = nnx.merge(graph, parameters)(
                rearrange(latents, "b c h w -> b (h w) c"),
                grid,
                conditioning["text"],
                jnp.broadcast_to(sigma, latents.shape[:1]),
                conditioning.get("guidance"),
            )
            return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])

        return velocity

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `condition`'s result: the same for every prompt."""
        shapes = {"text": (batch, self.text_tokens, self.config.joint_attention_dim)}
        if self.config.guidance_embeds:
            shapes["guidance"] = (batch,)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def condition(self, encoded: dict[str, np.ndarray], guidance: float) -> dict[str, np.ndarray]:
        """What the denoiser wants for a batch of encoded prompts."""
        if not self.config.guidance_embeds:
            return encoded
        return {**encoded, "guidance": np.full(len(encoded["text"]), guidance, np.float32)}

    # Text encoder and VAE.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        model, layers = (
            ("Qwen3ForCausalLM", KLEIN_LAYERS)
            if self.klein
            else ("Mistral3ForConditionalGeneration", DEV_LAYERS)
        )
        width = self.config.joint_attention_dim / len(layers)
        return (TextPart(model, width, self.text_tokens, layers=max(layers)),)

    @property
    def autoencoder(self) -> Autoencoder:
        # What it decodes is not patchified.
        side, channels = SIDE * self.pixels_per_latent // 2, self.vae["latent_channels"]
        return Autoencoder("AutoencoderKLFlux2", (channels, SIDE, SIDE), (3, side, side))

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Three hidden layers of the text encoder, side by side: `text` `[B, T, joint_attention_dim]`,
        float32. The model was trained on padding that can be seen, so nothing is masked.
        """
        import torch
        from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

        from jaxspd.families.torch_parts import embedding, open_tokenizer, readable, tokenize, torch_module

        tokenizer = open_tokenizer(self.folder / "tokenizer", chat=True)
        if self.klein:
            encoder_class, layers = Qwen3ForCausalLM, KLEIN_LAYERS
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            encoder_class, layers = Mistral3ForConditionalGeneration, DEV_LAYERS
            # A prompt must not pretend to bring a picture.
            texts = (("system", DEV_SYSTEM), ("user", None))
            chats = [
                [
                    {
                        "role": role,
                        "content": [{"type": "text", "text": text or prompt.replace("[IMG]", "")}],
                    }
                    for role, text in texts
                ]
                for prompt in prompts
            ]
            options = {"add_generation_prompt": False}
        with readable(self.folder / "tokenizer"):
            filled = tokenizer.apply_chat_template(chats, tokenize=False, **options)
        # The template writes whatever special tokens there are.
        tokens = tokenize(tokenizer, filled, self.text_tokens, add_special_tokens=False)
        part = self.folder / "text_encoder"
        with torch_module(encoder_class, part) as encoder:
            states = encoder.model(
                input_ids=tokens.input_ids.to(encoder.device),
                attention_mask=tokens.attention_mask.to(encoder.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            text = torch.cat([states[layer] for layer in layers], dim=-1)
            return {"text": embedding(text, part)}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures `[B, 1, H, W, 3]`, uint8, of clean latents `[B, 4C, h, w]`."""
        from diffusers import AutoencoderKLFlux2

        from jaxspd.families.torch_parts import decode, torch_module, vae_dtype

        with torch_module(AutoencoderKLFlux2, self.folder / "vae", vae_dtype()) as vae:
            mean, std = channel_statistics(vae)
            return decode(vae, np.asarray(unpatchify(latents * std + mean)))[:, None]

    @contextmanager
    def latent_encoder(self) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Opens the VAE for a function from pictures `[B, 1, H, W, 3]`, uint8, to clean latents
        `[B, 4C, h, w]`, float32.
        """
        import torch
        from diffusers import AutoencoderKLFlux2

        from jaxspd.families.torch_parts import encode, torch_module

        with torch_module(AutoencoderKLFlux2, self.folder / "vae", torch.float32) as vae:
            mean, std = channel_statistics(vae)
            yield lambda pixels: (np.asarray(patchify(encode(vae, pixels[:, 0]))) - mean) / std


def channel_statistics(vae) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation `[4C, 1, 1]` of the VAE's patchified latents, channel by channel."""
    mean, variance = (
        stats.float().cpu().numpy()[:, None, None] for stats in (vae.bn.running_mean, vae.bn.running_var)
    )
    return mean, np.sqrt(variance + vae.config.batch_norm_eps)
