"""Wan text-to-video with spectral progressive diffusion (arXiv 2605.18736) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from torch_ref.forecast import Forecaster
from torch_ref.reference import Reference
from torch_ref.solvers import Scheduler, grow, solver_on
from torch_ref.spectral import WAN_SPECTRUM, Growth, segments, stage_noises

SHIFT_NAMES = {FlowMatchEulerDiscreteScheduler: "shift", UniPCMultistepScheduler: "flow_shift"}


def set_schedule(
    scheduler: Scheduler, num_inference_steps: int, flow_shift: float | None = None
) -> Scheduler:
    """A copy of ``scheduler``, ready for its first step. ``flow_shift`` replaces its shift, if given."""
    override = {} if flow_shift is None else {SHIFT_NAMES[type(scheduler)]: flow_shift}
    schedule = type(scheduler).from_config(scheduler.config, **override)
    schedule.set_timesteps(num_inference_steps)
    schedule.set_begin_index(0)
    return schedule


class WanReference(Reference):
    """Wan as diffusers computes it, on latents ``[B, C, T, H, W]`` in float32."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> WanReference:
        """Like :meth:`Reference.from_pretrained`, with the VAE in float32, as the model cards load it."""
        return super().from_pretrained(folder, {"default": dtype, "vae": torch.float32}, device)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """UMT5 states ``[B, S, D]`` of ``prompts`` and of ``negative_prompts``, zero after a prompt's end."""
        return self.pipeline.encode_prompt(
            list(prompts),
            None if negative_prompts is None else list(negative_prompts),
            do_classifier_free_guidance=negative_prompts is not None,
            max_sequence_length=min(512, self.pipeline.tokenizer.model_max_length),
        )

    def timestep(self, sigma: float) -> float:
        """The model's time at noise level ``sigma``. With UniPC it is rounded down to an integer."""
        scheduler = self.pipeline.scheduler
        time = sigma * scheduler.config.num_train_timesteps
        return int(time) if isinstance(scheduler, UniPCMultistepScheduler) else time

    def velocity(
        self,
        latents: torch.Tensor,
        sigma: float,
        prompt_embeds: torch.Tensor,
        negative_embeds: torch.Tensor | None = None,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
    ) -> torch.Tensor:
        """Predicted ``noise - clean`` at ``latents`` ``[B, C, T, H, W]``, same shape, float32.

        With ``negative_embeds`` there are two passes and classifier-free guidance. Without them there is one
        pass, and ``guidance_scale`` has no effect. Below Wan 2.2's boundary the second transformer predicts,
        with ``guidance_scale_2``, or ``guidance_scale`` if that is None.
        """
        scales = guidance_scale, guidance_scale_2
        return self._velocity(latents, self.timestep(sigma), prompt_embeds, negative_embeds, scales)

    @torch.no_grad()
    def _velocity(self, latents, timestep, prompt_embeds, negative_embeds, scales) -> torch.Tensor:
        transformer, guidance_scale = self.pipeline.transformer, scales[0]
        boundary = self.pipeline.config.boundary_ratio
        if boundary is not None and timestep < boundary * self.pipeline.scheduler.config.num_train_timesteps:
            transformer = self.pipeline.transformer_2
            guidance_scale = scales[0] if scales[1] is None else scales[1]

        def predict(embeds: torch.Tensor) -> torch.Tensor:
            return transformer(
                hidden_states=latents.to(self.device, transformer.dtype),
                timestep=torch.full((len(latents),), timestep, dtype=torch.float32, device=self.device),
                encoder_hidden_states=embeds.to(self.device, transformer.dtype),
                return_dict=False,
            )[0].float()

        velocity = predict(prompt_embeds)
        if negative_embeds is None:
            return velocity
        negative = predict(negative_embeds)
        return negative + guidance_scale * (velocity - negative)

    @torch.no_grad()
    def denoise(
        self,
        noises: Sequence[np.ndarray | torch.Tensor],
        prompt_embeds: torch.Tensor,
        negative_embeds: torch.Tensor | None = None,
        *,
        num_inference_steps: int,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        scheduler: Literal["unipc", "euler"] = "unipc",
        flow_shift: float | None = None,
        **growth,
    ) -> torch.Tensor:
        """Clean latents ``[B, C, T, H, W]`` of a whole generation, in float32.

        ``noises`` and ``growth`` are those of :meth:`torch_ref.flux1.Flux1Reference.denoise`. Only the last
        two axes grow. The sigmas are always those of the checkpoint's scheduler, with its own shift unless
        ``flow_shift`` is given. ``scheduler`` chooses the rule that steps from one to the next.
        """
        growth = Growth(**{"spectrum": WAN_SPECTRUM, **growth})
        noises = stage_noises(noises, growth, self.device)
        height, width = noises[-1].shape[-2:]
        schedule = set_schedule(self.pipeline.scheduler, num_inference_steps, flow_shift)
        solver = solver_on(schedule, scheduler)
        sigmas = solver.sigmas[:-1].tolist()
        # Computed from these sigmas, which are rounded to float32, truncated times could differ.
        timesteps = schedule.timesteps.tolist()
        latents, forecaster = noises[0], Forecaster(growth.forecast)
        for stage, segment in enumerate(segments(growth, [sigmas] * len(noises), height, width)):
            first = segment.start
            if stage:
                ratio = growth.ladder[stage] / growth.ladder[stage - 1]
                latents = grow(latents, noises[stage], segment, ratio, (solver, solver), growth)
                forecaster.forget()
            for i, sigma in enumerate(segment.sigmas, first):
                if sigma != solver.sigmas[i].item():
                    solver.sigmas[i], timesteps[i] = sigma, self.timestep(sigma)
            for i in range(first, first + len(segment.sigmas) - 1):
                scales = guidance_scale, guidance_scale_2
                inputs = latents, timesteps[i], prompt_embeds, negative_embeds, scales
                sigma = segment.sigmas[i - first]
                velocity = forecaster(i, sigma, lambda inputs=inputs: self._velocity(*inputs))
                latents = solver.step(velocity, solver.timesteps[i], latents).prev_sample
        return latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Videos ``[B, F, 8H, 8W, 3]``, float32 in 0 to 1, of ``latents`` ``[B, C, T, H, W]``."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=vae.device)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = vae.decode((latents.to(vae.device) * std + mean).to(vae.dtype), return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(frames.float(), output_type="np")
