"""Forecasts of the model's velocity along a line, by Spectrum's schedule (arXiv 2603.01623)."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Forecaster:
    """Decides at each step whether to call the model or to extrapolate its velocity.

    The interval between two calls grows by ``growth`` steps with each call. None calls the model at every
    step.
    """

    def __init__(self, growth: float | None):
        self.growth = growth
        self.interval, self.last_call = 2.0, 4  # the first five steps call the model
        self.known: list[tuple[float, torch.Tensor]] = []

    def forget(self) -> None:
        """Forgets all velocities, which another grid cannot use."""
        self.known = []

    def __call__(self, step: int, sigma: float, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The velocity at ``sigma``, the noise level of ``step``."""
        if self.growth is None:
            return call()
        scheduled = step > 4 and step == self.last_call + int(self.interval)
        if scheduled:
            self.last_call, self.interval = step, self.interval + self.growth
        if scheduled or step <= 4 or len(self.known) < 2:
            self.known = [*self.known[-1:], (sigma, call())]
            return self.known[-1][1]
        (far, old), (near, new) = self.known
        return new + (new - old) * ((sigma - near) / (near - far))
