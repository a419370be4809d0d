"""Power spectra of clean latents, and the noise level below which a grid is too coarse (arXiv 2605.18736).

In flow matching, `x_σ = (1-σ)·x_0 + σ·ε`. High frequencies have little power and stay buried in the noise
until σ has fallen. Until then a coarse grid, which does not hold them, loses nothing.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import parse_json, read_text


@dataclass(frozen=True)
class Spectrum:
    """Radial power spectrum `P(ω) = A·|ω|^-β`, ω in cycles per image.

    `amplitude` is A, the power at one cycle per image; `exponent` is β.
    """

    amplitude: float
    exponent: float

    @classmethod
    def from_mapping(cls, values: Any, source: str) -> "Spectrum":
        """The spectrum in a parsed JSON object; keys but `amplitude` and `exponent` are ignored.

        `source` names the object's origin in messages. Raises UsageError unless both are positive, finite
        numbers.
        """
        given = values if isinstance(values, dict) else {}
        for name in ("amplitude", "exponent"):
            value = given.get(name)
            if value is None or type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
                found = "none" if value is None else json.dumps(value, default=repr)
                raise UsageError(f"{source} needs a positive number as {name}, and has {found}")
        return cls(float(given["amplitude"]), float(given["exponent"]))

    @classmethod
    def from_file(cls, path: Path) -> "Spectrum":
        """The spectrum in a JSON file that `jaxspd calibrate` wrote. Raises UsageError if it holds none."""
        text = read_text(path, "a spectrum from")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UsageError(f"cannot read a spectrum from {path} ({error})") from None
        return cls.from_mapping(values, str(path))

    def power(self, omega: float) -> float:
        """P(ω) for ω > 0."""
        return self.amplitude * omega**-self.exponent

    def activation_time(self, omega: float, delta: float) -> float:
        """The σ at which frequency ω rises above the noise: δ-optimal activation.

        `t(ω) = 1 / (1 + sqrt(δ / (P·(1 + P - δ))))` for 0 < δ < 1, where P is P(ω). It lies between 0 and 1,
        and falls as ω or δ grows.
        """
        power = self.power(omega)
        return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))
