"""Qwen-Image with spectral progressive diffusion (arXiv 2605.18736) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from torch_ref.flux1 import set_schedule
from torch_ref.reference import Reference
from torch_ref.solvers import denoise
from torch_ref.spectral import Growth, stage_noises

TEXT_LENGTH = 512
Text = tuple[torch.Tensor, "torch.Tensor | None"]


class QwenImageReference(Reference):
    """Qwen-Image as diffusers computes it; latents stay spatial, ``[B, C, H, W]`` in float32."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Qwen2.5-VL's states ``[B, S, D]``, as long as the longest prompt, and their mask ``[B, S]``.

        The mask is None if there is no padding.
        """
        return self.pipeline.encode_prompt(list(prompts), max_sequence_length=TEXT_LENGTH)

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

        With a negative prompt there are two passes. Each token of the guided prediction is rescaled to the
        norm that it has in the prompt's own prediction.
        """
        transformer, pipeline = self.pipeline.transformer, self.pipeline
        batch, channels, height, width = latents.shape
        tokens = pipeline._pack_latents(latents, batch, channels, height, width)

        def predict(embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return transformer(
                hidden_states=tokens.to(self.device, transformer.dtype),
                timestep=torch.full((batch,), sigma, dtype=torch.float32, device=self.device),
                encoder_hidden_states=embeds.to(self.device, transformer.dtype),
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, height // 2, width // 2)]] * batch,
                return_dict=False,
            )[0].float()

        velocity = predict(*text)
        if negative is not None:
            away = predict(*negative)
            guided = away + guidance_scale * (velocity - away)
            norms = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (velocity, guided))
            wanted, found = norms
            velocity = guided * (wanted / found)
        # The pipeline's unpacking takes a size in pixels and divides it by the scale factor.
        factor = pipeline.vae_scale_factor
        return pipeline._unpack_latents(velocity, height * factor, width * factor, factor)[:, :, 0]

    @torch.no_grad()
    def denoise(
        self,
        noises: Sequence[np.ndarray | torch.Tensor],
        text: Text,
        negative: Text | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 4.0,
        **growth,
    ) -> torch.Tensor:
        """Clean latents ``[B, C, H, W]`` of a whole generation, in float32.

        ``noises`` and ``growth`` are those of :meth:`torch_ref.flux1.Flux1Reference.denoise`.
        """
        growth = Growth(**growth)
        noises = stage_noises(noises, growth, self.device)

        def schedule(height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
            scheduler = self.own_scheduler()
            set_schedule(scheduler, num_inference_steps, (height // 2) * (width // 2))
            return scheduler

        def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.velocity(latents, sigma, text, negative, guidance_scale)

        return denoise(schedule, velocity, noises, growth)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images ``[B, 8H, 8W, 3]``, float32 in 0 to 1, of ``latents`` ``[B, C, H, W]``."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=vae.device)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = latents.to(vae.device)[:, :, None] * std + mean
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0][:, :, 0]
        return self.pipeline.image_processor.postprocess(images.float(), output_type="np")
