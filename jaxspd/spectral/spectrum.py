"""Power spectra of clean latents and when a grid is fine enough (arXiv 2605.18736).

In flow matching, `x_σ = (1-σ)·x_0 + σ·ε`: high frequencies, whose power is small, stay buried in the
noise until σ has fallen. Until then a coarse grid that does not hold them loses nothing.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Spectrum:
    """Radial power spectrum `P(ω) = A·|ω|^-β`, ω in cycles per image.

    `amplitude` is A, the power at one cycle per image; `exponent` is β.
    """

    amplitude: float
    exponent: float

    def power(self, omega: float) -> float:
        """P(ω) for ω > 0."""
        return self.amplitude * omega**-self.exponent

    def activation_time(self, omega: float, delta: float) -> float:
        """The σ at which frequency ω rises above the noise: δ-optimal activation.

        `t(ω) = 1 / (1 + sqrt(δ / (P·(1 + P - δ))))` for 0 < δ < 1; between 0 and 1, and falling as
        ω or δ grows.
        """
        power = self.power(omega)
        return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))
