"""Power spectra of clean latents and when a grid is fine enough (arXiv 2605.18736).

In flow matching, `x_σ = (1-σ)·x_0 + σ·ε`: high frequencies, whose power is small, stay buried in the
noise until σ has fallen. Until then a coarse grid that does not hold them loses nothing.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError


@dataclass(frozen=True)
class Spectrum:
    """Radial power spectrum `P(ω) = A·|ω|^-β`, ω in cycles per image.

    `amplitude` is A, the power at one cycle per image; `exponent` is β.
    """

    amplitude: float
    exponent: float

    @classmethod
    def from_mapping(cls, values: Any, source: str) -> "Spectrum":
        """The spectrum that `source`, such as a file, describes with `amplitude` and `exponent`; other
        keys are passed over. UsageError if it does not.
        """
        try:
            found = cls(float(values["amplitude"]), float(values["exponent"]))
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"{source} holds no spectrum: it needs the numbers amplitude and exponent"
            ) from None
        if not 0 < found.amplitude < math.inf or not math.isfinite(found.exponent):
            raise UsageError(f"{source}: the amplitude must be above 0, and both numbers finite")
        return found

    @classmethod
    def from_file(cls, path: Path) -> "Spectrum":
        """The spectrum in a file that `jaxspd calibrate` wrote; UsageError if it holds none."""
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read a spectrum from {path} ({error})") from None
        return cls.from_mapping(values, str(path))

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
