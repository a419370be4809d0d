"""Noise levels σ of flow matching, as a checkpoint's `scheduler_config.json` asks for them."""

import json
import math

import numpy as np

from jaxspd.errors import UsageError

UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
    "thresholding",
    "solver_p",
    "disable_corrector",
)
# The settings of UniPC that `sampling.unipc` implements, each with diffusers' default for a file without it.
UNIPC = {
    "prediction_type": ("flow_prediction", "epsilon"),
    "use_flow_sigmas": (True, False),
    "solver_order": (2, 2),
    "solver_type": ("bh2", "bh2"),
    "predict_x0": (True, True),
    "final_sigmas_type": ("zero", "zero"),
}


def dynamic_shift(config: dict, tokens: int) -> float:
    """μ, linear in the number of image tokens (arXiv 2403.03206, section 5.3.2, as FLUX.1 uses it)."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base_shift + (max_shift - base_shift) * (tokens - base) / (most - base)


def override_shift(config: dict, shift: float | None) -> dict:
    """`config` with its shift replaced by `shift`, or as it is if `shift` is None.

    The shift then does not depend on the picture's size, and `shift_terminal` is dropped, as few-step LoRAs
    need it. Raises UsageError unless 0.001 ≤ `shift` ≤ 1000.
    """
    if shift is None:
        return config
    if not 1e-3 <= shift <= 1e3:
        raise UsageError(f"flow_shift must be above 0, from 0.001 to 1000, not {shift:g}")
    static = {"use_dynamic_shifting": False, "shift_terminal": None}
    return {**config, **static, "flow_shift" if is_unipc(config) else "shift": shift}


def empirical_shift(tokens: int, steps: int) -> float:
    """μ as FLUX.2's authors fitted it, for a number of image tokens and of steps.

    It is linear in tokens at 10 and at 200 steps, and linear in steps between and beyond these. Above 4300
    tokens it is the line of 200 steps, whatever the number of steps.
    """
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)


def flow_match_sigmas(config: dict, steps: int, tokens: int, mu: float | None = None) -> np.ndarray:
    """σ `[steps + 1]`, float32, from 1 down to 0: `linspace(1, 1/n, n)`, shifted, then 0.

    `tokens` is the number of image tokens at full resolution. Only dynamic shifting uses it, and not if `mu`
    is given. Raises UsageError for fewer than one step, for settings not implemented here, and for noise
    levels that do not fall.
    """
    _check(config, steps)
    mu = dynamic_shift(config, tokens) if mu is None else mu
    return _falling(np.append(_shifted(config, np.linspace(1, 1 / steps, steps), mu), 0).astype(np.float32))


def default_sigmas(config: dict, steps: int) -> np.ndarray:
    """σ `[steps + 1]`, float32, as a diffusers scheduler with a static shift chooses them itself.

    UniPC on flow matching shifts `linspace(1, 1/1000, n + 1)` without its last entry. Flow matching's Euler
    takes n levels between the shifted ends of its 1000 time steps, and shifts these once more. Raises
    UsageError as `flow_match_sigmas` does, and for a dynamic shift.
    """
    _check(config, steps)
    if config.get("use_dynamic_shifting"):
        raise UsageError("scheduler_config.json asks for use_dynamic_shifting: not supported here")
    lowest = 1 / config.get("num_train_timesteps", 1000)
    if not is_unipc(config):
        shift = config.get("shift", 1.0)
        lowest = shift * lowest / (1 + (shift - 1) * lowest)
        return _falling(np.append(_shifted(config, np.linspace(1, lowest, steps)), 0).astype(np.float32))
    exact = _shifted(config, np.linspace(1, lowest, steps + 1)[:-1])
    # The official scheduler does this, because log(1 - σ) is infinite at 1.
    exact[0] -= 1e-6
    sigmas = np.append(exact, 0).astype(np.float32)
    # Models with UniPC read 1000·σ truncated to an integer. Where 1000·σ is almost an integer, rounding to
    # float32 must not change the truncated value.
    time, levels = np.trunc(1000 * exact), sigmas[:-1]
    for _ in range(2):  # each pass moves one unit in the last place; two are always enough
        told = np.floor(np.float32(1000) * levels)
        towards = np.where(told < time, 1, np.where(told > time, 0, levels)).astype(np.float32)
        levels[:] = np.nextafter(levels, towards)
    return _falling(sigmas)


def is_unipc(config: dict) -> bool:
    return config.get("_class_name") == "UniPCMultistepScheduler"


def _check(config: dict, steps: int) -> None:
    if steps < 1:
        raise UsageError(f"the number of inference steps must be 1 or more, not {steps}")
    asked = [name for name in UNSUPPORTED if config.get(name)]
    if is_unipc(config):
        for name, (wanted, default) in UNIPC.items():
            if (given := config.get(name, default)) != wanted:
                asked.append(f"{name} {json.dumps(given)}")
    if asked:
        raise UsageError(f"scheduler_config.json asks for {', '.join(asked)}: not supported")
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise UsageError(f"scheduler_config.json: unknown time_shift_type {kind!r}")


def _shifted(config: dict, sigmas: np.ndarray, mu: float = 0.0) -> np.ndarray:
    """`sigmas` shifted towards 1, by `mu` if that is dynamic, then stretched to end in `shift_terminal`."""
    if config.get("use_dynamic_shifting"):
        # Beyond 100 all levels round to 1, which `_falling` refuses.
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(min(mu, 100))
    else:
        shift = config.get("flow_shift" if is_unipc(config) else "shift", 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # `_falling` refuses what is not finite
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if terminal := config.get("shift_terminal"):
        if len(sigmas) == 1:
            # The official scheduler divides by zero here, and its pictures are black.
            raise UsageError("one step is too few for a schedule with shift_terminal; use 2 steps or more")
        # The distance to 1 is scaled so that the last step starts at `terminal`.
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return sigmas


def _falling(sigmas: np.ndarray) -> np.ndarray:
    """`sigmas` as they are. Raises UsageError unless each is below the one before it."""
    if not (np.diff(sigmas) < 0).all():
        raise UsageError("the noise levels do not fall from step to step; use fewer steps, or another shift")
    return sigmas
