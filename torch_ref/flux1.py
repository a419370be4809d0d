"""FLUX.1 with spectral progressive diffusion (arXiv 2605.18736) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from torch_ref.reference import Reference
from torch_ref.solvers import denoise
from torch_ref.spectral import Growth, stage_noises


def set_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, tokens: int
) -> list[float]:
    """Prepares ``scheduler`` and returns the sigmas at which its steps begin, without the final 0.

    ``tokens`` is the number of packed image tokens at full resolution. A scheduler without
    dynamic shifting ignores the shift that follows from it.
    """
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    retrieve_timesteps(scheduler, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    return scheduler.sigmas[:-1].tolist()


class Flux1Reference(Reference):
    """FLUX.1 as diffusers computes it; latents stay spatial, ``[B, C, H, W]`` in float32."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 states ``[B, S, D]`` and pooled CLIP states ``[B, P]`` of ``prompts``."""
        length = min(512, self.pipeline.tokenizer_2.model_max_length)
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=length)
        return prompt_embeds, pooled

    @torch.no_grad()
    def velocity(
        self,
        latents: torch.Tensor,
        sigma: float,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        guidance_scale: float = 3.5,
    ) -> torch.Tensor:
        """Predicted ``noise - clean`` at ``latents`` ``[B, C, H, W]``, same shape, float32.

        A model without guidance embedding (schnell) ignores ``guidance_scale``.
        """
        transformer, pipeline = self.pipeline.transformer, self.pipeline
        batch, channels, height, width = latents.shape
        dtype, device = transformer.dtype, self.device
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((batch,), guidance_scale, dtype=torch.float32, device=device)
        velocity = transformer(
            hidden_states=pipeline._pack_latents(latents.to(device, dtype), batch, channels, height, width),
            timestep=torch.full((batch,), sigma, dtype=torch.float32, device=device),
            guidance=guidance,
            pooled_projections=pooled.to(device, dtype),
            encoder_hidden_states=prompt_embeds.to(device, dtype),
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, dtype=dtype, device=device),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        # The pipeline's unpacking takes a size in pixels and divides it by the scale factor.
        factor = pipeline.vae_scale_factor
        return pipeline._unpack_latents(velocity, height * factor, width * factor, factor).float()

    @torch.no_grad()
    def denoise(
        self,
        noises: Sequence[np.ndarray | torch.Tensor],
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        *,
        num_inference_steps: int,
        guidance_scale: float = 3.5,
        **growth,
    ) -> torch.Tensor:
        """Clean latents ``[B, C, H, W]`` of a whole generation, in float32.

        ``noises`` holds one N(0, 1) array for each stage, coarsest first. ``noises[0]`` is the initial
        latent. Each other one is noise in the *coefficient* domain, on the whole grid of its stage (see
        :func:`torch_ref.spectral.expand`). ``growth`` are the fields of :class:`torch_ref.spectral.Growth`.
        """
        growth = Growth(**growth)
        noises = stage_noises(noises, growth, self.device)

        def schedule(height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
            scheduler = self.own_scheduler()
            set_schedule(scheduler, num_inference_steps, (height // 2) * (width // 2))
            return scheduler

        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.velocity(latents, sigma, prompt_embeds, pooled, guidance_scale)

        return denoise(schedule, velocity, noises, growth)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images ``[B, 8H, 8W, 3]``, float32 in 0 to 1, of ``latents`` ``[B, C, H, W]``."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(images.float(), output_type="np")
