"""Z-Image with spectral progressive diffusion (arXiv 2605.18736) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from torch_ref.reference import Reference
from torch_ref.solvers import denoise
from torch_ref.spectral import Growth, stage_noises

TEXT_LENGTH = 512
Text = list[torch.Tensor]


class ZImageReference(Reference):
    """Z-Image as diffusers computes it, on latents ``[B, C, H, W]`` in float32, without a frame axis."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Qwen3's states ``[S, D]`` of each prompt, where S is the prompt's own length."""
        return self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )[0]

    @torch.no_grad()
    def velocity(
        self,
        latents: torch.Tensor,
        sigma: float,
        text: Text,
        negative: Text | None = None,
        guidance_scale: float = 4.0,
    ) -> torch.Tensor:
        """Predicted ``noise - clean`` at ``latents`` ``[B, C, H, W]``, same shape, float32.

        With a negative prompt there are two passes, and the scale counts from the prompt's own prediction.
        """
        transformer, batch = self.pipeline.transformer, len(latents)
        states = [one.to(self.device, transformer.dtype) for one in [*text, *(negative or [])]]
        # A picture is one frame. The model's time runs from 0 (noise) to 1, and it predicts clean - noise.
        pictures = latents.to(self.device, transformer.dtype)[:, :, None]
        pictures = [picture for _ in range(len(states) // batch) for picture in pictures]
        # The pipeline computes the time in float32, from thousandths.
        time = (1000 - 1000 * torch.full((len(states),), sigma, device=self.device)) / 1000
        velocities = -torch.stack(transformer(pictures, time, states, return_dict=False)[0]).float()[:, :, 0]
        if negative is None:
            return velocities
        positive, away = velocities.chunk(2)
        return positive + guidance_scale * (positive - away)

    @torch.no_grad()
    def denoise(
        self,
        noises: Sequence[np.ndarray | torch.Tensor],
        text: Text,
        negative: Text | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 4.0,
        noise_levels: Literal["official", "scheduler"] = "official",
        **growth,
    ) -> torch.Tensor:
        """Clean latents ``[B, C, H, W]`` of a whole generation, in float32.

        ``noises`` and ``growth`` are those of :meth:`torch_ref.flux1.Flux1Reference.denoise`. The sigmas are
        the official pipeline's, or the scheduler's default ones.
        """
        if noise_levels not in ("official", "scheduler"):
            raise ValueError(f"unknown noise levels {noise_levels!r}")
        growth = Growth(**growth)
        noises = stage_noises(noises, growth, self.device)

        def schedule(height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
            scheduler = self.own_scheduler()
            if noise_levels == "scheduler":
                scheduler.set_timesteps(num_inference_steps)
            else:
                sigmas = get_default_z_image_sigmas(num_inference_steps)
                scheduler.set_timesteps(sigmas=sigmas)
            return scheduler

        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.velocity(latents, sigma, text, negative, guidance_scale)

        return denoise(schedule, velocity, noises, growth)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images ``[B, 8H, 8W, 3]``, float32 in 0 to 1, of ``latents`` ``[B, C, H, W]``."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(images.float(), output_type="np")
