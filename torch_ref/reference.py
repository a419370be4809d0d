"""The base class of all families' references, which holds one of diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler


class Reference:
    """A family as diffusers computes it, stage by stage."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Opens a pipeline folder in the official layout, without the network."""
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return cls(pipeline.to(device))

    def own_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A copy of the pipeline's scheduler, whose sigmas may be edited."""
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device
