"""Noise levels σ of flow matching, as a checkpoint's `scheduler_config.json` asks for them."""

import math

import numpy as np

from jaxspd.errors import UsageError

UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def dynamic_shift(config: dict, tokens: int) -> float:
    """μ, linear in the number of image tokens (arXiv 2403.03206, section 5.3.2, as FLUX.1 uses it)."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base_shift + (max_shift - base_shift) * (tokens - base) / (most - base)


def flow_match_sigmas(config: dict, steps: int, tokens: int) -> np.ndarray:
    """σ `[steps + 1]`, float32, from 1 down to 0: `linspace(1, 1/n, n)`, shifted, then 0.

    `tokens` counts the image tokens of the full resolution; only dynamic shifting uses it. Raises
    UsageError for fewer than one step or a scheduler this does not implement.
    """
    if steps < 1:
        raise UsageError(f"the number of inference steps must be 1 or more, not {steps}")
    asked = [name for name in UNSUPPORTED if config.get(name)]
    if asked:
        raise UsageError(f"scheduler_config.json asks for {', '.join(asked)}: not supported")
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise UsageError(f"scheduler_config.json: unknown time_shift_type {kind!r}")
    sigmas = np.linspace(1, 1 / steps, steps)
    if config.get("use_dynamic_shifting"):
        mu = dynamic_shift(config, tokens)
        shift = mu if kind == "linear" else math.exp(mu)
    else:
        shift = config.get("shift", 1.0)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if terminal := config.get("shift_terminal"):
        # Stretched towards 1 so that the last step starts at `terminal`.
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0).astype(np.float32)
