"""FLUX.2 with spectral progressive diffusion (arXiv 2605.18736) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps

from torch_ref.reference import Reference
from torch_ref.solvers import denoise
from torch_ref.spectral import Growth, expand, stage_noises


def set_schedule(scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, tokens: int) -> None:
    """Prepares ``scheduler`` for a picture of ``tokens`` tokens at full resolution."""
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    retrieve_timesteps(scheduler, sigmas=sigmas, mu=compute_empirical_mu(tokens, num_inference_steps))
    scheduler.set_begin_index(0)


class Flux2Reference(Reference):
    """FLUX.2 [dev] or [klein] as diffusers computes it, on patchified latents ``[B, 4C, H, W]``, float32."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int = 512) -> torch.Tensor:
        """The states ``[B, S, 3D]`` of three hidden layers for ``prompts``, padding included."""
        return self.pipeline.encode_prompt(list(prompts), max_sequence_length=length)[0]

    @torch.no_grad()
    def velocity(
        self,
        latents: torch.Tensor,
        sigma: float,
        text: torch.Tensor,
        negative: torch.Tensor | None = None,
        guidance_scale: float = 4.0,
    ) -> torch.Tensor:
        """Predicted ``noise - clean`` at ``latents`` ``[B, 4C, H, W]``, same shape, float32.

        [dev] embeds the guidance scale. With a negative prompt, as for [klein]'s base models, there are two
        passes.
        """
        transformer, pipeline = self.pipeline.transformer, self.pipeline
        batch, _, height, width = latents.shape
        image_ids = pipeline._prepare_latent_ids(latents).to(self.device)
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((batch,), guidance_scale, dtype=torch.float32, device=self.device)

        def predict(embeds: torch.Tensor) -> torch.Tensor:
            return transformer(
                hidden_states=pipeline._pack_latents(latents).to(self.device, transformer.dtype),
                timestep=torch.full((batch,), sigma, dtype=torch.float32, device=self.device),
                guidance=guidance,
                encoder_hidden_states=embeds.to(self.device, transformer.dtype),
                txt_ids=pipeline._prepare_text_ids(embeds).to(self.device),
                img_ids=image_ids,
                return_dict=False,
            )[0].float()

        velocity = predict(text)
        if negative is not None:
            away = predict(negative)
            velocity = away + guidance_scale * (velocity - away)
        # `image_ids` says that tokens lie row by row. The pipelines' own functions to unpack them differ.
        return velocity.mT.unflatten(-1, (height, width))

    @torch.no_grad()
    def denoise(
        self,
        noises: Sequence[np.ndarray | torch.Tensor],
        text: torch.Tensor,
        negative: torch.Tensor | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 4.0,
        grid: Literal["patchified", "latent"] = "patchified",
        **growth,
    ) -> torch.Tensor:
        """Clean latents ``[B, 4C, H, W]`` of a whole generation, in float32.

        ``noises`` and ``growth`` are those of :meth:`torch_ref.flux1.Flux1Reference.denoise`. ``grid`` says
        which grid grows: the patchified one, or the latent one, which has twice its size.
        """
        growth = Growth(**growth)
        views = {}
        if grid == "latent":
            views = {"grown": self.pipeline._unpatchify_latents, "back": self.pipeline._patchify_latents}
        noises = stage_noises(noises, growth, self.device, patch=1, **views)

        def schedule(height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
            scheduler = self.own_scheduler()
            set_schedule(scheduler, num_inference_steps, height * width)
            return scheduler

        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.velocity(latents, sigma, text, negative, guidance_scale)

        def expand_unpatchified(x: torch.Tensor, noise: torch.Tensor, sigma: float, transform: str):
            x, noise = (self.pipeline._unpatchify_latents(part) for part in (x, noise))
            return self.pipeline._patchify_latents(expand(x, noise, sigma, transform))

        grown = {"patchified": expand, "latent": expand_unpatchified}[grid]
        return denoise(schedule, velocity, noises, growth, grown)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images ``[B, 16H, 16W, 3]``, float32 in 0 to 1, of ``latents`` ``[B, 4C, H, W]``."""
        vae = self.pipeline.vae
        mean = vae.bn.running_mean[:, None, None]
        std = torch.sqrt(vae.bn.running_var[:, None, None] + vae.config.batch_norm_eps)
        latents = self.pipeline._unpatchify_latents(latents.to(vae.device) * std + mean)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(images.float(), output_type="np")
